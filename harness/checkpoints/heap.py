"""The heap of this process, where tensors that last lie among others that do not."""

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def give_large_blocks_back() -> None:
    """Has glibc map blocks of 1 MiB and more by themselves, from now on in this process, and unmap them when freed.

    Otherwise what lasts (the packed matrices of a shard, the weights of a layer) leaves holes in the heap between what
    is computed meanwhile, which nothing fits in: up to several times its size.
    """
    with suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
