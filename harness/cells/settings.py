"""What every setting may be, and what it means: the one place for types, ranges, known values and meanings.

``harness.cells.check`` holds a configuration against these tables, and ``winnow --help`` prints their words. They are
about what they name: other keys may be there as well.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

_DEVICES = ("cpu", "cuda", "mps", "xpu", "auto", "balanced", "balanced_low_0", "sequential")


def _fault(message: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError("winnow", message, context or None)  # type: ignore[arg-type]


def _ratio(value: Any) -> Any:
    try:
        exact = None if isinstance(value, bool) else Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        exact = None
    if exact is None:
        raise _fault("should be a decimal or a fraction, such as 0.25 or 1/3")
    return value  # whether it is in range the method says, which knows the model


def _name(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise _fault("should be a name")
    return value


def is_folder_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _path(value: Any) -> Any:
    if not is_folder_name(value):
        raise _fault("should be the path of a folder")
    return value


def _device(value: Any) -> Any:
    """A device of torch, a device map of transformers by name, a GPU's number, or a map from modules to devices."""
    if isinstance(value, Mapping) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    kind, colon, number = str(value).partition(":")
    if not isinstance(value, str) or kind not in _DEVICES or (colon and not number.isdecimal()):
        raise _fault("should be cpu, cuda, cuda:N, mps, xpu, or auto over all devices")
    return value


def _statistics(value: Any) -> Any:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise _fault("should be auto, needed, all or a list of names")
    return value


def _parts(value: Any) -> Any:
    """Numbers of documents by domain, or ``NAME:NUMBER`` words."""
    if isinstance(value, Mapping):
        wrong = [f"{name}: {count}" for name, count in value.items() if type(count) is not int or count < 1]
    elif isinstance(value, list):
        words = [(part, *str(part).rpartition(":")[::2]) for part in value]
        wrong = [str(part) for part, name, count in words if not name or not count.isdecimal() or int(count) < 1]
    else:
        raise _fault("should be a list such as [code:1024,writing:512], or numbers by domain")
    if wrong:
        raise _fault("'{part}' should be a name and a number of documents of at least 1", part=wrong[0])
    return value


def baseline_folder(value: Any) -> str | None:
    """DIR of ``from=DIR`` or ``from:DIR``; None for anything else."""
    found = re.fullmatch(r"from[=:](.+)", value, re.DOTALL) if isinstance(value, str) else None
    return found[1].strip() if found is not None and is_folder_name(found[1]) else None


def spelled(words: Sequence[str]) -> list[str]:
    """The command line with ``baseline=from=DIR`` in quotes, which Hydra's grammar asks for: it has one ``=``."""
    quote = re.compile(r"(\+{0,2}baseline=)(from=.*)", re.DOTALL)
    return [
        f"{found[1]}'{found[2].replace(chr(39), chr(92) + chr(39))}'" if (found := quote.fullmatch(word)) else word
        for word in words
    ]


def _baseline(value: Any) -> Any:
    if value not in ("evaluate", "skip") and baseline_folder(value) is None:
        raise _fault("should be evaluate, skip, or from=DIR with the output folder of another run")
    return value


def _group_size(value: Any) -> Any:
    if value not in ("auto", "row") and (type(value) is not int or value < 1):
        raise _fault("should be auto, row, or a number such as 32")
    return value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[Any, AfterValidator(_name)]
Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
Switch = Literal[True, False, "auto"]
Thinking = Literal[True, False, "on", "off", "auto"]  # YAML reads on and off as true and false
Tokens = Annotated[int, Field(ge=0)]


class _Checked(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]


class _Size(_Checked, total=False):
    num_sequences: Annotated[Count | None, "documents of a corpus, unless it says otherwise"]
    max_length: Annotated[Count, "tokens of a document, unless the corpus says otherwise"]


class _Model(_Checked, total=False):
    name: Annotated[Name | None, "what records call the model; null: the name of its folder"]
    path: Annotated[Any, AfterValidator(_path), "a folder in the hub layout, or a hub id"]
    dtype: Annotated[Dtype, "number format in memory; auto: that of the checkpoint"]
    device: Annotated[Any, AfterValidator(_device), "cpu, cuda, cuda:N, mps, xpu, or auto over all devices"]
    chat_template: Annotated[Switch, "whether messages go through the chat template; auto: where there is one"]
    calibration: _Size
    architecture: Annotated[dict[str, Any] | None, "of config.json, for a dry run without the hub"]


