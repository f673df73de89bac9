"""lm-evaluation-harness on winnow's backends. The only module that imports lm-eval when it is imported.

``language_model`` gives lm-eval the model that a cell has loaded already. The same is registered with lm-eval as
``winnow``, which also serves compact checkpoints; lm-eval has no entry points for models, so its command line is
started through this module::

    python -m harness.backends.lm_eval run --model winnow --model_args pretrained=DIR,backend=auto --tasks NAME
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jinja2
import torch

from harness.backends import hf as hf_backend
from harness.backends import vllm as vllm_backend
from harness.backends import vllm_guard
from harness.backends.counter import CHUNK as COUNTED_AT_ONCE
from harness.backends.counter import MORE
from harness.backends.ending import before_end
from harness.backends.scoring import LOGITS
from harness.backends.template import apply_template
from harness.checkpoints.config import read_config
from harness.checkpoints.hub import resolve_checkpoint
from harness.contracts.backend import Backend, Sampling, TokenCounter
from harness.errors import WinnowError, first_line

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
except ImportError as error:
    raise WinnowError(f'lm-eval cannot be imported ({error}): pip install "moe-winnow[eval]"') from error

MAX_GEN_TOKS = 256  # where a task does not say; lm-eval's own default
CHUNK = 1024  # sequences scored in one call: the log-probabilities of all their tokens are held meanwhile
GPU_LOGITS = 2**29  # logits of a batch on a GPU; their log-softmax takes 2 GB
BATCH_SIZE = 128  # with --batch_size auto: the limits on logits make it smaller where it must be
# Generation settings of tasks; others would change what is written and are refused.
_UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "use_cache"}


@runtime_checkable
class TokenBackend(Protocol):
    """A backend that scores tokens, as ``BackendLM`` needs it; ``harness.backends.vllm.VLLMBackend`` does."""

    tokenizer: Any
    max_length: int

    def score_tokens(self, sequences: list[list[int]], top: int, progress: str = "") -> list[list[dict[int, float]]]:
        """For each token of each sequence but the first, {token: log-probability} of itself and the ``top`` likeliest.

        A sequence has at most ``max_length`` - 1 tokens."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]: ...


def language_model(backend: Backend) -> Any:
    """lm-eval's view of a backend that is open. Raises WinnowError for one that lm-eval cannot use."""
    if isinstance(backend, hf_backend.HFBackend):
        if backend.streamed:
            raise WinnowError("lm-eval tasks need the whole model at once: set backend.stream=false")
        return TransformersLM(backend)
    if isinstance(backend, TokenBackend):
        return BackendLM(backend)
    raise WinnowError(f"lm-eval tasks need backend=hf or backend=vllm, not {backend.name}")


