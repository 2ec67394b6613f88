"""mpi_client.py and dms.py, under a real mpirun: MpiStore does what PageStore does."""

import pytest
from conftest import PROGRAMS


def succeeds(ended):
    assert ended.returncode == 0 and "stores SUCCESS" in ended.stdout, ended.stdout[-5000:]
    return ended.stdout


@pytest.mark.parametrize("keep", [False, True], ids=["scratch", "kept"])
def test_the_same_operations_have_the_same_results_as_with_a_page_store(mpirun, tmp_path, keep):
    succeeds(mpirun(PROGRAMS / "stores.py", "same", *[tmp_path / "disk"] * keep))


def test_several_threads_use_one_store_at_once(mpirun):
    succeeds(mpirun(PROGRAMS / "stores.py", "threads"))


def test_an_answer_that_nobody_takes_keeps_nobody_from_being_served(mpirun):
    succeeds(mpirun(PROGRAMS / "stores.py", "unread"))


def test_a_refusals_errno_and_reason_arrive_and_no_page_has_moved(mpirun):
    succeeds(mpirun(PROGRAMS / "stores.py", "refused"))


def test_a_page_that_the_disk_has_lost_is_told_and_its_neighbours_are_read(mpirun, tmp_path):
    succeeds(mpirun(PROGRAMS / "stores.py", "lost", tmp_path / "disk"))


def test_whoever_waits_for_a_dms_that_was_killed_is_told_within_a_second(mpirun):
    ended = mpirun(PROGRAMS / "stores.py", "killed")
    assert "stores SUCCESS" in ended.stdout, ended.stdout[-5000:]


def test_an_idle_dms_takes_little_of_a_core(mpirun):
    succeeds(mpirun(PROGRAMS / "stores.py", "idle"))
