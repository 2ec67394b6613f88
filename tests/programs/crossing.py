"""Two streams, upward and downward, that want the same pages ahead; one gets them, and they change.

Over MPI, what was asked for ahead is bytes as they were then.
"""

import ctypes
import sys

import edm

libc = ctypes.CDLL(None)
libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
PAGE, HIGH, PAGES, FAR = edm.PAGE_SIZE, 1100, 500, 200  # FAR: pages, too far for a stream


def content(page, version):
    return (page << 8 | version).to_bytes(8, "little") * (PAGE // 8)


def app(space):
    area, other = space.mmap(PAGES * PAGE), space.mmap(2 * HIGH * FAR * PAGE)

    def is_right(page, version):
        return area[page * PAGE : (page + 1) * PAGE] == content(page, version)

    def evict_all():
        for page in range(0, 2 * HIGH * FAR, FAR):
            other[page * PAGE] = 1

    for page in range(PAGES):
        area[page * PAGE : (page + 1) * PAGE] = content(page, 1)
    begin = PAGES // 5
    evict_all()
    # Upward, and 16 pages are asked for ahead: those from begin + 9 on.
    assert is_right(begin, 1) and is_right(begin + 1, 1)
    # Downward, and the same ones are, from the other end.
    assert is_right(begin + 33, 1) and is_right(begin + 32, 1)
    for page in range(begin + 9, begin + 25):
        assert is_right(page, 1)
        area[page * PAGE : (page + 1) * PAGE] = content(page, 2)
    evict_all()
    for page in reversed(range(begin + 9, begin + 25)):
        if not is_right(page, 2):
            sys.exit(f"page {page} has old bytes")
    figures = space.figures()
    if figures["fetched"] < figures["faults_first_access"] + figures["faults_refetch"] + 100:
        sys.exit(f"nothing was read ahead: {figures}")
    print("crossing SUCCESS")


edm.run(app, edm.Config(high_threshold=HIGH))
