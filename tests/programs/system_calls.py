"""System calls on pages that are away, as for a user who may have userfaultfd for user mode only.

    python system_calls.py NAME [clean_tracking]    NAME: a function of this file

Root may have both kinds, so this takes the lesser one.
"""

import ctypes
import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading

from edm import uffd_ctypes
from edm.edm import PAGE_SIZE, Config, numpy_allocator, run, start

LENGTH = 16 << 20  # of an area: four times what may be here
HIGH = LENGTH // 4 // PAGE_SIZE
libc = ctypes.CDLL(None, use_errno=True)


def open_userfaultfd():
    number = uffd_ctypes._NR_userfaultfd
    flags = os.O_CLOEXEC | os.O_NONBLOCK | uffd_ctypes.UFFD_USER_MODE_ONLY
    return uffd_ctypes._libc.syscall(number, flags), uffd_ctypes.USER_MODE


def config():
    return Config(high_threshold=HIGH, clean_tracking=[*sys.argv, "auto"][2])


def area(space, seed=None):
    """An area; with a seed, each of its pages has bytes of its own."""
    made = space.mmap(LENGTH)
    for at in range(0, LENGTH if seed is not None else 0, PAGE_SIZE):
        made[at : at + PAGE_SIZE] = page(seed, at)
    return made


def page(seed, at):
    return (b"%15d " % (seed * LENGTH + at)) * (PAGE_SIZE // 16)


def check(made, seed, length=LENGTH):
    for at in range(0, length, PAGE_SIZE):
        assert made[at : at + PAGE_SIZE] == page(seed, at), f"seed {seed}, {at:#x}"


def all_of(call, buffer):
    """Call this for what is left of the buffer, until nothing is."""
    while buffer:
        done = call(buffer)
        assert done > 0, done
        buffer = buffer[done:]


def address(buffer):
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))


# ---------------------------------------------------------------- what the tests run


def files(space, seed=0):
    assert not space.user_mode_only
    source, target = area(space, seed), area(space)
    for buffering in (-1, 0):
        target[:] = bytes(LENGTH)
        with tempfile.TemporaryFile(buffering=buffering) as file:
            all_of(file.write, source)
            file.seek(0)
            assert file.readinto(target[:0]) == 0
            all_of(file.readinto, target)
        check(target, seed)


def positions(space):
    """pwrite and pread, not only from a page's begin on."""
    source, target = area(space, 0), area(space)
    with tempfile.TemporaryFile() as file:
        fd, begin = file.fileno(), 100
        all_of(lambda part: os.pwrite(fd, part, LENGTH - len(part)), source[begin:])
        all_of(
            lambda part: libc.pread(
                fd, address(part), ctypes.c_size_t(len(part)), ctypes.c_long(LENGTH - len(part))
            ),
            target[begin:],
        )
        target[:begin] = source[:begin]
    check(target, 0)


def large_writes(space):
    """A call of write is as elsewhere: it writes all, or what it can."""
    source = area(space, 1)
    part = source[5:]  # from the middle of a page on
    with tempfile.TemporaryFile(buffering=0) as file:
        assert file.write(source) == LENGTH
        assert os.pwrite(file.fileno(), part, 5) == LENGTH - 5
        read = bytearray(LENGTH)
        assert os.preadv(file.fileno(), [read], 0) == LENGTH and read == source

    out, into = os.pipe()
    got = bytearray()

    def reader():
        while chunk := os.read(out, 30_000):
            got.extend(chunk)

    thread = threading.Thread(target=reader)
    thread.start()
    assert os.write(into, part) == LENGTH - 5, "while another thread reads"
    os.close(into)
    thread.join()
    assert got == part
    os.close(out)

    out, into = os.pipe()
    os.set_blocking(into, False)
    done = os.write(into, source)
    assert 0 < done <= 1 << 16 and os.read(out, 1 << 20) == source[:done], "what has room"
    while True:  # until there is no room
        try:
            os.write(into, b"x" * PAGE_SIZE)
        except BlockingIOError:
            break
    refused(errno.EAGAIN, os.write, into, source)
    os.set_blocking(into, True)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        os.write(into, source)
    except Interrupted:  # as Ctrl-C is, at a reader that does not read
        pass
    else:
        sys.exit("a write that waits took no signal")
    os.close(out)
    refused(errno.EPIPE, os.write, into, source)
    os.close(into)
    refused(errno.EBADF, os.write, into, source)


class Interrupted(Exception):
    pass


def interrupt(number, frame):
    raise Interrupted


def refused(number, call, *arguments):
    try:
        done = call(*arguments)
    except OSError as error:
        assert error.errno == number, error
    else:
        sys.exit(f"{call} has done {done}, where {errno.errorcode[number]} was to come")


def random_bytes(space):
    target = area(space)
    all_of(
        lambda part: libc.getrandom(address(part), ctypes.c_size_t(len(part)), 0), target[: 2 << 20]
    )
    assert target[: 2 << 20].tobytes().count(0) < 3 << 13  # 1 << 13 are likely


