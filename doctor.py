"""python -m edm doctor: can EDM run on this machine? And if not, what is missing, and what gives it.

In the picture: nothing; it tries each arrow of it once, by itself.

Interface: main() prints a line for each check, and returns the exit status: 0 if EDM can run. A line
begins with "ok", with "missing" (EDM can't run), or with "without" (EDM runs, but has to do without).
What follows "try:" is a command to type.

Rules: imports nothing of MPI into its own process, as MPI may be what is missing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

from edm import uffd_ctypes as u
from edm.page_idle import bitmap_missing, pfns_missing, unmap_missing
from edm.page_store import disk_folder
from edm.uffd_ctypes import PAGE_SIZE

OLDEST = (5, 19)  # Linux
DEADLINE = 30  # seconds for anything that could hang
ENOUGH_DISK = 1 << 30  # bytes

Finding = tuple[str, str, str]  # ("ok", "missing" or "without", what was found, what to try)


def main() -> int:
    """Check everything, and print what was found. Returns the exit status."""
    can_run = True
    for name, check in CHECKS.items():
        state, found, remedy = check()
        print(f"{state:8} {name}: {found}")
        if remedy:
            print(f"         try: {remedy}")
        can_run = can_run and state != "missing"
    print("EDM can run here." if can_run else "EDM can't run here.")
    return 0 if can_run else 1


# ---------------------------------------------------------------- the kernel


def kernel() -> Finding:
    release = os.uname().release
    numbers = tuple(map(int, re.findall(r"\d+", release)[:2]))
    if numbers < OLDEST:
        return "missing", f"Linux {release} is older than 5.19; a newer kernel is needed", ""
    return "ok", f"Linux {release}", ""


def userfaultfd() -> Finding:
    try:
        fd, how = u.open_userfaultfd()
    except OSError as error:
        remedy = "sudo sysctl vm.unprivileged_userfaultfd=1" if error.errno == errno.EPERM else ""
        return "missing", f"{error.strerror}", remedy
    os.close(fd)
    if how == u.USER_MODE:
        found = "for user mode only: read(2) and the like into a page that is not here give EFAULT"
        return "without", found, "sudo sysctl vm.unprivileged_userfaultfd=1"
    return "ok", f"permitted by {how}", ""


def features() -> Finding:
    try:
        supported = u.supported_features()
    except OSError as error:
        return "missing", f"{error.strerror}", ""
    if missing := u.NEEDED_FEATURES & ~supported:
        found = f"this kernel lacks {missing:#x}, which Linux 4.11 has with CONFIG_USERFAULTFD"
        return "missing", found, "grep USERFAULTFD /boot/config-$(uname -r)"
    if u.WP_FEATURES & ~supported:
        found = "write-protection of shared memory (Linux 5.19): every page counts as written"
        return "without", found, ""
    if not supported & u.UFFD_FEATURE_POISON:
        return "without", "UFFDIO_POISON (Linux 6.6): a page that is lost ends the job", ""
    if not supported & u.UFFD_FEATURE_WP_ASYNC:
        return "without", "asynchronous write-protection (Linux 6.7): first writes are faults", ""
    return "ok", "missing pages and asynchronous write-protection of shared memory, poison", ""


def page_fault() -> Finding:
    """A thread of this process, without the GIL, reads a page that this one then brings in."""
    memory = mmap.mmap(-1, PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    page, got = (ctypes.create_string_buffer(part, PAGE_SIZE) for part in (b"E" * PAGE_SIZE, b""))
    read = ctypes.CDLL(None).memcpy
    read.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    thread = threading.Thread(target=read, args=(got, address, PAGE_SIZE), daemon=True)
    try:
        with open(u.open_userfaultfd()[0], "rb", buffering=0) as file:  # its end ends all waiting
            uffd = u.Userfaultfd(file.fileno())
            uffd.api(u.NEEDED_FEATURES)
            uffd.register(address, PAGE_SIZE, write_protect=False)  # a kernel may not have it
            thread.start()
            if not select.select([file], [], [], DEADLINE)[0]:
                return "missing", "no page fault came", ""
            (_, _, at), *_ = uffd.read_faults()
            uffd.copy(at & -PAGE_SIZE, ctypes.addressof(page), PAGE_SIZE)
    except (OSError, ValueError) as error:
        return "missing", f"{error}", ""
    finally:
        if thread.ident:  # it was started
            thread.join(DEADLINE)
    if got.raw != page.raw:
        return "missing", "the page came, but with other bytes", ""
    return "ok", "a page was brought in by userfaultfd", ""


def idle_pages() -> Finding:
    if missing := bitmap_missing():
        if why := unmap_missing():
            found, _, remedy = why.partition(": ")
            return "missing", f"{missing}, and {found}", f"sudo sh -c '{remedy}'"
        return "without", f"the kernel's bitmap ({missing}); LPET takes unmapping", ""
    return "ok", "the kernel's bitmap can be used", ""


def pagemap() -> Finding:
    try:
        hidden = pfns_missing()
    except OSError as error:
        return "missing", f"/proc/self/pagemap: {error.strerror}", "mount -t proc proc /proc"
    if hidden:
        return "without", "page frame numbers, in the log's LSPT tables: they are for root", ""
    return "ok", "readable", ""


# ---------------------------------------------------------------- MPI


def _run(*command: str) -> tuple[int, str]:
    """Run a command to its end: (exit status, what it printed)."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 1, f"nothing happened within {DEADLINE} s"
        output.seek(0)
        return status, output.read().strip()


