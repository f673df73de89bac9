"""``python -m tests.attack``: what the README says of reliability, measured again.

Takes some minutes. ``--kills N`` sets how often a sweep is killed (30).
"""

import argparse
import logging
import sys
import tempfile
from itertools import permutations
from pathlib import Path

import datasets
from transformers.utils.logging import disable_progress_bar

from harness.cells.publish import publish
from harness.errors import WinnowError
from tests.attack import changes, hostile_programs, kills, malformed


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.attack", description="Attacks winnow and prints what held.")
    parser.add_argument("--kills", type=int, default=30, help="how often a sweep is killed at a random moment (30)")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    disable_progress_bar()
    held = True

    def tell(what: str, right: int, of: int, note: str = "") -> None:
        nonlocal held
        held &= right == of
        print(f"{right:4} of {of:4}  {what}{note}", flush=True)

    with tempfile.TemporaryDirectory(prefix="winnow-attack-") as name:
        folder = Path(name)
        for part in ("changes", "kills", "malformed", "folders"):
            (folder / part).mkdir()
        noticed = changes.noticed(folder / "changes")
        missed = [what for what, seen in noticed.items() if not seen]
        tell("changes of what a cell is made from were noticed", sum(noticed.values()), len(noticed), _list(missed))
        kept = [_one_folder(folder / "folders" / str(i), order) for i, order in enumerate(permutations("abc", 2))]
        tell("orders of two cells in one folder kept the first one's files whole", sum(kept), len(kept))
        programs = hostile_programs.results()
        escaped = [what for what, right in programs if not right]
        tell("hostile programs came to what they must", len(programs) - len(escaped), len(programs), _list(escaped))
        tell("malformed inputs gave one clear line", *malformed.count(folder / "malformed"))
        same = kills.killed(folder / "kills", options.kills)
        tell("kills of a sweep at work left the records of an undisturbed one", options.kills * same, options.kills)
    return 0 if held else 1


def _one_folder(root: Path, order: tuple[str, ...]) -> bool:
    """Whether the second of two cells is refused, and the first one's files stay."""
    for cell in order:
        folder = root / "cells" / cell
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(cell)
    one, other = order
    publish(root / "cells" / one, root, one)
    try:
        publish(root / "cells" / other, root, other)
    except WinnowError:
        return (root / "plan.json").read_text() == one
    return False


def _list(names: list[str]) -> str:
    return f"; not: {', '.join(names)}" if names else ""


if __name__ == "__main__":
    sys.exit(main())
