"""What pager, LPET and DMS take for a page of address space in use, and when the application begins."""

import sys
import time

started = time.time()
import parts

import edm

# argv: a file where the DMS tells its process id, and how many GiB to touch of how many.
parts.tell(sys.argv[1])

PAGE, GIB = edm.PAGE_SIZE, 1 << 30
SIZE = int(float(sys.argv[2]) * GIB)  # bytes touched
WARM = 64 << 20  # bytes touched before the first look: by then every buffer is in use


def taken(pid):
    """Bytes of memory that the process has, apart from files' pages."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def app(space):
    print("began after", time.time() - started)
    pids = parts.pids(space, sys.argv[1])
    area = space.mmap(SIZE + WARM)

    def touch(begin, end):
        for at in range(begin, end, PAGE):
            if at // PAGE % 2:
                area[at] = 1
            elif area[at]:
                sys.exit("a page that nobody wrote is not zero")

    touch(0, WARM)
    before = sum(map(taken, pids))
    touch(WARM, WARM + SIZE)
    grown = sum(map(taken, pids)) - before
    print("bytes a page", grown / (SIZE / PAGE))


edm.run(app, edm.Config(high_threshold=4096, end_addr=0x10_0000_0000 + int(sys.argv[3]) * GIB))
