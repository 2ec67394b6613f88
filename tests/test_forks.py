"""Forked children read the application's memory and write privately; whatever fails, nobody hangs."""

import os
import signal

import pytest
from conftest import PROGRAMS, has_ended, needs_userfaultfd, read_until, wait_for, wait_until_gone

pytestmark = needs_userfaultfd


@pytest.mark.parametrize(
    "case",
    ["reads", "writes", "under_pressure", "killed"],
)
def test_forked_children_read_the_memory_and_write_privately(way, case):
    ended = way.run(PROGRAMS / "forks.py", case)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.parametrize(
    "case", ["eighths", "not_served", "signals", "from_threads", "masks", "many_faults", "execs"]
)
def test_on_one_machine_they_do_so_from_wherever_they_are_forked(alone, case):
    ended = alone.run(PROGRAMS / "forks.py", case)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_a_limit_on_data_is_none_for_children_on_the_size_of_the_space(alone):
    code = """
import os, resource, edm
def app(space):
    areas = [space.mmap(3 * edm.PAGE_SIZE) for _ in range(3)]
    for area in areas:
        area[:] = b"x" * len(area)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    if not os.fork():
        areas[1][0] = 1
        os._exit(sum(bytes(area) == b"x" * len(area) for area in (areas[0], areas[2])))
    print(os.waitstatus_to_exitcode(os.wait()[1]), areas[1][0])
edm.run(app)
"""
    assert alone.run("-c", code).stdout == f"2 {ord('x')}\n"


FORKED_MEANWHILE = """
import edm, os, threading
from edm.lifeline import HIGH
children, done = [], []
def forks():
    while not done:
        if not (child := os.fork()):
            os.write(ready, b"x")  # its fork hooks have ended
            os.read(out, 1)
            os._exit(0)
        children.append(child)
out, into = os.pipe()
are_ready, ready = os.pipe()
thread = threading.Thread(target=forks)
thread.start()
while len(children) < 3:
    pass
edm.start()
done.append(True)
thread.join()
kept, count = set(), 0
while count < len(children):
    count += len(os.read(are_ready, 1 << 16))
for child in children:
    for fd in os.listdir(f"/proc/{child}/fd"):
        if int(fd) < HIGH:  # a child that was forked after the start has a userfaultfd of its own, above
            name = os.readlink(f"/proc/{child}/fd/{fd}")
            if "userfaultfd" in name:
                kept.add(child)
print(len(kept) < 3)  # without the hook 5 to 8; one may come while a call that makes a descriptor returns
os.write(into, b"x" * len(children))
for child in children:
    os.waitpid(child, 0)
"""


def test_a_child_that_a_thread_forks_while_edm_starts_keeps_nothing_of_edms(alone):
    """It would keep a page fault of the application asleep when the pager is killed."""
    program = "-W", "ignore::DeprecationWarning", "-c", FORKED_MEANWHILE
    tries = (
        (0, "True\n") == (e.returncode, e.stdout) for e in (alone.run(*program) for _ in "123")
    )
    assert any(tries)  # more children than that may be unlucky now and then


@pytest.mark.parametrize("case", [["limited"], ["crowd"], ["reads", "twice"]])
def test_on_one_machine_children_that_are_many_or_can_not_be_served_harm_nobody(alone, case):
    ended = alone.run(PROGRAMS / "forks.py", *case)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_a_child_that_is_forked_while_a_program_mocks_what_python_has_reads_the_memory(alone):
    ended = alone.run(PROGRAMS / "forks.py", "mocked")
    assert (ended.returncode, ended.stdout) == (0, "")


def test_arrays_that_a_child_makes_are_in_ordinary_memory(way):
    pytest.importorskip("numpy")
    ended = way.run(PROGRAMS / "forks.py", "its_own")
    assert (ended.returncode, ended.stdout) == (0, "")


def test_a_page_that_can_not_be_read_is_a_sigbus_for_a_child_too(way, tmp_path):
    ended = way.run(PROGRAMS / "forks.py", "lost", tmp_path / "disk")
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("can't be brought back") == 1, ended.stdout


@pytest.mark.parametrize("how", ["_exit", "kill"])
def test_a_child_that_outlives_the_application_lives_until_it_touches_the_memory(
    alone, tmp_path, how
):
    job = alone.start(PROGRAMS / "forks.py", "orphans", tmp_path / "output", how)
    job.wait(10)
    wait_until_gone(job)
    assert (tmp_path / "output").read_bytes() == b"lives"


@pytest.mark.undisturbed
@pytest.mark.parametrize("who", ["pager", "application"])
def test_when_the_pager_is_killed_children_are_too_and_else_only_who_touches_the_memory(way, who):
    job = way.start(PROGRAMS / "forks.py", "waits")
    _, *children = read_until(job, "\n", 10).split()
    faulting, sleeping = map(int, children)
    os.kill(wait_for(job.parts)[who], signal.SIGKILL)
    wait_for(lambda: has_ended(faulting), 2)
    if who == "pager":
        wait_for(lambda: has_ended(sleeping), 2)
    else:
        assert not has_ended(sleeping)
        os.kill(sleeping, signal.SIGKILL)
    wait_until_gone(job)
