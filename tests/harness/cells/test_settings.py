"""What settings may be: known in one place, checked before anything is loaded, explained by --help."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import conf
from harness import cli
from harness.cells.check import check_settings, make
from harness.cells.settings import Settings, meaning, meanings
from harness.contracts.method import Decision, Method
from harness.contracts.task import Task
from harness.data.rows import Document
from harness.errors import WinnowError
from tests.attack.malformed import CORPORA, MODELS, SETTINGS, Malformed, run

CONF = Path(conf.__file__).parent
GROUPS = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(CONF.glob("*/*.yaml"))
    if not path.stem.startswith(("_", "panel_")) and path.parent.name not in ("experiment", "launcher")
]
MUST = ("model.path=x", "calibration.path=x", "judge.base_url=http://h/v1", "judge.model=m", "data.root=x")


def plain(overrides: Sequence[str]) -> Any:
    assert cli.run  # whose module registers the resolvers
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)


@pytest.mark.parametrize("option", GROUPS)
def test_every_option_of_ours_is_allowed(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = option.partition("=")[0]
    more = [word for word in MUST if word.startswith(f"{group}.") and (group != "judge" or option == "judge=openai")]
    if option not in ("model=local", "calibration=local"):
        more = [word for word in more if not word.endswith("=x")]
    check_settings(plain([option, *more]))


class OwnMethod:
    """A method of a user's: it has settings that nobody else knows."""

    name, version, requires, uses_seed = "own", "1", frozenset[str](), False

    def __init__(self, strength: str, parts: Any = None) -> None:
        self.strength = strength

    def check(self, shape: Any, ratio: Any) -> Any: ...

    def decide(self, statistics: Any, ratio: Any, seed: int) -> Decision: ...


class OwnTask(Task):
    name, domain, kind, version = "own", "code", "probe", 1

    def __init__(self, items: str) -> None:
        self.items = items


def own_corpus(parts: str, **more: Any) -> list[Document]:
    return [Document(parts)]


def test_what_users_bring_goes_through() -> None:
    here = OwnMethod.__module__
    found = plain(
        [
            "+calibration.mine={a: 1}", "+colour=red", "+suite.favourite=[1,2]", "+model.note=abc",
            f"+suite.tasks.own={{_target_: {here}.OwnTask, items: all of them}}",
            "calibration=mixture", "calibration.parts=anything", f"calibration.corpus._target_={here}.own_corpus",
        ]
    )  # fmt: skip
    found["method"] = {"_target_": f"{here}.OwnMethod", "strength": "great", "parts": "odd"}
    check_settings(found)
    assert make(found["method"], "method", Method).strength == "great"
    assert make(found["suite"]["tasks"]["own"], "suite.tasks.own", Task).items == "all of them"


def test_nothing_is_changed() -> None:
    before, after = plain([]), plain([])
    check_settings(after)
    assert before == after


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(WinnowError) as told:
        check_settings(plain(["seed=abc", "model.dtype=foo", "layout=tight"]))
    assert all(word in str(told.value) for word in ("seed=abc", "model.dtype=foo", "layout=tight"))
    assert meaning("seed") in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("node", "kind", "says"),
    [
        ({"_target_": "builtins.dict"}, Method, "is no method, for it has no check, decide"),
        ({"_target_": "builtins.dict"}, Document, "is no Document"),
        ({"name": "x"}, Method, "has no _target_"),
        ({"_target_": "methods.schedule.Schedule", "name": "x", "rounds": 0}, Method, "schedule.rounds"),
        ({"_target_": "builtins.int", "x": 1}, Method, "does not take these settings"),
    ],
)
def test_what_is_made_must_be_of_its_kind(node: Any, kind: Any, says: str) -> None:
    with pytest.raises(WinnowError, match=says):
        make(node, "method", kind)


# --- meanings ---------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_meaning() -> None:
    told = {name for name, _ in meanings()}
    for key, value in plain([]).items():
        assert key in Settings.__annotations__ or key == "launcher", key
        assert isinstance(value, dict | None) or key in told or key == "launcher", key
    assert meaning("backend.hf.open.batch_size") == meaning("backend.open.batch_size") != ""
    assert meaning("suite.tasks.gsm8k.items") == meaning("suite.tasks.TASK.items") != ""


def test_help_prints_them_and_loads_no_framework() -> None:
    program = "import sys; sys.argv = ['winnow', '--help']; from harness import cli; cli.main()"
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", f"{program.split(';')[0]}; {check}; {program}"], capture_output=True, text=True
    )
    assert found.returncode == 0 and found.stdout.rstrip().endswith("False")
    words = " ".join(found.stdout.split())
    for name, told in meanings():
        assert f"{name} {' '.join(told.replace('`', '').split())}" in words


def test_the_table_of_the_readme_says_the_same() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| [^|]+ \| (.+) \|$", (CONF / "README.md").read_text(), re.MULTILINE)
    said = {name: re.sub(r" \(\[[^)]*\)\)", "", text) for name, text in rows}
    own = {*plain([]), "data.root"}
    top = {name: told for name, told in meanings() if name in own}
    assert {name: said[name] for name in top} == top


# --- the command ------------------------------------------------------------------------------------------------------

OF_EACH_KIND = (
    "seed=abc",
    "seed=1.5",
    "suite=reference suite.items=abc",
    "model.dtype=foo",
    "model.device=cuda",
    "output_dir=null",
    "calibration=code calibration.parts.code=-5",
    "method._target_=no.such.code",
    "method._target_=builtins.dict",
    "suite=reference suite.tasks.code._target_=builtins.dict",
    "suite=quick data.root=/nosuch",
    "model=null",
    "+method.colour=red",
    "ratio=1",
    "-m output_dir=null",
    "-m hydra/sweeper=grids hydra.sweeper.grids=3",
)
FOLDERS = (
    "config.json is a list", "config.json is null", "config.json is not UTF-8", "top-k is 0", "unknown rope type",
    "vocabulary too small", "weights cannot be read", "template raises", "unknown activation", "text is a number",
)  # fmt: skip


def test_there_are_a_hundred_and_each_is_there_once() -> None:
    names = [one.name for one in [*SETTINGS, *MODELS, *CORPORA]]
    assert len(names) == len(set(names)) >= 100


@pytest.mark.parametrize(
    "one",
    [one for one in [*SETTINGS, *MODELS, *CORPORA] if one.name in (*OF_EACH_KIND, *FOLDERS)],
    ids=lambda one: one.name,
)
def test_a_malformed_input_gets_one_clear_line(one: Malformed, tmp_path: Path) -> None:
    ending = run(one, tmp_path)
    assert ending.is_clear(one), ending


def test_a_dry_run_checks_the_same(tmp_path: Path) -> None:
    one = Malformed("dry", ("seed=abc",), ("dry_run=true", "seed=abc"))
    assert run(one, tmp_path).is_clear(one)
