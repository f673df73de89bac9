import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.calibration import cache as calibration_cache
from harness.calibration.cache import cached_statistics
from harness.calibration.collected import Collected
from harness.errors import WinnowError

KEY = {"model": "m", "corpus": "c"}


def collected(names):
    """A result that can be told by its names: layer 3 holds its number, layer 5 minus that."""
    layers = {
        layer: {name: np.full(2, sign * (1.0 + index)) for index, name in enumerate(sorted(names | {"frequency"}))}
        for layer, sign in ((3, 1), (5, -1))
    }
    return Collected(2, 1, 1, 4, 99, 0.5, layers, {"code": {"3": [1, 2], "5": [3, 0]}})


class Counting:
    def __init__(self):
        self.calls = []

    def __call__(self, names):
        self.calls.append(names)
        return collected(names)


def same(a, b):
    plain_a, plain_b = (dataclasses.replace(c, layers={}) for c in (a, b))
    assert plain_a == plain_b
    assert a.layers.keys() == b.layers.keys()
    for layer in a.layers:
        assert a.layers[layer].keys() == b.layers[layer].keys()
        for name in a.layers[layer]:
            np.testing.assert_array_equal(a.layers[layer][name], b.layers[layer][name])


def entry(cache_dir):
    (folder,) = [path for path in cache_dir.iterdir() if path.is_dir()]
    return folder


def test_second_call_and_subset_reuse_the_first(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    compute = Counting()
    first = cached_statistics(tmp_path, KEY, frozenset({"ean_sum", "gate_sum"}), compute)
    second = cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    assert compute.calls == [{"ean_sum", "gate_sum"}]
    same(first, second)
    assert "reusing calibration statistics" in caplog.text
    manifest = json.loads((entry(tmp_path) / "manifest.json").read_text())
    assert manifest["key"] == KEY
    assert manifest["tokens"] == 99
    assert manifest["usage"] == {"code": {"3": [1, 2], "5": [3, 0]}}
    assert manifest["statistics"] == ["ean_sum", "frequency", "gate_sum"]


def test_missing_names_are_computed_together_with_the_old_ones(tmp_path):
    compute = Counting()
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    cached_statistics(tmp_path, KEY, frozenset({"gate_sum"}), compute)
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    assert compute.calls == [{"ean_sum"}, {"ean_sum", "gate_sum", "frequency"}]


def test_another_key_is_another_entry(tmp_path):
    compute = Counting()
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    cached_statistics(tmp_path, {**KEY, "corpus": "d"}, frozenset({"ean_sum"}), compute)
    assert len(compute.calls) == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "statistics.npz"),
        lambda folder: truncate(folder / "manifest.json"),
        lambda folder: (folder / "statistics.npz").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
)
def test_a_damaged_entry_is_computed_anew_with_a_warning(tmp_path, caplog, damage):
    compute = Counting()
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    damage(entry(tmp_path))
    again = cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    assert len(compute.calls) == 2
    assert "is damaged" in caplog.text
    same(again, cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute))
    assert len(compute.calls) == 2


@pytest.mark.parametrize("place", range(0, 600, 10))
def test_no_flipped_byte_of_the_manifest_is_used_in_silence(tmp_path, caplog, place):
    compute = Counting()
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    manifest = entry(tmp_path) / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[place % len(content)] ^= 1
    manifest.write_bytes(bytes(content))
    again = cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    assert len(compute.calls) == 2 and "is damaged" in caplog.text
    same(again, cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute))


def test_what_killed_writers_of_any_host_left_is_swept(tmp_path):
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), Counting())
    left = entry(tmp_path) / ".statistics.abc123.tmp"
    left.write_bytes(b"half")
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), Counting())
    assert not left.exists()


def test_a_failed_pass_leaves_nothing_and_frees_the_lock(tmp_path):
    def fail(names):
        raise WinnowError("no")

    with pytest.raises(WinnowError, match="no"):
        cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), fail)
    assert not list(tmp_path.rglob("*"))
    compute = Counting()
    cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), compute)
    assert len(compute.calls) == 1


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(WinnowError, match="no space left to write in"):
        cached_statistics(tmp_path, KEY, frozenset({"ean_sum"}), Counting())
    assert list(entry(tmp_path).iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WinnowError, match="cannot write in"):
        cached_statistics(tmp_path / "file", KEY, frozenset({"ean_sum"}), Counting())


WORKER = """
import logging, sys, time
from pathlib import Path
from harness.calibration.cache import cached_statistics
from tests.harness.calibration.test_calibration_cache import KEY, collected
logging.basicConfig(level=logging.INFO)
folder = Path(sys.argv[1])
(folder / f"ready{sys.argv[2]}").touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.01)
def compute(names):
    with (folder / "passes").open("a") as file:
        file.write("pass\\n")
    time.sleep(0.5)
    return collected(names)
print(cached_statistics(folder / "cache", KEY, frozenset({"ean_sum"}), compute).tokens)
"""


def test_two_processes_share_one_pass(tmp_path):
    root = Path(calibration_cache.__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(number)],
            cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    ends = [worker.communicate(timeout=60) for worker in workers]
    assert [out.strip() for out, _ in ends] == ["99", "99"], ends
    assert (tmp_path / "passes").read_text() == "pass\n"
    logs = "".join(err for _, err in ends)
    assert logs.count("calibration statistics") and logs.count("waiting for it") == 1
    assert logs.count("reusing calibration statistics") == 1
