"""userfaultfd(2) and the few other system calls that Python's own modules do not have.

In the picture: every arrow between EDM and the kernel.

Interface:
    open_userfaultfd()      make one, in the most capable way that this process is permitted
    Userfaultfd(fd)         a descriptor with its ioctls: api, register, copy, zeropage, writeprotect, wake, poison;
                            and read_faults, which reads the messages
    mmap, mprotect, madvise, munmap, punch_hole, futex_wait, futex_wake, semaphore, block_signals,
    restore_signals, tgkill, prctl, close_from, pidfd_getfd, seccomp

Rules:
    * A call that fails raises OSError with its errno and its name; but futex_wait, futex_wake and api return, and so
      does writeprotect where nobody writes any more.
    * Addresses and lengths are bytes, whole pages.
    * The descriptor acts on the address space of the process that made it, whoever holds it.
    * Every call releases the GIL, except read_faults, and those by WITH_GIL. fcntl.ioctl is a microsecond faster than
      ctypes, so the ioctls use it, with the arguments in an array.

Sources: userfaultfd(2), ioctl_userfaultfd(2), <linux/userfaultfd.h>,
Documentation/admin-guide/mm/userfaultfd.rst.
"""

import ctypes
import os
from _multiprocessing import SemLock
from _signal import SIG_BLOCK, SIG_SETMASK
from _thread import _local as local
from array import array
from collections.abc import Iterable
from contextlib import suppress
from ctypes import c_int64, c_long, c_size_t, c_uint, c_ulong, c_void_p
from fcntl import ioctl
from functools import partial
from io import FileIO  # open() may be a program's
from struct import Struct

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")  # bytes
# Pages at most that leave, or come, together: what a pipe of any user may hold, see pipe(7).
PAGES_AT_ONCE = (1 << 20) // PAGE_SIZE

# ---------------------------------------------------------------- <linux/userfaultfd.h>

UFFD_API = 0xAA

# The number of each ioctl. Its block is an array of __u64.
IOCTLS = {
    "UFFDIO_API": 0xC018AA3F,  # api, features, ioctls
    "UFFDIO_REGISTER": 0xC020AA00,  # range, mode, ioctls
    "UFFDIO_WAKE": 0x8010AA02,  # range: start, len
    "UFFDIO_COPY": 0xC028AA03,  # dst, src, len, mode, copy
    "UFFDIO_ZEROPAGE": 0xC020AA04,  # range, mode, zeropage
    "UFFDIO_WRITEPROTECT": 0xC018AA06,  # range, mode
    "UFFDIO_POISON": 0xC020AA08,  # range, mode, updated
}
uffd_msg = Struct("=B7xQQI4x")  # event; of a page fault: flags, address, thread
USERFAULTFD_IOC_NEW = 0xAA00  # on /dev/userfaultfd

UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP = 1 << 0, 1 << 1
UFFDIO_COPY_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP = 1 << 1, 1 << 0

UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11  # Linux 5.18
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # Linux 5.19
UFFD_FEATURE_POISON = 1 << 14  # Linux 6.6; it can be used without being asked for
UFFD_FEATURE_WP_ASYNC = 1 << 15  # Linux 6.7

UFFD_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_WP = 1 << 0, 1 << 1

UFFD_USER_MODE_ONLY = 1
USER_MODE = "user mode only"  # open_userfaultfd's word for it

# System calls that not every C library has a function for, by machine: userfaultfd, futex, seccomp, tgkill.
_NUMBERS = {"x86_64": (323, 202, 317, 234), "aarch64": (282, 98, 277, 131)}
_system, _, _, _, _machine = os.uname()
if _system != "Linux" or _machine not in _NUMBERS:
    raise OSError(f"EDM needs Linux 5.19+, x86-64 or aarch64; this is {_system}, {_machine}")

# Faults tell thread and address. A kernel that has these has MISSING_SHMEM, too (Linux 4.11). And what has
# WP_HUGETLBFS_SHMEM has PAGEFAULT_FLAG_WP.
NEEDED_FEATURES = UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EXACT_ADDRESS

# ---------------------------------------------------------------- making a userfaultfd

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = c_long  # an address of a process, or -1
# Keeps the GIL: for calls that take less time than to get it back from another thread.
WITH_GIL = ctypes.PyDLL(None, use_errno=True)

_NR_userfaultfd, _NR_futex, _NR_seccomp, _NR_tgkill = _NUMBERS[_machine]
_NR_close_range, _NR_pidfd_getfd = 436, 438  # on every machine


