"""Rank 1 uses the DMS on rank 0 through MpiStore. What it does: see the functions at the end.

stores.py WHAT [DISK]        with a DISK, that is a kept one
"""

import ctypes
import errno
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

from mpi4py import MPI

from edm.dms import DMS
from edm.messages import HELLO, DMSGone
from edm.mpi_client import MpiStore
from edm.page_store import CONTENT, DISK, MAX_PAGES, PIECE, PageStore
from edm.uffd_ctypes import PAGE_SIZE

START, PAGES = 0x1B58000, 1000
END = START + PAGES * PAGE_SIZE
ASIDE = 99  # the tag of messages that are not the store's


def content(seed, pages=1):
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


class Pipe:
    def __init__(self):
        self.read, self.write = os.pipe()
        fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, MAX_PAGES * PAGE_SIZE)

    def put(self, store, runs, whole, stay=False):
        assert os.write(self.write, whole) == len(whole)
        try:
            store.put(runs, self.read, stay)
        except OSError:
            os.set_blocking(self.read, False)
            with open(self.read, "rb", closefd=False) as rest:
                rest.read()
            os.set_blocking(self.read, True)
            raise


def bytes_of(asked, got):
    """Of the first so many pages."""
    parts = []
    for at in range(0, got, PIECE):
        part = min(PIECE, got - at)
        parts.append(ctypes.string_at(asked.content(at, part), part * PAGE_SIZE))
    return b"".join(parts)


