"""The whole system under mpirun: programs that check themselves, and what surrounds them."""

import os
import re
import select
import signal
import sys
import time

import pytest
from conftest import PROGRAMS, TRACKERS, needs_userfaultfd

pytestmark = needs_userfaultfd


def wait_for(condition, seconds=10):
    """Poll until condition() is true, and return what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    pytest.fail(f"waited {seconds} s in vain")


def is_python(pid):
    try:
        return os.readlink(f"/proc/{pid}/exe") == os.path.realpath(sys.executable)
    except OSError:
        return False


# ---------------------------------------------------------------- never a byte lost


@pytest.mark.parametrize("tracker", TRACKERS)
def test_no_update_of_concurrent_writers_is_lost_under_constant_eviction(mpirun, tracker):
    ended = mpirun(PROGRAMS / "writers.py", "--idle-tracker", tracker)
    assert ended.returncode == 0, ended.stdout


def test_readahead_beside_writers_and_munmap_loses_nothing(mpirun):
    ended = mpirun(PROGRAMS / "streams.py")
    assert ended.returncode == 0 and "streams SUCCESS" in ended.stdout, ended.stdout


def test_mmap_munmap_system_calls_and_fork_keep_their_promises(mpirun):
    ended = mpirun(PROGRAMS / "areas.py")
    assert ended.returncode == 0 and "areas SUCCESS" in ended.stdout, ended.stdout


def test_two_instances_on_one_dms_have_memories_of_their_own(mpirun):
    ended = mpirun("-m", "edm.examples.bigger_than_memory", "--size", "8", ranks=3)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("every byte is right: SUCCESS") == 2


# ---------------------------------------------------------------- how a job ends


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        (["return"], 0, "application's last words"),
        (["raise"], 1, "RuntimeError: boom"),
        (["exit", "3"], 3, "exit function ran"),
        (["exit", "0"], 0, "run returned"),
        (["message"], 1, "ended with words"),
        (["kill"], 128 + signal.SIGKILL, "the application was killed by SIGKILL"),
    ],
)
def test_the_job_ends_with_the_applications_status(mpirun, how, status, words):
    ended = mpirun(PROGRAMS / "ends.py", *how)
    assert ended.returncode == status and words in ended.stdout, ended.stdout
    assert how == ["kill"] or "thread ran" in ended.stdout


def test_run_returns_in_every_rank_when_the_application_has_ended(mpirun):
    ended = mpirun(PROGRAMS / "ends.py", "return")
    assert ended.stdout.count("run returned") == 2
    assert ended.stdout.index("last words") < ended.stdout.index("run returned")


def test_a_killed_application_ends_the_job_within_five_seconds_and_leaves_no_process(
    start, mpirun_command
):
    job = start(*mpirun_command("-m", "edm.examples.bigger_than_memory", "--size", "256"))

    def application():
        family = {pid: parent for pid, parent in job.processes().items() if is_python(pid)}
        return next((pid for pid, parent in family.items() if parent in family), None)

    output = ""
    while "25 %" not in output:
        readable, _, _ = select.select([job.stdout], [], [], 30)
        assert readable, output
        output += os.read(job.stdout.fileno(), 4096).decode()
    os.kill(application(), signal.SIGKILL)
    began = time.monotonic()
    rest, _ = job.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert job.returncode not in (0, None)
    assert "the application was killed by SIGKILL" in output + rest
    wait_for(lambda: not job.processes(), 5)


def test_no_process_and_no_file_is_left_behind(start, mpirun_command, tmp_path):
    before = set(os.listdir("/dev/shm"))
    job = start(*mpirun_command("-m", "edm.examples.eviction"), cwd=tmp_path)
    job.communicate(timeout=60)
    assert job.returncode == 0
    wait_for(lambda: not job.processes(), 5)
    assert list(tmp_path.iterdir()) == []
    left = set(os.listdir("/dev/shm")) - before  # other jobs' go when these end
    wait_for(lambda: not left & set(os.listdir("/dev/shm")), 60)


# ---------------------------------------------------------------- what bad input gets


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--low-threshold", "4"], "low_threshold"),
        (["--start-addr", "0x1B58001"], "start_addr"),
        (["--end-addr", "0x1B58000"], "end_addr"),
        (["--disk", "/nowhere/disk"], "/nowhere/disk"),
        (["--start-addr", "0", "--end-addr", "0x2000000"], "start_addr"),
        (["--start-addr", "0x7e0000000000", "--end-addr", "0x7ffffffff000"], "overlaps"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_before_anything_starts(mpirun, arguments, words):
    ended = mpirun("-m", "edm.examples.eviction", "--log-level", "warning", *arguments)
    assert ended.returncode != 0
    lines = [line for line in ended.stdout.splitlines() if "error:" in line]
    assert len(lines) == 1 and words in lines[0], ended.stdout
    assert "Traceback" not in ended.stdout and "step 1" not in ended.stdout


def test_one_rank_is_too_few_and_the_message_says_how_to_start_more(mpirun, run):
    for ended in (
        mpirun("-m", "edm.examples.eviction", ranks=1),
        run(sys.executable, "-m", "edm.examples.eviction"),
    ):
        assert ended.returncode != 0
        assert "mpirun -n 2" in ended.stdout and "Traceback" not in ended.stdout


def test_ranks_that_differ_in_their_geometry_end_and_say_so(mpirun):
    code = (
        "import os, edm; rank = int(os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK'])"
        "; edm.main(print, edm.Config(end_addr=(0x11 + rank) << 32))"
    )
    ended = mpirun("-c", code)
    assert ended.returncode != 0 and "instance and DMS differ in" in ended.stdout, ended.stdout


def test_a_signal_handler_that_calls_the_space_in_the_midst_of_a_call_is_told_so(mpirun):
    code = """
