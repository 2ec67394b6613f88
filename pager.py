"""The pager: the process that pages for an application.

In the picture: the box in the middle. Its threads:

    DM-Handler     dm_handler.py
    LPET           lpet.py; on one machine this is a process, and the thread waits for its end
    mailbox        does what the application's Space (address_space.py) asks, in order
    system calls   system_calls.py, where the application has userfaultfd for user mode only. A large
                   write has a thread of its own
    the main one   starts the others, and ends everything when the application has ended

Interface: page_for(control, open_store) pages for an application until it has ended. On
one machine lifeline.py spawns a process that runs spawned(). Over MPI the rank is the pager
(rank.py). print_error(error) prints why a process or a thread of EDM ends. How application and pager notice each
other's end is in lifeline.py.

The figures that Space.figures() returns, counted since the start:
    faults_first_access, faults_refetch, faults_write_protect   faults; not counted: those of pages
                                   that had come meanwhile, or were being evicted
    fetched                        pages that were to come: for those faults, readahead, or
                                   edm.prefetch
    latency_median, latency_99th   of the faults, in µs
    waited                         their sum, in seconds; the waits of several threads may overlap
    waited_for_store               the store's part of it; with --progress or --report only
    waited_for_room                and LPET's part, at high_threshold
    evicted_dirty, evicted_clean   pages
    refused                        pages that the store refused, counted each time
    bytes_sent, bytes_received     page content, to and from the store
    resident, peak_resident        pages
    from_each_dms                  over MPI: pages that came, of each DMS by rank
    idle_tracker                   its name
    pager_pid, lpet_pid            process ids

Rules: a thread that fails ends the job. It prints why, and kills the application. run returns its status
when all threads have ended. What the application wrote is still in the memfd then.
A kept disk gets it and is synced. But any error that is not an OSError may have left pages half
moved: then the disk stays as the last sync has left it.
"""

import _socket
import bisect
import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from edm import lifeline, limits, log, mailbox
from edm import lspt as l
from edm import uffd_ctypes as u
from edm.dm_handler import DmHandler
from edm.edm import tell
from edm.lpet import Lpet
from edm.page_idle import Pagemap, choose_tracker
from edm.page_store import PageStore
from edm.report import SAMPLE, Report
from edm.system_calls import SystemCalls
from edm.uffd_ctypes import PAGE_SIZE, Userfaultfd

# Seconds that a thread may keep the GIL when another one wants it. With the default, a fault would
# wait for up to 5 ms while another thread computes.
SWITCH_INTERVAL = 50e-6

LOG = log.logger("EDM CLIENT")


