"""What is said of channels, of fewer bits, of skipping, and of confidence."""

from reports.claims.lists.words import (
    CHOICE_POINTS,
    COVERAGE,
    EEP,
    ERROR,
    MC_SUITE,
    NAEE,
    NO_SOURCE,
    POINTS,
    cell,
    one,
    over,
    whole,
)
from reports.claims.vocabulary import CHOICE, EVERY, GENERATION, MATCHED, MIXED, Claim, Contrast, Contrasts, Needs

_FLIPS = "Dutta et al., Accuracy is not all you need (arXiv:2407.09141)"


def _quantized_loss() -> Contrast:
    """What 4-bit weights take from the pruned model less what they take from the whole one."""
    terms = (
        (1.0, GENERATION, cell("coverage", quantize="int4")),
        (-1.0, GENERATION, cell("coverage")),
        (-1.0, GENERATION, whole(quantize="int4")),
        (1.0, GENERATION, whole()),
    )
    return Contrast("loss by 4 bits on the whole model less that on the pruned one", terms, POINTS, -POINTS)


def _kept_at_four_bits(measure: str, name: str, margin: float, words: str) -> Claim:
    return Claim(
        name,
        f"Half the channels (coverage) and 4 bits keep {words}: at most {100 * margin:g} points are lost.",
        f"{COVERAGE}, abstract (the bar is ours)",
        MIXED,
        one(measure, cell("coverage", quantize="int4"), whole(), margin, -margin),
    )


def _shift(method: str) -> Claim:
    return Claim(
        f"shift_spoils_confidence_{method}",
        f"Calibrated on code instead of the mix, {method} leaves a larger calibration error over all questions, at 50 "
        "% (soft and hard routing: a verdict for each model).",
        f"{NO_SOURCE} (a question of this project's beginning)",
        f"{MATCHED} and {MIXED}",
        one("calibration_error", cell(method, 0.5, "code"), cell(method), ERROR),
        suite="answers",
        experiment="routing",
    )


CLAIMS = (
    Claim(
        "channels_beat_experts_in_choice",
        "At equal size pruning channels (coverage) beats pruning experts (REAP) on multiple choice at 50 %, on every "
        "corpus.",
        f"{COVERAGE}, authors' additional tables, channel level against expert level",
        EVERY,
        one(CHOICE, cell("coverage", 0.5, EVERY), cell("reap", 0.5, EVERY), CHOICE_POINTS),
        experiment="channels_vs_experts",
    ),
    Claim(
        "channels_beat_experts_in_choice_mixed",
        "The same calibrated on the mix of all domains.",
        f"{COVERAGE}, authors' additional tables, channel level against expert level",
        MIXED,
        one(CHOICE, cell("coverage"), cell("reap"), CHOICE_POINTS),
    ),
    Claim(
        "pruning_composes_with_4_bits",
        "Pruning composes with 4-bit weights: where the model writes they take at most 2 points more from one pruned "
        "to 50 % (coverage) than from the whole one.",
        f"{COVERAGE}, abstract and authors' additional tables (the bar of 2 points is ours)",
        MIXED,
        Contrasts((_quantized_loss(),)),
    ),
    _kept_at_four_bits(CHOICE, "half_and_4_bits_keep_choice", 0.02, "multiple choice"),
    _kept_at_four_bits(GENERATION, "half_and_4_bits_keep_generation", 0.02, "what the model writes"),
    Claim(
        "calibration_error_comes_first",
        "Calibration error grows before accuracy falls: at 12.5 % (REAP) it is up, and multiple choice has lost less "
        "than 2 points.",
        f"{NO_SOURCE} (a question of this project's beginning)",
        MIXED,
        Contrasts(
            (
                over("calibration_error", cell("reap", 0.125), whole(), ERROR),
                over(CHOICE, cell("reap", 0.125), whole(), 0.02, -0.02),
            )
        ),
        suite="answers",
    ),
    Claim(
        "equal_accuracy_unequal_answers",
        "Accuracy hides changed answers: at 12.5 % (REAP) it has lost less than 2 points, and answers differ more "
        "often when a question is put in another way.",
        _FLIPS,
        MIXED,
        Contrasts(
            (
                over(CHOICE, cell("reap", 0.125), whole(), 0.02, -0.02),
                over("consistency", whole(), cell("reap", 0.125), POINTS),
            )
        ),
        suite="answers",
    ),
    *map(_shift, ("reap", "hc_smoe")),
    Claim(
        "fewer_active_experts",
        "A pruned model bears half as many active experts: at 50 % (REAP) four for eight take at most 2 points of what "
        "it writes.",
        f"{EEP} (one active expert in place of two; the bar of 2 points is ours)",
        MIXED,
        one(GENERATION, cell("reap", active=4), cell("reap"), POINTS, -POINTS),
    ),
    Claim(
        "skipping_and_pruning",
        "Skipping experts beside pruning (REAP, 25 %) costs at most 2 points more than pruning alone.",
        f"{NAEE}, table 5 (at equal speed, which a score does not tell)",
        MIXED,
        one(GENERATION, cell("reap", 0.25, skip="calibrated"), cell("reap", 0.25), POINTS, -POINTS),
    ),
    Claim(
        "dominant_experts_have_low_stable_rank",
        "Dominant experts have a lower stable rank.",
        MC_SUITE,
        MIXED,
        Needs(
            "the cell method=stable_rank ratio=0.5 calibration=mixed (saliency.json beside the usage in its record) "
            "and a test of ranks over experts"
        ),
    ),
    Claim(
        "activation_sits_in_few_channels",
        "Activation is concentrated in few channels of an expert.",
        COVERAGE,
        MIXED,
        Needs("channel scores by expert in saliency.json of method=activation_channels ratio=0.5 calibration=mixed"),
    ),
)
