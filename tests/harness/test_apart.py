"""Processes of their own: what goes in and comes out, how they end, and that nothing of them is left."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from harness import progress
from harness.apart import apart
from harness.errors import BrokenModel, WinnowError


def surroundings() -> dict[str, object]:
    return {
        "process": os.getpid(), "folder": os.getcwd(), "variable": os.environ.get("OF_THIS_TEST"),
        "threads": torch.get_num_threads(), "shown": progress.shown(), "level": logging.root.level,
        "main": sys.modules["__main__"].__file__ if hasattr(sys.modules["__main__"], "__file__") else None,
    }  # fmt: skip


def test_it_has_the_surroundings_of_the_process_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THIS_TEST", "set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    with progress.showing(False):
        there, here = apart("a test", surroundings), surroundings()
    assert there.pop("process") != here.pop("process")
    assert there.pop("main") is None or multiprocessing.get_start_method() == "spawn"
    here.pop("main")
    assert there == here and there["variable"] == "set" and there["shown"] is False
    monkeypatch.delenv("OF_THIS_TEST")
    assert apart("a test", surroundings)["variable"] is None


def double(tensor: torch.Tensor, plus: int = 0) -> torch.Tensor:
    return 2 * tensor + plus


def test_arguments_go_in_and_a_result_comes_out() -> None:
    assert apart("a test", double, torch.arange(3), plus=1).tolist() == [1, 3, 5]


def complaining() -> None:
    logging.getLogger("harness.somewhere").warning("seen %d times", 3)
    logging.getLogger("harness.somewhere").debug("nobody asked")


def test_its_log_is_that_of_the_process_that_asks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        apart("a test", complaining)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("harness.somewhere", "seen 3 times")]


class Unsendable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def failing(how: str) -> None:
    raise {
        "ours": BrokenModel("NaN in layer 3"),
        "plain": ZeroDivisionError("by zero"),
        "unsendable": Unsendable("two", "words"),
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore"),
    }[how]


def test_its_errors_are_raised_here() -> None:
    with pytest.raises(BrokenModel, match="NaN in layer 3"):
        apart("a test", failing, "ours")
    with pytest.raises(ZeroDivisionError) as caught:
        apart("a test", failing, "plain")
    assert "in failing" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="Unsendable: two words"):
        apart("a test", failing, "unsendable")


def test_a_device_without_memory_says_what_to_do() -> None:
    with pytest.raises(WinnowError, match="calibrating: .*Tried to allocate 20.00 GiB.*calibration.stream") as caught:
        apart("calibrating", failing, "memory")
    assert "\n" not in str(caught.value)


def ending(signal_number: int) -> None:
    os.kill(os.getpid(), signal_number)
    time.sleep(60)


@pytest.mark.parametrize("number, said", [(signal.SIGKILL, "killed, as the system does"), (signal.SIGTERM, "ended")])
def test_the_death_of_the_process_is_an_error_here(number: int, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(WinnowError, match=f"calibrating: .*{said}"):
        apart("calibrating", ending, number)
    assert time.monotonic() - started < 20


def writing_its_id(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(600)


def _until(found: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


CALLER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have programs in the background ignore it
from pathlib import Path
from harness.apart import apart
from tests.harness.test_apart import writing_its_id
apart("sleeping", writing_its_id, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_the_process_that_asks(number: int, tmp_path: Path) -> None:
    file = tmp_path / "process"
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(file)], stderr=subprocess.DEVNULL)
    _until(lambda: file.exists() and file.read_text())
    child = psutil.Process(int(file.read_text()))
    caller.send_signal(number)
    caller.wait(30)
    _until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30)


HELD = []


def taking() -> tuple[int, int]:
    HELD.append(torch.ones(2**28))  # 1 GiB, which nobody gives back
    return os.getpid(), psutil.Process().memory_info().rss


def test_its_memory_is_gone() -> None:
    before = psutil.Process().memory_info().rss
    process, size = apart("a test", taking)
    assert size > 2**30 and not HELD
    assert psutil.Process().memory_info().rss - before < 2**26
    children = psutil.Process().children(recursive=True)
    assert process not in {child.pid for child in children}
    assert all(child.memory_info().rss < 2**30 for child in children)


# A script without a guard: multiprocessing would run it once more in every process that it starts.
SCRIPT = """
import torch
from harness.apart import apart
print(apart("a test", torch.add, torch.ones(1), 1).item())
"""


def test_a_script_is_not_run_again_in_the_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    told = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert told.stdout == "2.0\n", told.stderr


# A process forked after the driver was started cannot use a GPU.
ASKING = """
import importlib, torch
def asked(*_): raise SystemExit("the driver of the GPUs was started")
torch._C._cuda_init = asked
if hasattr(torch._C, "_cuda_getDeviceCount"): torch._C._cuda_getDeviceCount = asked
from harness import apart
for name in apart._PRELOADED: importlib.import_module(name)
assert not torch.cuda.is_initialized()
print("fine")
"""


def test_what_is_preloaded_starts_no_driver() -> None:
    told = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, timeout=300)
    assert told.stdout == "fine\n", told.stderr[-2000:]
