"""edm.py and log.py: what the settings refuse, and how lines look."""

import argparse
import copy
import logging
import os
import re
import select
import subprocess
import sys

import pytest

import edm
from edm import edm as face
from edm import launch, log
from edm.edm import Config
from edm.uffd_ctypes import PAGES_AT_ONCE

WRONG = {
    "end_addr": [{"end_addr": "0x2000000000"}],
    "start_addr, end_addr": [
        {"start_addr": 0x1001},
        {"start_addr": 0},
        {"start_addr": -edm.PAGE_SIZE},
        {"start_addr": 1 << 64, "end_addr": (1 << 64) + 0x2000},
        {"start_addr": 0x2000, "end_addr": 0x2000},
        {"end_addr": 0x20_0000_0001},
        {"end_addr": 1 << 64},
    ],
    "high_threshold, resident": [{"high_threshold": 1}],
    "low_threshold": [{"high_threshold": 4, "low_threshold": 4}, {"low_threshold": -1}],
    "readahead": [
        {"readahead": 0},
        {"readahead": 1.5},
        {"readahead": None},
        {"readahead": PAGES_AT_ONCE + 1},
    ],
    "evict_batch": [{"evict_batch": 0}, {"evict_batch": PAGES_AT_ONCE + 1}],
    "idle_tracker": [{"idle_tracker": "psychic"}],
    "clean_tracking": [{"clean_tracking": "perhaps"}],
    "dms": [{"dms": -1}],
    "keep": [{"keep": True}],
    "report": [{"report": path} for path in ("/nowhere/report.html", "/tmp", "/dev/full", b"/", 5)],
    "disk": [{"disk": 5}],
    "disk, report": [{"disk": "a\0b"}, {"report": "a\0b"}],
    "log_level": [{"log_level": "loud"}],
}


@pytest.mark.parametrize(
    ("name", "settings"), [(name, each) for name, all_of in WRONG.items() for each in all_of]
)
def test_a_wrong_setting_is_a_valueerror_of_one_line_that_names_it(name, settings):
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
        Config(**settings)


def test_the_largest_settings_are_none_that_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(face, "launched", lambda: (0, 2))
    Config(
        end_addr=(1 << 62) - edm.PAGE_SIZE, readahead=PAGES_AT_ONCE,
        evict_batch=PAGES_AT_ONCE, dms=1, keep=True, disk="disk", report=f"{tmp_path}/report.html",
    )  # fmt: skip
    Config(high_threshold=2, low_threshold=0, readahead=1, evict_batch=1, report="report.html")


def test_what_is_like_a_number_or_a_path_becomes_one(tmp_path):
    class Like:
        """As a NumPy integer."""

        def __index__(self):
            return 0x1000000

    config = Config(start_addr=Like(), readahead=True, keep=1, disk=tmp_path, report=None)
    assert vars(config) == vars(
        Config(start_addr=0x1000000, readahead=1, keep=True, disk=str(tmp_path))
    )
    assert [type(value) for value in vars(config).values()].count(Like) == 0


def test_settings_have_names_and_do_not_change():
    config = Config(keep=True, disk="disk")
    assert "keep=True" in repr(config) and "disk='disk'" in repr(config)
    assert config == Config(disk="disk", keep=True) != Config()
    with pytest.raises(AttributeError, match="^keep: "):
        config.keep = False
    assert config.keep
    assert Config(0x1000, 0x5000) == Config(start_addr=0x1000, end_addr=0x5000)
    with pytest.raises(TypeError, match="no setting kept"):
        Config(kept=True)


def test_the_plain_way_reads_nothing_ahead_and_has_no_batches_and_no_marks():
    config = Config(plain=True, readahead=64, evict_batch=64, clean_tracking="async")
    assert (config.readahead, config.evict_batch, config.clean_tracking) == (1, 1, "none")


