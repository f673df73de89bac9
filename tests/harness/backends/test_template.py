"""Chat templates are other people's programs: they end, one way or another."""

import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from harness.backends import template
from harness.backends.template import apply_template
from harness.backends.tokens import prompt_text
from harness.calibration.tokens import tokenize
from harness.data.rows import Document
from harness.errors import WinnowError

FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TURNS = [{"role": "user", "content": "Add 3 and 4."}]


class Tokenizer:
    bos_token, eos_token_id = None, 0

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, turns: Any, tokenize: bool, **options: Any) -> str:
        return render_jinja_template([turns], chat_template=self.chat_template, **options)[0][0]


def test_a_template_is_applied_and_leaves_no_alarm() -> None:
    before = signal.getsignal(signal.SIGALRM)
    assert apply_template(Tokenizer("{{ messages[0].content }}"), TURNS) == "Add 3 and 4."
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_applies_it_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(apply_template(Tokenizer("x"), TURNS)))
    thread.start()
    thread.join()
    assert found == ["x"]


def test_one_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)
    tokenizer, started = Tokenizer(FOR_EVER), time.monotonic()
    with pytest.raises(TimeoutError):
        apply_template(tokenizer, TURNS)
    with pytest.raises(WinnowError, match="chat template refuses.*does not end within 0.2 seconds"):
        prompt_text(tokenizer, TURNS, {})
    with pytest.raises(WinnowError, match="row 3: the tokenizer's chat template refuses it.*does not end"):
        tokenize([Document("", messages=(("user", "?"),), where="row 3")], tokenizer, 8, chat_template=True)
    assert time.monotonic() - started < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("text", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% for %}", "{{ none.x.y }}"])
def test_one_that_raises_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(WinnowError, match="chat template refuses") as told:
        prompt_text(Tokenizer(text), TURNS, {})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_lm_eval_refuses_it_in_one_line_too(text: str) -> None:
    adapter = pytest.importorskip("harness.backends.lm_eval").BackendLM
    with pytest.raises(WinnowError, match="chat template refuses"):
        adapter.apply_chat_template(SimpleNamespace(tokenizer=Tokenizer(text)), TURNS)
