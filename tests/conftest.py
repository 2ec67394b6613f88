"""What the tests share: running a program on one machine and over MPI, and why one can't run here."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpi4py
import pytest

# Some tests use classes that import mpi4py.MPI, without a job: MPI stays uninitialised.
mpi4py.rc(initialize=False, finalize=False)
# Unbuffered, print writes a line in pieces, and mpirun mixes the pieces of several ranks.
os.environ.pop("PYTHONUNBUFFERED", None)

from edm import uffd_ctypes
from edm.doctor import find_mpirun
from edm.lspt import ANY_HERE, LSPT, Claimed
from edm.page_idle import bitmap_missing

PROGRAMS = Path(__file__).parent / "programs"


def supported_features() -> int:
    """The UFFD_FEATURE_* bits of this kernel."""
    with open(uffd_ctypes.open_userfaultfd()[0], "rb", 0) as uffd:
        return uffd_ctypes.Userfaultfd(uffd.fileno()).api(0)


def _userfaultfd_missing() -> str:
    try:
        missing = uffd_ctypes.NEEDED_FEATURES & ~supported_features()
    except OSError as error:
        return str(error)
    return f"this kernel's userfaultfd lacks features {missing:#x}" if missing else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="crash, soak and property tests at full length"
    )
    if not find_spec("xdist"):  # then the tests run one after another
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option, help="needs pytest-xdist")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --long, over MPI one clean_tracking is tried: how first writes are noticed is the same."""
    for item in items if not config.getoption("--long") else ():
        of_test = item.callspec.params if hasattr(item, "callspec") else {}
        if of_test.get("way") == "mpi" and of_test.get("tracking") in ("events", "none"):
            item.add_marker(pytest.mark.skip(reason="over MPI, with --long only"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Of the tests that pytest-xdist's workers run at once, an undisturbed one has no other beside it.

    Each test holds a lock, shared, and an undisturbed one holds it alone. It keeps the gate shut while
    it waits for that. The locks are of folders that there are. They are let go of by name, as a forked
    process that lives on has them, too.
    """
    if not hasattr(item.config, "workerinput"):
        yield
        return
    gate, lock = fds = [os.open(folder, os.O_RDONLY) for folder in (PROGRAMS.parent, PROGRAMS)]
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(
            lock, fcntl.LOCK_EX if item.get_closest_marker("undisturbed") else fcntl.LOCK_SH
        )
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
    finally:
        for fd in fds:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


needs_userfaultfd = pytest.mark.skipif(bool(_userfaultfd_missing()), reason=_userfaultfd_missing())
TRACKERS = [
    "unmap",
    pytest.param(
        "bitmap", marks=pytest.mark.skipif(bool(bitmap_missing()), reason=bitmap_missing())
    ),
]


def _trackings() -> list:
    """Config's clean_tracking, each way that this kernel has."""
    needs = {
        "async": uffd_ctypes.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | uffd_ctypes.UFFD_FEATURE_WP_ASYNC,
        "events": uffd_ctypes.UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
        "none": 0,
    }
    try:
        has = supported_features()
    except OSError:
        has = 0
    return [
        pytest.param(
            way, marks=pytest.mark.skipif(bool(need & ~has), reason=f"no {way} write-protection")
        )
        for way, need in needs.items()
    ]


TRACKINGS = _trackings()

Run = Callable[..., subprocess.CompletedProcess]


def wait_for(condition: Callable[[], object], seconds: float = 10) -> object:
    """Poll until condition() is true, and return what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    return pytest.fail(f"waited {seconds} s in vain")


def read_until(job: Job, words: str, seconds: float = 30) -> str:
    """Read the job's output until it has these words."""
    output = ""
    while words not in output:
        assert select.select([job.stdout], [], [], seconds)[0], output
        part = os.read(job.stdout.fileno(), 1 << 16).decode()
        assert part, output
        output += part
    return output


def wait_until_gone(job: Job, seconds: float = 5) -> None:
    """Poll until no process of the job is left, and none is in the midst of its end: it has no environment
    any more, which would tell whose it is, but may have files and their locks."""
    deadline = time.monotonic() + seconds
    while job.processes() or any(map(is_ending, filter(str.isdigit, os.listdir("/proc")))):
        assert time.monotonic() < deadline, f"still there after {seconds} s:\n{job.whereabouts()}"
        time.sleep(0.005)


def stat_of(pid: int | str) -> list[str]:
    """A process's state, its parent and what follows, of proc_pid_stat(5). Its name before them may be any bytes."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def is_ending(pid: str) -> bool:
    """Is this process in the midst of its end? PF_EXITING is set, see proc_pid_stat(5), and it is no zombie yet."""
    try:
        state, *_, flags = stat_of(pid)[:7]
    except OSError:
        return False
    return state not in "ZX" and int(flags) & 4 > 0


def has_ended(pid: int) -> bool:
    """Has this process ended? If its parent has not waited for it, it has, too."""
    try:
        return stat_of(pid)[0] in "ZX"
    except OSError:
        return True


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """log.start is for a process's whole life; here it is for a test's."""
    edm = logging.getLogger("edm")
    before = edm.handlers.copy(), edm.propagate, edm.level
    yield
    edm.handlers, edm.propagate, edm.level = before


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What LSPTs wake, where there is no userfaultfd: (address, bytes)."""
    ranges: list[tuple[int, int]] = []
    wakes = SimpleNamespace(wake=lambda start, length: ranges.append((start, length)))
    monkeypatch.setattr("edm.lspt.Userfaultfd", lambda fd: wakes)
    return ranges


@pytest.fixture
def public_path() -> Iterator[Path]:
    """As tmp_path, but every user may go there."""
    with tempfile.TemporaryDirectory(prefix="edm-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def python_of(ours: str | Path, who: dict[str, Any]) -> str | Path:
    """This interpreter, or the machine's: one of this version that a user may run. Skips without one.

    who: the user, as options of subprocess.
    """
    code = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    for python in (ours, "/usr/bin/python3"):
        try:
            if not subprocess.run([python, "-c", code], check=False, **who).returncode:
                return python
        except OSError:  # it is not there, or not for this user
            continue
    pytest.skip("there is no Python of this version that nobody may run")


def has_mpich() -> bool:
    """Is the mpirun that the tests use MPICH's?"""
    command = [find_mpirun() or "false", "--version"]
    return "HYDRA" in subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


class Job(subprocess.Popen):
    """A command, and all processes that come of it, wherever a launcher puts them.

    MPI launchers make sessions and process groups of their own, so a mark in the environment tells
    which processes are this job's.
    """

    def __init__(self, *command: object, **options: object) -> None:
        self.mark = f"EDM_TEST_JOB={uuid.uuid4()}"
        environment = {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            **dict([self.mark.split("=")]),
        }
        super().__init__(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            **{"stdin": subprocess.DEVNULL, **options},
        )

    def processes(self) -> dict[int, int]:
        """{process id: its parent's} of those that have not ended."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                state, parent, *_ = stat_of(pid)
            except OSError:
                continue  # it ended while we looked, or is another user's
            if self.mark.encode() in environment and state != "Z":
                found[int(pid)] = int(parent)
        return found

    def parts(self) -> dict[str, int]:
        """{name of the part: process id}, once the job has them all.

        On one machine "application", "pager" and, without a kept disk, "LPET"; of a job of two ranks
        "DMS", "pager" and "application".
        """
        processes = self.processes()
        if not Path(self.args[0]).name.startswith("mpi"):
            # The pager has a session of its own.
            pagers = [pid for pid in processes if _session(pid) == pid != self.pid]
            lpets = [pid for pid, parent in processes.items() if parent in pagers]
            names = ("application", "pager", *(["LPET"] if lpets else []))
            return dict(zip(names, [self.pid, *pagers, *lpets], strict=True)) if pagers else {}
        ranks = self.ranks()
        if not {0, 1} <= ranks.keys():
            return {}
        applications = [pid for pid, parent in processes.items() if parent == ranks[1]]
        if not applications:
            return {}
        return {"DMS": ranks[0], "pager": ranks[1], "application": applications[0]}

    def ranks(self) -> dict[int, int]:
        """{rank: process id} of an MPI job."""
        processes = self.processes()
        return {rank: pid for pid in processes if (rank := self._rank(pid)) is not None}

    @staticmethod
    def _rank(pid: int) -> int | None:
        """The rank that a process is; None for others, and children of ranks."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parent = stat_of(pid)[1]
            parents = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
        except OSError:
            return None
        for name in (b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK="):
            for variable in set(environment) - set(parents):
                if variable.startswith(name):
                    return int(variable.removeprefix(name))
        return None

    def whereabouts(self) -> str:
        """What each thread of each process waits for in the kernel."""
        lines = []
        for pid in self.processes():
            with contextlib.suppress(OSError):  # it has ended
                command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                lines.append(f"{pid}: {' '.join(command.replace(chr(0), ' ').split())[:300]}")
                for task in Path(f"/proc/{pid}/task").iterdir():
                    lines.append(f"  thread {task.name}")
                    for name in ("wchan", "syscall", "stack"):
                        with contextlib.suppress(OSError):  # another user's
                            lines[-1] += f", {name} {' '.join((task / name).read_text().split())}"
        return "\n".join(lines)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple:
        """As Popen's, but it fails after timeout seconds, and tells where the processes are."""
        try:
            return super().communicate(input, timeout)
        except subprocess.TimeoutExpired:
            where = self.whereabouts()
            self.kill_all()
            output, _ = super().communicate()
            return pytest.fail(f"still running after {timeout} s:\n{where}\nOutput:\n{output}")

    def kill_all(self) -> None:
        """By SIGKILL: SIGTERM does not reach a process in a hung page fault."""
        while processes := self.processes():
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """At the end, remove what MPI has left in shared memory of ranks that were killed.

    Files that a process has mapped are somebody else's; so are, for a worker, those of the others. They
    are listed before the processes are looked at: a job of another session that starts meanwhile would
    hang in MPI_Init for ever if one rank found the file, and the next one did not.
    """
    shm = Path("/dev/shm")
    before = set(shm.iterdir())
    yield
    if hasattr(session.config, "workerinput"):
        return
    left = set(shm.iterdir()) - before
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            mapped += maps.read_text()
    for path in left:
        if path.name.startswith(("mpich_shm_", "sm_segment.")) and f"{path}" not in mapped:
            path.unlink(missing_ok=True)


@pytest.fixture
def start() -> Callable[..., Job]:
    """Start a command as a Job that ends with the test, whatever happens."""
    started: list[Job] = []

    def start(*command: object, **options: object) -> Job:
        started.append(Job(*command, **options))
        return started[-1]

    yield start
    for job in started:
        job.kill_all()


@pytest.fixture
def run(start: Callable[..., Job]) -> Run:
    """Run a command to its end, or fail after timeout seconds; its output is in stdout."""

    def run(*command: object, timeout: float = 60, **options: object) -> Run:
        job = start(*command, **options)
        output, _ = job.communicate(timeout=timeout)
        return subprocess.CompletedProcess(job.args, job.returncode, output)

    return run


@pytest.fixture
def mpirun_command() -> Callable[..., list[object]]:
    """The command line that runs `python ...` with so many ranks."""
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("there is no mpirun: pip install mpich")

    def command(*arguments: object, ranks: int = 2) -> list[object]:
        return [mpirun, "-n", ranks, sys.executable, *arguments]

    return command


@pytest.fixture
def mpirun(run: Run, mpirun_command: Callable[..., list[object]]) -> Run:
    """Run `python ...` as an MPI job to its end."""

    def mpirun(*arguments: object, ranks: int = 2, **options: object) -> Run:
        return run(*mpirun_command(*arguments, ranks=ranks), **options)

    return mpirun


class Way:
    """Runs programs in one way: on one machine, or over MPI as a DMS and an instance."""

    def __init__(self, mpirun: str | None, start: Callable[..., Job], run: Run) -> None:
        """mpirun: its path; None: on one machine."""
        self.alone = mpirun is None
        self._mpirun, self._start, self._run = mpirun, start, run

    def command(self, *arguments: object) -> list[object]:
        """The command line that runs `python ...` so."""
        return [*([] if self.alone else [self._mpirun, "-n", 2]), sys.executable, *arguments]

    def start(self, *arguments: object, **options: object) -> Job:
        """Start `python ...`."""
        return self._start(*self.command(*arguments), **options)

    def run(self, *arguments: object, **options: object) -> subprocess.CompletedProcess:
        """Run `python ...` to its end."""
        return self._run(*self.command(*arguments), **options)

    def killed_by(self, number: int) -> int:
        """The job's return code when this signal has killed the application."""
        return -number if self.alone else 128 + number

    def failed(self) -> int:
        """The job's return code when EDM itself had to end it."""
        return -signal.SIGKILL if self.alone else 2


@pytest.fixture(params=["alone", "mpi"])
def way(request: pytest.FixtureRequest, start: Callable[..., Job], run: Run) -> Way:
    """A test that has this is run in both ways."""
    mpirun = find_mpirun() if request.param == "mpi" else None
    if request.param == "mpi" and not mpirun:
        pytest.skip("there is no mpirun: pip install mpich")
    return Way(mpirun, start, run)


@pytest.fixture
def alone(start: Callable[..., Job], run: Run) -> Way:
    """On one machine only."""
    return Way(None, start, run)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """4 MiB, mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def shared_memory():
    """KiB that this process has of it."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssShmem")).split()[1])


# ---------------------------------------------------------------- a table of one's own


def close(lspt: LSPT) -> None:
    os.close(lspt.for_handler)
    os.close(lspt.for_lpet)


def pages_in(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The pages of these runs."""
    for page, count in runs:
        yield from range(page, page + count)


def lpet_is_first(lspt: LSPT, page: int, count: int) -> list[Claimed]:
    """Whoever takes the lock next gets it after LPET has claimed these pages. This is then in the list."""
    lock, left = lspt.lock, []

    class LpetIsFirst:
        def __enter__(self):
            lspt.lock = lock
            left.append(lspt.claim(page, count, ANY_HERE))
            lock.acquire()

        def __exit__(self, *raised):
            lock.release()

    lspt.lock = LpetIsFirst()
    return left