def pickles(space):
    source = area(space, 0)
    with tempfile.TemporaryFile() as file:
        pickle.dump(pickle.PickleBuffer(source), file, protocol=5)
        file.seek(0)
        check(memoryview(pickle.load(file)), 0)


def sockets(space, seed=0):
    for kind in (socket.AF_UNIX, socket.AF_INET):
        ours, theirs = socket.socketpair() if kind == socket.AF_UNIX else tcp()
        source, target = area(space, seed), area(space)
        thread = threading.Thread(target=all_of, args=(theirs.recv_into, target))
        thread.start()
        ours.sendall(source)
        thread.join()
        check(target, seed)
        ours.close()
        theirs.close()


def tcp():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]


def datagrams(space):
    source, target = area(space, 0), area(space)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for at in range(0, LENGTH, 1 << 16):
        ours.send(source[at : at + (1 << 16)])
        assert theirs.recvfrom_into(target[at : at + (1 << 16)])[0] == 1 << 16
    check(target, 0)


def arrays(space):
    import numpy as np

    numbers = np.frombuffer(bytes(np.arange(LENGTH // 8)), np.int64)  # in ordinary memory
    with numpy_allocator(), tempfile.TemporaryDirectory() as folder:
        array = numbers.copy()
        assert space.start_addr <= array.ctypes.data < space.end_addr
        np.save(f"{folder}/numbers.npy", array)
        array.tofile(f"{folder}/numbers")
        with open(f"{folder}/pickled", "wb") as file:
            pickle.dump(array, file, protocol=5)
        del array
        assert np.array_equal(np.load(f"{folder}/numbers.npy"), numbers)
        assert np.array_equal(np.fromfile(f"{folder}/numbers", np.int64), numbers)
        with open(f"{folder}/pickled", "rb") as file:
            assert np.array_equal(pickle.load(file), numbers)


def threads(space):
    """Several at once, of both kinds."""
    failed = []

    def guarded(*work):
        try:
            work[0](space, work[1])
        except BaseException as error:
            failed.append(error)
            raise

    started = [
        threading.Thread(target=guarded, args=(work, seed), daemon=True)
        for seed, work in enumerate((files, sockets))
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not failed


def blocked(space):
    """A call waits while all else goes through the memory: its pages stay."""
    ours, theirs = socket.socketpair()
    target, other = area(space), area(space)
    wanted = 64 * PAGE_SIZE
    thread = threading.Thread(target=all_of, args=(theirs.recv_into, target[:wanted]))
    thread.start()
    ours.send(page(0, 0))  # the call that comes for the rest waits
    evicted = space.figures()["evicted_dirty"]
    while space.figures()["evicted_dirty"] < evicted + 4 * HIGH:
        for at in range(0, LENGTH, PAGE_SIZE):
            other[at] = 1
    here = space.locations(min(space.areas())[0], LENGTH)
    assert here[: wanted // PAGE_SIZE].count("INSTANCE_0") >= 63, here
    for at in range(PAGE_SIZE, wanted, PAGE_SIZE):
        ours.sendall(page(0, at))
    thread.join()
    check(target, 0, wanted)


def children(space):
    """Of a process that has the filter, but not the space, the calls go on at once; so do those of EDM in
    EDM, which does without a filter of its own."""
    pid = libc.fork()  # which Python does not see
    if not pid:
        signal.alarm(20)
        os.write(1, b"a child writes\n")
        assert libc.write(1, ctypes.c_void_p(space.start_addr), ctypes.c_size_t(1)) == -1
        os._exit(ctypes.get_errno())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFAULT
    code = "import edm; area = edm.space().mmap(2 << 20); area[:] = bytes(len(area))"
    command = ("-m", "edm", "run", "--no-numpy", "--resident", "1M", "-c", code)
    subprocess.run([sys.executable, *command], check=True)
    files(space)


def forked(space):
    """A forked child's calls read what its parent has, and write what is its own."""
    mine, others = area(space, 0), area(space, 1)
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        check(mine, 0)
        check(others, 1)
        return
    try:
        ours, theirs = os.pipe()
        assert os.write(theirs, mine[:100]) == 100  # at once
        assert os.read(ours, 100) == page(0, 0)[:100]
        with tempfile.TemporaryFile(buffering=0) as file:
            all_of(file.write, mine)
            file.seek(0)
            all_of(file.readinto, others)
        check(others, 0)
        os._exit(0)
    finally:  # it has raised something
        os._exit(1)


def left(space):
    """A child outlives this process, and writes from the space's addresses: EFAULT, and not ENOSYS."""
    if not os.fork():
        os.read(0, 1)  # this process has ended
        assert libc.write(1, ctypes.c_void_p(space.start_addr), ctypes.c_size_t(1)) == -1
        print("errno", ctypes.get_errno(), flush=True)
        os.read(0, 1)
        os._exit(0)


def again():
    """A process has a space a second time, after the first one has ended."""
    for _ in range(2):
        run(files, config())


uffd_ctypes.open_userfaultfd = open_userfaultfd
if sys.argv[1] == "again":
    again()
else:
    the_space = start(config())
    globals()[sys.argv[1]](the_space)
print(sys.argv[1], "SUCCESS")