@pytest.mark.parametrize(
    "high, less", [(2, 1), (4, 1), (16, 2), (1000, 125), (2048, 256), (4096, 256), (65536, 2048)]
)
def test_the_low_threshold_follows_the_high_one(high, less):
    assert Config(high_threshold=high).low_threshold == high - less


def test_every_setting_has_an_option_and_its_help(monkeypatch, tmp_path):
    monkeypatch.setattr(face, "launched", lambda: (0, 2))
    report = f"{tmp_path}/report.html"
    arguments = [
        "program", "--start-addr", "0x1B58000", "--end-addr", "0x1F40000", "--high-threshold", "4",
        "--low-threshold", "2", "--disk", "/tmp/x", "--keep", "--idle-tracker", "unmap",
        "--log-level", "debug", "--readahead", "16", "--evict-batch", "8",
        "--clean-tracking", "events", "--plain", "--dms", "1", "--stats", "--progress", "--report", report,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    parser = argparse.ArgumentParser()
    _, config = edm.parse_arguments(parser)
    assert config == Config(
        start_addr=0x1B58000, end_addr=0x1F40000, high_threshold=4, low_threshold=2,
        disk="/tmp/x", keep=True, idle_tracker="unmap", readahead=16, evict_batch=8,
        clean_tracking="events", plain=True, dms=1, stats=True, progress=True, report=report,
        log_level="debug",
    )  # fmt: skip
    for name in Config.__annotations__:
        assert getattr(config, name) != getattr(Config, name), "each option was given"
        assert re.search(f"--{name.replace('_', '-')}[ ,]", parser.format_help())


def test_without_options_the_settings_are_the_default_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    assert edm.parse_arguments(argparse.ArgumentParser())[1] == Config()


@pytest.mark.parametrize(
    ("value", "words"), [("1", "high_threshold, resident: "), ("x", "argument --high-")]
)
def test_a_wrong_option_is_told_in_one_line_by_one_rank(monkeypatch, capsys, value, words):
    monkeypatch.setattr(sys, "argv", ["program", "--high-threshold", value])
    monkeypatch.setattr(launch, "PRINTING", 0)
    for rank in (0, 1):
        monkeypatch.setattr(launch, "launched", lambda rank=rank: (rank, 2))
        with pytest.raises(SystemExit) as ended:
            edm.parse_arguments(argparse.ArgumentParser(prog="program"))
        assert ended.value.code == 2
        told = capsys.readouterr()
        assert told.out == ""
        if rank:
            assert told.err == ""
        else:
            assert re.fullmatch(f"program: error: {words}[^\n]*\n", told.err)


def test_a_programs_own_defaults_are_taken_and_can_be_overridden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--low-threshold", "3"])
    _, config = edm.parse_arguments(argparse.ArgumentParser(), high_threshold=10, low_threshold=5)
    assert (config.high_threshold, config.low_threshold) == (10, 3)


def test_log_lines_have_the_wikis_format(capsys):
    log.start("debug")
    log.logger("DMS").debug("page accessed first time, set info - new_page")
    log.logger("Usercode").debug("User code main function start running")
    log.logger().info("compare pages SUCCESS")
    lines = capsys.readouterr().err.splitlines()
    stamp = r"\[\w{3} \w{3} \d\d \d{4} \d\d:\d\d:\d\d\.\d{3}\]"
    expected = [
        r":\[Debug\]-\[DMS\] - page accessed first time, set info - new_page",
        r":\[Debug\]-\[Usercode\] : User code main function start running",
        r":\[Info\]-compare pages SUCCESS",
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(stamp + pattern, line)


def test_the_log_is_silent_below_warning_by_default(capsys):
    log.start(Config().log_level)
    log.logger("DMS").info("no")
    log.logger("DMS").warning("yes")
    assert "no" not in capsys.readouterr().err
    assert not log.logger("DmHandler").isEnabledFor(logging.INFO)


HEAVY = ("mpi4py", "numpy", "logging", "threading", "argparse", "multiprocessing", "subprocess")


@pytest.mark.parametrize("module", ["edm", "edm.edm", "edm.address_space", "edm.launch"])
def test_a_program_does_not_get_to_carry_what_edm_does_not_need_there(module):
    # ctypes first: in Python 3.14 it imports threading.
    code = f"import ctypes, sys; before = set(sys.modules); import {module}; "
    code += "print(*(set(sys.modules) - before))"
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    imported = {name.partition(".")[0] for name in ended.stdout.split()}
    heavy = imported.intersection(HEAVY)
    assert "edm" in imported and heavy == ({"argparse"} if module == "edm.launch" else set())


RANKS = ("PMI_RANK", "PMI_SIZE", "PMI_FD", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
RANKS += ("PMIX_RANK", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "open"}, (2, 3)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3)),  # a launcher that has no descriptor
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "closed"}, (0, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "", "PMI_FD": "open"}, (0, 1)),
        ({"PMI_RANK": "2"}, (0, 1)),
        ({"PMI_SIZE": "3", "PMI_FD": "open"}, (0, 1)),
        ({"PMI_RANK": "-1", "PMI_SIZE": "x"}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1"}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "0"}, (0, 1)),
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        ({"PMIX_RANK": "1"}, (0, 1)),
        (
            {
                "PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "closed",
                "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
            },
            (1, 4),
        ),
    ],
)  # fmt: skip
def test_variables_that_a_launcher_has_left_make_no_rank(monkeypatch, variables, expected):
    ours, theirs = os.pipe()
    os.close(theirs)
    descriptors = {"open": str(ours), "closed": str(theirs)}
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, descriptors.get(value, value))
    assert face.launched() == expected
    os.close(ours)


