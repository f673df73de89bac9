"""What the sandbox leaves in the folder of temporary files, and who sweeps it."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.sandbox import nursery
from tasks.sandbox.nursery import remove, sweep
from tasks.sandbox.run import Limits, run_function
from tests.tasks.sandbox.test_sandbox_layers import OFF

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
IN_FOLDERS = "\n".join(OFF[layer] for layer in ("own_root", "namespaces"))
DEEP = """
import os
def f(x):
    os.umask(0o477)
    for _ in range(x):
        os.mkdir('dd')
        os.chdir('dd')
    return x
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files of a sandbox that has no root of its own."""
    before, last = nursery.BOOT.split("child.start(")
    monkeypatch.setattr(nursery, "BOOT", f"{before}{IN_FOLDERS}\nchild.start({last}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    nursery._nurseries.clear()
    yield tmp_path
    nursery._nurseries.clear()


def named(folder: Path, process: int, host: str = "") -> Path:
    made = folder / f"{host or nursery._prefix()}{process}-abc_1234"
    (made / "work").mkdir(parents=True)
    (made / "work" / "file").write_text("x")
    return made


def gone_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_program_of_many_folders_leaves_none(temporary: Path) -> None:
    outcome = run_function(DEEP, "f", [[990]], Limits(cpu_seconds=5))
    assert outcome.outputs == [990] and list(temporary.iterdir()) == []


def test_folders_that_their_owner_cannot_read_are_removed() -> None:
    """By a user who is not root, whom modes do bind."""
    above = Path(tempfile.mkdtemp())
    folder, precious = above / "base", above / "precious"
    folder.mkdir()
    precious.mkdir()
    (precious / "file").write_text("x")
    if os.getuid() == 0:
        for path in (above, folder, precious):
            os.chown(path, 65534, 65534)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            os.chdir(folder)
            os.umask(0o477)
            os.symlink(precious, "link")
            for _ in range(990):
                os.mkdir("d" * 200)
                os.chdir("d" * 200)
                os.close(os.open("file", os.O_CREAT | os.O_WRONLY))
            os.chdir(above)
            remove(str(folder))
            code = 2 if folder.exists() else 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (precious / "file").read_text() == "x", "links are not followed"
    remove(str(above))
    assert not above.exists()


def test_left_overs_are_swept_when_their_process_is_gone(temporary: Path) -> None:
    dead, gone = named(temporary, gone_process()), gone_process()
    alive = named(temporary, os.getpid())
    elsewhere = named(temporary, gone, "winnow-sandbox-another.host-")
    held = named(temporary, gone)
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    old, new = temporary / "winnow-sandbox-abc_1234", temporary / "winnow-sandbox-abc_5678"
    for nameless in (old, new):
        (nameless / "work").mkdir(parents=True)
    os.utime(old, (0, 0))
    (temporary / "winnow-sandbox-link_123").symlink_to(alive)
    mine = temporary / "winnow-sandbox"
    mine.mkdir()
    sweep()
    assert not dead.exists() and not old.exists()
    for kept in (alive, elsewhere, held):
        assert (kept / "work" / "file").read_text() == "x"
    assert new.exists() and mine.exists() and (temporary / "winnow-sandbox-link_123").exists()
    os.close(lock)
    sweep()
    assert not held.exists()


def test_what_a_killed_process_leaves_is_swept_by_the_next(temporary: Path) -> None:
    code = (
        f"import tempfile, tasks.sandbox.nursery as n\nn.BOOT = {nursery.BOOT!r}\n"
        f"tempfile.tempdir = {str(temporary)!r}\nfrom tasks.sandbox.run import *\n"
        "run_function('def f(x):\\n    while True: pass', 'f', [[0]], Limits(cpu_seconds=60, wall_seconds=60))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not list(temporary.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (left,) = temporary.iterdir()
    sweep()
    assert left.exists(), "it is in use"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists()
    assert run_function("def f(x):\n    return x", "f", [[1]]).outputs == [1]
    assert list(temporary.iterdir()) == []
