"""Space: what the application sees of EDM, in its own process.

In the picture: the box on the left. A Python thread that takes a page fault sleeps in the kernel
holding the GIL, so another process has to resolve its faults: the pager (pager.py). This process
makes the userfaultfd and the memfd and sends them to the pager. From then on it just touches
memory.

Interface:
    for the application        Space: mmap, munmap, sync, areas, locations, figures
    for advice.py              Space: advise
    for numpy_mem_handler.py   Space: config, can_be_called, allocate, lengths, arrays, grow, release
    for edm.py                 Space begins when it is made and ends with close

The memory: one memfd as long as the space, mapped shared, whole, at start_addr, and registered once
with userfaultfd. Areas are bookkeeping of this process (Gaps). The pager gets a list of them only
because it reads ahead within areas. Freeing an area makes its pages NEW, here and in the store.
Touching an area after munmap is not caught: it gives zeros, or the next area's bytes.

Behind the space, the memfd has the mailbox by which this process calls the pager (mailbox.py). The
addresses of an area that was released are a gap again when the pager has freed its pages.

Rules: any thread of the application may call Space. One call is made at a time (`_lock`). A signal
handler that calls Space during another call gets a RuntimeError. An allocator is called by the
garbage collector during anything, even during one of these methods. So it asks
can_be_called first. A signal handler may raise at any point. That may lose addresses, which are not
used again, with the pages there.

Forked children do not inherit the mapping (MADV_DONTFORK): without a userfaultfd they would read
holes as zeros, and fill them for the application too. A child maps the memfd anew, private, at the
same addresses. It registers the mapping with a userfaultfd of its own and sends that to the pager
(children.py). It reads the application's memory, with what the application writes there later. What
it writes is its own. It can't call Space. Touching the memory is a SIGSEGV where that does not
work: in a child's child, after a fork that Python does not see, when the program has closed EDM's
descriptor, and where RLIMIT_DATA or vm.overcommit_memory=2 allow less than all areas have.

A core dump leaves the space out (MADV_DONTDUMP): the kernel would try each page.

This module and its imports are all that a program under `edm run` has to carry, so it imports
little.
"""

from __future__ import annotations

import _socket
import _thread
import atexit
import bisect
import contextlib
import ctypes
import gc
import operator
import os
import posix  # os, without what a program puts there: a fork hook uses only this
import sys
from collections import deque
from collections.abc import Callable
from functools import cached_property, partial, wraps

from edm import mailbox
from edm import uffd_ctypes as u
from edm.lifeline import MAX_HELLO, closed_by, high, is_open, receive, send, tie, try_to_send
from edm.uffd_ctypes import PAGE_SIZE

# The program may replace builtins (unittest.mock). The functions of this module keep those of now.
__builtins__ = dict(__builtins__)

MAX_COMMAND = 1000  # characters of the command line that a report shows


