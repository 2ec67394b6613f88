"""What the README promises of each failure, by causing it.

Which tests cause the failure that a row of its table names; some are in other files
of this folder:

nothing: threads, eviction, readahead, munmap, sync all at once
    test_four_threads_lose_no_update_and_nothing_of_edms_grows
    test_no_update_is_lost_while_pages_leave
    test_faults_that_need_room_do_not_wait_for_a_sync_to_end
    test_any_sequence_of_operations_gives_what_a_plain_bytearray_gives
the disk is full, or a write fails (ENOSPC, EIO, short writes)
    test_while_writing_fails_nothing_is_lost_and_then_the_application_goes_on
    test_when_the_disk_is_full_nothing_is_lost_and_the_application_goes_on_when_there_is_room
    test_refusals_after_a_long_silence_do_not_end_the_job_at_once
    test_an_area_can_be_unmapped_while_the_disk_refuses_everything
    test_when_the_disk_is_full_and_the_application_can_go_no_further_the_job_ends_and_says_why
    test_a_program_whose_kept_disk_is_full_at_its_end_does_not_end_as_if_all_were_well
    test_on_a_full_file_system_what_no_sync_needs_makes_room_for_what_is_new
a page can't be read back: an I/O error, or a checksum of a kept disk is wrong
    test_a_page_that_can_not_be_read_is_a_sigbus_too
    test_without_poison_a_page_that_can_not_be_brought_back_ends_the_job
    test_a_flipped_byte_in_a_kept_disk_is_a_sigbus_and_the_other_pages_are_whole
    test_a_flipped_bit_in_the_table_of_a_kept_disk_is_a_sigbus_for_the_next_job
    test_a_page_that_was_lost_has_zeros_when_its_area_was_unmapped_and_can_be_used_again
    test_whatever_bit_of_a_pages_block_in_the_table_is_flipped_no_other_bytes_are_read
    test_a_page_that_the_file_system_can_not_read_is_told_and_its_neighbours_are_read
the application raises, exits, is killed, or replaces itself
    test_what_an_application_wrote_is_on_a_kept_disk_however_it_ended
    test_pager_and_lpet_end_within_a_second_of_the_application
    test_the_job_ends_with_the_applications_status
    test_a_killed_application_ends_the_job_within_five_seconds_and_leaves_no_process
the pager dies
    test_when_the_pager_is_killed_the_kernel_kills_the_application
    test_when_the_pager_is_killed_while_threads_sleep_in_faults_the_application_is_killed
    test_when_pager_or_dms_dies_the_job_ends_with_a_message_and_nothing_hangs
    test_a_job_is_not_ended_before_the_launcher_has_read_why
LPET's process dies
    test_when_lpet_is_killed_the_job_ends_and_says_so
    test_when_lpet_is_killed_in_the_midst_of_a_change_of_the_lspt_nothing_hangs
    test_when_lpet_fails_a_kept_disk_stays_as_the_last_sync_has_left_it
the DMS dies
    test_when_pager_or_dms_dies_the_job_ends_with_a_message_and_nothing_hangs
    test_when_the_dms_dies_and_the_launcher_does_nothing_the_instance_is_killed_within_a_second
    test_when_one_of_several_dmss_dies_one_line_names_its_rank_and_host_and_the_job_ends
SIGTERM or Ctrl-C
    test_after_a_signal_what_was_never_synced_is_on_the_disk_too
    test_after_a_signal_on_one_machine_what_was_never_synced_is_on_the_disk_too
    test_a_signal_writes_everything_back_and_the_next_job_goes_on
    test_sigterm_to_the_launcher_writes_everything_back_too
    test_over_mpi_an_application_that_ignores_sigterm_is_killed_with_its_subprocesses
kill -9 of everything, at any moment
    test_killed_at_any_moment_the_disk_has_what_the_last_sync_had
    test_killed_at_any_moment_two_instances_find_what_their_last_sync_had_on_two_dmss
    test_killed_at_each_call_of_a_sync_all_disks_go_back_to_the_same_one
    test_a_crash_goes_back_to_the_last_sync_whatever_was_written_since
    test_whatever_fails_and_whenever_it_ends_the_disk_keeps_its_promise
a disk file is in use by another job, of another geometry or version, damaged, or no disk of EDM's
    test_a_disk_in_use_and_other_mistakes_get_one_line
    test_a_disk_in_use_is_refused
    test_a_kept_disk_of_another_version_of_the_format_is_refused_with_one_line
    test_a_kept_disk_that_is_damaged_or_of_another_job_is_told
    test_a_killed_jobs_disk_that_was_not_kept_is_refused_for_keeping_and_else_begins_anew
    test_a_file_that_is_no_disk_is_refused_and_left_as_it_is
    test_whatever_bit_of_a_header_is_flipped_the_other_copy_is_taken_and_nothing_is_lost
messages that are malformed
    test_malformed_messages_are_refused_and_the_dms_goes_on_serving
    test_a_message_that_no_memory_can_take_is_dropped_and_told
another user is curious
    test_another_user_can_open_neither_the_disk_nor_the_memory_of_a_job
    test_the_disk_is_for_its_owner_and_edm_makes_no_socket_with_a_name_or_a_port
a sync
    test_sync_returns_how_many_pages_it_sent_and_evicts_none
"""

