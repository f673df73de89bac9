"""The files of a single cell in the output folder itself, where a person looks for them: all of them or none.

Every cell works in a folder of its own. A single run with an ``output_dir`` of its own then puts plan, saliency and
checkpoint beside the records, under a note that says whose they are. Another cell's are never replaced.
"""

import json
import shutil
from pathlib import Path

from harness.claims import claimed
from harness.contracts.plan_files import ARRAYS, PLAN
from harness.errors import WinnowError
from harness.files import write_files

NOTE, CHECKPOINT, COPIED = "cell.json", "checkpoint", (PLAN, ARRAYS, "saliency.json")


def check_free(root: Path, cell: str) -> None:
    """Raises WinnowError where the files in ``root`` are another cell's."""
    found = [name for name in (*COPIED, CHECKPOINT) if (root / name).exists()]
    owner = _owner(root)
    if owner != cell and (owner is not None or found):
        whose = f"of the cell {owner}" if owner else "of another run"
        names = ", ".join([*found, *([NOTE] if owner else [])])
        raise WinnowError(f"{root} holds the files {whose}: choose another output_dir, or delete {names} there")


def publish(folder: Path, root: Path, cell: str) -> None:
    """Puts what the cell left in ``folder`` into ``root``. Raises WinnowError as ``check_free`` does."""
    with claimed(root / ".claims" / "publish.claim", f"the files of {root}"):
        check_free(root, cell)
        files = {root / name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()}
        if (folder / CHECKPOINT).is_dir():
            shutil.rmtree(root / CHECKPOINT, ignore_errors=True)  # our own, of a run before
            (folder / CHECKPOINT).rename(root / CHECKPOINT)
        write_files({root / NOTE: (json.dumps({"cell": cell}) + "\n").encode()} | files)


def _owner(root: Path) -> str | None:
    """The cell whose files are in ``root``; None where no note says so."""
    try:
        return str(json.loads((root / NOTE).read_text(encoding="utf-8"))["cell"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
