"""python -m edm run: a program finds everything as python itself gives it, and more memory."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import PROGRAMS, needs_userfaultfd

from edm import launch
from edm.launch import find_mpirun, size_in_bytes

pytestmark = [
    needs_userfaultfd,
    pytest.mark.skipif(find_mpirun() is None, reason="there is no mpirun: pip install mpich"),
]

EDM_RUN = (sys.executable, "-m", "edm", "run", "--resident", "16M")

SCRIPT = """\
import atexit, sys
print(__name__, sys.argv, __file__, sys.path[0], sys.flags.dev_mode)
print(sys.modules["__main__"].answer if "answer" in globals() else "no answer yet")
answer = 42
print("to stderr", file=sys.stderr)
print(input(), input())
atexit.register(print, "the end")
def fail(): return {}["key"]
END
"""
ENDS = {"returns": "", "raises": "fail()", "exits": "sys.exit(7)", "exits with words": "sys.exit('bye')"}  # fmt: skip


def both(arguments, cwd, python=(sys.executable,), run=EDM_RUN):
    """(status, stdout, stderr) of `python ...`, and of `python -m edm run ...`."""
    found = []
    for command in (python, run):
        ended = subprocess.run(
            [*command, *arguments], input=b"two\nlines\n", capture_output=True, cwd=cwd,
            timeout=60, check=False,
        )  # fmt: skip
        # What Open MPI's mpirun itself says of a status that is not 0.
        errors = re.sub(r"-{60,}\n.*?-{60,}\n", "", ended.stderr.decode(), flags=re.DOTALL)
        found.append((ended.returncode, ended.stdout.decode(), errors))
    return found


# ---------------------------------------------------------------- as python does it


@pytest.mark.parametrize("end", ENDS)
def test_a_script_prints_and_ends_as_it_does_without_edm(tmp_path, end):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT.replace("END", ENDS[end]))
    without, within = both(["folder/script.py", "-c", "--resident", "x y"], tmp_path)
    assert within == without
    assert without[1].startswith("__main__ ['folder/script.py', '-c', '--resident', 'x y']")


LOGGED = """
import logging, logging.handlers, sys
handler = logging.handlers.MemoryHandler(100, target=logging.StreamHandler(sys.stdout))
logging.getLogger().addHandler(handler)
logging.error("kept until the end")
"""
DIES_IN_ITS_HOOK = """
import os, sys
sys.excepthook = lambda *error: (print("mine", file=sys.stderr), os._exit(3))
1/0
"""
FINALIZED = """
NAME = "a global"
class Last:
    def __del__(self): print(NAME, "is there when finalizers run")
last = Last()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "module", "--stats", "x"],
        ["-m", "package", "x"],
        ["-c", "import sys, module; print(sys.argv, sys.path[0])", "-m", "x"],
        ["-c", "raise SystemExit"],
        ["-c", "1/0"],
        ["-c", "import sys; sys.excepthook = lambda *error: sys.exit(5); 1/0"],
        ["-c", "import sys; sys.excepthook = lambda *error: open('/nowhere'); 1/0"],
        ["-c", DIES_IN_ITS_HOOK],
        ["-c", FINALIZED],
        ["-c", "import sys; sys.stderr.close()"],
        ["-c", "import sys; sys.stdout = None"],
        ["-c", "import ctypes; ctypes.CDLL(None).printf(b'by C\\n')"],
        ["-c", LOGGED],
        ["-c", "this is no Python"],
        ["-m", "module.nothing"],
        ["package", "x"],
    ],
)
def test_modules_code_and_folders_run_as_they_do_without_edm(tmp_path, arguments):
    (tmp_path / "module.py").write_text("import sys; print(__name__, sys.argv, __spec__.name)")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text("import sys; print(sys.argv, __name__)")
    without, within = both(arguments, tmp_path)
    assert within == without


def test_options_of_python_itself_are_passed_on(tmp_path):
    run = [sys.executable, "-O", "-W", "error", "-X", "dev", *EDM_RUN[1:]]
    code = "import sys; print(__debug__, sys.flags.dev_mode, sys.warnoptions)"
    without, within = both(["-c", code], tmp_path, [sys.executable, *run[1:6]], run)
    assert within == without and without[1].startswith("False True")


def test_the_programs_standard_output_is_the_file_that_it_was_sent_to(tmp_path):
    with open(tmp_path / "output", "wb") as output:
        output.write(b"before\n")
        output.flush()
        subprocess.run([*EDM_RUN, "-c", "print('x' * 100000)"], stdout=output, check=True)
    assert (tmp_path / "output").read_bytes() == b"before\n" + b"x" * 100000 + b"\n"


