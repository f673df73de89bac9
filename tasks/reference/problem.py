"""The unit of the reference data: one prompt with its reference answer, and the rule that keeps splits apart."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")


@dataclass(frozen=True)
class Problem:
    """One training document or evaluation item.

    ``prompt + answer`` is what the model is trained on (followed by the end-of-text token); at evaluation
    it sees ``prompt`` and must write the answer. ``meta`` holds what the scorer needs, JSON-able.
    """

    domain: str
    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Stable name: 12 hex digits of the prompt's SHA-256, behind the domain."""
        return f"{self.domain}-{hashlib.sha256(self.prompt.encode()).hexdigest()[:12]}"

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def bucket(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(problem_key: str, composition_key: str | None = None, held_out: float = 0.1) -> Split:
    """The one split a problem may appear in.

    A composition (the structure of a problem without its constants) that falls in the held-out share belongs
    to ``evaluation`` whole, so that the model never trains on it. The problems of every other composition
    are divided, by problem, between ``train`` (95 %) and ``calibration`` (5 %). Without a composition key the
    problem itself is held out in the same proportion.
    """
    if bucket("composition:" + (composition_key if composition_key is not None else problem_key)) < held_out:
        return "evaluation"
    return "calibration" if bucket("problem:" + problem_key) < 0.05 else "train"
