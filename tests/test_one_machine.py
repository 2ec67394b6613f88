"""On one machine: the application is the process that was started, the pager is nobody's child."""

import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    PROGRAMS,
    has_ended,
    needs_userfaultfd,
    read_until,
    wait_for,
    wait_until_gone,
)

from edm.pager import _status_of

pytestmark = needs_userfaultfd


def waiting(alone, how, *disk):
    """A job that waits for SIGUSR1; see programs/waits.py."""
    job = alone.start(PROGRAMS / "waits.py", how, *disk)
    read_until(job, "ready\n")
    return job, wait_for(job.parts)


def at_best(seconds, attempt, tries=3):
    """attempt() gives how many seconds something took; others on this machine may have made it wait."""
    took = []
    while len(took) < tries and min(took, default=seconds) >= seconds:
        took.append(attempt())
    assert min(took) < seconds, took


def seconds_until_gone(pids, limit=5):
    began = time.monotonic()
    wait_for(lambda: all(map(has_ended, pids)), limit)
    return time.monotonic() - began


def check(ended, words="SUCCESS\n"):
    assert (ended.returncode, ended.stdout) == (0, words)


# ---------------------------------------------------------------- who dies


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_space_whose_start_or_end_a_signal_handler_interrupts_makes_room_for_another(
    alone, tmp_path, where
):
    check(
        alone.run(PROGRAMS / "interrupted.py", where, tmp_path / "disk"), "interrupted\nSUCCESS\n"
    )


@pytest.mark.undisturbed
def test_when_the_pager_is_killed_the_kernel_kills_the_application(alone):
    def attempt():
        job, parts = waiting(alone, "return")  # with all signals blocked
        os.kill(parts["pager"], signal.SIGKILL)
        took = seconds_until_gone([parts["application"]])
        assert job.wait(5) == -signal.SIGKILL
        wait_until_gone(job)
        return took

    at_best(0.1, attempt)


@pytest.mark.undisturbed
def test_when_the_pager_is_killed_while_threads_sleep_in_faults_the_application_is_killed(alone):
    def attempt():
        job, parts = waiting(alone, "faults")
        os.kill(job.pid, signal.SIGUSR1)
        read_until(job, "asleep")
        tasks = Path(f"/proc/{job.pid}/task")

        def asleep():
            return sum("userfault" in (task / "wchan").read_text() for task in tasks.iterdir())

        wait_for(lambda: asleep() == 4)
        os.kill(parts["pager"], signal.SIGKILL)
        took = seconds_until_gone([parts["application"]])
        assert job.wait(5) == -signal.SIGKILL
        wait_until_gone(job)
        return took

    at_best(0.1, attempt)


@pytest.mark.undisturbed
@pytest.mark.parametrize("kept", [False, True], ids=["scratch", "kept"])
def test_when_lpet_is_killed_the_job_ends_and_says_so(alone, tmp_path, kept):
    job, parts = waiting(alone, "return", *([tmp_path / "disk"] if kept else []))
    os.kill(parts["LPET"], signal.SIGKILL)
    assert seconds_until_gone(parts.values()) < 1
    output, _ = job.communicate(timeout=10)
    assert job.returncode == -signal.SIGKILL
    assert len(re.findall(r"^edm: error: LPET .*$", output, re.MULTILINE)) == 1, output
    assert output.count("\n") == 1, output


@pytest.mark.parametrize("call", ["", "space.munmap(space.mmap(1))"], ids=["fault", "munmap"])
def test_when_lpet_is_killed_in_the_midst_of_a_change_of_the_lspt_nothing_hangs(alone, call):
    """It has the lock then, which DM-Handler or pager wait for."""
    code = f"""
import edm, failing, sys
failing.everywhere("dies_with_the_lock")
def app(space):
    for n in range(20):
        area = space.mmap(3000 * edm.PAGE_SIZE)
        for page in range(3000):
            area[page * edm.PAGE_SIZE] = 1
            {call}
edm.run(app, edm.Config(high_threshold=2048))
"""
    ended = alone.run("-c", code, cwd=PROGRAMS)
    assert ended.returncode == -signal.SIGKILL, ended.stdout
    assert ended.stdout.count("edm: error: LPET") == 1 == ended.stdout.count("\n"), ended.stdout


