"""Every change of what a cell is made from is noticed."""

from pathlib import Path

from tests.attack.changes import CODE, CONTENT, noticed


def test_every_change_is_noticed(tmp_path: Path):
    found = noticed(tmp_path)
    assert len(found) == len(CONTENT) + len(CODE) >= 20
    assert not [name for name, seen in found.items() if not seen]
