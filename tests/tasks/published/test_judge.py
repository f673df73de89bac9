"""The judge's client against an endpoint of the test's own."""

import logging
import socket
from collections.abc import Mapping
from typing import Any

import pytest

from harness.errors import WinnowError
from tasks.published import judge as judge_module
from tasks.published.judge import PATIENCE, Judge, Question, closing_object
from tests.judge_endpoint import asked, serving


def number(found: Mapping[str, Any]) -> int:
    if type(found.get("n")) is not int:
        raise ValueError('"n" must be a whole number')
    return found["n"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_verdicts_come_in_the_order_of_the_questions() -> None:
    with serving(lambda body: f'so be it: {{"n": {asked(body)}}}') as endpoint:
        verdicts = endpoint.judge(concurrency=4).ask([Question(str(n), number) for n in range(20)])
    assert [verdict.value for verdict in verdicts] == list(range(20))
    assert verdicts[3].replies == ('so be it: {"n": 3}',) and not verdicts[3].fault


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-1\n")
    with serving(lambda body: '{"n": 1}') as endpoint:
        judge = endpoint.judge(api_key_env="JUDGE_KEY", request={"temperature": 0.5, "seed": 3})
        judge.ask([Question("how many?", number)])
    assert endpoint.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "critic",
            "messages": [{"role": "user", "content": "how many?"}],
            "temperature": 0.5,
            "seed": 3,
        }
    ]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret-1"
    assert "secret" not in repr(judge)


def test_a_malformed_verdict_is_asked_for_again_with_what_was_wrong() -> None:
    replies = iter(["no idea", '{"n": "three"}', '{"n": 3}'])
    with serving(lambda body: next(replies)) as endpoint:
        (verdict,) = endpoint.judge().ask([Question("how many?", number)])
    assert verdict.value == 3 and len(verdict.replies) == 3
    first, second, third = (request["messages"] for request in endpoint.requests)
    assert len(first) == 1 and second[1] == {"role": "assistant", "content": "no idea"}
    assert "does not end with a JSON object" in second[2]["content"]
    assert third[0] == first[0] and '"n" must be a whole number' in third[2]["content"]


def test_a_judge_that_never_gives_a_valid_verdict_leaves_it_missing() -> None:
    with serving(lambda body: '{"n": 0.5}') as endpoint:
        (verdict,) = endpoint.judge(retries=2).ask([Question("how many?", number)])
    assert verdict.value is None and verdict.replies == ('{"n": 0.5}',) * 3
    assert verdict.fault == 'no valid verdict: "n" must be a whole number'


