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
from conftest import needs_userfaultfd, supported_features, wait_for

from edm import uffd_ctypes as u
from edm.page_idle import WRITTEN, Pagemap
from edm.uffd_ctypes import PAGE_SIZE

HEADER = "/usr/include/linux/userfaultfd.h"
NUMBERS = u.IOCTLS | {
    name: value
    for name, value in vars(u).items()
    if name.startswith(("UFFDIO_", "UFFD_FEATURE_", "UFFD_EVENT_", "UFFD_PAGEFAULT_"))
    or name in ("UFFD_API", "UFFD_USER_MODE_ONLY", "USERFAULTFD_IOC_NEW")
}


def test_the_block_of_each_ioctl_has_the_size_that_its_number_has(monkeypatch):
    sizes = {}

    def ioctl(fd, number, block):
        sizes[number] = memoryview(block).nbytes

    monkeypatch.setattr(u, "ioctl", ioctl)
    uffd = u.Userfaultfd(-1)
    uffd.api(0)
    uffd.writeprotect(0, PAGE_SIZE, True)
    for call in uffd.register, uffd.wake, uffd.zeropage, uffd.poison:
        call(0, PAGE_SIZE)
    uffd.copy(0, 0, PAGE_SIZE)
    assert sizes == {number: number >> 16 & 0x3FFF for number in u.IOCTLS.values()}


@pytest.mark.parametrize("done", [0, 4 * PAGE_SIZE, -errno.EAGAIN])
def test_a_copy_that_was_interrupted_tells_how_many_bytes_it_has_installed(monkeypatch, done):
    def ioctl(fd, number, block):
        block[-1] = done % (1 << 64)
        raise BlockingIOError(errno.EAGAIN, "interrupted")

    monkeypatch.setattr(u, "ioctl", ioctl)
    assert u.Userfaultfd(-1).copy(0, 0, 8 * PAGE_SIZE) == max(0, done)
    assert u.Userfaultfd(-1).zeropage(0, 8 * PAGE_SIZE) == max(0, done)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.skipif(not os.path.exists(HEADER), reason=f"no {HEADER}")
def test_every_number_is_the_one_in_the_kernels_header(tmp_path):
    # A header older than a name does not have it; the others it must agree on.
    lines = [
        f'#ifdef {n}\n  printf("{n} %llu\\n", (unsigned long long)({n}));\n#endif' for n in NUMBERS
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
    assert {name: NUMBERS[name] for name in theirs} == theirs


def test_a_failed_call_raises_oserror_with_errno_and_the_calls_name():
    closed = u.Userfaultfd(1 << 30)  # no process has so many descriptors
    calls = {
        "UFFDIO_REGISTER": lambda: closed.register(0, PAGE_SIZE),
        "UFFDIO_COPY": lambda: closed.copy(0, 0, PAGE_SIZE),
        "UFFDIO_ZEROPAGE": lambda: closed.zeropage(0, PAGE_SIZE),
        "UFFDIO_WRITEPROTECT": lambda: closed.writeprotect(0, PAGE_SIZE, True),
        "UFFDIO_WAKE": lambda: closed.wake(0, PAGE_SIZE),
        "UFFDIO_POISON": lambda: closed.poison(0, PAGE_SIZE),
        "fallocate": lambda: u.punch_hole(-1, 0, PAGE_SIZE),
        "mmap": lambda: u.mmap(PAGE_SIZE, PAGE_SIZE, 0, u.MAP_SHARED, -1),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match=name) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    others = {
        "munmap": lambda: u.munmap(1, 0),
        "madvise": lambda: u.madvise(1, PAGE_SIZE, 0),
        "prctl": lambda: u.prctl(-1, 0),
    }
    for name, call in others.items():
        with pytest.raises(OSError, match=name) as caught:
            call()
        assert caught.value.errno == errno.EINVAL


def test_a_semaphore_for_which_there_is_no_room_names_the_file_system(monkeypatch):
    def is_full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(u, "SemLock", is_full)
    with pytest.raises(OSError, match="sem_open: .*'/dev/shm'") as caught:
        u.semaphore()
    assert caught.value.errno == errno.ENOSPC


FIXED = u.MAP_SHARED | u.MAP_FIXED_NOREPLACE


@pytest.fixture
def memfd():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * PAGE_SIZE)
    yield fd
    os.close(fd)


