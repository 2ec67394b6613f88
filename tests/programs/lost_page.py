"""A byte of the disk file is flipped: its page is a SIGBUS, the others are whole. argv: the disk."""

import sys

import edm

PAGE = edm.PAGE_SIZE
PAGES, LOST = 40, 20


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def app(space):
    area = space.mmap(PAGES * PAGE)
    for page in range(PAGES):
        area[page * PAGE : (page + 1) * PAGE] = content(page)
    with open(sys.argv[1], "r+b") as disk:
        at = disk.read().index(content(LOST)) + 100
        disk.seek(at)
        disk.write(b"\xff")
    for page in (*range(LOST), *range(LOST + 1, PAGES)):
        if area[page * PAGE : (page + 1) * PAGE] != content(page):
            sys.exit(f"page {page} is wrong")
    print("the others are right", flush=True)
    print("never seen:", bytes(area[LOST * PAGE : (LOST + 1) * PAGE])[:16], flush=True)


START = 0x10_0000_0000
edm.main(
    app, edm.Config(START, START + 100 * PAGE, high_threshold=10, low_threshold=5, disk=sys.argv[1])
)
