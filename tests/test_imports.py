"""The picture of the house (``.importlinter``) is held by a linter; each of its rules is seen red here."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("harness", "methods", "tasks", "reports")
# Rule -> a file that would break it, and the import that it gets.
BROKEN = {
    "contracts": ("harness/contracts/plan.py", "import harness.files"),
    "methods": ("methods/none.py", "import harness.checkpoints.layout"),
    "tasks": ("tasks/made/code.py", "import harness.records.store"),
    "reports": ("reports/numbers/load.py", "import torch"),
    "harness": ("harness/families/table.py", "import harness.checkpoints.layout"),
    "wings": ("harness/calibration/collect.py", "import methods.budget"),
    "cycles": ("methods/checks.py", "import methods.coverage"),
}


def lint(folder: Path) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    return done.returncode, " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("model*", "__pycache__"))
    shutil.copy(ROOT / ".importlinter", folder)
    return folder


def test_every_rule_has_its_case():
    rules = configparser.ConfigParser()
    rules.read(ROOT / ".importlinter")
    assert {name.rpartition(":")[2] for name in rules.sections() if ":" in name} == set(BROKEN)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_is_seen_red(rule: str, copy: Path):
    rules = configparser.ConfigParser()
    rules.read(ROOT / ".importlinter")
    name = rules[f"importlinter:contract:{rule}"]["name"].replace("\n", " ")
    file, statement = BROKEN[rule]
    path = copy / file
    before = path.read_text()
    path.write_text(f"{before}\n{statement}\n")
    try:
        status, told = lint(copy)
    finally:
        path.write_text(before)
    assert status == 1
    assert f"{name} BROKEN" in told
