"""Statements that no cell of this version can test, and what each would need."""

from reports.claims.lists.words import COVERAGE, EEP, HC_SMOE, MC_SUITE, NAEE, REAP
from reports.claims.vocabulary import GENERAL, MIXED, Claim, Needs

_STATEMENTS = (
    (
        "experts_beat_single_weights",
        "Pruning experts keeps more than pruning single weights (Wanda, 2:4) at equal size, by 3.6 and 16.2 points.",
        NAEE, "Wanda's scores of single weights, 2:4 sparsity, and its cells",
    ),
    (
        "instruction_following_goes_first",
        "Pruning hurts the following of instructions first, and examples in the prompt bring it back.",
        MC_SUITE, "a model that follows instructions, tasks with and without k examples in the prompt, and its cells",
    ),
    (
        "merging_after_pruning_helps",
        "Merging pruned experts back into those that were kept improves on pruning alone.",
        EEP, "a search over merging matrices for a task, with its evaluations",
    ),
    (
        "staged_dropping_beats_eager",
        "Dropping experts in stages while training goes on beats dropping them at once; two passes cost 0.58 points of "
        "GLUE.",
        "Chen et al., task-specific expert pruning (arXiv:2206.00277)",
        "fine-tuning on a task, during which experts are dropped",
    ),
    (
        "little_training_heals",
        "About a million tokens of fine-tuning after pruning make perplexity three times better.",
        MC_SUITE, "training after compression (recovery) and its cells",
    ),
    (
        "encoder_and_decoder_differ",
        "An encoder-decoder is best pruned 3:1 between encoder and decoder.",
        "Koishekenov et al., NLLB pruning (ACL 2023)", "an encoder-decoder MoE and its tasks",
    ),
    (
        "pruning_lowers_latency",
        "Pruned experts lower latency, merged ones do not.",
        f"{REAP}, 5; {HC_SMOE}", "time to first and to every token on an accelerator with nothing else on it",
    ),
    (
        "merging_calibrates_longer",
        "Merging needs a costlier calibration than pruning.",
        f"{REAP}, 5", "a pass of each method by itself, timed in turns on idle cores (sweeps share one)",
    ),
    (
        "late_layers_collapse",
        "What merging does to the outputs of experts is worst in late layers.",
        f"{REAP}, 3.3 and figure 1", "a model of many mixture layers, run with diagnostics=layers",
    ),
    (
        "channels_of_wide_experts",
        "Coverage pruning gains most in wide experts with few dominant channels.",
        COVERAGE, "experts of more than 32 channels, at several alignments",
    ),
)  # fmt: skip

CLAIMS = tuple(
    Claim(name, says, source, GENERAL if name == "instruction_following_goes_first" else MIXED, Needs(what))
    for name, says, source, what in _STATEMENTS
)