import signal, edm
def app(space):
    told = []
    def handler(number, frame):
        try:
            space.figures()
        except RuntimeError as error:
            told.append(str(error))
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while not told:
        space.sync()
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(told[0])
edm.run(app)
"""
    ended = mpirun("-c", code)
    assert ended.returncode == 0 and "called by a signal handler" in ended.stdout, ended.stdout


def test_mpi_imported_before_run_is_refused(run):
    code = "import edm\nfrom mpi4py import MPI\nedm.run(print)"
    ended = run(sys.executable, "-c", code)
    assert ended.returncode != 0 and "ValueError: edm.run: mpi4py.MPI" in ended.stdout


# ---------------------------------------------------------------- what it costs


def test_a_page_in_use_takes_less_than_16_bytes_and_64_gib_begin_in_under_a_second(
    mpirun, tmp_path
):
    """For pager and DMS together; apart from what MPI takes to begin, a second with Open MPI."""

    def program(touched, size):
        ended = mpirun(PROGRAMS / "memory.py", tmp_path / f"pids{size}", touched, size)
        assert ended.returncode == 0, ended.stdout
        return [
            float(re.search(rf"{what} (\S+)", ended.stdout)[1])
            for what in ("began after", "bytes a page")
        ]

    began_small, _ = program(0.01, 1)
    began, bytes_a_page = program(0.1, 64)
    assert bytes_a_page <= 16
    assert began - began_small < 1


def test_a_silent_dms_takes_less_than_5_percent_of_a_core_and_wakes_when_needed(mpirun):
    def cpu_seconds(silence):
        ended = mpirun(PROGRAMS / "silence.py", silence)
        assert ended.returncode == 0, ended.stdout
        return ended.stdout, max(map(float, re.findall(r"cpu (\S+)", ended.stdout)))

    _, without = cpu_seconds(0)
    printed, silent = cpu_seconds(10)
    assert silent - without < 0.05 * 10
    busy, first = map(float, re.search(r"busy (\S+) first (\S+)", printed).groups())
    # It sleeps 10 ms when nobody rings. Most of the first fault's time is the cores' own waking.
    assert first < 5000, f"{first} µs for the first fault after a silence, {busy} µs when busy"
