"""This side's end of the sandbox: the interpreter that forks, what is said to it, and the folders it may need."""

import contextlib
import os
import re
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from harness.errors import WinnowError
from tasks.sandbox.child import FOLDERS, OWN_ROOT

PROJECT = Path(__file__).resolve().parents[2]
# What the interpreter runs: it imports this folder of the project, and then forgets where the project is.
BOOT = """
import sys
sys.path.append(sys.argv[1])
from tasks.sandbox import child
sys.path.pop()
child.start(int(sys.argv[2]), sys.argv[1])
"""
# The hash seed makes the order of sets the same in every run; nothing of our environment goes along.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
START_SECONDS = 60.0
GRACE_SECONDS = 10.0
DAY = 86400.0


class _Nursery:
    """A clean interpreter that forks keepers, so that none has to start one; it ends with this process.

    It has never seen a program: what one does to its own process, no other meets. Raises WinnowError where it does not
    start.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._requests, theirs = socket.socketpair()
        # -s -S -P: no site packages, nothing of the working folder. -B: no bytecode files.
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", BOOT, str(PROJECT), str(theirs.fileno())],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=ENVIRONMENT, cwd=temporary_folder(), start_new_session=True, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        # A thread of its own for the interpreter's end, or it would stay as a zombie until ours.
        threading.Thread(target=self._process.wait, daemon=True).start()
        self._requests.settimeout(START_SECONDS)
        with contextlib.suppress(OSError):
            said = self._requests.recv(1)
            self._requests.settimeout(None)
            self.needs_folders = said == FOLDERS
            if said in (OWN_ROOT, FOLDERS):
                return
        raise WinnowError(
            "the sandbox for generated code does not start here: its interpreter ends at once. Try "
            f"'{sys.executable} -s -S -P -B -c pass', or use a suite without code"
        )

    def fork(self, base: str, descriptors: list[int]) -> None:
        """A keeper in the folder ``base`` with these as standard input, output and status. OSError where it died."""
        with self._lock:
            socket.send_fds(self._requests, [base.encode()], descriptors)


_nurseries: list[_Nursery] = []
_nurseries_lock = threading.Lock()


def _nursery() -> _Nursery:
    """This process's own, started where there is none."""
    with _nurseries_lock:
        if not (_nurseries and _nurseries[0].owner == os.getpid()):
            _nurseries[:] = [_Nursery()]
            sweep()
        return _nurseries[0]


def talk(request: bytes, wall_seconds: float, most_bytes: int) -> tuple[bytes, int]:
    """Have a keeper forked, give it the request, and give back the answer with the keeper's exit status.

    Of the answer at most ``most_bytes`` and a little more is read. Raises WinnowError where no keeper can be forked.
    """
    for _ in range(2):
        nursery = _nursery()
        try:
            if not nursery.needs_folders:
                return _talk(nursery, "/", request, wall_seconds, most_bytes)
            with _folder() as base:
                return _talk(nursery, base, request, wall_seconds, most_bytes)
        except _Dead:
            with _nurseries_lock:
                _nurseries[:] = [other for other in _nurseries if other is not nursery]
    raise WinnowError("the sandbox for generated code does not work here: its interpreter ends when it is used")


class _Dead(Exception):
    """The nursery has ended, or was killed."""


def _talk(nursery: _Nursery, base: str, request: bytes, wall_seconds: float, most_bytes: int) -> tuple[bytes, int]:
    deadline = time.monotonic() + wall_seconds + GRACE_SECONDS
    (their_input, ours), (output, their_output), (status, their_status) = os.pipe(), os.pipe(), os.pipe()
    with open(ours, "wb") as stdin, open(output, "rb", 0) as stdout, open(status, "rb", 0) as ended:
        try:
            nursery.fork(base, [their_input, their_output, their_status])
        except OSError as error:
            raise _Dead from error
        finally:
            for descriptor in (their_input, their_output, their_status):
                os.close(descriptor)
        try:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(request + b"\n")
                stdin.flush()
            answer = _read_all(stdout, most_bytes, deadline)
        finally:
            # The end of its input tells the keeper to kill what still runs.
            with contextlib.suppress(BrokenPipeError):
                stdin.close()
            stdout.close()
            told = _read_all(ended, 64, time.monotonic() + GRACE_SECONDS).split()
            if len(told) == 1:  # it has not ended
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(told[0]), signal.SIGKILL)
    return answer, int(told[1]) if len(told) > 1 else -signal.SIGKILL


def _read_all(stream: IO[bytes], limit: int, deadline: float) -> bytes:
    """What comes until the end or the deadline; reading stops once it is more than ``limit`` bytes."""
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while len(data) <= limit:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                break
            chunk = os.read(stream.fileno(), 65536)
            if not chunk:
                break
            data += chunk
    return bytes(data)


# --- folders, where programs have no root of their own ----------------------------------------------------------------


def temporary_folder() -> str:
    return os.path.realpath(tempfile.gettempdir())


def _prefix() -> str:
    """Of this host's folders; the number of the process that made one follows."""
    return f"winnow-sandbox-{re.sub('[^A-Za-z0-9.]', '_', socket.gethostname())}-"


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder for one program, locked while it is in use, so that others can tell it from a left-over."""
    base = tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=temporary_folder())
    lock = _lock(base)
    try:
        os.chmod(base, 0o711)
        os.mkdir(os.path.join(base, "work"))
        yield base
    finally:
        remove(base)
        if lock is not None:
            os.close(lock)


def _lock(folder: str) -> int | None:
    """A descriptor that holds the folder's lock; None where another process holds it, or the folder has none to give.

    The lock is the kernel's: it goes with the process, and is seen from every container.
    """
    import fcntl

    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


def sweep() -> None:
    """Removes what killed processes of this host have left behind: folders whose process is gone and whose lock nobody
    holds. Those of older versions, which say nothing of either, go when they are a day old: no program runs so long."""
    named, nameless = re.compile(re.escape(_prefix()) + r"(\d+)-\w+"), re.compile(r"winnow-sandbox-\w{8}")
    with contextlib.suppress(OSError), os.scandir(temporary_folder()) as entries:
        for entry in entries:
            if not entry.name.startswith("winnow-sandbox-") or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                found, age = named.fullmatch(entry.name), time.time() - entry.stat(follow_symlinks=False).st_mtime
                dead = _is_gone(int(found[1])) if found else bool(nameless.fullmatch(entry.name)) and age > DAY
                lock = _lock(entry.path) if dead else None
                if lock is not None:
                    remove(entry.path)
                    os.close(lock)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def remove(base: str) -> None:
    """Removes a folder as far as it can, however deep it is and whatever modes its folders have.

    A folder inside another is first moved up, so that no path grows and nothing calls itself.
    """
    left = [base]
    while left:
        folder = left.pop()
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
            with os.scandir(folder) as found:
                entries = list(found)
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700)
                        place = os.path.join(base, f".{secrets.token_hex(8)}")
                        os.rename(entry.path, place)
                        left.append(place)
                    else:
                        os.unlink(entry.path)
            if folder != base:
                os.rmdir(folder)
    with contextlib.suppress(OSError):
        os.rmdir(base)
