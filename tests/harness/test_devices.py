"""One process at a time computes on a device."""

import logging
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from harness.backends import hf
from harness.devices import alone_on
from tests.tiny import save_tiny


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a,1")
    return tmp_path


def held(locks: Path) -> set[str]:
    return {path.name.removesuffix(".lock").rpartition("-")[2] for path in locks.glob("winnow-device-*")}


@pytest.mark.parametrize(
    "device, names",
    [
        ("cpu", set()), ("cuda", {"3"}), ("cuda:2", {"1"}), (0, {"3"}), ("auto", {"3", "5a", "1"}), ("mps", {"mps"}),
        ("balanced", {"3", "5a", "1"}), ({"model": 2, "lm_head": "cpu", "x": "disk"}, {"1"}), ("cuda:7", {"7"}),
    ],
)  # fmt: skip
def test_which_devices_a_setting_names(device: object, names: set[str], locks: Path) -> None:
    with alone_on(device):
        assert held(locks) == names


def test_all_devices_where_nothing_is_hidden(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with alone_on("auto"):
        assert held(locks) == {"0", "1"}


@pytest.mark.parametrize("other, waits", [("cuda:0", True), ("auto", True), ("cuda:1", False), ("cpu", False)])
def test_a_second_one_waits_for_the_same_device_alone(
    other: str, waits: bool, locks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered, through = threading.Event(), threading.Event()

    def second() -> None:
        with alone_on(other):
            entered.set()
        through.set()

    with caplog.at_level(logging.WARNING), alone_on("cuda:0"):
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(1.0) is not waits
    assert through.wait(10)
    thread.join()
    assert any("waiting for the device 3" in message for message in caplog.messages) is waits


def test_the_transformers_backend_holds_its_device_until_it_is_closed(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(locks / "model", "olmoe")
    load = hf.load_model
    monkeypatch.setattr(hf, "load_model", lambda folder, dtype, device: load(folder, dtype, "cpu"))
    backend = hf.open_checkpoint(str(locks / "model"), "float32", "cuda:1", 4, None)
    lock = FileLock(next(locks.glob("winnow-device-*-5a.lock")))
    with pytest.raises(Timeout):
        lock.acquire(timeout=0)
    backend.close()
    lock.acquire(timeout=0)
    lock.release()
    monkeypatch.setattr(hf, "load_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf.open_checkpoint(str(locks / "model"), "float32", "cuda:1", 4, None)
    lock.acquire(timeout=0)
    lock.release()
