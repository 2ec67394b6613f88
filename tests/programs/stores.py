"""The last rank uses the DMSs, all other ranks, through MpiStore. What it does: see the functions at the end.

stores.py DISK WHAT ...        the disk is a kept one; with "-" for DISK it has no name
"""

import ctypes
import errno
import os
import random
import resource
import sys
import threading
import time

from mpi4py import MPI
from where import locations, locations_over_mpi, tells_locations

from edm.dms import DMS
from edm.edm import Config
from edm.messages import FREE
from edm.mpi_client import MpiStore
from edm.page_store import CONTENT, DISK, INSTANCE, PageStore
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE

START, PAGES = 0x1B58000, 1000
END = START + PAGES * PAGE_SIZE
ASIDE, WHERE = 99, 98  # the tags of messages that are not the store's


def content(seed, pages=1):
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


getting = threading.Lock()  # one thread at a time calls ask_get and take_get
asking = threading.Lock()
NOISE = memoryview(content(0, 2 * PAGES_AT_ONCE))


def put(store, page, count, *dirty, stay=False):
    """dirty: (first page, the bytes of it and its neighbours)."""
    gone = [] if stay else [(page, count)]
    store.put(gone, [(first, memoryview(whole)) for first, whole in dirty])


def take(store, asked):
    """(kind, for how many pages, their bytes)."""
    kind, got, address = store.take_get(asked)
    return kind, got, ctypes.string_at(address, got * PAGE_SIZE) if kind == CONTENT else b""


def get(store, pages):
    with getting:
        return take(store, store.ask_get(pages))


def where(page, count):
    """Where these pages are, as the DMSs have it."""
    with asking:
        return locations_over_mpi(comm, DMSS, page, count, WHERE)


def told(call, *arguments):
    """The OSError that this raises."""
    try:
        call(*arguments)
    except OSError as error:
        return error
    return sys.exit(f"{call}{arguments} was not refused")


def one_operation(dice, first, pages):
    """A function that does it to a store, and returns what came of it. It is with so many pages from the
    first on."""
    page = first + dice.randrange(pages)
    count = dice.randint(1, min(PAGES_AT_ONCE, first + pages - page))
    stride = dice.choice((1, 1, 1, 2, 7))
    what = dice.choice(("get", "get", "get", "put", "put", "put", "free", "sync"))
    stay, dirty, at = dice.random() < 0.3, [], page
    while at < page + count:
        many = dice.randint(1, page + count - at)
        if dice.random() < 0.7:
            begin = dice.randrange(PAGES_AT_ONCE * PAGE_SIZE)
            dirty.append((at, NOISE[begin : begin + many * PAGE_SIZE]))
        at += many

    def do(store):
        if what == "get":
            end = page - page % over_mpi.stripe + over_mpi.stripe
            return get(
                store, range(page, min(page + count * stride, first + pages_in_all, end), stride)
            )
        if what == "put":
            return store.put([] if stay and dirty else [(page, count)], dirty)
        return store.sync() if what == "sync" else store.free(page, count)

    pages_in_all = pages
    return do


# ---------------------------------------------------------------- what the last rank does


def same(store):
    """The same as PageStore, operation by operation."""
    dice = random.Random(1)
    other = PageStore(config.__replace__(disk=disk and f"{disk}.other"), 0)
    assert store.kept == other.kept == bool(disk)
    for index in range(400):
        do = one_operation(dice, 0, PAGES)
        assert do(store) == do(other), f"operation {index}"
        assert where(0, PAGES) == locations(other, 0, PAGES), f"operation {index}"
    on_disk = [page for page in range(PAGES) if locations(other, page, 1)[0] & DISK]
    found = [page for first, count in other.runs_on_disk() for page in range(first, first + count)]
    assert on_disk and found == on_disk
    store.free(0, PAGES)