def test_an_answer_without_text_is_asked_for_again_as_it_was() -> None:
    replies = iter([None, '{"n": 4}'])
    with serving(lambda body: next(replies)) as endpoint:
        (verdict,) = endpoint.judge().ask([Question("how many?", number)])
    assert verdict.value == 4
    assert [len(request["messages"]) for request in endpoint.requests] == [1, 1]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again_after_the_pause_it_names(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(judge_module.time, "sleep", pauses.append)
    replies: Any = iter([(status, "busy"), (status, "busy"), '{"n": 5}'])
    with serving(lambda body: next(replies)) as endpoint:
        endpoint.retry_after = "7"
        (verdict,) = endpoint.judge(backoff=1.0).ask([Question("how many?", number)])
    assert verdict.value == 5 and pauses == [7.0, 7.0]


def test_without_a_named_pause_it_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(judge_module.time, "sleep", pauses.append)
    (verdict,) = Judge(closed_port(), "critic", None, backoff=0.5).ask([Question("?", number)])
    assert verdict.value is None and verdict.fault.startswith("no answer: ") and "refused" in verdict.fault
    assert pauses == [0.5, 1.0, 2.0]


def test_an_endpoint_that_is_down_is_not_asked_for_ever() -> None:
    judge = Judge(closed_port(), "critic", None, retries=0, backoff=0.0, concurrency=1)
    faults = [verdict.fault for verdict in judge.ask([Question("?", number)] * (PATIENCE + 3))]
    assert [fault.partition(":")[0] for fault in faults] == ["no answer"] * PATIENCE + ["not asked"] * 3


def test_a_refused_question_is_missing_at_once_and_no_sign_of_an_endpoint_that_is_down() -> None:
    with serving(lambda body: (400, "prompt too long") if asked(body) == "long" else '{"n": 6}') as endpoint:
        questions = [Question("long", number)] * (PATIENCE + 1) + [Question("short", number)]
        *refused, last = endpoint.judge().ask(questions)
    assert {verdict.fault for verdict in refused} == {"no answer: HTTP 400: prompt too long"}
    assert last.value == 6 and len(endpoint.requests) == PATIENCE + 2


def test_something_else_than_a_chat_endpoint() -> None:
    with serving(lambda body: (200, "")) as endpoint:
        endpoint.server.RequestHandlerClass.do_POST = _plain_page  # type: ignore[attr-defined]
        (verdict,) = endpoint.judge(retries=0).ask([Question("?", number)])
    assert verdict.value is None and "not the answer of a chat endpoint" in verdict.fault


def _plain_page(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "5")
    handler.end_headers()
    handler.wfile.write(b"hello")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_the_check_refuses_settings_that_cannot_work(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-2")
    said = rf"critic refuses.*HTTP {status}: no such thing as \[key\]"
    with (
        serving(lambda body: (status, "no such thing\nas secret-2")) as endpoint,
        pytest.raises(WinnowError, match=said) as refusal,
    ):
        endpoint.judge(api_key_env="JUDGE_KEY").check()
    assert "secret" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_check_only_warns_of_an_endpoint_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Judge(closed_port(), "critic", None).check()
    assert "does not answer" in caplog.text
    caplog.clear()
    with serving(lambda body: "ready") as endpoint:
        endpoint.judge().check()
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base_url": "localhost:8000"}, "judge.base_url=localhost:8000"),
        ({"timeout": 0}, "timeout=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"api_key_env": "NOBODY_SETS_THIS"}, "judge.api_key_env=NOBODY_SETS_THIS is not set"),
        ({"api_key_env": "TWO_LINES"}, "judge.api_key_env=TWO_LINES is not set, or no key"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWO_LINES", "secret\nsecret")
    monkeypatch.delenv("NOBODY_SETS_THIS", raising=False)
    with pytest.raises(WinnowError) as error:
        Judge(**{"base_url": "http://localhost/v1", "model": "critic", "api_key_env": None} | options)
    assert said in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"n": 1}', {"n": 1}),
        ('because of {this}:\n```json\n{"n": 1, "why": "a\nb"}\n```\n', {"n": 1, "why": "a\nb"}),
        ('first {"n": 1}, no: {"n": {"m": 2}}', {"n": {"m": 2}}),
    ],
)
def test_the_object_that_closes_a_reply(reply: str, found: dict[str, Any]) -> None:
    assert closing_object(reply) == found


@pytest.mark.parametrize("reply", ["", "7", "[1]", '{"n": 1} I think', '{"n": 1', "{'n': 1}"])
def test_a_reply_that_closes_with_no_object(reply: str) -> None:
    with pytest.raises(ValueError, match="does not end with a JSON object"):
        closing_object(reply)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_host(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-very-secret")
    with serving(lambda body: '{"score": 1}') as elsewhere, serving(lambda body: (status, "")) as first:
        first.location = f"{elsewhere.url}/chat/completions?was=sk-very-secret"
        (verdict,) = first.judge(api_key_env="KEY", retries=2).ask([Question("?", dict)])
        assert not elsewhere.requests and len(first.requests) == 1
    assert verdict.value is None and f"HTTP {status}" in verdict.fault
    assert elsewhere.url in verdict.fault and "sk-very-secret" not in verdict.fault


@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_reply_that_repeats_the_key_is_masked(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-very/secret+")
    said = 'your key sk-very/secret+ or sk-very%2Fsecret%2B {"score": "sk-very/secret+"}'
    with serving(lambda body: said if status == 200 else (status, said)) as endpoint:
        (verdict,) = endpoint.judge(api_key_env="KEY", retries=0).ask([Question("?", dict)])
        assert endpoint.headers[0]["Authorization"] == "Bearer sk-very/secret+"
    kept = f"{verdict.value} {verdict.replies} {verdict.fault}"
    assert "[key]" in kept and "secret" not in kept
