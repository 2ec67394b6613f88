"""How much CPU time the DMS takes while nothing happens, and what the first fault then waits."""

import random
import statistics
import sys
import time

import edm

SILENCE = float(sys.argv[1])  # seconds, in all
FAULTS = 3  # measured after a second of silence each


def app(space):
    area = space.mmap(5000 * edm.PAGE_SIZE)
    pages = iter(random.Random(1).sample(range(5000), 5000))  # nothing to read ahead

    def fault():
        at = next(pages) * edm.PAGE_SIZE
        began = time.perf_counter()
        area[at] = 1
        return time.perf_counter() - began

    busy = statistics.median(fault() for _ in range(1000))
    first = []
    if SILENCE >= FAULTS:
        for _ in range(FAULTS):
            time.sleep(SILENCE / FAULTS)  # the silence that is measured, not a wait for something
            first.append(fault())
        print(f"busy {busy * 1e6:.1f} first {statistics.median(first) * 1e6:.1f}", flush=True)


began = time.process_time()
edm.run(app)
# One write, as two ranks print it at once.
print(f"cpu {time.process_time() - began:.4f}\n", end="", flush=True)
