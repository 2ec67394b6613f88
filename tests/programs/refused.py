"""The store refuses for a moment. argv: the disk, and what: "munmap" or "stall".

munmap: an area goes nevertheless, and nothing of it is in the way of others, or of a sync.
stall: to write, but only after more time than a fault waits for room, and twice.
"""

import ctypes
import sys
from pathlib import Path

import failing

import edm

PAGE, GRACE = edm.PAGE_SIZE, 1.0
disk, what = sys.argv[1:]
fails = Path(disk).with_name("fails")


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


memcpy = ctypes.CDLL(None).memcpy  # lets go of the GIL, so that another thread can go on
memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def write(area, pages):
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in pages:
        memcpy(address + page * PAGE, content(page), PAGE)


def check(area, pages):
    for page in pages:
        if area[page * PAGE : (page + 1) * PAGE] != content(page):
            sys.exit(f"page {page} is wrong")


def munmap(space):
    other, area = space.mmap(324 * PAGE), space.mmap(40 * PAGE)
    begin = space.areas()[1][0]
    write(other, range(24))
    write(area, range(40))
    space.sync()
    write(area, range(20))  # all of these 64 are here, and 20 of them are not on the disk
    fails.touch()
    space.munmap(area)
    if len(space.areas()) != 1 or set(space.locations(begin, 40 * PAGE)) != {"NEW"}:
        sys.exit("it is still there")
    write(other, range(24, 64))  # for which there is room now
    again = space.mmap(40 * PAGE, addr=begin)
    fails.unlink()
    write(other, range(64, 324))
    if any(again):
        sys.exit("what was mapped anew has old bytes")
    space.sync()
    check(other, range(324))


def stall(space):
    area = space.mmap(300 * PAGE)
    write(area, range(60))
    fails.touch()
    write(area, range(60, 300))
    if not space.figures()["refused"]:
        sys.exit("nothing was refused")
    check(area, range(300))


def app(space):
    munmap(space) if what == "munmap" else stall(space)
    print("refused SUCCESS")


if what == "stall":
    failing.everywhere("stalls", disk, GRACE)
else:
    failing.everywhere("refuses", disk)
edm.main(
    app,
    edm.Config(high_threshold=64, low_threshold=32, disk=disk, keep=what == "munmap", readahead=1),
)