class _Calibration(_Checked, total=False):
    name: Annotated[Name, "what records call the corpus"]
    num_sequences: Annotated[Count | None, "documents drawn at random; null: all"]
    max_length: Annotated[Count, "tokens; unpacked documents are cut on the right"]
    packing: Annotated[bool, "true: documents fill blocks of max_length; attention never crosses their borders"]
    max_blocks: Annotated[Count | None, "with packing: at most so many blocks"]
    chat_template: Annotated[Switch, "whether documents with messages go through the chat template"]
    bos: Annotated[Literal["auto", False], "auto: plain texts begin as in evaluation; false: without a first token"]
    seed: Annotated[int, Field(ge=0), "of the draw"]
    batch_size: Annotated[Count, "sequences at once; changes no statistic"]
    statistics: Annotated[Any, AfterValidator(_statistics), "auto (what the sweep needs), needed, all, or names"]
    all_tokens: Annotated[Count | None, "tokens, evenly spaced, for what runs every expert on every token; null: all"]
    shards: Annotated[Count | None, "parts of the corpus that have a pass each; null: one pass over all of it"]
    shard: Annotated[
        Annotated[int, Field(ge=0)] | None,
        "the part, from 0, whose pass this command makes before it ends; null: the parts are merged",
    ]
    stream: Annotated[
        Literal["auto", "always", "never"],
        "whether weights are read one decoder layer at a time; auto: where the model does not fit its device",
    ]
    memory_gib: Annotated[Positive | None, "of the host, for such a pass; null: what is free, with a margin"]
    parts: Annotated[Any, AfterValidator(_parts), "documents of each corpus: [code:64,writing:32]"]
    heldout: Annotated[
        str | None,
        "file of texts that a refit is measured on and never fitted to; null: another draw of the corpus",
    ]


class _Task(_Checked, total=False):
    items: Annotated[Count | None, "items of this task alone"]
    max_new_tokens: Annotated[Count, "longest answer of this task"]
    thinking: Annotated[Thinking, "as suite.thinking, of this task"]
    thinking_tokens: Annotated[Tokens, "as suite.thinking_tokens, of this task"]
    texts: Annotated[Count, "drift: prompts"]
    positions: Annotated[Count, "drift: tokens of each"]


class _Suite(_Checked, total=False):
    name: Annotated[Name, "what records call the suite"]
    items: Annotated[Count | None, "items of each task, drawn with a fixed seed; null: all"]
    missing: Annotated[Literal["error", "skip"], "what becomes of tasks whose data data.root lacks"]
    max_new_tokens: Annotated[Count, "longest answer in tokens"]
    thinking: Annotated[Thinking, "on or off: by the switch of the chat template; auto: what the task's template says"]
    thinking_tokens: Annotated[Tokens, "that an answer may have more where the model thinks aloud first"]
    include_path: Annotated[str | None, "lm_eval_local: folder of your tasks; null: lm-eval's own"]
    names: Annotated[list[str], "lm_eval_local: tasks, groups or tags"]
    num_fewshot: Annotated[Annotated[int, Field(ge=0)] | None, "lm_eval_local: examples; null: as the tasks say"]
    limit: Annotated[Count | None, "lm_eval_local: items of a task; null: all"]
    chat_template: Annotated[bool, "lm_eval_local: whether prompts go through the chat template"]
    domains: Annotated[dict[str, str], "lm_eval_local: what a task is about, by its name"]
    tasks: dict[str, _Task]


class _Search(_Checked, total=False):
    population: Annotated[Count | None, "evoesap: budgets of a round; null: 2 a layer, within 12 to 32"]
    generations: Annotated[Count | None, "evoesap: rounds; null: 2 a layer, within 8 to 50"]
    elite: Annotated[Count | None, "evoesap: best budgets so far, from which the others of a round are made; null: 4"]
    max_delta: Annotated[Count | None, "evoesap: experts that a layer hands to another at once, at most; null: 4"]
    max_steps: Annotated[Count | None, "evoesap: times that this happens to a budget, at most; null: 3"]
    samples: Annotated[Count | None, "evoesap: token sequences of the corpus, evenly spaced; null: 64"]
    even: Annotated[bool | None, "evoesap: true: every layer keeps an even number of experts"]


class _Method(_Checked, total=False):
    search: _Search