def test_a_dms_needs_ranks_and_is_refused_before_anything_starts(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"^dms: needs MPI ranks.*mpirun -n 2"):
        edm.run(lambda space: pytest.fail("it was started"), Config(dms=1))


def test_what_is_no_application_has_no_space():
    with pytest.raises(RuntimeError, match=r"^edm\.space: this process is not an application"):
        edm.space()


def test_no_descriptor_gets_the_number_of_a_standard_stream_that_is_closed():
    code = """if True:
        import os
        from edm import edm
        def spawn_pager():
            made.append(os.open("/dev/null", os.O_RDONLY))
            raise OSError
        made, edm.spawn_pager = [], spawn_pager
        for fd in (0, 2):
            os.close(fd)
        try:
            edm.start()
        except OSError:
            free = os.open("/dev/null", os.O_RDONLY)
        print(made[0] > 2, free)
    """
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert ended.stdout == b"True 0\n"


@pytest.mark.parametrize("this", ["Darwin, x86_64", "Linux, riscv64"])
def test_another_system_than_linux_and_another_machine_are_told_so(this):
    system, machine = this.split(", ")
    code = f"import os; os.uname = lambda: ({system!r}, '', '', '', {machine!r}); import edm"
    ended = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, check=False
    )
    assert ended.returncode != 0
    words = "EDM needs Linux 5.19+, x86-64 or aarch64; this is "
    assert words + this in ended.stderr.splitlines()[-1]


def test_a_job_is_not_ended_before_the_launcher_has_read_why():
    code = """
import fcntl, os, sys, termios
from edm import rank
class World:
    def Abort(self, status):  # as MPICH's launcher: what is unread now is lost
        unread = fcntl.ioctl(2, termios.FIONREAD, bytes(4))
        os._exit(status if not any(unread) else 99)
rank.PRINTING = 2
print("the reason", file=sys.stderr)
rank._abort(World(), 7)
"""
    nobody, pipe = subprocess.DEVNULL, subprocess.PIPE
    job = subprocess.Popen([sys.executable, "-c", code], stdout=nobody, stderr=pipe)
    assert select.select([job.stderr], [], [], 30)[0]
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(0.2)
    assert os.read(job.stderr.fileno(), 100) == b"the reason\n"
    assert job.wait(20) == 7
    job.stderr.close()


