"""The whole system, on one machine and over MPI: programs that check themselves, and what is around."""

import os
import re
import signal
import sys
import time

import pytest
from conftest import (
    PROGRAMS,
    TRACKERS,
    TRACKINGS,
    has_mpich,
    needs_userfaultfd,
    read_until,
    wait_for,
    wait_until_gone,
)

pytestmark = needs_userfaultfd


# ---------------------------------------------------------------- never a byte lost


@pytest.mark.parametrize("tracking", TRACKINGS)
@pytest.mark.parametrize("tracker", TRACKERS)
def test_no_update_of_concurrent_writers_is_lost_under_constant_eviction(way, tracker, tracking):
    options = ("--idle-tracker", tracker, "--clean-tracking", tracking)
    ended = way.run(PROGRAMS / "writers.py", *options)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_readahead_beside_writers_and_munmap_loses_nothing(way, tracking):
    ended = way.run(PROGRAMS / "streams.py", "--clean-tracking", tracking)
    assert ended.returncode == 0 and "streams SUCCESS" in ended.stdout, ended.stdout


def test_mmap_munmap_system_calls_and_fork_keep_their_promises(way):
    ended = way.run(PROGRAMS / "areas.py")
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
        (["exit", "0"], 0, "exit function ran"),
        (["message"], 1, "ended with words"),
        (["_exit"], 4, ""),
        (["exec"], 5, "another program"),
    ],
)
def test_the_job_ends_with_the_applications_status(way, how, status, words):
    ended = way.run(PROGRAMS / "ends.py", *how)
    assert ended.returncode == status and words in ended.stdout, ended.stdout
    assert "thread ran" in ended.stdout
    assert ended.stdout.count("Traceback") == (how == ["raise"]), ended.stdout


def test_a_killed_applications_job_says_so(way):
    ended = way.run(PROGRAMS / "ends.py", "kill")
    assert ended.returncode == way.killed_by(signal.SIGKILL), ended.stdout
    # On one machine it is the shell that says it.
    assert way.alone or "was killed by signal 9, Killed" in ended.stdout, ended.stdout
    assert "Traceback" not in ended.stdout


def test_run_returns_in_the_application_alone(way):
    ended = way.run(PROGRAMS / "ends.py", "return")
    assert ended.stdout.count("run returned") == 1, ended.stdout
    assert ended.stdout.index("last words") < ended.stdout.index("run returned")


def test_what_the_application_raises_run_raises(way):
    code = """
import edm
def app(space):
    space.mmap(edm.PAGE_SIZE)[0] = 1
    raise KeyError("the key")
try:
    edm.run(app)
except KeyError as error:
    print("caught", error.args[0])
"""
    ended = way.run("-c", code)
    assert (ended.returncode, ended.stdout) == (0, "caught the key\n")


def test_a_killed_application_ends_the_job_within_five_seconds_and_leaves_no_process(way):
    job = way.start("-m", "edm.examples.bigger_than_memory", "--size", "256")
    output = read_until(job, "25 %")
    os.kill(job.parts()["application"], signal.SIGKILL)
    began = time.monotonic()
    rest, _ = job.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert job.returncode == way.killed_by(signal.SIGKILL), output + rest
    assert "Traceback" not in rest and "SUCCESS" not in rest
    wait_until_gone(job)


def test_where_a_jobs_threads_hang_is_told_when_it_takes_too_long(start):
    code = (
        "import os, threading; ends = os.pipe(); threading.Thread(target=os.read, args=ends).start()"
        "; print('ready', flush=True); os.read(*ends)"
    )
    job = start(sys.executable, "-c", code)
    wait_for(lambda: len(re.findall(r"  thread \d+, wchan \w*pipe_read,", job.whereabouts())) == 2)
    with pytest.raises(pytest.fail.Exception, match=r"wchan \w*pipe_read,(.|\n)*Output:\nready\n"):
        job.communicate(timeout=0.01)
    assert job.returncode == -signal.SIGKILL


