"""Faults that need room while a sync sends all that is here."""

import ctypes
import sys
import threading

import edm

memset = ctypes.CDLL(None).memset  # lets go of the GIL, so that the other thread can go on
memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
PAGE, HIGH, LOW = edm.PAGE_SIZE, 40000, 39936
HERE, MORE = 39960, 100  # so LPET has not been woken yet, and there is room for less than half


def app(space):
    space.mmap((HERE + MORE) * PAGE)
    begin = space.areas()[0][0]
    memset(begin, 1, HERE * PAGE)
    synced, returned = [], threading.Event()

    def sync():
        synced.append(space.sync())
        returned.set()

    thread = threading.Thread(target=sync)
    thread.start()
    for page in reversed(range(HERE, HERE + MORE)):
        memset(begin + page * PAGE, 1, 1)
    first = "the sync" if returned.is_set() else "the faults"
    thread.join()
    figures = space.figures()
    stored = synced[0] + figures["evicted_dirty"]
    print(f"{first} ended first; {synced[0]} pages synced; peak {figures['peak_resident']}")
    if synced[0] < LOW // 2 or stored < HERE or figures["peak_resident"] > HIGH:
        sys.exit("not what was to be tried")
    print("room SUCCESS" if first == "the faults" else "the faults had to wait")


edm.main(app, edm.Config(high_threshold=HIGH, low_threshold=LOW))
