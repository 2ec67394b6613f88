"""userfaultfd(2) and the few other system calls that Python's own modules do not have.

In the picture: every arrow between EDM and the kernel.

Interface:
    open_userfaultfd()      make one, in the most capable way that this process is permitted
    supported_features()    what this kernel's userfaultfd can do
    Userfaultfd(fd)         its ioctls: api, register, copy, zeropage, writeprotect, wake, poison;
                            and read_faults, which reads the messages
    mmap, mprotect, madvise, munmap, punch_hole, futex_wait, futex_wake, semaphore, tgkill, prctl,
    pidfd_getfd, seccomp

Rules:
    * A call that fails raises OSError with its errno and its name.
    * Addresses and lengths are bytes, whole pages.
    * A Userfaultfd holds one argument block, so each thread makes its own around the descriptor.
    * The descriptor acts on the address space of the process that made it, whoever holds it.
    * Every call lets go of the GIL, but for those by WITH_GIL. fcntl.ioctl is a microsecond faster than
      ctypes, so the ioctls use it, with the arguments packed by struct.

Sources: userfaultfd(2), ioctl_userfaultfd(2), <linux/userfaultfd.h>, <asm-generic/ioctl.h>,
Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from _multiprocessing import SemLock
from ctypes import c_int, c_int64, c_long, c_size_t, c_uint, c_ulong, c_void_p
from fcntl import ioctl
from struct import Struct

if sys.platform != "linux":
    raise OSError(f"EDM needs Linux 5.19 or later; this is {sys.platform}")

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")  # bytes
# Pages at most that leave, or come, together: what a pipe of any user may hold, see pipe(7).
PAGES_AT_ONCE = (1 << 20) // PAGE_SIZE

# ---------------------------------------------------------------- <asm-generic/ioctl.h>

_IOC_WRITE, _IOC_READ = 1, 2


def _IOC(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def _IO(kind: int, number: int) -> int:
    return _IOC(0, kind, number, 0)


def _IOR(kind: int, number: int, block: Struct) -> int:
    return _IOC(_IOC_READ, kind, number, block.size)


def _IOWR(kind: int, number: int, block: Struct) -> int:
    return _IOC(_IOC_READ | _IOC_WRITE, kind, number, block.size)


# ---------------------------------------------------------------- <linux/userfaultfd.h>

uffd_msg = Struct("=B7xQQI4x")  # event; of a page fault: flags, address, thread
uffdio_api = Struct("=QQQ")  # api, features, ioctls
uffdio_range = Struct("=QQ")  # start, len
uffdio_register = Struct("=QQQQ")  # range, mode, ioctls
uffdio_copy = Struct("=QQQQq")  # dst, src, len, mode, copy
uffdio_zeropage = Struct("=QQQq")  # range, mode, zeropage
uffdio_writeprotect = Struct("=QQQ")  # range, mode
uffdio_poison = Struct("=QQQq")  # range, mode, updated

UFFD_API = UFFDIO = 0xAA
UFFDIO_API = _IOWR(UFFDIO, 0x3F, uffdio_api)
UFFDIO_REGISTER = _IOWR(UFFDIO, 0x00, uffdio_register)
UFFDIO_WAKE = _IOR(UFFDIO, 0x02, uffdio_range)
UFFDIO_COPY = _IOWR(UFFDIO, 0x03, uffdio_copy)
UFFDIO_ZEROPAGE = _IOWR(UFFDIO, 0x04, uffdio_zeropage)
UFFDIO_WRITEPROTECT = _IOWR(UFFDIO, 0x06, uffdio_writeprotect)
UFFDIO_POISON = _IOWR(UFFDIO, 0x08, uffdio_poison)
USERFAULTFD_IOC_NEW = _IO(0xAA, 0x00)  # on /dev/userfaultfd

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # Linux 5.19
UFFD_FEATURE_POISON = 1 << 14  # Linux 6.6
UFFD_FEATURE_WP_ASYNC = 1 << 15  # Linux 6.7

UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1

UFFD_USER_MODE_ONLY = 1
USER_MODE = "user mode only"  # open_userfaultfd's word for it

# System calls that the C library has no function for, by machine: userfaultfd, futex, seccomp, tgkill.
_NUMBERS = {"x86_64": (323, 202, 317, 234), "aarch64": (282, 98, 277, 131)}

# What EDM can't do without: page faults of shared memory. And what tells that a page was written.
NEEDED_FEATURES = UFFD_FEATURE_MISSING_SHMEM
WP_FEATURES = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
OTHER_FEATURES = UFFD_FEATURE_POISON

# ---------------------------------------------------------------- making a userfaultfd

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, c_long)
_libc.mmap.restype = c_void_p
_libc.munmap.argtypes = (c_void_p, c_size_t)
_libc.mprotect.argtypes = (c_void_p, c_size_t, c_int)
_libc.madvise.argtypes = (c_void_p, c_size_t, c_int)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)
# Keeps the GIL: for calls that take less time than to get it back from another thread.
WITH_GIL = ctypes.PyDLL(None, use_errno=True)
WITH_GIL.fallocate.argtypes = _libc.fallocate.argtypes
_libc.prctl.argtypes = (c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_libc.syscall.restype = c_long

_machine = os.uname().machine
if _machine not in _NUMBERS:
    raise OSError(errno.ENOSYS, f"EDM does not know this machine, {_machine}")
_NR_userfaultfd, _NR_futex, _NR_seccomp, _NR_tgkill = _NUMBERS[_machine]
_NR_pidfd_getfd = 438  # on every machine


def _failed(name: str, number: int = 0) -> OSError:
    number = number or ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")


def open_userfaultfd() -> tuple[int, str]:
    """Make a userfaultfd for this process's address space: (descriptor, how it was permitted).

    Tried in this order: the plain system call (CAP_SYS_PTRACE, or the sysctl
    vm.unprivileged_userfaultfd=1), /dev/userfaultfd (Linux 6.1; its file permissions), and
    UFFD_USER_MODE_ONLY (any user; system calls that touch a missing page then fail with EFAULT).
    The descriptor is non-blocking and close-on-exec.

    Raises OSError: ENOSYS where kernel or machine has no userfaultfd, EPERM where a sandbox
    forbids it. Source: userfaultfd(2).
    """
    number, flags = _NR_userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK
    fd = _libc.syscall(number, flags)
    if fd >= 0:
        return fd, "system call"
    if ctypes.get_errno() == errno.ENOSYS:
        raise OSError(errno.ENOSYS, "userfaultfd: this kernel is built without CONFIG_USERFAULTFD")
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        device = -1  # absent, or not for this user: the third way is left
    if device >= 0:
        fd = _libc.ioctl(device, USERFAULTFD_IOC_NEW, flags)
        os.close(device)
        if fd >= 0:
            return fd, "/dev/userfaultfd"
    fd = _libc.syscall(number, flags | UFFD_USER_MODE_ONLY)
    if fd >= 0:
        return fd, USER_MODE
    raise OSError(
        ctypes.get_errno(),
        "userfaultfd: not permitted here (a container's seccomp filter?); what gives it: "
        "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE, or access to /dev/userfaultfd",
    )


def supported_features() -> int:
    """The UFFD_FEATURE_* bits of this kernel. Raises OSError as open_userfaultfd does."""
    fd, _ = open_userfaultfd()
    try:
        return Userfaultfd(fd).api(0)
    finally:
        os.close(fd)


class Userfaultfd:
    """The ioctls of one userfaultfd, for one thread. See ioctl_userfaultfd(2) for each."""

    MESSAGES = 64  # at most so many are read at once

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._block = bytearray(64)

    def _call(self, name: str, request: int, block: Struct, *fields: int) -> tuple[int, ...]:
        block.pack_into(self._block, 0, *fields)
        try:
            ioctl(self.fd, request, self._block)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise _failed(name, error.errno) from None
        return block.unpack_from(self._block)

    def api(self, features: int) -> int:
        """The handshake, once per descriptor: ask for features, get those that there are.

        Raises OSError EINVAL if the kernel lacks one that was asked for.
        """
        return self._call("UFFDIO_API", UFFDIO_API, uffdio_api, UFFD_API, features, 0)[1]

    def register(self, start: int, length: int, write_protect: bool = True) -> None:
        """From now on, MISSING and WP faults of this range (bytes) become messages."""
        mode = UFFDIO_REGISTER_MODE_MISSING | (UFFDIO_REGISTER_MODE_WP if write_protect else 0)
        self._call("UFFDIO_REGISTER", UFFDIO_REGISTER, uffdio_register, start, length, mode, 0)

    def copy(self, dst: int, src: int, length: int, write_protect: bool = False) -> None:
        """Install length bytes of src (this process) at dst (the faulting one), and wake.

        With write_protect the pages get the mark that their first write clears. Raises OSError
        EEXIST when a page of the range is there already, ENOENT when it isn't registered, ESRCH
        when the process has ended.
        """
        mode = UFFDIO_COPY_MODE_WP if write_protect else 0
        block = self._block
        uffdio_copy.pack_into(block, 0, dst, src, length, mode, 0)
        while True:
            try:
                ioctl(self.fd, UFFDIO_COPY, block)
                return
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise _failed("UFFDIO_COPY", error.errno) from None
            # Interrupted after `done` bytes; the next try goes on, or tells why.
            dst, src, length, _, done = uffdio_copy.unpack_from(block)
            done = max(0, done)
            uffdio_copy.pack_into(block, 0, dst + done, src + done, length - done, mode, 0)

    def zeropage(self, start: int, length: int) -> None:
        """Install zeroed, writable pages in this range (bytes), and wake. Raises as copy does."""
        while length:
            fields = start, length, 0, 0
            done = self._call("UFFDIO_ZEROPAGE", UFFDIO_ZEROPAGE, uffdio_zeropage, *fields)[3]
            if done > 0:
                start, length = start + done, length - done

    def writeprotect(self, start: int, length: int, protect: bool) -> None:
        """Set the mark of these pages (bytes); or, protect=False, clear it and wake."""
        mode = UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        fields = start, length, mode
        self._call("UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, uffdio_writeprotect, *fields)

    def wake(self, start: int, length: int) -> None:
        """Wake the threads that sleep in a fault of this range (bytes); they try again."""
        self._call("UFFDIO_WAKE", UFFDIO_WAKE, uffdio_range, start, length)

    def poison(self, start: int, length: int) -> None:
        """Make this range (bytes) raise SIGBUS when touched, and wake. Linux 6.6."""
        self._call("UFFDIO_POISON", UFFDIO_POISON, uffdio_poison, start, length, 0, 0)

    def read_faults(self) -> list[tuple[int, int, int, int]]:
        """(event, flags, address, thread) of the faults that wait, at most MESSAGES; none: [].

        thread: its id, with UFFD_FEATURE_THREAD_ID, or 0.
        """
        try:
            return list(uffd_msg.iter_unpack(os.read(self.fd, uffd_msg.size * self.MESSAGES)))
        except BlockingIOError:
            return []


# ---------------------------------------------------------------- other system calls

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x01, 0x02, 0x4000, 0x100000
MADV_DONTFORK = 10
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK, PR_SET_NO_NEW_PRIVS, PR_SET_PTRACER = 1, 29, 38, 0x59616D61


def mmap(addr: int, length: int, prot: int, flags: int, fd: int = -1, off: int = 0) -> int:
    """mmap(2); where it is mapped. Python's keeps a duplicate of the descriptor.

    Raises OSError, with MAP_FIXED_NOREPLACE: EEXIST where something is mapped already, EPERM below
    vm.mmap_min_addr, ENOMEM beyond the end of the address space.
    """
    got = _libc.mmap(addr, length, prot, flags, fd, off)
    if got == c_void_p(-1).value:
        raise _failed("mmap")
    return got


def munmap(addr: int, length: int) -> None:
    """munmap(2)."""
    if _libc.munmap(addr, length):
        raise _failed("munmap")


def mprotect(addr: int, length: int, prot: int) -> None:
    """mprotect(2)."""
    if _libc.mprotect(addr, length, prot):
        raise _failed("mprotect")


def madvise(addr: int, length: int, advice: int) -> None:
    """madvise(2)."""
    if _libc.madvise(addr, length, advice):
        raise _failed("madvise")


def punch_hole(fd: int, offset: int, length: int, libc: ctypes.CDLL = _libc) -> None:
    """fallocate(2) with PUNCH_HOLE: give back the file's memory or disk there (bytes)."""
    if libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        raise _failed("fallocate")


