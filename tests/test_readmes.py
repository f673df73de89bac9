"""The pages that people read: their links, folders, commands, options and numbers are those of the project."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness import cli  # noqa: F401 (the resolvers of the configuration, and the sweeper of grids)
from harness.cells.dry_run import report
from harness.reference import model_path
from methods import criteria
from methods.prune_experts import ExpertPruning
from tests.methods.conftest import made_up_case
from tests.readmes import (
    BY_HAND,
    CODE,
    COMMAND,
    CONF,
    FOLDERS,
    NOT_RUN,
    OF_A_RUN,
    PATTERNS,
    PLACEHOLDER,
    READMES,
    ROOMS,
    ROOT,
    RUN,
    RUN_SLOWLY,
    all_commands,
    blocks,
    page_name,
    prose,
    spans,
    tables,
    words,
)
from tests.tasks.scripted import ScriptedBackend

BIN = Path(sys.executable).parent
# --- how each command was checked -------------------------------------------------------------------------------------

HOW = (*RUN, *RUN_SLOWLY, *BY_HAND, *NOT_RUN, *PATTERNS)


def test_of_every_command_it_is_said_how_it_was_checked():
    assert sorted(HOW) == sorted(set(HOW))
    assert set(all_commands()) == set(HOW)
    assert [where for where in BY_HAND.values() if not (ROOT / where).exists()] == []


# --- links, files, folders --------------------------------------------------------------------------------------------


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8000


@pytest.mark.parametrize("page", READMES, ids=page_name)
def test_local_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page_name(page)}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page_name(page)}: {target}"


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings."""
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"(?m)^#+ (.*)$", text)}


@pytest.mark.parametrize("page", READMES, ids=page_name)
def test_files_that_are_named_exist(page: Path):
    named = {span for span in spans(page.read_text()) if re.fullmatch(r"[\w./]+\.(py|yaml|md)|(\w+/)+", span)}
    places = (ROOT, page.parent, *(CONF / group for group in groups()))
    missing = {
        span
        for span in named - {f"{name}/" for name in OF_A_RUN.split()}
        if not any((place / span).exists() for place in places)
    }
    assert {span for span in missing if not PLACEHOLDER.search(span)} == set()


def test_the_tree_of_the_first_page_is_that_of_the_project():
    (tree,) = [block for block in blocks((ROOT / "README.md").read_text()) if block.startswith("harness/")]
    above = ROOT
    listed: dict[Path, set[str]] = {ROOT: set()}
    for line in tree.splitlines():
        indent, name = re.fullmatch(r"( *)(\w+)/ +\S.*", line).groups()  # type: ignore[union-attr]
        parent = above if indent else ROOT
        above = above if indent else ROOT / name
        assert (parent / name).is_dir(), line
        listed.setdefault(parent, set()).add(name)
    assert listed[ROOT] == set(FOLDERS)
    assert listed[ROOT / "harness"] == {path.parent.name for path in (ROOT / "harness").glob("*/__init__.py")}


@pytest.mark.parametrize("room", ROOMS)
def test_the_page_of_a_room_names_its_files(room: str):
    folder = ROOT / "harness" / room
    text = (folder / "README.md").read_text()
    names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert len(text.splitlines()) <= 60


# --- configuration ----------------------------------------------------------------------------------------------------


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Group -> its options, as they lie in conf."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        if path.parent != CONF:
            found.setdefault(str(path.parent.relative_to(CONF)), []).append(path.stem)
    return {group: tuple(options) for group, options in found.items()}


def test_the_page_of_conf_lists_every_group_and_option():
    listed: dict[str, set[str]] = {}
    settings = set()
    for heading, head, cells in tables((CONF / "README.md").read_text()):
        if head == "group":
            (group,) = CODE.findall(cells[0])
            listed.setdefault(group, set()).update(CODE.findall(cells[1]))
        elif head == "option":
            listed.setdefault(heading, set()).update(CODE.findall(cells[0]))
        elif head == "setting":
            settings |= set(CODE.findall(cells[0]))
    assert listed == {group: set(options) for group, options in groups().items()}
    own = OmegaConf.load(CONF / "config.yaml")
    assert settings == {key for key in own if key not in ("defaults", "hydra", "data")} | {"data.root"}


def test_the_page_of_methods_lists_every_method_and_setting():
    rows = list(tables((ROOT / "methods" / "README.md").read_text()))
    methods = {code for _, head, cells in rows if head == "`method=`" for code in CODE.findall(cells[0])}
    assert methods == set(groups()["method"])
    told = {code for heading, _, cells in rows if heading == "Their readings" for code in CODE.findall(cells[1])}
    there = {str(key) for name in methods for key in OmegaConf.load(CONF / "method" / f"{name}.yaml")}
    assert there - {"_target_", "name", "criterion", "defaults"} <= told


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


