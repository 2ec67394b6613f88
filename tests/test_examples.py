"""The examples: that each comes out, and logs, as the wiki says, and draws what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import TRACKERS, find_mpirun, needs_userfaultfd

pytestmark = needs_userfaultfd


# The wiki's page: what its Examples 1 and 2 print. One word in it is spelled wrong.
WIKI = (Path(__file__).parent / "wiki-end-to-end-examples.txt").read_text()
EXAMPLE_1, EXAMPLE_2 = WIKI.replace("HADNLING", "HANDLING").split("Example #2:")


def actor(line):
    """The box that a line of the log is about."""
    if name := re.match(r"\[\w+\]-\[?(EDM CLIENT|\w+)[]-]", line):
        return name[1].replace("LPET", "Lpet")
    for words, who in (
        ("PAGE FAULT", "DmHandler"), ("LPET", "Lpet"), ("LSPT", "Lpet"), ("pfn : ", "Lpet"),
        ("page list state", "Lpet"), ("SPT", "DMS"), ("location : ", "DMS"),
    ):  # fmt: skip
        if words in line:
            return who
    return "Usercode"


def log_of(text):
    """{actor: its lines} of what is the log's in a text, without time stamps and page frame numbers."""
    lines = {}
    for line in text.splitlines():
        line = re.sub(r"^\[\w{3} \w{3} [^]]*\]:", "", line)
        is_of_the_log = re.match(r"\[\w+\]-.|-+ ?(START|FINISH|END) |address : ", line)
        if is_of_the_log:
            line = re.sub(r"pfn : \d+", "pfn : ", line)
            lines.setdefault(actor(line), []).append(line.rstrip())
    return lines


def wikis(way, text):
    """log_of the wiki's text. On one machine there is no MPI, and the store is in the pager."""
    lines = log_of(text)
    if way.alone:
        lines.pop("MpiClient", None)
        ready = "[Debug]-[DMS] - DMS ready for serving requests"
        lines["DMS"] = [line for line in lines.get("DMS", []) if line != ready]
    return lines


