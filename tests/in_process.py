"""Cells without processes of their own, for tests that put something in the place of what computes."""

from typing import Any

import pytest

from harness import cli
from harness.cells import diagnostics, evaluate, run


def everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(what: str, function: Any, *args: Any, **options: Any) -> Any:
        return function(*args, **options)

    for module in (run, evaluate, diagnostics):
        monkeypatch.setattr(module, "apart", here)
    monkeypatch.setattr(cli, "warm_up", lambda: None)
