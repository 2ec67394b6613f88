"""System calls on pages that are away, as for a user who may have userfaultfd for user mode only.

    python system_calls.py NAME [clean_tracking]    NAME: a function of this file

Root may have both kinds, so this takes the lesser one.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import pickle
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from unittest import mock

from edm import uffd_ctypes
from edm.edm import PAGE_SIZE, Config, run, start
from edm.numpy_mem_handler import numpy_allocator

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
    assert space.user_mode
    with open("/proc/self/status") as status:
        assert "Seccomp:\t2\n" in status.read()  # there is a filter
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

        refused(errno.EINVAL, os.pwrite, file.fileno(), source, -1)

    with tempfile.TemporaryFile() as file:  # of several threads: one behind the other
        records = [space.mmap(3 << 20) for _ in range(4)]
        for number, record in enumerate(records):
            record[:] = bytes((number,)) * len(record)
        writers = [
            threading.Thread(target=os.write, args=(file.fileno(), record)) for record in records
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        file.seek(0)
        found = [set(file.read(3 << 20)) for _ in records]
        assert sorted(map(list, found)) == [[0], [1], [2], [3]], "no record is torn"
        for record in records:
            space.munmap(record)

    signals = []  # a pipe whose reader goes away: the part, and SIGPIPE at the next write
    before = signal.signal(signal.SIGPIPE, lambda number, _: signals.append(number))
    out, into = os.pipe()
    reader = threading.Thread(target=lambda: (os.read(out, 100_000), os.close(out)))
    reader.start()
    assert 0 < os.write(into, source) < LENGTH and signals == []
    reader.join()
    refused(errno.EPIPE, os.write, into, source)
    os.close(into)
    assert signals == [signal.SIGPIPE]
    signal.signal(signal.SIGPIPE, before)

    terminal, into = pty.openpty()  # that takes no more: a signal ends the write
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        while True:
            os.write(into, source)
    except Interrupted:
        pass
    os.close(terminal)
    os.close(into)

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
    os.read(out, 1 << 20)
    stop = "sleep 1; kill -STOP $0; sleep 0.3; cat /proc/$0/stat; kill -CONT $0"
    stops = subprocess.Popen(["sh", "-c", stop, str(os.getpid())], stdout=subprocess.PIPE)
    assert 0 < os.write(into, source) < LENGTH, "what had room: to be stopped ends it, too"
    assert stops.communicate()[0].split()[2] == b"T"
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


def vectors(space):
    """readv, writev, preadv, pwritev: whole, or a part, whose rest can be asked for."""
    source, target = area(space, 0), area(space)
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        for write, read in (
            (lambda parts, at: os.writev(fd, parts), lambda parts, at: os.readv(fd, parts)),
            (
                lambda parts, at: os.pwritev(fd, parts, at),
                lambda parts, at: os.preadv(fd, parts, at),
            ),
        ):
            target[:] = bytes(LENGTH)
            assert all_of_parts(write, source) >= 400 << 10
            os.lseek(fd, 0, os.SEEK_SET)
            assert all_of_parts(read, target) >= 400 << 10
            check(target, 0)
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)


def all_of_parts(call, buffer):
    """Call this for what is left of the buffer, cut in two, until nothing is. What was most at once."""
    at, most = 0, 0
    while at < LENGTH:
        middle = min(at + (300 << 10) + 5, LENGTH)
        done = call([buffer[at:middle], bytearray(), buffer[middle:]], at)
        assert done > 0, done
        at, most = at + done, max(most, done)
    return most


def messages(space):
    """sendmsg and recvmsg, of streams, datagrams, and without waiting."""
    for kind in (socket.AF_UNIX, socket.AF_INET):
        ours, theirs = socket.socketpair() if kind == socket.AF_UNIX else tcp()
        ours.setblocking(False)
        source, target = area(space, 0), area(space)
        receive = lambda parts, at, theirs=theirs: theirs.recvmsg_into(parts)[0]
        thread = threading.Thread(target=all_of_parts, args=(receive, target))
        thread.start()

        def send(parts, at, ours=ours):
            while True:
                select.select([], [ours], [])
                with contextlib.suppress(BlockingIOError):
                    return ours.sendmsg(parts)

        all_of_parts(send, source)
        thread.join()
        check(target, 0)
        ours.close()
        theirs.close()
    source, target = area(space, 0), area(space)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for at in range(0, LENGTH, 1 << 16):
        middle, end = at + 1000, at + (1 << 16)
        assert ours.sendmsg([source[at:middle], source[middle:end]]) == 1 << 16
        assert theirs.recvmsg_into([target[at:middle], target[middle:end]])[0] == 1 << 16
    check(target, 0)


def scattered(space):
    """Buffers that are far from each other, that touch, and that lie elsewhere."""
    source, target = area(space, 0), area(space)
    ours, theirs = socket.socketpair()
    starts = range(0, LENGTH, 64 * PAGE_SIZE)
    parts = [source[at : at + 100] for at in starts]
    assert ours.sendmsg([b"begin", *parts, bytearray(b"end")]) == 8 + 100 * len(starts)
    begin, end = bytearray(5), bytearray(3)
    into = [target[at : at + 100] for at in starts]
    assert theirs.recvmsg_into([begin, *into, end])[0] == 8 + 100 * len(starts)
    assert begin == b"begin" and end == b"end" and parts == into
    records = [source[at : at + 64] for at in range(0, 1000 * 64, 64)]
    assert ours.sendmsg(records) == 64000
    assert theirs.recv(64000, socket.MSG_WAITALL) == source[:64000]


def wrong(space):
    """What the kernel says of wrong addresses it says here, too."""
    made, call = area(space, 0), libc.writev
    out, into = os.pipe()
    vector = (ctypes.c_uint64 * 2)(space.start_addr, 10)
    for arguments, number in (
        ((into, ctypes.c_void_p(1), 1), errno.EFAULT),
        ((into, ctypes.c_void_p(-1), 1), errno.EFAULT),
        ((into, ctypes.byref(vector), -1), errno.EINVAL),
        ((into, ctypes.byref(vector), 1 << 30), errno.EINVAL),
        ((-1, ctypes.byref(vector), 1), errno.EBADF),
        ((into, ctypes.c_void_p(space.end_addr - PAGE_SIZE), 1), errno.EFAULT),  # it is away
    ):
        assert call(*arguments) == -1 and ctypes.get_errno() == number, arguments
    for message in (0, 1, -1, space.end_addr - PAGE_SIZE):
        assert libc.sendmsg(into, ctypes.c_void_p(message), 0) == -1
    end = (
        uffd_ctypes.mmap(0, 2 * PAGE_SIZE, 3, uffd_ctypes.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        + PAGE_SIZE
    )
    uffd_ctypes.munmap(end, PAGE_SIZE)
    assert libc.sendmsg(into, ctypes.c_void_p(end - 20), 0) == -1
    assert call(into, ctypes.c_void_p(end - 20), 2) == -1 and ctypes.get_errno() == errno.EFAULT
    vector[0] = (1 << 64) - PAGE_SIZE
    assert call(into, ctypes.byref(vector), 1) == -1 and ctypes.get_errno() == errno.EFAULT
    assert os.writev(into, [made[:10]]) == 10 and os.read(out, 10) == page(0, 0)[:10]


def streams(space):
    """asyncio: what is written in lines comes as it was."""
    import asyncio

    source = area(space, 0)

    async def work():
        got, done = bytearray(), asyncio.Event()

        async def serve(reader, writer):
            while content := await reader.read(1 << 20):
                got.extend(content)
            writer.close()
            done.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        lines = [source[at : at + 50_000] for at in range(0, LENGTH, 50_000)]
        for at in range(0, len(lines), 40):
            writer.writelines(lines[at : at + 40])
            await writer.drain()
        writer.close()
        await done.wait()
        server.close()
        assert got == source

    asyncio.run(work())


def others(space):
    """Modules that write and read arrays their own ways."""
    import multiprocessing

    source, target = area(space, 0), area(space)
    with tempfile.TemporaryFile() as file:
        file.truncate(LENGTH)
        mapped = mmap.mmap(file.fileno(), LENGTH)
        mapped.write(source)
        assert mapped[:] == source
        file.seek(0)
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=all_of, args=(theirs.recv_into, target))
        thread.start()
        assert ours.sendfile(file) == LENGTH
        thread.join()
        check(target, 0)
        mapped.close()
    target[:] = bytes(LENGTH)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    thread = threading.Thread(target=sender.send_bytes, args=(source,))
    thread.start()
    assert receiver.recv_bytes_into(target) == LENGTH
    thread.join()
    check(target, 0)
    some = source[: 1 << 20]  # it is written in parts of 512 bytes
    printed = subprocess.run(["cat"], input=some, stdout=subprocess.PIPE, check=True).stdout
    assert printed == some


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
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)  # a signal in the midst of a call
        for _ in range(5):
            assert np.array_equal(np.load(f"{folder}/numbers.npy"), numbers)
            assert np.array_equal(np.fromfile(f"{folder}/numbers", np.int64), numbers)

        def late(*_):
            raise TimeoutError("late")

        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, late)
        for after in range(1, 20):
            try:
                signal.setitimer(signal.ITIMER_REAL, after / 2000)
                while True:
                    np.fromfile(f"{folder}/numbers", np.int64)
            except TimeoutError:
                pass  # else the loop would not end
        with open(f"{folder}/numbers", "rb") as file, open(f"{folder}/numbers", "ab") as written:
            file.seek(LENGTH - 8)
            assert np.fromfile(file, np.int64).tolist() == [LENGTH // 8 - 1]
            assert np.fromfile(file, np.int64).size == 0
            for error, wrong in (
                (ValueError, lambda: np.fromfile(f"{folder}/numbers", object)),
                (ValueError, lambda: np.fromfile(f"{folder}/numbers", "i4,O")),
                (ValueError, lambda: np.fromfile(f"{folder}/numbers", np.int64, offset=LENGTH + 8)),
                (OSError, lambda: np.fromfile(written, np.int64)),
                (AttributeError, lambda: np.fromfile(None)),
            ):
                try:
                    wrong()
                except error:
                    continue
                sys.exit("fromfile has read what it can't")
        assert np.fromfile(f"{folder}/numbers", np.int64, True).tolist() == [0]
        with mock.patch("os.fstat"), mock.patch("os.pread"), mock.patch("numpy.empty"):
            assert np.fromfile(f"{folder}/numbers", np.int64, 2).tolist() == [0, 1]
        with open(f"{folder}/numbers") as text:
            assert np.fromfile(text, np.int64, 3, offset=8).tolist() == [1, 2, 3]
        assert len(np.fromfile("/dev/urandom", np.uint8, LENGTH)) == LENGTH
        assert bytes(np.fromfile("/proc/self/comm", np.uint8, 6)) == b"python"
        rows = np.fromfile(f"{folder}/numbers", "(4,)i8")
        assert np.array_equal(rows.ravel(), numbers) and rows.shape[1:] == (4,)
        with open(f"{folder}/numbers", "rb") as file:
            file.seek(8)
            assert np.fromfile(file, np.int64, 2, offset=8).tolist() == [2, 3] and file.tell() == 32
        with open(f"{folder}/pickled", "rb") as file:
            array = pickle.load(file)
        np.savez(f"{folder}/zipped", array=array)
        assert np.array_equal(np.load(f"{folder}/zipped.npz")["array"], numbers)
        buffers = []
        pickled = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
        with open(f"{folder}/buffers", "wb") as file:
            file.writelines(buffers)
        with open(f"{folder}/buffers", "rb") as file:
            array = pickle.loads(pickled, buffers=[file.read()])
        assert np.array_equal(array, numbers)


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


def pipes(space):
    """Threads write to pipes, and as many wait for what they write: there is room for the pages of all."""
    length = 3 << 20
    areas = [(area(space, seed)[:length], area(space)[:length], seed) for seed in range(3)]

    def write_and_read(source, target, seed):
        for _ in range(5):
            target[:] = bytes(length)
            out, into = os.pipe()
            writer = threading.Thread(target=guarded, args=(write, into, source))
            writer.start()
            with open(out, "rb", 0) as file:
                all_of(file.readinto, target)
            writer.join()
            os.close(into)
            check(target, seed, length)

    def write(into, source):
        assert os.write(into, source) == length

    def guarded(call, *arguments):
        try:
            call(*arguments)
        except BaseException:  # noqa: BLE001 - others may wait for this thread
            traceback.print_exc()
            os._exit(1)

    threads = [threading.Thread(target=guarded, args=(write_and_read, *some)) for some in areas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def blocked(space):
    """A call waits while all else goes through the memory: its pages stay."""
    ours, theirs = socket.socketpair()
    target, other = area(space), area(space)
    wanted = 64 * PAGE_SIZE
    thread = threading.Thread(target=all_of, args=(theirs.recv_into, target[:wanted]))
    thread.start()
    ours.send(page(0, 0))  # the call that comes for the rest waits
    first, until = min(space.areas())[0], time.monotonic() + 10
    while "INSTANCE_0" not in space.locations(first, PAGE_SIZE):
        assert time.monotonic() < until, "the call has not begun"
        time.sleep(0.001)
    evicted = space.figures()["evicted_dirty"]
    while space.figures()["evicted_dirty"] < evicted + 4 * HIGH:
        for at in range(0, LENGTH, PAGE_SIZE):
            other[at] = 1
    here = space.locations(first, LENGTH)
    assert here[: wanted // PAGE_SIZE].count("INSTANCE_0") >= 63
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
        os.writev(1, [b"a child ", b"writes\n"])
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


def namespaced(space):
    """As forked, in a PID namespace of the child's own."""
    new_user, new_pid = 0x10000000, 0x20000000
    if libc.unshare(new_user | new_pid):
        print("no namespaces here", end=" ")
    else:
        forked(space)


