"""Whether "pruning beats merging" stands against what the field has answered: constants, REAM, refit, searched budgets.

A refitted cell is another cell than a bare one: its setting ``refit`` is part of what a claim asks for.
"""

from reports.claims.lists.words import NAMES, NO_SOURCE, POINTS, cell, gap, one, percent
from reports.claims.vocabulary import CHOICE, GENERATION, MATCHED, MIXED, Claim, Contrast, Contrasts, RanksAgree

_MONE = "Zhang et al., MoNE (arXiv:2507.00390)"
_REAM = "Knyazev et al., REAM (arXiv:2604.04356), table 2"
_FRONTIER = "frontier"
_ALL = ("reap", "frequency", "hc_smoe", "m_smoe", "coverage", "gate_sum", "mone", "tilted", "ream", "mergemoe")


def _constant(rule: str) -> Claim:
    return Claim(
        f"constant_beats_deletion_{rule}",
        f"A constant in the place of a pruned expert beats deleting it, at equal experts (REAP, 50 %, {rule} corpora).",
        f"{_MONE} (of its own criterion)",
        rule,
        one(GENERATION, cell("reap", 0.5, rule, method__constants=True), cell("reap", 0.5, rule)),
        experiment=_FRONTIER,
    )


def _ream(ratio: float, rule: str) -> Claim:
    return Claim(
        f"ream_beats_reap_{ratio:g}_{rule}",
        f"Merging by REAM beats pruning by REAP where the model writes, at {percent(ratio)} ({rule} corpora).",
        _REAM,
        rule,
        one(GENERATION, cell("ream", ratio, rule), cell("reap", ratio, rule)),
        experiment=_FRONTIER,
    )


def _half_the_gap(rule: str) -> Claim:
    refit, bare, reap = (
        cell("hc_smoe", 0.5, rule, refit="routed"), cell("hc_smoe", 0.5, rule), cell("reap", 0.5, rule)
    )  # fmt: skip
    terms = ((1.0, GENERATION, refit), (-0.5, GENERATION, bare), (-0.5, GENERATION, reap))
    contrast = Contrast("refitted hc_smoe less the middle of hc_smoe and reap", terms, POINTS, 0.0)
    return Claim(
        f"refit_closes_half_the_gap_{rule}",
        f"A refit of {NAMES['hc_smoe']}'s down projections closes at least half of its gap to REAP without one, at 50 "
        f"% ({rule} corpora).",
        f"{NO_SOURCE} (nobody has published it)",
        rule,
        Contrasts((contrast,)),
        experiment=_FRONTIER,
    )


CLAIMS = (
    *map(_constant, (MIXED, MATCHED)),
    *(_ream(ratio, rule) for ratio in (0.25, 0.5) for rule in (MIXED, MATCHED)),
    *map(_half_the_gap, (MIXED, MATCHED)),
    Claim(
        "order_is_the_same_with_refit",
        "The order of methods is the same with and without refit, at 50 % (rank correlation above 0.8).",
        f"{NO_SOURCE} (nobody has published it; the bar of 0.8 is ours)",
        MIXED,
        RanksAgree(
            GENERATION, GENERATION, tuple(cell(m) for m in _ALL), 0.8, above=True,
            second_cells=tuple(cell(m, refit="joint") for m in _ALL),
        ),
        experiment=_FRONTIER,
    ),
    Claim(
        "searched_budgets_help_generation_more",
        "Searched budgets (EvoESAP) help what the model writes more than multiple choice (REAP, 50 %).",
        "EvoESAP, abstract, as quoted in digests",
        MIXED,
        Contrasts((gap(GENERATION, CHOICE, cell("reap", allocation="evoesap"), cell("reap")),)),
        experiment=_FRONTIER,
    ),
)  # fmt: skip