@pytest.mark.undisturbed
def test_no_process_and_no_file_is_left_behind(way, tmp_path):
    before = set(os.listdir("/dev/shm"))
    job = way.start("-m", "edm.examples.eviction", cwd=tmp_path)
    job.communicate(timeout=60)
    assert job.returncode == 0
    wait_until_gone(job)
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
        (["--start-addr", "0x7e0000000000", "--end-addr", "0x7fff00000000"], "overlaps"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_before_anything_starts(way, arguments, words):
    ended = way.run("-m", "edm.examples.eviction", "--log-level", "warning", *arguments)
    assert ended.returncode == 2, ended.stdout
    lines = [line for line in ended.stdout.splitlines() if "error:" in line]
    assert len(lines) == 1 and words in lines[0], ended.stdout
    assert "Traceback" not in ended.stdout and "step 1" not in ended.stdout


def test_a_limit_on_the_size_of_files_is_told_in_one_line(alone):
    code = """
import edm, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
edm.main(print, edm.Config())
"""
    ended = alone.run("-c", code)
    assert ended.returncode == 2, ended.stdout
    assert ended.stdout.count("\n") == 1 and "File too large" in ended.stdout, ended.stdout


def test_a_rank_without_memory_for_its_messages_ends_the_job_before_an_application_starts(mpirun):
    code = """
import edm, errno, os
from edm import edm as core, messages
def fail(buffer):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
if core.launched()[0] == 1:
    messages.MessageBuffer.__init__ = fail
edm.main(lambda space: print("an application"), edm.Config())
"""
    ended = mpirun("-c", code, ranks=3)
    assert ended.returncode == 2 and "an application" not in ended.stdout, ended.stdout
    assert re.findall("edm: error: (.*)", ended.stdout) == ["Cannot allocate memory"]


def test_a_dms_needs_two_ranks_and_the_message_says_how_to_start_them(mpirun, run):
    example = ("-m", "edm.examples.eviction", "--dms", "1")
    for ended in (mpirun(*example, ranks=1), run(sys.executable, *example)):
        assert ended.returncode == 2, ended.stdout
        assert "mpirun -n 2" in ended.stdout and "Traceback" not in ended.stdout


def test_without_a_dms_every_rank_has_a_pager_of_its_own(mpirun):
    """And one rank alone has one, too."""
    for ranks, options in ((1, ()), (2, ("--dms", "0"))):
        ended = mpirun("-m", "edm.examples.eviction", *options, ranks=ranks)
        assert ended.returncode == 0, ended.stdout
        assert ended.stdout.count("compare pages SUCCESS") == ranks, ended.stdout


@pytest.mark.parametrize(
    "other",
    [
        "settings['start_addr'] += rank << 32",
        "settings['end_addr'] += rank << 32",
        "settings['keep'] = not rank",
        "settings['dms'] += rank % 2",
        "import edm.rank; edm.rank.VERSION += rank",
        "uffd_ctypes.PAGE_SIZE <<= rank",
    ],
)
def test_ranks_that_differ_in_their_geometry_end_and_say_so(mpirun, tmp_path, other):
    code = f"""
import edm
from edm import uffd_ctypes
from edm.edm import launched
rank = launched()[0]
settings = {{"start_addr": 1 << 40, "end_addr": 3 << 40, "dms": 1, "disk": {str(tmp_path / "disk")!r}}}
{other}
edm.main(print, edm.Config(**settings))
"""
    ended = mpirun("-c", code, ranks=3)
    assert ended.returncode == 2 and "instance and DMS differ in" in ended.stdout, ended.stdout
    assert ended.stdout.count("\n") == 1 and not list(tmp_path.iterdir()), ended.stdout


def test_ranks_of_another_mpis_launcher_are_told_so_in_one_line(run):
    """Each has the launcher's variables, and is alone in its own MPI."""
    name = "OMPI_COMM_WORLD" if has_mpich() else "PMI"
    for rank, lines in ((0, 1), (1, 0)):  # rank 0 prints it
        ranks = f"{name}_RANK={rank}", f"{name}_SIZE=2"
        ended = run("env", *ranks, sys.executable, "-c", "import edm; edm.run(print)")
        told = "edm: error: MPI: mpirun and mpi4py's MPI library are not of the same kind"
        assert ended.returncode == 2 and ended.stdout.count(told) == lines, ended.stdout
        assert ended.stdout.count("error") == lines, ended.stdout  # mpi4py may warn


def test_a_signal_handler_that_calls_the_space_in_the_midst_of_a_call_is_told_so(way):
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
    ended = way.run("-c", code)
    assert ended.returncode == 0 and "called by a signal handler" in ended.stdout, ended.stdout


def test_mpi_imported_before_run_is_refused_where_it_matters(way):
    code = "import edm\nfrom mpi4py import MPI\nedm.run(lambda space: print('ran'))"
    ended = way.run("-c", code)
    if way.alone:
        assert (ended.returncode, ended.stdout) == (0, "ran\n")
    else:
        assert ended.returncode != 0 and "ValueError: edm: mpi4py.MPI" in ended.stdout


# ---------------------------------------------------------------- what it costs


@pytest.mark.undisturbed
def test_a_page_in_use_takes_less_than_16_bytes_and_64_gib_begin_in_under_a_second(way, tmp_path):
    """For all processes but the application together; apart from what MPI takes to begin."""

    def program(touched, size):
        ended = way.run(PROGRAMS / "memory.py", tmp_path / f"pids{size}", touched, size)
        assert ended.returncode == 0, ended.stdout
        return [
            float(re.search(rf"{what} (\S+)", ended.stdout)[1])
            for what in ("began after", "bytes a page")
        ]

    began_small, _ = program(0.01, 1)
    for tries in reversed(range(3)):
        began, bytes_a_page = program(0.1, 64)
        if bytes_a_page <= 16 or not tries:  # MPI's buffers may grow meanwhile
            break
    assert bytes_a_page <= 16
    assert began - began_small < 1


@pytest.mark.undisturbed
def test_a_silent_dms_and_pager_take_less_than_5_percent_of_a_core_and_wake_soon(mpirun, tmp_path):
    ended = mpirun(PROGRAMS / "silence.py", 3, tmp_path / "ranks")
    assert ended.returncode == 0, ended.stdout
    figures = re.search(r"busy (\S+) first (\S+) cpu (\S+)", ended.stdout)
    busy, first, cpu = map(float, figures.groups())
    assert cpu < 0.05 * 3
    # It naps for 2 ms at most. Most of the first fault's time is the cores' own waking, which took 5.4 ms
    # on a busy machine.
    assert first < 50_000, f"{first} µs for the first fault after a silence, {busy} µs when busy"