def find(part, whole, begin):
    """Where in `whole`, from begin on, these lines follow each other: the index behind them."""
    for at in range(begin, len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at + len(part)
    return pytest.fail("\n".join(["not there:", *part, "in:", *whole[begin:]]))


def test_example_1_prints_what_the_wiki_says_in_the_wikis_order(way):
    ended = way.run("-m", "edm.examples.zero_page", "--log-level", "debug")
    assert ended.returncode == 0, ended.stdout
    expected = wikis(way, EXAMPLE_1)
    assert sum(map(len, expected.values())) == (18 if way.alone else 22)
    assert log_of(ended.stdout) == expected
    assert "---FINISH HANDLING PAGE FAULT--------------\n\n\n" in ended.stdout


@pytest.mark.parametrize("tracker", TRACKERS)
def test_example_2_prints_what_the_wiki_says_in_the_wikis_order(way, tracker):
    ended = way.run(
        "-m", "edm.examples.eviction", "--log-level", "debug", "--idle-tracker", tracker
    )
    assert ended.returncode == 0, ended.stdout
    found, at = log_of(ended.stdout), {}
    # What the wiki shows of each step. "...": it leaves something out.
    shown = [
        part for part in re.split(r"\nstep \d:|\n\.\.\.\n|Eventually", EXAMPLE_2) if log_of(part)
    ]
    assert len(shown) == 5
    *others, last = [wikis(way, part) for part in shown]
    for part in others:
        for who, lines in part.items():
            at[who] = find(lines, found[who], at.get(who, 0))
    for who, lines in last.items():
        assert found[who][at.get(who, 0) :][-len(lines) :] == lines, "and nothing comes after it"


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_page_that_is_evicted_can_be_followed_through_all_actors(way, tracker):
    ended = way.run(
        "-m", "edm.examples.eviction", "--log-level", "debug", "--idle-tracker", tracker
    )
    # Either process may be the first to write its line.
    found = log_of(re.split("reached high threshold|START LPET", ended.stdout, maxsplit=1)[1])
    page = "0x1d4d000"
    expected = {
        "Lpet": [
            f"[Info]-[LPET] checking if page in addr {page} is idle",
            f"[Info]-[LPET] sending eviction request for page in addr {page}",
            f"[Info]-[Lpet] - received ack for eviction of page in address : {page}",
        ],
        "DMS": [
            f"[Debug]-[DMS] - Handle page eviction in address {page}",
            f"[Info]-[DMS] - page in address {page} stored in disk",
        ],
        "MpiClient": [
            f"[Debug]-[MpiClient] - send lpet's request to evict page in address {page}",
            f"[Debug]-[MpiClient] - got ack for evict page of lpet in address {page} Ack message :",
        ],
    }
    for who, lines in expected.items():
        if who in found:
            of_it = [line for line in found[who] if page in line and line[0] == "["]
            assert of_it[-len(lines) :] == lines
    assert ("MpiClient" in found) != way.alone
    assert found["DMS"].count("[Debug]-[DMS] - Page evicted successfully, sending ack") == 2
    sleeps = "[Debug]-[DmHandler] - avoid memory flood- dmhandler goes to sleep"
    assert sleeps in found["DmHandler"][:2], "and sleeps until LPET has ended"
    end, goes_on = "---END LPET---", "[DmHandler] - send request for the page in address 0x1d5c000"
    assert 0 < ended.stdout.index(end) < ended.stdout.index(goes_on)


def runs_of_lpet(output):
    """(start address, pages that were asked, pages that left) of each run."""
    return [
        (
            re.search(r"start address: (\w+)", run)[1],
            re.findall(r"checking if page in addr (\w+) is idle", run),
            re.findall(r"received ack for eviction of page in address : (\w+)", run),
        )
        for run in re.findall(r"-START LPET-.*?-END LPET-", output, re.DOTALL)
    ]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_flow_takes_idle_pages_passes_hot_ones_and_goes_on_where_it_stopped(way, tracker):
    ended = way.run("-m", "edm.examples.flow", "--idle-tracker", tracker)
    assert ended.returncode == 0 and "compare pages SUCCESS" in ended.stdout, ended.stdout
    area_1 = [f"{0x1D4C000 + n * 4096:#x}" for n in range(10)]
    area_2 = [f"{0x1E14000 + n * 4096:#x}" for n in range(10)]
    area_3 = ["0x1e82000"]
    assert (
        runs_of_lpet(ended.stdout)[:4]
        == [
            (area_1[0], area_1 + area_2, area_1),  # all were hot
            (area_2[0], area_2, area_2),  # idle
            (area_3[0], area_3 + area_1 + area_2[1:], area_3 + area_1[:9]),  # all were hot
            (area_1[9], area_1[9:] + area_2, area_1[9:] + area_2[1:]),  # idle, but for one
        ]
    )


@pytest.mark.parametrize("tracker", TRACKERS)
def test_from_end_to_end_every_byte_is_right(way, tracker):
    ended = way.run("-m", "edm.examples.end_to_end", "--idle-tracker", tracker)
    assert ended.returncode == 0, ended.stdout
    assert "end to end SUCCESS: every byte is as it was written" in ended.stdout
    assert len(runs_of_lpet(ended.stdout)) >= 2


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_eviction_policy_evicts_exactly_the_idle_pages(way, tracker):
    ended = way.run("-m", "edm.examples.eviction_policy", "--idle-tracker", tracker)
    assert ended.returncode == 0, ended.stdout
    assert f"eviction policy SUCCESS, with the idle tracker {tracker}" in ended.stdout


@pytest.mark.parametrize("tracker", TRACKERS)
def test_an_array_eight_times_the_resident_limit_ends_with_every_byte_right(way, tracker):
    ended = way.run(
        "-m", "edm.examples.bigger_than_memory", "--size", "16", "--high-threshold", "512",
        "--idle-tracker", tracker,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    assert "every byte is right: SUCCESS" in ended.stdout
    for figure in ("faults", "evictions", "to the store", "from it", "latency"):
        assert re.search(rf"^{figure} +\d+", ended.stdout, re.MULTILINE), figure
    peak, allowed = re.search(r"at most (\d+) pages, of (\d+) allowed", ended.stdout).groups()
    assert int(peak) <= int(allowed) == 512


def test_a_python_that_is_not_position_independent_keeps_its_heap_from_the_wikis_addresses(
    run, tmp_path
):
    python = Path("/usr/bin/python3").resolve()
    if not python.exists() or python.read_bytes()[16:18] != b"\2\0":  # ET_EXEC
        pytest.skip(f"{python} is none, or is position-independent")
    (tmp_path / "edm").symlink_to(Path(__file__).parent.parent)
    code = (
        "from edm.examples import layout\n"
        "layout.parse_arguments('an example')\n"
        "heap = next(line for line in open('/proc/self/maps') if line.endswith('[heap]\\n'))\n"
        "print(all(int(end, 16) < 0x1B58000 for end in heap.split()[0].split('-')))"
    )
    for _ in range(3):  # at random it would be so in one run of fifty
        ended = run("/usr/bin/env", f"PYTHONPATH={tmp_path}", python, "-c", code)
        assert ended.stdout == "True\n"


EXAMPLES = ["zero_page", "eviction", "eviction_policy", "flow", "end_to_end"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_layout_is_drawn_in_the_terminal_and_as_one_svg_picture_a_step(way, example, tmp_path):
    svg = tmp_path / "layout.svg"
    ended = way.run("-m", f"edm.examples.{example}", "--layout", svg)
    assert ended.returncode == 0, ended.stdout
    drawn = re.findall(r"^  (0x\w+)  area \d   (\[.*\])$", ended.stdout, re.MULTILINE)
    marks = "".join(boxes for _, boxes in drawn)
    root = ElementTree.parse(svg).getroot()
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    # One box a page and step, the same in both.
    assert len(titles) == marks.count("[") > 0
    assert sum(t.endswith("DISK") for t in titles) == marks.count("D")
    assert sum("INSTANCE" in t for t in titles) == marks.count("I")


IDLE_KERNEL = os.environ.get("EDM_TEST_IDLE_KERNEL", "")


@pytest.mark.skipif(not shutil.which(IDLE_KERNEL), reason="EDM_TEST_IDLE_KERNEL names no command")
@pytest.mark.skipif(TRACKERS[1].marks[0].args[0] is False, reason="this kernel has idle tracking")
def test_the_idle_bitmap_where_the_kernel_has_it(request):
    """EDM_TEST_IDLE_KERNEL COMMAND... runs COMMAND on a kernel with idle page tracking, as root."""
    # That machine is some twenty times slower, so it boots once, and runs little.
    python = sys.executable
    commands = [[python, "-m", "edm.examples.eviction_policy"]]  # auto must take it
    mpirun = find_mpirun()
    if long := request.config.getoption("--long"):
        commands.append([python, "-m", "edm", "doctor"])  # this machine has everything
        example = ("-m", "edm.examples.eviction", "--idle-tracker", "bitmap")
        commands.append([mpirun, "-n", 2, python, *example])
    lines = [" ".join(map(str, command)) + " || exit 1" for command in commands]
    for _ in range(3):  # an emulated kernel has crashed at 0.8 s, before the script began
        ended = subprocess.run(
            [IDLE_KERNEL, "bash", "-c", "\n".join(["echo booted", *lines])],
            text=True, capture_output=True, timeout=400, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        output = ended.stdout + ended.stderr
        if "booted" in output:
            break
    assert ended.returncode == 0, output
    assert "eviction policy SUCCESS, with the idle tracker bitmap" in output
    for words in ("compare pages SUCCESS", "EDM can run here."):
        assert (words in output) == long
    assert not re.search("^(missing|without) +(?!the tests)", output, re.MULTILINE)