@cache
def with_each(group: str) -> tuple[DictConfig, ...]:
    """The configuration with every option of the group."""
    return tuple(composed(f"{group}={option}") for option in groups()[group] if not option.startswith("_"))


def jobs(overrides: Iterable[str]) -> Iterator[list[str]]:
    """The overrides of every job that is swept over them, each value once (not every value with every other)."""
    parsed = OverridesParser.create().parse_overrides([str(one) for one in overrides])
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    for number in range(max(map(len, values), default=1)):
        yield [str(of[number % len(of)]) for of in values]


def configurations(command: str) -> Iterator[DictConfig]:
    overrides = [word for word in words(command) if not word.startswith("-")]
    for job in jobs(overrides):
        sweeper = composed(*job, hydra=True).hydra.sweeper
        for grid in sweeper.get("grids") or [sweeper.get("params") or {}]:
            for more in jobs(f"{key}={value}" for key, value in grid.items()):
                yield composed(*job, *more)


# The models of the panel have to be trained first: tests/harness/sweeps/test_panel.py composes its cells.
@pytest.mark.parametrize("command", [c for c in all_commands("winnow ") if c not in PATTERNS and "=panel" not in c])
def test_the_overrides_of_a_command_compose(command: str):
    for config in configurations(command):
        if not (config.suite.name == "none" and config.dry_run):
            assert OmegaConf.missing_keys(config) == set()
        if config.model.path == "DIR":
            config.model.path = model_path("model")
        if "/reference/model" in config.model.path:
            config.suite.tasks = {}  # whose data may be on the hub
            text, refusal = report(config)
            assert "no weight was read" in text and not refusal


@pytest.mark.parametrize("page", READMES, ids=page_name)
def test_options_and_settings_that_are_named_exist(page: Path):
    named = {word for span in spans(page.read_text()) if not COMMAND.match(span) for word in span.split()}
    settings = {word for word in named if re.fullmatch(r"\+?[\w.@/]+=\S+", word)}
    assert {word for word in settings if not is_known(word)} == set()


def is_known(word: str) -> bool:
    key, _, value = word.lstrip("+").partition("=")
    group = key.partition(".")[0]
    if key in groups():
        return bool(PLACEHOLDER.search(value)) or set(value.split(",")) <= set(groups()[key])
    if group in groups():
        return any(has(config, key, word.startswith("+")) for config in with_each(group))
    return bool(PLACEHOLDER.fullmatch(key)) or has(composed("launcher=joblib", hydra=True), key)


