"""A backend that answers from a script, for tests of tasks: no model behind it."""

from collections.abc import Callable, Mapping, Sequence

from harness.contracts.backend import LogLikelihood


class ScriptedBackend:
    """Writes ``write(prompt)``, and scores with ``score(context, continuation)`` nats, a token a word."""

    name = "scripted"
    max_length = 4096

    def __init__(
        self,
        write: Callable[[str], str] = lambda prompt: "",
        score: Callable[[str, str], float] = lambda context, continuation: 0.0,
        has_chat_template: bool = False,
    ) -> None:
        self.write, self.score, self.has_chat_template = write, score, has_chat_template
        self.calls: list[tuple[str, int]] = []
        self.stop: tuple[str, ...] = ()

    def prompt(self, prompt: str | Sequence[Mapping[str, str]], **options: object) -> str:
        if isinstance(prompt, str):
            return prompt
        return "".join(f"[{message['role']}]{message['content']}" for message in prompt)

    def thinking_options(self, wanted: str) -> dict[str, object]:
        return {} if wanted == "auto" else {"enable_thinking": wanted == "on"}

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = (), progress: str = ""
    ) -> list[str]:
        self.calls.append((progress, len(prompts)))
        self.stop, self.max_new_tokens = tuple(stop), max_new_tokens
        answers = []
        for prompt in prompts:
            text = self.write(prompt)
            answers.append(text[: min((text.find(s) for s in stop if s in text), default=len(text))])
        return answers

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        self.calls.append((progress, len(pairs)))
        return [LogLikelihood(self.score(*pair), max(1, len(pair[1].split()))) for pair in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str], progress: str = "") -> list[LogLikelihood]:
        self.calls.append((progress, len(texts)))
        return [LogLikelihood(self.score("", text), max(0, len(text.split()) - 1)) for text in texts]
