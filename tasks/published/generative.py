"""What the published tasks that write share: how a model is asked, whether it thinks first, and what it answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from harness.backends.thinking import opened_thought
from harness.backends.tokens import cut
from harness.contracts.backend import Backend, Reader, TokenCounter
from harness.contracts.record import Sample, Score
from harness.contracts.task import Need, TaskResult
from harness.data.schema import Row
from harness.errors import WinnowError
from tasks.published.items import Benchmark, asks_in_chat, tokens_to_write
from tasks.published.thought import split_thought
from tasks.scores import WITHOUT_THOUGHT, share_score

THINKING = ("auto", "on", "off")


def truncated_score(task: str, truncated: Sequence[bool]) -> Score:
    """The share of a task's texts that end inside a thought, as a task of its own."""
    score = share_score(f"{task}_truncated", "truncated", [float(one) for one in truncated])
    return replace(score, kind="probe", higher_is_better=False)


@dataclass(frozen=True)
class Answer:
    """``text``: all that was written after ``prompt``; ``answer``: what of it is no thought, nothing where it is
    ``truncated``, which ends inside a thought; ``thinks``: the task's answers hold thoughts or may; ``budget``: tokens
    that could be written for a thought."""

    prompt: str
    text: str
    answer: str
    truncated: bool = False
    thinks: bool = False
    budget: int = 0

    def detail(self) -> dict[str, Any]:
        """What a sample says of the thought; nothing where there is none."""
        return {WITHOUT_THOUGHT: self.answer, "truncated": self.truncated} if self.thinks else {}


@dataclass(frozen=True)
class GenerativeBenchmark(Benchmark):
    """A benchmark whose answers are written, greedily, in up to ``max_new_tokens`` tokens.

    ``chat``: "auto", true or false (``asks_in_chat``); ``template`` goes to the chat template. ``thinking``: "on" or
    "off" sets the template's own switch, over ``template``; "auto" leaves it as it is. Where the model is told to think
    first, or its template opens a thought, ``thinking_tokens`` more may be written, and stop strings count behind the
    thought alone. A text that ends inside its thought has no answer.
    """

    kind: ClassVar[str] = "generative"

    max_new_tokens: int = 1024
    chat: bool | str = "auto"
    template: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | str = "auto"  # YAML reads on and off as true and false
    thinking_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.thinking_mode not in THINKING:
            raise WinnowError(f"{self.name}: thinking={self.thinking}: choose {', '.join(THINKING)}")
        if isinstance(self.thinking_tokens, bool) or not self.thinking_tokens >= 0:
            raise WinnowError(f"{self.name}: thinking_tokens={self.thinking_tokens}: choose 0 or more")

    @property
    def thinking_mode(self) -> str:
        if isinstance(self.thinking, bool):
            return "on" if self.thinking else "off"
        return self.thinking

    def tokens_to_write(self) -> int:
        thought = self.thinking_tokens if self.thinking_mode == "on" else 0
        return self.longest_answers(self.max_new_tokens + thought)

    def in_chat(self, reader: Reader) -> bool:
        """Raises WinnowError as ``asks_in_chat``, and where thinking is to be set without a template."""
        chat = asks_in_chat(reader, self.chat, self.name)
        if not chat and self.thinking_mode != "auto":
            raise WinnowError(
                f"{self.name}: thinking={self.thinking_mode} is for models that are asked in chat: take thinking=auto"
            )
        return chat

    def asked_in_chat(self, reader: Reader, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt in the model's chat template. Raises WinnowError where that has no switch for ``thinking``."""
        return reader.prompt(messages, **(dict(self.template) | reader.thinking_options(self.thinking_mode)))

    def need_of(self, counter: TokenCounter, prompts: Sequence[str]) -> Need:
        """What the task needs that has these prompts answered."""
        written = sum(self._budget(counter, prompts))
        return Need(counter.longest(prompts) + written, written)

    def answers(self, backend: Backend, prompts: Sequence[str], stop: Sequence[str] = ()) -> list[Answer]:
        """What the model writes after each prompt, and the answers in it, which end before a stop string."""
        told, (plain, budget) = self._told_to_think(prompts), self._budget(backend, prompts)
        texts = backend.generate(prompts, plain + budget, () if told else stop, progress=f"{self.name}: writing")
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            thought, answer, truncated = split_thought(opened_thought(prompt) + text)
            said = "" if truncated else cut(answer, stop)
            found.append(Answer(prompt, text, said, truncated, told or truncated or bool(thought), budget))
        thinks = any(answer.thinks for answer in found)
        return [replace(answer, thinks=thinks) for answer in found]

    def _told_to_think(self, prompts: Sequence[str]) -> bool:
        return self.thinking_mode == "on" or any(map(opened_thought, prompts))

    def _budget(self, reader: Reader, prompts: Sequence[str]) -> tuple[int, int]:
        """Tokens that may be written for an answer, and for the thought before it."""
        plain = tokens_to_write(reader, self.max_new_tokens)
        if not self._told_to_think(prompts):
            return plain, 0
        return plain, tokens_to_write(reader, self.max_new_tokens + self.thinking_tokens) - plain

    def with_truncated(self, result: TaskResult, rows: Sequence[Row], answers: Sequence[Answer]) -> TaskResult:
        """The result and, where thoughts occur, the share of answers that end inside one, as a task ``name_truncated``
        with samples of its own."""
        if not any(answer.thinks for answer in answers):
            return result
        score = truncated_score(self.name, [answer.truncated for answer in answers])
        samples = [
            Sample(score.task, row["id"], float(answer.truncated), domain=self.domain)
            for row, answer in zip(rows, answers, strict=True)
        ]
        said = {"mode": self.thinking_mode, "tokens": answers[0].budget}
        facts = result.facts | {f"thinking of {self.name}": said}
        return TaskResult([*result.scores, score], [*result.samples, *samples], facts)
