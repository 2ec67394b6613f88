"""mpi_client.py and dms.py, under a real mpirun: MpiStore does what PageStore does."""

import pytest
from conftest import PROGRAMS

ended = {}  # what each job of stores.py has printed: mpirun takes longer than the most of them


def succeeds(mpirun, what, disk="-", dms=1):
    actions = ("same", "lost") if disk != "-" else ("same", "threads", "unread", "idle", "refused")
    if dms > 1:
        actions = ("same",) if disk != "-" else ("same", "threads")
    job = (dms, disk != "-", actions if what in actions else (what,))
    if job not in ended:
        ended[job] = None
        ended[job] = mpirun(PROGRAMS / "stores.py", disk, *job[2], ranks=dms + 1)
    assert ended[job], "see the first test with this job"
    assert f"{what} SUCCESS" in ended[job].stdout, ended[job].stdout[-5000:]
    assert ended[job].returncode == 0


SOME = pytest.mark.parametrize("dms", [1, 2, 3], ids=["one DMS", "two", "three"])


@SOME
@pytest.mark.parametrize("keep", [False, True], ids=["scratch", "kept"])
def test_the_same_operations_have_the_same_results_as_with_a_page_store(
    mpirun, tmp_path, keep, dms
):
    succeeds(mpirun, "same", tmp_path / "disk" if keep else "-", dms)


@SOME
def test_several_threads_use_one_store_at_once(mpirun, dms):
    succeeds(mpirun, "threads", "-", dms)


def test_an_answer_that_nobody_takes_keeps_nobody_from_being_served(mpirun):
    succeeds(mpirun, "unread")


def test_a_refusals_errno_and_reason_arrive_and_no_page_has_moved(mpirun):
    succeeds(mpirun, "refused")


def test_a_page_that_the_disk_has_lost_is_told_and_its_neighbours_are_read(mpirun, tmp_path):
    succeeds(mpirun, "lost", tmp_path / "disk")


def test_an_idle_dms_takes_little_of_a_core(mpirun):
    succeeds(mpirun, "idle")
