"""What the lists of claims share: measures by name, margins, sources, and the shapes of contrasts."""

from reports.claims.selection import Cell
from reports.claims.vocabulary import MIXED, Contrast, Contrasts, said
from reports.numbers import probes
from reports.numbers.contrasts import EACH, SAMPLE_SCORE
from reports.numbers.detail_samples import AREA, SLOPE
from reports.numbers.layer_samples import RANDOM_PAIRS
from reports.numbers.statistics import Measure, Part

# The smallest effects that matter: 2 points where a model writes, 1 of multiple choice, 2 % of perplexity, 0.01 of
# calibration error; of the others, what is small beside the values seen.
POINTS, CHOICE_POINTS, FACTOR, ERROR = 0.02, 0.01, 0.0198, 0.01
DIVERGENCE, SLOPE_MARGIN, SPREAD, DISTANCE = 0.01, 0.005, 0.05, 0.05

REAP = "Lasby et al., REAP (arXiv:2510.13999v2)"
COVERAGE = "Ding et al., coverage pruning (arXiv:2606.18304)"
NAEE = "Lu et al., NAEE (arXiv:2402.14800)"
MC_SUITE = "Jaiswal et al., MC-Suite (arXiv:2504.05586)"
SEER = "Muzio et al., SEER-MoE (arXiv:2404.05089)"
HC_SMOE = "Chen et al., HC-SMoE (arXiv:2410.08589)"
M_SMOE = "Li et al., M-SMoE (arXiv:2310.01334)"
EEP = "Liu et al., EEP (arXiv:2407.00945)"
NO_SOURCE = "none on file"

MERGING = ("hc_smoe", "m_smoe")
NAMES = {
    "reap": "REAP", "hc_smoe": "HC-SMoE", "m_smoe": "M-SMoE", "frequency": "frequency", "coverage": "coverage",
    "magnitude_channels": "magnitude",
}  # fmt: skip
CRITERIA = (
    "frequency", "gate_sum", "soft_count", "importance_product", "ean_sum", "ean_mean", "weighted_ean_sum",
    "max_activation", "weight_norm", "random",
)  # fmt: skip
EXPERT_METHODS = ("reap", *CRITERIA[:-1], *MERGING)
SPANS = ("1-1", "2-2", "3-4", "5-8", "9-16", "17-32")  # positions; beyond them few texts go on


def _number(name: str, label: str, part: Part) -> Measure:
    return Measure(name, label, (part,), kind="number", higher_is_better=False)


_MEASURES = [
    Measure("diversity", "n-gram diversity (2, 3 and 4)", (Part(probes.DIVERSITY, SAMPLE_SCORE),)),
    Measure("loops", "texts in a loop", (Part(probes.GENERATION, "degenerate"),), higher_is_better=False),
    Measure(
        "consistency", "same answer when asked in another way",
        tuple(
            Part(probes.CONSISTENCY, "consistent", form)
            for form in ("paraphrase_knowledge", "paraphrase_code", "negation_code", "permutation_knowledge")
        ),
    ),
    Measure(
        "cross_perplexity", "perplexity of its texts by the uncompressed model",
        (Part(probes.DRIFT, "cross_perplexity"),), "perplexity", higher_is_better=False,
    ),
    _number("drift_area", "divergence over all positions", Part(probes.DRIFT, AREA)),
    _number("drift_slope", "slope of the divergence, per ten positions", Part(probes.DRIFT, SLOPE)),
    _number("free_area", "divergence while writing freely", Part(probes.DRIFT, "free_js")),
    *(_number(f"free_{s}", f"free divergence at {s}", Part(probes.DRIFT, "free_js", f"position {s}")) for s in SPANS),
    _number("calibration_error", "calibration error", Part(probes.CALIBRATION_ERROR, "ece")),
    _number("measured_error", "measured layer error", Part(probes.LAYERS, "measured_error", EACH)),
    _number("predicted_error", "predicted layer error", Part(probes.LAYERS, "predicted_error", EACH)),
    _number("spread", "spread of expert outputs, of the original", Part(probes.LAYERS, "spread_ratio", EACH)),
    *(
        _number(f"{name}{short}", f"{said} {what}", Part(probes.LAYERS, f"{prefix}{metric}", EACH))
        for name, said, prefix in (("merged_", "of merged experts,", ""), ("random_", "of random pairs,", RANDOM_PAIRS))
        for short, what, metric in (
            ("distance", "aligned distance", "aligned_distance"),
            ("overlap", "overlap of singular vectors", "overlap"),
        )
    ),
]  # fmt: skip
# Name in the claims -> what it is in the records, of the probes: tasks that are no probes enter by kind and domain.
MEASURES = {measure.name: measure for measure in _MEASURES}


def cell(method: str, ratio: float = 0.5, rule: str = MIXED, **settings: object) -> Cell:
    """Settings by their keys on the command line, with ``__`` for a dot."""
    return Cell(method, ratio, rule, tuple((key.replace("__", "."), value) for key, value in settings.items()))


def whole(**settings: object) -> Cell:
    """The uncompressed model."""
    return cell("none", 0.0, MIXED, **settings)


def label(name: str) -> str:
    return MEASURES[name].label if name in MEASURES else said(name)


def over(measure: str, first: Cell, second: Cell, margin: float, least: float | None = None) -> Contrast:
    """The first cell has more of the measure than the second."""
    names = [f"{one.method}{''.join(f' {key}={value}' for key, value in one.settings)}" for one in (first, second)]
    if first.calibration != second.calibration and "none" not in names:
        names = [f"{name} on {one.calibration}" for name, one in zip(names, (first, second), strict=True)]
    if first.ratio != second.ratio and "none" not in names:
        names = [f"{name} at {one.ratio:g}" for name, one in zip(names, (first, second), strict=True)]
    text = f"{label(measure)}, {names[0]} - {names[1]}"
    return Contrast(text, ((1.0, measure, first), (-1.0, measure, second)), margin, least)


def one(measure: str, first: Cell, second: Cell, margin: float = POINTS, least: float | None = None) -> Contrasts:
    return Contrasts((over(measure, first, second, margin, least),))


def gap(large: str, small: str, first: Cell, second: Cell, margin: float = POINTS) -> Contrast:
    """What the first is ahead of the second by is larger in one measure than in the other."""
    terms = ((1.0, large, first), (-1.0, large, second), (-1.0, small, first), (1.0, small, second))
    return Contrast(f"gap {first.method} - {second.method}, {label(large)} less {label(small)}", terms, margin)


def percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"
