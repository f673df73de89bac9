"""The claims that reports open with: two methods at a quarter and at half; matched, general and mixed readings."""

from reports.claims.lists.words import COVERAGE, NO_SOURCE, REAP, cell, one, over, percent
from reports.claims.vocabulary import GENERAL, GENERATION, MATCHED, MIXED, SHIFTED, Claim, Contrasts

_READINGS = {
    MATCHED: "calibrated on the domain that is scored",
    GENERAL: "calibrated on general text",
    MIXED: "calibrated on the mix of all domains",
}
# Name of the claim, the two methods as cells and in words, and where it was said of large models.
_PAIRS = (
    ("reap_beats_hc_smoe", "reap", "hc_smoe", "Pruning (REAP) beats merging (HC-SMoE)", f"{REAP}, 5.1 and table 2"),
    ("reap_beats_m_smoe", "reap", "m_smoe", "Pruning (REAP) beats merging (M-SMoE)", f"{REAP}, 5.1 and table 2"),
    ("reap_beats_frequency", "reap", "frequency", "REAP beats pruning by frequency", f"{REAP}, 5.1 and table 2"),
    (
        "coverage_beats_reap", "coverage", "reap", "Pruning channels (coverage) beats pruning experts (REAP)",
        f"{COVERAGE}, authors' additional tables (of multiple choice)",
    ),
    (
        "coverage_beats_magnitude", "coverage", "magnitude_channels",
        "Channels by coverage beat channels by magnitude", f"{COVERAGE}, abstract",
    ),
)  # fmt: skip
_RATIOS = {0.5: "half", 0.25: "quarter"}


def _headline(name: str, first: str, second: str, says: str, source: str, ratio: float, rule: str) -> Claim:
    return Claim(
        f"{name}_{_RATIOS[ratio]}_{rule}",
        f"{says} where the model writes, at {percent(ratio)}, {_READINGS[rule]}.",
        source,
        rule,
        one(GENERATION, cell(first, ratio, rule), cell(second, ratio, rule)),
        headline=True,
    )


def _shifted(ratio: float) -> Claim:
    return Claim(
        f"coverage_beats_magnitude_{_RATIOS[ratio]}_shifted",
        f"Channels by coverage beat channels by magnitude under shift too: at {percent(ratio)}, calibrated on other "
        "domains than the one that is scored.",
        f"{COVERAGE}, abstract",
        SHIFTED,
        one(GENERATION, cell("coverage", ratio, SHIFTED), cell("magnitude_channels", ratio, SHIFTED)),
        headline=True,
    )


CLAIMS = (
    *(_headline(*pair, ratio, rule) for pair in _PAIRS for ratio in _RATIOS for rule in _READINGS),
    *map(_shifted, _RATIOS),
    Claim(
        "coverage_keeps_confidence",
        "Channels by coverage leave confidence better calibrated than channels by magnitude, at 50 %.",
        f"{NO_SOURCE} (a question of this project's beginning)",
        MIXED,
        one("calibration_error", cell("magnitude_channels"), cell("coverage"), 0.01),
        suite="answers",
        headline=True,
    ),
    Claim(
        "coverage_keeps_confidence_under_shift",
        "Under shift too: calibrated on code and asked about everything, at 50 %.",
        f"{NO_SOURCE} (a question of this project's beginning)",
        MATCHED,
        Contrasts(
            (over("calibration_error", cell("magnitude_channels", 0.5, "code"), cell("coverage", 0.5, "code"), 0.01),)
        ),
        suite="answers",
    ),
)
