"""The pager: the process that pages for an application.

In the picture: the box in the middle. Its threads: the DM-Handler (dm_handler.py), LPET (lpet.py; on
one machine a process of its own), and the main thread, which starts the two,
answers the application's Space (address_space.py), and sees to it that everything ends when the
application does, however that ends. A sync has a thread for as long as it takes.

Interface: Pager(...).run() serves until the application has ended. spawned(descriptor) is what the
process that address_space.py spawns on one machine runs; over MPI the rank is the pager (edm.py).

The application and the pager each notice the end of the other: the pager polls a pidfd; the
application has the read end of a pipe whose only write end is here, and asked the kernel to be killed
when that closes (fcntl(2), F_SETSIG), as its next fault would hang for ever.

The figures that Space.figures() returns, counted since the start:
    faults_first_access, faults_refetch, faults_write_protect, faults_other   faults
    fetched                        pages that came, by those faults and by readahead
    latency_median, latency_99th   of the faults, in µs
    waited                         the sum of them, in seconds
    evicted_dirty, evicted_clean, marked_idle                                 pages
    lpet_runs                      times that LPET was woken
    refused                        pages that the store would not take, each time
    bytes_sent, bytes_received     page content, to and from the store
    resident, peak_resident        pages
    idle_tracker                   its name
    pager_pid, lpet_pid            process ids

Rules: a thread that fails ends the job: its error is kept, the application is killed, and run raises
the error when everything has stopped. What the application wrote is still in the memfd then: if the
disk is a kept one, it is written back, and synced.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import marshal
import mmap
import os
import select
import shlex
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace

from edm import address_space, log
from edm import lspt as l
from edm import mailbox as m
from edm.dm_handler import DmHandler
from edm.lpet import Lpet
from edm.lspt import LSPT, Run
from edm.messages import DMSGone
from edm.page_idle import Pagemap, choose_tracker
from edm.page_store import PageStore
from edm.readahead import Readahead
from edm.uffd_ctypes import PAGE_SIZE, PR_SET_PDEATHSIG, Userfaultfd, prctl

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

    from edm.edm import Config

SHARE = 64  # a readahead window is at most this part of high_threshold
GRACE = 3.0  # seconds that the application has to end after a signal to the pager
LOOK = 0.1  # seconds between two looks at how it goes, for --progress and --report
AGAIN = 1  # milliseconds between two tries to free pages that are COMING or LEAVING
GONE = 100  # milliseconds between two looks whether the application is still this program

# Seconds. A thread that holds the GIL keeps it for at most so long when another one wants it; the
# default of 5 ms is what a fault would wait while another thread computes.
SWITCH_INTERVAL = 50e-6

ENDED_BADLY = 3  # LPET's exit status when it has told why


class Pager:
    def __init__(
        self,
        config: Config | SimpleNamespace,
        hello: dict[str, Any],
        fds: list[int],
        control: socket.socket,
        store: Any,
        lpet_is_process: bool,
        instance: int = 0,
        rank_path: str = "",
    ) -> None:
        """hello, fds: what the application's Space has sent; control: the socket that it came by.

        Raises ValueError for settings that can't be here.
        """
        # The lifeline is last: the kernel closes what a killed process has open from the last one
        # on, and the application must be dying when its userfaultfd is closed, as missing pages
        # read as zeros then.
        uffd, self._memfd, pagemap_fd, self._lifeline = fds
        self._control, self._store, self._config = control, store, config
        self._application: int = hello["pid"]
        self._process = os.pidfd_open(self._application)  # readable when it has ended
        self._pagemap = Pagemap(pagemap_fd, config.start_addr)
        self._track_clean = hello["track_clean"]
        self._uffd, self._start = Userfaultfd(uffd), config.start_addr
        pages = (config.end_addr - config.start_addr) // PAGE_SIZE
        self._lspt = LSPT(pages, config.high_threshold, config.low_threshold)
        for page, count in store.runs_on_disk():
            self._lspt.on_disk(page, count)
        self._memory = mmap.mmap(self._memfd, pages * PAGE_SIZE)
        shared = mmap.mmap(self._memfd, m.SIZE, offset=pages * PAGE_SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        self._mailbox = m.Mailbox(memoryview(shared), address)
        self._asked = os.eventfd(0, os.EFD_CLOEXEC)  # there are requests in the mailbox
        self._calls: deque[tuple[int, int, list[Run], bytes]] = deque()  # what, number, pages, name

        tracker = choose_tracker(config.idle_tracker)
        self._tracker = tracker
        self._progress = self._report = None
        if config.stats or config.progress or config.report:
            from edm import report  # it takes long to import

            self._table = report.table
            self._progress = report.Progress() if config.progress and sys.stderr.isatty() else None
            self._report = report.Report(config.start_addr) if config.report else None
        self._title = f"EDM, INSTANCE_{instance}: {shlex.join(hello['command'])}"
        self._report_path = config.report or ""
        if rank_path and config.report:  # an instance each
            name, ending = os.path.splitext(config.report)
            self._report_path = f"{name}.{rank_path}{ending}"
        self._look_due = time.monotonic()

        max_window = min(config.readahead, config.high_threshold // SHARE)
        self._handler = DmHandler(
            uffd, store, self._lspt, config.start_addr, Readahead(max_window), self._track_clean,
            self._report and self._report.came,
        )  # fmt: skip
        self._lpet, self._storer = (
            Lpet(
                self._lspt, store, self._memory, self._memfd, uffd, self._pagemap,
                config.start_addr, config.evict_batch, tracker,
            )
            for _ in range(2)
        )  # fmt: skip
        self._storing = threading.Lock()  # whoever calls _storer
        self._lpet_is_process = lpet_is_process
        self._lpet_pid = 0
        self._failed = os.eventfd(0, os.EFD_CLOEXEC)  # a thread has failed
        self._failure: BaseException | None = None
        self._lpet_failed = False  # then pages may be in nobody's hands
        self._ended_by: signal.Signals | None = None  # which signal has come to the pager
        self._told = False  # has the application said END?
        self._why = "end"  # of the writing back: nobody has to be told of it after END or CLOSE

    # ------------------------------------------------------------ from start to end

    def run(self) -> None:
        """Serve until the application has ended. Raises what a thread failed of, or LPET."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        lpet = partial(self._guarded, self._lpet.run)
        if self._lpet_is_process:
            self._fork_lpet()
            lpet = self._wait_for_lpet
        threads = [
            threading.Thread(target=self._guarded, args=(self._handler.run,), name="DM-Handler"),
            threading.Thread(target=lpet, name="LPET"),
            threading.Thread(target=self._watch_mailbox, name="mailbox"),
        ]
        for thread in threads:
            thread.start()
        try:
            address_space.send_ready(self._control, self._store.kept)
            self._serve()
        finally:
            self._lspt.stop()
            while any(thread.is_alive() for thread in threads):
                self._mailbox.interrupt()
                threads[-1].join(0.001)
            self._finish()
            self._close()
        if self._failure:
            raise self._failure

    def _fork_lpet(self) -> None:
        """LPET as a process. It is forked before there are threads."""
        parent = os.getpid()
        self._lpet_pid = os.fork()
        if self._lpet_pid:
            return
        status = 1
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(self._lifeline)  # or the application would not be killed when the pager dies
            self._control.close()
            if os.getppid() == parent:
                self._lpet.run()
            status = 0
        except ProcessLookupError:
            status = 0  # ESRCH: the application has ended
        except OSError as error:
            print(f"edm: error: {error.strerror or error}", file=sys.stderr, flush=True)
            status = ENDED_BADLY
        finally:
            if status == 1:
                sys.excepthook(*sys.exc_info())
            os._exit(status)

    def _wait_for_lpet(self) -> None:
        """A thread: when LPET ends too early, so does the job."""
        status = os.waitstatus_to_exitcode(os.waitpid(self._lpet_pid, 0)[1])
        if status < 0:
            # Perhaps in the midst of a change of the LSPT: whoever wants its lock waits for ever.
            name = signal.Signals(-status).name
            print(f"edm: error: LPET was killed by {name}", file=sys.stderr, flush=True)
            self.kill_application()
            os._exit(2)  # a kept disk is as its last sync has left it
        if status:
            self._lpet_failed = status != ENDED_BADLY
            self._fail(OSError("LPET has failed" if self._lpet_failed else ""))

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - run() raises it
            if body == self._lpet.run and not isinstance(error, OSError):
                self._lpet_failed = True
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.kill_application()
        os.eventfd_write(self._failed, 1)

    def kill_application(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def end_by(self, number: int) -> None:
        """SIGTERM or SIGINT has come to a rank: the application gets it too. If it does not end of
        it, it is killed: after GRACE, or by the second signal. Called by a signal handler."""
        if self._ended_by:
            self.kill_application()
            return
        self._ended_by = signal.Signals(number)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self._application, number)  # its subprocesses too, as a terminal does
        grace = threading.Timer(GRACE, self.kill_application)
        grace.daemon = True
        with contextlib.suppress(RuntimeError):  # the second has interrupted this one here
            grace.start()

    def _finish(self) -> None:
        """The application and the other threads have ended: keep what they left, and tell."""
        if self._store.kept and not isinstance(self._failure, DMSGone):
            self._write_back("" if self._told else self._why)
        if not self._told:
            self._tell()
        with contextlib.suppress(DMSGone):
            self._store.close()

    def _write_back(self, why: str) -> None:
        """To a kept disk. why: nothing, if nobody needs to be told."""
        began = time.monotonic()
        try:
            if self._lpet_failed:
                raise OSError(f"LPET has failed in the midst of its work: {self._failure}")
            with self._storing:
                pages = self._storer.store(self._track_clean)
                self._store.sync()
        except OSError as error:
            reason = f"what the application wrote since the last sync is not on the disk: {error}"
            log.logger("EDM CLIENT").error("%s", reason)
            self._failure = self._failure or OSError(error.errno, reason)
            return
        except DMSGone as error:
            self._failure = self._failure or error
            return
        if why:
            why = self._ended_by.name if self._ended_by else why
            log.logger("EDM CLIENT").log(
                logging.INFO if why == "END" else logging.WARNING,
                "%s: wrote %d pages back and synced the disk in %.1f s",
                why, pages, time.monotonic() - began,
            )  # fmt: skip

    def _close(self) -> None:
        self._lpet.close()
        self._storer.close()
        self._lspt.close()
        fds = self._uffd.fd, self._memfd, self._pagemap.fd, self._process, self._failed, self._asked
        for fd in (*fds, self._lifeline):
            os.close(fd)

    # ------------------------------------------------------------ the application's calls

    def _watch_mailbox(self) -> None:
        """A thread: futex(2) can't be polled."""
        seen = 0
        while not self._lspt.stopped():
            now = self._mailbox.wait(seen)
            if now != seen:
                seen = now
                os.eventfd_write(self._asked, 1)

    def _serve(self) -> None:
        """Answer the application until it has ended, or something has failed."""
        poll = select.poll()
        for fd in (self._process, self._failed, self._asked):
            poll.register(fd, select.POLLIN)
        poll.register(
            self._lifeline, 0
        )  # POLLERR: the program has closed its end, or replaced itself
        connected = True
        while True:
            ready = {fd for fd, _ in poll.poll(self._timeout(connected))}
            if self._asked in ready:
                os.eventfd_read(self._asked)
                for what, number, page, count, name in self._mailbox.requests():
                    self._calls.append((what, number, [(page, count)], name))
            if not self._answer_in_order():
                return
            if self._lifeline in ready:
                connected = False
                poll.unregister(self._lifeline)
            if ready & {self._process, self._failed}:
                return
            if not connected and self._pagemap.is_gone():
                return

    def _answer_in_order(self) -> bool:
        """Do what the application asks, up to a free of pages that others have in hand: the rest is
        for the next time. False if it has said CLOSE."""
        while self._calls:
            what, number, runs, name = self._calls[0]
            page, count = runs[0]
            if what == m.CLOSE:
                self._why = "END"
                return False
            if what in (m.FREE, m.RELEASE):
                if later := self._free_for(what, number, runs):
                    self._calls[0] = (what, number, later, name)
                    return True
            elif what == m.MAPPED:
                bisect.insort(self._lspt.areas, (page, count))
                if self._report:
                    self._report.mapped(page, count, name.decode(errors="replace"))
            elif what == m.SYNC:
                threading.Thread(target=self._guarded, args=(partial(self._sync, number),)).start()
            elif what == m.LOCATIONS:
                self._answer_with(number, partial(self._store.locations, page, count))
            elif what == m.FIGURES:
                self._answer_with(number, lambda: marshal.dumps(self.figures()))
            elif what == m.END:
                self._answer_with(number, self._end)
            self._calls.popleft()
        return True

    def _answer_with(self, number: int, call: Callable[[], bytes]) -> None:
        try:
            self._mailbox.answer_with(number, call())
        except OSError as error:
            self._mailbox.refuse(number, error)

    def _sync(self, number: int) -> None:
        def sync() -> bytes:
            with self._storing:
                pages = self._storer.store(self._track_clean)
                if self._lspt.stopped():  # then others may have let go of pages in the midst
                    raise OSError("the application has ended")
                self._store.sync()
            return b"%d" % pages

        self._answer_with(number, sync)

    def _end(self) -> bytes:
        """The interpreter of the application comes to its end: tell now, before the shell goes on."""
        if self._store.kept:
            self._write_back("END")
        self._tell()
        self._told = True
        return b""

    # ------------------------------------------------------------ freeing

    def _free_for(self, what: int, number: int, runs: list[Run]) -> list[Run]:
        """Free pages that the application has unmapped; which ones others have in hand."""
        self._forget_area(runs[0])
        try:
            if later := [run for page, count in runs for run in self._free(page, count)]:
                return later
        except OSError as error:
            if what == m.RELEASE:  # and no zeros for who gets the pages next
                self._fail(error)
            else:
                self._mailbox.refuse(number, error)
            return []
        self._mailbox.freed(number)
        if what == m.FREE:
            self._mailbox.answer_with(number)
        return []

    def _forget_area(self, area: Run) -> None:
        areas = self._lspt.areas
        at = bisect.bisect_left(areas, area)
        if areas[at : at + 1] == [area]:
            del areas[at]
            if self._report:
                self._report.unmapped(area[0], self._lspt.state)

    def _free(self, page: int, count: int) -> list[Run]:
        """Any page → NEW, here and in the store; which ones others have in hand."""
        taken, later = self._lspt.freeing(page, count)
        try:
            for first, before in taken:
                self._store.free(first, len(before))
        except OSError:
            self._wake(self._lspt.stays(taken))
            raise
        for first, before in taken:
            self._make_empty(first, before)
        self._wake(self._lspt.freed(taken))
        return later

    def _make_empty(self, first: int, before: bytes) -> None:
        for at, state in enumerate(before) if l.LOST in before else ():
            if state == l.LOST:  # only another page replaces the poison in the page table
                with contextlib.suppress(ProcessLookupError):
                    self._uffd.zeropage(self._start + (first + at) * PAGE_SIZE, PAGE_SIZE)
        self._memory.madvise(mmap.MADV_REMOVE, first * PAGE_SIZE, len(before) * PAGE_SIZE)

    def _wake(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._uffd.wake(self._start + page * PAGE_SIZE, PAGE_SIZE)

    # ------------------------------------------------------------ what it tells of itself

    def _timeout(self, connected: bool) -> int | None:
        """Look at how it goes, if it is time and somebody wants to know; milliseconds to wait."""
        timeouts = [AGAIN] if self._calls else []
        if not connected:
            timeouts.append(GONE)
        if (self._progress or self._report) and not self._told:
            now = time.monotonic()
            if now >= self._look_due:
                figures, away = self.figures(), self._lspt.away()
                if self._progress:
                    self._progress.show(figures, away)
                if self._report:
                    self._report.sample(figures, away)
                self._look_due = now + LOOK
            timeouts.append(int(1000 * max(0.001, self._look_due - now)))
        return min(timeouts, default=None)

    def _tell(self) -> None:
        """At the end: what was asked for."""
        figures = self.figures()
        if self._progress:
            self._progress.end()
        if self._config.stats:
            print(self._table(figures, self._title), file=sys.stderr, flush=True)
        if self._report:
            self._report.sample(figures, self._lspt.away())
            latencies = self._handler.latencies()
            try:
                self._report.write(
                    self._report_path, self._title, figures, latencies, self._lspt.state
                )
            except OSError as error:
                log.logger("EDM CLIENT").error("report: %s", error)

    def figures(self) -> dict[str, object]:
        """See the top of this file."""
        figures = self._lspt.figures
        return {
            **self._handler.figures(),
            "evicted_dirty": figures[l.EVICTED_DIRTY],
            "evicted_clean": figures[l.EVICTED_CLEAN],
            "marked_idle": figures[l.MARKED_IDLE],
            "lpet_runs": figures[l.LPET_RUNS],
            "refused": figures[l.REFUSED],
            "bytes_sent": figures[l.STORED_BYTES],
            "resident": figures[l.RESIDENT],
            "peak_resident": figures[l.PEAK],
            "idle_tracker": self._tracker,
            "pager_pid": os.getpid(),
            "lpet_pid": self._lpet_pid or os.getpid(),
        }


# ---------------------------------------------------------------- on one machine


def spawned(descriptor: int) -> None:
    """What a process that address_space.py has spawned does: be the pager of who holds the other
    end of this socket."""
    if os.fork():
        os._exit(0)  # the pager is nobody's child: the application's os.wait sees no stranger
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the application's end ends the pager
    control = socket.socket(fileno=descriptor)
    status = 1
    try:
        status = _page_for(control)
    finally:
        if status == 1:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(status)


def _page_for(control: socket.socket) -> int:
    hello, fds = address_space.receive_hello(control)
    if not fds:
        return 0  # the application has ended before it began
    config = SimpleNamespace(**hello["config"])
    log.start(config.log_level)
    client_log = log.logger("EDM CLIENT")
    client_log.debug("INIT")
    client_log.info("userfaultfd permitted by: %s", hello["how"])
    try:
        store = PageStore(config.disk, config.start_addr, config.end_addr, config.keep)
        pager = Pager(config, hello, fds, control, store, lpet_is_process=True)
    except (ValueError, OSError) as error:
        address_space.send_refusal(control, error)
        return 0
    try:
        pager.run()
    except OSError as error:
        if words := str(error.strerror or error):
            print(f"edm: error: {words}", file=sys.stderr)
        return 2
    client_log.debug("SHUTDOWN!")
    return 0
