"""Which Python lines fault: samples of the application's frames, for --report.

In the picture: in the pager, beside the DM-Handler. It sends SIGURG to a thread that sleeps in a fault.
The handler in the application is the C code of Python's faulthandler. It runs no Python code and needs
no GIL: it writes the thread's frames to a memfd, which the pager reads.

Interface: tell_lines(at_close) is the application's. Lines is the pager's: begins(thread, address, waited) is called
before a fault is resolved. `found`, the report's, becomes the table:
{(line, the array's first page, its count of pages): [faults, nanoseconds]}.

A sample is a random fault, about one per INTERVAL. It stands for all faults since the sample before, and for their
durations. The signal is sent before the page comes: it wakes the thread, which writes its frames and
faults again at the same instruction, or goes on. The answer is read when the next sample is due. If it
is not there, and another thread faults, the line counts as unknown. The last answer of a job is not read.

The default action of SIGURG is to ignore it, so it harms no process that has lost the handler: because
Python is finalizing, or the process has executed another program. No signal is sent to
    * a thread in a system call: with a signal pending, the kernel would not let it sleep in its faults
    * a thread that blocks the signal
    * a thread that did not answer once: it runs no Python, or the program has a handler of its own
    * any thread, if the program has closed the memfd: its descriptor may be another file now
The faults of all these are counted without a line.

Rules: for the DM-Handler's thread; others may copy `found`. Memory is bounded: it keeps the first
LINES lines.

Sources: faulthandler in Python's documentation, signal(7), proc_pid_syscall(5), userfaultfd(2) on
UFFD_FEATURE_THREAD_ID.
"""

import faulthandler
import fcntl
import os
import re
import time
from _signal import SIG_DFL, SIGURG, getsignal
from contextlib import ExitStack, suppress

from edm.lifeline import closed_by, high
from edm.uffd_ctypes import PAGE_SIZE, tgkill

INTERVAL = 10_000_000  # nanoseconds from one sample to the next, about
MOST = 128  # faults from one sample to the next at most, on average: then samples come more often than by INTERVAL
LINES = 10_000
ANSWER = 1 << 16  # bytes; faulthandler writes at most 100 frames
NO_LINE = "a system call, or a thread whose line is unknown"

# A frame of a file whose name has one of LIBRARIES in it is not the program's.
FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)\n')
STANDARD_LIBRARY, HERE = os.path.dirname(os.__file__), os.path.dirname(__file__)
LIBRARIES = STANDARD_LIBRARY, f"{HERE}/numpy_mem_handler", "-packages/", "<frozen ", "<__array_"


def tell_lines(at_close: ExitStack) -> list[int]:
    """Have threads that get SIGURG write their frames to the end of a memfd.

    Returns the memfd's descriptor, or nothing if the program handles SIGURG. at_close: undoes it.
    """
    if getsignal(SIGURG) != SIG_DFL:
        return []
    memfd = closed_by(at_close, high(os.memfd_create("edm lines")))
    fcntl.fcntl(memfd, fcntl.F_SETFL, os.O_APPEND)
    faulthandler.register(SIGURG, memfd, all_threads=False)
    at_close.callback(lambda: getsignal(SIGURG) != SIG_DFL or faulthandler.unregister(SIGURG))
    return [memfd]


class Lines:
    def __init__(self, process: int, its_end: int, memfd: int, lspt: object, found: dict) -> None:
        """process: the application. its_end: the number of the memfd's descriptor there. lspt: an LSPT, which the
        application does not import. found: gets the table."""
        self._process, self._memfd, self._lspt, self._found = process, memfd, lspt, found
        self._its_end = f"/proc/{process}/fd/{its_end}"
        self._silent: set[int] = set()  # threads that did not answer
        self._faults, self._next = -1, 0  # since the last sample, and how many until the next one
        # Of the last sample: the thread that was asked, or 0; when; and `waited`, see begins.
        self._asked, self._when, self._waited = 0, time.monotonic_ns(), 0
        self._of_sample = range(1), 0, 0  # its array, its faults, and how long all took

    def begins(self, thread: int, address: int, waited: int) -> int:
        """This thread waits for the page at this address. waited: the nanoseconds of all faults before. Returns how
        many a sample took here, or 0."""
        self._faults += 1
        if self._faults < self._next:
            return 0
        now = time.monotonic_ns()
        self._hear(thread)
        area = self._lspt.area((address - self._lspt.start) // PAGE_SIZE)
        self._of_sample = area, self._faults, waited - self._waited
        mean = min(MOST, self._faults * INTERVAL // (now - self._when))
        self._next = 1 + now % (2 * mean + 2)  # the clock's nanoseconds are random enough
        self._when, self._waited, self._faults, self._asked = now, waited, 0, 0
        # Ask the thread for its line, unless it must not get the signal.
        os.ftruncate(self._memfd, 0)  # also a late answer
        of_thread = f"/proc/{self._process}/task/{thread}"
        # OSError: the thread has ended, the memfd is closed, or reading is not permitted.
        with suppress(OSError):
            with open(f"{of_thread}/syscall") as call, open(f"{of_thread}/status", "rb") as status:
                number, blocked = call.read(3), re.search(rb"SigBlk:\t(\w+)", status.read())[1]
            blocks = int(blocked, 16) >> SIGURG - 1 & 1
            is_open = os.path.samefile(self._its_end, self._memfd)
            if number == "-1 " and not blocks and is_open and thread not in self._silent:
                tgkill(self._process, thread, SIGURG)
                self._asked = thread
        return time.monotonic_ns() - now

    def _hear(self, thread: int) -> None:
        """Count the faults of the last sample. This thread faults now: if it was asked, its answer is complete."""
        frames = FRAME.findall(os.pread(self._memfd, ANSWER, 0).decode(errors="replace"))
        own = [frame for frame in frames if not any(part in frame[0] for part in LIBRARIES)]
        line = "{}:{} in {}".format(*(own or frames)[0]) if frames else NO_LINE  # the innermost
        if not frames and thread == self._asked:
            self._silent.add(thread)
        area, faults, took = self._of_sample
        key = line, area.start, len(area)
        if faults and (key in self._found or len(self._found) < LINES):
            before, waited = self._found.get(key, (0, 0))
            self._found[key] = [before + faults, waited + took]
