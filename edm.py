"""EDM: more memory than this machine has, for a Python program. Start reading here.

     one machine (default)       python -m edm run script.py          python program.py

     ┌──────────────────────┐ uffd+memfd ┌──────────────────────┐
     │ application          │ ─────────► │ pager                │  pread   ┌──────────────┐
     │   the process that   │ page fault │   DM-Handler         │ ───────► │ PageStore    │
     │   the user started   │ ◄───────── │   LPET               │  write   │  SPT, disk   │
     └──────────────────────┘    page    │   LSPT, local pages  │ ───────► └──────────────┘
       address_space.py                  └──────────────────────┘            page_store.py
       numpy_mem_handler.py                pager.py, lspt.py
       (calls: mailbox.py)                 dm_handler.py, readahead.py
                                           lpet.py, page_idle.py

     many machines               mpirun -n 3 python -m edm run --dms 1 script.py

                                         pager ── MPI ──► DMS (rank 0): a PageStore for each instance
                                         pager ── MPI ──►
                                           rank.py, mpi_client.py, messages.py, dms.py

Interface:
    Config                     the settings
    run(app, config)           run app(space) with a space of its own
    start(config)              make this interpreter an application, for the rest of its life
    space()                    in an application: its Space
    numpy_allocator(...)       in an application: NumPy's large arrays live in its Space
    parse_arguments, main      as run, for a program with command-line options
    PAGE_SIZE                  bytes

`python -m edm run` (launch.py) runs a program that knows nothing of all this.

Rules: the application is the process that calls run or start. On one machine that spawns the pager.
Under an MPI launcher rank 0 is the DMS, and every other rank forks *before* MPI is initialised: the
child is the application, and goes on with the program; the parent is the pager, and ends with the
application's status. So such a program must not import mpi4py.MPI first.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

if __name__ == "edm":
    # Python was started in this folder, and found this file before the package of the same name.
    __path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["edm.edm"] = sys.modules["edm"]

from edm.address_space import TRACKING, Space, spawn_pager
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    import argparse
    import contextlib
    from typing import Any

__all__ = [
    "PAGE_SIZE",
    "Config",
    "Space",
    "main",
    "numpy_allocator",
    "parse_arguments",
    "run",
    "space",
    "start",
]


MAX_PAGES = 1 << 36  # of a space: 256 TiB
TRACKERS = ("auto", "bitmap", "unmap")
LEVELS = ("debug", "info", "warning", "error")

# How a setting reads on a command line: what makes it of the text, and what the help calls it.
_PARSE = {"ADDR": lambda text: int(text, 0), "PAGES": int, "RANKS": int}


def _setting(default: Any, help: str, metavar: str = "", choices: Any = None) -> Any:
    """metavar: a key of _PARSE; with choices, none."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


# Seconds. When one rank ends with an error, Open MPI's mpirun kills the others: who has nothing to
# tell leaves that much to the one that has.
TELLING = 0.3


@dataclass(frozen=True)
class Config:
    """The settings. Raises ValueError, which names the setting, for what can't be."""

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
        None, "the disk file (default: one without a name, in $TMPDIR or /var/tmp)", "PATH"
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
    clean_tracking: str = _setting(
        "auto",
        "how first writes are noticed, so that a page that was not written is dropped without being "
        "stored: by the kernel alone (Linux 6.7), by events (5.19), or not",
        choices=TRACKING,
    )
    dms: int | None = _setting(
        None, "how many MPI ranks are DMSs (default: 1 under mpirun -n 2 or more, else 0)", "RANKS"
    )
    stats: bool = _setting(False, "whether a table at the end tells what EDM did")
    progress: bool = _setting(
        False, "whether a live line tells what EDM does, where stderr is a terminal"
    )
    report: str | None = _setting(None, "write an HTML page of what EDM did there", "FILE.html")
    log_level: str = _setting("warning", "the least level of log lines shown", choices=LEVELS)

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
            if not 1 <= getattr(self, name) <= PAGES_AT_ONCE:
                raise ValueError(f"{name}: {getattr(self, name)} pages; from 1 to {PAGES_AT_ONCE}")
        if self.dms not in (None, 0, 1):
            raise ValueError(f"dms: {self.dms} ranks; 0 or 1")
        for setting in dataclasses.fields(self):
            choices, value = setting.metadata["choices"], getattr(self, setting.name)
            if choices and value not in choices:
                raise ValueError(f"{setting.name}: {value!r}; one of {', '.join(choices)}")