def whole_pages(length: int) -> int:
    """This many bytes, rounded up to whole pages."""
    return -(-length // PAGE_SIZE) * PAGE_SIZE


def _locked(method: Callable[..., object]) -> Callable[..., object]:
    """Call this method with the lock. The `with` statement is on the lock itself: then no signal handler
    can raise between taking the lock and entering the block."""

    @wraps(method)
    def locked(self: Space, *args: object, **options: object) -> object:
        if self._lock._is_owned():
            raise RuntimeError("space: called by a signal handler, in the midst of another call")
        with self._lock:
            if self.is_over:
                raise RuntimeError("space: it has ended, or this is a forked process")
            return method(self, *args, **options)

    return locked


class Space:
    """A range of addresses whose memory is not limited by this machine's.

    Each method that calls the pager raises RuntimeError when the space has ended, in a forked process, and
    in a signal handler that interrupts another call.
    """

    def __init__(self, config: object, control: _socket.socket, instance: int, lasts: bool) -> None:
        """Map the space, send userfaultfd and memfd to the pager at the other end of the socket
        `control`, and wait until it serves. The socket is closed or taken over.

        config: an edm.Config. instance: this instance's number, from 0. lasts: the space lasts until
        the process ends, and nobody calls close.

        Raises ValueError if the range can't be mapped, OSError, and what the pager has raised.
        """
        self.start_addr, self.end_addr = config.start_addr, config.end_addr
        self.config, self.instance = config, instance
        self.is_over = False  # True when the space has been closed, and in a forked process
        self._lock = _thread.RLock()  # it knows whether this thread has it
        self._gaps = Gaps(self.start_addr, self.end_addr)
        self.lengths: dict[int, int] = {}  # address → length in bytes, whole pages, of each area
        self._views: dict[int, tuple[memoryview, int]] = {}  # id(view) → view, address
        # (number of the FREE, address, length): not a gap yet.
        self._freeing: deque[tuple[int, int, int]] = deque()
        with contextlib.ExitStack() as at_the_end, contextlib.ExitStack() as self._at_close:
            closed = partial(closed_by, at_the_end)
            _in_child.pop_all()  # of an earlier space
            # For a child that another thread forks meanwhile. Later the stack is empty.
            _in_child.callback(at_the_end.close)
            self._at_close.callback(control.close)
            memfd = closed(os.memfd_create("edm"))
            # The mailbox is behind the space. The pager sets the size of the memfd.
            length = self.end_addr - self.start_addr + mailbox.SIZE
            self._map(length, u.PROT_READ | u.PROT_WRITE, u.MAP_SHARED, memfd)
            self._at_close.callback(u.munmap, self.start_addr, length)
            self._mailbox = mailbox.Mailbox(self.end_addr)
            uffd, how = u.open_userfaultfd()
            lines = []
            if config.report:
                from edm.lines import tell_lines

                lines = tell_lines(self._at_close)
            tracks = self._register(u.Userfaultfd(closed(uffd)), config.clean_tracking)
            pagemap = closed(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
            title = f"EDM, INSTANCE_{instance}: {' '.join(sys.orig_argv[1:])[:MAX_COMMAND]}"
            ours = {"instance": instance, "pid": os.getpid(), "lines": lines, "title": title}
            # clean_tracking: the way that was found, not what is wanted
            hello = {**vars(config), "clean_tracking": tracks, **ours}
            # The pager may have refused already.
            try_to_send(control, hello, uffd, memfd, pagemap, *lines)
            # The answer stays in the socket, with two descriptors for forked children.
            if not (answer := control.recv(MAX_HELLO, _socket.MSG_PEEK)):
                raise ConnectionError("the pager has ended before it began")
            self._pager = mailbox.result(answer)  # its process id
            self._at_close = self._at_close.pop_all()  # it has not failed
            # The pager reads /proc/PID/syscall and mem. EINVAL: there is no Yama.
            with contextlib.suppress(OSError):
                u.prctl(u.PR_SET_PTRACER, self._pager)
            # True if read(2) and the like may fail, with EFAULT or EINTR, where they do not elsewhere.
            self.user_mode, listener = how == u.USER_MODE, []
            if self.user_mode:
                from edm import system_calls as calls  # root does not need it

                # EBUSY: EDM in EDM. EPERM, EINVAL, ENOSYS: a sandbox.
                with contextlib.suppress(OSError):
                    listener = [closed(calls.listener(self.start_addr, self.end_addr, lasts))]
                # MPICH reads another rank's memory, which fails on pages that are not here.
                if "PMI_RANK" in os.environ:
                    os.environ.setdefault("MPIR_CVAR_CH4_CMA_ENABLE", "0")
            send(control, "listener", *listener)  # system calls may be waiting for it already
        self._socket = closed_by(self._at_close, control.detach())
        self._socket_is = os.fstat(self._socket).st_ino
        _in_child.callback(self._forked)
        atexit.register(self._end)
        self._at_close.callback(atexit.unregister, self._end)

    # ------------------------------------------------------------ the API

    @_locked
    def mmap(self, length: int, addr: int | None = None, name: str = "") -> memoryview:
        """Map an area of length bytes, at addr or in the smallest gap that has room.

        Returns a writable memoryview of the bytes, which are zeros. With a kept disk they are as an
        earlier job has left them. The area takes whole pages and stays until munmap. name: what a
        report calls it. Raises ValueError for a length that is not positive, an addr that is not a
        multiple of PAGE_SIZE, and an area that leaves the space or overlaps another. Raises
        MemoryError when no addr is given and no gap is large enough, and TypeError for what is no
        integer. Source: mmap(2).
        """
        length = operator.index(length)
        if length <= 0:
            raise ValueError(f"length: {length} bytes; an area has at least one")
        whole = whole_pages(length)
        if addr is None:
            if not (gap := self._reclaim(partial(self._gaps.find, whole))):
                raise MemoryError(f"no gap of {whole} bytes; a larger end_addr makes room")
            addr = gap.start
        else:
            addr = operator.index(addr)
            self._pages(addr, whole)  # ValueError, if it leaves the space
            if not self._reclaim(partial(self._gaps.has, addr, whole)):
                raise ValueError(f"addr: the area {addr:#x}-{addr + whole:#x} overlaps another")
        self._take(addr, whole, str(name))
        view = memoryview((ctypes.c_ubyte * length).from_address(addr)).cast("B")
        self._views[id(view)] = view, addr
        return view

    @_locked
    def munmap(self, area: memoryview) -> None:
        """Unmap an area that mmap returned. Its bytes are gone, here and in the store.

        Raises ValueError if it is not such an area, and BufferError while something else uses it (a
        slice, a NumPy array); then nothing has changed. Source: munmap(2).
        """
        if id(area) not in self._views:
            raise ValueError("area: not one that mmap returned, or unmapped already")
        if _users(area) != _users(memoryview(b"")):
            raise BufferError("area: still in use, by a slice or an array made of it")
        area.release()  # BufferError if a buffer of it is exported at this moment
        _, addr = self._views.pop(id(area))
        self.release(addr)

    def sync(self) -> int:
        """Make everything written so far durable, without evicting it; how many pages were sent.

        When this returns, the disk (Config's disk and keep) has every page that was written before
        the call. After any crash, a job that resumes the disk finds these pages, or those of a
        later sync. A disk that is not kept only gets them. Raises OSError with the store's reason when it can't
        write. Source: fsync(2).
        """
        return self._call("sync")

    def areas(self) -> list[tuple[int, int]]:
        """The (address, length in bytes) of every area, by address."""
        return sorted(self.lengths.copy().items())  # a copy: another thread may change it meanwhile

    @_locked
    def locations(self, addr: int, length: int) -> list[str]:
        """Where each page of a range (bytes, whole pages) is: NEW, INSTANCE_n or DISK. A page that was only read is
        DISK when it has left.

        Raises ValueError for a range that is not of whole pages, or leaves the space.
        """
        here, most = f"INSTANCE_{self.instance}", mailbox.MAX_ANSWER
        page, count = self._pages(addr, length)
        # The range makes ints of NumPy's: the pager does not know these.
        firsts = range(page, page + count, most)
        parts = (self._mailbox.call("locations", at, min(most, firsts.stop - at)) for at in firsts)
        return [here if byte & 1 else "DISK" if byte else "NEW" for spt in parts for byte in spt]

    def figures(self) -> dict[str, object]:
        """What the pager has counted: faults, evictions, bytes, latencies. See pager.py."""
        return self._call("figures")

    # ------------------------------------------------------------ for advice.py

    @_locked
    def advise(self, what: str, ranges: list[tuple[int, int]]) -> None:
        """Ask the pager to "prefetch" or "forget" these ranges (address, bytes), which are whole pages."""
        runs = [self._pages(*each) for each in ranges]
        for at in range(0, len(runs), mailbox.RUNS):
            self._mailbox.ask(what, runs[at : at + mailbox.RUNS])

    # ------------------------------------------------------------ for an allocator

    def can_be_called(self) -> bool:
        """False during a call of this thread, in a forked process, and after close."""
        return not self.is_over and not self._lock._is_owned()

    @_locked
    def allocate(self, length: int, name: str, grows: bool = False) -> int:
        """Map an area of length bytes, zeros, at the end of the smallest gap that has room.

        Returns its address, or 0 when no gap is large enough. An exception is always a signal handler's.
        grows: in the middle of the largest gap, so that this area and others have room to grow.
        """
        whole = whole_pages(length)
        # On a kept disk a small gap may be an area of an earlier job, which mmap will map again.
        if not (gap := self._reclaim(partial(self._gaps.find, whole, self.config.keep or grows))):
            return 0
        addresses = range(gap.start, gap.stop - whole + 1, PAGE_SIZE)
        addr = addresses[len(addresses) // 2 if grows else -1]
        if self.config.keep:
            self._mailbox.call("free", *self._pages(addr, whole))
        self._take(addr, whole, name)
        return addr

    @_locked
    def grow(self, addr: int, length: int) -> bool:
        """Make the area that allocate has mapped there length bytes long; what is new is zeros.

        False, and nothing has changed, where the addresses behind it are not free, and with a kept
        disk, which may have other bytes there.
        """
        had, whole = self.lengths[addr], whole_pages(length)
        if self.config.keep or not self._gaps.has(addr + had, whole - had):
            return False
        self._take(addr, whole, had=had)
        return True

    def arrays(self) -> int:
        """How many areas allocate has mapped that release has not freed."""
        return len(self.lengths) - len(self._views)

    def release(self, addr: int) -> None:
        """Free the area that is mapped there. This does not wait for the pager, unless the mailbox is full."""
        with self._lock:  # munmap has it already
            whole = self.lengths.pop(addr)
            if not self.is_over:  # another thread may have called close meanwhile
                number = self._mailbox.ask("free", *self._pages(addr, whole))
                self._freeing.append((number, addr, whole))

    # ------------------------------------------------------------ beginning and end

    def _map(self, length: int, prot: int, flags: int, memfd: int) -> None:
        """Map so many bytes of the memfd at start_addr. Raises ValueError if they can't be there."""
        try:
            u.mmap(self.start_addr, length, prot, flags | u.MAP_FIXED_NOREPLACE, memfd)
        except (FileExistsError, PermissionError) as error:  # the latter: below vm.mmap_min_addr
            where = f"start_addr, end_addr: {self.start_addr:#x}-{self.start_addr + length:#x}"
            why = f"overlaps what is mapped, or can't be mapped: {error.strerror}"
            raise ValueError(f"{where} {why}; choose other addresses") from None
        u.madvise(self.start_addr, length, u.MADV_DONTFORK)
        u.madvise(self.start_addr, length, u.MADV_DONTDUMP)
        # Punching a part of a huge page clears bytes that a pipe refers to. EINVAL: this kernel makes none.
        with contextlib.suppress(OSError):
            u.madvise(self.start_addr, length, u.MADV_NOHUGEPAGE)

    def _register(self, uffd: u.Userfaultfd, wanted: str) -> str:
        """Enable the features that are needed, and register the space.

        Returns how first writes are noticed: "async", "events", or "" if they are not. Raises
        ValueError if the kernel lacks a feature.
        """
        wp = u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        # With "none", pages get no uffd-wp bit. But without the feature the kernel maps neighbours of a page
        # that is touched (fault-around), and they would count as used.
        ways = ("async", wp | u.UFFD_FEATURE_WP_ASYNC), ("events", wp), ("none", wp), ("none", 0)
        for way, features in ways:
            if wanted in (way, "auto") and uffd.api(u.NEEDED_FEATURES | features):
                uffd.register(self.start_addr, self.end_addr - self.start_addr, bool(features))
                return "" if way == "none" else way
        lacks = "this kernel's userfaultfd lacks something; see: python -m edm doctor"
        raise ValueError(f"clean_tracking: for {wanted!r} {lacks}")

    def _end(self) -> None:
        """At the interpreter's end, wait until the pager has printed everything: the shell's prompt comes
        next. If it can't sync a kept disk, the status is 2."""
        # A table comes after the program's output. If this fails, Python tries again, and reports the error.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        # RuntimeError: the space has ended, or a signal handler exits during a call
        with contextlib.suppress(RuntimeError):
            try:
                self._call("end")
            except OSError:  # the pager prints why
                os._exit(2)

    @_locked
    def close(self) -> None:
        """End the space and its pager. Nothing may use an area any more. A kept disk is synced; raises OSError
        if it can't be."""
        with self._at_close:  # a signal handler may raise at any point
            try:
                self._mailbox.call("end")
            finally:
                self.is_over = True
                self._mailbox.ask("close")
                while is_open(self._socket, self._socket_is) and os.read(self._socket, 1):
                    pass  # the answer to HELLO; then nothing, as the pager has ended

    # ------------------------------------------------------------ forked children

    def _forked(self) -> None:
        """In a process that the application has forked: map its memory, if possible."""
        self.is_over = True
        self._lock = _thread.RLock()  # the thread that had it is not in this process
        if is_open(self._socket, self._socket_is):
            control = _socket.socket(fileno=self._socket)
            with contextlib.closing(control), contextlib.suppress(OSError, ValueError):
                self._map_privately(control)
                u.prctl(u.PR_SET_PTRACER, self._pager)  # as in __init__

    def _map_privately(self, control: _socket.socket) -> None:
        """Map the space so that what is written is this process's own.

        Raises OSError or ValueError if that fails. Then touching the space is a SIGSEGV.
        """
        length = self.end_addr - self.start_addr
        with contextlib.ExitStack() as at_the_end, contextlib.ExitStack() as if_it_fails:
            memfd, _ = (closed_by(at_the_end, fd) for fd in receive(control, _socket.MSG_PEEK)[1])
            process = closed_by(at_the_end, posix.pidfd_open(posix.getpid()))
            uffd = closed_by(if_it_fails, high(u.open_userfaultfd()[0]))
            ours, pagers_end = tie(posix.getpid())
            closed_by(at_the_end, pagers_end)
            closed_by(if_it_fails, ours)
            # PROT_NONE: reading a page before it is registered, in a signal handler, would fill the
            # memfd.
            self._map(length, u.PROT_NONE, u.MAP_PRIVATE | u.MAP_NORESERVE, memfd)
            self._register(u.Userfaultfd(uffd), "none")
            # The userfaultfd and the lifeline stay open: the pager may die before it reads this.
            send(control, "child", process, uffd, ours, pagers_end)
            if_it_fails.pop_all()  # it has not failed
        try:
            u.mprotect(self.start_addr, length, u.PROT_READ | u.PROT_WRITE)
        except OSError:
            # ENOMEM: RLIMIT_DATA, and vm.overcommit_memory=2, count all that is writable.
            for addr, whole in self.lengths.copy().items():
                u.mprotect(addr, whole, u.PROT_READ | u.PROT_WRITE)

    # ------------------------------------------------------------ the areas

    def _reclaim(self, found: Callable[[], range | bool | None]) -> range | bool | None:
        """Make gaps of what was released and is free now, and return what is found() there. Wait for more
        of that while nothing is found."""
        while self._freeing and (self._mailbox.is_done(self._freeing[0][0]) or not found()):
            number, addr, whole = self._freeing[0]
            self._mailbox.wait_until_done(number)
            self._freeing.popleft()
            self._gaps.flip(addr, whole)
        return found()

    def _take(self, addr: int, whole: int, name: str = "", had: int = 0) -> None:
        """Make these bytes an area, or the area larger that has `had` of them."""
        self._gaps.flip(addr + had, whole - had)
        self.lengths[addr] = whole
        self._mailbox.ask("mapped", *self._pages(addr, whole), name[-mailbox.MAX_NAME :])

    def _pages(self, addr: int, length: int) -> tuple[int, int]:
        """A range in bytes as (first page, count of pages). Raises ValueError unless it is whole pages of the space."""
        start, end = self.start_addr, self.end_addr
        if (addr | length) % PAGE_SIZE or not start <= addr <= addr + length <= end:
            wrong = f"is no multiple of PAGE_SIZE, or leaves the space {start:#x}-{end:#x}"
            raise ValueError(f"addr: the area {addr:#x}-{addr + length:#x} {wrong}")
        return (addr - start) // PAGE_SIZE, length // PAGE_SIZE

    @_locked
    def _call(self, what: str) -> object:
        return self._mailbox.call(what)


class Gaps:
    """The parts of the space that no area has, as ranges of addresses. Lengths are bytes.

    Every method takes a few bisections, however many gaps there are. A signal handler may raise
    between any two bytecodes: the list by address changes in one step, and the list by length is
    made anew by the next call, if a change was interrupted.
    """

    def __init__(self, start: int, end: int) -> None:
        # By address, where a gap begins, where it ends, where the next one begins, ...
        self._edges = [start, end]

    def find(self, length: int, largest: bool = False) -> range | None:
        """The smallest gap that has so many bytes, or the largest one."""
        index = bisect.bisect(self._lengths, (length,))
        if index == len(self._lengths):
            return None
        length, start = self._lengths[-1 if largest else index]
        return range(start, start + length)

    def has(self, addr: int, length: int) -> bool:
        """Are all these bytes in one gap?"""
        index = bisect.bisect(self._edges, addr)
        return index % 2 == 1 and addr + length <= self._edges[index]

    def flip(self, addr: int, length: int) -> None:
        """An area gets these bytes, all of which are in one gap; or an area gives all of them back."""
        lengths, ends = self._lengths, (addr, addr + length)
        del self._lengths
        # What is an edge already is none any more. The slice is of whole gaps.
        first = bisect.bisect_left(self._edges, ends[0]) // 2 * 2
        last = (bisect.bisect(self._edges, ends[1]) + 1) // 2 * 2
        old = self._edges[first:last]
        new = self._edges[first:last] = sorted(set(ends).symmetric_difference(old))
        for start, end in zip(old[::2], old[1::2], strict=True):
            del lengths[bisect.bisect_left(lengths, (end - start, start))]
        for start, end in zip(new[::2], new[1::2], strict=True):
            bisect.insort(lengths, (end - start, start))
        self._lengths = lengths

    @cached_property
    def _lengths(self) -> list[tuple[int, int]]:
        """(length, start) of each gap, by length."""
        gaps = zip(self._edges[::2], self._edges[1::2], strict=True)
        return sorted((end - start, start) for start, end in gaps)


_in_child = contextlib.ExitStack()  # what a forked process does first
# Else a signal handler might touch the memory in a child that has not mapped it yet. The last hook is
# no Python code, so what a handler raises then comes to the program.
os.register_at_fork(before=u.block_signals, after_in_child=_in_child.close)
os.register_at_fork(after_in_parent=u.restore_signals, after_in_child=u.restore_signals)


def _users(view: memoryview) -> int:
    """The reference count of what this view shares with its slices and arrays, in CPython."""
    return sys.getrefcount(gc.get_referents(view)[0])