class _Schedule(_Checked, total=False):
    name: Name
    rounds: Annotated[Count, "calibrations, each on what the rounds before have left"]


class _Refit(_Checked, total=False):
    name: Name
    alpha: Annotated[Positive, "pull of the down projections to what they were, times the mean square of what they see"]
    tokens: Annotated[Count, "of the corpus that is fitted to, at most, in whole sequences"]
    sweeps: Annotated[Count, "joint: times that it goes over the experts of a layer, at most"]


class _Router(_Checked, total=False):
    name: Name
    alpha: Annotated[Positive, "pull of the router's rows to what they were, times the mean square of what they see"]
    tokens: Annotated[Count, "of the corpus, at most, in whole sequences"]


class _Skip(_Checked, total=False):
    name: Name
    quantile: Annotated[Share | None, "share of the smaller gate values that is cut off on the corpus (calibrated)"]
    beta: Annotated[Share | None, "cuts off gate values below beta times the token's largest (fixed)"]


class _Quantize(_Checked, total=False):
    name: Name
    bits: Annotated[Literal[4, 8], "of a weight"]
    symmetric: Annotated[bool, "false: with zero points"]
    group_size: Annotated[Any, AfterValidator(_group_size), "inputs that share a scale: a number, row, or auto"]
    targets: Annotated[Literal["experts", "linear"], "experts alone, or attention and dense layers too"]


class _Diagnostics(_Checked, total=False):
    name: Name
    tokens: Annotated[Count, "of the corpus that the layers are measured on"]
    pairs: Annotated[Count, "pairs of experts of a layer that stand for the average one"]


class _Open(_Checked, total=False):
    batch_size: Annotated[Count, "hf: sequences at once"]
    max_length: Annotated[Annotated[int, Field(ge=2)] | None, "tokens; null: the model's own limit"]
    tensor_parallel_size: Annotated[Count, "vllm: GPUs that share the model"]
    gpu_memory_utilization: Annotated[Annotated[float, Field(gt=0, le=1)], "vllm: share of the GPU's memory"]
    kv_cache_gib: Annotated[Positive | None, "vllm: size of the KV cache; null: 1 on a CPU, what is left on a GPU"]
    max_logprobs: Annotated[Count, "vllm: likeliest tokens that may be asked for at a place"]
    start_seconds: Annotated[Positive, "vllm: an engine that takes longer to start is an error"]
    engine: Annotated[dict[str, Any], "vllm: any other argument of vllm.LLM"]


class _Engine(_Checked, total=False):
    stream: Annotated[bool | None, "hf: one decoder layer at a time; scores what is larger than memory, writes nothing"]
    open: _Open


class _Backend(_Checked, total=False):
    name: Annotated[Name, "auto, hf (transformers) or vllm; under auto both have their settings, as backend.hf.open.*"]
    stream: Annotated[bool | None, "hf: as in backend.hf.stream"]
    open: _Open
    hf: _Engine
    vllm: _Engine


class _Judge(_Checked, total=False):
    base_url: Annotated[str, "address up to and with the version, such as http://localhost:8000/v1"]
    model: Annotated[str, "name of the model that judges"]
    api_key_env: Annotated[str | None, "environment variable with the key; null: a server that asks for none"]
    request: Annotated[dict[str, Any], "sent with every question"]
    timeout: Annotated[Positive, "seconds for an answer"]
    retries: Annotated[int, Field(ge=0), "times that a question is asked again"]
    backoff: Annotated[float, Field(ge=0), "seconds before the first of them, doubled each time"]
    concurrency: Annotated[Count, "questions under way at once"]


class _Tracking(_Checked, total=False):
    mode: Annotated[Literal["online", "offline", "disabled"], "whether and when runs are sent"]
    project: Annotated[Name, "project on Weights & Biases"]
    entity: Annotated[Name | None, "user or team that owns the project; null: the default of your account"]
    group: Annotated[Name | None, "null: the name of the output folder"]
    folder: Annotated[Any, AfterValidator(_path), "where runs are kept before they are sent"]
    generations: Annotated[int, Field(ge=0), "texts that a task adds to the table of generations"]


class _Data(_Checked, total=False):
    root: Annotated[
        str | None,
        "folder of `winnow-data stage`; benchmarks and corpora are read from it alone (null: the hub)",
    ]


