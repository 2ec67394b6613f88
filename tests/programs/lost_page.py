"""A page can't be read back: it is a SIGBUS, the others are whole. argv: the disk, and why.

"flip": a byte of the disk file is flipped. "EIO": reading it fails. "no poison": as flip, on a
kernel without UFFDIO_POISON.
"""

import errno
import os
import sys

import edm
from edm import uffd_ctypes

PAGE = edm.PAGE_SIZE
PAGES, LOST = 40, 20
disk, why = sys.argv[1:]
real_preadv = os.preadv


def preadv(fd, buffers, offset):
    got = real_preadv(fd, buffers, offset)
    if os.readlink(f"/proc/self/fd/{fd}") == disk and content(LOST) in bytes(buffers[0]):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return got


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def app(space):
    area = space.mmap(PAGES * PAGE)
    for page in range(PAGES):
        area[page * PAGE : (page + 1) * PAGE] = content(page)
    if why != "EIO":
        with open(disk, "r+b") as file:
            at = file.read().index(content(LOST)) + 100
            file.seek(at)
            file.write(b"\xff")
    for page in (*range(LOST), *range(LOST + 1, PAGES)):
        if area[page * PAGE : (page + 1) * PAGE] != content(page):
            sys.exit(f"page {page} is wrong")
    print("the others are right", flush=True)
    print("never seen:", bytes(area[LOST * PAGE : (LOST + 1) * PAGE])[:16], flush=True)


if why == "EIO":
    os.preadv = preadv
if why == "no poison":
    uffd_ctypes.UFFDIO_POISON = uffd_ctypes._IO(0xAA, 0x77)
START = 0x10_0000_0000
edm.main(app, edm.Config(START, START + 100 * PAGE, high_threshold=10, low_threshold=5, disk=disk))
