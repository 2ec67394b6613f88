"""How fast pages come from a DMS on another host.

Prints a dict: the median time of a random read (seconds), and bytes a second of a sequential one.
"""

import ctypes
import random
import statistics
import time

import edm

PAGE, PAGES, READS = edm.PAGE_SIZE, 16384, 300
memchr = ctypes.CDLL(None).memchr  # lets go of the GIL
memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


def app(space):
    area, dice = space.mmap(PAGES * PAGE), random.Random(1)
    for page in range(PAGES):
        area[page * PAGE] = 1
    begin = space.areas()[0][0]
    space.sync()
    began = time.monotonic()
    for page in range(PAGES):
        memchr(begin + page * PAGE, 2, PAGE)
    sequential = PAGES * PAGE / (time.monotonic() - began)
    times = []
    for page in dice.sample(range(PAGES // 3), READS):  # the last ones may be here
        began = time.perf_counter()
        area[page * PAGE]
        times.append(time.perf_counter() - began)
    print({"random": statistics.median(times), "sequential": sequential}, flush=True)


edm.main(app, edm.Config(high_threshold=8192, dms=1))
