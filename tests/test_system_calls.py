"""system_calls.py and pins.py: the system calls of a user who has userfaultfd for user mode only."""

import contextlib
import ctypes
import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import (
    PROGRAMS,
    TRACKINGS,
    close,
    needs_userfaultfd,
    python_of,
    read_until,
    wait_for,
    wait_until_gone,
)

from edm import pins as p
from edm import system_calls as s
from edm import uffd_ctypes as u
from edm.lspt import ANY_HERE, HERE, LSPT, NO_HOLES
from edm.uffd_ctypes import PAGE_SIZE

NOBODY = 65534
ROOT = Path(s.__file__).parent

# ---------------------------------------------------------------- programs of an ordinary user


@pytest.fixture
def as_user(start, public_path):
    """Start a function of programs/system_calls.py as an ordinary user: as nobody, if this is root."""
    programs, packages = public_path / "programs", public_path / "packages"
    programs.mkdir()
    shutil.copy(PROGRAMS / "system_calls.py", programs)
    folders = shutil.ignore_patterns("tests", "bench", ".*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, packages / "edm", ignore=folders)
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if not os.getuid() else {}
    python = python_of(sys.executable, who)
    search = f"PYTHONPATH={packages}{os.pathsep}{sysconfig.get_path('purelib')}"

    def as_user(*arguments, **options):
        command = ["/usr/bin/env", search, "TMPDIR=/var/tmp", python, programs / "system_calls.py"]
        return start(*command, *arguments, cwd="/", **who, **options)

    return as_user


@pytest.fixture
def succeeds(as_user):
    def succeeds(*arguments, **options):
        job = as_user(*arguments, **options)
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 0 and f"{arguments[0]} SUCCESS" in output, output
        return output

    return succeeds


@needs_userfaultfd
def test_eighteen_descriptors_are_enough(succeeds):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (18, 18))
    succeeds("pickles", preexec_fn=limit)


@needs_userfaultfd
@pytest.mark.parametrize(
    "calls",
    ["files", "positions", "large_writes", "pickles", "sockets", "datagrams",
     "threads", "pipes", "vectors", "messages", "scattered", "wrong", "streams", "others"],
)  # fmt: skip
def test_system_calls_read_and_write_memory_that_is_away(succeeds, calls):
    succeeds(calls)


@needs_userfaultfd
@pytest.mark.parametrize("tracking", TRACKINGS)
def test_they_do_so_however_first_writes_are_noticed(succeeds, tracking):
    succeeds("files", tracking)


@needs_userfaultfd
def test_arrays_are_saved_and_loaded(succeeds):
    pytest.importorskip("numpy")
    succeeds("arrays")


@needs_userfaultfd
def test_numpy_says_of_a_pipe_and_a_socket_what_it_always_says(succeeds):
    pytest.importorskip("numpy")
    succeeds("unseekable")


@needs_userfaultfd
def test_the_pages_of_a_call_that_waits_stay_here(succeeds):
    succeeds("blocked")


@needs_userfaultfd
def test_calls_of_a_programs_children_just_go_on(succeeds):
    assert "a child writes\n" in succeeds("children")


@needs_userfaultfd
def test_calls_of_forked_children_read_what_their_parent_has_and_write_what_is_their_own(succeeds):
    succeeds("forked")


@needs_userfaultfd
def test_they_do_so_in_a_pid_namespace_of_their_own_too(succeeds):
    if "no namespaces here" in succeeds("namespaced"):
        pytest.skip("this user can't make a PID namespace")


@needs_userfaultfd
def test_a_program_that_replaces_the_application_is_no_worse_for_it(succeeds):
    succeeds("replaced")


@needs_userfaultfd
def test_a_process_may_have_a_space_a_second_time(succeeds):
    succeeds("again")


@needs_userfaultfd
def test_calls_of_processes_that_outlive_the_application_go_on_and_nothing_stays_behind_them(
    as_user,
):
    job = as_user("left", stdin=subprocess.PIPE)
    assert job.wait(30) == 0
    wait_for(lambda: len(job.processes()) >= 2)  # the child, and who answers for the pager
    job.stdin.write("1")
    job.stdin.flush()
    read_until(job, "a child has errno 14\n")  # EFAULT
    job.stdin.write("2")
    job.stdin.flush()
    wait_until_gone(job)


