from pathlib import Path

import pytest

from reports.numbers.load import Panel, load_panels
from reports.numbers.measures import Results, evaluate
from tests.reports.synthetic import write_sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> Path:
    """One corpus, with samples."""
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder)
    return folder


@pytest.fixture(scope="session")
def panel(sweep) -> Panel:
    (found,) = load_panels(sweep)
    return found


@pytest.fixture(scope="session")
def results(panel) -> Results:
    return evaluate(panel)


@pytest.fixture(scope="session")
def corpora_results(tmp_path_factory) -> Results:
    """Three corpora, without samples."""
    folder = tmp_path_factory.mktemp("corpora")
    write_sweep(folder, ("mixed", "code", "math"), samples=False)
    (found,) = load_panels(folder)
    return evaluate(found)