def test_a_job_ends_too_where_nobody_reads_why():
    code = "from edm import rank; World = type('World', (), {'Abort': lambda *_: None})"
    code += "; print('the reason', file=rank.sys.stderr); rank._abort(World(), 7)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as job:
        assert job.wait(20) == 7


def test_an_application_learns_an_instances_number_of_any_size():
    """Over the socket that a rank and its application share."""
    code = """
from edm import rank
from edm.edm import Config
def be(config, application, control):
    rank.send(control, 70000)
    rank.os.waitpid(application, 0)
    rank.os._exit(0)
rank._run = be
rank.launched = lambda: (1, 2)  # else it is a DMS
print(rank.fork_application(Config())[1], flush=True)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, text=True, capture_output=True, check=True, timeout=60)
    assert ended.stdout == "70000\n", ended.stderr


def test_a_dms_ignores_the_launchers_signals_for_good_while_it_serves(mpirun, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
import edm
from edm.edm import launched
if launched()[0] == 0:
    Path({str(tmp_path / "dms")!r}).write_text(str(os.getpid()))
def app(space):
    space.mmap(1 << 20)[0] = 1
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(int(Path({str(tmp_path / "dms")!r}).read_text()), number)
    print("application", flush=True)
edm.run(app)
print("done", flush=True)
"""
    ended = mpirun("-c", code)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.split() == ["application", "done"]  # the application alone goes on


@pytest.mark.skipif(sys.version_info < (3, 13), reason="copy.replace came with Python 3.13")
def test_a_replaced_config_is_checked_too():
    config = copy.replace(Config(low_threshold=8), high_threshold=16)
    assert (config.high_threshold, config.low_threshold) == (16, 8)
    with pytest.raises(ValueError, match="low_threshold"):
        copy.replace(Config(), high_threshold=16)


def test_a_python_without_a_gil_is_told_how_to_have_one(run):
    code = """
import argparse, sys
sys._is_gil_enabled = lambda: False
import edm
edm.main(print, edm.parse_arguments(argparse.ArgumentParser())[1])
"""
    ended = run(sys.executable, "-c", code)
    assert (ended.returncode, ended.stdout.count("\n")) == (2, 1)
    assert "PYTHON_GIL=1 turns it on" in ended.stdout


def test_a_job_without_an_mpi_ends_with_one_line_and_status_2(mpirun):
    code = "import sys; sys.modules['mpi4py'] = None; import edm; edm.main(print, edm.Config())"
    ended = mpirun("-c", code)
    told = [line for line in ended.stdout.splitlines() if "edm: error" in line]
    assert ended.returncode == 2 and len(told) == 1, ended.stdout
    assert "MPI: import of mpi4py halted" in told[0] and "Traceback" not in ended.stdout


def test_under_edm_run_such_a_job_does_so_too(run, mpirun_command, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('there is none')")
    command = mpirun_command("-m", "edm", "run", "--dms", "1", "-c", "pass", ranks=3)
    ended = run("env", f"PYTHONPATH={tmp_path}", *command)
    told = [line for line in ended.stdout.splitlines() if "edm: error" in line]
    assert ended.returncode == 2 and len(told) == 1 and "there is none" in told[0], ended.stdout
    assert "Fatal" not in ended.stdout and "Traceback" not in ended.stdout


def test_after_the_run_signals_are_handled_as_before_whatever_the_programs_defaults(mpirun):
    """A timeout of all sockets, and no standard error."""
    code = """
import signal, socket, sys
socket.setdefaulttimeout(0.01)
sys.stderr = None
import edm
numbers = signal.SIGINT, signal.SIGTERM
before = [signal.getsignal(number) for number in numbers]
def app(space):
    space.mmap(1 << 20)[0] = 1
    print("application", flush=True)
edm.run(app)
print([signal.getsignal(number) for number in numbers] == before, flush=True)
"""
    ended = mpirun("-c", code)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.split() == ["application", "True"]
