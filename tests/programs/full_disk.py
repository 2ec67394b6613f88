"""The disk is full. argv: the disk, on a small file system; then "frees", "goes on", "reads" or "EIO";
"keep", if it is to be kept, "close", if the thresholds are to be, and "impatient", if a fault is to wait
for room for two seconds only.

In any way what was written before is whole. With "EIO" it is not full, but writing to it fails for a
while, now for a whole batch and now after half of it. With "frees", an area is unmapped when it is
full, and the writer goes on; with "reads", something else fills the file system, and a few pages are
written amid many that are read; else the writer goes on until the job is ended.
"""

import ctypes
import sys
import threading
import time
from pathlib import Path

import failing

import edm

libc = ctypes.CDLL(None)  # its calls let go of the GIL, so that one thread may wait for a page
for call in (libc.memcpy, libc.memcmp):
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

PAGE = edm.PAGE_SIZE
disk, frees = sys.argv[1], sys.argv[2] == "frees"


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def fill(path):
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError as error:
            print("full:", error)


def app(space):
    fails = Path(disk).with_name("fails")
    first = space.mmap(500 * PAGE)
    second = space.mmap(3000 * PAGE, addr=space.start_addr + 10000 * PAGE)
    addresses = [address for address, _ in space.areas()]
    written = [0, 0]

    def write(area, pages):
        for page in range(pages):
            write_one(area, page)
            written[area] = page + 1

    def write_one(area, page):
        libc.memcpy(addresses[area] + page * PAGE, content(page), PAGE)

    def check(area):
        for page in range(written[area]):
            if libc.memcmp(addresses[area] + page * PAGE, content(page), PAGE):
                sys.exit(f"page {page} of area {area} is wrong")

    write(0, 500)
    check(0)
    if sys.argv[2] == "reads":
        fill(Path(disk).with_name("something else"))
        for page in range(40):
            write_one(1, page)
            libc.memcmp(addresses[0] + page * PAGE, content(page), PAGE)
        written[1] = 40
        for _ in range(3):
            check(0)
        if not space.figures()["refused"]:
            sys.exit("the disk never was full")
        check(1)
        print("full disk SUCCESS")
        return
    if sys.argv[2] == "EIO":
        fails.touch()
    writer = threading.Thread(target=write, args=(1, 800 if frees else 3000))
    writer.start()
    deadline = time.monotonic() + 30
    while sys.argv[2] != "goes on" and not space.figures()["refused"]:
        if time.monotonic() > deadline:
            sys.exit("the disk never was full")
        time.sleep(0.01)
    if frees:
        print("full after", written[1], "pages; freeing", flush=True)
        space.munmap(first)
    if sys.argv[2] == "EIO":
        fails.unlink()
    writer.join()
    check(1)
    print("full disk SUCCESS", written, len(second))


if sys.argv[2] == "EIO":
    failing.everywhere("writes", disk)
if "impatient" in sys.argv:
    failing.everywhere("grace", 2.0)
low = 63 if "close" in sys.argv else 48
edm.main(app, edm.Config(high_threshold=64, low_threshold=low, disk=disk, keep="keep" in sys.argv))
