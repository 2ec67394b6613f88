"""The system calls of an ordinary user, who may have userfaultfd for user mode only.

In the picture: from the application to the pager, beside the page faults. Where userfaultfd is for
user mode only, a system call fails with EFAULT on a page that is away. So such a call is stopped before
it begins, and the pager brings its pages.

Interface: listener(start, end) is the application's: it makes the kernel stop the calls, for good, and
returns the descriptor that tells of them. SystemCalls is the pager's: run() is its thread.

One call, `write(fd, array)`:

    1. The seccomp filter sees that the buffer begins in the space. The thread sleeps, and the listener
       has a message. Other calls go on, and take 0.05 to 0.1 µs more. (A signal that has a handler
       and comes before step 2 makes the call fail with EINTR, also a file's. Python makes the call again;
       fwrite(3) does not.)
    2. SystemCalls pins the first pages of the buffer, AT_ONCE or what there is room for (pins.py).
    3. It has the DM-Handler bring those that are not here. (The kernel takes the mark from those that
       the call writes. Where it can't, UFFD_FEATURE_WP_ASYNC, that is done here.)
    4. It answers CONTINUE: the kernel makes the call. Where it meets a page that is away, behind the
       pinned ones, it returns what it has done so far. Whoever reads files and reads and writes sockets
       asks for the rest then, and that is a call of its own.

A write to a file or a pipe is not asked for again by everybody (`python -u` is who does not). So one whose
buffer is more than was pinned is made by the pager, piece by piece, on the program's descriptor, which
pidfd_getfd(2) gives it. Such a call returns when all is written, or what was written until an error or a
signal came.

readv, writev, sendmsg, recvmsg and their kin have their buffers' addresses in memory, where the filter
can't look. So all of these calls are stopped, one after the other, of every process that has the filter.
Each takes 25 to 30 µs more. If it is of a process that has the space, step 2 reads the addresses from
/proc/TID/mem; AT_ONCE counts for all buffers together. If that file can't be opened (Yama: of forked
children), the call just goes on. Under edm.run, where the space ends before its process does, these
calls are not stopped: they would fail for good when the pager is gone.

What does not work so, and gives EFAULT as before: calls that are not in _CALLS, like sendmmsg;
io_uring and O_DIRECT; datagrams that are larger than what is pinned. What may do less than it is asked
for, where it would do all elsewhere: readv, writev and their kin; a raw file's readinto; recv with
MSG_WAITALL; and in forked children a raw file's write. Where first writes are events, a sync at the very
moment of a call that writes memory may mark its pages again.

The filter is inherited, and for ever. Calls of processes that do not have the space just go on. Nobody is
at the listener's other end when the pager is gone: then matching calls would fail with ENOSYS. So if such
processes are left when the application has ended, or has become another program, the pager leaves a
process behind that lets their calls go on, until the last of them has ended (SystemCalls.close). Where
the pager was killed, nobody does that; the application is killed with it.

EDM's own messages are not stopped: the one that brings the pager the listener would wait for itself.
Their flags tell, UNFILTERED.

Rules: the filter takes privileges from the program (PR_SET_NO_NEW_PRIVS): sudo and the like can't work
in it. A process has one listener at most (EBUSY), and so have its children: EDM in EDM does without.

Sources: seccomp(2), seccomp_unotify(2), <linux/seccomp.h>, <linux/bpf_common.h>, <linux/audit.h>.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import select
import stat
import struct
import time
from fcntl import ioctl
from struct import Struct

from edm import uffd_ctypes as u
from edm.address_space import UNFILTERED
from edm.pins import first_of
from edm.uffd_ctypes import PAGE_SIZE

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edm.dm_handler import DmHandler
    from edm.lspt import LSPT

AT_ONCE = 1 << 20  # bytes
SETTLE = 100e-6  # seconds between two looks at pages that LPET has in its hands
ROOM = 0.3  # seconds to wait for room for a pin
AGAIN = 1e-3  # seconds between two looks whether there is some

# Pages that are pinned at least. A call that meets a page which is away, further on, returns what it has
# done; but a socket's fails if that is not a whole part of what it copies. Sent are 64 KiB at once, and
# received is what TCP has joined, 17 times 32 KiB (MAX_SKB_FRAGS). By whether the call writes memory.
LEAST = {False: (64 << 10) // PAGE_SIZE + 1, True: (576 << 10) // PAGE_SIZE + 1}

# What an argument is: a buffer, with its length behind it; the address of an array of struct iovec, with
# their count behind it; the address of a struct msghdr, which has such an address.
BUFFER, VECTOR, MESSAGE = range(3)
# name: which argument; does the call write to the buffers? What is it?
_CALLS = {
    "read": (1, True, BUFFER), "write": (1, False, BUFFER), "pread64": (1, True, BUFFER),
    "pwrite64": (1, False, BUFFER), "recvfrom": (1, True, BUFFER), "sendto": (1, False, BUFFER),
    "getrandom": (0, True, BUFFER), "readv": (1, True, VECTOR), "writev": (1, False, VECTOR),
    "preadv": (1, True, VECTOR), "pwritev": (1, False, VECTOR), "preadv2": (1, True, VECTOR),
    "pwritev2": (1, False, VECTOR), "recvmsg": (1, True, MESSAGE), "sendmsg": (1, False, MESSAGE),
}  # fmt: skip
# By machine: AUDIT_ARCH, and the numbers of these calls.
_MACHINES = {
    "x86_64": (0xC000003E, (0, 1, 17, 18, 45, 44, 318, 19, 20, 295, 296, 327, 328, 47, 46)),
    "aarch64": (0xC00000B7, (63, 64, 67, 68, 207, 206, 278, 65, 66, 69, 70, 286, 287, 212, 211)),
}
AUDIT_ARCH, _NUMBERS = _MACHINES[os.uname().machine]
CALLS = dict(zip(_NUMBERS, _CALLS.values(), strict=True))
WRITE, PWRITE = _NUMBERS[1], _NUMBERS[3]
PIECE = 64  # pages that the pager writes at once to a file; of others each page is waited for
LOOK = 50  # milliseconds between two looks whether a signal waits for a thread that waits
SIGPIPE = 13  # signal.SIGPIPE, without importing signal: the application imports this module

iovec, msghdr = Struct("=QQ"), Struct("=16xQQ")  # base, len; of its fields iov, iovlen
IOV_MAX = 1024  # limits.h(0p)

# ---------------------------------------------------------------- <linux/seccomp.h>

seccomp_notif = Struct("=QIIiIQ6Q")  # id, pid, flags; nr, arch, instruction_pointer, args
seccomp_notif_resp = Struct("=QqiI")  # id, val, error, flags
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
# Linux 6.6: the pager runs where the thread has run. A call whose page is here takes 28 µs more, and
# without this 35 to 47.
SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 0x40082104, 1
SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW = 0x7FC00000, 0x7FFF0000

# ---------------------------------------------------------------- the application's end

sock_filter = Struct("=HBBI")  # code, jump if true, jump if false, k
_LOAD, _IF_EQUAL, _IF_GREATER, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16  # where they are in struct seccomp_data


def listener(start: int, end: int, lasts: bool = False) -> int:
    """From now on, the calls in _CALLS whose buffer begins in this space (bytes) wait for SystemCalls at
    the descriptor that this returns. If it lasts as long as this process, so do those that have their
    buffers' addresses in memory, wherever these are.

    For all threads of this process, and what it forks and executes. Raises OSError as u.seccomp does.
    """
    u.prctl(u.PR_SET_NO_NEW_PRIVS, 1)
    flags = (
        u.SECCOMP_FILTER_FLAG_NEW_LISTENER
        | u.SECCOMP_FILTER_FLAG_TSYNC
        | u.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
        | u.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    )
    steps = _filter(start, end, lasts)
    return u.seccomp(flags, b"".join(sock_filter.pack(*step) for step in steps))


def _filter(start: int, end: int, lasts: bool) -> Iterator[tuple[int, int, int, int]]:
    allow, notify = (_RETURN, 0, 0, SECCOMP_RET_ALLOW), (_RETURN, 0, 0, SECCOMP_RET_USER_NOTIF)
    yield _LOAD, 0, 0, _ARCH
    yield _IF_EQUAL, 1, 0, AUDIT_ARCH
    yield allow
    yield _LOAD, 0, 0, _NR
    for number, (argument, _, kind) in CALLS.items():
        call = [notify if lasts else allow]
        if kind == BUFFER:
            from_end_on = [*_at_least(argument, end, 1, 0), notify]
            call = [*_at_least(argument, start, 0, len(from_end_on)), *from_end_on, allow]
        elif kind == MESSAGE:
            call = [(_LOAD, 0, 0, _ARGS + 8 * 2), (_IF_EQUAL, 0, 1, UNFILTERED), allow, *call]
        yield _IF_EQUAL, 0, len(call), number
        yield from call
    yield allow


def _at_least(argument: int, bound: int, yes: int, no: int) -> Iterator[tuple[int, int, int, int]]:
    """Is this argument at least so large? Then leave out `yes` of the next instructions, else `no`.

    An instruction compares 32 bits.
    """
    high, low, at = bound >> 32, bound & 0xFFFFFFFF, _ARGS + 8 * argument
    yield _LOAD, 0, 0, at + 4
    yield _IF_GREATER, yes + 3, 0, high
    yield _IF_EQUAL, 0, no + 2, high
    yield _LOAD, 0, 0, at
    yield _IF_AT_LEAST, yes, no, low


# ---------------------------------------------------------------- the pager's end


class SystemCalls:
    def __init__(
        self,
        listener: int,
        ended: int,
        application: int,
        lspt: LSPT,
        handler: DmHandler,
        start_addr: int,
        uffd: int,
        memfd: int,
        unmark: bool,
    ) -> None:
        """ended: an eventfd, whose writing ends run(). application: its process id. unmark: has the mark of a
        page that is to be written to be taken away here?"""
        self._application, self._memfd, self._unmark = application, memfd, unmark
        self.processes = frozenset((application,))  # which have the space; others' calls just go on
        self.hear_children: Callable[[], object] = bool  # called when a process is unknown
        self._listener, self._lspt, self._handler = listener, lspt, handler
        self._start, self._uffd = start_addr, u.Userfaultfd(uffd)
        with contextlib.suppress(OSError):  # EINVAL: this kernel does not know it
            ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
        self._poll = select.poll()
        for fd in (listener, ended):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Let system calls go on when their pages are here, until there is nobody left who may make
        any, or it is to end."""
        while self._poll.poll() == [(self._listener, select.POLLIN)]:
            self._let_go_on()

    def close(self, leave: bool) -> None:
        """Close the listener, when run() has ended.

        leave: the space lasts as long as the application. If processes are left that have the filter, one
        is forked that lets their calls go on. There is no other thread.
        """
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if leave and (self._listener, select.POLLHUP) not in poll.poll(0) and not os.fork():
            try:
                os.dup2(self._listener, 0)
                os.closerange(1, 1 << 30)
                SystemCalls(0, 0, 0, self._lspt, self._handler, 0, -1, -1, False).run()
            finally:
                os._exit(0)
        os.close(self._listener)

    def _let_go_on(self) -> None:
        """Receive a call, bring its pages, and answer."""
        message = bytearray(seccomp_notif.size)
        with contextlib.suppress(FileNotFoundError):  # ENOENT: its thread was killed meanwhile
            ioctl(self._listener, SECCOMP_IOCTL_NOTIF_RECV, message)
            number, thread, _, *call = seccomp_notif.unpack(message)
            if not (process := self._process_of(thread)):
                self.hear_children()
                process = self._process_of(thread)
            whole = not process or self._bring(thread, call[0], call[3:])
            if not whole and call[0] in (WRITE, PWRITE) and process == self._application:
                # EBADF, EPERM: the kernel makes what it can of it.
                with contextlib.suppress(OSError):
                    work = number, thread, call[0] == PWRITE, self._descriptor(call[3]), *call[4:7]
                    _thread.start_new_thread(self._write, work)  # it may wait
                    return
            answer = seccomp_notif_resp.pack(number, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)
            ioctl(self._listener, SECCOMP_IOCTL_NOTIF_SEND, answer)

    def _process_of(self, thread: int) -> int:
        """Which of the processes that have the space has this thread; 0: none."""
        found = (pid for pid in self.processes if os.path.exists(f"/proc/{pid}/task/{thread}"))
        return next(found, 0)

    def _bring(self, thread: int, number: int, arguments: list[int]) -> bool:
        """Bring the first pages of this call's buffers, and pin them. Is that all of it, if it has one?"""
        argument, writes, kind = CALLS[number]
        address, length = arguments[argument : argument + 2]
        buffers = [(address, length)] if kind == BUFFER else _buffers(thread, kind, address, length)
        wanted = self._pages_of(buffers)
        pages = self._pin(wanted, LEAST[writes], thread, (number, *arguments)) if wanted else []
        for run in pages:
            while self._lspt.is_missing(run) and not self._lspt.stopped():
                self._handler.bring(run, writes)
                if self._lspt.is_missing(run):
                    time.sleep(SETTLE)
            if writes and self._unmark:
                start = self._start + run.start * PAGE_SIZE
                # ENOENT, ESRCH: the application is ending.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    self._uffd.writeprotect(start, len(run) * PAGE_SIZE, False)
        return address % PAGE_SIZE + length <= sum(map(len, pages)) * PAGE_SIZE

    def _pages_of(self, buffers: list[tuple[int, int]]) -> list[range]:
        """The pages of those of these buffers (address, bytes) that begin in the space, AT_ONCE in all, in
        the order in which a call touches them."""
        runs: list[range] = []
        room, space = AT_ONCE // PAGE_SIZE, self._lspt.pages * PAGE_SIZE
        for address, length in buffers:
            begin = address - self._start
            if length and 0 <= begin < space and room > 0:
                end = min(begin + min(length, AT_ONCE), space)
                first, stop = begin // PAGE_SIZE, -(-end // PAGE_SIZE)
                if runs and first in (runs[-1].stop - 1, runs[-1].stop):
                    first = runs.pop().start
                runs.append(range(first, stop))
                room = AT_ONCE // PAGE_SIZE - sum(map(len, runs))
        return runs

    def _pin(
        self, wanted: list[range], least: int, thread: int, call: tuple[int, ...]
    ) -> list[range]:
        """As Pins.pin, but wait for room. If all of it is of calls that wait, too, as recv_into does, this
        one goes without: very likely its pages are still here when it touches them."""
        pins, give_up = self._lspt.pins, time.monotonic() + ROOM
        while not (pages := pins.pin(wanted, least, thread, call)):
            if time.monotonic() > give_up:
                return first_of(wanted, min(least, pins.most))
            time.sleep(AGAIN)
        return pages

    # ------------------------------------------------------------ large writes

    def _descriptor(self, fd: int) -> int:
        """A duplicate of the application's descriptor. Raises OSError, for a socket too: its parts are
        messages, and whoever writes there asks for the rest."""
        process = os.pidfd_open(self._application)
        try:
            copy = u.pidfd_getfd(process, fd)
        finally:
            os.close(process)
        if stat.S_ISSOCK(os.fstat(copy).st_mode):
            os.close(copy)
            raise OSError(errno.ENOTSUP, "a socket")
        return copy

    def _write(
        self, number: int, thread: int, at: bool, fd: int, address: int, length: int, offset: int
    ) -> None:
        """A thread: make a call of write(2), or with `at` of pwrite64(2), and answer."""
        done, failed, begin = 0, 0, address - self._start
        to_file = stat.S_ISREG(os.fstat(fd).st_mode)
        try:
            while done < length:
                if not to_file:
                    _wait_for_room(fd, thread)
                page = (begin + done) // PAGE_SIZE
                end = min(begin + length, (page + (PIECE if to_file else 1)) * PAGE_SIZE)
                content = self._read(begin + done, end)
                done += os.pwrite(fd, content, offset + done) if at else os.write(fd, content)
        except OSError as error:
            failed = error.errno if not done else 0
            if error.errno == errno.EPIPE:
                os.kill(self._application, SIGPIPE)
        os.close(fd)
        answer = seccomp_notif_resp.pack(number, done, -failed, 0)
        with contextlib.suppress(FileNotFoundError):  # ENOENT: its thread was killed meanwhile
            ioctl(self._listener, SECCOMP_IOCTL_NOTIF_SEND, answer)

    def _read(self, begin: int, end: int) -> bytes:
        """What the application has there, counted in bytes from the start of the space."""
        from edm.lspt import LOST, NO_HOLES  # the application does without

        pages = range(begin // PAGE_SIZE, -(-end // PAGE_SIZE))
        while not self._lspt.stopped():
            if self._lspt.is_missing(pages):
                self._handler.bring(pages, False)
            taken, _ = self._lspt.take(pages.start, len(pages), NO_HOLES)
            whole = sum(len(before) for _, before in taken) == len(pages)
            content = os.pread(self._memfd, end - begin, begin) if whole else b""
            self._lspt.stays(taken)
            for first, before in taken:
                self._uffd.wake(self._start + first * PAGE_SIZE, len(before) * PAGE_SIZE)
            if whole:
                return content
            if LOST in self._lspt.state[pages.start : pages.stop]:
                break
            time.sleep(SETTLE)
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def _buffers(thread: int, kind: int, address: int, count: int) -> list[tuple[int, int]]:
    """(address, bytes) of the buffers of a call that has them in memory; none if that can't be read: the
    call finds out itself."""
    wrong = OSError, OverflowError, struct.error
    with contextlib.suppress(*wrong), open(f"/proc/{thread}/mem", "rb", 0) as file:
        memory = file.fileno()
        if kind == MESSAGE:
            address, count = msghdr.unpack(os.pread(memory, msghdr.size, address))
        content = os.pread(memory, min(count, IOV_MAX) * iovec.size, address)
        return list(iovec.iter_unpack(content))
    return []


def _wait_for_room(fd: int, thread: int) -> None:
    """Until a page can be written there without waiting. Raises OSError EINTR when a signal has come for
    the thread whose call this is, and has a handler; EAGAIN if it does not want to wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while not poll.poll(0 if not os.get_blocking(fd) else LOOK):
        if not os.get_blocking(fd):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        with open(f"/proc/{thread}/status") as file:
            fields = dict(line.split(":\t", 1) for line in file)
        mask = {name: int(fields[name], 16) for name in ("SigPnd", "ShdPnd", "SigCgt", "SigBlk")}
        if (mask["SigPnd"] | mask["ShdPnd"]) & mask["SigCgt"] & ~mask["SigBlk"]:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
