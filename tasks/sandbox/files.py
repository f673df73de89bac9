"""Which files a program may read: Python's standard library, the system's libraries, and its own scratch folder.

Two layers of Linux see to it. In a root of its own there is nothing else to be found; with Landlock nothing else can be
opened. Packages that are installed beside the standard library (winnow itself may be one) belong to neither.
"""

import contextlib
import ctypes
import os
import platform
import stat
import struct
import sys
from collections.abc import Sequence
from glob import glob
from itertools import product
from typing import Any

WORK = "/winnow-work"  # the scratch folder in a root of its own
CLONE_NEWNS = 0x20000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME, MS_NODIRATIME = 1, 2, 4, 8, 1 << 5, 1 << 10, 1 << 11
MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME, ST_RELATIME = 1 << 12, 1 << 14, 1 << 18, 1 << 21, 1 << 12
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 2, -100, 0x8000, 1
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER, CONTROL_DEVICE = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 15
FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero", os.devnull)
PACKAGES = ("site-packages", "dist-packages")


def library_places() -> list[str]:
    """What may be read: the standard library, the libraries that its extensions link to, and harmless devices."""
    wanted = [os.path.dirname(os.__file__), *sys.path, os.path.join(sys.base_exec_prefix, "lib")]
    wanted += ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", *FILES]
    return [path for path in dict.fromkeys(wanted) if os.path.isabs(path) and os.path.exists(path)]


def hidden_places(places: Sequence[str], project: str) -> list[str]:
    """Folders inside ``places`` that hold other packages, and ``project`` where it lies in one of them."""
    patterns = [os.path.join(place, *names) for place in places for names in product(("", "python*"), PACKAGES)]
    found = [path for pattern in patterns for path in glob(pattern)]
    return list(dict.fromkeys([*found, *(project for place in places if _is_inside(project, place))]))


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def open_to_others(path: str) -> bool:
    """Whether another user may pass through the folder and all those above it."""
    above = os.path.dirname(path)
    return bool(os.stat(path).st_mode & 1) and (above == path or open_to_others(above))


def library_open_to_others() -> bool:
    library = os.path.realpath(os.__file__)
    return bool(os.stat(library).st_mode & 4) and open_to_others(os.path.dirname(library))


# --- a root of its own ------------------------------------------------------------------------------------------------


def enter_own_root(libc: Any, places: Sequence[str], hidden: Sequence[str]) -> bool:
    """Move this process into a file system in memory that shows ``places`` under their old names, without ``hidden``,
    an empty folder ``WORK``, and nothing else; all of it is read-only.

    False where the system does not allow it: then all is as before, but for mounts that are now private.
    """
    if platform.machine() not in PIVOT_ROOT or libc.unshare(CLONE_NEWNS) != 0:
        return False
    # Any folder will do: what it holds is covered in this mount namespace alone. The sources are opened before, since
    # some of them may lie in it.
    top = os.getcwd()
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in places}
    covered = False
    try:
        _mount(libc, None, "/", MS_REC | MS_PRIVATE)
        _mount(libc, "tmpfs", top, MS_NOSUID, "mode=755,size=1m")
        covered = True
        _furnish(libc, top, sources, hidden)
        os.chdir(top)
        _check(libc.syscall(PIVOT_ROOT[platform.machine()], b".", b"."))
        _check(libc.umount2(b".", MNT_DETACH))
        os.chdir("/")
    except OSError:
        if covered:
            libc.umount2(os.fsencode(top), MNT_DETACH)
        os.chdir(top)
        return False
    finally:
        for descriptor in sources.values():
            os.close(descriptor)
    return True


def _furnish(libc: Any, top: str, sources: dict[str, int], hidden: Sequence[str]) -> None:
    empty = os.path.join(top, "empty")
    os.mkdir(empty)
    os.mkdir(top + WORK)
    mounted = [top]
    for path, descriptor in sorted(sources.items()):
        target = top + path
        if os.path.exists(target):
            continue  # in a place above it
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _mount(libc, f"/proc/self/fd/{descriptor}", target, MS_BIND | MS_REC)
        mounted.append(target)
    for path in hidden:
        if os.path.isdir(top + path):
            _mount(libc, empty, top + path, MS_BIND)
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(top), AT_RECURSIVE, attributes, ctypes.c_size_t(32)) != 0:
        # Before Linux 5.12 each has to be mounted anew, with the flags that it has.
        for target in mounted:
            flags = os.statvfs(target).f_flag
            kept = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
            kept |= MS_RELATIME if flags & ST_RELATIME else 0
            _mount(libc, None, target, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def _mount(libc: Any, source: str | None, target: str, flags: int, options: str = "") -> None:
    kind = b"tmpfs" if source == "tmpfs" else None
    _check(libc.mount(source and source.encode(), os.fsencode(target), kind, flags, options.encode() or None))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount_scratch(libc: Any, scratch: str, limits: dict[str, int], owner: int) -> bool:
    """Memory as the scratch folder's file system: bounds all files together and is gone with its process."""
    options = f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=700,uid={owner}"
    try:
        _mount(libc, None, "/", MS_REC | MS_PRIVATE)
        _mount(libc, "tmpfs", scratch, MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    except OSError:
        return False
    return True


# --- Landlock ---------------------------------------------------------------------------------------------------------


def landlock_version(libc: Any) -> int:
    """The version of Landlock that the kernel offers; below 1 without."""
    return int(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def reading_rules(places: Sequence[str], hidden: Sequence[str]) -> dict[str, int]:
    """Rules by which what lies in ``places`` can be read, but no file of ``hidden``. Every neighbour of a hidden folder
    has one, since Landlock knows no exceptions: the names in all folders can be seen."""
    rules = dict.fromkeys(places, READ_FOLDER)
    return rules | {part: READ_FILE | READ_FOLDER for place in places for part in _parts(place, hidden)}


def _parts(path: str, hidden: Sequence[str]) -> list[str]:
    """``path``, or where hidden folders are in it the largest folders and files of it that hold none."""
    if path in hidden:
        return []
    if not any(_is_inside(place, path) for place in hidden):
        return [path]
    return [part for name in os.listdir(path) for part in _parts(os.path.join(path, name), hidden)]


def restrict_files(libc: Any, reading: dict[str, int]) -> bool:
    """For good: read by these rules, write below the working folder, no more. False without Landlock."""
    version = landlock_version(libc)
    if version < 1:
        return False
    # Later versions add rights: to move (2), to cut (3), to control devices (5); TCP (4); scopes (6).
    everything = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    everything |= CONTROL_DEVICE if version >= 5 else 0
    attributes = struct.pack("QQQ", everything, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    writing = {os.devnull: READ_FILE | WRITE_FILE, os.curdir: everything & ~EXECUTE & ~CONTROL_DEVICE}
    for path, allowed in (reading | writing).items():
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # A rule for a file may not speak of folders.
            allowed &= everything if stat.S_ISDIR(os.fstat(place).st_mode) else READ_FILE | WRITE_FILE
            libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    done = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return bool(done == 0)