import contextlib
import json
import os
import pwd
import random
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import (
    PROGRAMS,
    TRACKERS,
    TRACKINGS,
    has_ended,
    has_mpich,
    needs_userfaultfd,
    read_until,
    wait_for,
    wait_until_gone,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edm.page_store import BLOCK_PAGES, BLOCK_SIZE, FORMAT, HEADER, TABLE

pytestmark = needs_userfaultfd


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


def test_every_test_that_is_named_above_exists():
    files = Path(__file__).parent.glob("test_*.py")
    there = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert set(re.findall(r"\btest_\w+", __doc__)) <= there


# ---------------------------------------------------------------- the disk


def errors(ended):
    return [line for line in ended.stdout.splitlines() if "edm: error:" in line]


@pytest.mark.parametrize("keep", [[], ["keep"]], ids=["scratch", "kept"])
def test_when_the_disk_is_full_nothing_is_lost_and_the_application_goes_on_when_there_is_room(
    way, small_file_system, keep
):
    ended = way.run(PROGRAMS / "full_disk.py", small_file_system / "disk", "frees", *keep)
    assert ended.returncode == 0 and "full disk SUCCESS" in ended.stdout, ended.stdout
    assert not errors(ended) and "Traceback" not in ended.stdout, ended.stdout


@pytest.mark.parametrize("keep", [[], ["keep"]], ids=["scratch", "kept"])
def test_while_writing_fails_nothing_is_lost_and_then_the_application_goes_on(way, tmp_path, keep):
    ended = way.run(PROGRAMS / "full_disk.py", tmp_path / "disk", "EIO", *keep)
    assert ended.returncode == 0 and "full disk SUCCESS" in ended.stdout, ended.stdout
    assert not errors(ended) and "Traceback" not in ended.stdout, ended.stdout


def test_refusals_after_a_long_silence_do_not_end_the_job_at_once(way, tmp_path):
    ended = way.run(PROGRAMS / "refused.py", tmp_path / "disk", "stall")
    assert ended.returncode == 0 and "refused SUCCESS" in ended.stdout, ended.stdout


def test_an_area_can_be_unmapped_while_the_disk_refuses_everything(way, tmp_path):
    ended = way.run(PROGRAMS / "refused.py", tmp_path / "disk", "munmap")
    assert ended.returncode == 0 and "refused SUCCESS" in ended.stdout, ended.stdout


FULL_AT_THE_END = """
import edm, sys
disk, how = sys.argv[1:]
config = edm.Config(high_threshold=8192, disk=disk, keep=True, end_addr=0x1008000000)
def app(space):
    area = space.mmap(16 << 20)
    for page in range(0, len(area), edm.PAGE_SIZE):
        area[page] = 1
    print("all is written", flush=True)
if how == "start":
    app(edm.start(config))
else:
    try:
        edm.run(app, config)
    except OSError as error:
        sys.exit(f"raised: {error}")
"""


@pytest.mark.parametrize("how", ["start", "run"])
def test_a_program_whose_kept_disk_is_full_at_its_end_does_not_end_as_if_all_were_well(
    way, small_file_system, how
):
    ended = way.run("-c", FULL_AT_THE_END, small_file_system / "disk", how)
    assert "all is written" in ended.stdout and "is not on the disk" in ended.stdout
    assert ended.returncode == (1 if way.alone and how == "run" else 2), ended.stdout
    assert (how == "run") == ("raised: [Errno 28] No space left on device" in ended.stdout)


@pytest.mark.parametrize("thresholds", [[], ["close"]], ids=["apart", "close"])
def test_when_the_disk_is_full_clean_pages_still_leave(way, small_file_system, thresholds):
    arguments = (small_file_system / "disk", "reads", *thresholds)
    ended = way.run(PROGRAMS / "full_disk.py", *arguments, timeout=40)  # soon, too
    assert ended.returncode == 0 and "full disk SUCCESS" in ended.stdout, ended.stdout


@pytest.mark.parametrize("keep", [[], ["keep"]], ids=["scratch", "kept"])
def test_when_the_disk_is_full_and_the_application_can_go_no_further_the_job_ends_and_says_why(
    way, small_file_system, keep
):
    options = [*keep, *(["impatient"] if keep or not way.alone else [])]
    grace = 2 if "impatient" in options else 5  # seconds: lpet.py's, once
    began = time.monotonic()
    ended = way.run(PROGRAMS / "full_disk.py", small_file_system / "disk", "goes on", *options)
    assert ended.returncode == way.failed() and time.monotonic() - began > grace, ended.stdout
    assert "full disk SUCCESS" not in ended.stdout and "is wrong" not in ended.stdout
    told = errors(ended)
    assert len(told) == 1 and "No space left on device" in told[0], ended.stdout
    assert "Traceback" not in ended.stdout
    # And it was the last page that did not fit, not the last batch. What is not kept is empty now.
    room = os.statvfs(small_file_system)
    assert room.f_bfree == (0 if keep else room.f_blocks)


def test_sync_returns_how_many_pages_it_sent_and_evicts_none(way):
    ended = way.run(PROGRAMS / "syncs.py")
    assert ended.returncode == 0 and "syncs SUCCESS" in ended.stdout, ended.stdout


@pytest.mark.undisturbed
def test_faults_that_need_room_do_not_wait_for_a_sync_to_end(way):
    ended = way.run(PROGRAMS / "room_in_sync.py")
    assert ended.returncode == 0 and "room SUCCESS" in ended.stdout, ended.stdout


def check_page_20_is_lost(way, ended, why):
    assert "the others are right" in ended.stdout and "never seen" not in ended.stdout, ended.stdout
    assert "page in address 0x1000014000 can't be brought back: " in ended.stdout, ended.stdout
    assert why in ended.stdout
    assert ended.returncode == way.killed_by(signal.SIGBUS), ended.stdout


def test_a_flipped_byte_in_a_kept_disk_is_a_sigbus_and_the_other_pages_are_whole(way, tmp_path):
    ended = way.run(PROGRAMS / "lost_page.py", tmp_path / "disk", "flip", "keep")
    check_page_20_is_lost(way, ended, "the checksum is wrong")


@pytest.mark.parametrize("keep", [[], ["keep"]], ids=["scratch", "kept"])
def test_a_page_that_can_not_be_read_is_a_sigbus_too(way, tmp_path, keep):
    ended = way.run(PROGRAMS / "lost_page.py", tmp_path / "disk", "EIO", *keep)
    check_page_20_is_lost(way, ended, "Input/output error")


def test_without_poison_a_page_that_can_not_be_brought_back_ends_the_job(way, tmp_path):
    ended = way.run(PROGRAMS / "lost_page.py", tmp_path / "disk", "no poison")
    assert "the others are right" in ended.stdout and "never seen" not in ended.stdout
    assert ended.returncode == way.failed(), ended.stdout
    assert "page in address 0x1000014000 can't be brought back: " in ended.stdout, ended.stdout
    told = errors(ended)
    assert len(told) == 1 and "UFFDIO_POISON" in told[0], ended.stdout
    assert "Traceback" not in ended.stdout


# ---------------------------------------------------------------- who dies


@pytest.mark.undisturbed
@pytest.mark.parametrize("who", ["pager", "DMS"])
def test_when_pager_or_dms_dies_the_job_ends_with_a_message_and_nothing_hangs(
    start, mpirun_command, who
):
    """On one machine: see test_one_machine.py."""
    job = start(*mpirun_command("-m", "edm.examples.bigger_than_memory", "--size", "256"))
    output = read_until(job, "25 %")
    parts = job.parts()
    os.kill(parts[who], signal.SIGKILL)
    if who == "pager":
        wait_for(lambda: has_ended(parts["application"]), 1)
    rest, _ = job.communicate(timeout=20)
    assert job.returncode not in (0, None), output + rest
    assert re.search(r"signal|terminat|killed|has died", rest, re.IGNORECASE), output + rest
    assert "SUCCESS" not in rest
    wait_until_gone(job)


@pytest.mark.undisturbed
def test_when_the_dms_dies_and_the_launcher_does_nothing_the_instance_is_killed_within_a_second(
    start, mpirun_command, tmp_path
):
    mpirun, *rest = mpirun_command("-m", "edm.examples.bigger_than_memory", "--size", "256")
    if not has_mpich():
        pytest.skip("with Open MPI, MPI_Abort waits for the launcher")
    errors = tmp_path / "errors"  # as nobody reads what the ranks tell
    to_file = ["sh", "-c", 'exec "$@" 2>>"$0"', errors]
    job = start(mpirun, *rest[:2], *to_file, *rest[2:])
    wait_for(lambda: errors.exists() and "25 %" in errors.read_text(), 30)
    parts = job.parts()
    launcher = [pid for pid, parent in job.processes().items() if job.pid in (pid, parent)]
    for pid in set(launcher) - set(parts.values()):
        os.kill(pid, signal.SIGSTOP)
    os.kill(parts["DMS"], signal.SIGKILL)
    ended = [parts["pager"], parts["application"]]
    wait_for(lambda: all(map(has_ended, ended)) and "has died" in errors.read_text(), 1)
    told = errors.read_text()
    assert len(re.findall("edm: error: the DMS of rank 0 on host .* has died", told)) == 1, told
    assert told.count("error") == 1 and "Traceback" not in told, told


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_several_dmss_dies_one_line_names_its_rank_and_host_and_the_job_ends(
    start, mpirun_command, rank
):
    example = ("-m", "edm.examples.bigger_than_memory", "--size", "256", "--dms", "2")
    job = start(*mpirun_command(*example, ranks=4))
    read_until(job, "25 %")
    began = time.monotonic()
    os.kill(job.ranks()[rank], signal.SIGKILL)
    rest, _ = job.communicate(timeout=20)
    assert job.returncode not in (0, None) and "SUCCESS" not in rest
    assert time.monotonic() - began < 5
    wait_until_gone(job)
    told = re.findall("edm: error: .*", rest)
    assert told == [f"edm: error: the DMS of rank {rank} on host {os.uname().nodename} has died"]


# ---------------------------------------------------------------- keep and resume

WROTE = r"wrote (\d+) pages back and synced the disk"


def resume(disk, *more):
    return ("-m", "edm.examples.resume", "--disk", disk, *more)


def check_it_goes_on(way, disk, at_least):
    again = way.run(*resume(disk, "--pages", "12000"))
    assert again.returncode == 0 and "resume SUCCESS" in again.stdout, again.stdout
    assert int(re.search(r"the space has (\d+) of", again.stdout)[1]) >= at_least


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_everything_back_and_the_next_job_goes_on(way, tmp_path, number):
    job = way.start(*resume(tmp_path / "disk", "--pages", "65536"))
    read_until(job, "page 4096")
    os.kill(job.parts()["application" if way.alone else "pager"], number)
    rest, _ = job.communicate(timeout=30)
    wait_until_gone(job)
    assert job.returncode == way.killed_by(number), rest
    # On one machine, with SIGINT, it is Python that comes to its end: that needs no word.
    why = "end" if way.alone else signal.Signals(number).name
    assert way.alone and number == signal.SIGINT or re.search(f"{why}: {WROTE}", rest), rest
    check_it_goes_on(way, tmp_path / "disk", 4096)


def test_sigterm_to_the_launcher_writes_everything_back_too(mpirun_command, start, run, tmp_path):
    disk = tmp_path / "disk"
    job = start(*mpirun_command(*resume(disk, "--pages", "65536")))
    read_until(job, "page 8192")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode != 0
    wait_until_gone(job)
    again = run(*mpirun_command(*resume(disk, "--pages", "12000")))
    assert again.returncode == 0 and "resume SUCCESS" in again.stdout, again.stdout
    assert int(re.search(r"the space has (\d+) of", again.stdout)[1]) >= 8192


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_over_mpi_the_application_gets_the_launchers_other_signals(start, mpirun_command, number):
    """As from `srun --signal` before the time is up. It may take as long as it wants."""
    code = f"""
import signal, time, edm
def app(space):
    area = space.mmap(1 << 20)
    signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
    print("ready", flush=True)
    print("got", int(signal.sigwait([{int(number)}])), flush=True)
    time.sleep(4)
    area[0] = 1
    print("done", flush=True)
edm.run(app)
"""
    job = start(*mpirun_command("-c", code))
    read_until(job, "ready")
    parts = job.parts()
    for part in ("DMS", "pager"):
        os.kill(parts[part], number)
    rest, _ = job.communicate(timeout=30)
    assert job.returncode == 0, rest
    assert f"got {int(number)}\ndone" in rest
    wait_until_gone(job)


def test_a_signal_to_the_dms_and_its_child_before_they_serve_does_not_fail_the_job(
    start, mpirun_command
):
    """As a launcher sends it to a process group."""
    job = start(*mpirun_command("-c", "import edm; edm.run(lambda space: print('runs'))"))
    dms = wait_for(lambda: job.ranks().get(0))
    child = wait_for(lambda: next((p for p, parent in job.processes().items() if parent == dms), 0))
    os.kill(dms, signal.SIGSTOP)  # it has hardly begun
    # It blocks signals for a moment when it begins, too, but does not sleep then.
    status = Path(f"/proc/{child}/status")
    wait_for(lambda: blocks(child, signal.SIGTERM) and "State:\tS" in status.read_text())
    os.kill(child, signal.SIGTERM)
    os.kill(dms, signal.SIGCONT)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, output) == (0, "runs\n")


