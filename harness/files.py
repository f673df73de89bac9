"""Files that appear whole or not at all, and locks that go with the process that holds them."""

import errno
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from harness.errors import WinnowError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_files(contents: Mapping[Path, bytes]) -> None:
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
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner reads; records are for everyone the umask lets in.
            os.chmod(name, 0o666 & ~_umask())
        for path, name_now in temporary.items():
            os.replace(name_now, path)
    except OSError as error:
        raise _write_error(path.parent, error) from error
    finally:
        for left_over in temporary.values():
            with suppress(OSError):
                left_over.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(folder: Path, error: OSError) -> WinnowError:
    if error.errno in _FULL:
        return WinnowError(f"no space left to write in {folder}: free some and run again (finished cells are kept)")
    return WinnowError(f"cannot write in {folder}: {error.strerror or error}: choose a folder that you may write to")
