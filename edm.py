"""EDM: more memory than this machine has, for a Python program. Start reading here.

     one machine (default)       python -m edm run script.py          python program.py

     ┌──────────────────────┐ uffd+memfd ┌──────────────────────┐
     │ application          │ ─────────► │ pager                │  pread   ┌──────────────┐
     │   the process that   │ page fault │   DM-Handler         │ ───────► │ PageStore    │
     │   the user started   │ ◄───────── │   LPET               │  pwrite  │  SPT, disk   │
     └──────────────────────┘    page    │   LSPT, local pages  │ ───────► └──────────────┘
       address_space.py                  └──────────────────────┘            page_store.py
       numpy_mem_handler.py                pager.py, lspt.py
       advice.py                           dm_handler.py, readahead.py, children.py
       (calls: mailbox.py, lifeline.py)    lpet.py, page_idle.py, system_calls.py, pins.py

     many machines               mpirun -n 4 python -m edm run --dms 2 script.py

                                         pager ── MPI ──► DMS (rank 0): a PageStore for each instance
                                               ╲╱         with every second stripe of its pages
                                         pager ── MPI ──► DMS (rank 1): likewise
                                           rank.py, mpi_client.py, messages.py, dms.py

The words, which are those of the original's wiki ("End to End Examples"), as are the lines of the log:
    instance      an application and its pager         DM-Handler   resolves page faults
    LPET          low priority eviction thread         LSPT         the states of this instance's pages
    DMS           disk manager server                  SPT          where each page of an instance is

Interface:
    Config                     the settings
    run(app, config)           run app(space) with a space of its own
    start(config)              make this interpreter an application, for the rest of its life
    space()                    in an application: its Space
    main(app, config)          as run, for a program with command-line options: launch.py's parse_arguments
    PAGE_SIZE                  bytes

`python -m edm run` (launch.py) runs a program that knows nothing of all this.

Rules: the application is the process that calls run or start. On one machine that spawns the pager. Under an MPI
launcher, the first ranks are DMSs if there are to be any. Every rank forks *before* MPI is initialised. Of a rank
that is no DMS, the child is the application, and goes on with the program; the parent is the pager, and ends with
the application's status. A DMS ends when the applications have ended. So a program goes on in its applications
alone, and must not import mpi4py.MPI first.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

if __name__ == "edm":
    # Python looks for modules in this folder, and found this file before the package of the same name: it was
    # started here, or it is a pager's (lifeline.py).
    __path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["edm.edm"] = sys.modules["edm"]
    from edm.__init__ import __getattr__  # noqa: F401

from edm.address_space import Space
from edm.lifeline import spawn_pager
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE

# Seconds that a launcher gets to read what a rank has printed. A rank waits so long before it ends with an
# error that another rank prints: Open MPI's mpirun then kills the others.
PRINTING = 0.3

CHOICES = {
    "idle_tracker": ("auto", "bitmap", "unmap"),
    "clean_tracking": ("auto", "async", "events", "none"),
    "log_level": ("debug", "info", "warning", "error"),
}

# What a setting of this type is made of: also a NumPy integer, or a path.
AS = {"int": operator.index, "bool": bool, "str": lambda value: str(os.fsdecode(value))}


class Config(SimpleNamespace):
    """The settings. They are keyword arguments, except for start_addr and end_addr, and can't be changed.

    The help of the command line's options is taken from these lines (launch.py):

    start_addr: where the address space begins (an address, whole pages)
    end_addr: where it ends (an address, whole pages; not part of it)
    high_threshold: pages that an instance holds at most; LPET begins to evict halfway to low_threshold, or here
    low_threshold: pages; a run of LPET evicts down to so many (default: 256 or 1/32 less; at most 1/8)
    disk: path of the disk file (default: one without a name, in $TMPDIR or /var/tmp)
    keep: whether the disk outlives the job, and the next one finds its memory there
    idle_tracker: how LPET finds idle pages, by the kernel's idle bitmap (root only) or by unmapping
    readahead: pages at most that are fetched at once for sequential access; 1: never
    evict_batch: pages at most that are evicted at once
    clean_tracking: how first writes are noticed, by the kernel alone, by events, or not
    plain: go the wiki's way: readahead 1, evict_batch 1, clean_tracking none, and faults wait for LPET
    dms: how many MPI ranks, the first ones, are DMSs (default: 0; without `run`, 1 under mpirun)
    stats: whether a table at the end says what EDM did
    progress: whether a live line says what EDM does, where stderr is a terminal
    report: path of an HTML page to write, of what EDM did
    log_level: the least level of log lines shown

    Raises ValueError, which names the setting, for a value that is not allowed here; and without the GIL.
    """

    start_addr: int = 0x10_0000_0000
    end_addr: int = 0x20_0000_0000
    high_threshold: int = 65536
    low_threshold: int | None = None
    disk: str | None = None
    keep: bool = False
    idle_tracker: str = "auto"
    readahead: int = PAGES_AT_ONCE
    evict_batch: int = PAGES_AT_ONCE
    clean_tracking: str = "auto"
    plain: bool = False
    dms: int | None = None
    stats: bool = False
    progress: bool = False
    report: str | None = None
    log_level: str = "warning"

    def __init__(
        self, start_addr: int = start_addr, end_addr: int = end_addr, **more: object
    ) -> None:
        super().__init__(**{name: getattr(Config, name) for name in Config.__annotations__})
        for name, value in {"start_addr": start_addr, "end_addr": end_addr, **more}.items():
            if not (kind := Config.__annotations__.get(name)):
                raise TypeError(f"Config: there is no setting {name}")
            if value is not getattr(Config, name):  # that may be None
                try:
                    vars(self)[name] = AS[kind.partition(" ")[0]](value)
                except TypeError:
                    raise ValueError(f"{name}: {value!r}; of type {kind}") from None
        if self.low_threshold is None:
            # Data that is used all the time, but has no room below low_threshold, leaves again and again. A
            # sort of 4 million rows by a random key at 32 MiB takes 69 s if low_threshold is 1/8 less at any
            # size, and 19 s with this. A run of LPET evicts a half of the difference, or more.
            high = self.high_threshold
            vars(self)["low_threshold"] = high - max(1, min(high // 8, PAGES_AT_ONCE), high // 32)
        if self.plain:
            vars(self).update(readahead=1, evict_batch=1, clean_tracking="none")
        for is_wrong, text in self._mistakes():
            if is_wrong:
                raise ValueError(text)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: the settings of a Config can't be changed")

    def __replace__(self, **changes: object) -> Config:
        """For copy.replace, Python 3.13."""
        return Config(**{**vars(self), **changes})

    def _mistakes(self) -> Iterator[tuple[object, str]]:
        """Each mistake that can be made: whether it was, and the message."""
        start, end, most = self.start_addr, self.end_addr, PAGES_AT_ONCE
        high, low = self.high_threshold, self.low_threshold
        has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()  # threads share a NumPy callback
        places = range(PAGE_SIZE, 1 << 62, PAGE_SIZE)  # no address space has more
        report = self.report or ""
        there, folder = os.path.exists(report), os.path.dirname(report) or "."
        yield not has_gil, "edm: this Python runs without the GIL; PYTHON_GIL=1 turns it on"
        wrong = start >= end or start not in places or end not in places
        yield wrong, f"start_addr, end_addr: {start:#x}-{end:#x}; a page or more, but not the first"
        yield high < 2, f"high_threshold, resident: {high} pages; at least 2, for one instruction"
        yield not 0 <= low < high, f"low_threshold: {low} pages; less than high_threshold, {high}"
        yield "\0" in f"{self.disk}{report}", "disk, report: a path has no null byte"
        yield self.keep and not self.disk, "keep: needs a disk with a name; give its path as disk"
        cant_be = report and not os.access(report if there else folder, os.W_OK)
        yield cant_be, f"report: {report} can't be written; make its folder, or choose another path"
        yield there and not os.path.isfile(report), f"report: {report} is not a regular file"
        dms = self.dms or 0
        yield not 0 <= dms < launched()[1], f"dms: needs MPI ranks: mpirun -n {dms + 1}, or more"
        for name in ("readahead", "evict_batch"):
            value = getattr(self, name)
            yield not 1 <= value <= most, f"{name}: {value} pages; from 1 to {most}"
        for name, words in CHOICES.items():
            value = getattr(self, name)
            yield value not in words, f"{name}: {value!r}; one of {', '.join(words)}"


# ---------------------------------------------------------------- an application

_space: Space | None = None  # of this process, if it is an application


def run(app: Callable[[Space], object], config: Config | None = None) -> None:
    """Run app(space), with a space that begins and ends with it.

    Raises what app raises, and OSError if a kept disk can't be synced when it has ended. Before app is
    called, raises ValueError for settings that are not possible here (the range overlaps another
    mapping of the process, ...), and OSError for what this machine lacks or what failed.

    Under mpirun -n 2 or more every rank calls this, once. It returns in each application. A DMS ends here,
    when the applications have ended.
    """
    _run(app, _begin(config or Config()))


def main(app: Callable[[Space], object], config: Config) -> None:
    """run(), for a command: an error before app is called is printed in one line, with status 2."""
    try:
        started = _begin(config)
    except (ValueError, OSError) as error:
        tell(f"edm: error: {error}")
        sys.exit(2)
    _run(app, started)


def _run(app: Callable[[Space], object], started: Space) -> None:
    global _space
    from edm import log

    log.start(started.config.log_level)
    try:
        log.logger("Usercode").debug("User code main function start running")
        app(started)
    finally:
        _space = None
        if not started.is_over:  # else app has forked, and this is the child
            started.close()


def start(config: Config | None = None) -> Space:
    """Make this interpreter an application. Returns its Space, which lasts as long as the process.

    Raises as run. Under an MPI launcher, a DMS ends here, as in run.
    """
    return _begin(config or Config(), lasts=True)


def _begin(config: Config, lasts: bool = False) -> Space:
    """Begin a space. Of an MPI job, only the applications return."""
    global _space
    if _space is not None:
        raise RuntimeError("edm: this process is an application of EDM's already; see edm.space()")
    number, ranks = launched()
    # If standard streams are closed, EDM's descriptors would get their numbers, the lowest ones.
    with contextlib.ExitStack() as held:
        while held.enter_context(open(os.devnull, "r+b")).fileno() < 3:
            pass
        try:
            if config.dms or config.dms is None and ranks > 1:
                from edm import rank

                connected = rank.fork_application(config)
            else:
                connected = spawn_pager(), number  # several ranks may have files of one name
            _space = Space(config, *connected, lasts)
            return _space
        except OSError as error:
            from edm.limits import explain

            explain(error)
            raise


def space() -> Space:
    """The Space of this application. Raises RuntimeError if this process is none. In a forked child, it is that
    of the parent, and can't be called."""
    if _space is None:
        raise RuntimeError("edm.space: this process is not an application of EDM's")
    return _space


def launched() -> tuple[int, int]:
    """(rank, ranks), if an MPI launcher has started this process; else (0, 1).

    This does not need MPI to be initialised. MPICH's variables count only while its descriptor is open,
    because processes that are not ranks inherit them too.
    """
    names = ("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    for rank, ranks in (*names, ("PMIX_RANK", "SLURM_STEP_NUM_TASKS")):
        found = os.environ.get(rank, ""), os.environ.get(ranks, "")
        descriptor = os.environ.get("PMI_FD", "") if rank == "PMI_RANK" else ""
        if all(map(str.isdigit, found)) and os.path.exists(f"/proc/self/fd/{descriptor}"):
            return int(found[0]), int(found[1])
    return 0, 1


def tell(words: str, end: str = "\n") -> None:
    """Print to standard error, if it can be written. If it was closed, print() takes standard output."""
    if sys.stderr:
        with contextlib.suppress(OSError):
            print(words, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # `python -m edm`, by a Python that was started in this folder.
    from edm.__main__ import main as command

    command()
