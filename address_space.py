"""Space: what the application sees of EDM, in its own process.

In the picture: the box on the left. A Python thread that takes a page fault sleeps in the kernel
holding the GIL, so whoever resolves its faults must be another process: the pager (pager.py). This
process makes the userfaultfd and the memfd and hands them to the pager; from then on it just touches
memory.

Interface: for the application, Space: mmap, munmap, sync, and to look at itself: areas, locations,
figures. For numpy_mem_handler.py: allocate, allocated and release. For edm.py: Space makes everything
ready, close ends it; spawn_pager starts a pager on this machine. For pager.py: the messages.

The memory: one memfd as long as the space, mapped shared, whole, at start_addr, and registered once
with userfaultfd. Areas are bookkeeping of this process: mapping one calls nobody but tells the pager,
which reads ahead within areas only. Freeing one makes its pages NEW, here and in the store. So
touching an area after munmap gives zeros, or the next area's bytes; it is not caught.

Behind the space, the memfd has the mailbox by which this process calls the pager. The addresses of an
area that was freed are used again when the pager has said there that its pages are.

Rules: any thread of the application may call Space; one call that is answered at a time (`_lock`). A
signal handler that calls it in the midst of another call gets a RuntimeError. An allocator is called
in the midst of anything, even of one of these methods, by a garbage collection: so allocate gives up
rather than wait for its own thread, and release leaves it to that. A process that the application
forks has no space (MADV_DONTFORK: touching it is a SIGSEGV) and can't reach the pager.

This module, and what it imports, is all that a program under `edm run` gets to carry: it imports
little.

A socket pair carries the first message to the pager, with the descriptors and HELLO's dictionary, and
its answer; then it is closed. Calls go by mailbox.py. So all that is open in the application is the
read end of one pipe, its lifeline.
"""

from __future__ import annotations

import _socket
import _thread
import array
import atexit
import bisect
import ctypes
import errno
import fcntl
import gc
import marshal
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import wraps

from edm import mailbox as m
from edm import uffd_ctypes as u
from edm.uffd_ctypes import PAGE_SIZE

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

MAX_LOCATIONS = 1 << 15  # pages in one LOCATIONS, as an answer must fit the mailbox
MAX_HELLO = 1 << 17  # bytes
HIGH = 512  # a descriptor's number
FREES = 1e-4  # seconds between two looks whether the pager has freed what is to be used again

TRACKING = ("auto", "async", "events", "none")  # how first writes are noticed, see uffd_ctypes
SIGKILL = 9  # signal.SIGKILL, without importing signal

_FORKED = "this process was forked by the application, and has no EDM memory"
_USER_MODE_ONLY = (
    "edm: this user may have userfaultfd for user mode only, so system calls fail with EFAULT (Bad "
    "address) on a page that is not here; sudo sysctl vm.unprivileged_userfaultfd=1 changes that\n"
)

_INT = array.array("i").itemsize


