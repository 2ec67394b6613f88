"""A page can't be read back: it is a SIGBUS, the others are whole. argv: the disk, and why.

"flip": a byte of the disk file, a kept one, is flipped. "EIO": reading it fails. "no poison": the same,
on a kernel without UFFDIO_POISON. And "keep", if the disk is to be kept.
"""

import sys

import failing

import edm

PAGE = edm.PAGE_SIZE
PAGES, LOST = 2000, 20
disk, why, *keep = sys.argv[1:]


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def app(space):
    area = space.mmap(PAGES * PAGE)
    for page in range(PAGES):
        area[page * PAGE : (page + 1) * PAGE] = content(page)
    if why == "flip":
        with open(disk, "r+b") as file:
            at = file.read().index(content(LOST)) + 100
            file.seek(at)
            file.write(b"\xff")
    # In windows that are read ahead, which that page is in the midst of.
    for page in (*range(LOST), *range(LOST + 1, PAGES)):
        if area[page * PAGE : (page + 1) * PAGE] != content(page):
            sys.exit(f"page {page} is wrong")
    print("the others are right", flush=True)
    print("never seen:", bytes(area[LOST * PAGE : (LOST + 1) * PAGE])[:16], flush=True)


if why != "flip":
    failing.everywhere("reads", disk, content(LOST))
if why == "no poison":
    failing.everywhere("no_poison")
START = 0x10_0000_0000
edm.main(
    app,
    edm.Config(
        START,
        START + PAGES * PAGE,
        high_threshold=640,
        low_threshold=400,
        disk=disk,
        keep=bool(keep),
    ),
)
