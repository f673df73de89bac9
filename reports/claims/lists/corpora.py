"""What is said of the calibration corpus, and of criteria set against each other."""

import math

from reports.claims.lists.words import (
    COVERAGE,
    CRITERIA,
    EXPERT_METHODS,
    FACTOR,
    MC_SUITE,
    NAEE,
    NAMES,
    NO_SOURCE,
    POINTS,
    REAP,
    SEER,
    cell,
    one,
    over,
)
from reports.claims.selection import Cell
from reports.claims.vocabulary import (
    ACROSS,
    CHOICE,
    EVERY,
    GENERAL,
    GENERATION,
    MATCHED,
    MIXED,
    NO_CORPUS,
    PERPLEXITY,
    SHIFTED,
    Claim,
    Contrast,
    Contrasts,
    DependsMost,
    KeptDiffer,
    LongTail,
    RanksAgree,
)

_DOMAINS = ("code", "math", "writing")
_TWO = f"{MATCHED} and {GENERAL}"


def _of_code_on_general(method: str) -> Claim:
    return Claim(
        f"domain_calibration_matters_{method}",
        f"Domain calibration matters: calibrated on general text instead of code, {NAMES[method]} loses more than 10 "
        "points of code at 50 %.",
        f"{REAP}, 5.1 and figure A8 (a collapse; the bar of 10 points is ours)",
        _TWO,
        one("code", cell(method, 0.5, MATCHED), cell(method, 0.5, GENERAL), least=0.1),
    )


def _nothing_left(method: str) -> Claim:
    contrast = Contrast(
        f"less the code score of {method}", ((-1.0, "code", cell(method, 0.5, GENERAL)),), POINTS, -0.05
    )
    return Claim(
        f"general_text_brings_code_to_zero_{method}",
        f"Calibrated on general text, {NAMES[method]} brings code to 0 % at 50 % (below 5 %).",
        f"{REAP}, table A8 (calibrated on C4; the bar of 5 points is ours)",
        GENERAL,
        Contrasts((contrast,)),
    )


def _frequency(rule: str, ratio: float = 0.5) -> Claim:
    return Claim(
        f"frequency_worse_than_random_{rule}",
        f"Pruning by frequency is worse than pruning at random where the model writes, at 50 % ({rule} corpora).",
        f"{NAEE}, table 2 (Mixtral)",
        rule,
        one(GENERATION, cell("random", ratio, rule), cell("frequency", ratio, rule)),
    )


def _best_criterion(rule: str) -> Claim:
    return Claim(
        f"reap_best_criterion_{rule}",
        f"REAP beats every other criterion of pruning experts where the model writes, at 50 % ({rule} corpora).",
        f"{REAP}, table 2 (frequency and EAN there)",
        rule,
        Contrasts(tuple(over(GENERATION, cell("reap", 0.5, rule), cell(c, 0.5, rule), POINTS) for c in CRITERIA)),
    )


def _dependence(other: str) -> Claim:
    terms = (
        (1.0, GENERATION, cell("reap", 0.5, MATCHED)),
        (-1.0, GENERATION, cell("reap", 0.5, SHIFTED)),
        (-1.0, GENERATION, cell(other, 0.5, MATCHED)),
        (1.0, GENERATION, cell(other, 0.5, SHIFTED)),
    )
    contrast = Contrast(f"loss from matched to shifted corpora, reap - {other}", terms, POINTS)
    return Claim(
        f"reap_depends_more_than_{other}",
        f"REAP depends more on its calibration corpus than {NAMES[other]}: from the domain that is scored to the other "
        "domains it loses more, at 50 %.",
        f"{NO_SOURCE} (seen in this project)",
        f"{MATCHED} and {SHIFTED}",
        Contrasts((contrast,)),
    )


def _depends_most(ratio: float) -> Claim:
    return Claim(
        f"reap_depends_most_on_its_corpus_{ratio:g}",
        "Of all methods REAP depends most on its calibration corpus: what the model writes after it varies most over "
        f"mixed, code, math and writing, at {100 * ratio:g} %.",
        f"{NO_SOURCE} (seen in this project)",
        ACROSS,
        DependsMost("reap", ("hc_smoe", "m_smoe", "frequency", "coverage", "gate_sum"), ratio, GENERATION, POINTS),
        experiment="panel",
    )


