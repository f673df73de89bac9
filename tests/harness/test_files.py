"""Files appear whole or not at all; a lock makes others wait and goes with the process that holds it."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.errors import WinnowError
from harness.files import locked, write_files


def test_bytes_and_what_writes_itself_both_appear(tmp_path):
    first, second = tmp_path / "new" / "a", tmp_path / "b"
    write_files({first: b"one", second: lambda file: file.write(b"two")})
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    mask = os.umask(0)
    os.umask(mask)
    assert second.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no space left to write in"), (errno.EIO, "cannot")])
def test_a_write_that_fails_leaves_every_old_file(tmp_path, number, message):
    old = tmp_path / "a"
    old.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(WinnowError, match=message):
        write_files({old: b"new", tmp_path / "b": fail})
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and old.read_bytes() == b"old"


def test_a_lock_waits_says_so_and_lets_go_after_an_error(tmp_path, caplog):
    lock, entered = tmp_path / "folder" / "one.lock", threading.Event()

    def second() -> None:
        with locked(lock, "waiting for the first"):
            entered.set()

    with pytest.raises(KeyError), locked(lock, ""):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.3)
        raise KeyError
    waiting.join(10)
    assert entered.is_set() and caplog.text.count("waiting for the first") == 1


HOLD = """
import sys, time
from pathlib import Path
from harness.files import locked
with locked(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_goes_with_a_process_that_is_killed(tmp_path):
    lock, root = tmp_path / "one.lock", Path(__file__).parents[2]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(lock, "waiting"):
        pass


def test_a_lock_where_nothing_can_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WinnowError, match="cannot write in"), locked(tmp_path / "file" / "one.lock", ""):
        pass
