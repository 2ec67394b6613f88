"""edm.py and log.py: what the settings refuse, and how lines look."""

import argparse
import dataclasses
import logging
import os
import re
import select
import socket
import subprocess
import sys

import pytest

import edm
from edm import log

WRONG = {
    "start_addr": {"start_addr": 0x1001},
    "end_addr": {"start_addr": 0x2000, "end_addr": 0x2000},
    "high_threshold": {"high_threshold": 1},
    "low_threshold": {"high_threshold": 4, "low_threshold": 4},
    "readahead": {"readahead": 0},
    "evict_batch": {"evict_batch": 257},
    "idle_tracker": {"idle_tracker": "psychic"},
    "log_level": {"log_level": "loud"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_a_valueerror_of_one_line_that_names_it(name):
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
        edm.Config(**WRONG[name])


@pytest.mark.parametrize("high", [2, 4, 16, 1000])
def test_the_low_threshold_follows_the_high_one(high):
    assert 0 < edm.Config(high_threshold=high).low_threshold < high


def test_every_setting_has_an_option_and_its_help(monkeypatch):
    arguments = [
        "program", "--start-addr", "0x1B58000", "--end-addr", "0x1F40000", "--high-threshold", "4",
        "--low-threshold", "2", "--disk", "/tmp/x", "--idle-tracker", "unmap",
        "--log-level", "debug", "--readahead", "16", "--evict-batch", "8", "--no-clean-tracking",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    parser = argparse.ArgumentParser()
    _, config = edm.parse_arguments(parser)
    assert config == edm.Config(
        start_addr=0x1B58000, end_addr=0x1F40000, high_threshold=4, low_threshold=2,
        disk="/tmp/x", idle_tracker="unmap", readahead=16, evict_batch=8, clean_tracking=False,
        log_level="debug",
    )  # fmt: skip
    for setting in dataclasses.fields(edm.Config):
        assert f"--{setting.name.replace('_', '-')} " in parser.format_help()


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


def test_the_lspt_is_printed_as_the_wiki_prints_it():
    assert log.lspt_table([(0x1D4C000, 45052, False)]) == (
        "page list state: \n"
        "-----START LSPT ----\n"
        "address : 0x1d4c000  pfn : 45052  is_idle: 0\n"
        "-----END LSPT ----"
    )


def test_the_log_is_silent_below_warning_by_default(capsys):
    log.start(edm.Config().log_level)
    log.logger("DMS").info("no")
    log.logger("DMS").warning("yes")
    assert "no" not in capsys.readouterr().err
    assert not log.logger("DmHandler").isEnabledFor(logging.INFO)


def test_importing_edm_does_not_initialise_mpi():
    code = "import edm, sys; assert 'mpi4py.MPI' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_system_than_linux_is_told_so():
    code = "import sys; sys.platform = 'darwin'; import edm"
    ended = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, check=False
    )
    assert ended.returncode != 0
    assert "EDM needs Linux 5.19 or later; this is darwin" in ended.stderr.splitlines()[-1]


def test_a_job_is_not_ended_before_the_launcher_has_read_why():
    code = """
import fcntl, os, sys, termios
from edm import edm
class World:
    def Abort(self, status):  # as MPICH's launcher: what is unread now is lost
        unread = fcntl.ioctl(2, termios.FIONREAD, bytes(4))
        os._exit(status if not any(unread) else 99)
edm.TELLING = 30
print("the reason", file=sys.stderr)
edm._abort(World(), 7)
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
    code = "from edm import edm; World = type('World', (), {'Abort': lambda *_: None})"
    code += "; print('the reason', file=edm.sys.stderr); edm._abort(World(), 7)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as job:
        assert job.wait(20) == 7


def test_a_traceback_is_written_in_one_piece():
    code = """
import os, sys
from edm import edm
try:
    raise RuntimeError("boom")
except RuntimeError as error:
    with edm._in_one_piece(sys.stderr):
        sys.excepthook(type(error), error, error.__traceback__)
print("as before", end="", file=sys.stderr)
os._exit(0)
"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet a write
    with ours:
        subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
        theirs.close()
        trace, after, end = (ours.recv(1 << 16) for _ in range(3))
    assert trace.startswith(b"Traceback") and trace.endswith(b"\nRuntimeError: boom\n")
    assert (after, end) == (b"as before", b"")
