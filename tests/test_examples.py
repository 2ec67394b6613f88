"""The examples: that each comes out as the wiki says, and draws what it says."""

import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import TRACKERS, find_mpirun, needs_userfaultfd

pytestmark = needs_userfaultfd


def spt_tables(output):
    """Every SPT that was printed, as {address: location}."""
    tables = re.findall(r"-----START SPT ----\n(.*?)------END SPT-----", output, re.DOTALL)
    return [dict(re.findall(r"address : (\S+)  location : (\S+)", table)) for table in tables]


MESSAGES = (
    "[Debug]-[DMS] - DMS ready for serving requests",
    "[Debug]-[MpiClient] - send DmHandler's request for the page in address 0x1d4c000",
    "[Debug]-[MpiClient] - get DMS's response for the page in address 0x1d4c000",
    "[Debug]-[MpiClient] - RequestPageFromDMS succeeded.",
)


def test_zero_page_is_example_1_of_the_wiki(way):
    ended = way.run("-m", "edm.examples.zero_page", "--log-level", "debug")
    assert ended.returncode == 0, ended.stdout
    for line in (
        *(() if way.alone else MESSAGES),
        "[Debug]-[EDM CLIENT] - INIT",
        "[Debug]-[Usercode] : User code main function start running",
        "[Info]-[DmHandler] - UFFD_EVENT_PAGEFAULT in address = 0x1d4c000",
        "[Info]-[DmHandler] - send request for the page in address 0x1d4c000 from DMS",
        "[Info]-[DMS] - get request to send content of page in address: 0x1d4c000",
        "[Debug]-[DMS] - page accessed first time, set info - new_page",
        "[Debug]-[DMS] - SPT updated. Current state: ",
        "[Debug]-[DMS] - page in address: 0x1d4c000 sent to app",
        "[Info]-[DmHandler] - received ack for page in address : 0x1d4c000 (first access)",
        "[Info]-[DmHandler] - copying zero page to address : 0x1d4c000",
        "area_1[0] x",
        "[Debug]-[EDM CLIENT] - SHUTDOWN!",
    ):
        assert line in ended.stdout, line
    assert spt_tables(ended.stdout)[0] == {"0x1d4c000": "INSTANCE_0"}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_eviction_is_example_2_of_the_wiki(way, tracker):
    ended = way.run("-m", "edm.examples.eviction", "--idle-tracker", tracker)
    assert ended.returncode == 0, ended.stdout
    here, disk = "INSTANCE_0", "DISK"
    tables = spt_tables(ended.stdout)
    area_1 = ["0x1d4c000", "0x1d4d000", "0x1d4e000", "0x1d4f000"]
    assert dict.fromkeys(area_1, here) in tables
    step_2 = dict(zip([*area_1, "0x1d5c000"], [disk, disk, here, here, here], strict=True))
    assert step_2 in tables
    assert tables[-1] == step_2 | {"0x1d4c000": here}
    assert "[Info]-[DmHandler] - reached high threshold, waking up lpet" in ended.stdout
    assert "[Info]-[Lpet] - start address: 0x1d4c000" in ended.stdout
    lspt = re.search(r"-----START LSPT ----\n(.*?)-----END LSPT ----", ended.stdout, re.DOTALL)[1]
    assert re.findall(r"address : (\S+)  pfn : \d+  is_idle: (\d)", lspt) == [
        (address, "0") for address in area_1
    ]
    assert "received ack for page in address : 0x1d4c000 (previously accessed)" in ended.stdout
    assert "copying page content from DMS to address : 0x1d4c000" in ended.stdout
    assert "compare pages SUCCESS" in ended.stdout


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
    for figure in ("faults", "evictions", "to the DMS", "from it", "latency"):
        assert re.search(rf"^{figure} +\d+", ended.stdout, re.MULTILINE), figure
    peak, allowed = re.search(r"at most (\d+) pages, of (\d+) allowed", ended.stdout).groups()
    assert int(peak) <= int(allowed) == 512


@pytest.mark.parametrize("example", ["zero_page", "eviction", "eviction_policy"])
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
def test_the_idle_bitmap_where_the_kernel_has_it():
    """EDM_TEST_IDLE_KERNEL COMMAND... runs COMMAND on a kernel with idle page tracking, as root."""
    # That machine is some twenty times slower, so it boots once, and runs little.
    python = sys.executable
    commands = [
        [python, "-m", "edm.examples.eviction_policy"],  # auto must take it
        [python, "-m", "edm", "doctor"],  # this machine has everything
    ]
    if mpirun := find_mpirun():
        example = ("-m", "edm.examples.eviction", "--idle-tracker", "bitmap")
        commands.append([mpirun, "-n", 2, python, *example])
    script = "\n".join(" ".join(map(str, command)) + " || exit 1" for command in commands)
    ended = subprocess.run(
        [IDLE_KERNEL, "bash", "-c", script],
        text=True, capture_output=True, timeout=400, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    assert ("compare pages SUCCESS" in output) == bool(mpirun)
    assert "eviction policy SUCCESS, with the idle tracker bitmap" in output
    assert "EDM can run here." in output
    assert not re.search("^(missing|without) ", output, re.MULTILINE)
