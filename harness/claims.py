"""Who is at work on what, in folders that machines share: claim files with a heartbeat, and no lock of the kernel.

Locks of the kernel do not hold on every network file system. A claim is a file that only one process can make
(``O_EXCL``). It says who holds it, and its holder touches it every few seconds. A claim of a process of this machine
is dead as soon as the process is; one of another machine when it was not touched for ``DEAD_AFTER`` seconds, by the
clock of the file server. Whoever finds a dead claim takes it over.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from harness.errors import WinnowError
from harness.files import write_error

log = logging.getLogger(__name__)

DEAD_AFTER = 120.0
BEAT = 10.0  # seconds between two touches
_POLL = 0.2  # seconds between two looks at the claim of somebody else
JOB = "WINNOW_JOB"  # environment: what an engine calls the job that runs here


class Busy(WinnowError):
    """Somebody else is at work on it; ``holder`` says who."""

    def __init__(self, what: str, holder: str) -> None:
        super().__init__(f"{what} is being made by {holder}")
        self.holder = holder


@contextmanager
def claimed(path: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Meanwhile this process alone holds the claim ``path``.

    ``what`` names what is claimed. Where another process holds it: waits, and says so, or without ``wait`` raises
    ``Busy``. Raises WinnowError where its folder cannot be written.
    """
    token = uuid.uuid4().hex
    told = False
    while not _made(path, token):
        if _is_dead(path):
            _take_away(path)
            continue
        if not wait:
            raise Busy(what, holder(path))
        if not told:
            # A warning, so that it is seen where nobody has set up logging.
            log.warning("%s is at work on %s: waiting for it", holder(path) or "another process", what)
            told = True
        time.sleep(_POLL)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, done), name=f"claim of {what}", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether somebody who lives holds the claim ``path``."""
    return path.exists() and not _is_dead(path)


def holder(path: Path) -> str:
    """Who holds the claim ``path``, in words; empty where nobody does."""
    said = _read(path)
    if not said:
        return ""
    job = f", job {said['job']}" if said.get("job") else ""
    return f"process {said.get('pid')} on {said.get('host')}{job}"


def _made(path: Path, token: str) -> bool:
    """Whether the claim could be made, or somebody has it."""
    said = {"token": token, **_here(), "pid": os.getpid(), "born": psutil.Process().create_time()}
    text = json.dumps(said | {"job": os.environ.get(JOB, "")}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error) from error
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except OSError as error:
        raise write_error(path.parent, error) from error
    try:
        os.write(handle, text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise write_error(path.parent, error) from error
    finally:
        os.close(handle)
    return True


@cache
def _here() -> dict[str, str]:
    """This machine; processes are told apart by number only where they see one another."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with suppress(OSError):
        return {"host": socket.gethostname(), "boot": boot.read_text().strip(), "space": os.readlink(processes)}
    return {"host": socket.gethostname(), "boot": "", "space": ""}


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_dead(path: Path) -> bool:
    """Whether the holder of the claim is gone; False where there is no claim."""
    said = _read(path)
    if said and all(said.get(key) == value for key, value in _here().items()):
        try:
            return bool(psutil.Process(said["pid"]).create_time() != said["born"])
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, KeyError, TypeError, ValueError):
            pass
    if said.get("job") and said["job"] == os.environ.get(JOB):
        return True  # an engine runs the same job again: where it ran before is gone
    try:
        return _now(path.parent) - path.stat().st_mtime > DEAD_AFTER
    except FileNotFoundError:
        return False


def _now(folder: Path) -> float:
    """By the clock of whoever keeps the folder's files."""
    probe = folder / f".now-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _take_away(path: Path) -> None:
    """Remove a dead claim. Two may find it dead: who makes the file beside it looks again, so that none that was made
    since is removed."""
    beside = path.with_name(f"{path.name}.taken")
    if beside.exists() and _now(path.parent) - beside.stat().st_mtime > DEAD_AFTER:
        beside.unlink(missing_ok=True)  # of one who died while taking over
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(_POLL)
        return
    try:
        if _is_dead(path):
            log.warning("%s is gone: its claim of %s is taken over", holder(path) or "a process", path.stem)
            path.unlink(missing_ok=True)
    finally:
        beside.unlink(missing_ok=True)


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