def threads(store):
    """The same as PageStore, in several threads at once, each with its own pages and an own
    PageStore."""
    failed = []

    def work(first, pages):
        dice, other = random.Random(first), PageStore(Config(START, END), 0)
        try:
            for _ in range(150):
                do = one_operation(dice, first, pages)
                assert do(store) == do(other)
                assert where(first, pages) == locations(other, first, pages)
        except BaseException as error:
            failed.append(error)
            raise

    working = [threading.Thread(target=work, args=(at, 150)) for at in range(0, 750, 150)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    assert not failed
    assert len(store._of_gets) == 1  # as many as there were gets at once
    store.free(0, PAGES)


def unread(store):
    """An answer that nobody takes, however large, keeps nobody from being served, and the store from ending."""
    whole = content(1, PAGES_AT_ONCE)
    put(store, 0, PAGES_AT_ONCE, (0, whole))
    left = [store.ask_get(range(PAGES_AT_ONCE)) for _ in range(8)]
    put(store, 500, 100, (500, content(2, 100)))
    assert get(store, range(500, 600)) == (CONTENT, 100, content(2, 100))
    for asked in left[:4]:
        assert take(store, asked) == (CONTENT, PAGES_AT_ONCE, whole)
    store.free(0, PAGES)


def lost(store):
    """A page that can't be read is told by take_get, and those around it are read."""
    put(store, 10, 5, (10, content(1, 5)))
    page = content(1, 5)[2 * PAGE_SIZE : 3 * PAGE_SIZE]
    with open(disk, "r+b") as file:
        file.seek(file.read().index(page) + 100)
        file.write(bytes((page[100] ^ 1,)))
    for _ in range(2):
        assert get(store, range(10, 15)) == (CONTENT, 2, content(1, 2))
        error = told(get, store, range(12, 15))
        assert error.errno == errno.EIO
        assert "checksum" in error.strerror
        store.ask_get(range(12, 15))  # that is no error
    assert where(10, 5) == bytes([INSTANCE | DISK] * 2 + [DISK] * 3)
    assert get(store, range(13, 15)) == (CONTENT, 2, content(1, 5)[3 * PAGE_SIZE :])


def idle(store):
    """A DMS that has nothing to do sleeps, and is there again at once."""
    assert os.sysconf("SC_CLK_TCK") == 100

    def cpu():
        with open(f"/proc/{dms}/stat") as stat:
            return sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / 100

    seconds = 1.5
    before, until = cpu(), time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)
    share = (cpu() - before) / seconds
    began = time.monotonic()
    where(0, 1)
    print(
        f"idle: {100 * share:.1f} % of a core, and then {1e3 * (time.monotonic() - began):.1f} ms"
    )
    assert share < 0.05


def refused(store):
    """The DMS's errno and words arrive, and no page moves."""
    put(store, 7, 1, (7, content(7)))
    put(store, 400, 1, (400, content(1)))
    get(store, range(400, 401))
    get(store, range(600, 602))
    before = where(0, PAGES)
    resource.prlimit(dms, resource.RLIMIT_FSIZE, (PAGE_SIZE * 500, resource.RLIM_INFINITY))
    for _ in range(2):
        error = told(put, store, 400, 202, (400, content(1)), (600, content(1, 2)))
        assert (error.errno, error.strerror) == (errno.EFBIG, os.strerror(errno.EFBIG))
        assert where(0, PAGES) == before
    assert get(store, range(7, 8)) == (CONTENT, 1, content(7))
    error = told(store.free, PAGES - 1, 2)
    assert error.errno == errno.EINVAL and error.strerror.endswith(f"{(FREE, 0, 2, PAGES - 1, 0)}")


# ---------------------------------------------------------------- the ranks

comm = MPI.COMM_WORLD
disk = None if sys.argv[1] == "-" else sys.argv[1]
actions = [globals()[name] for name in sys.argv[2:]]
DMSS = comm.size - 1
config = Config(START, END, disk=disk, keep=bool(disk))
if comm.rank < DMSS:
    if comm.rank == 0:
        comm.isend(os.getpid(), DMSS, ASIDE)
    own = config.__replace__(disk=disk and f"{disk}{comm.rank or ''}")
    server = tells_locations(DMS(comm, DMSS, own))
    if disk and DMSS > 1:
        server.start(comm.Create_group(comm.group.Incl(range(DMSS))).allgather(server.offers))
    server.serve()
else:
    dms = comm.recv(source=0, tag=ASIDE)
    over_mpi = MpiStore(comm, DMSS, config)
    try:
        for action in actions:
            began = time.monotonic()
            action(over_mpi)
            print(f"{action.__name__} SUCCESS in {time.monotonic() - began:.2f} s", flush=True)
    finally:
        over_mpi.close()