def _checked(name: str, result: int) -> int:
    """What a call of the C library has returned. Raises OSError if that is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def open_userfaultfd() -> tuple[int, str]:
    """Make a userfaultfd for this process's address space: (descriptor, how it was permitted).

    Tried in this order: the plain system call (CAP_SYS_PTRACE, or the sysctl
    vm.unprivileged_userfaultfd=1), /dev/userfaultfd (Linux 6.1; its file permissions), and
    UFFD_USER_MODE_ONLY (any user; system calls that touch a missing page then fail with EFAULT).
    The descriptor is non-blocking and close-on-exec.

    Raises OSError: ENOSYS where the kernel has no userfaultfd, EPERM where a sandbox forbids it.
    Source: userfaultfd(2).
    """
    number, flags = _NR_userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK
    if (fd := _libc.syscall(number, flags)) >= 0:
        return fd, "system call"
    # Absent, or not for this user: then the third way is left.
    with suppress(OSError), FileIO("/dev/userfaultfd", "r+") as device:
        return ioctl(device, USERFAULTFD_IOC_NEW, flags), device.name
    what = "userfaultfd (needs CONFIG_USERFAULTFD; in a sandbox, access to /dev/userfaultfd)"
    return _checked(what, _libc.syscall(number, flags | UFFD_USER_MODE_ONLY)), USER_MODE


class Userfaultfd(int):
    """A descriptor, with its ioctls. See ioctl_userfaultfd(2) for each. Each raises OSError, which names the ioctl:
    ESRCH when the process has ended."""

    def _call(self, name: str, *fields: int) -> array:
        """The ioctl, with these fields of its block; returns the block. It may be interrupted (EAGAIN)."""
        block = array("L", fields)
        try:
            ioctl(self, IOCTLS[name], block)
        except BlockingIOError:  # after so many bytes; or -EAGAIN: after none
            block[-1] *= block[-1] < 1 << 63
        except OSError as error:
            raise OSError(error.errno, f"{name}: {error.strerror}") from None
        return block

    def api(self, features: int) -> int:
        """The handshake, which must succeed once: ask for features, get all that there are.

        Returns 0 if the kernel lacks one that was asked for. Then it may be asked for less.
        """
        with suppress(OSError):  # EINVAL
            return self._call("UFFDIO_API", UFFD_API, features, 0)[1]
        return 0

    def register(self, start: int, length: int, write_protect: bool = True) -> None:
        """From now on, MISSING and WP faults of this range (bytes) become messages."""
        mode = UFFDIO_REGISTER_MODE_MISSING | (UFFDIO_REGISTER_MODE_WP if write_protect else 0)
        self._call("UFFDIO_REGISTER", start, length, mode, 0)

    def copy(self, dst: int, src: int, length: int, write_protect: bool = False) -> int:
        """Install length bytes of src (this process) at dst (the faulting one), and wake. Returns how many
        bytes were installed. If these are fewer, the next call goes on, or raises the reason.

        With write_protect the pages get the uffd-wp bit, which their first write clears. Raises OSError
        EEXIST when a page of the range is there already, ENOENT when it isn't registered or is in
        more than one mapping, ESRCH when the process has ended.
        """
        mode = UFFDIO_COPY_MODE_WP if write_protect else 0
        return self._call("UFFDIO_COPY", dst, src, length, mode, 0)[-1]

    def zeropage(self, start: int, length: int) -> int:
        """Install zeroed, writable pages in this range (bytes), and wake. Returns and raises as copy does."""
        return self._call("UFFDIO_ZEROPAGE", start, length, 0, 0)[-1]

    def writeprotect(self, start: int, length: int, protect: bool) -> None:
        """Set the uffd-wp bit of these pages (bytes); or, protect=False, clear it and wake. Does nothing if the process
        has ended (ESRCH), or has unmapped them (ENOENT): it writes no more."""
        mode = UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        with suppress(ProcessLookupError, FileNotFoundError):
            self._call("UFFDIO_WRITEPROTECT", start, length, mode)

    def wake(self, start: int, length: int) -> None:
        """Wake the threads that sleep in a fault of this range (bytes); they try again."""
        self._call("UFFDIO_WAKE", start, length)

    def poison(self, start: int, length: int) -> None:
        """Make this range (bytes) raise SIGBUS when touched, and wake. Linux 6.6."""
        self._call("UFFDIO_POISON", start, length, 0, 0)

    def read_faults(self) -> Iterable[tuple[int, int, int, int]]:
        """(event, flags, address, thread) of the faults that wait, at most 8; none: []. For one thread.

        address: the exact one. thread: its id. Where none waits, os.read takes 0.9 µs, for its exception; this 0.4.
        """
        length = WITH_GIL.read(self, _messages, len(_messages))
        return uffd_msg.iter_unpack(_messages[:length]) if length > 0 else []


_messages = ctypes.create_string_buffer(8 * uffd_msg.size)

# ---------------------------------------------------------------- other system calls

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 0x01, 0x02, 0x20
MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x4000, 0x100000
MADV_DONTFORK, MADV_NOHUGEPAGE, MADV_DONTDUMP = 10, 15, 16
FALLOC_FL_PUNCH = 1 | 2  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS, PR_SET_PTRACER = 1, 29, 38, 0x59616D61


def mmap(addr: int, length: int, prot: int, flags: int, fd: int = -1, off: int = 0) -> int:
    """mmap(2); where it is mapped. Python's keeps a duplicate of the descriptor.

    Raises OSError, with MAP_FIXED_NOREPLACE: EEXIST where something is mapped already, EPERM below
    vm.mmap_min_addr, ENOMEM beyond the end of the address space.
    """
    return _checked("mmap", _libc.mmap(c_long(addr), c_long(length), prot, flags, fd, c_long(off)))


def _mapped(name: str, addr: int, length: int, *how: int) -> None:
    """munmap(2); or with what is wanted of the pages, mprotect(2) or madvise(2)."""
    _checked(name, getattr(_libc, name)(c_void_p(addr), c_size_t(length), *how))


munmap, mprotect, madvise = (partial(_mapped, name) for name in ("munmap", "mprotect", "madvise"))


def punch_hole(fd: int, offset: int, length: int, libc: ctypes.CDLL = _libc) -> None:
    """fallocate(2) with PUNCH_HOLE: give back the file's memory or disk there (bytes)."""
    _checked("fallocate", libc.fallocate(fd, FALLOC_FL_PUNCH, c_int64(offset), c_int64(length)))


