"""uffd_ctypes.py: the kernel's numbers, and what each call does to real memory."""

import ctypes
import errno
import faulthandler
import mmap
import os
import select
import shutil
import signal
import subprocess
import threading

import pytest
from conftest import needs_userfaultfd

from edm import uffd_ctypes as u
from edm.uffd_ctypes import PAGE_SIZE

HEADER = "/usr/include/linux/userfaultfd.h"
NAMES = [
    name
    for name in vars(u)
    if name.startswith(("UFFDIO_", "UFFD_FEATURE_", "UFFD_EVENT_", "UFFD_PAGEFAULT_"))
    or name in ("UFFD_API", "UFFD_USER_MODE_ONLY", "USERFAULTFD_IOC_NEW")
]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.skipif(not os.path.exists(HEADER), reason=f"no {HEADER}")
def test_every_number_is_the_one_in_the_kernels_header(tmp_path):
    # A header older than a name does not have it; the others it must agree on.
    lines = [
        f'#ifdef {n}\n  printf("{n} %llu\\n", (unsigned long long)({n}));\n#endif' for n in NAMES
    ]
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\n"
        "int main(void) {\n" + "\n".join(lines) + "\n  return 0;\n}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "numbers", source], check=True)
    printed = subprocess.run([tmp_path / "numbers"], check=True, text=True, capture_output=True)
    theirs = {n: int(v) for n, v in (line.split() for line in printed.stdout.splitlines())}
    assert {"UFFDIO_COPY", "UFFDIO_WRITEPROTECT", "UFFDIO_WAKE"} <= theirs.keys()
    assert {name: getattr(u, name) for name in theirs} == theirs


def test_a_failed_call_raises_oserror_with_errno_and_the_calls_name():
    closed = u.Userfaultfd(-1)
    calls = {
        "UFFDIO_API": lambda: closed.api(0),
        "UFFDIO_REGISTER": lambda: closed.register(0, PAGE_SIZE),
        "UFFDIO_UNREGISTER": lambda: closed.unregister(0, PAGE_SIZE),
        "UFFDIO_COPY": lambda: closed.copy(0, 0, PAGE_SIZE),
        "UFFDIO_ZEROPAGE": lambda: closed.zeropage(0, PAGE_SIZE),
        "UFFDIO_WRITEPROTECT": lambda: closed.writeprotect(0, PAGE_SIZE, True),
        "UFFDIO_WAKE": lambda: closed.wake(0, PAGE_SIZE),
        "UFFDIO_POISON": lambda: closed.poison(0, PAGE_SIZE),
        "fallocate": lambda: u.punch_hole(-1, 0, PAGE_SIZE),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match=name) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_mmap_fixed_never_replaces_what_is_there():
    here = mmap.mmap(-1, PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(here))
    with pytest.raises(FileExistsError, match="mmap"):
        u.mmap_fixed(
            address, PAGE_SIZE, u.PROT_READ,
            u.MAP_PRIVATE | u.MAP_ANONYMOUS | u.MAP_FIXED_NOREPLACE,
        )  # fmt: skip


class Memory:
    """Pages of a memfd of this process, registered; touched only by libc calls without the GIL."""

    def __init__(self, pages):
        self.fd, _ = u.open_userfaultfd()
        self.uffd = u.Userfaultfd(self.fd)
        self.uffd.api(u.NEEDED_FEATURES)
        self.memfd = os.memfd_create("test")
        os.ftruncate(self.memfd, pages * PAGE_SIZE)
        self.map = mmap.mmap(self.memfd, pages * PAGE_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.uffd.register(self.address, pages * PAGE_SIZE)
        self.threads = []

    def touch(self, call):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def fault(self):
        """Wait for the next fault message."""
        assert select.select([self.fd], [], [], 10)[0], "no fault message came"
        return self.uffd.read_faults()

    def close(self):
        os.close(self.fd)
        for thread in self.threads:
            thread.join(10)
        os.close(self.memfd)


@pytest.fixture
def memory():
    made = Memory(4)
    yield made
    made.close()


libc = ctypes.CDLL(None)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@needs_userfaultfd
def test_a_read_fault_is_resolved_by_copy_and_its_first_write_raises_a_wp_fault(memory):
    got, page = ctypes.create_string_buffer(PAGE_SIZE), ctypes.create_string_buffer(b"EDM", 4096)
    reader = memory.touch(lambda: libc.memcpy(got, memory.address, PAGE_SIZE))
    [(flags, address)] = memory.fault()
    assert (flags, address) == (0, memory.address)
    memory.uffd.copy(memory.address, ctypes.addressof(page), PAGE_SIZE, write_protect=True)
    reader.join(10)
    assert got.raw == page.raw
    writer = memory.touch(lambda: libc.memset(memory.address, 1, 1))
    [(flags, address)] = memory.fault()
    assert flags == u.UFFD_PAGEFAULT_FLAG_WP | u.UFFD_PAGEFAULT_FLAG_WRITE
    memory.uffd.writeprotect(memory.address, PAGE_SIZE, False)
    writer.join(10)
    assert memory.map[:3] == b"\x01DM"


@needs_userfaultfd
def test_a_write_fault_is_resolved_by_zeropage(memory):
    writer = memory.touch(lambda: libc.memset(memory.address, 7, 1))
    [(flags, _)] = memory.fault()
    assert flags & u.UFFD_PAGEFAULT_FLAG_WRITE
    memory.uffd.zeropage(memory.address, PAGE_SIZE)
    writer.join(10)
    assert memory.map[:2] == b"\x07\0"


@needs_userfaultfd
def test_wake_lets_the_fault_be_tried_again(memory):
    writer = memory.touch(lambda: libc.memset(memory.address, 7, 1))
    memory.fault()
    memory.uffd.wake(memory.address, PAGE_SIZE)
    [(_, again)] = memory.fault()
    assert again == memory.address
    memory.uffd.zeropage(memory.address, PAGE_SIZE)
    writer.join(10)


@needs_userfaultfd
def test_copying_over_a_page_that_is_there_raises_eexist(memory):
    page = ctypes.create_string_buffer(2 * PAGE_SIZE)
    memory.uffd.copy(memory.address + PAGE_SIZE, ctypes.addressof(page), PAGE_SIZE)
    with pytest.raises(FileExistsError, match="UFFDIO_COPY"):
        memory.uffd.copy(memory.address, ctypes.addressof(page), 2 * PAGE_SIZE)


@needs_userfaultfd
def test_unregistered_pages_are_zero_filled_by_the_kernel(memory):
    memory.uffd.unregister(memory.address, 4 * PAGE_SIZE)
    assert memory.map[0] == 0


@needs_userfaultfd
def test_a_poisoned_page_raises_sigbus():
    if not u.supported_features() & u.UFFD_FEATURE_POISON:
        pytest.skip("this kernel has no UFFDIO_POISON (Linux 6.6)")
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        memory = Memory(1)
        memory.uffd.poison(memory.address, PAGE_SIZE)
        os._exit(memory.map[0])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS


@needs_userfaultfd
def test_no_fault_waiting_reads_as_none(memory):
    assert memory.uffd.read_faults() == []