# ---------------------------------------------------------------- an application

_space: Space | None = None  # of this process, if it is an application


def run(app: Callable[[Space], object], config: Config | None = None) -> None:
    """Run app(space), with a space that begins and ends with it.

    What app raises, run raises. Raises ValueError for settings that can't be (the range overlaps
    what the process has there, ...) and OSError for what this machine lacks or what failed, before
    app is called.

    Under mpirun -n 2 or more every rank calls this. A rank that is a DMS returns when the
    applications have ended; of the others, the application process does.
    """
    from edm import log

    config = config or Config()
    log.start(config.log_level)
    if _begin(config) is not None:
        _run(app)


def _run(app: Callable[[Space], object]) -> None:
    global _space
    from edm import log

    try:
        log.logger("Usercode").debug("User code main function start running")
        app(space())
    finally:
        ended, _space = space(), None
        ended.close()


def start(config: Config | None = None) -> Space:
    """Make this interpreter an application; its Space, which lasts as long as the process.

    Raises as run. Under an MPI launcher, the DMS's rank does not return.
    """
    started = _begin(config or Config())
    if started is None:  # this rank was the DMS
        from edm import rank

        rank.end(0)
    return started


def _begin(config: Config) -> Space | None:
    """None in a rank that was a DMS."""
    global _space
    if _space is not None:
        raise RuntimeError("edm.start: this process is an application of EDM's already")
    _, ranks = launched()
    if config.dms and ranks < 2:
        raise ValueError(
            "dms: needs at least 2 MPI ranks (the DMS and an instance); "
            "start it as: mpirun -n 2 python ..."
        )
    with _streams_taken():
        if config.dms or config.dms is None and ranks > 1:
            from edm import rank

            connected = rank.fork_application(config)
            if connected is None:
                return None
            control, instance = connected
        else:
            control, instance = spawn_pager(), 0
        _space = Space(config, control, instance)
    return _space


@contextmanager
def _streams_taken() -> Iterator[None]:
    """If a standard stream is closed, no descriptor of EDM's may get its number."""
    held = [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)]
    while held[-1] < 3:
        held.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)


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


def launched() -> tuple[int, int]:
    """(rank, ranks), if an MPI launcher has started this process; else (0, 1).

    Known before MPI is initialised. MPICH's variables count only while its descriptor is open: they
    are inherited by processes that are no ranks.
    """
    names = ("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    for rank, ranks in (*names, ("PMIX_RANK", "SLURM_STEP_NUM_TASKS")):
        found = os.environ.get(rank, ""), os.environ.get(ranks, "")
        descriptor = os.environ.get("PMI_FD", "") if rank == "PMI_RANK" else ""
        if all(map(str.isdigit, found)) and os.path.exists(f"/proc/self/fd/{descriptor}"):
            return int(found[0]), int(found[1])
    return 0, 1


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
    import argparse

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


@contextmanager
def told_in_one_line(prog: str) -> Iterator[None]:
    """A ValueError in here is a mistake of the user's: one rank tells it, and the status is 2."""
    try:
        yield
    except ValueError as error:
        if launched()[0]:
            time.sleep(TELLING)
        else:
            print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def main(app: Callable[[Space], object], config: Config) -> None:
    """run(), for a command: what it raises before app is called is told in one line, and the status
    is 2."""
    from edm import log

    log.start(config.log_level)
    try:
        started = _begin(config)
    except (ValueError, OSError) as error:
        print(f"edm: error: {error}", file=sys.stderr)
        sys.exit(2)
    if started is not None:
        _run(app)


if __name__ == "__main__":
    # `python -m edm`, by a Python that was started in this folder.
    from edm.__main__ import main as command

    command()
