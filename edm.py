"""EDM: more memory than this machine has, for a Python program. Start reading here.

    instance rank                                                   DMS rank
    ┌─────────────────────┐ uffd+memfd ┌─────────────────────┐ MPI ┌─────────────────────┐
    │ application process │ ─────────► │ pager process       │ ◄─► │ DMS                 │
    │   your code         │            │   DM-Handler thread │     │   SPT page→location │
    │   space.mmap(...)   │ page fault │   LPET thread       │     │   disk file         │
    │   a[0] = 1          │ ─────────► │   LSPT local pages  │     │                     │
    └─────────────────────┘ ◄───────── └─────────────────────┘     └─────────────────────┘
         address_space.py     a page     pager.py lspt.py            dms.py
         numpy_mem_handler.py            dm_handler.py               (the arrow: messages.py
                                         readahead.py                 mpi_client.py
                                         lpet.py page_idle.py         doorbell.py)

Interface:
    Config                     the settings
    run(app, config)           run app(space) as the application of every instance of an MPI job
    space()                    in an application: its Space
    numpy_allocator(...)       in an application: NumPy's large arrays live in its Space
    parse_arguments, main      as run, for a program with command-line options
    PAGE_SIZE                  bytes

`python -m edm run` (launch.py) runs a program that knows nothing of all this.

Rules: rank 0 of the job is the DMS; every other rank is an instance, whose application process is
forked *before* MPI is initialised and never calls MPI. So a program that calls run() must not
import mpi4py.MPI first; every rank runs the program up to run(), and on after it.
"""

from __future__ import annotations

import argparse
import array
import atexit
import contextlib
import dataclasses
import fcntl
import gc
import io
import logging
import os
import runpy
import signal
import socket
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "edm":
    # Python was started in this folder, and found this file before the package of the same name.
    __path__ = [str(Path(__file__).parent)]
    sys.modules["edm.edm"] = sys.modules["edm"]

from edm import log
from edm.address_space import Descriptors, Space
from edm.lspt import MAX_PAGES
from edm.messages import MAX_PAGES as MAX_BATCH
from edm.messages import DMSGone
from edm.page_idle import TRACKERS, choose_tracker
from edm.uffd_ctypes import PAGE_SIZE, PR_SET_PDEATHSIG, flush_c_streams, prctl

__all__ = [
    "PAGE_SIZE",
    "Config",
    "Space",
    "main",
    "numpy_allocator",
    "parse_arguments",
    "run",
    "space",
]


# How a setting reads on a command line: what makes it of the text, and what the help calls it.
_PARSE = {"ADDR": lambda text: int(text, 0), "PAGES": int, "PATH": str, "FILE.html": str}