def one_operation(dice, first, pages):
    """A function that does it to a store, with a pipe, and returns what came of it. It is with so many
    pages from the first on."""
    page = first + dice.randrange(pages)
    count = dice.randint(1, min(MAX_PAGES, first + pages - page))
    stride = dice.choice((1, 1, 1, 2, 7))
    what, seed = (
        dice.choice(("get", "get", "put", "put", "put", "free", "sync", "drop")),
        dice.random(),
    )
    used, stay = dice.choice((0, count // 2, count)), dice.random() < 0.3

    def runs():
        own = random.Random(seed)
        found, at = [], page
        while at < page + count:
            many = own.randint(1, page + count - at)
            found.append((at, many, own.random() < 0.7))
            at += many
        return found

    def get(store, pipe):
        asked = store.ask_get(range(page, min(page + count * stride, first + pages), stride))
        kind, got = asked.take()
        found = bytes_of(asked, got) if kind == CONTENT else b""
        asked.give_back(0 if what == "drop" else min(used, got))
        asked.done()
        if what == "drop":  # these are not in the instance: asking for them alone changes nothing
            store.ask_get(range(page, page + got * stride, stride)).done()
        return kind, got, found

    def do(store, pipe):
        if what in ("get", "drop"):
            return get(store, pipe)
        if what == "put":
            return pipe.put(store, runs(), content(seed, count), stay)
        return store.sync() if what == "sync" else store.free(page, count)

    return do


# ---------------------------------------------------------------- what rank 1 does


def same(store):
    """The same as PageStore, operation by operation."""
    dice, pipe = random.Random(1), Pipe()
    other = PageStore(
        sys.argv[2] + ".other" if sys.argv[2:] else None, START, END, bool(sys.argv[2:])
    )
    assert store.kept == other.kept == bool(sys.argv[2:])
    for index in range(400):
        do = one_operation(dice, 0, PAGES)
        got, right = do(store, pipe), do(other, pipe)
        assert got == right, f"operation {index}"
        assert store.locations(0, PAGES) == other.locations(0, PAGES), f"operation {index}"
    if store.kept:
        runs = [
            page for first, count in store.runs_on_disk() for page in range(first, first + count)
        ]
        assert runs == [page for page in range(PAGES) if store.locations(page, 1)[0] & DISK] != []
    else:
        assert not list(store.runs_on_disk())


def threads(store):
    """The same as PageStore, in several threads at once, each with its own pages and an own
    PageStore."""
    failed = []

    def work(first, pages):
        dice, pipe, other = random.Random(first), Pipe(), PageStore(None, START, END)
        try:
            for _ in range(150):
                do = one_operation(dice, first, pages)
                assert do(store, pipe) == do(other, pipe)
                assert store.locations(first, pages) == other.locations(first, pages)
        except BaseException as error:
            failed.append(error)
            raise

    working = [threading.Thread(target=work, args=(at, 150)) for at in range(0, 750, 150)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    assert not failed
    assert 2 <= len(store.slots) <= 2 * 5  # as many as there were requests at once


def unread(store):
    """An answer that nobody takes, however large, keeps nobody from being served."""
    pipe = Pipe()
    pipe.put(store, [(0, MAX_PAGES, True)], content(1, MAX_PAGES))
    left = [store.ask_get(range(MAX_PAGES)) for _ in range(8)]
    pipe.put(store, [(500, 100, True)], content(2, 100))
    asked = store.ask_get(range(500, 600))
    assert asked.take() == (CONTENT, 100) and bytes_of(asked, 100) == content(2, 100)
    asked.done()
    for one in left:
        assert one.take() == (CONTENT, MAX_PAGES)
        assert bytes_of(one, MAX_PAGES) == content(1, MAX_PAGES)
        one.done()


def refused(store):
    """The DMS's errno and words arrive. (Its files can't be larger than it says at the end.)"""
    pipe = Pipe()
    for _ in range(2):
        try:
            pipe.put(store, [(0, 2, True), (5, 1, False), (990, 2, True)], content(1, 5))
        except OSError as error:
            assert (error.errno, error.strerror) == (errno.EFBIG, os.strerror(errno.EFBIG))
        else:
            sys.exit("the put was not refused")
        assert store.locations(0, PAGES) == bytes(PAGES)
    try:
        store.free(PAGES - 1, 2)
    except OSError as error:
        assert error.errno == errno.EINVAL and "in a space of 1000 pages" in error.strerror
    else:
        sys.exit("a free outside of the space was not refused")
    try:
        MpiStore(comm, 0, START, END + PAGE_SIZE)  # which says BYE: the last thing here
    except OSError as error:
        assert error.errno == errno.EINVAL and "differ in" in error.strerror
    else:
        sys.exit("another geometry was not refused")


def lost(store):
    """A page that can't be read is told by content, and those around it are read."""
    pipe = Pipe()
    pipe.put(store, [(10, 5, True)], content(1, 5))
    page = content(1, 5)[2 * PAGE_SIZE : 3 * PAGE_SIZE]
    with open(sys.argv[2], "r+b") as file:
        file.seek(file.read().index(page) + 100)
        file.write(bytes((page[100] ^ 1,)))
    asked = store.ask_get(range(10, 15))
    assert asked.take() == (CONTENT, 2) and bytes_of(asked, 2) == content(1, 2)
    asked.give_back(0)
    asked.done()
    asked = store.ask_get(range(12, 15))
    assert asked.take()[0] == CONTENT
    for _ in range(2):
        try:
            asked.content(0, 1)
        except OSError as error:
            assert error.errno == errno.EIO
            assert "page 12" in error.strerror and "checksum" in error.strerror
        else:
            sys.exit("the lost page was read")
    asked.give_back(0)
    asked.done()
    assert store.locations(10, 5) == bytes([DISK] * 5)
    asked = store.ask_get(range(13, 15))
    assert asked.take() == (CONTENT, 2) and bytes_of(asked, 2) == content(1, 5)[3 * PAGE_SIZE :]
    asked.done()


def killed(store):
    """Whoever waits for a DMS that has been killed is told within a second, in any thread."""
    dms = bytearray(4)
    comm.Recv([dms, MPI.BYTE], 0, ASIDE)
    os.kill(int.from_bytes(dms, "little"), signal.SIGKILL)
    told, began = [], time.monotonic()

    def wait(request):
        try:
            request()
        except DMSGone as error:
            told.append((str(error), time.monotonic() - began))

    requests = [store.sync, lambda: store.free(0, 1), store.ask_get(range(3)).take, store.close]
    waiting = [threading.Thread(target=wait, args=(request,)) for request in requests]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert [words for words, _ in told] == ["the DMS has died"] * len(requests), told
    assert max(seconds for _, seconds in told) < 1, told
    print("stores SUCCESS", flush=True)
    comm.Send([b"x", MPI.BYTE], 0, ASIDE)
    os._exit(0)  # MPI would wait for what was asked


def idle(store):
    """A DMS that has nothing to do sleeps, and is there again at once."""
    assert os.sysconf("SC_CLK_TCK") == 100
    dms = bytearray(4)
    comm.Recv([dms, MPI.BYTE], 0, ASIDE)

    def cpu():
        with open(f"/proc/{int.from_bytes(dms, 'little')}/stat") as stat:
            return sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / 100

    seconds = 2.0
    before, until = cpu(), time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)
    share = (cpu() - before) / seconds
    began = time.monotonic()
    store.locations(0, 1)
    print(
        f"idle: {100 * share:.1f} % of a core, and then {1e3 * (time.monotonic() - began):.1f} ms"
    )
    assert share < 0.05


# ---------------------------------------------------------------- the two ranks


def silent():
    """A DMS that answers HELLO, as if it was another process, and nothing else. mpirun need not know
    of that process, which ends the job when a rank has been killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        server = DMS(comm, None, START, END)
        action, *rest = server._requests[HELLO]

        def hello(*request):
            server._left.add(0)
            return action(*request)

        server._requests[HELLO] = hello, *rest
        with mock.patch("os.getpid", return_value=process.pid):
            server.serve()
        tell_pid(process.pid)
        process.wait()
    comm.Recv([bytearray(1), MPI.BYTE], 1, ASIDE)
    os._exit(0)  # MPI would wait for what was asked


def tell_pid(pid):
    comm.Send([pid.to_bytes(4, "little"), MPI.BYTE], 1, ASIDE)


comm = MPI.COMM_WORLD
what = globals()[sys.argv[1]]
if comm.rank == 0:
    if what is killed:
        silent()
    server = DMS(comm, *sys.argv[2:] or [None], START, END, bool(sys.argv[2:]))
    if what is refused:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE * 500, hard))
    if what is idle:
        tell_pid(os.getpid())
    server.serve()
else:
    store = MpiStore(comm, 0, START, END)
    try:
        what(store)
        print("stores SUCCESS", flush=True)
    finally:
        if what is not refused:
            store.close()
