"""What is said of merging: what it costs, and why."""

from reports.claims.lists.words import (
    CHOICE_POINTS,
    DISTANCE,
    DIVERGENCE,
    FACTOR,
    HC_SMOE,
    MERGING,
    NAMES,
    POINTS,
    REAP,
    SLOPE_MARGIN,
    SPANS,
    SPREAD,
    cell,
    gap,
    one,
    over,
    percent,
    whole,
)
from reports.claims.selection import Cell
from reports.claims.vocabulary import (
    CHOICE,
    GENERATION,
    MATCHED,
    MIXED,
    Claim,
    Contrast,
    Contrasts,
    FewLargeGroups,
    FollowsWithin,
)

_LAYERS = ("diagnostics=layers",)
_DEPTH = "of the layers that the model has: two in the reference MoE, so not tested over depth"
_SECTION = f"{REAP}, 5.1"


def _hides(merging: str) -> Claim:
    return Claim(
        f"multiple_choice_hides_{merging}",
        f"Multiple choice hides it: at 50 % the gap between pruning (REAP) and {NAMES[merging]} is smaller there than "
        "where the model writes.",
        f"{_SECTION} and figure 3",
        MIXED,
        Contrasts((gap(GENERATION, CHOICE, cell("reap"), cell(merging)),)),
    )


def _code_loss(ratio: float, points: float) -> Claim:
    return Claim(
        f"reap_code_loss_{ratio:g}",
        f"Calibrated on code, REAP loses at most {100 * points:.1f} points of code at {percent(ratio)}.",
        f"{REAP}, 5.1 (means over models, table A7)",
        MATCHED,
        one("code", cell("reap", ratio, MATCHED), whole(), least=-points),
    )


def _merging_code_loss(ratio: float, points: float) -> Claim:
    return Claim(
        f"merging_code_loss_{ratio:g}",
        f"Calibrated on code, merging (HC-SMoE, M-SMoE) loses more than {100 * points:.0f} points of code at "
        f"{percent(ratio)}.",
        f"{REAP}, 5.1 (means over models, table A7)",
        MATCHED,
        Contrasts(tuple(over("code", whole(), cell(m, ratio, MATCHED), POINTS, points) for m in MERGING)),
    )


def _choice_loss(merging: str, points: float) -> Claim:
    return Claim(
        f"{merging}_choice_loss",
        f"{NAMES[merging]} loses more than {100 * points:.1f} points of multiple choice at 25 %.",
        f"{REAP}, table A6 (a mean of {100 * points + 1:.1f}; the bar is a point less)",
        MIXED,
        one(CHOICE, whole(), cell(merging, 0.25), CHOICE_POINTS, points),
    )


def _repeats(merging: str) -> Claim:
    return Claim(
        f"{merging}_repeats",
        f"{NAMES[merging]} writes with lower n-gram diversity than pruning (REAP) at 50 %.",
        f"{_SECTION} and figure 4a",
        MIXED,
        one("diversity", cell("reap"), cell(merging)),
        suite="diagnostics",
    )


def _free_slope(merging: str) -> Contrast:
    """Least squares over the spans, each about as long as all before it: per doubling of the position."""
    places = [place - (len(SPANS) - 1) / 2 for place in range(len(SPANS))]
    length = sum(place**2 for place in places)
    terms: list[tuple[float, str, Cell]] = []
    for place, span in zip(places, SPANS, strict=True):
        if place:
            weight, name = place / length, f"free_{span}"
            terms += [(weight, name, cell(merging)), (-weight, name, cell("reap"))]
    return Contrast(
        f"slope of the free divergence per doubling, positions 1 to 32, {merging} - reap", tuple(terms), SLOPE_MARGIN
    )


def _drift(name: str, says: str, contrasts: tuple[Contrast, ...]) -> Claim:
    return Claim(name, says, f"{_SECTION} and figure 4c", MIXED, Contrasts(contrasts), suite="diagnostics")


def _spread(merging: str) -> Claim:
    return Claim(
        f"{merging}_shrinks_spread",
        f"{NAMES[merging]} shrinks the spread of expert outputs more than pruning (REAP) at 50 %.",
        f"{REAP}, 3.3 and figure 1",
        MIXED,
        one("spread", cell("reap"), cell(merging), SPREAD),
        also=_LAYERS,
        note=_DEPTH,
    )


def _beats(measure: str, first: str, second: str, ratio: float, margin: float) -> Claim:
    return Claim(
        f"{first}_beats_{second}_{measure}_{ratio:g}",
        f"{NAMES[first]} beats {NAMES[second]} on multiple choice at {percent(ratio)}.",
        f"{HC_SMOE}, result tables (Qwen, Mixtral)",
        MIXED,
        one(measure, cell(first, ratio), cell(second, ratio), margin),
    )


