"""Tells where it is, and waits for SIGUSR1. argv: what it does then; and the disk, if it is to be kept.

"return", "exit", "_exit", "kill", "exec": how it ends. "faults": it blocks all signals, stops pager and
LPET, and lets its threads sleep in page faults, of which one is the main thread's.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import edm

PAGE, PAGES = edm.PAGE_SIZE, 300
memset = ctypes.CDLL(None).memset  # lets go of the GIL
memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
how, *disk = sys.argv[1:]


def is_stopped(task):
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"


def sleep_in_faults(space):
    figures, (begin, _) = space.figures(), space.areas()[0]
    for pid in {figures["pager_pid"], figures["lpet_pid"]}:
        os.kill(pid, signal.SIGSTOP)
        while not all(map(is_stopped, Path(f"/proc/{pid}/task").iterdir())):
            time.sleep(0.001)
    for page in range(3):  # which have left long ago
        threading.Thread(target=memset, args=(begin + page * PAGE, 1, 1)).start()
    print("asleep", flush=True)
    memset(begin + 10 * PAGE, 1, 1)


def app(space):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    area = space.mmap(PAGES * PAGE)
    for page in range(PAGES):
        area[page * PAGE] = 1
    print("ready", flush=True)
    signal.sigwait([signal.SIGUSR1])
    match how:
        case "exit":
            sys.exit(3)
        case "_exit":
            os._exit(4)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exec":
            os.execv("/bin/sleep", ["sleep", "60"])
        case "faults":
            sleep_in_faults(space)


edm.main(
    app,
    edm.Config(
        high_threshold=64, low_threshold=32, disk=disk[0] if disk else None, keep=bool(disk)
    ),
)