def test_when_lpet_fails_a_kept_disk_stays_as_the_last_sync_has_left_it(alone, tmp_path):
    """The pages that it had in its hands are lost: what is there is no memory of any moment."""
    code = """
import edm, failing, sys
PAGE, PAGES, fails = edm.PAGE_SIZE, 60, "fails" in sys.argv
def app(space):
    area, other = space.mmap(PAGES * PAGE), space.mmap(200 * PAGE)
    if fails:
        area[::PAGE] = b"1" * PAGES
        space.sync()
        area[::PAGE] = b"2" * PAGES
        other[::PAGE] = b"3" * 200
    print(bytes(area[::PAGE]))
if fails:
    failing.everywhere("put_raises")
edm.main(app, edm.Config(high_threshold=64, low_threshold=32, disk=sys.argv[1], keep=True))
"""
    disk = tmp_path / "disk"
    ended = alone.run("-c", code, disk, "fails", cwd=PROGRAMS)
    assert ended.returncode == -signal.SIGKILL, ended.stdout
    again = alone.run("-c", code, disk, cwd=PROGRAMS)
    assert again.stdout == f"{b'1' * 60}\n", ended.stdout + again.stdout


@pytest.mark.undisturbed
@pytest.mark.parametrize("kept", [False, True], ids=["scratch", "kept"])
@pytest.mark.parametrize("how", ["return", "exit", "_exit", "kill", "exec"])
def test_pager_and_lpet_end_within_a_second_of_the_application(alone, tmp_path, how, kept):
    job, parts = waiting(alone, how, *([tmp_path / "disk"] if kept else []))
    os.kill(job.pid, signal.SIGUSR1)
    del parts["application"]
    assert seconds_until_gone(parts.values()) < 1
    if how == "exec":
        assert job.poll() is None  # that is another program now, and goes on
    else:
        job.wait(5)


@pytest.mark.undisturbed
def test_a_busy_lpet_ends_within_a_tenth_of_a_second(alone):
    def attempt():
        job = alone.start("-m", "edm.examples.bigger_than_memory", "--size", "256")
        read_until(job, "25 %")
        parts = job.parts()
        job.kill()
        job.wait()
        return seconds_until_gone([parts["LPET"], parts["pager"]])

    at_best(0.1, attempt)


# ---------------------------------------------------------------- no stranger


def test_the_program_has_no_child_and_no_stranger_in_its_process_group_and_session(alone):
    code = """
import edm, os
def app(space):
    area = space.mmap(1000 * edm.PAGE_SIZE)
    area[::edm.PAGE_SIZE] = bytes(1000)
    for wait in (os.wait, lambda: os.waitpid(-1, os.WNOHANG), lambda: os.waitpid(0, 0)):
        try:
            raise SystemExit(f"a child: {wait()}")
        except ChildProcessError:
            pass
    mine = os.getpid()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if pid != mine and (os.getpgid(pid) == mine or os.getsid(pid) == mine):
                raise SystemExit(f"a stranger: {open(f'/proc/{pid}/cmdline').read()}")
        except ProcessLookupError:
            pass
    print("SUCCESS")
assert os.getpgrp() == os.getsid(0) == os.getpid()
edm.run(app, edm.Config(high_threshold=100))
"""
    check(alone.run("-c", code, start_new_session=True))


def test_nobody_imports_mpi(alone):
    _, parts = waiting(alone, "return")
    assert parts.keys() == {"application", "pager", "LPET"}
    for name, pid in parts.items():
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libc" in maps and not re.search(r"libmpi|mpi4py|mpich|libfabric", maps), name
    code = """
import edm, sys
def app(space):
    space.sync()
    print([name for name in sys.modules if "mpi4py" in name] or "SUCCESS")
edm.run(app)
"""
    check(alone.run("-c", code))


# ---------------------------------------------------------------- descriptors, memory, time

OPEN = """
import edm, os, re
def opened():
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd"))
            if os.path.exists(f"/proc/self/fd/{fd}")}
def check_close_on_exec(pid, fds):
    for fd in fds:
        with open(f"/proc/{pid}/fdinfo/{fd}") as info:
            flags = int(re.search(r"flags:\\s+(\\d+)", info.read())[1], 8)
        if not flags & 0o2000000:
            raise SystemExit(f"{os.readlink(f'/proc/{pid}/fd/{fd}')} is not close-on-exec")
def app(space):
    area = space.mmap(1000 * edm.PAGE_SIZE)
    area[::edm.PAGE_SIZE] = bytes(1000)
    new = opened().keys() - before.keys()
    assert new
    check_close_on_exec("self", new)
    figures = space.figures()
    for pid in (figures["pager_pid"], figures["lpet_pid"]):
        check_close_on_exec(pid, [fd for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2])
before = opened()
"""


