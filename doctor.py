"""python -m edm doctor: can EDM run on this machine? If not, what is missing, and which command gives it?

In the picture: nothing. It tries each arrow once.

Interface: main() prints a line for each check, and returns the exit status: 0 if EDM can run. A line
begins with "ok", "missing" (EDM can't run) or "without" (EDM runs with less). The last check is about the
tests. What follows "try:" is a command to type.

Rules: what may hang, or end its process, is tried in another process.
"""

import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

from edm import uffd_ctypes as u
from edm.page_idle import bitmap_missing

DEADLINE = 30  # seconds for anything that could hang

PERMIT = "sudo sysctl vm.unprivileged_userfaultfd=1"
PIP_INSTALL = f"{shlex.quote(sys.executable)} -m pip install"

# "ok", "missing" or "without"; what was found; a command to try, or "".
Finding = tuple[str, str, str]


def main() -> int:
    """Check everything, and print what was found. Returns the exit status."""
    can_run = True
    for check in CHECKS:
        try:
            state, found, remedy = check()
        except OSError as error:
            state, found = "missing", error.strerror
            remedy = PERMIT if isinstance(error, PermissionError) else ""
        print(f"{state:8} {check.__name__.replace('_', ' ')}: {found}")
        if remedy:
            print(f"         try: {remedy}")
        can_run = can_run and state != "missing"
    print("EDM can run here." if can_run else "EDM can't run here.")
    return 0 if can_run else 1


# ---------------------------------------------------------------- the kernel


def userfaultfd() -> Finding:
    fd, how = u.open_userfaultfd()
    os.close(fd)
    if how == u.USER_MODE:
        found = "for user mode only: read(2) and the like into a page that is not here give EFAULT"
        return "without", f"{found}, unless a seccomp filter is permitted, and knows them", PERMIT
    return "ok", f"permitted by {how}", ""


FEATURES = {
    u.NEEDED_FEATURES: "page faults of shared memory (Linux 5.18, with CONFIG_USERFAULTFD)",
    u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM: "write-protection (Linux 5.19): all pages count as written",
    u.UFFD_FEATURE_POISON: "UFFDIO_POISON (Linux 6.6): a page that is lost ends the job",
    u.UFFD_FEATURE_WP_ASYNC: "asynchronous write-protection (Linux 6.7): first writes are faults",
}


def its_features() -> Finding:
    with open(u.open_userfaultfd()[0], "rb", 0) as uffd:
        supported = u.Userfaultfd(uffd.fileno()).api(0)
    for feature, found in FEATURES.items():
        if feature & ~supported:
            return "missing" if feature == u.NEEDED_FEATURES else "without", found, ""
    return "ok", "missing pages and asynchronous write-protection of shared memory, poison", ""


def idle_pages() -> Finding:
    if missing := bitmap_missing():
        return "without", f"the kernel's bitmap ({missing}); LPET uses unmapping", ""
    return "ok", "the kernel's bitmap can be used", ""


# ---------------------------------------------------------------- EDM itself, and MPI

EXAMPLE = ("-m", "edm.examples.eviction", "--log-level", "error")
BACK = "the first page of area 1 is read, and is back"  # its last step


def a_page_fault() -> Finding:
    lines = _run(sys.executable, *EXAMPLE)
    if BACK in "\n".join(lines):
        return "ok", "pages come, leave, and come back with their bytes", ""
    return "missing", lines[0], ""


def find_mpirun() -> str | None:
    """The path of mpirun: the one of this Python's environment, or the one on PATH."""
    path = os.pathsep.join([os.path.join(sys.prefix, "bin"), os.environ.get("PATH", os.defpath)])
    return shutil.which("mpirun", path=path)


def two_ranks() -> Finding:
    if not (mpirun := find_mpirun()):
        return "without", "there is no mpirun", f"{PIP_INSTALL} mpi4py mpich"
    lines = _run(mpirun, "-n", "2", sys.executable, *EXAMPLE, "--dms", "1")
    if BACK in "\n".join(lines):
        return "ok", f"{mpirun} starts them, and a DMS keeps pages", ""
    # The ranks say that mpi4py, or its library, is missing, or of another MPI than mpirun. What else mpirun says, it
    # says without EDM, too, with what helps: Open MPI for root, or on a machine with one core.
    remedy = f"{PIP_INSTALL} mpi4py mpich; or {shlex.quote(mpirun)} -n 2 hostname"
    return "without", f"{mpirun}: {' '.join(lines[:3])}", remedy


def _run(*command: str) -> list[str]:
    """Run a command: the lines that it printed. If it printed none, one says how it ended."""
    # The current folder is the first on the path, and may have modules of the standard library's names.
    folder = os.path.dirname(os.path.abspath(__file__))
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, cwd=folder, timeout=DEADLINE, check=False, **streams)
    except subprocess.TimeoutExpired:
        return [f"nothing happened within {DEADLINE} s"]
    output = done.stdout.decode(errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip(" -\t")]
    return lines or [f"exit status {done.returncode}"]


# ---------------------------------------------------------------- the tests

PACKAGES = (
    "hypothesis", "ipykernel", "jupyter_client", "numpy", "pandas", "pytest", "ruff", "sklearn",
    "xdist",
)  # fmt: skip


def the_tests() -> Finding:
    found = {name: find_spec(name) for name in PACKAGES}
    remedy = "" if all(found.values()) else f"{PIP_INSTALL} -e '.[test]'"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    found |= {"a C compiler": shutil.which("cc"), "chromium": chromium, "root": not os.getuid()}
    if missing := [name for name in found if not found[name]]:
        return "without", f"those that need {', '.join(missing)} are skipped", remedy
    return "ok", "all that they need is here", ""


# In this order. What is printed of a check is its function's name.
CHECKS = userfaultfd, its_features, a_page_fault, idle_pages, two_ranks, the_tests