def test_mmap_never_replaces_what_is_there(memfd):
    here = mmap.mmap(-1, PAGE_SIZE)
    here[0] = 7
    address = ctypes.addressof(ctypes.c_char.from_buffer(here))
    with pytest.raises(FileExistsError, match="mmap"):
        u.mmap(address, PAGE_SIZE, u.PROT_READ, FIXED, memfd)
    assert here[0] == 7


def test_mmap_maps_at_the_address_and_munmap_ends_that(memfd):
    os.pwrite(memfd, b"EDM", PAGE_SIZE)
    address = 0x5000_0000_0000
    for _ in range(2):
        u.mmap(address, PAGE_SIZE, u.PROT_READ | u.PROT_WRITE, FIXED, memfd, PAGE_SIZE)
        assert ctypes.string_at(address, 4) == b"EDM\0"
        u.munmap(address, PAGE_SIZE)


def test_memory_that_is_not_for_forks_is_not_in_a_forked_process(memfd):
    area = mmap.mmap(memfd, PAGE_SIZE)
    area[0] = 7
    u.madvise(ctypes.addressof(ctypes.c_char.from_buffer(area)), PAGE_SIZE, u.MADV_DONTFORK)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(area[0])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
    assert area[0] == 7


def test_a_punched_hole_gives_memory_back_and_reads_as_zeros(memfd):
    os.pwrite(memfd, b"E" * 4 * PAGE_SIZE, 0)
    u.punch_hole(memfd, PAGE_SIZE, 2 * PAGE_SIZE)
    assert os.fstat(memfd).st_size == 4 * PAGE_SIZE
    assert os.fstat(memfd).st_blocks * 512 == 2 * PAGE_SIZE
    left = b"E" * PAGE_SIZE
    assert os.pread(memfd, 4 * PAGE_SIZE, 0) == left + bytes(2 * PAGE_SIZE) + left


