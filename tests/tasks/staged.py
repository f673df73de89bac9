"""A folder of staged data that a test fills itself, in the form of ``winnow-data stage``."""

import hashlib
import json
from pathlib import Path

from harness.data.schema import Row
from harness.data.sets import packed_rows


def stage(root: Path, name: str, rows: list[Row]) -> str:
    """Writes the data set ``name`` under ``root`` and gives back ``root`` as text."""
    folder = root / name
    folder.mkdir(parents=True)
    packed = packed_rows(rows)
    (folder / "data.jsonl.gz").write_bytes(packed)
    manifest = {"name": name, "source": "a test", "sha256": hashlib.sha256(packed).hexdigest(), "rows": len(rows)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(root)
