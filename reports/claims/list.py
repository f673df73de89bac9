"""The claims, as data; and the one table from the names that they use to the scores of the records.

A new claim is one entry. Sources name what the claim was made in; "none on file" means that it is often said and that
no publication is cited for it here.
"""

from reports.claims.selection import Cell
from reports.claims.vocabulary import (
    CHOICE,
    GENERATION,
    PERPLEXITY,
    AllAbove,
    Claim,
    Contrast,
    FewLargeGroups,
    RanksDiffer,
    RanksFollow,
    said,
)
from reports.numbers import probes
from reports.numbers.contrasts import EACH, SAMPLE_SCORE
from reports.numbers.statistics import Measure, Part

_REAP = "Lasby et al., REAP (arXiv:2510.13999v2), "
_COVERAGE = "Ding et al., attribution-guided coverage pruning (arXiv:2606.18304), "
_NO_SOURCE = "none on file"


def _number(name: str, label: str, part: Part) -> Measure:
    return Measure(name, label, (part,), kind="number")


_MEASURES = [
    Measure("diversity", "n-gram diversity (2, 3 and 4)", (Part(probes.DIVERSITY, SAMPLE_SCORE),)),
    _number("drift_early", "divergence at position 1", Part(probes.DRIFT, "js", "position 1-1")),
    _number("drift_late", "divergence at positions 17 to 32", Part(probes.DRIFT, "js", "position 17-32")),
    _number("calibration_error", "calibration error", Part(probes.CALIBRATION_ERROR, "ece")),
    _number("measured_error", "measured layer error", Part(probes.LAYERS, "measured_error", EACH)),
    _number("predicted_error", "predicted layer error", Part(probes.LAYERS, "predicted_error", EACH)),
    _number("spread", "spread of expert outputs, of the original", Part(probes.LAYERS, "spread_ratio", EACH)),
    _number("aligned_distance", "distance within aligned groups", Part(probes.LAYERS, "aligned_distance", EACH)),
]
# Name in the claims -> what it is in the records, of the probes: tasks that are no probes enter by kind and domain.
MEASURES = {measure.name: measure for measure in _MEASURES}

MERGING = ("hc_smoe", "m_smoe")
_MERGED = tuple(Cell(method, ratio) for method in MERGING for ratio in (0.125, 0.25, 0.5))
EXPERT_METHODS = (
    "reap", "frequency", "gate_sum", "soft_count", "importance_product", "ean_sum", "ean_mean", "weighted_ean_sum",
    "max_activation", "hc_smoe", "m_smoe",
)  # fmt: skip


def _label(name: str) -> str:
    return MEASURES[name].label if name in MEASURES else said(name)


def _over(measure: str, first: Cell, second: Cell, threshold: float = 0.0) -> Contrast:
    """The first cell has more of the measure than the second, by more than the threshold."""
    names = [f"{cell.method}{''.join(f' {key}={value}' for key, value in cell.settings)}" for cell in (first, second)]
    if first.calibration != second.calibration:
        names = [f"{name} on {cell.calibration}" for name, cell in zip(names, (first, second), strict=True)]
    label = f"{_label(measure)}, {names[0]} - {names[1]}"
    return Contrast(label, ((1, measure, first), (-1, measure, second)), threshold)


def _pruning_over_merging(measure: str, ratio: float) -> AllAbove:
    return AllAbove(tuple(_over(measure, Cell("reap", ratio), Cell(merging, ratio)) for merging in MERGING))


def _smaller_gap(large: str, small: str, first: Cell, second: Cell) -> Contrast:
    terms = ((1.0, large, first), (-1.0, large, second), (-1.0, small, first), (1.0, small, second))
    label = f"gap {first.method} - {second.method}, {_label(large)} less {_label(small)}"
    return Contrast(label, terms)


def _drift(merging: str) -> Contrast:
    first, second = Cell(merging), Cell("reap")
    late, early = "drift_late", "drift_early"
    terms = ((1.0, late, first), (-1.0, early, first), (-1.0, late, second), (1.0, early, second))
    return Contrast(f"rise of the divergence, {merging} - reap", terms)


def _quantized_loss() -> Contrast:
    """What 4-bit weights take from the pruned model less what they take from the whole one."""
    whole, pruned = Cell("none", 0.0), Cell("coverage")
    small = (("quantize", "int4"),)
    terms = (
        (1.0, GENERATION, Cell("coverage", settings=small)),
        (-1.0, GENERATION, pruned),
        (-1.0, GENERATION, Cell("none", 0.0, settings=small)),
        (1.0, GENERATION, whole),
    )
    return Contrast("loss by 4 bits on the whole model less that on the pruned one", terms, threshold=-0.02)


