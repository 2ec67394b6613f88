"""The DMS refuses for a moment. argv: the disk, and what: "munmap" or "stall".

munmap: to forget an area, twice: at once, and after a while in which other pages come. What is still
there can be evicted, and unmapped, and nothing of all that is in the way of a sync.
stall: to write, but only after more time than a fault waits for room, and twice.
"""

import ctypes
import errno
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import edm
from edm import edm as start

PAGE, GRACE = edm.PAGE_SIZE, 1.0
disk, what = sys.argv[1:]
fails = Path(disk).with_name("fails")
calls = itertools.count()
real_pwrite = os.pwrite


def pwrite(fd, content, offset):
    if os.readlink(f"/proc/self/fd/{fd}") == disk and fails.exists():
        if what == "stall":
            if (call := next(calls)) == 0:
                time.sleep(1.5 * GRACE)
            if call == 1:
                fails.unlink()
        elif "slow" in fails.read_text():
            fails.with_name("refusing").touch()
            time.sleep(0.5)
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real_pwrite(fd, content, offset)


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


def unmap_fails(space, area):
    try:
        space.munmap(area)
    except OSError as error:
        print("munmap:", error)
    else:
        sys.exit("munmap did not fail")


def munmap(space):
    other, area = space.mmap(324 * PAGE), space.mmap(40 * PAGE)
    begin = space.areas()[1][0]
    write(other, range(24))
    write(area, range(40))
    space.sync()  # all of these 64 are here, and CLEAN
    fails.touch()
    unmap_fails(space, area)
    fails.write_text("slow")
    thread = threading.Thread(target=unmap_fails, args=(space, area))
    thread.start()
    deadline = time.monotonic() + 20
    while not fails.with_name("refusing").exists():
        if time.monotonic() > deadline:
            sys.exit("nothing is refused")
    fails.unlink()  # what has failed already fails
    write(other, range(24, 64))  # LPET has to evict, while the pages of area can not be
    thread.join()
    write(other, range(64, 324))
    if set(space.locations(begin, 40 * PAGE)) != {"DISK"}:
        sys.exit("pages that nobody uses were not evicted")
    space.munmap(area)
    if len(space.areas()) != 1 or set(space.locations(begin, 40 * PAGE)) != {"NEW"}:
        sys.exit("it is still there")
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


def make_pager(*arguments):
    from edm import lpet  # which imports MPI: not before run

    lpet.GRACE = GRACE
    return real_make_pager(*arguments)


real_make_pager, start._make_pager = start._make_pager, make_pager
os.pwrite = pwrite
edm.main(
    app,
    edm.Config(high_threshold=64, low_threshold=32, disk=disk, keep=what == "munmap", readahead=1),
)