def mpi() -> Finding:
    code = (
        "import mpi4py; mpi4py.rc.initialize = False\n"
        "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    )
    status, output = _run(sys.executable, "-c", code)
    last = output.splitlines()[-1] if output else f"exit status {status}"
    if status and "No module named" in last:
        return "missing", "mpi4py is not installed", f"{sys.executable} -m pip install mpi4py mpich"
    if status:
        found = f"mpi4py finds no MPI library ({last})"
        return "missing", found, f"{sys.executable} -m pip install mpich"
    return "ok", last.strip("\0 "), ""


def find_mpirun() -> str | None:
    """The path of mpirun: the one of this Python's environment, else the one on PATH."""
    own = os.path.join(sys.prefix, "bin", "mpirun")
    return own if os.path.exists(own) else shutil.which("mpirun")


def two_ranks() -> Finding:
    mpirun = find_mpirun()
    if mpirun is None:
        return "missing", "there is no mpirun", f"{sys.executable} -m pip install mpich"
    code = "import edm.doctor; edm.doctor.exchange()"
    status, output = _run(mpirun, "-n", "2", sys.executable, "-c", code)
    if not status and "a page came over" in output:
        return "ok", f"{mpirun} starts them, and a page came over", ""
    remedy = f"{mpirun} -n 2 hostname"
    if "OMPI_ALLOW_RUN_AS_ROOT" in output or "as root" in output:
        remedy = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    elif "slots" in output:
        remedy = "export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"
    elif "one rank each" in output:
        remedy = f"{sys.executable} -m pip install --force-reinstall mpich"
    lines = [line.strip() for line in output.splitlines() if line.strip(" -\t")]
    return "missing", f"{mpirun}: {lines[0] if lines else f'exit status {status}'}", remedy


def exchange() -> None:
    """In each of two ranks: rank 0 sends a page, rank 1 receives it and says so."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size != 2:
        sys.exit("one rank each: mpirun and mpi4py's MPI library are not of the same kind")
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        sys.exit("this MPI library has no MPI_THREAD_MULTIPLE")
    page = bytearray(b"E" * PAGE_SIZE if comm.rank == 0 else PAGE_SIZE)
    if comm.rank == 0:
        comm.Send([page, MPI.BYTE], 1)
    else:
        comm.Recv([page, MPI.BYTE], 0)
        if page == b"E" * PAGE_SIZE:
            print("a page came over")


# ---------------------------------------------------------------- the disk


def disk() -> Finding:
    folder = disk_folder()
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return "missing", f"{folder}: {error.strerror}", "export TMPDIR=/a/folder/of/yours"
    free = shutil.disk_usage(folder).free
    found = f"{free / (1 << 30):.1f} GiB free in {folder}, where the DMS keeps pages by default"
    with open("/proc/mounts") as mounts:
        kinds = dict(line.split()[1:3] for line in mounts)
    mount = os.path.realpath(folder)
    while mount not in kinds and mount != "/":
        mount = os.path.dirname(mount)
    if kinds.get(mount) == "tmpfs":
        found, free = f"{folder} is memory (tmpfs), so pages kept there are no gain", 0
    if free < ENOUGH_DISK:
        return "without", found, "export TMPDIR=/a/folder/on/a/larger/disk"
    return "ok", found, ""


CHECKS: dict[str, Callable[[], Finding]] = {
    "kernel": kernel,
    "userfaultfd": userfaultfd,
    "its features": features,
    "a page fault": page_fault,
    "idle pages": idle_pages,
    "pagemap": pagemap,
    "MPI": mpi,
    "two ranks": two_ranks,
    "disk": disk,
}