class TransformersLM(HFLM):  # type: ignore[misc]
    """lm-eval's own class on a model that is loaded; batches shrink where their logits would not fit.

    Log-probabilities are computed in float32 whatever the model's type, as everywhere in winnow.
    """

    def __init__(self, backend: hf_backend.HFBackend) -> None:
        super().__init__(
            pretrained=backend.model,
            tokenizer=backend.tokenizer,
            backend="causal",
            batch_size=backend.batch_size,
            max_length=backend.max_length,
            softmax_dtype="float32",
        )
        self._largest_batch, self._ends = backend.batch_size, backend.ends
        self._logits = GPU_LOGITS if backend.model.device.type == "cuda" else LOGITS

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        """lm-eval's own, called once for all requests that are about as long (up to the same power of two)."""
        by_size = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            by_size[(len(context) + len(continuation) - 1).bit_length()].append(place)
        vocabulary = self.config.get_text_config().vocab_size
        answers: list[Any] = [None] * len(requests)
        for size, places in sorted(by_size.items(), reverse=True):
            self.batch_size_per_gpu = max(1, min(self._largest_batch, self._logits // (2**size * vocabulary)))
            scored = super()._loglikelihood_tokens([requests[i] for i in places], *args, **options)
            for place, answer in zip(places, scored, strict=True):
                answers[place] = answer
        self.batch_size_per_gpu = self._largest_batch
        return answers

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        return super()._model_generate(*args, **{"eos_token_id": sorted(self._ends), **options})

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of what was written, up to its end token: not all of those are marked as special."""
        if skip_special_tokens and not isinstance(tokens, int):
            tokens = before_end(tokens, self._ends)
        return str(super().tok_decode(tokens, skip_special_tokens))


@register_model("winnow")
class BackendLM(TemplateLM):  # type: ignore[misc]
    """A model for lm-eval that scores and writes through a backend, tokenizing as lm-eval's transformers class does.

    The engine takes prompts of at most ``max_length`` - 1 tokens: longer contexts are cut on the left, and rolling
    windows are two tokens shorter than the transformers class has them. ``seed`` is that of sampling.
    """

    def __init__(self, backend: TokenBackend, seed: int = 0) -> None:
        super().__init__()
        self._engine, self._seed = backend, seed
        self.tokenizer, self.max_length = backend.tokenizer, backend.max_length

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """What ``--model winnow`` calls, as ``create_from_arg_obj`` with arguments in one string."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """``open_model`` with these arguments, and those of lm-eval's command line that have a value."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        given.pop("max_batch_size", None)
        return open_model(**(given | arg_dict))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text; without those of the system where the template has no place for them.

        Raises WinnowError where it refuses the others too.
        """
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return apply_template(self.tokenizer, chat_history, **options)
        except jinja2.TemplateError:
            chat_history = [message for message in chat_history if message["role"] != "system"]
        except Exception as error:  # of the template's own code
            raise _refused(error) from error
        try:
            return apply_template(self.tokenizer, chat_history, **options)
        except Exception as error:
            raise _refused(error) from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text, with the tokenizer's special tokens unless it begins with them or they are unwanted."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would write it) of each (key, context, continuation) in tokens.

        Raises WinnowError for a continuation that is empty or longer than the model's length.
        """
        longest = self.max_length - 1
        for _, _, continuation in requests:
            if not 0 < len(continuation) < longest:
                raise WinnowError(
                    f"lm-eval asks for the log-likelihood of {len(continuation)} tokens: needs 1 to {longest - 1} at "
                    f"max_length={self.max_length}"
                )
        answers = []
        for chunk in _chunks(requests):
            sequences = [[*context, *continuation][-longest:] for _, context, continuation in chunk]
            scored = self._engine.score_tokens(sequences, 1, progress="lm-eval: scoring")
            for (key, _, continuation), positions in zip(chunk, scored, strict=True):
                own = list(zip(continuation, positions[-len(continuation) :], strict=True))
                logprob = float(sum(position[token] for token, position in own))
                answers.append((logprob, all(token == max(p, key=lambda t: p[t]) for token, p in own)))
                if key is not None:  # None: a window of a text, which is kept as a whole
                    self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of all tokens of each text, the first after the beginning-of-text token."""
        texts = [request.args[0] for request in requests]
        windows = [
            (i, (None, *utils.make_disjoint_window(pair)))
            for i, text in enumerate(texts)
            for pair in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length - 2, context_len=1
            )
        ]
        totals = [0.0] * len(texts)
        scored = self._loglikelihood_tokens([window for _, window in windows])
        for (i, _), (logprob, _) in zip(windows, scored, strict=True):
            totals[i] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop string of its own, under its own settings.

        Raises WinnowError for settings that the backend does not have.
        """
        end = self.tokenizer.decode(self.eot_token_id)
        by_settings: dict[tuple[int, Sampling | None], list[tuple[int, list[str]]]] = defaultdict(list)
        for place, request in enumerate(requests):
            settings = dict(normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS))
            stop = [text for text in handle_stop_sequences(settings["until"], eos=end) if text]
            by_settings[(settings["max_gen_toks"], self._sampling(settings))].append((place, stop))
        answers = [""] * len(requests)
        for (max_new_tokens, sampling), members in by_settings.items():
            written = self._engine.generate(
                [self._prompt(requests[place].args[0]) for place, _ in members],
                max_new_tokens,
                [stop for _, stop in members],
                sampling,
                progress="lm-eval: writing",
            )
            for (place, _), text in zip(members, written, strict=True):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return answers

    def _sampling(self, settings: dict[str, Any]) -> Sampling | None:
        """None for greedy decoding; a task that samples without a temperature gets 1.0."""
        temperature = float(settings.get("temperature", 1.0))
        greedy = not settings["do_sample"] or temperature == 0
        neutral = {"num_beams": 1} | ({"top_k": settings.get("top_k")} if greedy else {})
        refused = sorted(k for k, v in settings.items() if k not in _UNDERSTOOD and (k, v) not in neutral.items())
        if refused:
            raise WinnowError(f"backend=vllm cannot follow the task's setting {', '.join(refused)}: use backend=hf")
        return None if greedy else Sampling(temperature, float(settings.get("top_p", 1.0)), self._seed)

    def _prompt(self, context: str) -> str:
        """The context with the beginning-of-text token that the tokenizer would add: backends add none."""
        first = self.tokenizer.bos_token
        adds = first is not None and self.tok_encode(context)[:1] == [self.tokenizer.bos_token_id]
        return f"{first}{context}" if adds and not context.startswith(first) else context


class _Counting:
    """A ``TokenBackend`` without a model: it answers nothing worth knowing, and keeps the ``longest`` sequence."""

    def __init__(self, counter: TokenCounter) -> None:
        self._counter, self.tokenizer, self.max_length, self.longest = counter, counter.tokenizer, counter.max_length, 0

    def score_tokens(self, sequences: list[list[int]], top: int, progress: str = "") -> list[list[dict[int, float]]]:
        self.longest = max([self.longest, *map(len, sequences)])
        return [[{token: 0.0} for token in sequence[1:]] for sequence in sequences]

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        self.longest = max(self.longest, self._counter.longest(prompts) + max_new_tokens)
        return [""] * len(prompts)


def counting_model(counter: TokenCounter) -> Any:
    """lm-eval's view of a model that is not there, for ``longest_request``."""
    return BackendLM(_Counting(counter))


def longest_request(model: Any, instances: Iterable[Any]) -> int:
    """Tokens of the longest sequence that lm-eval's requests ask for, by a ``counting_model``.

    Raises WinnowError for requests that the backend refuses.
    """
    by_type: dict[str, list[Any]] = defaultdict(list)
    for instance in instances:
        by_type[instance.request_type].append(instance)
    counted = model._engine
    for kind, requests in by_type.items():
        if kind == "generate_until":
            model.generate_until(requests)
            continue
        sized = sorted(((_bytes(request), request) for request in requests), key=lambda one: -one[0])
        for start in range(0, len(sized), COUNTED_AT_ONCE):
            if sized[start][0] + MORE < counted.longest:
                break
            part = [request for _, request in sized[start : start + COUNTED_AT_ONCE]]
            getattr(model, kind)(part, disable_tqdm=True)
    return int(counted.longest)


def _bytes(request: Any) -> int:
    return sum(len(text.encode()) for text in request.args if isinstance(text, str))


def _chunks(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(requests), CHUNK):
        yield requests[start : start + CHUNK]


def open_model(
    pretrained: str,
    backend: str = "auto",
    dtype: str = "auto",
    device: str = "cuda",
    batch_size: int | str = BATCH_SIZE,
    max_length: int | None = None,
) -> Any:
    """lm-eval's view of the checkpoint in the folder ``pretrained``, compact or not; what ``--model winnow`` opens.

    ``backend`` is hf, vllm, or auto: vllm on GPUs where it serves the checkpoint right, hf else. ``device`` and
    ``batch_size`` are those of hf. Raises WinnowError where the backend cannot open it.
    """
    folder = resolve_checkpoint(pretrained)
    if backend == "auto":
        unfit = vllm_guard.reason_against(read_config(folder)) or vllm_guard.is_cpu_build()
        backend = "hf" if unfit else "vllm"
    if not torch.cuda.is_available():  # lm-eval's command line says cuda:0 unless it is told otherwise
        device = "cpu"
    if backend == "vllm":
        return language_model(vllm_backend.open_checkpoint(str(folder), dtype, device, max_length))
    if backend != "hf":
        raise WinnowError(f"backend={backend}: choose auto, hf or vllm")
    rows = int(batch_size) if str(batch_size).isdigit() else BATCH_SIZE
    return language_model(hf_backend.open_checkpoint(str(folder), dtype, device, rows, max_length))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _refused(error: Exception) -> WinnowError:
    return WinnowError(f"the model's chat template refuses the task's messages ({first_line(error)})")
