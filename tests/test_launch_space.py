"""python -m edm run: more memory for a program that knows nothing of it, and what is told of that.

These need a space; what a program finds besides is in test_launch.py.
"""

import os
import re
import shlex
import sys
import time

import pytest
from conftest import PROGRAMS, needs_userfaultfd
from test_launch import on_a_terminal

from edm.uffd_ctypes import PAGE_SIZE

pytestmark = needs_userfaultfd

EDM_RUN = (sys.executable, "-m", "edm", "run", "--resident", "16M")
WORK = "import edm; a = edm.space().mmap(32 << 20, name='my data'); a[:] = bytes(len(a)); a[::4096]"

# ---------------------------------------------------------------- the space


def test_the_script_finds_its_space_and_nothing_is_printed_unless_asked(run):
    code = "import edm; a = edm.space().mmap(64 << 20); a[::4096] = bytes(len(a) // 4096); a[-1]"
    ended = run(*EDM_RUN, "-c", code)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_a_program_may_have_a_command_line_of_any_length(run):
    code = "import edm, sys; print(edm.space() is not None, len(sys.argv))"
    ended = run(*EDM_RUN, "-c", code, *["an argument"] * 50_000)
    assert (ended.returncode, ended.stdout) == (0, "True 50001\n")


FLAGS = """
import edm, os
start = f"{edm.space().start_addr:x}-"
if os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
for pid in os.getpid(), os.getppid():
    _, _, mapping = open(f"/proc/{pid}/smaps").read().partition(start)
    print(next(line for line in mapping.splitlines() if line.startswith("VmFlags:")))
"""


def test_a_core_dump_leaves_the_space_out_also_of_forked_children(run):
    ended = run(*EDM_RUN, "-c", FLAGS)
    assert ended.returncode == 0 and len(ended.stdout.splitlines()) == 2, ended.stdout
    assert all(" dd " in line for line in ended.stdout.splitlines()), (
        ended.stdout
    )  # proc_pid_smaps(5)


WHERE = """
import numpy, sys, edm
space = edm.space()
print(*(space.start_addr <= numpy.ones(n).ctypes.data < space.end_addr for n in (100, 10000, 1000000)))
"""


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ([], "False False True"),
        (["--numpy-threshold", "64K"], "False True True"),
        (["--no-numpy"], "False False False"),
    ],
)
def test_large_arrays_of_numpy_live_in_the_space_unless_told_otherwise(run, options, where):
    pytest.importorskip("numpy")
    ended = run(*EDM_RUN, *options, "-c", WHERE)
    assert (ended.returncode, ended.stdout) == (0, where + "\n")


def test_numpy_has_its_arrays_in_the_space_though_the_script_has_an_edm_of_its_own(run, tmp_path):
    pytest.importorskip("numpy")
    (tmp_path / "edm.py").write_text("NAME = 'its own'")
    code = (
        "import edm, numpy; a = numpy.ones(1_000_000)\n"
        "maps = [line.split()[0].split('-') for line in open('/proc/self/maps') if 'memfd' in line]\n"
        "print(edm.NAME, any(int(b, 16) <= a.ctypes.data < int(e, 16) for b, e in maps))"
    )
    (tmp_path / "script.py").write_text(code)
    ended = run(*EDM_RUN, tmp_path / "script.py")
    assert (ended.returncode, ended.stdout) == (0, "its own True\n")


def test_what_keeps_edm_from_starting_is_told_in_one_line_with_status_2(run):
    ended = run(*EDM_RUN, "--disk", "/nowhere/disk", "-c", "print('started')")
    assert ended.returncode == 2 and ended.stdout.count("\n") == 1, ended.stdout
    assert ended.stdout.startswith("python -m edm run: error: ") and "/nowhere/disk" in ended.stdout


@pytest.mark.parametrize("options", [(), EDM_RUN[-2:]])
def test_a_system_without_proc_is_told_in_one_line(run, options):
    command = shlex.join(map(str, [*EDM_RUN[:-2], *options, "-c", "print('started')"]))
    ended = run("unshare", "-m", "sh", "-c", f"umount -l /proc && exec {command}")
    if os.getuid() or "unshare" in ended.stdout:
        pytest.skip("needs root")
    assert ended.returncode == 2 and ended.stdout.count("\n") == 1, ended.stdout
    assert "No such file or directory: '/proc/" in ended.stdout