def unseekable(space):
    """What np.fromfile says of a pipe and of a socket is what NumPy says."""
    import numpy as np

    (ours, _), (end, _other) = os.pipe(), socket.socketpair()
    with numpy_allocator():
        for fd, buffering in ((ours, 0), (ours, -1), (end.fileno(), 0), (end.fileno(), -1)):
            words = []
            for fromfile in (np.fromfile, np.fromfile.__wrapped__):
                with open(fd, "rb", buffering, closefd=False) as file:
                    try:
                        fromfile(file, np.int64)
                    except OSError as error:
                        words.append(repr(error))
            assert len(words) == 2 and words[0] == words[1], words


def left(space):
    """A child outlives this process, and writes from the space's addresses: EFAULT, and not ENOSYS."""
    if not os.fork():
        os.read(0, 1)  # this process has ended
        assert libc.write(1, ctypes.c_void_p(space.start_addr), ctypes.c_size_t(1)) == -1
        os.writev(1, [b"a child has ", b"errno %d\n" % ctypes.get_errno()])
        os.read(0, 1)
        os._exit(0)


def replaced(space):
    """This process becomes another program, which outlives the pager."""
    code = """
import os, sys, time
give_up = time.monotonic() + 20
with open(os.devnull, "wb") as nowhere:
    while os.path.exists("/proc/" + sys.argv[1]):
        assert os.writev(nowhere.fileno(), [b"1"]) == 1 and time.monotonic() < give_up
os.writev(1, [b"replaced ", b"SUCCESS"])
"""
    pager = str(space.figures()["pager_pid"])
    os.execv(sys.executable, [sys.executable, "-c", code, pager])


def again():
    """A process has a space a second time, after the first one has ended."""
    for _ in range(2):
        run(files, config())
        os.writev(1, [b"what a process ", b"does behind them, too\n"])


uffd_ctypes.open_userfaultfd = open_userfaultfd
if sys.argv[1] == "again":
    again()
else:
    the_space = start(config())
    globals()[sys.argv[1]](the_space)
print(sys.argv[1], "SUCCESS")
