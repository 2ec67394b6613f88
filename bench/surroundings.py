"""What a benchmarked process has of this machine: a limit on its memory, a file to swap to, warm memory.

In the picture: __main__.py and programs.py make these around the processes that they start.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

WARM = 16384  # MiB touched before a run, at most


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup whose processes may have limit bytes; version 1 or 2, whichever there is."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, setting = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    group = parent / f"edm-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / setting).write_text(str(limit))
        yield group
    finally:
        deadline = time.monotonic() + 10
        while True:  # a process that has just ended still counts for a moment
            try:
                group.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@contextlib.contextmanager
def swap_file(path: Path, size: int) -> Iterator[None]:
    """The kernel swaps to this file, of size MiB, which stays for the next run."""
    if not path.exists():
        with open(path, "wb") as file:
            os.chmod(path, 0o600)
            file.writelines(bytes(1 << 20) for _ in range(size))
        subprocess.run(["mkswap", path], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", path], check=True)


def available() -> int:
    """MiB of memory that programs can still have: proc(5), "MemAvailable"."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) >> 10


def warm(size: int) -> None:
    """Touch and free so many MiB: a hypervisor may have taken free memory back, and giving it again
    costs a page many times as much as the kernel's own work (14 µs for 3 were seen)."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, min(size, WARM, available() * 3 // 4) << 20, flags=flags).close()
