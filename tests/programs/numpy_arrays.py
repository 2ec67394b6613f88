"""NumPy under `python -m edm run --resident 16M`: where arrays live, and what they cost."""

import gc
import io
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback

import numpy as np

import edm

MIB = 1 << 20
space = edm.space()


def in_space(array):
    return space.start_addr <= array.ctypes.data < space.end_addr


def used():
    """Bytes that arrays have taken of the space."""
    return sum(length for _, length in space.areas())


def check(what, right):
    if not right:
        sys.exit(f"numpy: {what}")


# ---------------------------------------------------------------- which arrays

check("a small array is in the space", not in_space(np.zeros(MIB - 8, np.uint8)))
for what, array in {
    "zeros": np.zeros(MIB, np.uint8),
    "empty": np.empty(MIB, np.uint8),
    "full": np.full(MIB, 7, np.uint8),
    "the result of arithmetic": np.ones(MIB) + np.ones(MIB),
    "concatenate": np.concatenate([np.ones(MIB // 8)] * 2),
    "astype": np.zeros(MIB // 8, np.int64).astype(np.float64),
    "a copy": np.ones(MIB).copy(),
    "sort": np.sort(np.arange(MIB)[::-1]),
    "random": np.random.default_rng(1).random(MIB),
    "objects": np.array([None] * MIB),
    "a comparison": np.zeros(MIB) == 0,
}.items():
    check(f"{what} is not in the space", in_space(array))
del array
made = []
thread = threading.Thread(target=lambda: made.append(np.zeros(MIB)))
thread.start()
thread.join()
check("an array that another thread made is not in the space", in_space(made.pop()))

# ---------------------------------------------------------------- what they cost

before, came = used(), space.figures()["fetched"]
large = np.zeros(8 << 30, np.uint8)
check("zeros cost something before they are touched", space.figures()["fetched"] - came < 10)
large[:: 2 << 30] = 1
check("the pages of zeros are not zero", int(large[: 4 * MIB].sum()) == 1)
address = large.ctypes.data
large[: 64 * MIB] = 3
there = set(space.locations(address, 64 * MIB))
check(f"an array four times the limit is {there}", there == {"DISK", "INSTANCE_0"})
del large
gc.collect()
check("a freed array still has its addresses", used() <= before)
check("a freed array has pages", set(space.locations(address, 64 * MIB)) == {"NEW"})
for next_one in (np.zeros, np.empty):
    large = np.ones(4 * MIB)
    address = large.ctypes.data
    with space._lock:  # as if the garbage collector freed it in the midst of a call
        del large
    next_one(2 * MIB)
    check("an array that is freed in the midst of a call stays", address not in dict(space.areas()))
before = used()
for _ in range(300):
    np.ones(MIB)[::512] += 1
check("making and freeing takes more and more", used() <= before + 16 * MIB)
check("memory that is used again has old bytes", not np.zeros(MIB).any())

# ---------------------------------------------------------------- realloc

growing = np.arange(1000)
for count in (10**6, 10**5, 3 * 10**6, 100, 10**6):
    kept = growing[:count].copy()
    growing.resize(count, refcheck=False)
    check("resize loses bytes", np.array_equal(growing[: len(kept)], kept))
    check("resize does not give zeros", not growing[len(kept) :].any())
    check(
        "resize leaves an array where it does not belong", in_space(growing) == (count > MIB // 8)
    )

# ---------------------------------------------------------------- files and sockets

numbers = np.arange(MIB)
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "numbers")
    np.save(path + ".npy", numbers)
    loaded = np.load(path + ".npy")
    check("load", in_space(loaded) and np.array_equal(loaded, numbers))
    numbers.tofile(path)
    check("fromfile", np.array_equal(np.fromfile(path, np.int64), numbers))
    into = np.zeros_like(numbers)
    with open(path, "rb", buffering=0) as file:
        check("readinto is short", file.readinto(into) == numbers.nbytes)
    check("readinto", np.array_equal(into, numbers))
    check("memmap", np.array_equal(np.memmap(path, np.int64), numbers))
buffer = io.BytesIO()
np.savez_compressed(buffer, numbers=numbers)
buffer.seek(0)
check("npz", np.array_equal(np.load(buffer)["numbers"], numbers))

ours, theirs = socket.socketpair()
sender = threading.Thread(target=ours.sendall, args=(numbers,))
sender.start()
into, got = np.zeros_like(numbers), 0
while got < into.nbytes:
    got += theirs.recv_into(memoryview(into).cast("B")[got:])
sender.join()
check("a socket", np.array_equal(into, numbers))

# ---------------------------------------------------------------- exceptions

try:
    np.zeros(1 << 60, np.uint8)
except MemoryError:
    pass
else:
    sys.exit("numpy: more than the space was had")


def fail_at_an_index(array):
    return array[10**9]


for _ in range(50):  # arrays are freed while an exception is on its way
    try:
        fail_at_an_index(np.ones(MIB))
    except IndexError:
        continue
    sys.exit("numpy: an exception was lost")
try:
    np.ones(10) + next(iter(()))
except StopIteration:  # C code often takes it for an end
    pass
gc.collect()
gc.disable()
for _ in range(1000):
    try:
        np.ones(10) + next(iter(()))
    except StopIteration:
        pass
gc.enable()
check("an array that is freed with an exception set leaves garbage", gc.collect() < 1000)


def fail(array=None):
    try:
        {}["the context"]
    except KeyError:
        raise IndexError("an exception on its way")


def freed_while_it_is_on_its_way(size):
    try:
        {}["a context that is no longer the innermost"]
    except KeyError:
        return np.empty(size, np.uint8)[:1] + fail()  # the left operand is freed


def check_exceptions(size):
    for _ in range(20):
        try:
            freed_while_it_is_on_its_way(size)
        except IndexError as error:
            lines = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            here = ["check_exceptions", "freed_while_it_is_on_its_way", "fail"]
            check(f"the traceback is {lines}", lines == here)
            check(f"its context is {error.__context__!r}", "the context" in f"{error.__context__}")
            continue
        sys.exit("numpy: an exception was lost")


def trace(frame, event, argument):
    return trace


for size in (10, 2 * MIB, (1 << 32) - 1):
    check_exceptions(size)
    for watch in (sys.settrace, sys.setprofile):  # as debuggers and profilers do
        watch(trace)
        check_exceptions(size)
        watch(None)


class Alarm(Exception):
    pass


def alarm(number, frame):
    raise Alarm


signal.signal(signal.SIGALRM, alarm)
caught, deadline = 0, time.monotonic() + 30
while caught < 100:
    check("no alarm came", time.monotonic() < deadline)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        while True:
            (np.ones(MIB // 4) + 1)[5:].copy()
    except Alarm:
        caught += 1
caught, deadline = 0, time.monotonic() + 30
while caught < 300:  # most of them while an area is mapped or unmapped
    check("no alarm came", time.monotonic() < deadline)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        while True:
            np.empty(2 * MIB, np.uint8)
    except Alarm:
        caught += 1


def alarm_counted(number, frame):
    alarms.append(number)
    raise Alarm(len(alarms))


def until_an_alarm_comes():
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            np.ones(10) + fail()
        except IndexError:
            grown = np.arange(10)
            grown.resize(1000, refcheck=False)
            check("an alarm loses bytes", grown[9] == 9)


alarms = []
signal.signal(signal.SIGALRM, alarm_counted)
for count in range(1, 1001):  # while other exceptions are on their way, and are caught
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + count % 50 * 1e-5)
        until_an_alarm_comes()
        sys.exit(f"numpy: {len(alarms)} alarms, and {count - 1} of them seen")
    except Alarm as error:
        check("another alarm was seen", error.args == (count,) == (len(alarms),))
check("after the alarms", np.array_equal(np.arange(MIB) - np.arange(MIB), np.zeros(MIB)))

# ---------------------------------------------------------------- forked, and in threads


def grows_and_shrinks():
    while not stop:
        rows.append(2.0)
        rows.pop()


rows, stop, interval = [1.0] * 100, False, sys.getswitchinterval()
thread = threading.Thread(target=grows_and_shrinks)
thread.start()
sys.setswitchinterval(1e-5)
deadline = time.monotonic() + (sys.version_info >= (3, 11))  # 3.10 runs threads at jumps, too
while time.monotonic() < deadline:
    np.array(rows)  # RuntimeError, if the other thread runs between its length and its numbers
sys.setswitchinterval(interval)
stop = True
thread.join()

inherited = np.ones(MIB)
child = os.fork()
if child == 0:  # it touches nothing of its parent's
    for _ in range(5):
        inherited = np.ones(MIB)
        inherited = np.ones(MIB // 4)
    os._exit(int(in_space(inherited) or inherited.sum() != MIB // 4))
check("a forked child's own arrays fail it", os.waitpid(child, 0)[1] == 0)
check("a forked child has changed something", inherited.sum() == MIB)


def churn(number):
    dice = np.random.default_rng(number)
    for _ in range(50):
        array = np.full(dice.integers(MIB // 8, MIB), number)
        wrong.append(bool((array != number).any()))
    for _ in range(500):  # of three sizes, so that they are used again, by whichever thread
        array = np.full(dice.integers(1, 4) * 8192, number)
        used_by.setdefault(array.ctypes.data, set()).add(number)
        wrong.append(bool((array != number).any()))


wrong, used_by = [], {}
threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
with edm.numpy_allocator(threshold=64 << 10):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
check("arrays of several threads overlap", len(wrong) == 4 * 550 and not any(wrong))
check("no thread uses another's again", any(len(users) > 1 for users in used_by.values()))


def allocates(number, frame):
    alarms.append(np.ones(MIB).sum() == MIB)
    signal.setitimer(signal.ITIMER_REAL, 0.0005)  # not before: else they would nest for ever


alarms = []
signal.signal(signal.SIGALRM, allocates)
signal.setitimer(signal.ITIMER_REAL, 0.0005)
deadline = time.monotonic() + 30
while len(alarms) < 300:
    check("alarms that make arrays hang", time.monotonic() < deadline)
    np.empty(2 * MIB, np.uint8)
signal.signal(signal.SIGALRM, lambda number, frame: None)  # one that waits sets no timer
signal.setitimer(signal.ITIMER_REAL, 0)
check("an alarm's array is wrong", all(alarms))


def after_the_end():
    threading.main_thread().join()
    if not in_space(np.ones(MIB)):
        print("numpy: an array made after the script's end is not in the space")


threading.Thread(target=after_the_end).start()

# ---------------------------------------------------------------- within a program

with edm.numpy_allocator(threshold=64 << 10):
    lower = np.ones(64 << 10, np.uint8)
check("a lower threshold", in_space(lower) and not in_space(np.ones(64 << 10, np.uint8)))
check("an array after its context manager", int(lower.sum()) == 64 << 10)
left = np.ones(MIB)  # and freed at the end of the process
print("numpy SUCCESS")
