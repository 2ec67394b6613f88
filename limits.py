"""Resource limits (ulimit): how large a space they allow, and which one an error comes from.

In the picture: nothing. The limits are the program's; the pager and the DMS inherit them.

Interface:
    lift()               raise the soft limits of a process of EDM's own
    space_size()         how large the space of `edm run` is, and the limit that makes it smaller
    explain(error)       add the limit that an error comes from

Rules: an application's process never changes a limit.

Source: getrlimit(2).
"""

import errno
import resource

from edm.uffd_ctypes import PAGE_SIZE

_ABOUT = {
    errno.ENOMEM: {"AS": "v", "DATA": "d"},
    errno.EFBIG: {"FSIZE": "f"},
    errno.EMFILE: {"NOFILE": "n"},
    errno.EAGAIN: {"NPROC": "u", "AS": "v", "DATA": "d"},  # a thread needs memory
}


def lift() -> None:
    """Raise this process's soft limits to the hard ones. They are meant for the program: a space is
    a file here, and the pager's time and memory are its own."""
    for name in ("AS", "CPU", "DATA", "FSIZE", "NOFILE", "NPROC"):
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))


def space_size() -> tuple[int, str]:
    """How many bytes (whole pages) the space of `edm run` has, and the limit that makes it smaller than
    256 GiB, or "".

    It gets half of the addresses: the program needs others. A kept disk has two places for each
    page and a table, so the space gets a third of the largest file.
    """
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    _, files = resource.getrlimit(resource.RLIMIT_FSIZE)
    allowed = (256 << 30, ""), (addresses // 2, "ulimit -v"), (files // 3, "ulimit -f")
    size, limit = min(each for each in allowed if each[0] >= 0)  # RLIM_INFINITY is -1
    return max(size // PAGE_SIZE, 1) * PAGE_SIZE, limit


def explain(error: Exception) -> None:
    """Add to an OSError's words, in place: each limit that is set, and that it may come from."""
    if isinstance(error, OSError) and error.strerror:
        for name, letter in _ABOUT.get(error.errno, {}).items():
            value, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
            if value != resource.RLIM_INFINITY:
                error.strerror += f"; RLIMIT_{name} (ulimit -{letter}) is {value}"