class _Resources(_Checked, total=False):
    gpus: Annotated[Annotated[int, Field(ge=0)] | None, "a job; null: what the dry run finds"]
    cpus: Annotated[Count | None, "cores of a job; null: 1"]
    memory_gib: Annotated[Positive | None, "of the host, for a job; null: what the dry run finds"]
    minutes: Annotated[Positive | None, "of a job; null: a rough estimate"]
    gpu_gb: Annotated[Positive, "memory of one GPU, by which the dry run counts GPUs"]


class Settings(_Checked, total=False):
    """The whole configuration."""

    ratio: Annotated[
        Any,
        AfterValidator(_ratio),
        "share of the routed experts' parameters that goes, 0 ≤ ratio < 1; a decimal or a fraction, such as `1/3`",
    ]
    seed: Annotated[int, Field(ge=0), "counts where a method draws at random"]
    layout: Annotated[
        Literal["compact", "expanded", "vllm_constants"],
        "how merged models are stored: `compact` (true size), `expanded` (a copy for every router row), or "
        "`vllm_constants` (constants as vLLM's main branch reads them, and nothing else)",
    ]
    lower_top_k: Annotated[
        bool,
        "true: a ratio may leave fewer experts than the model chooses a token, which then chooses all that are left "
        "(always so for a model that chooses all its experts)",
    ]
    active: Annotated[
        Count | None, "experts that a token chooses after any plan, fewer than before; null: as many as the model says"
    ]
    data: _Data
    baseline: Annotated[
        Any,
        AfterValidator(_baseline),
        "the uncompressed model's record: `evaluate` it once, `skip` it, or take it from DIR, another run's output_dir "
        "(`baseline=from=DIR`); unless evaluate, that model is never opened",
    ]
    output_dir: Annotated[Any, AfterValidator(_path), "where records and all else go"]
    keep_checkpoint: Annotated[
        Switch,
        "false: of a cell only plan, saliency and record stay; `auto`: the checkpoint goes when its cell is scored if "
        "the disk would not hold those of the sweep",
    ]
    scratch: Annotated[
        str | None,
        "folder on a disk of the machine that computes, where a cell's checkpoint lies while it is needed; null: in "
        "`output_dir`",
    ]
    strict_versions: Annotated[
        bool,
        "true: versions of Python, torch, transformers and vLLM are part of what a cell is, not only recorded",
    ]
    resources: _Resources
    report: Annotated[bool, "whether a sweep ends with its report, as `winnow-report` writes it"]
    progress: Annotated[bool, "progress bars"]
    dry_run: Annotated[
        bool, "true: print experts, sizes and the memory of each stage; no weight is read, nothing is written"
    ]
    model: _Model
    calibration: _Calibration
    method: _Method
    schedule: _Schedule
    refit: _Refit
    router: _Router
    skip: _Skip
    quantize: _Quantize
    suite: _Suite
    diagnostics: _Diagnostics
    backend: _Backend
    judge: _Judge | None
    tracking: _Tracking | None


def meanings(table: type = Settings, prefix: str = "") -> list[tuple[str, str]]:
    """(setting, what it means), in the order of the tables."""
    found: list[tuple[str, str]] = []
    for name, hint in get_type_hints(table, include_extras=True).items():
        told = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, str)), None)
        if told is not None:
            found.append((prefix + name, told))
            continue
        inner = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and get_origin(one) is None]
        for one in inner:
            if hasattr(one, "__total__") and one is not _Engine:  # whose settings stand under backend.open
                key = f"{prefix}{name}.TASK." if get_origin(hint) is dict else f"{prefix}{name}."
                found += meanings(one, key)
    return found


def meanings_text() -> str:
    """The same for ``winnow --help``, wrapped to 100 letters."""
    rows = [(name, told.replace("`", "")) for name, told in meanings()]
    wide = 26
    lines = []
    for name, told in rows:
        first, *rest = textwrap.wrap(told, 98 - wide)
        start = f"{name:{wide}}" if len(name) < wide else f"{name}\n{' ' * wide}"
        lines += [f"{start}{first}", *(" " * wide + more for more in rest)]
    return "\n".join(lines)


def meaning(where: str) -> str:
    """What the setting of this key means; empty for one that no table names."""
    key = re.sub(r"^suite\.tasks\.[^.]+\.", "suite.tasks.TASK.", re.sub(r"^backend\.(hf|vllm)\.", "backend.", where))
    return next((told.replace("`", "") for name, told in meanings() if name == key), "")
