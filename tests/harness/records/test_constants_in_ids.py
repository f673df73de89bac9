"""``constants`` of a method: another cell where it is on, and no other where it is off or older than the setting."""

from harness.contracts.record import Record
from harness.records.identity import identified

CELL = {
    "model": "m", "method": "reap", "ratio": 0.5, "calibration": "code", "seed": 0, "suite": "none", "backend": "hf",
}  # fmt: skip


def cell(leaves: str | None = None, **method: object) -> dict:
    config = {
        "model": {"dtype": "float32"}, "suite": {}, "backend": {"open": {}}, "layout": "compact",
        "method": {"name": "reap", **method},
    }  # fmt: skip
    said = CELL if leaves is None else CELL | {"leaves": leaves}
    return identified(said, config, {}, "1", {}, {})[0]


def test_only_what_is_on_changes_the_id_and_the_name() -> None:
    before = cell()
    assert cell(constants=False) == cell(constants=None) == before
    on, weighted = cell("constants", constants=True), cell("constants-gate_squared", constants="gate_squared")
    assert len({before["id"], on["id"], weighted["id"]}) == 3
    assert "__s0__constants-" in on["id"]
    record = Record(on, {}, {}, {}, [], {}, {})
    assert record.stages() == ["constants"] and not record.is_uncompressed()