@pytest.mark.parametrize("done", [0, 3])
def test_a_large_write_for_which_the_pager_has_no_memory_is_answered(tmp_path, monkeypatch, done):
    calls, answers, this = object.__new__(s.SystemCalls), [], os.getpid()
    calls._listener, calls._hello = -1, SimpleNamespace(pid=this, pidfd=os.pidfd_open(this))
    calls._file_locks = [threading.Lock()]
    monkeypatch.setattr(s, "ioctl", lambda fd, request, answer: answers.append(answer))

    def read(thread, call, already, memory):
        if already == done:
            raise MemoryError
        return memoryview(bytes(done))

    calls._read = read
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    calls._write(7, this, (s.WRITE, fd, 0, 10, 0, 0, 0))
    flags = 0 if done else s.SECCOMP_USER_NOTIF_FLAG_CONTINUE  # the kernel does what it can
    assert answers == [s.seccomp_notif_resp.pack(7, done, 0, flags)]
    os.close(fd)
    os.close(calls._hello.pidfd)


# ---------------------------------------------------------------- the filter


def filtered(steps, number, arguments):
    """What this BPF program returns for a system call."""
    data = s.Struct("=i12x6Q").pack(number, *arguments)
    at = loaded = 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x20:
            loaded = int.from_bytes(data[k : k + 4], sys.byteorder)
        elif code == 0x06:
            return k
        else:
            at += yes if {0x15: loaded == k, 0x25: loaded > k, 0x35: loaded >= k}[code] else no


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0x10_0000_0000, 0x20_0000_0000),
        (0x1B58000, 0x1F40000),
        (0x1_FFFF_F000, 0x2_0000_1000),
        (0x1_0000_1000, 0x1_0000_2000),
        (0x1_8000_0000, 0x3_2000_0000),
    ],
)
def test_a_call_is_stopped_if_its_buffer_begins_in_the_space_or_has_its_address_in_memory(
    start, end
):
    steps = list(s._filter(start, end, True))
    addresses = {0, (1 << 64) - 1, 1 << 32, 1 << 63}
    for bound in (start, end):
        addresses |= {bound - 1, bound, bound + 1, bound ^ 1 << 31, bound ^ 1 << 32, bound + 0xFFF}
    stopped = {
        (number, address): filtered(steps, number, [start, address, *[start] * 4])
        for number, (_, kind) in s.CALLS.items()
        for address in addresses
        if kind == s.BUFFER
    }
    wanted = {True: s.SECCOMP_RET_USER_NOTIF, False: s.SECCOMP_RET_ALLOW}
    assert stopped == {key: wanted[start <= key[1] < end] for key in stopped}
    for number, (_, kind) in s.CALLS.items():
        if kind != s.BUFFER:  # their addresses are in memory: these are stopped always
            assert filtered(steps, number, [0] * 6) == s.SECCOMP_RET_USER_NOTIF
            some = list(s._filter(start, end, False))  # the space ends before the process does
            assert filtered(some, number, [start] * 6) == s.SECCOMP_RET_ALLOW
    sendmsg = list(s.CALLS)[list(s._CALLS).index("sendmsg")]
    assert filtered(steps, sendmsg, [0, 0, s.UNFILTERED, 0, 0, 0]) == s.SECCOMP_RET_ALLOW
    other = next(number for number in range(1000) if number not in s.CALLS)
    assert filtered(steps, other, [start] * 6) == s.SECCOMP_RET_ALLOW


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.skipif(
    not os.path.exists("/usr/include/linux/seccomp.h"), reason="no <linux/seccomp.h>"
)
def test_every_number_is_the_one_in_the_kernels_headers(tmp_path):
    ours = {
        name: value
        for module in (s, u)
        for name, value in vars(module).items()
        if "SECCOMP" in name
    }
    ours |= dict(zip((f"__NR_{name}" for name in s._CALLS), s.CALLS, strict=True))
    # A header older than a name does not have it; the others it must agree on.
    lines = [
        f'#ifdef {n}\n  printf("{n} %llu\\n", (unsigned long long)(unsigned)({n}));\n#endif'
        for n in ours
    ]
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <sys/syscall.h>\n"
        "#include <linux/seccomp.h>\n"
        "int main(void) {\n" + "\n".join(lines) + "\n  return 0;\n}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "numbers", source], check=True)
    printed = subprocess.run([tmp_path / "numbers"], check=True, text=True, capture_output=True)
    theirs = {n: int(v) for n, v in (line.split() for line in printed.stdout.splitlines())}
    assert {"__NR_read", "SECCOMP_IOCTL_NOTIF_RECV"} <= theirs.keys()
    assert {name: ours[name] for name in theirs} == theirs


