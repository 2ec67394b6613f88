"""Pins: the pages that system calls of the application are about to touch. LPET passes them.

In the picture: beside the LSPT, in memory that the pager and LPET share.

Interface: LSPT.pins is a Pins. system_calls.py calls pin, for a call that has not begun. LPET calls
drop_ended before it evicts, and LSPT.leaving without().

A thread has at most one pin, of all pages of a call. It holds while /proc/TID/syscall shows that the
thread is in this call, with these arguments. If the file shows no more than "running", it holds until the thread has used the
processor for RUNNING since then: what is done with the pages takes less. (If it held for a time, a
recv_into that waits would lose its pages.) Nobody tells that a call has ended: that is asked when the
pages are wanted, or the room for another pin.

Rules: the LSPT's lock protects the table, and no system call is made under it. Pages are pinned first,
and brought then: LPET has either let them go before, or leaves them alone.

Source: proc_pid_syscall(5), proc_pid_schedstat(5). The first is for who may trace the thread, see
ptrace(2); for others every thread is "running".
"""

from __future__ import annotations

import mmap
from _multiprocessing import SemLock
from struct import Struct

SLOTS = 1024
RUNNING = 50_000_000  # nanoseconds

# A pin has one of these for each run of its pages: first page, count of pages, thread, when it was pinned
# (_used_by), and the call: number, six arguments.
PIN = Struct("=4Q7Q")
Pin = tuple[int, ...]


class Pins:
    def __init__(self, lock: SemLock, most: int) -> None:
        """most: pages that all pins may have together."""
        self._lock, self.most = lock, most
        self._table = mmap.mmap(-1, SLOTS * PIN.size)
        self._used = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # how many there are

    def pin(
        self, wanted: list[range], least: int, thread: int, call: tuple[int, ...]
    ) -> list[range]:
        """Pin these pages; or as many, from the first on, as this pin may have: a quarter of the room that
        is left, and at least `least`. Returns those; none, if there is no room.

        What this thread had pinned is not pinned any more.
        """
        if self._room(thread) < 4 * sum(map(len, wanted)):
            self.drop_ended(0, 1 << 63)
        used = _used_by(thread)
        with self._lock:
            pins, room = [pin for pin in self._pins() if pin[2] != thread], self._room(thread)
            pages = first_of(wanted, max(min(least, self.most), room // 4))
            if sum(map(len, pages)) > room or len(pins) + len(pages) > SLOTS:
                pages = []
            self._keep(pins + [(run.start, len(run), thread, used, *call) for run in pages])
        return pages

    def drop_ended(self, page: int, count: int) -> None:
        """Unpin those of these pages whose call has ended."""
        if self._used[0]:
            with self._lock:
                pins = [
                    pin for pin in self._pins() if pin[0] < page + count and page < sum(pin[:2])
                ]
            if ended := {call for call in {pin[2:] for pin in pins} if not _goes_on(*call)}:
                with self._lock:
                    self._keep([pin for pin in self._pins() if pin[2:] not in ended])

    def without(self, page: int, chosen: bytes) -> bytes:
        """`chosen`, which has a byte for each page from `page` on, with 0 for those that are pinned.
        The caller has the lock."""
        for first, count, *_ in self._pins() if self._used[0] else ():
            begin, end = max(0, first - page), max(0, first + count - page)
            middle = chosen[begin:end]
            chosen = chosen[:begin] + bytes(len(middle)) + chosen[begin + len(middle) :]
        return chosen

    def _room(self, thread: int) -> int:
        return self.most - sum(pin[1] for pin in self._pins() if pin[2] != thread)

    def _pins(self) -> list[Pin]:
        return list(PIN.iter_unpack(self._table[: self._used[0] * PIN.size]))

    def _keep(self, pins: list[Pin]) -> None:
        self._table[: len(pins) * PIN.size] = b"".join(PIN.pack(*pin) for pin in pins)
        self._used[0] = len(pins)


def first_of(runs: list[range], count: int) -> list[range]:
    """So many of these pages, from the first on."""
    some = []
    for run in runs:
        if count > 0:
            some.append(run[:count])
            count -= len(run)
    return some


def _goes_on(thread: int, used: int, number: int, *arguments: int) -> bool:
    try:
        with open(f"/proc/{thread}/syscall", "rb", 0) as file:
            now = file.read().decode().split()[:7]
    except PermissionError:
        now = ["running"]
    except OSError:  # the thread has ended
        return False
    if now == ["running"]:
        return _used_by(thread) - used < RUNNING
    return now == [str(number), *map(hex, arguments)]


def _used_by(thread: int) -> int:
    """For how many nanoseconds this thread has used a processor; a moment ago, if it does. If it has
    ended: 0."""
    try:
        with open(f"/proc/{thread}/schedstat", "rb", 0) as file:
            return int(file.read().split()[0])
    except OSError:
        return 0