@pytest.mark.undisturbed
def test_starting_and_ending_takes_at_most_three_tenths_of_a_second_more_than_plain_python(run):
    def seconds(*command):
        began = time.monotonic()
        assert run(*command).returncode == 0
        return time.monotonic() - began

    plain, within = [], []
    for tries in range(20):  # others on this machine may make some of them wait
        plain.append(seconds(sys.executable, "-c", "pass"))
        within.append(seconds(*EDM_RUN, "-c", "pass"))
        if tries >= 4 and min(within) < min(plain) + 0.3:
            break
    assert min(within) < min(plain) + 0.3, (plain, within)


GROW = """
import ctypes, edm
space = edm.space()
MIB = 1 << 20
grown = space.allocate(8 * MIB, "grows", grows=True)
other = space.allocate(8 * MIB, "other", grows=True)
last = space.allocate(MIB, "last")
for size in (9, 64):
    assert space.grow(grown, size * MIB) and space.grow(other, size * MIB), size
assert sorted(space.areas()) == sorted(((grown, 64 * MIB), (other, 64 * MIB), (last, MIB)))

bytes_in_it = (ctypes.c_char * (64 * MIB)).from_address(grown)
bytes_in_it[:] = bytes(range(256)) * (64 * MIB // 256)  # four times what may be here
before = space.figures()["faults_refetch"]
assert bytes_in_it[:] == bytes(range(256)) * (64 * MIB // 256)
faults = space.figures()["faults_refetch"] - before
assert faults < 64 * MIB // 4096 // 16, faults  # so it was read ahead, behind the seams too

assert not space.grow(last, 2 * MIB)  # the space ends there
assert not space.grow(grown, 1 << 50) and space.lengths[grown] == 64 * MIB
for area in (grown, other, last):
    space.release(area)
assert space.allocate(space.end_addr - space.start_addr, "everything") == space.start_addr
"""


def test_an_area_grows_where_it_is_if_what_is_behind_it_is_free(run):
    ended = run(*EDM_RUN, "-c", GROW)
    assert (ended.returncode, ended.stdout) == (0, "")


RESIZE = """
import edm, numpy as np
MIB = 1 << 20
a = np.ones(2 * MIB, np.uint8)
a.resize(3 * MIB, refcheck=False)  # it is moved to where it can grow
place, received = a.ctypes.data, edm.space().figures()["bytes_received"]
for size in range(4, 65):
    a.resize(size * MIB, refcheck=False)
    a[-MIB:] = size
    np.ones(MIB)
print(a.ctypes.data == place, edm.space().figures()["bytes_received"] - received)
print(a[::MIB].tolist() == [1, 1, 0, *range(4, 65)])
"""


def test_a_numpy_array_that_grows_is_not_fetched(run):
    pytest.importorskip("numpy")
    ended = run(*EDM_RUN, "--readahead", "1", "-c", RESIZE)
    assert (ended.returncode, ended.stdout) == (0, "True 0\nTrue\n")


# ---------------------------------------------------------------- several ranks


def test_with_dms_1_rank_0_serves_and_the_others_run_the_program(mpirun):
    code = "import edm; print(f'instance {edm.space().instance}\\n', end='')"  # in one write
    ended = mpirun(*EDM_RUN[1:], "--dms", "1", "-c", code, ranks=3)
    assert ended.returncode == 0, ended.stdout
    assert sorted(re.findall(r"instance (\d)", ended.stdout)) == ["0", "1"]


def test_without_dms_each_rank_runs_the_program_which_may_use_mpi(mpirun):
    code = (
        "from mpi4py import MPI; import edm; a = edm.space().mmap(64 << 20); a[::4096] = b'x' * 16384\n"
        "w = MPI.COMM_WORLD; print(f'{w.rank} of {w.size}, {w.allreduce(a[4096])}\\n', end='')"
    )
    ended = mpirun(*EDM_RUN[1:], "-c", code, ranks=2)
    assert sorted(ended.stdout.split("\n")) == ["", "0 of 2, 240", "1 of 2, 240"], ended.stdout


# ---------------------------------------------------------------- what it tells of itself


def test_stats_tells_of_a_command_line_that_is_no_text(run):
    ended = run(*EDM_RUN, "--stats", "-c", "print('last words')", os.fsdecode(b"caf\xe9"))
    assert ended.returncode == 0 and r"caf\udce9" in ended.stdout, ended.stdout


