"""The system calls of an ordinary user, who may have userfaultfd for user mode only.

In the picture: from the application to the pager, beside the page faults. Where userfaultfd is for
user mode only, a system call fails with EFAULT on a page that is not here. So a seccomp filter stops
such a call before it begins, and the pager brings its pages.

Interface: listener(start, end, ...) is the application's. It installs the filter, for good, and returns
the descriptor on which the kernel reports stopped calls.
SystemCalls is the pager's: run() is its thread, and close() comes at the end.

One call, `write(fd, array)`:

    1. The filter sees that the buffer begins in the space. The thread sleeps, and the listener has a
       message. Other calls go on, and take 0.05 to 0.1 µs more. (If a signal with a handler comes before
       step 2, the call fails with EINTR, even on a file. Python calls again; fwrite(3) does not.)
    2. SystemCalls pins the first pages of the buffer: PAGES_AT_ONCE, or as many as there is room for (pins.py).
    3. It has the DM-Handler bring those that are not here. Where UFFD_FEATURE_WP_ASYNC is missing, it
       clears the uffd-wp bit of pages that the call writes; otherwise the kernel does that.
    4. It answers CONTINUE, and the kernel makes the call. At a page that is not here, behind the pinned
       ones, the call ends, and returns what it has done. Programs that read files, or use sockets,
       call again for the rest.

Not every program calls write(2) again for the rest of a file or a pipe (`python -u` does not). So if the
buffer is larger than what was pinned, the pager makes the call itself: it reads the bytes from
/proc/TID/mem, and writes them to the program's descriptor, which pidfd_getfd(2) duplicates. The call
returns when all is written, or at an error or a signal with what was written before. If that is nothing,
the kernel makes the call: so it is the kernel that says what is wrong, and sends SIGPIPE or SIGXFSZ. The
pager has the program's hard limit of a file's size, and not its soft one.

readv, writev, sendmsg, recvmsg and their kin keep the addresses of their buffers in memory, where the
filter can't look. So all of these calls are stopped, in every process that has the filter, and each
takes 25 to 30 µs more. Step 2 reads the addresses from /proc/TID/mem; PAGES_AT_ONCE is for all buffers
together. If that file can't be opened (Yama: of a child's child), the call goes on. Under edm.run the
space ends before its process does, and these calls are not stopped: they would fail for good when the
pager is gone.

These still give EFAULT: calls that are not in _CALLS, like sendmmsg; io_uring and O_DIRECT; datagrams
that are larger than what is pinned. These may do less than they are asked to: readv, writev and
their kin; a raw file's readinto; recv with MSG_WAITALL; and a raw file's write in a forked child. Where
first writes are events, a sync in the moment of a call that writes memory may set that bit again.

A filter is inherited, and can't be removed. Nobody asks whether a process has the space: a forked child
has it, and what another program has at these addresses (EDM in EDM) makes pages come that nobody needs.
Nor does the filter ask whether a program is a 32-bit one, where these numbers are other calls (lseek). They
go on as well: the answer is CONTINUE for all but large writes of the application's own threads.
Without the pager nobody would read the listener, and matching calls would fail with ENOSYS. So if
processes with the filter are left when the application has ended, or has become another program, the
pager forks a process that lets their calls go on until the last of them has ended (SystemCalls.close).
If the pager is killed there is none, but then the application is killed too.

EDM's own messages have a flag, UNFILTERED, and are not stopped: the message that brings the pager the
listener would wait for itself.

Rules: the filter needs PR_SET_NO_NEW_PRIVS, so sudo and the like can't work in the program. A process
and its children have one listener at most (EBUSY): EDM in EDM does without.

Sources: seccomp(2), seccomp_unotify(2), <linux/seccomp.h>, <linux/bpf_common.h>, proc_pid_mem(5).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import stat
import struct
from collections.abc import Iterator
from fcntl import ioctl
from struct import Struct
from types import SimpleNamespace

from edm import uffd_ctypes as u
from edm.lifeline import UNFILTERED
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE

SIGNAL_LOOK = 50  # milliseconds between two looks for a signal, while a write waits

# The least number of pages to pin; by whether the call writes memory. A call on a socket fails if it can't
# copy a whole part. A part is 64 KiB when sending, and when receiving what TCP has joined: 17 times
# 32 KiB (MAX_SKB_FRAGS).
LEAST_PINNED = {False: (64 << 10) // PAGE_SIZE + 1, True: (576 << 10) // PAGE_SIZE + 1}

# What a call's second argument is: a buffer, and the third one its length; an array of struct iovec, and the
# third one their count; a struct msghdr, which points to such an array.
BUFFER, VECTOR, MESSAGE = range(3)
# name: (number on x86-64, on aarch64, whether the call writes to the buffers, what its second argument is)
_CALLS = {
    "read": (0, 63, True, BUFFER), "write": (1, 64, False, BUFFER),
    "pread64": (17, 67, True, BUFFER), "pwrite64": (18, 68, False, BUFFER),
    "recvfrom": (45, 207, True, BUFFER), "sendto": (44, 206, False, BUFFER),
    "readv": (19, 65, True, VECTOR), "writev": (20, 66, False, VECTOR),
    "preadv": (295, 69, True, VECTOR), "pwritev": (296, 70, False, VECTOR),
    "preadv2": (327, 286, True, VECTOR), "pwritev2": (328, 287, False, VECTOR),
    "recvmsg": (47, 212, True, MESSAGE), "sendmsg": (46, 211, False, MESSAGE),
}  # fmt: skip
_COLUMN = ("x86_64", "aarch64").index(os.uname().machine)
CALLS = {call[_COLUMN]: call[2:] for call in _CALLS.values()}  # by number
WRITE, PWRITE = _CALLS["write"][_COLUMN], _CALLS["pwrite64"][_COLUMN]

iovec, msghdr = Struct("=QQ"), Struct("=16xQQ")  # base, len; of its fields iov, iovlen

# ---------------------------------------------------------------- <linux/seccomp.h>

seccomp_notif = Struct("=QI4xi12x6Q")  # of its fields id, pid, nr, args
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
_NR, _ARGS = 0, 16  # where they are in struct seccomp_data


def listener(start: int, end: int, lasts: bool = False) -> int:
    """Stop those of _CALLS whose buffer begins in this space (addresses), in all threads of this process
    and in what it forks and executes. Returns the descriptor that SystemCalls answers them on.

    lasts: the space lasts as long as the process. Then all calls that have their buffers' addresses in
    memory are stopped, too. Raises OSError as u.seccomp does.
    """
    u.prctl(u.PR_SET_NO_NEW_PRIVS, 1)
    return u.seccomp(b"".join(sock_filter.pack(*step) for step in _filter(start, end, lasts)))


def _filter(start: int, end: int, lasts: bool) -> Iterator[tuple[int, int, int, int]]:
    allow, notify = (_RETURN, 0, 0, SECCOMP_RET_ALLOW), (_RETURN, 0, 0, SECCOMP_RET_USER_NOTIF)
    yield _LOAD, 0, 0, _NR
    for number, (_, kind) in CALLS.items():
        call = [notify if lasts else allow]
        if kind == BUFFER:
            call = [*_skip_if_below(end), allow, *_skip_if_below(start), notify, allow]
        elif kind == MESSAGE:
            call = [(_LOAD, 0, 0, _ARGS + 8 * 2), (_IF_EQUAL, 0, 1, UNFILTERED), allow, *call]
        yield _IF_EQUAL, 0, len(call), number
        yield from call
    yield allow


def _skip_if_below(bound: int) -> Iterator[tuple[int, int, int, int]]:
    """Skip the next instruction if the second argument is below `bound`. An instruction compares 32 bits."""
    high, low, at = bound >> 32, bound & 0xFFFFFFFF, _ARGS + 8
    yield _LOAD, 0, 0, at + 4
    yield _IF_GREATER, 3, 0, high
    yield _IF_EQUAL, 0, 3, high
    yield _LOAD, 0, 0, at
    yield _IF_AT_LEAST, 0, 1, low


# ---------------------------------------------------------------- the pager's end


class SystemCalls:
    def __init__(
        self, listener: int, ended: int, hello: SimpleNamespace, lspt: object, handler: object
    ) -> None:
        """ended: an eventfd; writing it ends run(). hello: see page_for in pager.py. lspt, handler: the pager's LSPT
        and DmHandler, which the application does not import."""
        self._listener, self._ended, self._hello = listener, ended, hello
        self._lspt, self._handler, self._uffd = lspt, handler, u.Userfaultfd(lspt.uffd)
        # By inode: a few files may share one.
        self._file_locks = [_thread.allocate_lock() for _ in range(64)]
        with contextlib.suppress(OSError):  # EINVAL: this kernel does not know it
            ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)

    def run(self) -> None:
        """Serve system calls, until no process has the filter any more, or `ended` is written."""
        self._poll = select.poll()
        for fd in (self._listener, self._ended):
            self._poll.register(fd, select.POLLIN)
        while self._poll.poll() == [(self._listener, select.POLLIN)]:
            with contextlib.suppress(FileNotFoundError):  # ENOENT: the thread was killed
                self._serve()

    def close(self, leave: bool) -> None:
        """Close the listener, when run() has ended and this is the only thread.

        leave: the space lasts as long as the application. If other processes have the filter, a process
        is forked that lets their calls go on.
        """
        if leave and (self._listener, select.POLLHUP) not in self._poll.poll(0) and not os.fork():
            try:
                os.dup2(self._listener, 0)
                u.close_from(1)
                self._listener = self._ended = 0
                self._pin_and_bring = lambda *call: True
                self.run()
            finally:
                os._exit(0)
        os.close(self._listener)

    def _serve(self) -> None:
        """Receive a call, bring its pages, and answer it."""
        message = ioctl(self._listener, SECCOMP_IOCTL_NOTIF_RECV, bytes(seccomp_notif.size))
        number, thread, *call = seccomp_notif.unpack(message)
        if not self._pin_and_bring(thread, call) and call[0] in (WRITE, PWRITE):
            with contextlib.suppress(RuntimeError):  # no other thread: the kernel makes the call
                _thread.start_new_thread(self._write, (number, thread, call))
                return
        self._answer(number)

    def _answer(self, number: int, done: int = 0) -> None:
        """The call has done so many bytes. If it has done none, the kernel makes it."""
        flags = 0 if done else SECCOMP_USER_NOTIF_FLAG_CONTINUE
        answer = seccomp_notif_resp.pack(number, done, 0, flags)
        ioctl(self._listener, SECCOMP_IOCTL_NOTIF_SEND, answer)

    def _pin_and_bring(self, thread: int, call: list[int], done: int = 0) -> bool:
        """Pin the first pages of the call's buffers, behind `done` bytes, and bring them. Returns whether
        these are all pages of a call that has one buffer."""
        writes, kind = CALLS[call[0]]
        address, length = call[2] + done, call[3] - done
        buffers = [(address, length)] if kind == BUFFER else _buffers(thread, kind, address, length)
        if pages := self._pages_of(buffers, LEAST_PINNED[writes]):
            self._lspt.pins.pin(pages, thread, call)
        for run in pages:
            self._handler.bring(run, writes)
            if writes and self._hello.clean_tracking == "events":
                # The uffd-wp bit of a page that a call writes has to be cleared here.
                start = self._lspt.start + run.start * PAGE_SIZE
                self._uffd.writeprotect(start, len(run) * PAGE_SIZE, False)
        return address % PAGE_SIZE + length <= sum(map(len, pages)) * PAGE_SIZE

    def _pages_of(self, buffers: list[tuple[int, int]], least: int) -> list[range]:
        """The pages of the buffers (address, bytes) that begin in the space, in the order in which the call
        touches them; in all PAGES_AT_ONCE at most, or as many as a call that needs `least` may pin."""
        runs: list[range] = []
        left = min(PAGES_AT_ONCE, self._lspt.pins.share(least))
        for address, length in buffers:
            begin = address - self._lspt.start
            first, stop = begin // PAGE_SIZE, -(-(begin + length) // PAGE_SIZE)
            if runs and first == runs[-1][-1]:  # a page that both have
                first += 1
            run = range(first, min(stop, first + left, self._lspt.pages))
            if run and begin >= 0:
                runs.append(run)
                left -= len(run)
        return runs

    # ------------------------------------------------------------ large writes

    def _write(self, number: int, thread: int, call: list[int]) -> None:
        """A thread, as it may wait: make a call of write(2) or pwrite64(2), and answer.

        Whatever fails, the answer is what is written by then. If that is nothing, the kernel makes the call,
        and says what is wrong.
        """
        done, content, (nr, its_fd, _, _, offset, *_) = 0, memoryview(b""), call
        wrong = OSError, MemoryError, OverflowError  # the last of pwrite: a negative offset
        with contextlib.suppress(*wrong), contextlib.ExitStack() as at_end:
            # Of a thread of the application only: a forked child has descriptors of its own.
            its_memory = f"/proc/{self._hello.pid}/task/{thread}/mem"
            memory = at_end.enter_context(open(its_memory, "rb", 0)).fileno()
            fd = u.pidfd_getfd(self._hello.pidfd, its_fd)
            at_end.callback(os.close, fd)
            mode, inode = os.fstat(fd)[:2]
            if to_file := stat.S_ISREG(mode):  # no other write that is made here comes in between
                at_end.enter_context(self._file_locks[inode % len(self._file_locks)])
            # Not to a socket, where a part would be a message of its own, and not to a terminal, where a write
            # may block that a signal has to end.
            possible = to_file or stat.S_ISFIFO(mode)
            while possible and (content := content or self._read(thread, call, done, memory)):
                if not to_file and os.get_blocking(fd):
                    _wait_for_room(fd, thread)
                part = content if to_file else content[:PAGE_SIZE]
                n = os.pwrite(fd, part, offset + done) if nr == PWRITE else os.write(fd, part)
                done, content = done + n, content[n:]
        with contextlib.suppress(OSError):  # ENOENT: the thread was killed. EBADF: close
            self._answer(number, done)

    def _read(self, thread: int, call: list[int], done: int, memory: int) -> memoryview:
        """The bytes that the call has behind the first `done` ones, PAGES_AT_ONCE at most. Raises OSError: EIO if
        the first page is lost, or has left again, as it may if there was no room to pin it."""
        self._pin_and_bring(thread, call, done)
        length = min(call[3] - done, PAGES_AT_ONCE * PAGE_SIZE)
        return memoryview(os.pread(memory, length, call[2] + done))


def _buffers(thread: int, kind: int, address: int, count: int) -> list[tuple[int, int]]:
    """(address, bytes) of each buffer of a call that has their addresses in memory; none if these can't be
    read: then the call fails by itself."""
    wrong = OSError, OverflowError, struct.error
    with contextlib.suppress(*wrong), open(f"/proc/{thread}/mem", "rb", 0) as file:
        memory = file.fileno()
        if kind == MESSAGE:
            address, count = msghdr.unpack(os.pread(memory, msghdr.size, address))
        content = os.pread(memory, min(count, os.sysconf("SC_IOV_MAX")) * iovec.size, address)
        return list(iovec.iter_unpack(content))
    return []


def _wait_for_room(fd: int, thread: int) -> None:
    """Wait until a page can be written there. Raises OSError if a signal waits for the thread whose call this
    is."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while not poll.poll(SIGNAL_LOOK):
        with open(f"/proc/{thread}/status", "rb") as file:  # the thread's name may be any bytes
            fields = dict(line.split(b":\t", 1) for line in file)
        mask = {name: int(fields[name], 16) for name in (b"SigPnd", b"ShdPnd", b"SigBlk")}
        if (mask[b"SigPnd"] | mask[b"ShdPnd"]) & ~mask[b"SigBlk"]:
            raise InterruptedError
