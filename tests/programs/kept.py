"""Writes, and ends without a sync; or finds what was written. argv: the disk, and how to end."""

import os
import signal
import sys

import edm

PAGE, PAGES = edm.PAGE_SIZE, 300
disk, how = sys.argv[1:]


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def app(space):
    area = space.mmap(PAGES * PAGE)
    if how == "find":
        for page in range(PAGES):
            if area[page * PAGE : (page + 1) * PAGE] != content(page):
                sys.exit(f"page {page} is wrong")
        print("kept SUCCESS")
        return
    for page in range(PAGES):
        area[page * PAGE : (page + 1) * PAGE] = content(page)
    if how == "wait":
        print("written", flush=True)
        signal.pause()
    if how == "prefetch":  # and ends while the pages are under way
        import numpy as np

        edm.prefetch(np.frombuffer(area).reshape(PAGES, -1), np.arange(0, PAGES, 2))
        os._exit(3)
    if how == "raise":
        raise RuntimeError("boom")
    if how == "_exit":
        os._exit(3)
    if how == "exec":
        os.execv("/bin/sh", ["sh", "-c", "exit 4"])
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(7)


edm.main(app, edm.Config(high_threshold=64, low_threshold=32, disk=disk, keep=True))