class Memory:
    """Pages of a memfd of this process, registered; touched only by libc calls without the GIL."""

    def __init__(self, pages, features=0):
        self.fd, _ = u.open_userfaultfd()
        self.uffd = u.Userfaultfd(self.fd)
        self.uffd.api(u.NEEDED_FEATURES | features)
        self.memfd = os.memfd_create("test")
        os.ftruncate(self.memfd, pages * PAGE_SIZE)
        self.map = mmap.mmap(self.memfd, pages * PAGE_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.uffd.register(self.address, pages * PAGE_SIZE, write_protect=bool(features))
        self.threads = []

    def touch(self, call):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def fault(self):
        """Wait for the next fault message."""
        assert select.select([self.fd], [], [], 10)[0], "no fault message came"
        return list(self.uffd.read_faults())

    def close(self):
        os.close(self.fd)
        for thread in self.threads:
            thread.join(10)
        os.close(self.memfd)


@pytest.fixture
def make():
    made = []

    def make(features=0):
        missing = features & ~supported_features()
        if missing:
            pytest.skip(f"this kernel's userfaultfd lacks features {missing:#x}")
        made.append(Memory(4, features))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


@pytest.fixture
def memory(make):
    return make()


libc = ctypes.CDLL(None)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


UFFD_EVENT_PAGEFAULT = 0x12  # <linux/userfaultfd.h>
PAGE = ctypes.create_string_buffer(b"EDM", PAGE_SIZE)


def read(memory):
    """Read the first page, in a thread; (the thread, the buffer that it reads into)."""
    got = ctypes.create_string_buffer(PAGE_SIZE)
    return memory.touch(lambda: libc.memcpy(got, memory.address, PAGE_SIZE)), got


def write(memory, value):
    return memory.touch(lambda: libc.memset(memory.address, value, 1))


@needs_userfaultfd
def test_a_read_fault_is_resolved_by_copy_and_its_first_write_raises_a_wp_fault(make):
    memory = make(u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
    reader, got = read(memory)
    assert memory.fault() == [(UFFD_EVENT_PAGEFAULT, 0, memory.address, reader.native_id)]
    memory.uffd.copy(memory.address, ctypes.addressof(PAGE), PAGE_SIZE, write_protect=True)
    reader.join(10)
    assert got.raw == PAGE.raw
    writer = write(memory, 1)
    [(_, flags, address, _)] = memory.fault()
    assert flags == u.UFFD_PAGEFAULT_FLAG_WP | u.UFFD_PAGEFAULT_FLAG_WRITE
    assert address == memory.address
    memory.uffd.writeprotect(memory.address, PAGE_SIZE, False)
    writer.join(10)
    assert memory.map[:3] == b"\x01DM"


@pytest.fixture
def marked(make):
    """Memory of which the first page is there, with the mark that its first write clears."""
    memory = make(u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | u.UFFD_FEATURE_WP_ASYNC)
    memory.uffd.copy(memory.address, ctypes.addressof(PAGE), PAGE_SIZE, write_protect=True)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        pagemap = Pagemap(file.fileno(), memory.address)
        memory.written = lambda: pagemap.find(0, b"\xff", WRITTEN) == b"\xff"
        yield memory


@needs_userfaultfd
def test_with_async_the_kernel_clears_the_mark_of_a_first_write_without_a_message(marked):
    assert marked.map[:3] == b"EDM" and not marked.written()
    marked.map[0] = 1
    assert marked.written() and marked.uffd.read_faults() == []
    marked.uffd.writeprotect(marked.address, PAGE_SIZE, True)
    assert not marked.written()
    marked.uffd.writeprotect(marked.address, PAGE_SIZE, False)
    assert marked.written()


@needs_userfaultfd
def test_the_mark_stays_when_the_page_has_gone_and_a_page_that_was_written_has_none(marked):
    marked.map.madvise(mmap.MADV_REMOVE, 0, PAGE_SIZE)
    assert not marked.written()
    marked.uffd.copy(marked.address, ctypes.addressof(PAGE), PAGE_SIZE)
    assert marked.written()
    marked.map.madvise(mmap.MADV_REMOVE, 0, PAGE_SIZE)
    assert marked.written()


@needs_userfaultfd
def test_a_write_fault_is_resolved_by_zeropage(memory):
    writer = write(memory, 7)
    [(_, flags, _, _)] = memory.fault()
    assert flags & u.UFFD_PAGEFAULT_FLAG_WRITE
    memory.uffd.zeropage(memory.address, PAGE_SIZE)
    writer.join(10)
    assert memory.map[:2] == b"\x07\0"


@needs_userfaultfd
def test_a_fault_tells_the_thread_which_can_be_signalled(memory):
    came = []
    before = signal.signal(signal.SIGURG, lambda *_: came.append(True))
    try:
        toucher = write(memory, 1)
        [(_, _, _, thread)] = memory.fault()
        assert thread == toucher.native_id != os.getpid()
        u.tgkill(os.getpid(), thread, signal.SIGURG)
        [(_, _, address, again)] = memory.fault()
        assert (address, again) == (memory.address, thread), "it has not tried again"
        memory.uffd.zeropage(memory.address, PAGE_SIZE)
        toucher.join(10)
        assert came, "no handler ran"
    finally:
        signal.signal(signal.SIGURG, before)
    wait_for(lambda: not os.path.exists(f"/proc/self/task/{thread}"))  # join returns before
    with pytest.raises(ProcessLookupError, match="tgkill"):
        u.tgkill(os.getpid(), thread, signal.SIGURG)


@needs_userfaultfd
def test_wake_lets_the_fault_be_tried_again(memory):
    writer = write(memory, 7)
    memory.fault()
    memory.uffd.wake(memory.address, PAGE_SIZE)
    [(_, _, again, _)] = memory.fault()
    assert again == memory.address
    memory.uffd.zeropage(memory.address, PAGE_SIZE)
    writer.join(10)


@needs_userfaultfd
def test_pages_that_were_written_into_the_memory_file_are_there_without_a_message(memory):
    os.pwrite(memory.memfd, b"EDM", 0)
    assert memory.map[:3] == b"EDM" and memory.uffd.read_faults() == []


@needs_userfaultfd
def test_many_pages_are_copied_at_once(memory):
    pages = ctypes.create_string_buffer(os.urandom(3 * PAGE_SIZE), 3 * PAGE_SIZE)
    assert memory.uffd.copy(memory.address, ctypes.addressof(pages), len(pages)) == len(pages)
    assert memory.map[: 3 * PAGE_SIZE] == pages.raw
    assert os.fstat(memory.memfd).st_blocks * 512 == 3 * PAGE_SIZE


@needs_userfaultfd
def test_copying_over_a_page_that_is_there_raises_eexist(memory):
    page = ctypes.create_string_buffer(2 * PAGE_SIZE)
    memory.uffd.copy(memory.address + PAGE_SIZE, ctypes.addressof(page), PAGE_SIZE)
    with pytest.raises(FileExistsError, match="UFFDIO_COPY"):
        memory.uffd.copy(memory.address + PAGE_SIZE, ctypes.addressof(page), PAGE_SIZE)


@needs_userfaultfd
@pytest.mark.parametrize("call", ["copy", "zeropage"])
def test_a_page_in_the_midst_that_is_there_already_does_not_keep_those_before_it_out(memory, call):
    page = ctypes.create_string_buffer(b"EDM", 2 * PAGE_SIZE)
    memory.uffd.copy(memory.address + PAGE_SIZE, ctypes.addressof(page), PAGE_SIZE)

    def install(at):
        arguments = [memory.address + at, 2 * PAGE_SIZE - at]
        if call == "copy":
            arguments.insert(1, ctypes.addressof(page) + at)
        return getattr(memory.uffd, call)(*arguments)

    assert install(0) == PAGE_SIZE
    with pytest.raises(FileExistsError, match="UFFDIO_"):
        install(PAGE_SIZE)
    assert os.fstat(memory.memfd).st_blocks * 512 == 2 * PAGE_SIZE
    assert memory.map[:3] == (b"EDM" if call == "copy" else b"\0\0\0")


@needs_userfaultfd
def test_where_nothing_is_registered_copy_raises_enoent(memory):
    other = mmap.mmap(-1, PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(other))
    with pytest.raises(FileNotFoundError, match="UFFDIO_COPY"):
        memory.uffd.copy(address, ctypes.addressof(PAGE), PAGE_SIZE)


@needs_userfaultfd
@pytest.mark.parametrize("protect", [True, False])
def test_where_nothing_is_registered_protecting_does_nothing(make, protect):
    other = mmap.mmap(-1, PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(other))
    make(u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM).uffd.writeprotect(address, PAGE_SIZE, protect)


@needs_userfaultfd
def test_a_feature_that_there_is_not_is_refused_and_less_may_be_asked_for():
    fd, _ = u.open_userfaultfd()
    uffd = u.Userfaultfd(fd)
    assert uffd.api(1 << 63) == 0
    assert uffd.api(u.NEEDED_FEATURES) & u.NEEDED_FEATURES == u.NEEDED_FEATURES
    os.close(fd)


@needs_userfaultfd
def test_the_descriptor_does_not_block_and_is_closed_on_exec():
    fd, how = u.open_userfaultfd()
    assert not os.get_blocking(fd) and not os.get_inheritable(fd)
    assert how in ("system call", "/dev/userfaultfd", u.USER_MODE)
    os.close(fd)


@needs_userfaultfd
def test_a_poisoned_page_raises_sigbus():
    if not supported_features() & u.UFFD_FEATURE_POISON:
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