FUTEX_WAIT, FUTEX_WAKE = 0, 1  # between processes


def futex_wait(address: int, value: int) -> None:
    """futex(2): sleep until somebody wakes this word of shared memory; at once if it is not value.

    Returns for no reason at times, and when a signal has come.
    """
    _libc.syscall(_NR_futex, c_void_p(address), FUTEX_WAIT, c_uint(value), None)


def futex_wake(address: int) -> None:
    """futex(2): wake everybody who sleeps there."""
    _libc.syscall(_NR_futex, c_void_p(address), FUTEX_WAKE, 0x7FFFFFFF)


def semaphore() -> SemLock:
    """A lock for threads and forked processes: a semaphore of one, sem_overview(7), whose name is gone
    at once. It is what multiprocessing.Lock wraps; that takes long to import."""
    kind, name = 1, f"/edm-{os.getpid()}-{time.monotonic_ns()}"
    return SemLock(kind, 1, 1, name, True)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a duplicate of another process's descriptor. Linux 5.6."""
    got = _libc.syscall(_NR_pidfd_getfd, pidfd, fd, 0)
    if got < 0:
        raise _failed("pidfd_getfd")
    return got


def tgkill(process: int, thread: int, number: int) -> None:
    """tgkill(2): send a signal to this thread."""
    if _libc.syscall(_NR_tgkill, process, thread, number):
        raise _failed("tgkill")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    if _libc.prctl(option, value, 0, 0, 0):
        raise _failed("prctl")


# <linux/seccomp.h>. The youngest of these is WAIT_KILLABLE_RECV: Linux 5.19.
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 0, 1 << 3
SECCOMP_FILTER_FLAG_TSYNC_ESRCH, SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 4, 1 << 5
sock_fprog = Struct("=H6xQ")  # len, filter


def seccomp(flags: int, instructions: bytes) -> int:
    """seccomp(2): from now on this process's system calls are filtered by these BPF instructions.

    Returns the listener's descriptor, if flags say NEW_LISTENER. Raises OSError EBUSY where there is
    another listener already, ESRCH if a thread has other filters, EINVAL for a flag that is unknown.
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = sock_fprog.pack(len(instructions) // 8, ctypes.addressof(code))
    result = _libc.syscall(_NR_seccomp, SECCOMP_SET_MODE_FILTER, c_uint(flags), program)
    if result < 0:
        raise _failed("seccomp")
    return result
