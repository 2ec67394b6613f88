"""Resource limits (ulimit): how large a space they allow, and which of them an error is about.

In the picture: nothing. The limits are the program's; the pager and the DMS inherit them.

Interface:
    lift()               in a process of EDM's own: its soft limits become the hard ones
    space_size(most)     how large a space may be, and which limit says so
    limit_of(number)     which limit an errno is about, as the end of a message

Rules: the program's own process never changes a limit.

Source: getrlimit(2).
"""

from __future__ import annotations

import errno
import resource

from edm.uffd_ctypes import PAGE_SIZE

INFINITY = resource.RLIM_INFINITY

_ABOUT = {
    errno.ENOMEM: ("RLIMIT_AS", "ulimit -v"),
    errno.EFBIG: ("RLIMIT_FSIZE", "ulimit -f"),
    errno.EMFILE: ("RLIMIT_NOFILE", "ulimit -n"),
    errno.EAGAIN: ("RLIMIT_NPROC", "ulimit -u"),
}


def lift() -> None:
    """Raise this process's soft limits to the hard ones. They are not meant for it: the pages of a
    space are files here, and time and memory are the pager's own."""
    for name in ("AS", "CPU", "DATA", "FSIZE", "NOFILE", "NPROC"):
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))


def space_size(most: int) -> tuple[int, str]:
    """How many bytes (whole pages) a space may have, up to `most`, and which limit allows no more, or
    "".

    It gets half of the addresses, as the program needs some besides. Its memory and its disk are
    files of processes that lift() their limits. A kept disk has two places for each page, and a table.
    """
    allowed = [(most, "")]
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    _, files = resource.getrlimit(resource.RLIMIT_FSIZE)
    if addresses != INFINITY:
        allowed.append((addresses // 2, "ulimit -v"))
    if files != INFINITY:
        allowed.append((files // 3, "ulimit -f"))
    size, limit = min(allowed)
    return max(size // PAGE_SIZE, 1) * PAGE_SIZE, limit


def limit_of(number: int | None) -> str:
    """ "; RLIMIT_X (ulimit -x) is ..." if this errno may be about a limit that is set, else ""."""
    name, command = _ABOUT.get(number, ("", ""))
    value = resource.getrlimit(getattr(resource, name))[0] if name else INFINITY
    return "" if value == INFINITY else f"; {name} ({command}) is {value}"
