"""advice.py: prefetch, forget and resident."""

import pytest
from conftest import PROGRAMS, needs_userfaultfd

pytest.importorskip("numpy")
pytestmark = needs_userfaultfd


@pytest.mark.parametrize("high", [2, 8, 600, 1100], ids="high {}".format)
def test_pages_come_before_they_are_touched_and_leave_when_they_are_not_needed(way, high):
    ended = way.run(PROGRAMS / "advice.py", high)
    assert ended.returncode == 0 and "advice SUCCESS" in ended.stdout, ended.stdout
