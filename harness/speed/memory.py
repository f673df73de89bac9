"""The memory of this process while it works, sampled."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.005  # seconds
_STATUS = Path("/proc/self/status")


@dataclass
class Peak:
    """Bytes. ``own`` is what the process has for itself (RssAnon and RssShmem of Linux), ``resident`` all of its
    resident memory (VmRSS): with pages of mapped files, which the system takes back when it needs them."""

    own: int = 0
    resident: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most that this process has meanwhile, looked at every 5 ms. For Linux."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        told = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        size = {name: int(told[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssShmem")}
        peak.own = max(peak.own, size["RssAnon"] + size["RssShmem"])
        peak.resident = max(peak.resident, size["VmRSS"])

    def watch() -> None:
        while not done.is_set():
            look()
            time.sleep(_EVERY)

    watcher = threading.Thread(target=watch, daemon=True)
    look()
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
