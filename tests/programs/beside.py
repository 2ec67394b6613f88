"""Two instances of one DMS: the first is slow, and the second measures its own faults meanwhile.

beside.py FOLDER sync MIB SECONDS    the first writes so much, and syncs; each fsync of the DMS's takes so
                                     many seconds more
beside.py FOLDER stop                the first works with all its might, and its pager is stopped now and
                                     then, in the midst of a message too

They tell each other by files in FOLDER. Prints a dict of seconds: the 99th percentile of the faults
before and during that, the longest one, and how long that took in all.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import edm
from edm.edm import launched

PAGE = edm.PAGE_SIZE
PAGES, FAULTS = 1024, 1000  # of the second one; faults before, each round
DEADLINE, STOPS, STOPPED = 100, 6, 0.15  # seconds; how often; seconds
folder, what, *numbers = Path(sys.argv[1]), *sys.argv[2:]
rank, ranks = launched()


def wait_for(name):
    deadline = time.monotonic() + DEADLINE
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            sys.exit(f"waited for {name} in vain")
        time.sleep(0.001)
    return (folder / name).read_text()


def tell(name, text=""):
    (folder / "new").write_text(text)
    (folder / "new").rename(folder / name)


def syncs(space):
    size, content = int(numbers[0]) << 20, bytes(range(1, 129)) * (1 << 13)
    area = space.mmap(size)
    for at in range(0, size, len(content)):
        area[at : at + len(content)] = content
    tell("ready")
    wait_for("measured")
    tell("syncs")
    space.sync()
    tell("done")


def works(space):
    size, content = 8 << 20, bytes(range(1, 129)) * (1 << 13)
    area, round_ = space.mmap(size), 0
    while not (folder / "done").exists():
        for at in range(0, size, len(content)):
            area[at : at + len(content)] = content
        round_ += 1
        if round_ == 1:
            tell("ready", str(space.figures()["pager_pid"]))
    if bytes(area[:: PAGE + 1]) != (content * (size // len(content)))[:: PAGE + 1]:
        sys.exit("its memory is wrong")
    print("its memory is right")


def measures(space):
    area, dice = space.mmap(PAGES * PAGE), random.Random(1)
    for page in range(PAGES):
        area[page * PAGE] = 1

    def faults(until):
        """Append their times (seconds). Some of the pages are here, and are no faults."""
        times = []
        while not until(times):
            page = dice.randrange(PAGES)
            began = time.perf_counter()
            area[page * PAGE]
            times.append(time.perf_counter() - began)
        return times

    pager = wait_for("ready")
    before = sorted(faults(lambda times: len(times) == FAULTS))
    tell("measured")
    began, during = time.monotonic(), []
    if what == "sync":
        wait_for("syncs")
        began = time.monotonic()
        during = faults(lambda _: (folder / "done").exists())
    else:
        for _ in range(STOPS):
            until = time.monotonic() + dice.random() / 20
            faults(lambda _, until=until: time.monotonic() > until)
            os.kill(int(pager), signal.SIGSTOP)
            until = time.monotonic() + STOPPED
            during += faults(lambda _, until=until: time.monotonic() > until)
            os.kill(int(pager), signal.SIGCONT)
        tell("done")
    seconds = time.monotonic() - began
    during.sort()
    at_99 = {"before": before[len(before) * 99 // 100], "during": during[len(during) * 99 // 100]}
    print({**at_99, "longest": during[-1], "seconds": seconds, "faults": len(during)}, flush=True)


if rank < ranks - 2 and what == "sync":  # a DMS
    fsync = os.fsync
    os.fsync = lambda fd: (time.sleep(float(numbers[1])), fsync(fd))
config = edm.Config(
    disk=str(folder / "disk"), keep=what == "sync", high_threshold=256, readahead=1, dms=ranks - 2
)
edm.main({ranks - 1: measures, ranks - 2: syncs if what == "sync" else works}.get(rank), config)