def test_standard_input_may_be_a_socket():
    ours, theirs = socket.socketpair()
    ours.sendall(b"over a socket\n" * 10000)
    ours.shutdown(socket.SHUT_WR)
    code = "import sys; print(len(sys.stdin.read()))"
    ended = subprocess.run(
        [*EDM_RUN, "-c", code], stdin=theirs, text=True, capture_output=True, timeout=60, check=True
    )
    assert ended.stdout == "140000\n"


def test_a_killed_program_ends_with_128_and_the_signal():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    ended = subprocess.run(
        [*EDM_RUN, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 128 + signal.SIGKILL
    assert "the application was killed by SIGKILL" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_to_end_can_end_in_its_own_way(start, number):
    code = f"""
import signal, time
signal.signal({number:d}, signal.default_int_handler)
try:
    print("begun", flush=True)
    time.sleep(60)
finally:
    until = time.monotonic() + 0.5
    while time.monotonic() < until: pass
    print("cleaned up", flush=True)
"""
    job = start(find_mpirun(), "-n", 2, *EDM_RUN, "-c", code)
    assert job.stdout.readline() == "begun\n"
    os.kill(job.parts()["pager"], number)
    output, _ = job.communicate(timeout=20)
    assert "cleaned up" in output and job.returncode == 128 + signal.SIGINT, output
    assert "KeyboardInterrupt" in output


def test_a_signal_to_the_launcher_reaches_the_program_once_and_its_status_is_its_own(start):
    version = subprocess.run([find_mpirun(), "--version"], capture_output=True, check=False).stdout
    if b"open-mpi" in version.lower():
        pytest.skip("Open MPI's mpirun gives its ranks no time")
    code = """
import signal, sys, time
times = []
signal.signal(signal.SIGTERM, lambda *_: times.append(1))
print("begun", flush=True)
while not times: time.sleep(0.01)
until = time.monotonic() + 0.5
while time.monotonic() < until: pass
print("came", len(times), flush=True)
sys.exit(0)
"""
    job = start(*EDM_RUN, "-c", code)
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert "came 1\n" in output, output


def test_a_program_that_will_not_end_is_ended(start):
    code = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begun", flush=True)
time.sleep(60)
"""
    job = start(find_mpirun(), "-n", 2, *EDM_RUN, "-c", code)
    assert job.stdout.readline() == "begun\n"
    began = time.monotonic()
    os.kill(job.parts()["pager"], signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert time.monotonic() - began < 6 and job.returncode == 128 + signal.SIGTERM, output


def test_several_instances_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.setattr(launch, "_memory", lambda: (1000 << 20, 400 << 20))
    for here, ranks, mib in (("", "", 320), ("2", "2", 320), ("5", "5", 80), ("2", "3", 160)):
        monkeypatch.setenv("MPI_LOCALNRANKS", here)
        monkeypatch.setenv("PMI_SIZE", ranks)
        config = launch._config(launch._parse(["x.py"]))
        assert config.high_threshold == (mib << 20) // 4096


def test_under_mpirun_the_ranks_are_what_it_says(mpirun):
    code = "import edm; print(f'instance {edm.space().instance}\\n', end='')"  # in one write
    ended = mpirun("-m", "edm", "run", "--resident", "16M", "-c", code, ranks=3)
    assert ended.returncode == 0, ended.stdout
    assert sorted(re.findall(r"instance (\d)", ended.stdout)) == ["0", "1"]


def test_the_script_finds_its_space_and_nothing_is_printed_unless_asked(run):
    code = "import edm; a = edm.space().mmap(64 << 20); a[::4096] = bytes(len(a) // 4096); a[-1]"
    ended = run(*EDM_RUN, "-c", code)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_starting_and_ending_takes_less_than_a_second_or_little_more_than_mpi_itself(run):
    def seconds(*command):
        began = time.monotonic()
        assert run(*command).returncode == 0
        return time.monotonic() - began

    # Open MPI needs more than a second by itself.
    mpi = (find_mpirun(), "-n", 2, sys.executable, "-c", "from mpi4py import MPI")
    limit = max(1, min(seconds(*mpi) for _ in range(3)) + 0.5)
    assert min(seconds(*EDM_RUN[:4], "-c", "pass") for _ in range(3)) < limit


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resident", "12X", "x.py"], "resident: '12X' is no size"),
        (["--resident", "4K", "x.py"], "resident: 4K is less than two pages"),
        (["--numpy-threshold", "much", "x.py"], "numpy_threshold: 'much' is no size"),
        (["--readahead", "0", "x.py"], "readahead: 0 pages"),
        (["/nowhere/x.py"], "can't open file '/nowhere/x.py'"),
        ([], "which program?"),
        (["--report", "/nowhere/x.html", "-c", "pass"], "report: there is no folder"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(run, arguments, words, tmp_path):
    (tmp_path / "x.py").write_text("")
    ended = run(sys.executable, "-m", "edm", "run", *arguments, cwd=tmp_path)
    lines = [line for line in ended.stdout.splitlines() if "error:" in line]
    assert ended.returncode == 2 and len(lines) == 1 and words in lines[0], ended.stdout
    assert "Traceback" not in ended.stdout


def test_without_mpirun_it_says_what_brings_one(monkeypatch):
    monkeypatch.setattr(launch, "find_mpirun", lambda: None)
    with pytest.raises(SystemExit, match="there is no mpirun; pip install mpich"):
        launch._launch(["-c", "pass"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("12G", 12 << 30), ("1.5KiB", 1536), ("2TB", 2 << 40), ("8192", 8192)],
)
def test_sizes(text, size):
    assert size_in_bytes("resident", text) == size


def test_a_share_is_of_this_machines_memory(monkeypatch):
    monkeypatch.setattr(launch, "_memory", lambda: (1000 << 20, 400 << 20))
    assert size_in_bytes("resident", "80%") == 800 << 20


# ---------------------------------------------------------------- what it tells of itself

WORK = "import edm; a = edm.space().mmap(32 << 20, name='my data'); a[:] = bytes(len(a)); a[::4096]"


def test_stats_prints_one_table_at_the_end(run):
    ended = run(*EDM_RUN, "--stats", "-c", WORK + "; print('last words')")
    words, title, *rows = ended.stdout.splitlines()
    assert words == "last words" and title.startswith("EDM, INSTANCE_0: ")
    figures = {row[:12].strip(): row[12:] for row in rows}
    assert re.fullmatch(
        r" \d+: \d+ first accesses, \d+ refetches, \d+ first writes", figures["faults"]
    )
    for name, pattern in {
        "latency": r"\d+ µs median, \d+ µs 99th",
        "waiting": r"\d+\.\d\d s",
        "evictions": r"\d+ pages with their bytes, \d+ clean",
        "to the DMS": r"\d+ \wiB",
        "from it": r"\d+.* \wiB",
        "resident": r"(\d+) MiB at most",
    }.items():
        assert re.search(pattern, figures[name]), (name, figures)
    assert int(re.search(r"(\d+) MiB at most", figures["resident"])[1]) <= 16


def on_a_terminal(*command):
    """What a command prints on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    output, deadline = b"", time.monotonic() + 60
    try:
        while select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            output += os.read(terminal, 1 << 16)
        os.kill(pid, signal.SIGKILL)
        pytest.fail(f"still running: {output}")
    except OSError:  # EIO: everybody has closed it
        pass
    finally:
        os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, output
    return output.decode()


PROGRESS = r"resident [\d.]+ \w+, on the DMS [\d.]+ \w+, \d+ faults/s, \d+ evictions/s"


def test_progress_is_a_live_line_on_a_terminal_and_nothing_elsewhere(run):
    code = (
        WORK + "; import time; t = time.time()\nwhile time.time() < t + 0.7: a[:] = bytes(len(a))"
    )
    output = on_a_terminal(*EDM_RUN, "--progress", "-c", code)
    lines = output.split("\r\x1b[K")
    assert len(lines) > 2 and all(re.fullmatch(PROGRESS, line) for line in lines[1:-1]), output
    assert lines[-1] == ""
    assert run(*EDM_RUN, "--progress", "-c", code).stdout == ""


def test_a_program_on_a_terminal_has_the_terminal():
    code = "import os, sys; print([os.isatty(n) for n in range(3)], sys.stdout.line_buffering)"
    assert on_a_terminal(*EDM_RUN, "-c", code) == "[True, True, True] True\r\n"


# ---------------------------------------------------------------- other processes, other rights


def test_a_forked_child_fails_cleanly_and_spawned_ones_work(run):
    ended = run(*EDM_RUN, PROGRAMS / "processes.py")
    assert ended.returncode == 0 and "processes SUCCESS" in ended.stdout, ended.stdout


def test_where_system_calls_may_not_fault_the_error_says_so_once(mpirun, tmp_path):
    ended = mpirun(PROGRAMS / "user_mode.py", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stdout.count("OSError: [Errno 14] Bad address") == 2, ended.stdout
    assert ended.stdout.count("vm.unprivileged_userfaultfd=1") == 1, ended.stdout


def test_report_writes_a_page_with_the_areas_by_their_names(run, tmp_path):
    page = tmp_path / "page.html"
    ended = run(*EDM_RUN, "--report", page, "-c", WORK)
    assert (ended.returncode, ended.stdout) == (0, "")
    text = page.read_text()
    row = re.search(r"<tr><td>my data</td>.*?</tr>", text, re.DOTALL)[0]
    assert "32 MiB" in row and "on the DMS" in row and "here" in row
    assert re.search(r"faults</td><td>\d+: \d+ first accesses, \d+ refetches", text)