# ---------------------------------------------------------------- pins

CALL = (0, 3, 0, 0, 0, 0, 0)  # of nobody


def test_a_write_waits_for_room_whatever_its_thread_is_called():
    out, into = os.pipe()
    os.set_blocking(into, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(into, bytes(1 << 16))
    os.set_blocking(into, True)
    named, done, failed = threading.Event(), threading.Event(), []

    def caller():
        # The kernel cuts a name at 15 bytes.
        name = ctypes.create_string_buffer(b"a line's end\r\xc3\xa4")
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        named.set()
        done.wait()

    def writer():
        try:
            s._wait_for_room(into, thread.native_id)
        except (OSError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    named.wait()
    waits = threading.Thread(target=writer)
    waits.start()
    waits.join(4 * s.SIGNAL_LOOK / 1000)
    assert waits.is_alive() and not failed
    os.read(out, 1 << 20)
    waits.join(10)
    done.set()
    thread.join()
    for fd in (out, into):
        os.close(fd)
    assert not waits.is_alive() and not failed


@pytest.fixture
def lspt(woken):
    """All its 1000 pages are here."""
    lspt = LSPT(1000, 1000, 0, False, -1, 0)
    lspt.state[:] = bytes([HERE]) * 1000
    yield lspt
    close(lspt)


def leaving(lspt, page, count):
    """Which pages LPET takes; they stay, after all."""
    left = lspt.claim(page, count, ANY_HERE)
    lspt.stays(left)
    return left.leaving


def pinned(lspt):
    """How many pages LPET does not take."""
    return lspt.pages - sum(count for _, count in leaving(lspt, 0, lspt.pages))


@pytest.fixture
def reading():
    """A thread that is in read(2), until the test writes into this pipe: (thread, its call)."""
    out, into = os.pipe()
    buffer = ctypes.create_string_buffer(1)
    read = ctypes.CDLL(None).read
    thread = threading.Thread(target=read, args=(out, buffer, ctypes.c_size_t(1)))
    thread.start()

    def call():
        with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
            words = file.read().split()
        return len(words) == 9 and tuple(int(word, 0) for word in words[:7])

    number = next(iter(s.CALLS))  # read
    wait_for(lambda: call() and call()[:2] == (number, out))
    yield thread, call()
    os.write(into, b"1")
    thread.join(10)
    os.close(out)
    os.close(into)


@pytest.fixture
def alive(monkeypatch):
    """Threads that run, and whose pins hold."""
    monkeypatch.setattr(p, "_goes_on", lambda *pin: True)
    return range


def test_lpet_passes_pages_that_are_pinned_and_nobody_else_does(lspt):
    lspt.pins.pin([range(100, 110)], 1, CALL)
    assert leaving(lspt, 90, 30) == [(90, 10), (110, 10)]
    assert leaving(lspt, 105, 10) == [(110, 5)]
    assert leaving(lspt, 102, 3) == []
    assert lspt.claim(90, 30, NO_HOLES).leaving == [(90, 30)]


def test_a_pin_may_have_pages_that_are_no_neighbours_and_all_end_together(lspt, alive, monkeypatch):
    lspt.pins.pin([range(100, 110), range(50, 55), range(7, 9)], 1 << 22, CALL)
    assert leaving(lspt, 0, 1000) == [(0, 7), (9, 41), (55, 45), (110, 890)]
    monkeypatch.setattr(p, "_goes_on", lambda *pin: False)
    assert leaving(lspt, 8, 1) == [(8, 1)] and lspt.pins.runs() == []


def test_a_thread_has_one_pin_and_pins_of_two_may_overlap(lspt, alive):
    lspt.pins.pin([range(100, 110)], 1, CALL)
    lspt.pins.pin([range(105, 115)], 2, CALL)
    lspt.pins.pin([range(200, 201)], 1, CALL)
    assert leaving(lspt, 90, 30) == [(90, 15), (115, 5)]
    assert leaving(lspt, 199, 3) == [(199, 1), (201, 1)]


def test_all_pins_have_half_of_the_pages_and_each_leaves_some_to_the_next_ones(lspt, alive):
    got = []
    for n in alive(20):
        got.append(lspt.pins.share(20))
        lspt.pins.pin([range(n * 40, n * 40 + got[-1])], n, CALL)
        if sum(got) > 450:
            break
    assert got[0] == 499 // 4 and got == sorted(got, reverse=True) and got[-1] == 20
    assert sum(got) <= 499


def test_if_there_is_no_room_the_next_call_waits_for_it(lspt, alive):
    for n in alive(3):
        lspt.pins.pin([range(200 * n, 200 * n + 150)], n, CALL)
    fourth = threading.Thread(target=lspt.pins.pin, args=([range(900, 999)], 4, CALL))
    fourth.start()
    fourth.join(10 * p.PIN_AGAIN)
    assert fourth.is_alive() and pinned(lspt) == 450
    lspt.pins.pin([range(999, 1000)], 2, CALL)  # another call of one of the three
    fourth.join(10)
    assert not fourth.is_alive() and pinned(lspt) == 400


def test_if_no_call_ends_the_pages_stay_unpinned(lspt, alive, monkeypatch):
    lspt.pins.pin([range(400)], 1, CALL)
    monkeypatch.setattr(p, "TRIES", 3)
    lspt.pins.pin([range(500, 600)], 2, CALL)
    assert leaving(lspt, 0, 1000) == [(400, 600)]


@pytest.mark.parametrize("high", [2, 4, 6, 10])
def test_a_small_lspt_has_a_pin_too_and_two_pages_are_left_for_an_instruction(high, woken):
    lspt, brought = LSPT(100, high, 0, False, -1, 0), []
    handler = SimpleNamespace(bring=lambda pages, write: brought.append(pages))
    calls = object.__new__(s.SystemCalls)
    calls._lspt, calls._handler, calls._hello = lspt, handler, SimpleNamespace(clean_tracking="")
    calls._pin_and_bring(1, (s.WRITE, 1, 0, 50 * PAGE_SIZE, 0, 0, 0))
    assert brought == [range(max(1, (high - 2) // 2))]
    lspt.state[:] = bytes([HERE]) * 100
    assert pinned(lspt) == len(brought[0]) <= max(1, high - 2)
    close(lspt)


def test_a_pin_holds_as_long_as_the_thread_is_in_that_call(lspt, reading):
    thread, call = reading
    lspt.pins.pin([range(100, 110)], thread.native_id, call)
    assert leaving(lspt, 100, 10) == []
    # Another call of the same thread is not that one.
    lspt.pins.pin([range(100, 110)], thread.native_id, (*call[:3], call[3] + 1, *call[4:]))
    assert leaving(lspt, 200, 800) == [(200, 800)]
    assert lspt.pins.runs() == [(100, 10)], "nobody wants those pages"
    assert leaving(lspt, 109, 1) == [(109, 1)]
    assert lspt.pins.runs() == []


def test_a_pin_holds_if_nothing_can_be_known_of_its_thread(lspt, monkeypatch):
    lspt.pins.pin([range(100, 110)], os.getpid(), CALL)

    def none_left(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(p, "open", none_left, raising=False)
    assert leaving(lspt, 90, 30) == [(90, 10), (110, 10)]


def test_a_pin_of_a_thread_that_runs_holds_until_it_does_not(lspt, start):
    job = start(sys.executable, "-c", "print('runs', flush=True)\nwhile True: pass")
    read_until(job, "runs\n")
    wait_for(lambda: Path(f"/proc/{job.pid}/syscall").read_text() == "running\n")
    lspt.pins.pin([range(100, 110)], job.pid, CALL)

    assert leaving(lspt, 100, 10) == []
    job.send_signal(signal.SIGSTOP)
    wait_for(lambda: leaving(lspt, 100, 10) == [(100, 10)])


def test_a_pin_of_a_thread_that_has_ended_gives_its_room_to_the_next(lspt):
    for n in range(1 << 22, (1 << 22) + 100):  # there are no such threads
        lspt.pins.pin([range(n % 100, n % 100 + 200)], n, CALL)
        assert lspt.pins.runs()[-1] == (n % 100, 200)
