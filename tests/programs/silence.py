"""How much CPU time the DMS and the pager take while nothing happens, and what the first fault then waits."""

import os
import random
import statistics
import sys
import time

import edm

SILENCE = float(sys.argv[1])  # seconds, in all
RANKS = sys.argv[2]  # a file
FAULTS = 3  # measured after an equal part of the silence each


def app(space):
    area = space.mmap(5000 * edm.PAGE_SIZE)
    pages = iter(random.Random(1).sample(range(5000), 5000))  # nothing to read ahead
    with open(RANKS) as file:
        processes = [int(line) for line in file]

    def cpu_times():  # seconds; the clocks are clock_getcpuclockid(3)'s
        return [time.clock_gettime(~process << 3 | 2) for process in processes]

    def fault():
        at = next(pages) * edm.PAGE_SIZE
        began = time.perf_counter()
        area[at] = 1
        return time.perf_counter() - began

    busy = statistics.median(fault() for _ in range(1000))
    first, silent = [], []
    for _ in range(FAULTS):
        before = cpu_times()
        time.sleep(SILENCE / FAULTS)  # the silence that is measured, not a wait for something
        silent.append([after - b for after, b in zip(cpu_times(), before, strict=True)])
        first.append(fault())
    most = max(map(sum, zip(*silent, strict=True)))
    waited = statistics.median(first)
    print(f"busy {busy * 1e6:.1f} first {waited * 1e6:.1f} cpu {most:.4f}", flush=True)


with open(RANKS, "a") as file:  # of this process, which becomes the DMS or the pager
    file.write(f"{os.getpid()}\n")
edm.run(app)