def whole_pages(length: int) -> int:
    """So many bytes, made whole pages."""
    return -(-length // PAGE_SIZE) * PAGE_SIZE


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Call this method with the lock. A signal handler may raise at any point: a `with` statement on
    the lock itself is what that can't come between."""

    @wraps(method)
    def locked(self: Space, *args: Any, **options: Any) -> Any:
        if self._lock._is_owned():
            raise RuntimeError("space: called by a signal handler, in the midst of another call")
        try:
            with self._lock:
                return method(self, *args, **options)
        finally:
            self._free_released()

    return locked


class Space:
    """A range of addresses whose memory is not limited by this machine's."""

    def __init__(self, config: Any, control: Any, instance: int = 0) -> None:
        """Reserve the space, make userfaultfd and memfd, and send them to the pager on the other end
        of the socket `control`, a _socket.socket, which is closed; wait until it serves.

        Raises ValueError if the range can't be had, and what the pager raised.
        """
        self.start_addr, self.end_addr = config.start_addr, config.end_addr
        self.resident_limit = config.high_threshold * PAGE_SIZE  # bytes
        self.instance = instance  # this instance's number, from 0
        self.user_mode_only = False  # do system calls fail with EFAULT on a page that is not here?
        self.is_forked = False  # was this process forked by the application?
        self._lock = _thread.RLock()  # never taken twice: to be asked whether this thread has it
        self._released: deque[int] = deque()  # areas to be freed when nobody has the lock
        self._lengths: dict[int, int] = {}  # address → length in bytes, of each area
        self._gaps = [(self.start_addr, self.end_addr - self.start_addr)]  # between them, sorted
        self._freeing: deque[tuple[int, int, int]] = deque()  # (call, address, length): not yet
        self._views: dict[int, tuple[memoryview, int, int]] = {}  # id(view) → view, users, address
        self._waits_for = 0  # the call whose answer is to be waited for before the next one
        try:
            memfd = self._map()
            try:
                self._say_hello(config, control, memfd)
            except BaseException:
                self._unmap()
                raise
            finally:
                os.close(memfd)
        finally:
            control.close()
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self._end)

    # ------------------------------------------------------------ the API

    @_locked
    def mmap(self, length: int, addr: int | None = None, name: str = "") -> memoryview:
        """Map an area of length bytes: at addr, or where there is room. Its pages read as zeros.

        Returns a writable memoryview of the bytes. The area takes whole pages, and stays until
        munmap. With a kept disk its pages are as an earlier job has left them. name: what a report
        calls it. Raises ValueError for a length that is not positive, an addr that is not a multiple
        of PAGE_SIZE, and an area that leaves the space or overlaps another; MemoryError when no
        addr is given and the space has no gap that is large enough. Source: mmap(2).
        """
        if self.is_forked:
            raise RuntimeError(_FORKED)
        if length <= 0:
            raise ValueError(f"length: {length} bytes; an area has at least one")
        whole = whole_pages(length)
        addr = self._gap(whole) if addr is None else self._check(addr, whole)
        self._take(addr, whole, name)
        view = memoryview((ctypes.c_ubyte * length).from_address(addr)).cast("B")
        self._views[id(view)] = (view, _users(view), addr)
        return view

    @_locked
    def munmap(self, area: memoryview) -> None:
        """Unmap an area that mmap returned. Its bytes are gone, here and in the store.

        Raises ValueError if it is no such area, and BufferError while anything else (a slice, a
        NumPy array) still uses it; then nothing was changed. Raises OSError with the store's reason
        if it can't forget them, which only a kept disk may not: the area can't be used any more,
        but its bytes stay, and this can be called again. Source: munmap(2).
        """
        view, users, addr = self._views.get(id(area), (None, 0, 0))
        if view is None:
            raise ValueError("area: not one that mmap returned, or unmapped already")
        if _users(area) != users:
            raise BufferError("area: still in use, by a slice or an array made of it")
        area.release()  # BufferError, if a buffer of it is in use this moment
        # If the store refuses, the bytes are still there: nothing else may be mapped over them.
        self._call(m.FREE, addr, self._lengths[addr])
        del self._views[id(area)]
        self._give_back(addr, self._lengths.pop(addr))

    def sync(self) -> int:
        """Make everything written so far durable, without evicting it; how many pages were sent.

        When this returns, the disk (Config's disk and keep) holds every page that was written
        before it was called, and a job that resumes it after any crash finds them so, or as a
        later sync has left them. Raises OSError with the store's reason when it can't write.
        Source: fsync(2).
        """
        return int(self._call_locked(m.SYNC))

    @_locked
    def areas(self) -> list[tuple[int, int]]:
        """The (address, length in bytes) of every area, by address."""
        return sorted(self._lengths.items())

    @_locked
    def locations(self, addr: int, length: int) -> list[str]:
        """Where each page of a range (bytes, whole pages) is: NEW, INSTANCE_n or DISK.

        This is what the store's SPT says.
        """
        spt = b""
        for at in range(addr, addr + length, MAX_LOCATIONS * PAGE_SIZE):
            spt += self._call(m.LOCATIONS, at, min(MAX_LOCATIONS * PAGE_SIZE, addr + length - at))
        here = f"INSTANCE_{self.instance}"
        return [here if byte & 1 else "DISK" if byte else "NEW" for byte in spt]

    def figures(self) -> dict[str, Any]:
        """What the pager has counted: faults, evictions, bytes, latencies (see pager.py)."""
        return marshal.loads(self._call_locked(m.FIGURES))

    # ------------------------------------------------------------ for an allocator

    def allocate(self, length: int, name: str) -> int:
        """Map an area of length bytes, zeros, near the end of the space; its address.

        0 if this thread is in the midst of another call, or this process was forked. Raises
        MemoryError when the space has no gap that is large enough.
        """
        if self.is_forked or self._lock._is_owned():
            return 0
        return self._allocate(whole_pages(length), name)

    @_locked
    def _allocate(self, whole: int, name: str) -> int:
        addr = self._gap(whole, from_end=True)
        if self._kept:
            self._call(m.FREE, addr, whole)  # whatever an earlier job has left there
        self._take(addr, whole, name)
        return addr

    def allocated(self, addr: int) -> int:
        """How many bytes (whole pages) the area at this address has."""
        return self._lengths[addr]

    def release(self, addr: int) -> None:
        """Free what allocate has mapped there: now, or when the call that is under way has ended.

        This waits for nobody.
        """
        if not self.is_forked:
            self._released.append(addr)
            self._free_released()

    # ------------------------------------------------------------ beginning and end

    def _map(self) -> int:
        """Map the space, and behind it the mailbox; the memfd."""
        length = self.end_addr - self.start_addr
        memfd = os.memfd_create("edm")
        os.ftruncate(memfd, length + m.SIZE)
        at = f"start_addr, end_addr: the range {self.start_addr:#x}-{self.end_addr + m.SIZE:#x}"
        try:
            flags = u.MAP_SHARED | u.MAP_FIXED_NOREPLACE
            u.mmap_fixed(self.start_addr, length + m.SIZE, u.PROT_READ | u.PROT_WRITE, flags, memfd)
            u.madvise(self.start_addr, length + m.SIZE, u.MADV_DONTFORK)
        except OSError as error:
            os.close(memfd)
            if error.errno == errno.EEXIST:
                found = _mappings(self.start_addr, self.end_addr + m.SIZE)
                there = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
                raise ValueError(
                    f"{at} overlaps what this process has there: {there}; choose another range"
                ) from None
            raise ValueError(f"{at} can't be mapped ({error.strerror}); choose another") from None
        memory = memoryview((ctypes.c_ubyte * m.SIZE).from_address(self.end_addr)).cast("B")
        self._mailbox = m.Mailbox(memory, self.end_addr)
        return memfd

    def _unmap(self) -> None:
        u.munmap(self.start_addr, self.end_addr - self.start_addr + m.SIZE)

    def _say_hello(self, config: Any, control: Any, memfd: int) -> None:
        uffd, how = u.open_userfaultfd()
        self.user_mode_only = how == u.USER_MODE
        # Whose write end is the pager's alone: when that ends, the kernel kills this process.
        self._lifeline, pagers_end = os.pipe2(os.O_CLOEXEC)
        fds = [uffd, memfd, os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC), pagers_end]
        try:
            tracking = self._make_registered(u.Userfaultfd(uffd), config.clean_tracking)
            hello = {
                "config": vars(config), "pid": os.getpid(), "how": how,
                "track_clean": tracking != "none", "command": sys.orig_argv[1:],
            }  # fmt: skip
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", fds))]
            control.sendmsg([marshal.dumps(hello)], ancillary)
            answer = control.recv(MAX_HELLO)
            if not answer:
                raise ConnectionError(errno.ECONNRESET, "the pager has ended before it began")
            kind, *arguments = marshal.loads(answer)
            if kind != "ready":
                raise {"ValueError": ValueError, "OSError": OSError}[kind](*arguments)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            for fd in fds:
                if fd != memfd:
                    os.close(fd)
        (self._kept,) = arguments
        self._lifeline = _moved_up(self._lifeline)
        self._lifeline_is = os.fstat(self._lifeline).st_ino
        fcntl.fcntl(self._lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._lifeline, fcntl.F_SETSIG, SIGKILL)
        fcntl.fcntl(self._lifeline, fcntl.F_SETFL, os.O_ASYNC)
        if self.user_mode_only:
            sys.excepthook = _explained(sys.excepthook)

    def _make_registered(self, uffd: u.Userfaultfd, wanted: str) -> str:
        """Ask the kernel for its features, and register the space; how first writes are noticed."""
        supported = u.supported_features()
        missing = u.NEEDED_FEATURES & ~supported
        if missing:
            raise OSError(
                errno.ENOSYS,
                f"userfaultfd: this kernel ({os.uname().release}) lacks features {missing:#x}; "
                "EDM needs Linux 5.19 or later, with CONFIG_USERFAULTFD",
            )
        asks = {
            "async": u.WP_FEATURES | u.UFFD_FEATURE_WP_ASYNC,
            "events": u.WP_FEATURES,
            "none": 0,
        }
        for how, asked in asks.items():
            if wanted in ("auto", how) and not asked & ~supported:
                uffd.api(u.NEEDED_FEATURES | asked | u.OTHER_FEATURES & supported)
                length = self.end_addr - self.start_addr
                uffd.register(self.start_addr, length, write_protect=bool(asked))
                return how
        raise ValueError(f"clean_tracking: this kernel does not have {wanted!r}; take auto")

    def _end(self) -> None:
        """At the interpreter's end: what the pager prints comes before the shell's prompt."""
        if not self.is_forked:
            try:
                self._call_locked(m.END)
            except (OSError, RuntimeError):
                pass  # it was closed, or a signal handler ends the process in the midst of a call

    @_locked
    def close(self) -> None:
        """End the space, and the pager: what is to be kept is kept. No array of it may be used."""
        if self.is_forked:
            return
        atexit.unregister(self._end)
        if self._has_lifeline():
            fcntl.fcntl(self._lifeline, fcntl.F_SETFL, 0)  # its end is no accident
            self._ask(m.CLOSE)
            os.read(self._lifeline, 1)  # until it has ended
            os.close(self._lifeline)
        else:
            self._call(m.END)
            self._ask(m.CLOSE)
        self.is_forked = True
        self._unmap()

    def _forked(self) -> None:
        """In a process that the application forked: it has no space."""
        if not self.is_forked:
            self.is_forked = True
            self._lock = _thread.RLock()
            self._released.clear()
            if self._has_lifeline():
                os.close(self._lifeline)

    def _has_lifeline(self) -> bool:
        """Or has the program closed it, and the number may be something else's now?"""
        try:
            return os.fstat(self._lifeline).st_ino == self._lifeline_is
        except OSError:  # EBADF
            return False

    # ------------------------------------------------------------ the areas

    def _check(self, addr: int, whole: int) -> int:
        if addr % PAGE_SIZE:
            raise ValueError(f"addr: {addr:#x} is not a multiple of PAGE_SIZE, {PAGE_SIZE:#x}")
        if not self.start_addr <= addr <= addr + whole <= self.end_addr:
            raise ValueError(
                f"addr: the area {addr:#x}-{addr + whole:#x} leaves the space "
                f"{self.start_addr:#x}-{self.end_addr:#x}"
            )
        while not self._is_free(addr, whole):
            if not self._freeing:
                other, length = next(
                    (at, n)
                    for at, n in self._lengths.items()
                    if at < addr + whole and addr < at + n
                )
                raise ValueError(
                    f"addr: the area {addr:#x}-{addr + whole:#x} overlaps "
                    f"the area {other:#x}-{other + length:#x}"
                )
            self._wait_for_a_free()
        return addr

    def _is_free(self, addr: int, whole: int) -> bool:
        index = bisect.bisect_right(self._gaps, (addr, self.end_addr)) - 1
        return index >= 0 and addr + whole <= sum(self._gaps[index])

    def _gap(self, whole: int, from_end: bool = False) -> int:
        """The lowest address with room for whole bytes; or the highest."""
        self._reuse()
        while True:
            for at, length in reversed(self._gaps) if from_end else self._gaps:
                if length >= whole:
                    return at + length - whole if from_end else at
            if not self._freeing:
                raise MemoryError(
                    f"no gap of {whole} bytes in the space "
                    f"{self.start_addr:#x}-{self.end_addr:#x}; a larger end_addr makes room"
                )
            self._wait_for_a_free()

    def _take(self, addr: int, whole: int, name: str) -> None:
        """Locked. A part of a gap becomes an area."""
        index = bisect.bisect_right(self._gaps, (addr, self.end_addr)) - 1
        start, length = self._gaps[index]
        rest = [(start, addr - start), (addr + whole, start + length - addr - whole)]
        self._gaps[index : index + 1] = [gap for gap in rest if gap[1]]
        self._lengths[addr] = whole
        self._ask(m.MAPPED, addr, whole, name.encode(errors="replace"))

    def _give_back(self, addr: int, whole: int) -> None:
        """Locked. An area becomes a gap, or a part of one."""
        index = bisect.bisect_right(self._gaps, (addr, 0))
        end = addr + whole
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == addr:
            index -= 1
            addr = self._gaps.pop(index)[0]
        self._gaps.insert(index, (addr, end - addr))

    def _reuse(self) -> None:
        """Locked. Let the addresses whose free is done be gaps."""
        while self._freeing and self._mailbox.is_freed(self._freeing[0][0]):
            _, addr, whole = self._freeing.popleft()
            self._give_back(addr, whole)

    def _wait_for_a_free(self) -> None:
        while not self._mailbox.is_freed(self._freeing[0][0]):
            time.sleep(FREES)
        self._reuse()

    def _free_released(self) -> None:
        # Whoever holds the lock comes by here after it.
        if not self._released or self.is_forked or self._lock._is_owned():
            return
        with self._lock:
            while self._released:
                addr = self._released[0]
                # A signal handler may raise at any point: then the addresses are not used again.
                whole = self._lengths.pop(addr, 0)
                self._released.popleft()
                if whole:
                    self._freeing.append((self._ask(m.RELEASE, addr, whole), addr, whole))

    # ------------------------------------------------------------ calling the pager

    def _call(self, what: int, addr: int = 0, length: int = 0) -> bytes:
        """Locked. Ask the pager, for a range in bytes, and wait for the answer."""
        while self._waits_for and not self._mailbox.is_answered(self._waits_for):
            time.sleep(FREES)  # a signal handler has left a call, which goes on
        self._waits_for = number = self._ask(what, addr, length)
        answer = self._mailbox.answer(number)
        self._waits_for = 0
        return answer

    _call_locked = _locked(_call)

    def _ask(self, what: int, addr: int = 0, length: int = 0, name: bytes = b"") -> int:
        if self.is_forked:
            raise RuntimeError(_FORKED)
        page = (addr - self.start_addr) // PAGE_SIZE if addr else 0
        return self._mailbox.ask(what, page, length // PAGE_SIZE, name)


def _explained(hook: Callable[..., None]) -> Callable[..., None]:
    """sys.excepthook, with a word behind the first EFAULT, or what may be one (NumPy's OSErrors have
    no errno)."""

    def explained(kind: type, error: BaseException, trace: object) -> None:
        global _USER_MODE_ONLY
        hook(kind, error, trace)
        if isinstance(error, OSError) and error.errno in (errno.EFAULT, None) and _USER_MODE_ONLY:
            sys.stderr.write(_USER_MODE_ONLY)
            _USER_MODE_ONLY = ""

    return explained


def _moved_up(fd: int) -> int:
    """The same file under a number that a program which closes everything does not reach."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)
    except OSError:
        return fd  # the limit on descriptors (RLIMIT_NOFILE) is lower
    os.close(fd)
    return high


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


# ---------------------------------------------------------------- a pager on this machine

# What the spawned interpreter runs: the package is where it was found here, and nothing that the
# environment or the current folder says can be in its way (-I -S).
_BOOT = """\
import sys
from importlib.util import module_from_spec, spec_from_file_location
folder, descriptor = sys.argv[1:]
spec = spec_from_file_location("edm", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["edm"] = package = module_from_spec(spec)
spec.loader.exec_module(package)
from edm.pager import spawned
spawned(int(descriptor))
"""


def spawn_pager() -> Any:
    """Start a pager that is no child of this process; the socket that reaches it, for Space."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    folder = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-I", "-S", "-c", _BOOT, folder, str(theirs.fileno())]
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        # dup2(fd, fd) lets the descriptor stay open there: posix_spawn_file_actions_adddup2(3)
        (os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno()),
    ]
    try:
        os.fstat(2)
    except OSError:  # it is closed
        streams.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    spawned = os.posix_spawn(sys.executable, command, environment, file_actions=streams, setsigmask=[])  # fmt: skip
    theirs.close()
    try:
        os.waitpid(spawned, 0)
    except ChildProcessError:
        pass  # the program ignores SIGCHLD, or another thread of it waits for any child
    return ours


def receive_hello(control: Any) -> tuple[dict[str, Any], list[int]]:
    """The pager's: what Space has sent: its dictionary, and uffd, memfd, pagemap, lifeline. Nothing,
    if the application has ended."""
    space, flags = _socket.CMSG_LEN(4 * _INT), _socket.MSG_CMSG_CLOEXEC
    packet, ancillary, _, _ = control.recvmsg(MAX_HELLO, space, flags)
    if not packet:
        return {}, []
    return marshal.loads(packet), list(array.array("i", ancillary[0][2]))


def send_ready(control: Any, kept: bool) -> None:
    """The pager's answer to Space."""
    _send(control, "ready", kept)


def send_refusal(control: Any, error: ValueError | OSError) -> None:
    """The pager's answer to Space if it can't serve."""
    if isinstance(error, ValueError):
        _send(control, "ValueError", str(error))
    else:
        words = str(error.strerror or error)
        if error.filename:
            words += f": {error.filename!r}"
        _send(control, "OSError", error.errno or errno.EIO, words)


def _send(control: Any, *answer: Any) -> None:
    try:
        control.send(marshal.dumps(answer))
    except ConnectionError:
        pass  # it has ended meanwhile
    control.close()
