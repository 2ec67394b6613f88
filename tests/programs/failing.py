"""Lets calls on the disk file, and other things, fail. For the other programs here.

The process that has the store has to fail: over MPI the DMS's rank, which runs the program itself; on
one machine the pager, which does not. So `everywhere` changes what a spawned pager runs, too.
"""

import errno
import itertools
import os
import signal
import time
from pathlib import Path

from edm import lifeline, lpet, lspt, page_store, uffd_ctypes


def everywhere(name, *arguments):
    """Call this function of this module here, and in the pager that this process spawns."""
    *boot, begin = lifeline._BOOT.split("; ")
    boot.append(f"sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})")
    boot.append(f"import failing; failing.{name}(*{arguments!r})")
    lifeline._BOOT = "; ".join([*boot, "del sys.path[0]", begin])
    globals()[name](*arguments)


def _is_disk(fd, disk):
    return os.readlink(f"/proc/self/fd/{fd}") == disk


def _patch_writes(disk, allowed):
    """allowed(length): how many of so many bytes may be written; or it raises OSError."""
    real_pwrite, real_splice = os.pwrite, os.splice

    def pwrite(fd, content, offset):
        if _is_disk(fd, disk):
            content = content[: allowed(len(content))]
        return real_pwrite(fd, content, offset)

    def splice(source, target, count, **offsets):
        if _is_disk(target, disk):
            count = allowed(count)
        return real_splice(source, target, count, **offsets)

    os.pwrite, os.splice = pwrite, splice


def _input_output_error():
    return OSError(errno.EIO, os.strerror(errno.EIO))


def writes(disk):
    """While there is a file "fails" beside the disk: now for a whole batch, now after half of it."""
    fails, calls = Path(disk).with_name("fails"), itertools.count()

    def allowed(length):
        if fails.exists():
            if length > uffd_ctypes.PAGE_SIZE and next(calls) % 2:
                return length // 2
            raise _input_output_error()
        return length

    _patch_writes(disk, allowed)


def stalls(disk, seconds):
    """Two writes, when "fails" is there, and the first takes longer than a fault waits for room."""
    grace(seconds)
    fails, calls = Path(disk).with_name("fails"), itertools.count()

    def allowed(length):
        if fails.exists():
            if (call := next(calls)) == 0:
                time.sleep(1.5 * seconds)
            if call == 1:
                fails.unlink()
            raise _input_output_error()
        return length

    _patch_writes(disk, allowed)


def grace(seconds):
    """How long a fault waits for room."""
    lpet.GRACE = seconds


def refuses(disk):
    """Every write while there is a file "fails"."""
    fails = Path(disk).with_name("fails")

    def allowed(length):
        if fails.exists():
            raise _input_output_error()
        return length

    _patch_writes(disk, allowed)


def reads(disk, content):
    """Of whatever has these bytes."""
    real_preadv = os.preadv

    def preadv(fd, buffers, offset):
        got = real_preadv(fd, buffers, offset)
        if _is_disk(fd, disk) and content in bytes(buffers[0]):
            raise _input_output_error()
        return got

    os.preadv = preadv


def dies_with_the_lock():
    """LPET, where it is a process: it is killed in the midst of its 20th change of the LSPT."""
    changes, real_room, real_run = itertools.count(1), lspt.LSPT._room, lpet.Lpet.run

    def room(self, pages, tell):  # it is called with the lock
        if next(changes) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        real_room(self, pages, tell)

    def run(self):
        lspt.LSPT._room = room
        real_run(self)

    lpet.Lpet.run = run


def put_raises():
    """What is no refusal, at the third eviction."""
    evictions, real_put = itertools.count(1), page_store.PageStore.put

    def put(self, gone, dirty):
        if gone and next(evictions) == 3:
            raise RuntimeError("a mistake in LPET")
        real_put(self, gone, dirty)

    page_store.PageStore.put = put


def no_poison():
    """As on a kernel before Linux 6.6."""
    uffd_ctypes.IOCTLS["UFFDIO_POISON"] = 0xC020AA77