def blocks(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"SigBlk:\t(\w+)", status)[1], 16) >> number - 1 & 1


def test_over_mpi_an_application_that_edm_has_refused_still_gets_sigterm(start, mpirun_command):
    code = """
import time, edm
from edm import uffd_ctypes as u
u.mmap(edm.Config.start_addr, 4096, u.PROT_READ, u.MAP_PRIVATE | u.MAP_ANONYMOUS | u.MAP_FIXED_NOREPLACE)
try:
    edm.run(print)
except ValueError:
    print("refused", flush=True)
    time.sleep(60)
"""
    job = start(*mpirun_command("-c", code))
    read_until(job, "refused")
    os.kill(job.parts()["pager"], signal.SIGTERM)
    job.communicate(timeout=10)
    assert job.returncode != 0
    wait_until_gone(job)


def test_over_mpi_an_application_that_ignores_sigterm_is_killed_with_its_subprocesses(
    start, mpirun_command
):
    code = """
import signal, subprocess, edm
def app(space):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with subprocess.Popen(["sleep", "60"]):
        print("waits", flush=True)
edm.run(app)
"""
    job = start(*mpirun_command("-c", code))
    read_until(job, "waits")
    began = time.monotonic()
    os.kill(job.parts()["pager"], signal.SIGTERM)
    rest, _ = job.communicate(timeout=20)
    assert job.returncode == 128 + signal.SIGKILL, rest
    assert "killed by signal 9" in rest and time.monotonic() - began > 2
    wait_until_gone(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("who", ["rank", "launcher"])
def test_after_a_signal_what_was_never_synced_is_on_the_disk_too(
    start, mpirun, mpirun_command, tmp_path, who, number
):
    if who == "launcher" and not has_mpich():
        pytest.skip("Open MPI's mpirun gives its ranks no time")
    job = start(*mpirun_command(PROGRAMS / "kept.py", tmp_path / "disk", "wait"))
    read_until(job, "written")
    os.kill(job.parts()["pager"] if who == "rank" else job.pid, number)
    rest, _ = job.communicate(timeout=30)
    wait_until_gone(job)
    wrote = re.search(WROTE, rest)
    assert wrote and int(wrote[1]) > 0, rest
    again = mpirun(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert again.returncode == 0 and "kept SUCCESS" in again.stdout, again.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_after_a_signal_on_one_machine_what_was_never_synced_is_on_the_disk_too(
    alone, tmp_path, number
):
    job = alone.start(PROGRAMS / "kept.py", tmp_path / "disk", "wait")
    read_until(job, "written")
    job.send_signal(number)
    rest, _ = job.communicate(timeout=30)
    wait_until_gone(job)
    assert job.returncode == -number, rest
    wrote = re.search(f"end: {WROTE}", rest)
    assert number == signal.SIGINT or wrote and int(wrote[1]) > 0, rest
    again = alone.run(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert again.returncode == 0 and "kept SUCCESS" in again.stdout, again.stdout


def test_killed_at_any_moment_the_disk_has_what_the_last_sync_had(way, tmp_path, long):
    synced, dice = 0, random.Random()
    crashes = 50 if long else 5
    for crash in range(crashes + 1):
        job = way.start(PROGRAMS / "crashes.py", tmp_path / "disk")
        output = ""
        # Every third is killed while it begins, perhaps in the midst of going back to the last sync.
        begins = crash % 3 == 2 and crash < crashes
        moment = time.monotonic() + dice.random() * 0.4
        if not begins:
            output = read_until(job, "\n")
            assert output.startswith("found "), output
            moment = time.monotonic() + dice.random() * 0.4
        while time.monotonic() < moment:
            if select.select([job.stdout], [], [], max(0, moment - time.monotonic()))[0]:
                output += os.read(job.stdout.fileno(), 1 << 16).decode()
        kill_everything_of_edms(job, dice)
        rest, _ = job.communicate(timeout=20)
        wait_until_gone(job)
        output += rest
        assert "not as it was" not in output and "Traceback" not in output, output
        if found := re.search(r"found (\d+)", output):
            assert int(found[1]) >= synced, f"a sync that had returned is lost: {synced}, {output}"
        synced = max(map(int, re.findall(r"synced (\d+)\n", output)), default=synced)
    assert synced > 0


def test_killed_at_any_moment_two_instances_find_what_their_last_sync_had_on_two_dmss(
    start, run, mpirun_command, tmp_path, long
):
    disk, synced, dice = tmp_path / "disk", {}, random.Random()
    crashes = 50 if long else 3
    for crash in range(crashes + 1):
        job = start(*mpirun_command(PROGRAMS / "crashes.py", disk, 2, ranks=4))
        wait_for(lambda job=job: len(job.ranks()) == 4, 20)
        output = ""
        if crash % 3 < 2 or crash == crashes:  # else it is killed while it begins
            deadline = time.monotonic() + 30
            while not {"2", "3"} <= set(re.findall(r"(\d) found \d+\n", output)):
                output += read_until(job, "\n")
                assert time.monotonic() < deadline, output[-2000:]
        moment = time.monotonic() + dice.random() * 0.6
        while (left := moment - time.monotonic()) > 0:
            if select.select([job.stdout], [], [], left)[0]:
                output += os.read(job.stdout.fileno(), 1 << 16).decode()
        for _, victim in dice.sample(sorted(job.ranks().items()), len(job.ranks())):
            with contextlib.suppress(ProcessLookupError):  # the launcher has been quicker
                os.kill(victim, signal.SIGKILL)
        rest, _ = job.communicate(timeout=20)
        wait_until_gone(job)
        output += rest
        assert "not as it was" not in output and "Traceback" not in output, output
        for rank, step in re.findall(r"(\d) found (\d+)\n", output):
            assert int(step) >= synced.get(rank, 0), f"a sync is lost: {synced}, {output}"
        for rank, step in re.findall(r"(\d) synced (\d+)\n", output):
            synced[rank] = int(step)
    assert set(synced) == {"2", "3"}
    for dms, ranks in ((1, 3), (3, 5)):
        ended = run(*mpirun_command(PROGRAMS / "crashes.py", disk, dms, ranks=ranks))
        told = re.findall("edm: error: .*", ended.stdout)
        assert ended.returncode == 2 and len(told) == 1, ended.stdout
        assert f"{disk} is of another version, geometry or size: ({FORMAT}, 0, 2, 64, " in told[0]
        assert f", not ({FORMAT}, 0, {dms}, 64, " in told[0]


def kill_everything_of_edms(job, dice):
    """In any order; but no pager writes back what the application wrote, as it would after its end."""
    parts = job.parts()
    victims = [parts[name] for name in ("DMS", "pager") if name in parts] or [*job.processes()]
    if "LPET" in parts and dice.random() < 0.3:
        victims = [parts["LPET"]]  # then the pager ends everything at once
    if "DMS" not in parts:
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGSTOP)
    for victim in dice.sample(victims, len(victims)):
        with contextlib.suppress(ProcessLookupError):  # the launcher has been quicker
            os.kill(victim, signal.SIGKILL)


def test_a_disk_in_use_and_other_mistakes_get_one_line(way, tmp_path):
    disk = tmp_path / "disk"
    job = way.start(*resume(disk, "--pages", "1000000"))  # till the test's end
    read_until(job, "page 4096")
    for arguments, words in (
        (["--disk", disk], "in use by another job"),
        (["--disk", disk, "--no-keep"], "in use by another job"),
        (["--disk", __file__], "is not an EDM disk"),
        (["--disk", ""], "keep: needs a disk"),
    ):
        ended = way.run("-m", "edm.examples.resume", *arguments)
        lines = [line for line in ended.stdout.splitlines() if "error:" in line]
        assert ended.returncode == 2, ended.stdout
        assert len(lines) == 1 and words in lines[0], ended.stdout


@pytest.mark.parametrize("how", ["raise", "exit", "kill", "_exit", "exec", "prefetch"])
def test_what_an_application_wrote_is_on_a_kept_disk_however_it_ended(way, tmp_path, how):
    job = way.start(PROGRAMS / "kept.py", tmp_path / "disk", how)
    output, _ = job.communicate(timeout=60)
    wait_until_gone(job)
    assert job.returncode not in (0, None), output
    again = way.run(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert again.returncode == 0 and "kept SUCCESS" in again.stdout, again.stdout


def test_what_one_way_has_written_the_other_finds(mpirun, alone, tmp_path):
    """A kept disk is the same, on one machine and over MPI."""
    for disk, write, find in (
        (tmp_path / "1", alone.run, mpirun),
        (tmp_path / "2", mpirun, alone.run),
    ):
        write(PROGRAMS / "kept.py", disk, "exit")
        ended = find(PROGRAMS / "kept.py", disk, "find")
        assert ended.returncode == 0 and "kept SUCCESS" in ended.stdout, ended.stdout


def flip_a_bit_of_the_first_pages_entry_in_the_table(path: Path) -> None:
    with path.open("r+b") as disk:
        *_, page_size, start, end, epoch = HEADER.unpack(disk.read(HEADER.size))
        blocks = -(-(end - start) // page_size // BLOCK_PAGES)
        at = TABLE + epoch % 2 * blocks * BLOCK_SIZE  # the block of page 0, as it counts
        disk.seek(at)
        byte = disk.read(1)[0]
        disk.seek(at)
        disk.write(bytes((byte ^ 4,)))


def test_a_flipped_bit_in_the_table_of_a_kept_disk_is_a_sigbus_for_the_next_job(way, tmp_path):
    way.run(PROGRAMS / "kept.py", tmp_path / "disk", "exit")
    flip_a_bit_of_the_first_pages_entry_in_the_table(tmp_path / "disk")
    again = way.run(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert "page in address 0x1000000000 can't be brought back: " in again.stdout, again.stdout
    assert "the checksum is wrong" in again.stdout
    assert again.returncode == way.killed_by(signal.SIGBUS), again.stdout


def test_a_page_that_was_lost_has_zeros_when_its_area_was_unmapped_and_can_be_used_again(
    way, tmp_path
):
    way.run(PROGRAMS / "kept.py", tmp_path / "disk", "exit")
    flip_a_bit_of_the_first_pages_entry_in_the_table(tmp_path / "disk")
    code = f"""
import os, signal, edm
from edm.uffd_ctypes import madvise

MADV_SEQUENTIAL = 2  # <asm-generic/mman-common.h>

def app(space):
    area, found = space.mmap(300 * edm.PAGE_SIZE), []
    for at in (0, edm.PAGE_SIZE):
        if not (child := os.fork()):
            os._exit(area[at])
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS)
    madvise(space.start_addr + edm.PAGE_SIZE, edm.PAGE_SIZE, MADV_SEQUENTIAL)
    space.munmap(area)
    area = space.mmap(300 * edm.PAGE_SIZE, addr=space.start_addr)
    found.append(any(area))
    area[:] = b"x" * len(area)
    print(*found, bytes(area) == b"x" * len(area), flush=True)

disk = {str(tmp_path / "disk")!r}
edm.run(app, edm.Config(high_threshold=64, low_threshold=32, disk=disk, keep=True))
"""
    again = way.run("-c", code)
    assert again.returncode == 0 and "True True False True\n" in again.stdout, again.stdout


# ---------------------------------------------------------------- everything at once

WHICH, WHERE = st.integers(0, 9), st.integers(0, 1 << 16)
WRITE = st.tuples(st.just("write"), WHICH, WHERE, st.integers(1, 20000), st.integers(0, 1 << 30))
READ = st.tuples(st.just("read"), WHICH, WHERE, st.integers(1, 9000))
SYNC = st.tuples(st.just("sync"))
OPERATIONS = st.one_of(
    *(WRITE, WRITE, WRITE, WRITE, READ, READ, READ, SYNC, SYNC),
    st.tuples(st.just("map"), st.integers(0, 60), st.integers(1, 14)),
    st.tuples(st.just("unmap"), WHICH),
    st.tuples(st.just("compare"), WHICH),
    st.tuples(st.just("crash")),
)


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_any_sequence_of_operations_gives_what_a_plain_bytearray_gives(
    way, tmp_path_factory, tracking, long
):
    """Map, unmap, write, read, sync, crash and resume, on the real kernel, evicting all the time."""

    @settings(
        max_examples=100 if long else 3 if way.alone else 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(OPERATIONS, min_size=30, max_size=80))
    def holds(operations):
        folder = tmp_path_factory.mktemp("operations")
        (folder / "list").write_text(json.dumps([["map", 0, 10], *operations]))
        for _ in range(1 + sum(name == "crash" for name, *_ in operations)):
            options = ("--disk", folder / "disk", "--clean-tracking", tracking)
            job = way.start(PROGRAMS / "operations.py", folder / "list", folder / "saved", *options)
            output, _ = job.communicate(timeout=60)
            assert "is wrong" not in output and "Traceback" not in output, output
            assert "are wrong" not in output and "error:" not in output, output
            wait_until_gone(job)
        assert "operations SUCCESS" in output, output

    holds()


def soak(way, tmp_path, seconds, *options):
    ended = way.run(
        PROGRAMS / "soak.py", tmp_path / "pids", seconds, *options, timeout=seconds + 60
    )
    assert ended.returncode == 0 and "soak SUCCESS" in ended.stdout, ended.stdout
    assert "Traceback" not in ended.stdout and "refused:" not in ended.stdout, ended.stdout


@pytest.mark.parametrize("tracking", TRACKINGS)
@pytest.mark.parametrize("tracker", TRACKERS)
def test_four_threads_lose_no_update_and_nothing_of_edms_grows(
    way, tmp_path, tracker, tracking, long
):
    options = ["--idle-tracker", tracker, "--clean-tracking", tracking]
    soak(way, tmp_path, 300 if long else 1, *options)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_four_threads_lose_no_update_and_nothing_grows_with_a_kept_disk(
    way, tmp_path, tracker, long
):
    options = ["--idle-tracker", tracker, "--high-threshold", "8", "--low-threshold", "6"]
    soak(way, tmp_path, 300 if long else 1, *options, "--keep", "--disk", tmp_path / "disk")


def test_four_threads_lose_no_update_in_the_plain_way(way, tmp_path):
    soak(way, tmp_path, 2, "--plain")


def test_malformed_messages_are_refused_and_the_dms_goes_on_serving(mpirun):
    ended = mpirun(PROGRAMS / "malformed.py")
    assert ended.returncode == 0 and "malformed SUCCESS" in ended.stdout, ended.stdout[-3000:]


# ---------------------------------------------------------------- who else may look


@pytest.mark.undisturbed
def test_another_user_can_open_neither_the_disk_nor_the_memory_of_a_job(way, public_path):
    if os.getuid():
        pytest.skip("becoming another user needs root")
    nobody = pwd.getpwnam("nobody")
    shared = set(Path("/dev/shm").iterdir())
    job = way.start(*resume(public_path / "disk"))
    read_until(job, "page 4096")
    files = [public_path / "disk", *(set(Path("/dev/shm").iterdir()) - shared)]
    for pid in job.parts().values():
        process = Path(f"/proc/{pid}")
        files += [process / "mem", process / "maps", *(process / "fd").iterdir()]
    assert len(files) > 20
    opens = 'for file; do ( : < "$file" ) 2>/dev/null && echo "$file"; done'

    def opened(*more, **who):
        command = ["/bin/sh", "-c", opens, "sh", *map(str, files), *map(str, more)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **who).stdout

    public = public_path / "public"
    public.touch(0o644)
    assert str(public_path / "disk") in opened()  # as root
    who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    assert opened(public, **who) == f"{public}\n"


def test_the_disk_is_for_its_owner_and_edm_makes_no_socket_with_a_name_or_a_port(way, tmp_path):
    disk = tmp_path / "disk"
    old = os.umask(0)
    try:
        job = way.start(*resume(disk))
    finally:
        os.umask(old)
    read_until(job, "page 4096")
    assert disk.stat().st_mode & 0o777 == 0o600
    parts = job.parts()

    def sockets(pid):
        found = set()
        with contextlib.suppress(FileNotFoundError):  # it has ended, or closed one meanwhile
            for fd in os.listdir(f"/proc/{pid}/fd"):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:"):
                    found.add(re.search(r"\d+", name)[0])
        return found

    if way.alone:
        inodes = set().union(*map(sockets, parts.values()))
    else:  # the ranks have MPI's own, and the launcher's are inherited
        inodes = sockets(parts["application"])
        for pid in job.processes().keys() - set(parts.values()):
            inodes -= sockets(pid)
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        with open(f"/proc/net/{protocol}") as table:
            for line in list(table)[1:]:
                fields = line.split()
                listens = fields[3] == "0A" or protocol.startswith("udp")
                assert fields[9] not in inodes or not listens, line
    with open("/proc/net/unix") as table:
        for line in list(table)[1:]:
            fields = line.split()
            assert fields[6] not in inodes or len(fields) == 7, f"a socket with a name: {line}"
