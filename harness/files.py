"""Files that appear whole or not at all, and locks that go with the process that holds them."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from harness.errors import WinnowError

log = logging.getLogger(__name__)

# What a file is to hold, or what writes it into the open file.
Content = bytes | Callable[[IO[bytes]], object]


def write_files(contents: Mapping[Path, Content]) -> None:
    """Writes files, in order, each atomically; all of them are on disk under temporary names before the first
    is put in place, so a full disk leaves every old file as it was.

    Raises WinnowError where the disk is full or a folder cannot be written.
    """
    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
            temporary[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner reads; records are for everyone the umask lets in.
            os.chmod(name, 0o666 & ~_umask())
        for path, name_now in temporary.items():
            os.replace(name_now, path)
    except OSError as error:
        raise write_error(path.parent, error) from error
    finally:
        for left_over in temporary.values():
            with suppress(OSError):
                left_over.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Meanwhile this process alone holds the lock file ``path``; says ``waiting`` where it has to wait for it.

    The lock is the kernel's: it goes with a process that dies. Raises WinnowError where its folder cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s", waiting)  # a warning, so that it is seen where nobody has set up logging
            lock.acquire()
    except OSError as error:
        raise write_error(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path, *patterns: str) -> None:
    """Removes the files and folders in ``folder`` that match: what killed writers left, of whatever host. For who holds
    the lock that every writer has to hold."""
    for path in (found for pattern in patterns for found in folder.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def user_cache() -> Path:
    """The folder of what is remembered for this user, whatever the output folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"


def is_full(error: BaseException) -> bool:
    """Whether the system has refused to write more: the disk is full, or what the user may have of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_error(folder: Path, error: OSError) -> WinnowError:
    """What a person is told where ``error`` came of writing in ``folder``."""
    if is_full(error):
        return WinnowError(f"no space left to write in {folder}: free some and run again (finished cells are kept)")
    return WinnowError(f"cannot write in {folder}: {error.strerror or error}: choose a folder that you may write to")