CLAIMS = (
    *map(_hides, MERGING),
    _code_loss(0.25, 0.019),
    _code_loss(0.5, 0.069),
    _merging_code_loss(0.25, 0.05),
    _merging_code_loss(0.5, 0.20),
    _choice_loss("hc_smoe", 0.034),
    _choice_loss("m_smoe", 0.099),
    _beats(CHOICE, "hc_smoe", "m_smoe", 0.25, CHOICE_POINTS),
    _beats(CHOICE, "hc_smoe", "m_smoe", 0.5, CHOICE_POINTS),
    _beats(CHOICE, "hc_smoe", "frequency", 0.5, CHOICE_POINTS),
    *map(_repeats, MERGING),
    Claim(
        "merged_texts_are_unlikely",
        "What merged models (HC-SMoE, M-SMoE) write is less likely by the uncompressed model than what a pruned one "
        "(REAP) writes, at 50 %.",
        f"{_SECTION} and figure 4b",
        MIXED,
        Contrasts(tuple(over("cross_perplexity", cell(m), cell("reap"), FACTOR) for m in MERGING)),
        suite="diagnostics",
    ),
    _drift(
        "merged_logits_drift_faster",
        "On given text the divergence of merged models from the baseline rises faster with position than that of "
        "pruned ones, at 50 % (slope over all positions).",
        tuple(over("drift_slope", cell(m), cell("reap"), SLOPE_MARGIN) for m in MERGING),
    ),
    _drift(
        "merged_logits_drift_more",
        "On given text merged models diverge more from the baseline than pruned ones, at 50 % (area under the curve).",
        tuple(over("drift_area", cell(m), cell("reap"), DIVERGENCE) for m in MERGING),
    ),
    _drift(
        "merged_models_drift_faster_writing_freely",
        "While each model writes freely, the divergence of merged ones rises faster with position, at 50 % (slope per "
        "doubling of the position).",
        tuple(_free_slope(m) for m in MERGING),
    ),
    _drift(
        "merged_models_drift_more_writing_freely",
        "While each model writes freely, merged ones diverge more from the baseline than pruned ones, at 50 %.",
        tuple(over("free_area", cell(m), cell("reap"), DIVERGENCE) for m in MERGING),
    ),
    Claim(
        "merging_error_follows_prediction",
        "Within a method and a ratio, the measured error of merging follows the predicted one over layers.",
        f"{REAP}, 3.1, equation 6",
        MIXED,
        FollowsWithin(
            "predicted_error", "measured_error", tuple(cell(m, ratio) for m in MERGING for ratio in (0.125, 0.25, 0.5))
        ),
        also=_LAYERS,
        note=f"{_DEPTH}; the error of a group is predicted, but measured by layer alone",
    ),
    Claim(
        "merging_error_has_the_predicted_size",
        "The predicted error is the size of what merging costs a layer: measured, it is at most twice that, at 50 %.",
        f"{REAP}, 3.1, equation 6 (a lower bound there; the factor of 2 is ours)",
        MIXED,
        Contrasts(
            tuple(
                Contrast(
                    f"twice the predicted error less the measured, {m}",
                    ((2.0, "predicted_error", cell(m)), (-1.0, "measured_error", cell(m))),
                    SPREAD,
                )
                for m in MERGING
            )
        ),
        also=_LAYERS,
        note=_DEPTH,
    ),
    *map(_spread, MERGING),
    Claim(
        "groups_are_singletons",
        "HC-SMoE's groups are mostly single experts and a few large groups at 50 %.",
        f"{_SECTION} and figure A7a",
        MIXED,
        FewLargeGroups((cell("hc_smoe"),)),
        note=_DEPTH,
    ),
    Claim(
        "limiting_groups_costs_much",
        "Limiting the size of HC-SMoE's groups to 32 costs more than 5 points of code at 50 %.",
        f"{_SECTION} and figure A7b (large drops; the bar of 5 points is ours)",
        MIXED,
        one("code", cell("hc_smoe"), cell("hc_smoe", method__max_group_size=32), least=0.05),
    ),
    Claim(
        "merged_weights_stay_apart",
        "Even after alignment the weights of merged experts are about as far apart as those of random pairs of their "
        "layer, or further (M-SMoE at 50 %).",
        f"{_SECTION} and figure 4d (the comparison with random pairs is ours)",
        MIXED,
        Contrasts(
            (
                Contrast(
                    "aligned distance, pairs in m_smoe's groups - random pairs",
                    ((1.0, "merged_distance", cell("m_smoe")), (-1.0, "random_distance", cell("m_smoe"))),
                    DISTANCE,
                    -DISTANCE,
                ),
            )
        ),
        also=_LAYERS,
        note=_DEPTH,
    ),
    Claim(
        "merged_singular_vectors_are_apart",
        "The singular vectors of merged experts are poorly aligned: their overlap is below a half (M-SMoE at 50 %).",
        f"{_SECTION} and figure 4d (the bar of a half is ours)",
        MIXED,
        Contrasts(
            (
                Contrast(
                    "less the overlap of singular vectors in m_smoe's groups",
                    ((-1.0, "merged_overlap", cell("m_smoe")),),
                    DISTANCE,
                    -0.5,
                ),
            )
        ),
        also=_LAYERS,
        note=_DEPTH,
    ),
)
