"""advice.py: prefetch, forget and resident."""

import pytest
from conftest import PROGRAMS, needs_userfaultfd

pytest.importorskip("numpy")
pytestmark = needs_userfaultfd


def test_pages_come_before_they_are_touched_and_leave_when_they_are_not_needed(way):
    ended = way.run(PROGRAMS / "advice.py", 600)
    assert ended.returncode == 0 and "advice SUCCESS" in ended.stdout, ended.stdout


@pytest.mark.parametrize("high", [2, 8, 1100], ids="high {}".format)
def test_they_do_so_however_few_pages_may_be_here(alone, high):
    ended = alone.run(PROGRAMS / "advice.py", high)
    assert ended.returncode == 0 and "advice SUCCESS" in ended.stdout, ended.stdout
