"""The pager: the process of an instance that is the MPI rank, and pages for the application.

In the picture: the box in the middle. It has three threads: the DM-Handler (dm_handler.py), LPET
(lpet.py), and the main thread, which starts the two, answers the application's Space
(address_space.py), and sees to it that everything ends when the application does, however that ends.

Interface: Pager(...).run() returns the application's exit status.

The figures that Space.figures() returns, counted since the start:
    faults_first_access, faults_refetch, faults_write_protect, faults_other   faults
    fetched                        pages that came, by those faults and by readahead
    latency_median, latency_99th   of the faults, in µs
    waited                         the sum of them, in seconds
    evicted_dirty, evicted_clean, marked_idle                                 pages
    lpet_runs                      times that LPET was woken
    refused                        pages that the DMS would not take, each time
    bytes_sent, bytes_received     page content, to and from the DMS
    resident, peak_resident        pages
    idle_tracker                   its name

Rules: a thread that fails ends the job: its error is kept, the application is killed, and run
raises the error when everything has stopped. Nothing waits for a thread that can't end. SIGTERM and
SIGINT are the application's too. However it ended, what it has written is still in the memfd: if
the disk is a kept one, it is written back, and the disk synced, before the DMS is told BYE.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import select
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING

from mpi4py import MPI

from edm import address_space, log, report
from edm import messages as m
from edm.dm_handler import GIVE_UP, STOP, DmHandler
from edm.lpet import Lpet
from edm.lspt import LSPT, Stopped
from edm.mpi_client import MpiClient
from edm.page_idle import BitmapTracker, IdleTracker, Pagemap, TlbFlush, UnmapTracker
from edm.readahead import Readahead
from edm.report import Progress, Report
from edm.uffd_ctypes import PAGE_SIZE, Userfaultfd, punch_hole

if TYPE_CHECKING:
    from edm.edm import Config

DMS_RANK = 0
AHEAD = 3  # windows that the DM-Handler may have asked for ahead of need, a megabyte of buffer each
SHARE = 64  # a window is at most this part of high_threshold

GRACE = 3.0  # seconds that the application has to end after a signal
LOOK = 0.1  # seconds between two looks at how it goes

# Seconds. A thread that holds the GIL keeps it for at most so long when another one wants it; the
# default of 5 ms is what a fault would wait while LPET computes.
SWITCH_INTERVAL = 50e-6


_ON_DISK = re.compile(b"%c+" % m.DISK)


class Pager:
    def __init__(
        self,
        comm: MPI.Comm,
        config: Config,
        tracker: str,
        application: int,
        control: socket.socket,
        descriptors: address_space.Descriptors,
    ) -> None:
        """tracker: its name, from page_idle.choose_tracker. application: its process id.

        control: the other end of the application's Space. descriptors: what it has sent.
        """
        start_addr, end_addr = config.start_addr, config.end_addr
        self._application, self._control = application, control
        self._process = os.pidfd_open(application)  # readable when it has ended
        uffd, self._memfd, pagemap_fd = descriptors.fds
        self._uffd, self._start = Userfaultfd(uffd), start_addr
        self._lspt = LSPT(
            (end_addr - start_addr) // PAGE_SIZE, config.high_threshold, config.low_threshold
        )
        commands_read, self._commands = os.pipe()
        max_window = min(config.readahead, m.MAX_PAGES, config.high_threshold // SHARE)
        slots = AHEAD if max_window > 1 else 0
        self._client, *clients = (
            MpiClient(comm, DMS_RANK, tag, patient=tag < 3, start_addr=start_addr)
            for tag in range(4 + slots)
        )
        lpet_clients, handler_clients = clients[:2], clients[2:]
        self._clients = (self._client, *clients)
        pagemap = Pagemap(pagemap_fd, start_addr)
        lpet_uffd = Userfaultfd(uffd)
        self._tracker: IdleTracker
        if tracker == BitmapTracker.name:
            flush = TlbFlush(descriptors.scratch, self._memfd, end_addr - start_addr, lpet_uffd)
            self._tracker = BitmapTracker(pagemap, flush)
        else:
            self._tracker = UnmapTracker(pagemap, self._memfd, lpet_uffd, self._lspt, start_addr)
        self._stats = config.stats
        self._progress = Progress() if config.progress and sys.stderr.isatty() else None
        self._report = Report(start_addr) if config.report else None
        self._report_path = config.report or ""
        if comm.size > 2 and config.report:  # an instance each
            path = Path(config.report)
            self._report_path = str(path.with_stem(f"{path.stem}.{comm.rank - 1}"))
        self._instance = comm.rank - 1
        self._look_due = time.monotonic()
        self._handler = DmHandler(
            Userfaultfd(uffd), handler_clients, self._lspt, start_addr, Readahead(max_window),
            config.clean_tracking, commands_read, self._report and self._report.came,
        )  # fmt: skip
        self._lpet = Lpet(
            lpet_uffd, self._memfd, lpet_clients, self._lspt, self._tracker, pagemap,
            start_addr, config.high_threshold, config.low_threshold, config.evict_batch,
        )  # fmt: skip
        self._failure: BaseException | None = None
        self._lpet_failed = False  # then a page may be out of the memfd that was to be put back
        self._ended_by: signal.Signals | None = None  # which signal has come to the pager
        self._grace = threading.Timer(GRACE, self._kill_the_application)
        self._grace.daemon = True
        self._kept, bell = self._client.hello(start_addr, end_addr)
        for client in self._clients:
            client.set_bell(bell)

    def run(self) -> int:
        """Serve until the application has ended; its exit status, 128 + n if signal n ended it.

        Raises what a thread of the pager failed of; the application has then been killed.
        """
        sys.setswitchinterval(SWITCH_INTERVAL)
        before = {n: signal.signal(n, self._end) for n in (signal.SIGTERM, signal.SIGINT)}
        threads = [
            threading.Thread(target=self._guarded, args=(body,), name=name)
            for name, body in (("DM-Handler", self._handler.run), ("LPET", self._lpet.run))
        ]
        for thread in threads:
            thread.start()
        try:
            with contextlib.suppress(ConnectionError):  # it has ended already
                self._control.send(b"go")
            self._answer_the_application()
            status = os.waitstatus_to_exitcode(os.waitpid(self._application, 0)[1])
        finally:
            os.write(self._commands, STOP)
            self._lspt.stop()
            for thread in threads:
                thread.join()
            try:
                if not isinstance(self._failure, m.DMSGone):
                    if self._kept:
                        self._write_back()
                    self._client.bye()
            except m.DMSGone as error:
                self._failure = self._failure or error
            self._tell()
            for number, handler in before.items():
                signal.signal(number, handler)
            self._grace.cancel()
            if self._grace.is_alive():
                self._grace.join()
            os.close(self._process)
            self._control.close()
        if self._failure:
            raise self._failure
        if self._ended_by and status < 0:
            log.logger("EDM CLIENT").error("the job was ended by %s", self._ended_by.name)
            return 128 + self._ended_by
        if status < 0:
            name = signal.Signals(-status).name
            log.logger("EDM CLIENT").error("the application was killed by %s", name)
            return 128 - status
        return status

    def _end(self, number: int, frame: object) -> None:
        """SIGTERM or SIGINT has come: the application gets it too, and its end ends all the rest.

        If it does not end of it, it is killed: after GRACE, or by the second signal.
        """
        if self._ended_by:
            self._kill_the_application()
            return
        self._ended_by = signal.Signals(number)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self._application, number)  # its subprocesses too, as a terminal does
        with contextlib.suppress(RuntimeError):  # the second has interrupted this one here
            self._grace.start()

    def _kill_the_application(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._kill_the_application()

    def _write_back(self) -> None:
        """The application and the other threads have ended: send what they left, and sync."""
        began = time.monotonic()
        try:
            if self._lpet_failed:
                raise m.DMSError(f"LPET has failed in the midst of its work: {self._failure}")
            pages = self._lpet.store()
            self._client.sync()
        except OSError as error:  # the DMS's too
            reason = f"what the application wrote since the last sync is not on the disk: {error}"
            log.logger("EDM CLIENT").error("%s", reason)
            self._failure = self._failure or m.DMSError(reason)
            return
        level = logging.WARNING if self._ended_by else logging.INFO
        log.logger("EDM CLIENT").log(
            level, "%s: wrote %d pages back and synced the disk in %.1f s",
            self._ended_by.name if self._ended_by else "end", pages, time.monotonic() - began,
        )  # fmt: skip

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - run() raises it
            if body == self._lpet.run and not isinstance(error, m.DMSError):
                self._lpet_failed = True
            self._fail(error)
        finally:
            self._lspt.stop()  # what this thread held or had asked for is nobody's any more

    # ------------------------------------------------------------ the application's calls

    def _answer_the_application(self) -> None:
        """Until it has ended."""
        calls = {
            address_space.MMAP: self._mmap,
            address_space.ALLOCATE: self._allocate,
            address_space.MUNMAP: self._munmap,
            address_space.RELEASE: self._munmap,
            address_space.LOCATIONS: self._client.locations,
            address_space.SYNC: self._sync,
            address_space.FIGURES: lambda page, count: json.dumps(self.figures()).encode(),
        }
        ended = self._process
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._watch())}
            if self._control.fileno() in ready:
                try:
                    packet = self._control.recv(address_space.CALL.size + address_space.MAX_NAME)
                except ConnectionResetError:  # it has ended without reading the last answer
                    packet = b""
                if not packet:
                    poll.unregister(self._control)
                    continue
                what, number, page, count = address_space.CALL.unpack_from(packet)
                if self._report and what in (address_space.MUNMAP, address_space.RELEASE):
                    self._report.unmapped(page, self._lspt.state)
                try:
                    answer = address_space.ANSWER.pack(number, 0) + calls[what](page, count)
                except (Stopped, CancelledError):
                    continue  # the application has been killed, or is just being
                except m.DMSGone as error:
                    self._fail(error)
                    poll.unregister(self._control)  # nothing more can be done for it
                    continue
                except m.DMSError as error:
                    if what == address_space.RELEASE:  # and no zeros for who gets the pages next
                        self._fail(error)
                    answer = address_space.ANSWER.pack(number, errno.EIO) + str(error).encode()
                if self._report and what in (address_space.MMAP, address_space.ALLOCATE):
                    name = packet[address_space.CALL.size :].decode(errors="replace")
                    self._report.mapped(page, count, name)
                if what != address_space.RELEASE:
                    with contextlib.suppress(ConnectionError):  # it may have ended meanwhile
                        self._control.send(answer)
            elif ended in ready:
                return

    def _watch(self) -> float | None:
        """Look at how it goes, if it is time and somebody wants to know; milliseconds until then."""
        if not self._progress and not self._report:
            return None
        now = time.monotonic()
        if now >= self._look_due:
            figures, away = self.figures(), self._lspt.away()
            if self._progress:
                self._progress.show(figures, away)
            if self._report:
                self._report.sample(figures, away)
            self._look_due = now + LOOK
        return 1000 * max(0.0, self._look_due - now)

    def _tell(self) -> None:
        """At the end: what was asked for."""
        figures = self.figures()
        if self._progress:
            self._progress.end()
        title = f"EDM, INSTANCE_{self._instance}: {shlex.join(sys.orig_argv[1:])}"
        if self._stats:
            print(report.table(figures, title), file=sys.stderr, flush=True)
        if self._report:
            self._report.sample(figures, self._lspt.away())
            latencies = self._handler.latencies()
            try:
                self._report.write(self._report_path, title, figures, latencies, self._lspt.state)
            except OSError as error:
                log.logger("EDM CLIENT").error("report: %s", error)

    def _mmap(self, page: int, count: int) -> bytes:
        away = []
        if self._kept:
            for found in _ON_DISK.finditer(self._client.locations(page, count)):
                away.append((page + found.start(), found.end() - found.start()))
        self._lspt.mapped(page, count, away)
        return b""

    def _allocate(self, page: int, count: int) -> bytes:
        """As _mmap, but the pages are to be zeros, whatever a kept disk has of them."""
        if self._kept:
            self._client.free(page, count)
        self._lspt.mapped(page, count)
        return b""

    def _sync(self, page: int, count: int) -> bytes:
        pages = self._lspt.ask_to_store().result()
        self._client.sync()
        return b"%d" % pages

    def _munmap(self, page: int, count: int) -> bytes:
        """The application has unmapped these pages: free them, here and on the DMS."""
        if not self._lspt.unmapped(page, count):
            return b""  # it is told a second time, as a signal handler has raised in the first
        held = []
        try:
            held = self._lspt.hold_all(page, count, lambda: os.write(self._commands, GIVE_UP))
            self._client.free(page, count)
        except (Stopped, m.DMSError):
            # Refused: LPET's hand may have passed them meanwhile.
            self._wake(self._lspt.refused([(first, length) for first, length, _ in held]))
            self._lspt.mapped(page, count)  # it is to be synced and written back as before
            raise
        punch_hole(self._memfd, page * PAGE_SIZE, count * PAGE_SIZE)
        self._wake(self._lspt.freed(page, count))
        return b""

    def _wake(self, pages: Iterable[int]) -> None:
        """A thread that was in the midst of a fault there tries again, and finds nothing mapped."""
        for page in pages:
            self._uffd.wake(self._start + page * PAGE_SIZE, PAGE_SIZE)

    def figures(self) -> dict[str, object]:
        """See the top of this file."""
        return {
            **self._handler.figures(),
            **self._lpet.figures(),
            "bytes_sent": sum(c.bytes_sent for c in self._clients),
            "bytes_received": sum(c.bytes_received for c in self._clients),
            "resident": self._lspt.resident,
            "peak_resident": self._lspt.peak,
            "idle_tracker": self._tracker.name,
        }