def test_what_a_run_opens_is_close_on_exec_and_closed_and_unmapped_when_it_returns(alone):
    code = f"""{OPEN}
def look(space):
    app(space)
    with open("/proc/self/maps") as file:
        maps.append(file.read())
maps = []
for _ in range(3):
    edm.run(look, edm.Config(high_threshold=100))
    assert opened() == before, (opened(), before)
with open("/proc/self/maps") as file:
    assert "memfd:edm" in maps[0] and "memfd:edm" not in file.read()
print("SUCCESS")
"""
    check(alone.run("-c", code))


def test_of_one_run_after_another_the_last_space_is_left_and_no_descriptor_with_a_report_too(
    alone, tmp_path
):
    code = f"""{OPEN}
import gc, signal
for handler in (signal.SIG_DFL, print):  # the second one is set while the report uses the signal
    def look(space):
        app(space)
        signal.signal(signal.SIGURG, handler)
    for _ in range(3):
        edm.run(look, edm.Config(high_threshold=100, report={str(tmp_path / "report")!r}))
        assert opened() == before, (opened(), before)
gc.collect()
assert sum(isinstance(found, edm.Space) for found in gc.get_objects()) == 1
os.kill(os.getpid(), signal.SIGURG)
signal.signal(signal.SIGURG, signal.SIG_DFL)
print("SUCCESS")
"""
    urg = int(signal.SIGURG)
    ended = alone.run("-c", code)
    assert ended.returncode == 0 and ended.stdout.startswith(f"{urg} <frame "), ended.stdout


def test_a_kept_disks_descriptors_are_so_too(alone, tmp_path):
    code = f"""{OPEN}
for _ in range(2):
    edm.run(app, edm.Config(high_threshold=100, disk={str(tmp_path / "disk")!r}, keep=True))
    assert opened() == before, (opened(), before)
print("SUCCESS")
"""
    check(alone.run("-c", code))  # and an application that ends by itself needs no word of it


def test_a_process_that_cant_print_why_it_fails_ends_all_the_same():
    def fails():
        raise OSError(errno.ENOSPC, "no room")

    if not (child := os.fork()):
        try:
            with open("/dev/full", "w") as sys.stderr:
                os._exit(_status_of(fails))
        finally:
            os._exit(77)  # it has come back to what its parent does
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_a_run_that_is_refused_leaves_nothing_open(alone, tmp_path):
    code = f"""{OPEN}
for settings in ({{"disk": "/nowhere/disk"}}, {{"disk": edm.__file__}},
                 {{"disk": "/nowhere/disk", "report": {str(tmp_path / "report")!r}}},
                 {{"start_addr": 0x7e0000000000, "end_addr": 0x7fff00000000}}):
    try:
        edm.run(app, edm.Config(**settings))
    except (ValueError, OSError):
        assert opened() == before, (settings, opened(), before)
    else:
        raise SystemExit(f"{{settings}} were taken")
edm.run(app, edm.Config(high_threshold=100))
print("SUCCESS")
"""
    check(alone.run("-c", code))


def test_a_standard_stream_that_is_closed_stays_so(alone):
    code = """
import edm, os
os.close(0)
def app(space):
    space.mmap(edm.PAGE_SIZE)[0] = 1
    assert os.open("/dev/null", os.O_RDONLY) == 0
    os.close(0)
edm.run(app)
assert os.open("/dev/null", os.O_RDONLY) == 0
print("SUCCESS")
"""
    check(alone.run("-c", code))


def test_a_program_that_closes_every_descriptor_goes_on(alone):
    code = """
import edm, os, resource
def app(space):
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    area = space.mmap(1000 * edm.PAGE_SIZE)
    for _ in range(2):
        for page in range(1000):
            assert area[page * edm.PAGE_SIZE] == (page % 251 if _ else 0)
            area[page * edm.PAGE_SIZE] = page % 251
    assert os.open("/dev/null", os.O_RDONLY) == 3  # whose number nobody takes for EDM's
    print("SUCCESS", flush=True)
edm.run(app, edm.Config(high_threshold=100))
os.fstat(3)
"""
    check(alone.run("-c", code))


def test_who_reads_from_a_programs_pipe_gets_its_end_when_the_program_has_closed_it(alone):
    code = """
import edm, os
reading, writing = os.pipe()
os.set_inheritable(writing, True)  # as in a program that was started with it
def app(space):
    os.close(writing)
    assert os.read(reading, 1) == b""
    print("SUCCESS", flush=True)
edm.run(app)
"""
    check(alone.run("-c", code))


def test_a_program_may_ignore_sigchld(alone):
    code = """
import edm, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def app(space):
    space.mmap(edm.PAGE_SIZE)[0] = 1
edm.run(app)
print("SUCCESS")
"""
    check(alone.run("-c", code))


