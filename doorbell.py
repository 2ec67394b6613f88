"""The doorbell: how an instance wakes a DMS that sleeps, if both are on the same machine.

In the picture: beside the MPI arrow. MPI has no wait that sleeps, and looking for messages often
enough not to keep a fault waiting takes a good part of a core. So a DMS that has had nothing to do
for a moment sleeps in select(2) on a pipe of its own, and whoever sends it a message then writes a
byte into it.

Interface:
    Doorbell()          the DMS's: address(), rung(), wait(seconds)
    Bell(address)       an instance's: ring(), is_broken()

The pipe has no name. The instance opens it through /proc/PID/fd, which the kernel allows to
processes of the same user only; where that fails (another machine, another container), Bell raises
OSError, and the DMS, which hears no RINGS of it, has to look often.

Source: proc(5) on /proc/PID/fd; pipe(7).
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from struct import Struct

ADDRESS = Struct("<iiQ36s")  # pid, descriptor, inode of the pipe, boot id
LAST_WORDS = 0.5  # seconds for what the DMS has sent before its end: it need not have died


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(36)


class Doorbell:
    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def address(self) -> bytes:
        """Where a Bell of this machine finds the pipe."""
        return ADDRESS.pack(os.getpid(), self._write, os.fstat(self._write).st_ino, _boot_id())

    def rung(self) -> bool:
        """Has it rung since this was last asked? Call this before wait: what rings in between,
        and what rang for a message that has not come yet, must not be slept over."""
        try:
            return bool(os.read(self._read, 4096))
        except BlockingIOError:
            return False

    def wait(self, seconds: float) -> bool:
        """Sleep until the bell rings, at most so long. Did it?"""
        return bool(select.select([self._read], [], [], seconds)[0])

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Bell:
    def __init__(self, address: bytes) -> None:
        """Raises OSError if there is no such doorbell on this machine, or not for this user."""
        pid, descriptor, inode, boot_id = ADDRESS.unpack(address)
        if boot_id != _boot_id():
            raise OSError("the DMS is on another machine")
        path = f"/proc/{pid}/fd/{descriptor}"
        if os.stat(path).st_ino != inode:
            raise OSError(f"{path} is not the doorbell: the DMS is in another container")
        self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._broken_since = 0.0  # seconds of the clock

    def is_broken(self) -> bool:
        """Has the DMS's process ended, and has this been known for LAST_WORDS?"""
        now = time.monotonic()
        if not self._broken_since:
            poll = select.poll()  # one of its own: another thread may be in here too
            poll.register(self._fd, 0)  # POLLERR, of a pipe that nobody can read, always counts
            if poll.poll(0):
                self._broken_since = now
        return bool(self._broken_since) and now - self._broken_since > LAST_WORDS

    def ring(self) -> None:
        # A full pipe has rung 65536 times; what is_broken has to tell, the waiting for an answer asks.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, b"!")
