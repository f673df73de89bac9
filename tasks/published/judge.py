"""A language model that judges texts, behind any OpenAI-compatible endpoint (POST ``base_url``/chat/completions).

A verdict is a JSON object with which the judge's reply ends; whatever it says before is kept, and read by nobody. A
question that gets no valid verdict has none: its value is missing, never a zero.
"""

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from harness.errors import WinnowError
from harness.progress import bar

log = logging.getLogger(__name__)

# Too many requests, timeouts and the like; every 5xx too.
_TEMPORARY = (408, 409, 425, 429)
_LONGEST_PAUSE = 60.0
# After so many questions in a row without any answer the endpoint is taken to be down, and not asked the rest.
PATIENCE = 8
_READY = 'Answer with the JSON object {"ready": true} alone.'


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: the key would go along to whatever host it leads to."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


@dataclass(frozen=True)
class Question:
    """``read`` makes a value of the object at the end of the reply, and raises ValueError for one that is not valid."""

    prompt: str
    read: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Verdict:
    """``value`` None: missing, and ``fault`` says why. ``replies``: the judge's raw replies, the last one counts."""

    value: Any = None
    replies: tuple[str, ...] = ()
    fault: str = ""


class _NoAnswer(Exception):
    """``pause``: the seconds that the endpoint asks us to wait (0: it does not say), None where it refuses for good."""

    def __init__(self, reason: str, pause: float | None = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class Judge:
    """``request`` is sent with every question; ``timeout`` and ``backoff`` are in seconds.

    A question is asked up to 1 + ``retries`` times. No redirect is followed, and the key is masked in all that is kept
    of a reply. After a reply without a valid verdict the judge is told what was
    wrong with it. Raises WinnowError, when it is made, for an address or a number that cannot be, and where the
    environment variable ``api_key_env`` is not set; the key itself is read when it is sent, and kept nowhere.
    """

    base_url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    request: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 2048})
    timeout: float = 120.0
    retries: int = 3
    backoff: float = 1.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise WinnowError(f"judge.base_url={self.base_url}: give an address such as http://localhost:8000/v1")
        if self.timeout <= 0 or self.retries < 0 or self.backoff < 0 or self.concurrency < 1:
            raise WinnowError(
                f"judge: timeout={self.timeout}, retries={self.retries}, backoff={self.backoff}, "
                f"concurrency={self.concurrency}: needs more than 0, 0 or more, 0 or more, 1 or more"
            )
        # A key with a line break in it would come back, in full, in the message of an error.
        if self.api_key_env and not (self._key.isascii() and self._key.isprintable() and self._key):
            raise WinnowError(
                f"judge.api_key_env={self.api_key_env} is not set, or no key: export the key under that name, or give "
                "judge.api_key_env=null for a server that asks for none"
            )

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_env or "", "").strip()

    def check(self) -> None:
        """Ask for a sign of life, before work that a wrong setting would waste.

        Raises WinnowError where the endpoint refuses the request (a wrong key, model, address or ``request``). One that
        does not answer may be back when it is needed: that is only warned of.
        """
        try:
            self._reply([{"role": "user", "content": _READY}])
        except _NoAnswer as error:
            if error.pause is None:
                raise WinnowError(
                    f"the judge {self.model} refuses to answer ({error}): check judge.base_url, judge.model, the key "
                    "and judge.request"
                ) from error
            log.warning("the judge %s does not answer (%s); it is asked again when there is something to judge",
                        self.model, error)  # fmt: skip

    def ask(self, questions: Sequence[Question], progress: str = "") -> list[Verdict]:
        """The verdict on each question, in order; never raises for an endpoint that is down or talks nonsense."""
        unanswered, lock = 0, threading.Lock()

        def one(question: Question) -> Verdict:
            nonlocal unanswered
            if unanswered >= PATIENCE:
                return Verdict(fault=f"not asked: {PATIENCE} questions in a row got no answer")
            verdict, answered = self._judged(question)
            with lock:
                unanswered = 0 if answered else unanswered + 1
            return verdict

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(bar(progress, len(questions), pool.map(one, questions)))

    def _judged(self, question: Question) -> tuple[Verdict, bool]:
        """The verdict, and whether the endpoint gave any answer at last."""
        turns = [{"role": "user", "content": question.prompt}]
        replies: list[str] = []
        fault, answered = "", False
        for attempt in range(1 + self.retries):
            try:
                replies.append(self._reply(turns))
            except _NoAnswer as error:
                fault, answered = f"no answer: {error}", error.pause is None
                if error.pause is None:
                    break
                if attempt < self.retries:
                    time.sleep(min(_LONGEST_PAUSE, error.pause or self.backoff * 2**attempt))
                continue
            try:
                return Verdict(question.read(closing_object(replies[-1])), tuple(replies)), True
            except ValueError as error:
                fault, answered = f"no valid verdict: {error}", True
                turns = turns[:1] + _correction(replies[-1], error)
        return Verdict(None, tuple(replies), fault), answered

    def _reply(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The text of one answer. Raises _NoAnswer."""
        body = {"model": self.model, "messages": list(turns), **self.request}
        # Some hosts turn the default name of Python's client away.
        headers = {"Content-Type": "application/json", "User-Agent": "winnow"}
        if self.api_key_env:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with _OPENER.open(request, timeout=self.timeout) as response:
                answer = json.load(response)
            text = answer["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            if 300 <= error.code < 400:
                where = self._masked(str(error.headers.get("Location")))
                raise _NoAnswer(
                    f"HTTP {error.code}: it sends us on to {where}: is that the judge.base_url?", None
                ) from None
            reason = f"HTTP {error.code}: {self._masked(_said(error))}"
            if error.code in _TEMPORARY or error.code >= 500:
                raise _NoAnswer(reason, _seconds(error.headers.get("Retry-After"))) from error
            raise _NoAnswer(reason, None) from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            said = str(getattr(error, "reason", "")) or str(error) or type(error).__name__
            raise _NoAnswer(self._masked(said)) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            said = self._masked(f"{type(error).__name__}: {error}")
            raise _NoAnswer(f"not the answer of a chat endpoint ({said})") from error
        return self._masked(text) if isinstance(text, str) else ""

    def _masked(self, said: str) -> str:
        """Without the key: some servers repeat the one that they refuse, and a model may be told it."""
        key = self._key if self.api_key_env else ""
        for known in {key, urllib.parse.quote(key, safe="")} - {""}:
            said = said.replace(known, "[key]")
        return said


def _correction(reply: str, error: ValueError) -> list[dict[str, str]]:
    """What follows a reply without a valid verdict: asked the same again, a judge at temperature 0 would repeat it."""
    if not reply.strip():
        return []
    asked = f"That is no valid verdict: {error}. Give the JSON object again, and nothing else."
    return [{"role": "assistant", "content": reply}, {"role": "user", "content": asked}]


def closing_object(reply: str) -> Mapping[str, Any]:
    """The JSON object with which a reply ends, in a code fence or not. Raises ValueError where there is none."""
    text = reply.strip().removesuffix("```").rstrip()
    decoder = json.JSONDecoder(strict=False)  # line breaks in its strings do no harm
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except ValueError:
            end = -1
        if end == len(text):
            return found
        start = text.find("{", start + 1)
    raise ValueError("the reply does not end with a JSON object")


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what a refusal says, on one line."""
    try:
        with error:
            return " ".join(error.read(300).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return error.reason


def _seconds(retry_after: str | None) -> float:
    """The pause that a server asks for; 0.0 where it asks for none, or names a date."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0
