"""The order of an eviction's steps (lpet.py): no update is lost in it, and the two wrong orders lose some.

The wrong orders are subclasses in programs/stress.py. They show that the stress would find a fault.
"""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import PROGRAMS, TRACKINGS, needs_userfaultfd

pytestmark = [
    needs_userfaultfd,
    pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler, cc"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = tmp_path_factory.mktemp("stress") / "stress.so"
    source = PROGRAMS / "stress.c"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-lpthread"]
    subprocess.run(command, check=True)
    return library


def stress(run, library, order, way, threads, seconds, tracking="auto"):
    """(how many words were wrong, pages evicted with their bytes, without)."""
    arguments = [library, order, way, threads, seconds, tracking]
    ended = run(sys.executable, PROGRAMS / "stress.py", *arguments, timeout=90)
    found = re.search(r"wrong (\d+) of (\d+), \((\d+), (\d+)\) evicted", ended.stdout)
    assert ended.returncode == 0 and found, ended.stdout
    assert int(found[2]) > 1000, ended.stdout
    return int(found[1]), int(found[3]), int(found[4])


@pytest.fixture
def seconds(request):
    return 60 if request.config.getoption("--long") else 1.5


@pytest.mark.parametrize("way, threads", [("the wiki's way", 2), ("by age", 4)])
def test_no_update_is_lost_while_pages_leave(run, library, way, threads, seconds):
    wrong, dirty, clean = stress(run, library, "right", way, threads, seconds)
    assert wrong == 0 and dirty > 100 and clean > 0


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_no_update_is_lost_however_first_writes_are_noticed(run, library, tracking, seconds):
    wrong, dirty, clean = stress(run, library, "right", "whole batches", 4, seconds, tracking)
    assert wrong == 0 and dirty > 100 and (clean > 0 or tracking == "none")


@pytest.mark.undisturbed
@pytest.mark.parametrize("order", ["bytes first", "marks first"])
def test_a_wrong_order_is_found_within_ten_seconds(run, library, order):
    for _ in range(5):
        if stress(run, library, order, "whole batches", 4, 1)[0]:
            return
    pytest.fail("the stress would not find a fault")