class Pager:
    def __init__(self, control: _socket.socket, hello: SimpleNamespace, store: PageStore) -> None:
        """Begin: start LPET and the threads.

        hello: see page_for. store: a PageStore, or over MPI an MpiStore. Raises ValueError for settings that
        this machine can't have, and OSError. Then the process must end.
        """
        uffd, self._memfd, pagemap, *lines = hello.fds
        self._hello, self._store, start = hello, store, hello.start_addr
        over_mpi = not isinstance(store, PageStore)  # then this process is a rank
        hello.idle_tracker = choose_tracker(hello.idle_tracker)  # now the one that was found
        self._control = control  # for forked children
        hello.pidfd = os.pidfd_open(hello.pid)  # readable when it has ended
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)  # close adds 1, and so does the end of run
        self._uffd, self._pagemap = Userfaultfd(uffd), Pagemap(pagemap, start)
        high, low, length = hello.high_threshold, hello.low_threshold, hello.end_addr - start
        self._lspt = lspt = l.LSPT(length // PAGE_SIZE, high, low, hello.plain, uffd, start)
        for run in store.runs_on_disk():
            lspt.found_on_disk(*run)
        size, access = mailbox.SIZE, u.PROT_READ | u.PROT_WRITE
        os.ftruncate(self._memfd, length + size)  # here, as the program may have an RLIMIT_FSIZE
        self._mailbox = mailbox.Mailbox(u.mmap(0, size, access, u.MAP_SHARED, self._memfd, length))
        self._handler = DmHandler(store, lspt, hello.readahead, bool(hello.clean_tracking))
        self._report = Report(hello, lines, lspt, self._handler)  # or None, after its end
        # Each thread that evicts or stores has an Lpet of its own. This one is for forget and sync.
        self._new_lpet = partial(Lpet, lspt, store, self._pagemap, hello)
        self._lpet = self._new_lpet()
        self.prefetch, self.forget = self._handler.prefetch, self._lpet.forget
        self._threads: list[threading.Thread] = []
        self._lpet_pid = os.getpid()
        self._status = 0  # print_error's of the first thread that has failed
        self._sampling = threading.Lock()  # held by the thread that uses the report

        sys.setswitchinterval(SWITCH_INTERVAL)
        # See that there is room for the lifeline, for two descriptors of a system call, and over MPI for LPET's
        # three. They are high ones, so that the table of descriptors grows now: once there are threads, that
        # takes 15 ms.
        for fd in [lifeline.high(fd) for _ in range(2 + 2 * over_mpi) for fd in os.pipe()]:
            os.close(fd)
        lpet = self._new_lpet().run if over_mpi else self._fork_lpet()
        for body in (self._handler.run, lpet, self._answer):
            self._start_thread(body)
        # The write end stays open until this process ends. The kernel closes the descriptors of a killed process
        # from the highest one down. Once it has closed the userfaultfd, missing pages read as zeros. So the
        # write end has a higher number: then the application is dying by then. From here on nothing may fail.
        # The lifeline is made after LPET is forked, which must not have the write end.
        self._lifeline, _ = lifeline.tie(hello.pid)  # its read end

    # ------------------------------------------------------------ from start to end

    def _start_thread(self, body: Callable[[], int | None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(body,))
        try:
            thread.start()
        except RuntimeError as error:  # Python does not pass on the errno, which can only be EAGAIN
            raise OSError(errno.EAGAIN, str(error)) from None
        self._threads.append(thread)

    def run(self) -> int:
        """Tell the application that it may begin, and serve until it has ended.

        Returns an exit status: not 0 if a thread, or LPET, has failed and has printed why, or if the last sync
        has failed. The process must end then: most descriptors stay open.
        """
        lifeline.try_to_send(self._control, os.getpid(), self._memfd, self._lifeline)
        begins, listener = lifeline.receive(self._control)
        if listener:
            calls = SystemCalls(*listener, self._ended, self._hello, self._lspt, self._handler)
            self._start_thread(calls.run)
        if begins:  # else a signal handler has raised in the application, which has no space now
            self._guarded(self._watch)
        self._lspt.stop()
        os.eventfd_write(self._ended, 1)
        while any(thread.is_alive() for thread in self._threads):
            self._mailbox.interrupt()
            time.sleep(0.001)
        try:
            self.end()
        except OSError as error:
            LOG.error("what was written since the last sync is not on the disk: %s", error)
            self._status = self._status or 2
        self._store.close()
        # The application's children live on without its memory. One that is forked now gets none.
        self._control.shutdown(_socket.SHUT_RD)
        while self._hear_child():
            pass
        os.ftruncate(self._memfd, 0)
        self._handler.children.let_go(self._lspt.start, self._lspt.pages * PAGE_SIZE)
        # Or closing the lifeline would kill an application that has only closed its space.
        lifeline.untie(self._lifeline)
        if listener:
            calls.close(leave=os.eventfd_read(self._ended) == 1)
        LOG.debug("SHUTDOWN!")
        self._control.close()  # Space.close waits for this
        return self._status

    def _fork_lpet(self) -> Callable[[], int]:
        """Start LPET as a process, before there are threads. Returns the body of the thread that waits for
        its end."""
        parent = os.getpid()

        def lpet() -> None:
            u.prctl(u.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                self._new_lpet().run()

        self._lpet_pid = os.fork()
        if not self._lpet_pid:
            os._exit(_status_of(lpet) or 0)  # it may not go on as its parent
        return self._wait_for_lpet

    def _wait_for_lpet(self) -> int:
        """A thread: LPET's exit status. LPET has printed why it failed, unless it was killed."""
        status = os.waitstatus_to_exitcode(os.waitpid(self._lpet_pid, 0)[1])
        if status < 0:
            # It may have had the LSPT's lock, and then any thread that wants it waits forever.
            # Its end kills the application. A kept disk is as its last sync has left it.
            os._exit(print_error(OSError(f"LPET was killed by signal {-status}")))
        return status

    def _guarded(self, body: Callable[[], int | None]) -> None:
        """Call a thread's body. If it fails, so does the job."""
        if status := _status_of(body):
            self._status = self._status or status
            with contextlib.suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(self._hello.pidfd, signal.SIGKILL)  # that ends _watch

    def _watch(self) -> None:
        """Wait until the application has ended, closed its space, or become another program, which a look at each
        SAMPLE finds."""
        poll = select.poll()
        for fd in (self._hello.pidfd, self._ended, self._control.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(SAMPLE)]
            if self._control.fileno() in ready and not self._hear_child():
                poll.unregister(self._control)
            if self._hello.pidfd in ready or self._ended in ready or self._pagemap.is_gone():
                return
            with self._sampling:
                if self._report and self._handler.came is not None:
                    self._report.sample(self.figures())

    def _hear_child(self) -> bool:
        """Receive the descriptors that a forked child has sent.

        Returns False if every process has closed its end of the socket: no other child can come.
        """
        message, fds = lifeline.receive(self._control)
        self._handler.children.adopt(fds)
        return bool(message)

    # ------------------------------------------------------------ the application's calls

    def _answer(self) -> None:
        """A thread: do what the application asks, in order. A request names one of the methods below,
        or prefetch or forget."""
        while not self._lspt.stopped():
            for what, arguments in self._mailbox.requests():
                try:
                    self._mailbox.answer(getattr(self, what)(*arguments))
                except OSError as error:
                    # The application does not wait for `forget`, nor mostly for `free`: their errors end the job.
                    if what in ("free", "forget"):
                        raise
                    self._mailbox.answer(error)

    def mapped(self, page: int, count: int, name: str) -> None:
        """There is an area now; or it has grown."""
        self._lspt.areas[self._area(page)] = [(page, count, name)]

    def free(self, page: int, count: int) -> None:
        """Make these pages NEW, here and in the store. They are an area that is none any more, or a gap: see
        Space.allocate."""
        del self._lspt.areas[self._area(page)]
        for claimed in self._lspt.claims([(page, count)], l.SETTLED, l.PART, self._store.kept):
            try:
                # Installing a page removes the poison. Punching the hole then removes the page.
                # One by one: the program may have split the mapping there.
                for lost, _ in l.runs(claimed.page, claimed.before, l.LOST_PAGE):
                    while not self._uffd.zeropage(self._lspt.start + lost * PAGE_SIZE, PAGE_SIZE):
                        pass  # nothing is installed yet, see there
                for first, many in claimed.leaving:
                    self._store.free(first, many)
                    u.punch_hole(self._memfd, first * PAGE_SIZE, many * PAGE_SIZE)
            finally:  # after an error the job ends, and no page may stay LEAVING
                self._lspt.freed(claimed)

    def locations(self, page: int, count: int) -> bytes:
        """A byte for each of these pages: 0 if it is NEW, 1 if it is here, 2 if the store has it."""
        return self._lspt.read(page, count).translate(l.LOCATION)

    def close(self) -> None:
        """The space has ended."""
        os.eventfd_write(self._ended, 1)

    def _area(self, page: int) -> slice:
        """The place in LSPT.areas of the area that begins at this page; empty if there is none."""
        return slice(*(bisect.bisect(self._lspt.areas, (first,)) for first in (page, page + 1)))

    # ------------------------------------------------------------ what is kept and printed

    def sync(self) -> int:
        """Store everything and sync the store; how many pages were stored."""
        if self._status == 1:  # a bug in EDM
            raise OSError("EDM has failed in the middle of its work")
        pages = self._lpet.store(bool(self._hello.clean_tracking))
        self._store.sync()
        return pages

    def end(self) -> None:
        """Sync a kept disk, and print the table or write the report, once. The application asks for this
        when its interpreter ends, and before Space.close asks for close."""
        try:
            if self._store.kept:
                pages = self.sync()
                if self._report and (self._hello.ended_by or self._lspt.stopped()):
                    why = (*self._hello.ended_by, "end")[0]
                    LOG.warning("%s: wrote %d pages back and synced the disk", why, pages)
        finally:
            with self._sampling:
                report, self._report = self._report, None
                if report:
                    report.end(self.figures())

    def figures(self) -> dict[str, object]:
        """See the top of this file."""
        figures = dict(zip(l.FIGURES, self._lspt.figures, strict=False)) | self._handler.figures()
        figures |= {"idle_tracker": self._hello.idle_tracker, "pager_pid": os.getpid()}
        from_each = getattr(self._store, "from_each", [])  # a PageStore has no DMSs
        return figures | {"lpet_pid": self._lpet_pid, "from_each_dms": from_each}


# ---------------------------------------------------------------- a process that is a pager


def page_for(control: _socket.socket, open_store: Callable[..., PageStore]) -> int | None:
    """Page for the application at the other end of a socket until it has ended; or refuse to.

    open_store(hello): makes the store. hello: what Space has sent, with its descriptors, fds, and what Pager adds:
    pidfd, of the application. ended_by: over MPI a list that gets the names of the signals that are to end it.

    Returns an exit status: 0, or print_error's if the pager has failed. None: the application has ended
    before it began.
    """
    settings, fds = lifeline.receive(control)
    if not fds:
        return None
    hello, store = SimpleNamespace(**settings, fds=fds, ended_by=[]), None
    log.start(hello.log_level)
    LOG.debug(" INIT")
    try:
        store = open_store(hello)
        if hello.report:  # one file for each instance
            name, ending = os.path.splitext(os.path.abspath(hello.report))
            hello.report = f"{name}.{hello.instance}{ending}" if hello.instance else name + ending
        os.chdir("/")  # the program may unmount its folder, once it has left it
        pager = Pager(control, hello, store)
    except (ValueError, OSError) as error:
        lifeline.try_to_send(control, error)
        if store:
            store.close()
        return 0
    return pager.run()


def spawned() -> None:
    """Page for the application at the other end of descriptor 0. See spawn_pager."""
    control = _socket.socket(fileno=0)
    u.close_from(3)  # whoever reads from the program's pipes waits for their end
    limits.lift()
    try:
        if os.fork():
            os._exit(0)  # the application's os.wait must not see the pager
    except OSError as error:
        lifeline.try_to_send(control, error)
        os._exit(0)
    os.setsid()
    page = partial(page_for, control, lambda hello: PageStore(hello, hello.instance))
    os._exit(_status_of(page) or 0)


def _status_of(body: Callable[[], int | None]) -> int | None:
    """Call this, which may return an exit status. Whatever it raises, print why, and return print_error's."""
    try:
        with contextlib.suppress(ProcessLookupError):  # ESRCH: the application has ended
            return body()
    except BaseException as error:  # noqa: BLE001 - it ends the process, or the job
        return print_error(error)


def print_error(error: BaseException) -> int:
    """Print why this process, or a thread, ends. The exit status: 2, or 1 if the error is a bug in EDM."""
    if type(error).__module__ == "mpi4py.MPI":  # its Exception is no OSError
        error = OSError(f"MPI: {str(error).splitlines()[-1]}; a process of the job has died?")
    if not isinstance(error, OSError):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    limits.explain(error)
    tell(f"edm: error: {error.strerror or error}")
    return 2