CLAIMS = (
    Claim(
        "pruning_beats_merging_half",
        "Pruning (REAP) beats merging (HC-SMoE, M-SMoE) on generative tasks at 50 %.",
        _REAP + "section 5.1 and table 2",
        _pruning_over_merging(GENERATION, 0.5),
    ),
    Claim(
        "pruning_beats_merging_quarter",
        "Pruning (REAP) beats merging (HC-SMoE, M-SMoE) on generative tasks at 25 %.",
        _REAP + "section 5.1 and table 2",
        _pruning_over_merging(GENERATION, 0.25),
    ),
    Claim(
        "multiple_choice_hides_it",
        "Multiple choice hides it: at 50 % the gap between pruning and merging is smaller there than on generation.",
        _REAP + "section 5.1 and figure 3",
        AllAbove(tuple(_smaller_gap(GENERATION, CHOICE, Cell("reap"), Cell(m)) for m in MERGING)),
    ),
    Claim(
        "reap_beats_frequency",
        "REAP beats pruning by frequency on generative tasks at 50 %.",
        _REAP + "section 5.1 and table 2",
        AllAbove((_over(GENERATION, Cell("reap"), Cell("frequency")),)),
    ),
    Claim(
        "frequency_no_better_than_random",
        "Pruning by frequency is no better than pruning at random on generative tasks at 50 % (by 2 points at most).",
        _NO_SOURCE,
        AllAbove((_over(GENERATION, Cell("random"), Cell("frequency"), threshold=-0.02),)),
    ),
    Claim(
        "domain_calibration_matters",
        "Domain calibration matters: calibrated on general text instead of code, pruning and merging lose more than "
        "10 points on code at 50 %.",
        _REAP + "section 5.1 and figure A8 (a collapse; the bar of 10 points is ours)",
        AllAbove(
            tuple(
                _over("code", Cell(m, calibration="code"), Cell(m, calibration="real_text"), threshold=0.1)
                for m in ("reap", "hc_smoe")
            )
        ),
    ),
    Claim(
        "merged_models_repeat",
        "Merged models write with lower n-gram diversity than pruned ones at 50 %.",
        _REAP + "section 5.1 and figure 4a",
        _pruning_over_merging("diversity", 0.5),
    ),
    Claim(
        "merged_logits_drift_faster",
        "The logits of merged models drift from the baseline's faster with position than those of pruned ones at 50 %.",
        _REAP + "section 5.1 and figure 4c",
        AllAbove(tuple(_drift(m) for m in MERGING)),
        suite="diagnostics",
    ),
    Claim(
        "merging_error_follows_prediction",
        "The measured error of merging follows the predicted one over layers, methods and ratios.",
        _REAP + "section 3.1, equation 6",
        RanksFollow("predicted_error", "measured_error", _MERGED),
        also=("diagnostics=layers",),
    ),
    Claim(
        "merging_shrinks_spread",
        "Merging shrinks the spread of expert outputs more than pruning at 50 %.",
        _REAP + "section 3.3 and figure 1",
        _pruning_over_merging("spread", 0.5),
        also=("diagnostics=layers",),
    ),
    Claim(
        "groups_are_singletons",
        "HC-SMoE's groups are mostly single experts and a few large groups at 50 %.",
        _REAP + "section 5.1 and figure A7a",
        FewLargeGroups((Cell("hc_smoe"),)),
    ),
    Claim(
        "limiting_groups_hurts",
        "Limiting the size of HC-SMoE's groups to 32 hurts code at 50 %.",
        _REAP + "section 5.1 and figure A7b",
        AllAbove((_over("code", Cell("hc_smoe"), Cell("hc_smoe", settings=(("method.max_group_size", 32),))),)),
    ),
    Claim(
        "grouped_weights_stay_apart",
        "Even after alignment the weights of experts that are merged stay far apart: their distance is above their "
        "norm (M-SMoE at 50 %).",
        _REAP + "section 5.1 and figure 4d (the bar of 1 is ours)",
        AllAbove((Contrast("distance in m_smoe's groups", ((1.0, "aligned_distance", Cell("m_smoe")),), 1.0),)),
        also=("diagnostics=layers",),
    ),
    Claim(
        "channels_beat_experts",
        "At equal size pruning channels (coverage) beats pruning experts (REAP) on multiple choice at 50 %.",
        _COVERAGE + "authors' additional tables, channel level against expert level",
        AllAbove((_over(CHOICE, Cell("coverage"), Cell("reap")),)),
    ),
    Claim(
        "channels_beat_experts_in_writing",
        "At equal size pruning channels (coverage) beats pruning experts (REAP) on generative tasks at 50 %.",
        _NO_SOURCE + " (published for multiple choice)",
        AllAbove((_over(GENERATION, Cell("coverage"), Cell("reap")),)),
    ),
    Claim(
        "pruning_composes_with_4_bits",
        "Pruning composes with 4-bit weights: on generative tasks they take at most 2 points more from a model pruned "
        "to 50 % (coverage) than from the whole one.",
        _COVERAGE + "abstract and authors' additional tables (the bar of 2 points is ours)",
        AllAbove((_quantized_loss(),)),
    ),
    Claim(
        "global_beats_layerwise",
        "Ranking the experts of all layers together beats equal numbers in each layer (REAP, generative tasks, 50 %).",
        "Zhang et al., GRAPE (arXiv:2604.06542), abstract",
        AllAbove((_over(GENERATION, Cell("reap", settings=(("method.scope", "global"),)), Cell("reap")),)),
    ),
    Claim(
        "iterative_beats_one_shot",
        "Iterative pruning beats one shot (REAP, generative tasks, 50 %).",
        _NO_SOURCE,
        AllAbove((_over(GENERATION, Cell("reap", settings=(("schedule", "iterative"),)), Cell("reap")),)),
    ),
    Claim(
        "perplexity_ranks_differently",
        "Perplexity ranks methods differently from generation at 50 %.",
        _REAP + "section 6",
        RanksDiffer(GENERATION, PERPLEXITY, tuple(Cell(m) for m in EXPERT_METHODS)),
    ),
    Claim(
        "calibration_error_comes_first",
        "Calibration error grows before accuracy falls: at 12.5 % (REAP) it is up, and multiple choice has lost less "
        "than 2 points.",
        _NO_SOURCE,
        AllAbove(
            (
                _over("calibration_error", Cell("reap", 0.125), Cell("none", 0.0)),
                _over(CHOICE, Cell("reap", 0.125), Cell("none", 0.0), threshold=-0.02),
            )
        ),
        suite="answers",
    ),
)
