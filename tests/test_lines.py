"""lines.py: which Python lines a report names, and that asking for them harms no program."""

import ast
import json
import os
import re
import sys

import pytest
from conftest import PROGRAMS, needs_userfaultfd

from edm import lines
from edm import uffd_ctypes as u
from edm.lspt import LSPT

pytestmark = needs_userfaultfd
PROGRAM = PROGRAMS / "lines.py"
START = 0x10_0000_0000


def number_of(words):
    """Of the program's line that has this comment."""
    return 1 + next(n for n, line in enumerate(PROGRAM.read_text().splitlines()) if words in line)


HOT = f"{PROGRAM}:{number_of('# the hot line')} in often"
OTHER = f"{PROGRAM}:{number_of('# the other line')} in seldom"


@pytest.fixture
def found(run, tmp_path):
    """Run the program's function: ([[line, (address, bytes), faults, seconds]], its areas, the rest of what
    it has printed). Longest first."""

    def found(what, *arguments):
        page = tmp_path / "page.html"
        # 3.12 and later warn of a fork beside a thread.
        ended = run(
            sys.executable, "-W", "ignore::DeprecationWarning", "-m", "edm", "run", "--no-numpy",
            "--resident", "4M", "--readahead", "1", "--start-addr", START, "--report", page, PROGRAM, what,
            *arguments,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout
        report = json.loads(re.search(r'id="report">(.*?)</script>', page.read_text())[1])
        assert all(faults > 0 or waited == 0 for *_, faults, waited in report["lines"])
        in_all = sum(
            report["samples"][-1][name] for name in report["samples"][-1] if "fault" in name
        )
        assert sum(faults for *_, faults, _ in report["lines"]) <= in_all
        table = [
            [line, (START + page * u.PAGE_SIZE, count * u.PAGE_SIZE), faults, waited / 1e9]
            for line, page, count, faults, waited in report["lines"]
        ]
        areas, _, rest = ended.stdout.partition("\n")
        areas = [ast.literal_eval(area) for area in re.findall(r"\(.*?\)", areas)]
        return sorted(table, key=lambda row: -row[3]), areas, rest, in_all

    return found


def test_the_hot_line_is_first_and_each_line_has_its_array_faults_and_seconds(found):
    table, areas, rest, in_all = found("plain")
    (hot, array, faults, seconds), (other, others_array, fewer, less) = table[:2]
    assert (hot, other) == (HOT, OTHER) and rest == ""
    small, large = sorted(areas, key=lambda area: area[1])
    assert (array, others_array) == (large, small)
    assert faults + fewer > 0.9 * in_all and faults > 4 * fewer > 0
    assert seconds > less > 0


def test_the_hot_line_is_told_whatever_its_thread_is_called(found):
    table, *_ = found("named")
    assert table[0][0] == HOT


@pytest.mark.parametrize("what", ["blocking", "handling"])
def test_a_program_that_blocks_or_handles_the_signal_does_not_notice(found, what):
    table, _, rest, in_all = found(what)
    assert rest == ""
    assert sum(faults for line, _, faults, _ in table if line == lines.NO_LINE) > 0.8 * in_all


def test_threads_are_asked_each_for_its_line(found):
    table, _, rest, _ = found("threads")
    assert rest == "" and {line for line, *_ in table[:2]} == {HOT, OTHER}


def test_a_program_that_forks_and_becomes_another_lives_on(found):
    table, _, rest, _ = found("forking")
    assert rest == "replaced\n" and {line for line, *_ in table} >= {HOT, OTHER}


def test_a_file_that_has_the_descriptor_now_stays_empty(found, tmp_path):
    file = tmp_path / "file"
    found("closing", file)
    assert file.read_bytes() == b""


def test_a_thread_in_a_system_call_is_not_asked_but_counted(found):
    fd, how = u.open_userfaultfd()
    os.close(fd)
    if how == u.USER_MODE:
        pytest.skip("this user's system calls have no faults")
    table, areas, _, in_all = found("reading")
    line, array, *_ = table[0]
    assert line == lines.NO_LINE and array in areas
    # On a busy machine the pager may hear of the area when some of its pages have faulted already.
    assert sum(faults for line, _, faults, _ in table if line == lines.NO_LINE) > 0.9 * in_all


def test_the_innermost_frame_that_is_no_librarys_is_told(tmp_path):
    folder = os.path.dirname(lines.__file__)
    cases = {
        ("/x/site-packages/numpy/core/fromnumeric.py", f"{folder}/numpy_mem_handler.py", "/x/my.py"): "/x/my.py",
        (f"{os.path.dirname(os.__file__)}/shutil.py", "<string>", "<frozen runpy>"): "<string>",
        (f"{folder}/examples/sort.py", "/x/my.py"): f"{folder}/examples/sort.py",
        ("<__array_function__ internals>", "<frozen runpy>"): "<__array_function__ internals>",
    }  # fmt: skip
    with open(tmp_path / "answer", "wb+", buffering=0) as file:
        table = {}
        made = lines.Lines(
            os.getpid(), file.fileno(), file.fileno(), LSPT(10, 5, 2, False, -1, 0), table
        )
        for files, expected in cases.items():
            frames = [f'  File "{name}", line {n} in f{n}\n' for n, name in enumerate(files)]
            file.truncate(0)
            os.pwrite(file.fileno(), "".join(["Stack\n", *frames]).encode(), 0)
            made._of_sample = range(2, 5), 3, 1000
            table.clear()
            made._hear(0)
            n = files.index(expected)
            assert table == {(f"{expected}:{n} in f{n}", 2, 3): [3, 1000]}


def test_without_a_report_there_is_no_handler_and_no_descriptor(run):
    code = (
        "import os, signal\nstatus = open('/proc/self/status').read()\n"
        "caught = int(status.partition('SigCgt:')[2].split()[0], 16)\n"
        "print(caught >> signal.SIGURG - 1 & 1, "
        "any('edm lines' in os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')))"
    )
    ended = run(sys.executable, "-m", "edm", "run", "--no-numpy", "-c", code)
    assert ended.stdout == "0 False\n"