def _perplexity_ranks(ratio: float) -> Claim:
    return Claim(
        f"perplexity_ranks_differently_{ratio:g}",
        f"Perplexity does not rank methods as generation does at {100 * ratio:g} % (rank correlation below 0.8).",
        f"{REAP}, 6 (the bar of 0.8 is ours)",
        MIXED,
        RanksAgree(GENERATION, PERPLEXITY, tuple(cell(m, ratio) for m in EXPERT_METHODS), 0.8),
    )


def _kept(pairs: tuple[tuple[Cell, Cell], ...], bar: float = 1.0) -> KeptDiffer:
    return KeptDiffer(pairs, bar)


def _on(corpus: str) -> Cell:
    return cell("reap", 0.5, corpus)


_ITERATIVE = cell("reap", schedule="iterative")
_GLOBAL = cell("reap", method__scope="global")
_SOFT = cell("soft_count", method__scope="global")

CLAIMS = (
    *map(_of_code_on_general, ("reap", "hc_smoe")),
    *map(_nothing_left, ("reap", "hc_smoe")),
    *map(_dependence, ("hc_smoe", "frequency", "coverage")),
    *map(_depends_most, (0.25, 0.5)),
    Claim(
        "coverage_beats_uniform_widths",
        "Coverage beats the same number of channels in every expert by the same scores, at 50 %, on every corpus.",
        f"{COVERAGE}, method (budgets by layer and expert)",
        EVERY,
        one(GENERATION, cell("coverage", 0.5, EVERY), cell("activation_channels", 0.5, EVERY)),
        experiment="channels_vs_experts",
    ),
    Claim(
        "coverage_beats_reap_everywhere",
        "Pruning channels (coverage) beats pruning experts (REAP) where the model writes, at 50 %, on every corpus.",
        f"{COVERAGE}, authors' additional tables (of multiple choice)",
        EVERY,
        one(GENERATION, cell("coverage", 0.5, EVERY), cell("reap", 0.5, EVERY)),
        experiment="channels_vs_experts",
    ),
    Claim(
        "magnitude_beats_reap_under_shift",
        "Under shift, channels by magnitude, which need no corpus, beat experts by REAP, at 50 %.",
        f"{NO_SOURCE} (seen in this project)",
        SHIFTED,
        one(GENERATION, cell("magnitude_channels", 0.5, SHIFTED), cell("reap", 0.5, SHIFTED)),
        experiment="channels_vs_experts",
    ),
    _frequency(MIXED),
    _frequency(MATCHED),
    _best_criterion(MIXED),
    _best_criterion(MATCHED),
    *map(_perplexity_ranks, (0.25, 0.5)),
    Claim(
        "corpus_changes_selection",
        "The corpus changes the selection: REAP keeps other experts when calibrated on code than on general text, in "
        "nearly every layer.",
        f"{NAEE} (28 of 32 layers of Mixtral)",
        _TWO,
        _kept(((_on("code"), _on("real_text")),)),
        note="two layers in the reference MoE, so not tested over depth",
    ),
    Claim(
        "domains_keep_different_experts",
        "Domains have experts of their own: the sets that REAP keeps on code, math and writing have "
        "Jaccard indices below 0.5.",
        f"{NAEE}, {MC_SUITE} (the bar of a half is ours; sets drawn at random have a third)",
        MATCHED,
        _kept(tuple((_on(a), _on(b)) for place, a in enumerate(_DOMAINS) for b in _DOMAINS[:place]), 0.5),
        note="two layers in the reference MoE, so not tested over depth",
    ),
    Claim(
        "usage_is_long_tailed",
        "Routers use experts unevenly: the most used quarter of a layer takes more than half of the tokens.",
        "He et al. and Li et al., M-SMoE (arXiv:2310.01334), figures of usage (the bar of a half is ours)",
        NO_CORPUS,
        LongTail((cell("reap"),)),
    ),
    Claim(
        "pruning_improves_some_task",
        "Pruning improves some task: at 12.5 or 25 % some method is more than 2 points better than the uncompressed "
        "model on code, math or writing.",
        "Liu et al., EEP (arXiv:2407.00945), SQuAD",
        MIXED,
        Contrasts(
            tuple(
                over(domain, cell(method, ratio), cell("none", 0.0), POINTS, POINTS)
                for domain in _DOMAINS
                for method in ("reap", "hc_smoe", "m_smoe")
                for ratio in (0.125, 0.25)
            ),
            some=True,
        ),
    ),
    Claim(
        "global_beats_layerwise",
        "Ranking the experts of all layers together beats equal numbers in each layer (REAP, where the model writes, "
        "50 %).",
        "Zhang et al., GRAPE (arXiv:2604.06542), abstract",
        MIXED,
        one(GENERATION, _GLOBAL, cell("reap")),
        note="two mixtures are one allocation: not tested over depth",
    ),
    Claim(
        "global_beats_layerwise_in_perplexity",
        "The same in perplexity.",
        f"{SEER} (of soft counts)",
        MIXED,
        one(PERPLEXITY, cell("reap"), _GLOBAL, FACTOR),
        note="two mixtures are one allocation: not tested over depth",
    ),
    Claim(
        "global_soft_counts_beat_layerwise",
        "Ranking the experts of all layers together by soft counts beats equal numbers in each layer, where the model "
        "writes and in perplexity, at 50 %.",
        f"{SEER}, as it was said",
        MIXED,
        Contrasts(
            (over(GENERATION, _SOFT, cell("soft_count"), POINTS), over(PERPLEXITY, cell("soft_count"), _SOFT, FACTOR))
        ),
    ),
    Claim(
        "global_thresholds_loop",
        "A global ranking leaves more texts that go round in a loop (REAP, 50 %).",
        f"{NO_SOURCE} (reported by users of pruned models)",
        MIXED,
        one("loops", _GLOBAL, cell("reap"), 0.01),
        suite="diagnostics",
    ),
    Claim(
        "iterative_beats_one_shot",
        "Iterative pruning beats one shot where the model writes (REAP, 50 %).",
        f"{MC_SUITE} (said of perplexity and MMLU)",
        MIXED,
        one(GENERATION, _ITERATIVE, cell("reap")),
    ),
    Claim(
        "iterative_beats_one_shot_in_perplexity",
        "Iterative pruning has the better perplexity (REAP, 50 %).",
        MC_SUITE,
        MIXED,
        one(PERPLEXITY, cell("reap"), _ITERATIVE, FACTOR),
    ),
    Claim(
        "iterative_halves_perplexity",
        "Iterative pruning is about twice better in perplexity, without fine-tuning (REAP, 50 %).",
        f"{MC_SUITE} (30.6 against 17.4 at 75 % of Mixtral, by EAN)",
        MIXED,
        one(PERPLEXITY, cell("reap"), _ITERATIVE, FACTOR, math.log(30.6 / 17.4)),
    ),
    Claim(
        "iterative_beats_one_shot_in_choice",
        "Iterative pruning is better on multiple choice (REAP, 50 %).",
        f"{MC_SUITE} (MMLU)",
        MIXED,
        one(CHOICE, _ITERATIVE, cell("reap"), 0.01),
    ),
    Claim(
        "iterative_keeps_other_experts",
        "One shot and iterative pruning keep different experts (REAP, 50 %).",
        MC_SUITE,
        MIXED,
        _kept(((cell("reap"), _ITERATIVE),)),
        note="two layers in the reference MoE, so not tested over depth",
    ),
    Claim(
        "activation_norm_beats_random_at_75",
        "At 75 % pruning by activation norm halves the perplexity of pruning at random.",
        f"{MC_SUITE} (14.02 against 34.47)",
        MIXED,
        one(PERPLEXITY, cell("random", 0.75), cell("ean", 0.75), FACTOR, math.log(2)),
    ),
    Claim(
        "vocabulary_coverage_must_stay",
        "Experts of high vocabulary coverage must stay: pruning those of least beats pruning at random, at 50 %.",
        MC_SUITE,
        MIXED,
        one(GENERATION, cell("vocabulary_coverage"), cell("random")),
    ),
)