def _setting(default: Any, help: str, metavar: str = "", choices: Any = None) -> Any:
    """metavar: a key of _PARSE; with choices, none."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


# Seconds. When one rank ends with an error, Open MPI's mpirun kills the others: who has nothing to
# tell leaves that much to the one that has. And what a launcher has to read a message, at most.
TELLING = 0.3


def disk_folder() -> str:
    """Where a disk without a path is: not in /tmp, which is memory on many machines."""
    return os.environ.get("TMPDIR") or "/var/tmp"


@dataclass(frozen=True)
class Config:
    """The settings of a job. Raises ValueError, which names the setting, for what can't be."""

    start_addr: int = _setting(
        0x10_0000_0000, "where the address space begins (an address, whole pages)", "ADDR"
    )
    end_addr: int = _setting(
        0x20_0000_0000, "where it ends (an address, whole pages; not part of it)", "ADDR"
    )
    high_threshold: int = _setting(
        65536, "an instance never holds more; when it holds so many, LPET wakes", "PAGES"
    )
    low_threshold: int | None = _setting(
        None, "LPET evicts until no more are left (default: 7/8 of high_threshold)", "PAGES"
    )
    disk: str | None = _setting(
        None, "the DMS's disk file (default: one without a name, in $TMPDIR or /var/tmp)", "PATH"
    )
    keep: bool = _setting(
        False, "whether the disk outlives the job, and the next one finds its memory there"
    )
    idle_tracker: str = _setting(
        "auto",
        "how LPET finds idle pages: the kernel's idle bitmap (needs root and a kernel that has "
        "it), or unmapping; auto takes the bitmap where it can",
        choices=TRACKERS,
    )
    readahead: int = _setting(
        256, "at most so many are fetched at once for sequential access; 1: never", "PAGES"
    )
    evict_batch: int = _setting(256, "at most so many are evicted at once", "PAGES")
    clean_tracking: bool = _setting(
        True, "whether a page that was not written is dropped without being sent"
    )
    stats: bool = _setting(False, "whether a table at the end tells what EDM did")
    progress: bool = _setting(
        False, "whether a live line tells what EDM does, where stderr is a terminal"
    )
    report: str | None = _setting(None, "write an HTML page of what EDM did there", "FILE.html")
    log_level: str = _setting("warning", "the least level of log lines shown", choices=log.LEVELS)

    def __post_init__(self) -> None:
        if self.low_threshold is None:
            low = self.high_threshold - max(1, self.high_threshold // 8)
            object.__setattr__(self, "low_threshold", low)
        for name in ("start_addr", "end_addr"):
            value = getattr(self, name)
            if value % PAGE_SIZE or value <= 0:
                raise ValueError(f"{name}: {value:#x} is no positive multiple of {PAGE_SIZE:#x}")
        if self.start_addr >= self.end_addr:
            raise ValueError(
                f"end_addr: {self.end_addr:#x} leaves no space after start_addr, "
                f"{self.start_addr:#x}; it must be greater"
            )
        if (self.end_addr - self.start_addr) // PAGE_SIZE > MAX_PAGES:
            raise ValueError(f"end_addr: the space has more than {MAX_PAGES} pages; make it less")
        if self.high_threshold < 2:
            raise ValueError(
                f"high_threshold: {self.high_threshold} pages; at least 2, "
                "as one instruction may touch two"
            )
        if not 0 <= self.low_threshold < self.high_threshold:
            raise ValueError(
                f"low_threshold: {self.low_threshold} pages; it must be at least 0 and less than "
                f"high_threshold, {self.high_threshold}"
            )
        if self.report and not os.path.isdir(os.path.dirname(self.report) or "."):
            raise ValueError(f"report: there is no folder for {self.report}; make it first")
        if self.keep and not self.disk:
            raise ValueError("keep: needs a disk that has a name; give its path as disk")
        for name in ("readahead", "evict_batch"):
            if not 1 <= getattr(self, name) <= MAX_BATCH:
                raise ValueError(f"{name}: {getattr(self, name)} pages; from 1 to {MAX_BATCH}")
        for setting in dataclasses.fields(self):
            choices, value = setting.metadata["choices"], getattr(self, setting.name)
            if choices and value not in choices:
                raise ValueError(f"{setting.name}: {value!r}; one of {', '.join(choices)}")


# ---------------------------------------------------------------- running a job


def run(app: Callable[[Space], object], config: Config | None = None) -> None:
    """Run app(space) in the application process of every instance, under mpirun -n 2 or more.

    Every rank of the job calls this, before it imports mpi4py.MPI. Returns when the applications
    have ended and the job is shut down. When an application raised, called sys.exit(n) with n not
    0, or was killed, this exits with its status instead (a traceback is on stderr).

    Raises ValueError for settings that can't be (the range overlaps what the process has there,
    too few ranks, ...) and OSError for what this machine lacks or what failed, before the
    application starts wherever possible.
    """
    config = config or Config()
    if "mpi4py.MPI" in sys.modules:
        raise ValueError(
            "edm.run: mpi4py.MPI is imported already; import it after edm.run, if ever"
        )
    log.start(config.log_level)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else the child would write it again
    pagers_end, applications_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    application = os.fork()
    if application == 0:
        pagers_end.close()
        _run_application(app, config, applications_end, parent)
    applications_end.close()
    status = _run_rank(config, application, pagers_end)
    if status:
        sys.exit(status)


def _run_rank(config: Config, application: int, control: socket.socket) -> int:
    """Be the DMS or a pager, as MPI says; returns the exit status."""
    from mpi4py import MPI  # this initialises MPI: not before the fork

    world, role = MPI.COMM_WORLD, None
    try:
        _check_mpi(MPI)
        comm = world.Dup()
        if comm.rank == 0:
            control.close()  # the child that was forked here has nothing to do
            os.waitpid(application, 0)
            role = _prepare(MPI, comm, lambda: _make_dms(comm, config))
        else:
            role = _prepare(MPI, comm, lambda: _make_pager(comm, config, application, control))
        if role is None:
            time.sleep(TELLING)
        return role() if role else 1
    except (ValueError, OSError) as error:
        control.close()
        if world.rank or role is None:
            raise  # before it began, or with BYE said: no other rank waits for this one
        print(f"edm: error: the DMS has failed: {error}", file=sys.stderr)
        _abort(world, 2)
    except BaseException as error:  # noqa: BLE001 - it ends this process
        # Another rank may be waiting for this one: end the job rather than hang.
        if isinstance(error, DMSGone):
            print(f"edm: error: {error}", file=sys.stderr)
        elif isinstance(error, MPI.Exception):
            reason = str(error).splitlines()[-1]
            print(f"edm: error: MPI: {reason}; a process of the job has died?", file=sys.stderr)
        else:
            traceback.print_exc()
        _abort(world, 1)


def _abort(world: Any, status: int) -> NoReturn:
    """End the whole job, but not before the launcher has read why.

    What is in its pipes when MPI_Abort tells it to end, MPICH's throws away (measured: in 21 jobs
    of 250, with both cores taken).
    """
    sys.stderr.flush()
    deadline = time.monotonic() + TELLING
    while any(map(_unread, (1, 2))) and time.monotonic() < deadline:
        time.sleep(0.001)
    world.Abort(status)
    os._exit(status)  # a launcher that was told not to clean up lets Abort return


def _unread(descriptor: int) -> int:
    """How many bytes nobody has read yet, if it is a pipe; else 0."""
    waiting = array.array("i", [0])
    with contextlib.suppress(OSError):  # it is closed
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
    return waiting[0]


def _check_mpi(MPI: Any) -> None:
    if MPI.COMM_WORLD.size < 2:
        raise ValueError(
            "edm.run: needs at least 2 MPI ranks (the DMS and an instance), but there is only one; "
            "start it as: mpirun -n 2 python ..."
        )
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise OSError("edm.run: this MPI library has no MPI_THREAD_MULTIPLE; install one that has")


def _prepare(MPI: Any, comm: Any, make: Callable[[], Callable[[], int]]) -> Any:
    """Make this rank's role, if every rank can make its own; None if another one could not.

    Raises ValueError or OSError if this rank could not.
    """
    failure = role = None
    try:
        role = make()
    except (ValueError, OSError) as error:
        failure = error
    ready = bytearray([failure is None])
    comm.Allreduce(MPI.IN_PLACE, [ready, MPI.BYTE], MPI.BAND)
    if failure:
        raise failure
    return role if ready[0] else None


def _make_dms(comm: Any, config: Config) -> Callable[[], int]:
    from edm.dms import DMS

    server = DMS(comm, config.disk, config.start_addr, config.end_addr, config.keep)

    def serve() -> int:
        server.serve()
        return 0

    return serve


def _make_pager(
    comm: Any, config: Config, application: int, control: socket.socket
) -> Callable[[], int]:
    from edm.mpi_client import MpiClient
    from edm.pager import DMS_RANK, Pager

    client_log = log.logger("EDM CLIENT")
    client_log.debug("INIT")
    tracker = choose_tracker(config.idle_tracker)
    control.send(bytes([comm.rank - 1]))
    descriptors = Descriptors.receive(control)

    def serve() -> int:
        try:
            pager = Pager(comm, config, tracker, application, control, descriptors)
        except BaseException:
            MpiClient(comm, DMS_RANK, tag=0, patient=True).bye()
            raise
        status = pager.run()
        client_log.debug("SHUTDOWN!")
        return status

    return serve


# ---------------------------------------------------------------- the application process


def _run_application(
    app: Callable[[Space], object], config: Config, control: socket.socket, parent: int
) -> NoReturn:
    """The child: make the space when the pager says that it is one, run app, and exit."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # without a pager, a fault would never be resolved
    os.setpgid(0, 0)  # what a launcher sends to a rank's whole group comes from the pager, once
    instance = control.recv(1) if os.getppid() == parent else b""
    if not instance:
        os._exit(0)  # this rank is the DMS, or has ended
    atexit._clear()  # those of the parent are the parent's
    global _space
    resident_limit = config.high_threshold * PAGE_SIZE
    _space = Space.open(config.start_addr, config.end_addr, resident_limit, instance[0], control)
    if _space is None or not control.recv(2):
        os._exit(1)
    status = 1
    try:
        log.logger("Usercode").debug("User code main function start running")
        app(_space)
        status = 0
    except SystemExit as exit:
        status = _exit_status(exit.code)
    except BaseException as error:  # noqa: BLE001 - whatever it raised, it has ended
        # Told as Python tells it, without the frames that led to the program.
        own = (__file__, str(Path(__file__).with_name("launch.py")), runpy.__file__, "<frozen")
        error = error.with_traceback(log.programs_own(error.__traceback__, own))
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        try:
            # A program's own hook may end the process.
            pythons = sys.excepthook is sys.__excepthook__
            with _in_one_piece(sys.stderr) if pythons else contextlib.nullcontext():
                sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as exit:  # the program's own hook
            status = _exit_status(exit.code)
        except BaseException as second:  # noqa: BLE001 - likewise
            print("Error in sys.excepthook:", file=sys.stderr)
            trace = log.programs_own(second.__traceback__, own)
            traceback.print_exception(type(second), second, trace, chain=False)
            print("\nOriginal exception was:", file=sys.stderr)
            traceback.print_exception(type(error), error, error.__traceback__)
    # As a Python process ends: its threads, its exit functions, and what is left in buffers.
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        logging.shutdown()
        _forget_main()
        for left in gc.get_objects():
            if isinstance(left, (io.TextIOWrapper, io.BufferedWriter)) and not left.closed:
                with contextlib.suppress(OSError, ValueError):  # Python's own end ignores them too
                    left.flush()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, None, or nobody reads it
                stream.flush()
        flush_c_streams()
        os._exit(status)


@contextlib.contextmanager
def _in_one_piece(stream: Any) -> Iterator[None]:
    """Python writes a traceback word by word; mpirun would put what others write in between."""
    try:
        before = stream.line_buffering, stream.write_through
        stream.reconfigure(line_buffering=False, write_through=False)
    except (AttributeError, OSError, ValueError):  # of another kind; nobody reads it; closed
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(line_buffering=before[0], write_through=before[1])


def _forget_main() -> None:
    """Finalize what the program's globals hold, while these can still be used."""
    sys.modules.pop("__main__", None)
    gc.collect()
    frame = sys._getframe()
    while frame:  # those of a program that has called run() itself
        if frame.f_globals.get("__name__") == "__main__":
            frame.f_globals.clear()
        frame = frame.f_back
    gc.collect()


def _exit_status(code: object) -> int:
    """The exit status that Python gives for sys.exit(code)."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


# ---------------------------------------------------------------- in the application

_space: Space | None = None  # of this process, if it is an application


def space() -> Space:
    """The Space of the application that this is. Raises RuntimeError elsewhere."""
    if _space is None:
        raise RuntimeError("edm.space: this process is not an application of EDM's")
    return _space


def numpy_allocator(threshold: int = 1 << 20) -> contextlib.AbstractContextManager[None]:
    """A context manager: NumPy arrays made meanwhile, from threshold bytes on, live in the space.

    Raises RuntimeError where there is no space, ImportError where there is no NumPy from 1.22 on.
    """
    from edm import numpy_mem_handler  # the only one that needs NumPy

    return numpy_mem_handler.numpy_allocator(space(), threshold)


# ---------------------------------------------------------------- command-line programs


def parse_arguments(
    parser: argparse.ArgumentParser, **defaults: Any
) -> tuple[argparse.Namespace, Config]:
    """Add an option for every setting of Config to the parser, and parse the command line.

    defaults: settings of this program that differ from Config's. A mistake is told in one line, by
    one rank, and ends the program with status 2.
    """
    add_settings(parser, **defaults)
    args = parser.parse_args()
    with told_in_one_line(parser.prog):
        return args, Config(**{s.name: getattr(args, s.name) for s in dataclasses.fields(Config)})


def add_settings(
    parser: argparse.ArgumentParser, leave_out: Iterable[str] = (), **defaults: Any
) -> None:
    """Add an option for every setting of Config, but for those to leave out."""
    group = parser.add_argument_group("EDM")
    for setting in dataclasses.fields(Config):
        if setting.name not in leave_out:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if not isinstance(setting.default, bool):
                metavar = setting.metadata["metavar"]
                kind = {"type": _PARSE.get(metavar, str), "metavar": metavar or None}
                kind["choices"] = setting.metadata["choices"]
            group.add_argument(
                "--" + setting.name.replace("_", "-"),
                default=defaults.get(setting.name, setting.default),
                help=setting.metadata["help"],
                **kind,
            )


@contextlib.contextmanager
def told_in_one_line(prog: str) -> Iterator[None]:
    """A ValueError in here is a mistake of the user's: one rank tells it, and the status is 2."""
    try:
        yield
    except ValueError as error:
        if launched_rank():
            time.sleep(TELLING)
        else:
            print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def main(app: Callable[[Space], object], config: Config) -> None:
    """run(), for a command: what it raises is told in one line, and the status is 2."""
    try:
        run(app, config)
    except (ValueError, OSError) as error:
        print(f"edm: error: {error}", file=sys.stderr)
        sys.exit(2)


def launched_rank() -> int | None:
    """This process's rank, if an MPI launcher has started it; known before MPI is initialised."""
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_STEP_NODELIST"):
        if name in os.environ:
            rank = os.environ.get(name if name.endswith("_RANK") else "SLURM_PROCID", "")
            return int(rank) if rank.isdigit() else 0
    return None


if __name__ == "__main__":
    # `python -m edm`, by a Python that was started in this folder.
    from edm.__main__ import main as command

    command()