FUTEX_WAIT, FUTEX_WAKE = 0, 1  # between processes


def futex_wait(address: int, value: int) -> None:
    """futex(2): sleep until somebody wakes this u32 of shared memory; at once if it is not value, modulo
    1 << 32.

    Returns for no reason at times, and when a signal has come.
    """
    _libc.syscall(_NR_futex, c_void_p(address), FUTEX_WAIT, c_uint(value), None)


def futex_wake(address: int) -> None:
    """futex(2): wake everybody who sleeps there."""
    _libc.syscall(_NR_futex, c_void_p(address), FUTEX_WAKE, 0x7FFFFFFF)


def semaphore() -> SemLock:
    """A lock for threads and forked processes: a semaphore of one, sem_overview(7), whose name is gone
    at once. It is what multiprocessing.Lock wraps; that takes long to import."""
    kind, name = 1, f"/edm-{os.urandom(16).hex()}"
    try:
        return SemLock(kind, 1, 1, name, True)
    except OSError as error:  # that is full, or can't be written
        raise OSError(error.errno, f"sem_open: {error.strerror}", "/dev/shm") from None


class _Before(local):
    """A signal mask of each thread's own, as an argument for ctypes."""

    def __init__(self) -> None:
        self._as_parameter_ = ctypes.create_string_buffer(128)


# Without Python code: block all signals of this thread; restore what was before. Source: pthread_sigmask(3).
_every, _before = ctypes.create_string_buffer(b"\xff" * 128), _Before()
block_signals = partial(WITH_GIL.pthread_sigmask, SIG_BLOCK, _every, _before)
restore_signals = partial(WITH_GIL.pthread_sigmask, SIG_SETMASK, _before, None)


def close_from(first: int) -> None:
    """close_range(2): close all descriptors from this number on. Linux 5.9. os.closerange tries each
    number, if its Python was built for an older C library."""
    _checked("close_range", _libc.syscall(_NR_close_range, first, c_uint(~0), 0))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a duplicate of another process's descriptor. Linux 5.6."""
    return _checked("pidfd_getfd", _libc.syscall(_NR_pidfd_getfd, pidfd, fd, 0))


def tgkill(process: int, thread: int, number: int) -> None:
    """tgkill(2): send a signal to this thread."""
    _checked("tgkill", _libc.syscall(_NR_tgkill, process, thread, number))


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _checked("prctl", _libc.prctl(option, c_ulong(value), c_ulong(0), c_ulong(0), c_ulong(0)))


# <linux/seccomp.h>. The flags are TSYNC, NEW_LISTENER, TSYNC_ESRCH, and the youngest: WAIT_KILLABLE_RECV, Linux 5.19.
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAGS = 1, 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5
sock_fprog = Struct("=H6xQ")  # len, filter


def seccomp(instructions: bytes) -> int:
    """seccomp(2): from now on this process's system calls are filtered by these BPF instructions.

    Returns the listener's descriptor. Raises OSError EBUSY where there is another listener already, ESRCH
    if a thread has other filters, EINVAL for a flag that is unknown.
    """
    program = sock_fprog.pack(len(instructions) // 8, ctypes.cast(instructions, c_void_p).value)
    arguments = SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAGS, program
    return _checked("seccomp", _libc.syscall(_NR_seccomp, *arguments))