def has(config: Any, key: str, added: bool = False) -> bool:
    """Whether there is such a setting, or a place for it where it is ``added``."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.get(parent) if OmegaConf.is_dict(config) else None
    return OmegaConf.is_dict(config) and (added or last in set(config))


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", all_commands("python -m "))
def test_modules_exist_and_know_the_options(command: str):
    module = command.split()[2]
    found = find_spec(module)
    if found is not None and found.submodule_search_locations:  # a package is run by its own main module
        found = find_spec(f"{module}.__main__")
    assert found is not None and found.origin is not None
    source = Path(found.origin).read_text()
    assert '__name__ == "__main__"' in source
    # lm-eval's own command line reads the options behind it, and the recipe names its own after its fields.
    if module not in ("harness.backends.lm_eval", "harness.reference.train"):
        assert [word for word in words(command) if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.parametrize("command", all_commands("make "))
def test_targets_exist(command: str):
    (target, *variables), text = words(command), (ROOT / "Makefile").read_text()
    assert re.search(rf"(?m)^{target}:", text)
    assert all(re.search(rf"(?m)^{name.partition('=')[0]} [?:]?=", text) for name in variables)


@pytest.mark.parametrize("command", all_commands("winnow-data stage"))
def test_what_is_staged_has_a_config(command: str):
    from harness.data.stage import SOURCES

    _, *rest = words(command)
    known = {"--suite": groups()["suite"], "--calibration": groups()["calibration"], "--from": SOURCES, "--to": ["DIR"]}
    assert all(value in known[option] for option, value in zip(rest[::2], rest[1::2], strict=True))


def run(command: str, places: Mapping[str, str], *more: str) -> str:
    program, *rest = command.split()
    for placeholder, place in places.items():
        rest = [re.sub(rf"\b{re.escape(placeholder)}(?![\w.])", place, word) for word in rest]
    done = subprocess.run(
        [str(BIN / program), *rest, *more], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command: str, tmp_path: Path):
    folder = tmp_path / "smollm2"
    shutil.copytree(ROOT / "results" / "smollm2", folder)
    elsewhere = ["--output", str(tmp_path / "claims")] if "claims" in command else []
    assert RUN[command] in run(command, {"DIR": str(folder)}, *elsewhere)
    if "migrate" in command:
        assert "0 of 4 records" in run(command, {"DIR": str(folder)})


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_SLOWLY)
def test_cells_run(command: str, tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "def add(a, b):\\n    return a + b"}\n' * 20)
    places = {"DIR": model_path("model"), "FILE.jsonl": str(corpus), "OUT": str(tmp_path / "out")}
    few = [] if "suite=none" in command else ["suite.items=4", f"output_dir={tmp_path / 'out'}"]
    run(command, places, *few, "progress=false")
    swept = len(list(product(*(word.split(",") for word in words(command) if "=" in word))))
    assert len(list((tmp_path / "out" / "records").glob("*.json"))) == swept


# --- examples and numbers ---------------------------------------------------------------------------------------------


def module_of(source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    exec(source, module.__dict__)
    return module


def test_the_example_criterion_works(monkeypatch: pytest.MonkeyPatch):
    source, _ = blocks((ROOT / "methods" / "README.md").read_text(), "python")
    (settings,) = blocks((ROOT / "methods" / "README.md").read_text(), "yaml")
    monkeypatch.setattr(criteria, "FROM_STATISTICS", dict(criteria.FROM_STATISTICS))
    exec(source, dict(vars(criteria)))
    monkeypatch.setattr(criteria, "CRITERIA", tuple(criteria.FROM_STATISTICS))
    case = made_up_case(0)
    decision = instantiate(OmegaConf.create(settings)).decide(case.statistics, "0.5", 0)
    for layer, raw in case.raw.items():
        means = [sum(gate for _, gate in raw.routed(j)) / len(raw.routed(j)) for j in range(case.num_experts)]
        assert decision.saliency is not None
        assert decision.saliency[layer] == pytest.approx(means, rel=1e-12)


def test_the_example_method_works(monkeypatch: pytest.MonkeyPatch):
    _, source = blocks((ROOT / "methods" / "README.md").read_text(), "python")
    method = module_of(source, monkeypatch).LeastUsed()
    statistics = made_up_case(0).statistics
    ratio = method.check(statistics.shape, "0.5")
    assert method.decide(statistics, ratio, 0).plan == ExpertPruning("f", "frequency").decide(statistics, ratio, 0).plan


def test_the_example_task_works(monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / "tasks" / "README.md").read_text()
    (source,), (suite,) = blocks(text, "python"), blocks(text, "yaml")
    module_of(source, monkeypatch)
    task = instantiate(OmegaConf.create(suite).tasks.riddles)
    result = task.run(ScriptedBackend(write=lambda prompt: " a piano"))
    assert [(score.metric, score.value, score.n) for score in result.scores] == [("exact_match", 0.5, 2)]
    assert len(result.samples) == 2


@pytest.mark.parametrize("name", ["reference", "channels_vs_experts"])
def test_tables_of_results_are_those_of_the_reports(name: str):
    """Column by column, as ``winnow-report`` has written them for the mixed corpus."""
    text = (ROOT / "results" / "README.md").read_text()
    ours = text.split(f"`winnow -m +experiment={name}`:")[1].split("\n## ")[0]
    theirs = (ROOT / "results" / name / "report" / "report.md").read_text().split("## Calibrated on mixed")[1]
    shown, written = table_of(ours), table_of(theirs)
    assert len(shown) > 10
    for row, cells in shown.items():
        assert {head: written[row][head] for head in cells} == cells


def table_of(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The first table: (ratio, method) -> head -> cell."""
    lines = text[text.index("\n| ratio | method |") + 1 :].split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}


def test_claims_of_results_are_those_of_the_report():
    """Every claim that was tested, once for each model, with its corpus rule and the beginning of what was seen."""
    ours = (ROOT / "results" / "README.md").read_text().split("## Claims")[1].split("\n## ")[0]
    theirs = (ROOT / "results" / "claims" / "report" / "claims.md").read_text()
    rows = [cells for _, head, cells in tables(ours) if head == "claim"]
    written = [line for line in theirs.split("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == sum("| not tested |" not in line for line in written) > 80
    for said, verdict, corpus, _, seen in rows:
        says, _, model = said.rstrip("]").partition(" [")
        found = [line for line in written if line.startswith(f"| {says} (") and f"[model {model}" in line]
        (line,) = [line for line in found if model or "[model reference," in line]
        assert f"| {verdict} | {corpus} |" in line and all(part in line for part in seen.split("; "))
