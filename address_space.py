"""Space: what the application sees of EDM, in a process of its own.

In the picture: the box on the left. A Python thread that takes a page fault sleeps in the kernel
holding the GIL, so whoever resolves its faults must be another process: the pager (pager.py), which
is this one's parent. This process makes the userfaultfd and the memfd and hands them to the pager;
from then on it just touches memory.

Interface: for the application, Space: mmap, munmap, sync, and to look at itself: areas,
locations, figures. For numpy_mem_handler.py: allocate and release. For edm.py: Space.open makes
everything ready, before the application runs.

The memory: one memfd, as long as the space. An area is a part of it, mapped shared at its own
address and registered with userfaultfd for MISSING and WP faults. The rest of the space is mapped
PROT_NONE, so that nothing else of the process ever lands in it.

Rules: any thread of the application may call Space; one call to the pager at a time (`_lock`). A
signal handler that calls it in the midst of another call gets a RuntimeError. An allocator is called
in the midst of anything, even of one of these methods, by a garbage collection: so allocate gives up
rather than wait for its own thread, and release leaves it to that. A process that the application
forks has none of the areas (MADV_DONTFORK: touching one is a SIGSEGV) and no way to reach the pager:
it can't damage the memory.

The control socket (a SOCK_SEQPACKET pair) carries one request, CALL and for a new area its name, at a
time and its answer, ANSWER and what belongs to it. RELEASE has no answer.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import gc
import json
import mmap as mmap_module
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple

from edm import log
from edm import uffd_ctypes as u
from edm.messages import location
from edm.page_idle import TlbFlush
from edm.uffd_ctypes import PAGE_SIZE

CALL = Struct("=BQQQ")  # what, the call's number, first page, count of pages
ANSWER = Struct("=Qi")  # the call's number; 0, or an errno and then a text
MMAP, ALLOCATE, MUNMAP, RELEASE, LOCATIONS, FIGURES, SYNC = range(7)
MAX_NAME = 200  # bytes of an area's name
MAX_LOCATIONS = 1 << 15  # pages in one LOCATIONS, as a packet must fit the socket's buffer
SCRATCH = Struct("=Q")  # sent with the three descriptors: where the scratch area is

_FORKED = "this process was forked by the application, and has no EDM memory"
_USER_MODE_ONLY = (
    "edm: this user may have userfaultfd for user mode only, so system calls fail with EFAULT (Bad "
    "address) on a page that is not here; sudo sysctl vm.unprivileged_userfaultfd=1 changes that"
)


class Descriptors(NamedTuple):
    """What Space.open sends to the pager."""

    scratch: int  # the address of the scratch area, see page_idle.TlbFlush
    fds: list[int]  # userfaultfd, memfd, /proc/self/pagemap

    @classmethod
    def receive(cls, control: socket.socket) -> Descriptors:
        """Wait for them. Raises the ValueError or OSError that Space.open failed of."""
        packet, fds, _, _ = socket.recv_fds(control, 4096, 3)
        if not packet:
            raise ConnectionError("the application process ended before it began")
        if not fds:
            kind, arguments = json.loads(packet)
            raise {"ValueError": ValueError, "OSError": OSError}[kind](*arguments)
        (scratch,) = SCRATCH.unpack(packet)
        return cls(scratch, fds)


def whole_pages(length: int) -> int:
    """So many bytes, made whole pages."""
    return -(-length // PAGE_SIZE) * PAGE_SIZE


class Space:
    """A range of addresses whose memory is not limited by this machine's."""

    def __init__(
        self,
        start_addr: int,
        end_addr: int,
        resident_limit: int,
        instance: int,
        control: socket.socket,
    ) -> None:
        """Use open() instead."""
        self.instance = instance  # this instance's number, from 0
        self.resident_limit = resident_limit  # bytes
        self.start_addr = start_addr
        self.end_addr = end_addr
        self._control = control
        self.user_mode_only = False  # do system calls fail with EFAULT on a page that is not here?
        self._lock = threading.RLock()  # never taken twice: to be asked whether this thread has it
        self._released: deque[int] = deque()  # areas that are to be unmapped when nobody holds it
        self._areas: list[tuple[int, int]] = []  # (address, length in bytes), sorted
        self._lengths: dict[int, int] = {}  # the same, to be asked without the lock
        self._views: dict[int, tuple[memoryview, int, int]] = {}  # id(view) → view, users, address
        self._uffd = self._scratch = None
        self._memfd = -1
        self._calls = 0  # to the pager, so far
        os.register_at_fork(after_in_child=self._forked)

    # ------------------------------------------------------------ the API

    def mmap(self, length: int, addr: int | None = None, name: str = "") -> memoryview:
        """Map an area of length bytes: at addr, or where there is room. Its pages read as zeros.

        Returns a writable memoryview of the bytes. The area takes whole pages, and stays until
        munmap. name: what a report calls it. Raises ValueError for a length that is not positive,
        an addr that is not a multiple of PAGE_SIZE, and an area that leaves the space or overlaps
        another; MemoryError when no addr is given and the space has no gap that is large enough.
        Source: mmap(2).
        """
        if self.is_forked:
            raise RuntimeError(_FORKED)
        if length <= 0:
            raise ValueError(f"length: {length} bytes; an area has at least one")
        whole = whole_pages(length)
        with self._locked():
            addr = self._gap(whole) if addr is None else self._check(addr, whole)
            self._map(addr, whole, MMAP, name)
            view = memoryview((ctypes.c_ubyte * length).from_address(addr)).cast("B")
            self._views[id(view)] = (view, _users(view), addr)
            return view

    def munmap(self, area: memoryview) -> None:
        """Unmap an area that mmap returned. Its bytes are gone, here and on the DMS.

        Raises ValueError if it is no such area, and BufferError while anything else (a slice, a
        NumPy array) still uses it; then nothing was changed. Raises OSError with the DMS's reason
        if it can't forget them, which only a kept disk may not: the area can't be used any more,
        but its bytes stay, and this can be called again. Source: munmap(2).
        """
        with self._locked():
            view, users, addr = self._views.get(id(area), (None, 0, 0))
            if view is None:
                raise ValueError("area: not one that mmap returned, or unmapped already")
            if _users(area) != users:
                raise BufferError("area: still in use, by a slice or an array made of it")
            area.release()  # BufferError, if a buffer of it is in use this moment
            self._unmap(addr)
            # If the DMS refuses, the bytes are still there: nothing else may be mapped over them.
            self._call(MUNMAP, addr - self.start_addr, self._lengths[addr])
            del self._views[id(area)]
            self._forget(addr)

    def sync(self) -> int:
        """Make everything written so far durable, without evicting it; how many pages were sent.

        When this returns, the disk (Config's disk and keep) holds every page that was written
        before it was called, and a job that resumes it after any crash finds them so, or as a
        later sync has left them. Raises OSError with the DMS's reason when it can't write.
        Source: fsync(2).
        """
        with self._locked():
            return int(self._call(SYNC, 0, 0))

    def areas(self) -> list[tuple[int, int]]:
        """The (address, length in bytes) of every area, by address."""
        with self._locked():
            return list(self._areas)

    def locations(self, addr: int, length: int) -> list[str]:
        """Where each page of a range (bytes, whole pages) is: NEW, INSTANCE_n or DISK.

        This is what the DMS's SPT says.
        """
        spt = b""
        with self._locked():
            for at in range(addr, addr + length, MAX_LOCATIONS * PAGE_SIZE):
                part = min(MAX_LOCATIONS * PAGE_SIZE, addr + length - at)
                spt += self._call(LOCATIONS, at - self.start_addr, part)
        return [location(byte, self.instance) for byte in spt]

    def figures(self) -> dict[str, object]:
        """What the pager has counted: faults, evictions, bytes, latencies (see pager.py)."""
        with self._locked():
            return json.loads(self._call(FIGURES, 0, 0))

    # ------------------------------------------------------------ for an allocator

    @property
    def is_forked(self) -> bool:
        """Was this process forked by the application? Then it has none of the areas."""
        return self._control is None

    def allocate(self, length: int, name: str) -> int:
        """Map an area of length bytes, zeros, near the end of the space; its address.

        0 if this thread is in the midst of another call, or this process was forked. Raises
        MemoryError when the space has no gap that is large enough.
        """
        if self.is_forked or self._lock._is_owned():
            return 0
        whole = whole_pages(length)
        with self._locked():
            addr = self._gap(whole, from_end=True)
            self._map(addr, whole, ALLOCATE, name)
            return addr

    def allocated(self, addr: int) -> int:
        """How many bytes (whole pages) the area at this address has."""
        return self._lengths[addr]

    def release(self, addr: int) -> None:
        """Unmap what allocate has mapped there: now, or when the call that is under way has ended."""
        if not self.is_forked:
            self._released.append(addr)
            self._unmap_released()

    # ------------------------------------------------------------ getting ready

    @classmethod
    def open(
        cls,
        start_addr: int,
        end_addr: int,
        resident_limit: int,
        instance: int,
        control: socket.socket,
    ) -> Space | None:
        """Reserve the space, make userfaultfd and memfd, and send them to the pager.

        If that can't be done, None; the pager is then sent the reason and raises it: ValueError if
        the range can't be had, OSError if userfaultfd can't.
        """
        space = cls(start_addr, end_addr, resident_limit, instance, control)
        try:
            space._reserve(start_addr, end_addr - start_addr, u.MAP_FIXED_NOREPLACE)
            space._make_descriptors()
        except ValueError as error:
            control.send(json.dumps(["ValueError", [str(error)]]).encode())
            return None
        except OSError as error:
            control.send(json.dumps(["OSError", [error.errno, error.strerror]]).encode())
            return None
        return space

    def _make_descriptors(self) -> None:
        supported = u.supported_features()
        missing = u.NEEDED_FEATURES & ~supported
        if missing:
            raise OSError(
                errno.ENOSYS,
                f"userfaultfd: this kernel ({os.uname().release}) lacks features {missing:#x}; "
                "EDM needs Linux 5.19 or later, with CONFIG_USERFAULTFD",
            )
        fd, how = u.open_userfaultfd()
        log.logger("EDM CLIENT").info("userfaultfd permitted by: %s", how)
        self.user_mode_only = how == u.USER_MODE
        if self.user_mode_only:
            sys.excepthook = _explained(sys.excepthook)
            threading.excepthook = _explained(threading.excepthook)
        self._uffd = u.Userfaultfd(fd)
        self._uffd.api(u.NEEDED_FEATURES | supported & u.UFFD_FEATURE_POISON)
        # The memfd has a scratch area behind the space, for page_idle.TlbFlush.
        length, scratch = self.end_addr - self.start_addr, TlbFlush.PAGES * PAGE_SIZE
        self._memfd = os.memfd_create("edm")
        os.ftruncate(self._memfd, length + scratch)
        self._scratch = mmap_module.mmap(self._memfd, scratch, offset=length)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        self._uffd.register(address, scratch)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        socket.send_fds(self._control, [SCRATCH.pack(address)], [fd, self._memfd, pagemap])
        os.close(pagemap)

    def _reserve(self, addr: int, length: int, fixed: int) -> None:
        flags = u.MAP_PRIVATE | u.MAP_ANONYMOUS | u.MAP_NORESERVE | fixed
        try:
            u.mmap_fixed(addr, length, u.PROT_NONE, flags)
        except OSError as error:
            at = f"start_addr, end_addr: the range {addr:#x}-{addr + length:#x}"
            if error.errno == errno.EEXIST:
                found = _mappings(addr, addr + length)
                there = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
                raise ValueError(
                    f"{at} overlaps what this process has there: {there}; choose another range"
                ) from None
            raise ValueError(f"{at} can't be mapped ({error.strerror}); choose another") from None

    # ------------------------------------------------------------ within

    def _check(self, addr: int, whole: int) -> int:
        if addr % PAGE_SIZE:
            raise ValueError(f"addr: {addr:#x} is not a multiple of PAGE_SIZE, {PAGE_SIZE:#x}")
        if not self.start_addr <= addr <= addr + whole <= self.end_addr:
            raise ValueError(
                f"addr: the area {addr:#x}-{addr + whole:#x} leaves the space "
                f"{self.start_addr:#x}-{self.end_addr:#x}"
            )
        after = bisect.bisect_left(self._areas, (addr + whole, 0))
        if after and sum(self._areas[after - 1]) > addr:
            other, length = self._areas[after - 1]
            raise ValueError(
                f"addr: the area {addr:#x}-{addr + whole:#x} overlaps "
                f"the area {other:#x}-{other + length:#x}"
            )
        return addr

    def _gap(self, whole: int, from_end: bool = False) -> int:
        """The lowest address with room for whole bytes; or the highest."""
        if from_end:
            end = self.end_addr
            for addr, length in reversed(self._areas):
                if end - addr - length >= whole:
                    break
                end = addr
            if end - self.start_addr >= whole:
                return end - whole
        else:
            at = self.start_addr
            for addr, length in self._areas:
                if addr - at >= whole:
                    break
                at = addr + length
            if self.end_addr - at >= whole:
                return at
        raise MemoryError(
            f"no gap of {whole} bytes in the space {self.start_addr:#x}-{self.end_addr:#x}; "
            "a larger end_addr makes room"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock._is_owned():
            raise RuntimeError("space: called by a signal handler, in the midst of another call")
        try:
            with self._lock:
                yield
        finally:
            self._unmap_released()

    def _map(self, addr: int, whole: int, what: int, name: str) -> None:
        """Locked. Map whole bytes at addr, where nothing is."""
        offset = addr - self.start_addr
        flags = u.MAP_SHARED | u.MAP_FIXED
        # First, as a signal handler may raise at any point of this: so nothing else is mapped there.
        bisect.insort(self._areas, (addr, whole))
        self._lengths[addr] = whole
        try:
            u.mmap_fixed(addr, whole, u.PROT_READ | u.PROT_WRITE, flags, self._memfd, offset)
            u.madvise(addr, whole, u.MADV_DONTFORK)
            self._uffd.register(addr, whole)
            self._call(what, offset, whole, name.encode(errors="replace")[:MAX_NAME])
        except OSError:
            self._forget(addr)
            raise

    def _unmap(self, addr: int) -> None:
        """Locked. Unmap the area at addr: no fault of its pages can come while the pager, which is
        told after this, frees them. Raises ValueError if that can't be done."""
        self._reserve(addr, self._lengths[addr], u.MAP_FIXED)

    def _forget(self, addr: int) -> None:
        self._areas.remove((addr, self._lengths[addr]))
        del self._lengths[addr]

    def _unmap_released(self) -> None:
        # Whoever holds the lock comes by here after it. The pager takes requests in order: a later
        # allocate at the same address is answered when this is done. A signal handler may raise at
        # any point: then the pager is told once more, or the address is never used again. It is not
        # either if it can't be unmapped; but its pages are freed.
        if not self._released or self._lock._is_owned():
            return
        with self._lock:
            while self._released:
                addr = self._released[0]
                unmapped = True
                try:
                    self._unmap(addr)
                except ValueError:  # the kernel has no more mappings for us (vm.max_map_count)
                    unmapped = False
                self._ask(RELEASE, addr - self.start_addr, self._lengths[addr])
                self._released.popleft()
                if unmapped:
                    self._forget(addr)

    def _call(self, what: int, offset: int, length: int, name: bytes = b"") -> bytes:
        """Locked. Ask the pager, for a range in bytes from start_addr."""
        self._ask(what, offset, length, name)
        number = 0
        while number != self._calls:  # those of calls that a signal handler has left are skipped
            answer = self._control.recv(1 << 17)
            if not answer:
                raise ConnectionError("the pager has ended")
            number, error = ANSWER.unpack_from(answer)
        if error:
            raise OSError(error, answer[ANSWER.size :].decode())
        return answer[ANSWER.size :]

    def _ask(self, what: int, offset: int, length: int, name: bytes = b"") -> None:
        if self.is_forked:
            raise RuntimeError(_FORKED)
        self._calls += 1
        call = CALL.pack(what, self._calls, offset // PAGE_SIZE, length // PAGE_SIZE)
        self._control.send(call + name)

    def _forked(self) -> None:
        """In a process that the application forked: let go of everything that reaches the pager."""
        self._lock = threading.RLock()
        self._released.clear()
        if self._control is not None:
            self._control.close()
        self._control = None
        if self._uffd is not None:
            os.close(self._uffd.fd)
            os.close(self._memfd)
        self._uffd, self._memfd = None, -1


def _explained(hook: Callable[..., None]) -> Callable[..., None]:
    """sys.excepthook or threading.excepthook, with a word behind the first EFAULT, or what may be
    one (NumPy's OSErrors have no errno)."""

    def explained(*args: object) -> None:
        global _USER_MODE_ONLY
        hook(*args)
        error = args[1] if len(args) == 3 else args[0].exc_value
        maybe = isinstance(error, OSError) and error.errno in (errno.EFAULT, None)
        if maybe and _USER_MODE_ONLY:
            print(_USER_MODE_ONLY, file=sys.stderr)
            _USER_MODE_ONLY = ""

    return explained


def _users(view: memoryview) -> int:
    """How many references the buffer has that this view, its slices and arrays of it all share.

    CPython keeps it in one object for all of them, which gc can show.
    """
    return sys.getrefcount(gc.get_referents(view)[0])


def _mappings(start: int, end: int) -> list[str]:
    """The mappings of this process that overlap a range, as /proc/self/maps names them."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, _, _, _, *name = line.split()
            low, high = (int(x, 16) for x in span.split("-"))
            if low < end and high > start:
                found.append(" ".join([span, *name]))
    return found
