"""What the tests share: running a program under mpirun, and saying why one can't run here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mpi4py
import pytest

# Some tests use classes that import mpi4py.MPI, without a job: MPI stays uninitialised.
mpi4py.rc(initialize=False, finalize=False)

from edm import uffd_ctypes
from edm.page_idle import bitmap_missing

PROGRAMS = Path(__file__).parent / "programs"


def _userfaultfd_missing() -> str:
    try:
        missing = uffd_ctypes.NEEDED_FEATURES & ~uffd_ctypes.supported_features()
    except OSError as error:
        return str(error)
    return f"this kernel's userfaultfd lacks features {missing:#x}" if missing else ""


def _mpirun() -> str | None:
    """mpirun of the same environment as this Python, else the one on PATH."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


needs_userfaultfd = pytest.mark.skipif(bool(_userfaultfd_missing()), reason=_userfaultfd_missing())
TRACKERS = [
    "unmap",
    pytest.param(
        "bitmap", marks=pytest.mark.skipif(bool(bitmap_missing()), reason=bitmap_missing())
    ),
]

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def start() -> Callable[..., subprocess.Popen]:
    """Start a command in a process group of its own, which ends with the test, whatever happens."""
    started: list[subprocess.Popen] = []

    def start(*command: object, **options: object) -> subprocess.Popen:
        environment = {
            **os.environ,
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # SIGTERM does not reach a hung page fault
        except ProcessLookupError:
            pass  # the whole group has ended, as it should
        process.wait()


@pytest.fixture
def run(start: Callable[..., subprocess.Popen]) -> Run:
    """Run a command to its end, or fail after timeout seconds; its output is in stdout."""

    def run(*command: object, timeout: float = 60, **options: object) -> Run:
        process = start(*command, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"still running after {timeout} s:\n{output}")
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return run


@pytest.fixture
def mpirun_command() -> Callable[..., list[object]]:
    """The command line that runs `python ...` with so many ranks."""
    mpirun = _mpirun()
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
