"""Forked children read the application's memory, and write privately. argv: which case below."""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import failing

import edm

PAGE, MIB = edm.PAGE_SIZE, 1 << 20
START = 0x10_0000_0000
CASE, *ARGUMENTS = sys.argv[1:]
disk = None
fork = multiprocessing.get_context("fork")
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 does not like forks with threads


def filled(space, pages, begin=0):
    """An area, each of whose pages has its number in every 8 bytes."""
    area = space.mmap(pages * PAGE)
    for page in range(pages):
        area[page * PAGE : (page + 1) * PAGE] = content(begin + page)
    return area


def content(page):
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def check(area, pages, begin=0):
    for page in pages:
        if area[page * PAGE : (page + 1) * PAGE] != content(begin + page):
            raise AssertionError(f"page {page} has {bytes(area[page * PAGE :][:16])}")


def child(body, *arguments):
    """Call this in a forked child, whose status says whether it failed; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            body(*arguments)
            os._exit(0)
        finally:  # it has raised something
            traceback.print_exc()
            os._exit(1)
    return pid


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pagers_descriptors(space):
    return len(os.listdir(f"/proc/{space.figures()['pager_pid']}/fd"))


# ---------------------------------------------------------------- what children do


def total(part):
    return sum(memoryview(part).cast("Q"))


def part_of(number):
    length = len(shared) // 8
    return total(shared[number * length : (number + 1) * length])


def reads(space):
    """By each way to fork there is, of four times what may be here."""
    socket.setdefaulttimeout(1)  # is none of this
    global shared
    shared = filled(space, 1024)
    right = [part_of(number) for number in range(8)]
    with fork.Pool(3) as pool:
        assert pool.map(part_of, range(8)) == right
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=fork) as executor:
        assert list(executor.map(part_of, range(8))) == right
    process = fork.Process(target=check, args=(shared, range(1024)))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert status(child(check, shared, random.sample(range(1024), 1024))) == 0


def eighths(space):
    """8 workers, each with an eighth of 8 times what may be here."""
    global shared
    shared = space.mmap(128 * MIB)
    words = shared.cast("Q")
    for page in range(len(shared) // PAGE):
        words[page * PAGE // 8] = page
    pages = len(shared) // PAGE // 8
    with fork.Pool(8) as pool:
        sums = pool.map(part_of, range(8), chunksize=1)
    assert sums == [sum(range(n * pages, (n + 1) * pages)) for n in range(8)], sums
    assert space.figures()["peak_resident"] <= 4096


def write_and_look(area, mark):
    for page in range(0, 1024, 2):
        area[page * PAGE] = mark
    check(area, range(1, 1024, 2))  # the others of these pages have left meanwhile
    assert all(area[page * PAGE] == mark for page in range(0, 1024, 2))
    assert all(
        area[page * PAGE + 8 :][: PAGE - 8] == content(page)[8:] for page in range(0, 1024, 2)
    )


def writes(space):
    """Each child writes its own copies. What the application writes then, it sees alone."""
    area = filled(space, 1024)
    children = [child(write_and_look, area, mark) for mark in (201, 202)]
    assert [status(pid) for pid in children] == [0, 0]
    check(area, range(1024))
    ours, theirs = os.pipe()

    def look_when_told():
        area[0] = 203
        os.read(ours, 1)
        assert area[0] == 203

    pid = child(look_when_told)
    area[0] = 204
    os.write(theirs, b"1")
    assert status(pid) == 0 and area[0] == 204


def under_pressure(space):
    """Children look at pages all the time that the application writes, frees and lets leave."""
    area, again, begin = filled(space, 600), space.mmap(2000 * PAGE), time.monotonic()

    def look(seed):
        dice = random.Random(seed)
        while time.monotonic() < begin + 1.5:
            at = dice.randrange(600 - 40)
            check(area, [at] if dice.random() < 0.8 else range(at, at + 40))

    children = [child(look, seed) for seed in range(3)]
    dice = random.Random(3)
    while time.monotonic() < begin + 1.5:
        page = dice.randrange(600)
        area[page * PAGE : (page + 1) * PAGE] = content(page)
        page = dice.randrange(2000)
        again[page * PAGE] = 1
        other = space.mmap(20 * PAGE)
        other[:] = bytes(len(other))
        space.munmap(other)
        space.sync()
    assert [status(pid) for pid in children] == [0, 0, 0]
    check(area, range(600))


def look_again_and_again(area):
    while True:
        check(area, range(1024))


def sums_again_and_again(number):
    while True:
        part_of(number)


def killed(space):
    """Workers are killed in the midst of faults: the application goes on, the pager keeps nothing."""
    global shared
    shared = area = filled(space, 1024)
    before = pagers_descriptors(space)
    children = [child(look_again_and_again, area) for _ in range(4)]
    wait_for(lambda: pagers_descriptors(space) >= before + 4 * 4)  # it has heard of them
    pool = fork.Pool(2)
    pool.map_async(sums_again_and_again, range(2))
    fetched = space.figures()["fetched"]
    wait_for(lambda: space.figures()["fetched"] > fetched + 3000)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        assert status(pid) == -signal.SIGKILL
    pool.terminate()
    pool.join()
    check(area, range(1024))
    wait_for(lambda: pagers_descriptors(space) <= before)


def mocked(space):
    """A program that tests itself forks while functions of Python's are mocked."""
    area = filled(space, 1024)
    for name in ("close", "fstat", "getpid", "open", "pidfd_open", "pipe2", "read"):
        with mock.patch(f"os.{name}"):
            pid = child(check, area, range(0, 1024, 64))
        assert status(pid) == 0, name
    with mock.patch("builtins.open"):
        pid = child(check, area, range(0, 1024, 64))
    assert status(pid) == 0


