"""Lines that fault, for --report, in a program that does something with signals, processes or files.

python -m edm run --report PAGE lines.py WHAT, where WHAT is a function of this file. Prints the areas.
"""

import ctypes
import os
import random
import signal
import sys
import threading

import edm

MIB = 1 << 20
PAGE = edm.PAGE_SIZE
SIGURGS = []
randomly = random.Random(1)


def often(area, accesses):
    for page in randomly.choices(range(len(area) // PAGE), k=accesses):
        area[page * PAGE] += 1  # the hot line


def seldom(area, accesses):
    for page in randomly.choices(range(len(area) // PAGE), k=accesses):
        area[page * PAGE] += 1  # the other line


def work(first, second, rounds=6):
    for _ in range(rounds):
        often(first, 800)
        seldom(second, 80)


def plain(first, second):
    work(first, second, 24)  # so that about 200 faults are sampled


def blocking(first, second):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    work(first, second)
    assert not signal.sigpending(), signal.sigpending()


def handling(first, second):
    signal.signal(signal.SIGURG, lambda *_: SIGURGS.append(threading.get_native_id()))
    work(first, second)
    assert len(SIGURGS) <= 1, SIGURGS
    work(first, second)
    assert len(SIGURGS) <= 1, SIGURGS


def threads(first, second):
    workers = [threading.Thread(target=work, args=(first, second, 4)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def forking(first, second):
    def work_on():
        while not done:
            work(first, second, 1)

    done = []
    worker = threading.Thread(target=work_on)
    worker.start()
    children = []
    for number in range(10):
        child = os.fork()
        if not child:
            often(first, 50)
            if number % 2:
                os.execv(sys.executable, [sys.executable, "-c", "print(end='')"])
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 10
    done.append(True)
    worker.join()
    signal.raise_signal(signal.SIGURG)
    work(first, second)
    sys.stdout.flush()
    threading.Thread(target=work, args=(first, second, 1000), daemon=True).start()
    work(first, second, 1)
    os.execv(sys.executable, [sys.executable, "-c", "print('replaced')"])


def closing(first, second):
    work(first, second, 1)
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    ours = [fd for fd in numbers if "edm lines" in os.path.realpath(f"/proc/self/fd/{fd}")]
    with open(sys.argv[2], "w+") as file:
        for fd in ours:
            os.dup2(file.fileno(), fd)
        work(first, second)
        assert len(ours) == 1 and not file.read(), "EDM has written to the program's file"


def named(first, second):
    def name_and_work():
        ctypes.CDLL(None).prctl(15, b"fourteen bytes\xc3", 0, 0, 0)  # PR_SET_NAME
        work(first, second)

    worker = threading.Thread(target=name_and_work)
    worker.start()
    worker.join()


def reading(first, second):
    with open("/dev/zero", "rb", buffering=0) as file:
        for _ in range(5):
            file.readinto(first)


if __name__ == "__main__":
    first, second = (edm.space().mmap(size) for size in (12 * MIB, 6 * MIB))
    print(*edm.space().areas(), flush=True)
    globals()[sys.argv[1]](first, second)