def test_stats_prints_one_table_at_the_end(run):
    ended = run(*EDM_RUN, "--stats", "-c", WORK + "; print('last words')")
    words, title, *rows = ended.stdout.splitlines()
    assert words == "last words" and title.startswith("EDM, INSTANCE_0: ")
    figures = {row[:12].strip(): row[12:] for row in rows}
    assert re.fullmatch(r" \d+ first accesses, \d+ refetches, \d+ first writes", figures["faults"])
    for name, pattern in {
        "latency": r"\d+ µs median, \d+ µs 99th",
        "waiting": r"\d+\.\d\d s",
        "evictions": r"\d+ pages with their bytes, \d+ clean",
        "to the store": r"\d+ bytes",
        "from it": r"\d+ bytes; \d+ pages came",
        "resident": r"\d+ pages at most",
    }.items():
        assert re.search(pattern, figures[name]), (name, figures)
    assert int(figures["resident"].split()[0]) * PAGE_SIZE <= 16 << 20


PROGRESS = (
    r"\x1b\[\?7lwaits (\d+)% \(reading (\d+)%, for room (\d+)%\), "
    r"resident [\d.]+ \w+, not here [\d.]+ \w+, \d+ pages/s come, \d+ leave\x1b\[\?7h"
)


@pytest.mark.undisturbed
def test_progress_is_a_live_line_on_a_terminal_and_nothing_elsewhere(run):
    code = (
        WORK + "; import time; t = time.time()\nwhile time.time() < t + 0.7: a[:] = bytes(len(a))"
    )
    output = on_a_terminal(*EDM_RUN, "--progress", "-c", code)
    lines = output.split("\r\x1b[K")
    told = [re.fullmatch(PROGRESS, line) for line in lines[1:-1]]
    assert len(told) > 1 and all(told), output
    waits, reading, room = map(int, told[-1].groups())
    assert 5 <= waits <= 105 and 0 < reading + room <= waits + 2, output
    assert lines[-1] == ""
    assert run(*EDM_RUN, "--progress", "-c", code).stdout == ""


# ---------------------------------------------------------------- other processes, other rights


def test_a_forked_child_has_a_copy_of_the_memory_and_spawned_ones_work(run):
    ended = run(*EDM_RUN, PROGRAMS / "processes.py")
    assert ended.returncode == 0 and "processes SUCCESS" in ended.stdout, ended.stdout


def test_where_system_calls_may_not_fault_and_seccomp_is_refused_they_fail_but_for_numpys_reading(
    run, tmp_path
):
    ended = run(sys.executable, PROGRAMS / "user_mode.py", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stdout.count("OSError: [Errno 14] Bad address") == 2, ended.stdout


def test_each_of_several_ranks_has_files_of_its_own(mpirun, tmp_path):
    code = "import edm; edm.space().mmap(32 << 20)[::4096] = bytes(8192)"
    disk, report = tmp_path / "disk", tmp_path / "report.html"
    ended = mpirun(*EDM_RUN[1:], "--disk", disk, "--report", report, "-c", code, ranks=3)
    assert (ended.returncode, ended.stdout) == (0, "")
    names = ["disk", "disk.1", "disk.2", "report.1.html", "report.2.html", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_program_beside_dmss_may_use_mpi_by_itself(mpirun):
    code = (
        "from mpi4py import MPI; print(f'{MPI.COMM_WORLD.rank} {MPI.COMM_WORLD.size}\\n', end='')"
    )
    ended = mpirun(*EDM_RUN[1:], "--dms", "1", "-c", code, ranks=3)
    assert (ended.returncode, ended.stdout) == (0, "0 1\n" * 2)


def test_a_mistake_of_several_ranks_is_told_once(mpirun):
    for arguments in (["--no-such"], ["--resident", "much"], ["--readahead", "0", "-c", "pass"]):
        ended = mpirun(*EDM_RUN[1:], *arguments, ranks=3)
        lines = [line for line in ended.stdout.splitlines() if "error:" in line]
        assert ended.returncode == 2 and len(lines) == 1, ended.stdout


SIGNALS = """
import edm, signal
before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
edm.run(lambda space: None)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
print("as before\\n", end="")
"""


def test_a_program_goes_on_in_the_application_with_its_signals_as_they_were(mpirun):
    ended = mpirun("-c", SIGNALS)
    assert (ended.returncode, ended.stdout) == (0, "as before\n")
