"""Pins: the pages that a system call of the application is about to touch. LPET does not evict them.

In the picture: beside the LSPT, in memory that the pager and LPET share.

Interface: LSPT.pins is a Pins. system_calls.py calls pin() before a call begins. When LPET claims pages,
LSPT.claim calls drop_ended(), and passes runs().

A thread has at most one pin, for all pages of one call. The pin holds while /proc/TID/syscall shows that
the thread is in this call, with these arguments. It holds, too, while the file shows only "running", or can't
be read, until the thread ends or makes another call. The end of a call is not reported. It is looked for
when LPET wants the pages, or another pin needs the room.

Rules: who changes the table has the LSPT's lock, and makes no system call meanwhile. Who only looks for room or
for calls that have ended does without: a row that is half written is no call that is in the table. Pages are
pinned before they are brought, so that LPET can't evict them in between.

Source: proc_pid_syscall(5). The file can be read by those who may trace the thread, see ptrace(2).
"""

import contextlib
import mmap
import os
import time
from _multiprocessing import SemLock
from struct import Struct

SLOTS = 1024
TRIES, PIN_AGAIN = 300, 1e-3  # to find room, and seconds between two

# One run of a pin's pages: first page, count of pages, thread, and the call: its number and six arguments.
PIN = Struct("=10Q")


class Pins:
    def __init__(self, lock: SemLock, most: int) -> None:
        """most: pages that all pins together may have."""
        self._lock, self.most = lock, most
        self._table = mmap.mmap(-1, SLOTS * PIN.size)
        self._used = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # rows of the table

    def share(self, least: int) -> int:
        """How many pages one call may pin: a quarter of the room that is left, but at least `least`."""
        room = self.most - sum(pin[1] for pin in self._pins())
        return min(max(least, room // 4), self.most)

    def pin(self, pages: list[range], thread: int, call: list[int]) -> None:
        """Pin these pages, which are one share. The thread's earlier pin ends.

        If there is no room, wait until other calls have ended. If calls that wait, such as recv_into, keep all
        of it, the pages stay unpinned: very likely they are still here when the call touches them.
        """
        new = [(run.start, len(run), thread, *call) for run in pages]
        for _ in range(TRIES):
            with self._lock:
                pins = [pin for pin in self._pins() if pin[2] != thread] + new
                if sum(pin[1] for pin in pins) <= self.most and len(pins) <= SLOTS:
                    self._keep(pins)
                    return
            self.drop_ended(0, 1 << 63)
            time.sleep(PIN_AGAIN)

    def drop_ended(self, page: int, count: int) -> None:
        """Drop the pins of these pages whose calls have ended."""
        pins = self._pins()
        calls = {pin[2:] for pin in pins if pin[0] < page + count and page < sum(pin[:2])}
        if ended := {call for call in calls if not _goes_on(*call)}:
            with self._lock:
                self._keep([pin for pin in self._pins() if pin[2:] not in ended])

    def runs(self) -> list[tuple[int, ...]]:
        """The runs of pinned pages: (first page, count). The caller has the lock."""
        return [pin[:2] for pin in self._pins()]

    def _pins(self) -> list[tuple[int, ...]]:
        return [*PIN.iter_unpack(self._table[: used * PIN.size])] if (used := self._used[0]) else []

    def _keep(self, pins: list[tuple[int, ...]]) -> None:
        self._table[: len(pins) * PIN.size] = b"".join(PIN.pack(*pin) for pin in pins)
        self._used[0] = len(pins)


def _goes_on(thread: int, number: int, *arguments: int) -> bool:
    """Is the thread in this call, as far as can be known?"""
    with contextlib.suppress(OSError), open(f"/proc/{thread}/syscall") as file:
        now = file.read().split()
        return now == ["running"] or now[:7] == [str(number), *map(hex, arguments)]
    # It has ended, or this process can't know (EPERM, EMFILE).
    return os.path.exists(f"/proc/{thread}")