def test_a_program_that_has_sigchld_blocked_finds_none_of_edms(alone):
    code = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
import edm
edm.start()
assert not signal.sigpending(), signal.sigpending()
print("SUCCESS")
"""
    check(alone.run("-c", code))


def test_the_pager_ends_when_its_application_becomes_another_program_beside_a_child_of_c_code(
    alone,
):
    code = """
import ctypes, os, time, edm
edm.start().mmap(edm.PAGE_SIZE)[0] = 1
if not ctypes.CDLL(None).fork():
    time.sleep(60)
    os._exit(0)
print("forked", flush=True)
os.execv("/bin/sleep", ["sleep", "60"])
"""
    job = alone.start("-c", code)
    read_until(job, "forked")
    wait_for(lambda: not job.parts().get("pager"), 3)


def test_signals_to_all_python_processes_do_not_end_the_pager(alone):
    code = """
import edm, os, signal, time
numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM]
def app(space):
    area, figures = space.mmap(500 * edm.PAGE_SIZE), space.figures()
    for number in numbers:
        for name in "pager_pid", "lpet_pid":
            os.kill(figures[name], number)
    for page in range(500):
        area[page * edm.PAGE_SIZE] = 1
    deadline = time.monotonic() + 30
    while space.figures()["evicted_dirty"] < 400:
        assert time.monotonic() < deadline, space.figures()
    print("SUCCESS", flush=True)
edm.run(app, edm.Config(high_threshold=100))
"""
    check(alone.run("-c", code))


def test_one_run_after_another_begins_with_zeros(alone):
    code = """
import edm
def app(space):
    area = space.mmap(500 * edm.PAGE_SIZE)
    assert not any(area)
    area[:] = b"x" * len(area)
    assert bytes(area) == b"x" * len(area)
for n in range(5):
    edm.run(app, edm.Config(high_threshold=100 + n))
try:
    edm.space()
except RuntimeError:
    print("SUCCESS")
"""
    check(alone.run("-c", code))


@pytest.mark.undisturbed
def test_start_makes_an_application_of_an_interpreter_that_has_threads(alone):
    code = """
import edm, threading
ready, go_on, wrong = threading.Barrier(4), threading.Event(), []
def work(number):
    ready.wait()
    go_on.wait()
    area = edm.space().mmap(300 * edm.PAGE_SIZE)
    area[:] = bytes([number]) * len(area)
    wrong.append(bytes(area) != bytes([number]) * len(area))
threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
for thread in threads:
    thread.start()
ready.wait()
space = edm.start(edm.Config(high_threshold=100))
assert space is edm.space()
try:
    edm.start()
except RuntimeError as error:
    assert "already" in str(error)
go_on.set()
for thread in threads:
    thread.join()
assert wrong == [False] * 3 and space.figures()["evicted_dirty"] > 0
print("SUCCESS")
"""
    job = alone.start("-c", code)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, output) == (0, "SUCCESS\n")
    wait_until_gone(job, 1)


def cpu_seconds(pid):
    times = (path.read_text().split()[0] for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(map(int, times)) / 1e9


@pytest.mark.undisturbed
def test_an_idle_pager_and_lpet_take_less_than_half_a_percent_of_a_core(alone):
    _, parts = waiting(alone, "return")
    time.sleep(0.2)  # the last eviction ends
    pids, silence = (parts["pager"], parts["LPET"]), 3
    before = sum(map(cpu_seconds, pids))
    time.sleep(silence)  # this is measured, not waited for
    assert sum(map(cpu_seconds, pids)) - before < 0.005 * silence


@pytest.mark.undisturbed
def test_freeing_an_area_never_waits_for_a_round_of_lpet(alone):
    for _ in range(3):  # others on this machine may make it wait
        ended = alone.run(PROGRAMS / "freeing.py")
        if "freeing SUCCESS" in ended.stdout:
            break
    assert ended.returncode == 0 and "freeing SUCCESS" in ended.stdout, ended.stdout


def test_the_pager_takes_40_mib_and_two_bytes_a_page_at_most(alone):
    code = """
import edm
PAGES = 100_000
def app(space):
    area = space.mmap(PAGES * edm.PAGE_SIZE)
    for page in range(PAGES):
        area[page * edm.PAGE_SIZE] = 1
    figures = space.figures()
    for pid in (figures["pager_pid"], figures["lpet_pid"]):
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        taken = int(fields["VmRSS"].split()[0]) << 10
        assert taken < (40 << 20) + 2 * PAGES, taken
    print("SUCCESS")
edm.run(app, edm.Config(high_threshold=8192))
"""
    check(alone.run("-c", code))