def its_own(space):
    """New arrays of a child are ordinary memory; the application's calls are not for it."""
    import numpy as np

    with edm.numpy_allocator(threshold=1 << 16):
        array = np.arange(MIB)

        def work():
            own = array * 2
            assert not START <= own.ctypes.data < space.end_addr
            assert own.sum() == 2 * array.sum() == MIB * (MIB - 1)
            array[::512] = 0
            with contextlib.suppress(RuntimeError):
                space.mmap(PAGE)
                raise AssertionError("a child has mapped an area")

        assert status(child(work)) == 0
        assert array.sum() == MIB * (MIB - 1) // 2


def not_served(space):
    """A grandchild, a fork that Python does not see, a child of who has closed everything: SIGSEGV."""
    area = filled(space, 1024)

    def grandchild():
        assert area[0] == 1
        pid = child(bytes, area)
        assert status(pid) == -signal.SIGSEGV
        assert area[8] == 1

    assert status(child(grandchild)) == 0
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        os._exit(area[0])
    assert status(pid) == -signal.SIGSEGV
    os.closerange(3, 4096)
    assert status(child(bytes, area)) == -signal.SIGSEGV
    check(area, range(1024))


def signals(space):
    """A handler that reads the memory, in a child that gets the signal as soon as it is there."""
    area = filled(space, 64)
    signal.signal(signal.SIGUSR1, lambda *_: area[8])
    for _ in range(100):
        pid = child(time.sleep, 0.01)
        os.kill(pid, signal.SIGUSR1)
        assert status(pid) == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def masks(space):
    """Threads that block different signals fork at once, with hooks of logging's: none has another's mask."""
    area, right = filled(space, 4), []

    def check_mask(mask):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        check(area, [0])

    def forks(mask):
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for _ in range(60):
            assert status(child(check_mask, mask)) == 0
            check_mask(mask)
        right.append(mask)

    sys.setswitchinterval(1e-6)
    masks = set(), {signal.SIGUSR1}, {signal.SIGUSR2, signal.SIGINT}
    threads = [threading.Thread(target=forks, args=(mask,)) for mask in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == len(masks)


def limited(space):
    """Where there are no more descriptors it is a SIGSEGV too, and nothing else."""
    area = filled(space, 1024)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 20, limit[1]))
    seen = set()
    with contextlib.suppress(OSError):
        while True:
            seen.add(status(child(check, area, range(10))))
            opened.append(os.open("/dev/null", os.O_RDONLY))
    assert seen == {0, -signal.SIGSEGV}, seen
    check(area, range(1024))  # and the space ends where there are no descriptors


