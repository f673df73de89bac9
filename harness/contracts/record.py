"""Records: one JSON file a cell, its samples in a parquet file beside it. Knows neither torch nor any task."""

from dataclasses import asdict, dataclass, field
from typing import Any

RECORD_VERSION = 2  # 2: kind, domain and part of a score; versions of method and tasks
KINDS = ("generative", "choice", "perplexity", "probe")
# What a cell may do besides its method, each told by a word in its description: "iterative-4", "2-active", "int4-sym".
STAGES = ("schedule", "refit", "router", "active", "skip", "quantize")
# What an option of the method leaves in the place of experts, told by a word too: "constants".
LEAVES = "leaves"
RECOVERY = ("refit", "router")  # stages that repair what a method has done, from calibration text alone


@dataclass(frozen=True)
class Score:
    """One number a person will read, with the interval that goes with it.

    ``low`` and ``high`` are the ends of the 95 % interval, ``n`` the number of samples behind the value. ``part`` names
    the part of the task that is scored (a subject, a stretch of positions), empty for all of it.

    ``kind`` is one of ``KINDS``: what is written is right (generative), the right choice is likeliest (choice), text is
    likely (perplexity), or what is measured besides (probe). ``domain`` is what the task is about: code, math, writing,
    knowledge, language. ``supersedes`` names the task whose answers this one tests more strictly, if any: the two are
    one task in an average, and this one counts.
    """

    task: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    part: str = ""
    higher_is_better: bool = True
    kind: str = ""
    domain: str = ""
    supersedes: str = ""


@dataclass(frozen=True)
class Sample:
    """The outcome of one item: the same ``item`` names the same question in every cell, so cells can be paired.

    ``score`` is what is averaged (1.0 for right, 0.0 for wrong, or a share); for perplexity it is the negative
    log-likelihood in nats and ``weight`` the number of tokens. ``output`` is what the model wrote after ``prompt``, as
    the backend was given it; both are empty where nothing was written.
    """

    task: str
    item: str
    score: float
    weight: float = 1.0
    domain: str = ""
    output: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""


@dataclass(frozen=True)
class Record:
    """Everything that is known of a finished cell.

    ``cell`` holds id, model, method, ratio, calibration, seed, suite and backend; ``sizes`` bytes and parameters;
    ``timings`` seconds by stage; ``engine`` what the backend tells of itself, such as its version;
    ``expert_usage`` routed-token counts: source -> layer -> one count per expert; ``broken`` task -> why it could not
    score the model, where the model's numbers are not finite; ``not_measured`` task -> why nothing, or not all, of it
    was measured, where the uncompressed model was left out; ``contamination`` task -> how many of its items the
    calibration corpus holds (see ``harness/data/contamination.py``).

    ``method_version`` and ``task_versions`` (task -> version) tell by which behaviour of the method and of each task
    the numbers came about; ``was`` holds the ids that the cell had before; ``samples_sha256`` is that of the file of
    its samples; ``taken_from`` names the output folder that an uncompressed model's record was taken from, if any.
    ``search`` is what a searched budget found (``SearchReport``), empty for any other. ``recovery`` is what a refit and
    a recalibrated router made of the layers (``refit`` and ``router``: errors before and after, on calibration text and
    on held-out text, and ``heldout``: where that is from or why there is none), empty without either. ``all_tokens`` is
    how many tokens every expert was run on, routed or not, of a method that decides layer by layer.
    """

    cell: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    fingerprints: dict[str, str]
    scores: list[Score]
    sizes: dict[str, Any]
    timings: dict[str, float]
    plan: dict[str, Any] = field(default_factory=dict)
    expert_usage: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    contamination: dict[str, dict[str, int]] = field(default_factory=dict)
    method_version: str = ""
    task_versions: dict[str, str] = field(default_factory=dict)
    was: list[str] = field(default_factory=list)
    samples_sha256: str = ""
    not_measured: dict[str, str] = field(default_factory=dict)
    taken_from: str = ""
    search: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    all_tokens: int | None = None
    version: int = RECORD_VERSION

    def stages(self) -> list[str]:
        """What was done besides the method, in words, and what it leaves in the place of experts."""
        return [str(self.cell[stage]) for stage in (LEAVES, *STAGES) if self.cell.get(stage)]

    def recovered(self) -> tuple[str, ...]:
        """How it was repaired from calibration text, in words; empty where it was not. Of a method that fits as part of
        what it is nothing is said."""
        return tuple(str(self.cell[stage]) for stage in RECOVERY if self.cell.get(stage))

    def is_uncompressed(self) -> bool:
        return self.cell["method"] == "none" and not self.stages()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Record":
        return Record(**{**data, "scores": [Score(**s) for s in data["scores"]]})
