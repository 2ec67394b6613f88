"""advice.py: prefetch, forget and resident."""

import errno
from types import SimpleNamespace

import pytest
from conftest import PROGRAMS, needs_userfaultfd

from edm.pager import Pager

pytest.importorskip("numpy")
pytestmark = needs_userfaultfd


def test_an_error_of_advice_ends_the_job_as_nobody_waits_for_its_answer():
    def forget(*request):
        raise OSError(errno.EIO, "an eviction has failed, in the midst of it")

    answers, stopped = [], iter((False, True))
    mailbox = SimpleNamespace(
        wait=lambda: None,
        requests=lambda: [("forget", ([],))],
        answer=lambda *a: answers.append(a),
    )
    lspt = SimpleNamespace(stopped=lambda: next(stopped))
    pager = SimpleNamespace(_lspt=lspt, _mailbox=mailbox, forget=forget)
    with pytest.raises(OSError, match="has failed"):
        Pager._answer(pager)
    assert not answers


OBJECTS = """
import edm, numpy as np
def app(space):
    with edm.numpy_allocator():
        array = np.zeros((1 << 10, 1 << 10), dtype=object)
    edm.prefetch(array, [1, 2])
    edm.forget(array[:, ::2], [])
    print(edm.resident(array), edm.resident(array, [0]), edm.resident(array[0], [0]))
    array[0, 0] = np.zeros((1 << 10, 1 << 10))
    print(edm.resident(array[0], [0]))
edm.run(app)
"""


def test_advice_may_be_about_arrays_of_objects(alone):
    ended = alone.run("-c", OBJECTS)
    assert ended.returncode == 0 and ended.stdout.split()[1:] == ["2", "1", "1"], ended.stdout


def test_pages_come_before_they_are_touched_and_leave_when_they_are_not_needed(way):
    ended = way.run(PROGRAMS / "advice.py", 600)
    assert ended.returncode == 0 and "advice SUCCESS" in ended.stdout, ended.stdout


@pytest.mark.parametrize("high", [2, 8, 1100], ids="high {}".format)
def test_they_do_so_however_few_pages_may_be_here(alone, high):
    ended = alone.run(PROGRAMS / "advice.py", high)
    assert ended.returncode == 0 and "advice SUCCESS" in ended.stdout, ended.stdout
