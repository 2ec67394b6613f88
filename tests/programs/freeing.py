"""How long it takes to free an area while LPET is busy: threads write all the time, more than fits."""

import ctypes
import sys
import threading
import time

import edm

memset = ctypes.CDLL(None).memset  # lets go of the GIL, so that the threads really write
memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
PAGE, HIGH, SIZE = edm.PAGE_SIZE, 65536, 256 << 20  # a round of LPET is half of all, or more
SECONDS = 2.0
LIMITS = {"release": 0.01, "munmap": 0.08}  # seconds, of the 99th percentile; a round takes 0.2


def app(space):
    areas = [space.mmap(SIZE) for _ in range(2)]
    begins = [address for address, _ in space.areas()]
    until = time.monotonic() + SECONDS

    def write(begin):
        while time.monotonic() < until:
            memset(begin, 1, SIZE)

    threads = [threading.Thread(target=write, args=(begin,)) for begin in begins]
    for thread in threads:
        thread.start()
    took = {"release": [], "munmap": []}
    while time.monotonic() < until:
        address = space.allocate(4 * PAGE, "")
        memset(address, 1, 4 * PAGE)
        began = time.perf_counter()
        space.release(address)
        took["release"].append(time.perf_counter() - began)
        area = space.mmap(4 * PAGE)
        area[:] = bytes(4 * PAGE)
        began = time.perf_counter()
        space.munmap(area)
        took["munmap"].append(time.perf_counter() - began)
    for thread in threads:
        thread.join()
    figures = space.figures()
    if figures["evicted_dirty"] < HIGH:
        sys.exit(f"LPET was not busy: {figures}")
    for name, seconds in took.items():
        seconds.sort()
        most = seconds[len(seconds) * 99 // 100]
        print(f"{name} {len(seconds)} times, {most * 1e6:.0f} µs in the 99th percentile")
        if most > LIMITS[name]:
            sys.exit("that is too long")
    print("freeing SUCCESS", len(areas))


edm.run(app, edm.Config(high_threshold=HIGH, low_threshold=1))
