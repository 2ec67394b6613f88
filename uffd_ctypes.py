"""userfaultfd(2) and the few other system calls that Python's own modules do not have, by ctypes.

In the picture: every arrow between EDM and the kernel.

Interface:
    open_userfaultfd()      make one, in the most capable way that this process is permitted
    supported_features()    what this kernel's userfaultfd can do
    Userfaultfd(fd)         its ioctls: api, register, unregister, copy, zeropage, writeprotect,
                            wake, poison; and read_faults, which reads the messages
    mmap_fixed, madvise, punch_hole, prctl, flush_c_streams

Rules:
    * A call that fails raises OSError with its errno and its name.
    * Addresses and lengths are bytes, whole pages.
    * A Userfaultfd holds one argument block per ioctl, so that a fault allocates nothing. Each
      thread makes a Userfaultfd of its own around the same descriptor.
    * The descriptor acts on the address space of the process that made it, whoever holds it.
    * ctypes.CDLL lets go of the GIL during a call, so other threads run meanwhile.

Sources: userfaultfd(2), ioctl_userfaultfd(2), <linux/userfaultfd.h>, <asm-generic/ioctl.h>,
Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from ctypes import c_int, c_int64, c_long, c_size_t, c_uint64, c_ulong, c_void_p
from struct import Struct

if sys.platform != "linux":
    raise OSError(f"EDM needs Linux 5.19 or later; this is {sys.platform}")

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")  # bytes

# ---------------------------------------------------------------- calling the kernel

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (c_int, c_ulong, c_void_p)
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, c_long)
_libc.mmap.restype = c_void_p
_libc.madvise.argtypes = (c_void_p, c_size_t, c_int)
_libc.fallocate.argtypes = (c_int, c_int, c_int64, c_int64)
_libc.prctl.argtypes = (c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_libc.syscall.restype = c_long
_ioctl = _libc.ioctl


def _failed(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")


# ---------------------------------------------------------------- <asm-generic/ioctl.h>

_IOC_WRITE, _IOC_READ = 1, 2


def _IOC(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def _IO(kind: int, number: int) -> int:
    return _IOC(0, kind, number, 0)


def _IOR(kind: int, number: int, block: type[ctypes.Structure]) -> int:
    return _IOC(_IOC_READ, kind, number, ctypes.sizeof(block))


def _IOWR(kind: int, number: int, block: type[ctypes.Structure]) -> int:
    return _IOC(_IOC_READ | _IOC_WRITE, kind, number, ctypes.sizeof(block))


# ---------------------------------------------------------------- <linux/userfaultfd.h>


class uffdio_api(ctypes.Structure):
    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class uffdio_range(ctypes.Structure):
    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class uffdio_register(ctypes.Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64)]


class uffdio_copy(ctypes.Structure):
    _fields_ = [
        ("dst", c_uint64),
        ("src", c_uint64),
        ("len", c_uint64),
        ("mode", c_uint64),
        ("copy", c_int64),
    ]


class uffdio_zeropage(ctypes.Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("zeropage", c_int64)]


class uffdio_writeprotect(ctypes.Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64)]


class uffdio_poison(ctypes.Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("updated", c_int64)]


UFFD_API = 0xAA
UFFDIO = 0xAA
UFFDIO_API = _IOWR(UFFDIO, 0x3F, uffdio_api)
UFFDIO_REGISTER = _IOWR(UFFDIO, 0x00, uffdio_register)
UFFDIO_UNREGISTER = _IOR(UFFDIO, 0x01, uffdio_range)
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
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12  # Linux 5.19
UFFD_FEATURE_POISON = 1 << 14  # Linux 6.6

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1

UFFD_USER_MODE_ONLY = 1
USER_MODE = "user mode only"  # open_userfaultfd's word for it

# struct uffd_msg of a page fault: event, flags, address.
_UFFD_MSG = Struct("=B7xQQ8x")

_NR_userfaultfd = {"x86_64": 323, "aarch64": 282}

# What EDM can't do without: page faults of shared memory, and write-protecting it.
NEEDED_FEATURES = (
    UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
)

# ---------------------------------------------------------------- making a userfaultfd


def open_userfaultfd() -> tuple[int, str]:
    """Make a userfaultfd for this process's address space: (descriptor, how it was permitted).

    Tried in this order: the plain system call (CAP_SYS_PTRACE, or the sysctl
    vm.unprivileged_userfaultfd=1), /dev/userfaultfd (Linux 6.1; its file permissions), and
    UFFD_USER_MODE_ONLY (any user; system calls that touch a missing page then fail with EFAULT).
    The descriptor is non-blocking and close-on-exec.

    Raises OSError: ENOSYS where kernel or machine has no userfaultfd, EPERM where a sandbox
    forbids it. Source: userfaultfd(2).
    """
    machine = platform.machine()
    if machine not in _NR_userfaultfd:
        raise OSError(errno.ENOSYS, f"userfaultfd: EDM does not know this machine, {machine}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    number = _NR_userfaultfd[machine]
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
        fd = _ioctl(device, USERFAULTFD_IOC_NEW, flags)
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
        self._range = uffdio_range()
        self._copy = uffdio_copy()
        self._zeropage = uffdio_zeropage()
        self._writeprotect = uffdio_writeprotect()
        self._range_at = ctypes.addressof(self._range)
        self._copy_at = ctypes.addressof(self._copy)
        self._zeropage_at = ctypes.addressof(self._zeropage)
        self._writeprotect_at = ctypes.addressof(self._writeprotect)

    def api(self, features: int) -> int:
        """The handshake, once per descriptor: ask for features, get those that there are.

        Raises OSError EINVAL if the kernel lacks one that was asked for.
        """
        block = uffdio_api(api=UFFD_API, features=features)
        if _ioctl(self.fd, UFFDIO_API, ctypes.addressof(block)):
            raise _failed("UFFDIO_API")
        return block.features

    def register(self, start: int, length: int) -> None:
        """From now on, MISSING and WP faults of this range (bytes) become messages."""
        block = uffdio_register(
            uffdio_range(start, length), UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP
        )
        if _ioctl(self.fd, UFFDIO_REGISTER, ctypes.addressof(block)):
            raise _failed("UFFDIO_REGISTER")

    def unregister(self, start: int, length: int) -> None:
        """From now on, the kernel fills missing pages of this range (bytes) with zeros itself."""
        self._range.start, self._range.len = start, length
        if _ioctl(self.fd, UFFDIO_UNREGISTER, self._range_at):
            raise _failed("UFFDIO_UNREGISTER")

    def copy(self, dst: int, src: int, length: int, write_protect: bool = False) -> None:
        """Install length bytes of src (this process) at dst (the faulting one), and wake.

        With write_protect the page reads freely and its first write raises a WP fault; both are
        one step, so that no write can slip in between. Raises OSError EEXIST when a page of the
        range is there already, ENOENT when it isn't registered, ESRCH when the process has ended.
        """
        block = self._copy
        block.dst, block.src, block.len = dst, src, length
        block.mode = UFFDIO_COPY_MODE_WP if write_protect else 0
        block.copy = 0
        while _ioctl(self.fd, UFFDIO_COPY, self._copy_at):
            # EAGAIN: interrupted after block.copy bytes; the next try goes on, or tells why.
            if ctypes.get_errno() != errno.EAGAIN:
                raise _failed("UFFDIO_COPY")
            done = max(0, block.copy)
            block.dst += done
            block.src += done
            block.len -= done
            block.copy = 0

    def zeropage(self, start: int, length: int) -> None:
        """Install zeroed, writable pages in this range (bytes), and wake. Raises as copy does."""
        block = self._zeropage
        block.range.start, block.range.len, block.mode, block.zeropage = start, length, 0, 0
        while _ioctl(self.fd, UFFDIO_ZEROPAGE, self._zeropage_at):
            if ctypes.get_errno() != errno.EAGAIN:
                raise _failed("UFFDIO_ZEROPAGE")
            done = max(0, block.zeropage)
            block.range.start += done
            block.range.len -= done
            block.zeropage = 0

    def writeprotect(self, start: int, length: int, protect: bool) -> None:
        """Protect this range (bytes) from writes; or, protect=False, allow them and wake."""
        block = self._writeprotect
        block.range.start, block.range.len = start, length
        block.mode = UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        while _ioctl(self.fd, UFFDIO_WRITEPROTECT, self._writeprotect_at):
            if ctypes.get_errno() != errno.EAGAIN:
                raise _failed("UFFDIO_WRITEPROTECT")

    def writeprotect_mapped(self, start: int, length: int, protect: bool) -> None:
        """As writeprotect, but passes over pages that the application has unmapped meanwhile.

        Nobody can write to those any more; nor to any, if the application has ended.
        """
        try:
            self.writeprotect(start, length, protect)
        except ProcessLookupError:
            pass  # ESRCH
        except FileNotFoundError:
            if length > PAGE_SIZE:
                for page in range(start, start + length, PAGE_SIZE):
                    self.writeprotect_mapped(page, PAGE_SIZE, protect)

    def wake(self, start: int, length: int) -> None:
        """Wake the threads that sleep in a fault of this range (bytes); they try again."""
        self._range.start, self._range.len = start, length
        if _ioctl(self.fd, UFFDIO_WAKE, self._range_at):
            raise _failed("UFFDIO_WAKE")

    def poison(self, start: int, length: int) -> None:
        """Make this range (bytes) raise SIGBUS when touched, and wake. Linux 6.6."""
        block = uffdio_poison(uffdio_range(start, length))
        if _ioctl(self.fd, UFFDIO_POISON, ctypes.addressof(block)):
            raise _failed("UFFDIO_POISON")

    def read_faults(self) -> list[tuple[int, int]]:
        """The (flags, address) of as many faults as are waiting, at most MESSAGES; none: []."""
        try:
            raw = os.read(self.fd, _UFFD_MSG.size * self.MESSAGES)
        except BlockingIOError:
            return []
        return [(flags, address) for _, flags, address in _UFFD_MSG.iter_unpack(raw)]


# ---------------------------------------------------------------- other system calls

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x4000, 0x100000
MADV_DONTFORK = 10
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29


def mmap_fixed(addr: int, length: int, prot: int, flags: int, fd: int = -1, off: int = 0) -> None:
    """mmap(2) at exactly addr. flags must have MAP_FIXED or MAP_FIXED_NOREPLACE.

    Raises OSError: EEXIST (with MAP_FIXED_NOREPLACE) where something is mapped already, EPERM
    below vm.mmap_min_addr, ENOMEM beyond the end of the address space.
    """
    got = _libc.mmap(addr, length, prot, flags, fd, off)
    if got == c_void_p(-1).value:
        raise _failed("mmap")


def madvise(addr: int, length: int, advice: int) -> None:
    """madvise(2)."""
    if _libc.madvise(addr, length, advice):
        raise _failed("madvise")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2) with PUNCH_HOLE: give back the file's memory or disk there (bytes)."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        raise _failed("fallocate")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    if _libc.prctl(option, value, 0, 0, 0):
        raise _failed("prctl")


def flush_c_streams() -> None:
    """fflush(3) of all streams of C code, which os._exit leaves out."""
    _libc.fflush(None)