def from_threads(space):
    """Threads fork while others are in the midst of faults and calls."""
    area, failed, ended = filled(space, 1024), [], threading.Event()

    def forks():
        for _ in range(10):
            failed.append(status(child(check, area, range(0, 1024, 7))))

    def works():
        while not ended.is_set():
            check(area, range(3, 1024, 11))
            space.munmap(space.mmap(PAGE))

    threads = [threading.Thread(target=forks) for _ in range(3)]
    worker = threading.Thread(target=works)
    worker.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    worker.join()
    assert failed == [0] * 30, failed


def many_faults(space):
    """Two children, whose threads fault all at once."""
    filled(space, 1024)
    begin, right = space.areas()[0][0], b"".join(map(content, range(1024)))
    memcmp = ctypes.CDLL(None).memcmp  # lets go of the GIL
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)

    def compare():
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            futures = [threads.submit(memcmp, begin, right, len(right)) for _ in range(4)]
        assert [future.result() for future in futures] == [0] * 4

    assert [status(pid) for pid in [child(compare), child(compare)]] == [0, 0]


def execs(space):
    """A child becomes another program: it runs, and keeps nobody from going on."""
    area = filled(space, 1024)

    def become():
        assert area[0] == 1
        os.execv("/bin/sleep", ["sleep", "1"])

    pid = child(become)
    check(area, range(1024))
    assert status(pid) == 0


def crowd(space):
    """More children than a socket has room for, while the pager is stopped."""
    area = filled(space, 1024)
    pager = space.figures()["pager_pid"]
    children = []
    resumed = threading.Timer(1, os.kill, (pager, signal.SIGCONT))
    resumed.start()
    os.kill(pager, signal.SIGSTOP)
    while resumed.is_alive() or len(children) < 400:
        children.append(child(check, area, [len(children) % 1000]))
    assert {status(pid) for pid in children} == {0}, len(children)
    check(area, range(1024))


def lost(space):
    """A page that can't be read back is a SIGBUS for a child too; and the others are whole."""
    area = filled(space, 1024)
    children = [child(bytes, area) for _ in range(2)]
    assert [status(pid) for pid in children] == [-signal.SIGBUS] * 2
    ours, _theirs = os.pipe()

    def threads():  # two faults of the same page
        memset = ctypes.CDLL(None).memset  # lets go of the GIL
        memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        for _ in range(2):
            threading.Thread(target=memset, args=(START + 20 * PAGE, 1, 1)).start()
        os.read(ours, 1)

    assert status(child(threads)) == -signal.SIGBUS
    assert status(child(check, area, [*range(20), *range(21, 1024)])) == 0


def orphans(space):
    """The application ends before its children. One touches the memory then, and one does not."""
    area, output = filled(space, 1024), Path(ARGUMENTS[0])
    (ready, is_ready), pager = os.pipe(), os.pidfd_open(space.figures()["pager_pid"])

    def outlive(touches):
        os.write(is_ready, bytes([area[0]]))
        assert select.select([pager], [], [], 10)[0]  # it has ended
        output.write_bytes(bytes(area[:8]) if touches else b"lives")

    for touches in (True, False):
        child(outlive, touches)
        os.read(ready, 1)
    if ARGUMENTS[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


def waits(space):
    """Children wait, in a fault and elsewhere, for what the test does."""
    area, before = filled(space, 1024), pagers_descriptors(space)

    def sleep():
        os.closerange(3, 4096)  # as daemons do
        time.sleep(60)

    children = [child(look_again_and_again, area), child(sleep)]
    wait_for(lambda: pagers_descriptors(space) >= before + 2 * 4)  # it has heard of them
    print("ready", *children, flush=True)
    time.sleep(60)


HIGH = {"eighths": 4096, "under_pressure": 1200}  # pages; more than 1024: LPET's other way
if CASE == "lost":
    failing.everywhere("reads", ARGUMENTS[0], content(20))
    disk = ARGUMENTS[0]
config = edm.Config(START, START + 256 * MIB, high_threshold=HIGH.get(CASE, 256), disk=disk)
edm.run(globals()[CASE], config)
if "twice" in ARGUMENTS:  # in another space, at the same addresses
    edm.run(globals()[CASE], config)
