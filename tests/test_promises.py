"""What the README promises of each failure, by causing it."""

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
from conftest import PROGRAMS, TRACKERS, has_mpich, needs_userfaultfd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edm.dms import PAIR, TABLE

pytestmark = needs_userfaultfd


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


def read_until(job, words, seconds=30):
    """Read the job's output until it has these words."""
    output = ""
    while words not in output:
        assert select.select([job.stdout], [], [], seconds)[0], output
        part = os.read(job.stdout.fileno(), 1 << 16).decode()
        assert part, output
        output += part
    return output


def wait_until_gone(job, seconds=5):
    deadline = time.monotonic() + seconds
    while left := job.processes():
        assert time.monotonic() < deadline, f"still there after {seconds} s: {left}"
        time.sleep(0.01)


# ---------------------------------------------------------------- the disk


@pytest.mark.parametrize("keep", [[], ["keep"]])
def test_when_the_disk_is_full_nothing_is_lost_and_the_application_goes_on_when_there_is_room(
    mpirun, small_file_system, keep
):
    ended = mpirun(PROGRAMS / "full_disk.py", small_file_system / "disk", "frees", *keep)
    assert ended.returncode == 0 and "full disk SUCCESS" in ended.stdout, ended.stdout
    assert "No space left on device" in ended.stdout


def test_while_writing_fails_nothing_is_lost_and_then_the_application_goes_on(mpirun, tmp_path):
    ended = mpirun(PROGRAMS / "full_disk.py", tmp_path / "disk", "EIO")
    assert ended.returncode == 0 and "full disk SUCCESS" in ended.stdout, ended.stdout
    assert "Input/output error" in ended.stdout


def test_refusals_after_a_long_silence_do_not_end_the_job_at_once(mpirun, tmp_path):
    ended = mpirun(PROGRAMS / "refused.py", tmp_path / "disk", "stall")
    assert ended.returncode == 0 and "refused SUCCESS" in ended.stdout, ended.stdout


def test_an_area_that_could_not_be_unmapped_is_in_nobodys_way_and_can_be_unmapped_later(
    mpirun, tmp_path
):
    ended = mpirun(PROGRAMS / "refused.py", tmp_path / "disk", "munmap")
    assert ended.returncode == 0 and "refused SUCCESS" in ended.stdout, ended.stdout
    assert ended.stdout.count("munmap: [Errno 5]") == 2, ended.stdout


@pytest.mark.parametrize("thresholds", [[], ["close"]])
def test_when_the_disk_is_full_clean_pages_still_leave(mpirun, small_file_system, thresholds):
    ended = mpirun(PROGRAMS / "full_disk.py", small_file_system / "disk", "reads", *thresholds)
    assert ended.returncode == 0 and "full disk SUCCESS" in ended.stdout, ended.stdout


@pytest.mark.parametrize("keep", [[], ["keep"]])
def test_when_the_disk_is_full_and_the_application_can_go_no_further_the_job_ends_and_says_why(
    mpirun, small_file_system, keep
):
    began = time.monotonic()
    ended = mpirun(PROGRAMS / "full_disk.py", small_file_system / "disk", "goes on", *keep)
    assert ended.returncode == 2 and time.monotonic() - began > 5, ended.stdout
    assert "full disk SUCCESS" not in ended.stdout and "is wrong" not in ended.stdout
    errors = [line for line in ended.stdout.splitlines() if "edm: error:" in line]
    assert len(errors) == 1 and "No space left on device" in errors[0], ended.stdout
    # And it was the last page that did not fit, not the last batch.
    assert os.statvfs(small_file_system).f_bfree == 0


def test_sync_returns_how_many_pages_it_sent_and_evicts_none(mpirun):
    ended = mpirun(PROGRAMS / "syncs.py")
    assert ended.returncode == 0 and "syncs SUCCESS" in ended.stdout, ended.stdout


def test_faults_that_need_room_do_not_wait_for_a_sync_to_end(mpirun):
    ended = mpirun(PROGRAMS / "room_in_sync.py")
    assert ended.returncode == 0 and "room SUCCESS" in ended.stdout, ended.stdout


def test_a_flipped_byte_in_the_disk_file_is_a_sigbus_and_the_other_pages_are_whole(
    mpirun, tmp_path
):
    ended = mpirun(PROGRAMS / "lost_page.py", tmp_path / "disk", "flip")
    assert "the others are right" in ended.stdout and "never seen" not in ended.stdout
    assert "can't be brought back: page 20: " in ended.stdout, ended.stdout
    assert "the checksum is wrong" in ended.stdout
    assert ended.returncode == 128 + signal.SIGBUS, ended.stdout


def test_a_page_that_can_not_be_read_is_a_sigbus_too(mpirun, tmp_path):
    ended = mpirun(PROGRAMS / "lost_page.py", tmp_path / "disk", "EIO")
    assert "the others are right" in ended.stdout and "never seen" not in ended.stdout
    assert "can't be brought back: page 20: " in ended.stdout, ended.stdout
    assert "Input/output error" in ended.stdout
    assert ended.returncode == 128 + signal.SIGBUS, ended.stdout


def test_without_poison_a_page_that_can_not_be_brought_back_ends_the_job(mpirun, tmp_path):
    ended = mpirun(PROGRAMS / "lost_page.py", tmp_path / "disk", "no poison")
    assert "the others are right" in ended.stdout and "never seen" not in ended.stdout
    assert ended.returncode == 2, ended.stdout
    errors = [line for line in ended.stdout.splitlines() if "edm: error:" in line]
    assert len(errors) == 1 and "page 20: " in errors[0] and "UFFDIO_POISON" in errors[0]


# ---------------------------------------------------------------- who dies


@pytest.mark.parametrize("who", ["pager", "DMS"])
def test_when_pager_or_dms_dies_the_job_ends_with_a_message_and_nothing_hangs(
    start, mpirun_command, who
):
    job = start(*mpirun_command("-m", "edm.examples.bigger_than_memory", "--size", "256"))
    output = read_until(job, "25 %")
    parts = job.parts()
    os.kill(parts[who], signal.SIGKILL)
    began = time.monotonic()
    if who == "pager":
        while os.path.exists(f"/proc/{parts['application']}/exe"):
            assert time.monotonic() - began < 1, "the application lives on"
            time.sleep(0.01)
    rest, _ = job.communicate(timeout=20)
    assert job.returncode not in (0, None), output + rest
    assert re.search(r"signal|terminat|killed|has died", rest, re.IGNORECASE), output + rest
    assert "SUCCESS" not in rest
    wait_until_gone(job)


def test_when_the_dms_dies_and_the_launcher_does_nothing_the_instance_ends_the_job(
    start, mpirun_command
):
    mpirun, *rest = mpirun_command("-m", "edm.examples.bigger_than_memory", "--size", "256")
    if not has_mpich():
        pytest.skip("only MPICH's mpirun can be told to do nothing")
    job = start(mpirun, "-disable-auto-cleanup", *rest)
    read_until(job, "25 %")
    os.kill(job.parts()["DMS"], signal.SIGKILL)
    rest, _ = job.communicate(timeout=10)
    assert job.returncode != 0 and "edm: error: the DMS has died" in rest, rest
    assert "SUCCESS" not in rest and "Traceback" not in rest
    wait_until_gone(job)


# ---------------------------------------------------------------- keep and resume


def resume(mpirun_command, disk, *more):
    return mpirun_command("-m", "edm.examples.resume", "--disk", disk, *more)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_everything_back_and_the_next_job_goes_on(
    start, run, mpirun_command, tmp_path, number
):
    disk = tmp_path / "disk"
    job = start(*resume(mpirun_command, disk, "--pages", "65536"))
    read_until(job, "page 4096")
    os.kill(job.parts()["pager"], number)
    rest, _ = job.communicate(timeout=30)
    assert job.returncode == 128 + number, rest
    name = signal.Signals(number).name
    assert re.search(rf"{name}: wrote \d+ pages back and synced the disk in \S+ s", rest), rest
    again = run(*resume(mpirun_command, disk, "--pages", "20000"))
    assert again.returncode == 0 and "resume SUCCESS" in again.stdout, again.stdout
    assert int(re.search(r"the space has (\d+) of", again.stdout)[1]) >= 4096


def test_sigterm_to_the_launcher_writes_everything_back_too(start, run, mpirun_command, tmp_path):
    disk = tmp_path / "disk"
    job = start(*resume(mpirun_command, disk, "--pages", "65536"))
    read_until(job, "page 8192")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode != 0
    wait_until_gone(job)
    again = run(*resume(mpirun_command, disk, "--pages", "20000"))
    assert again.returncode == 0 and "resume SUCCESS" in again.stdout, again.stdout
    assert int(re.search(r"the space has (\d+) of", again.stdout)[1]) >= 8192


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("who", ["pager", "launcher"])
def test_after_a_signal_what_was_never_synced_is_on_the_disk_too(
    start, mpirun, mpirun_command, tmp_path, who, number
):
    if who == "launcher" and not has_mpich():
        pytest.skip("Open MPI's mpirun gives its ranks no time")
    job = start(*mpirun_command(PROGRAMS / "kept.py", tmp_path / "disk", "wait"))
    read_until(job, "written")
    os.kill(job.parts()["pager"] if who == "pager" else job.pid, number)
    rest, _ = job.communicate(timeout=30)
    wait_until_gone(job)
    wrote = re.search(r"wrote (\d+) pages back and synced the disk in \S+ s", rest)
    assert wrote and int(wrote[1]) > 0, rest
    again = mpirun(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert again.returncode == 0 and "kept SUCCESS" in again.stdout, again.stdout


def test_killed_at_any_moment_the_disk_has_what_the_last_sync_had(
    start, mpirun_command, tmp_path, long
):
    synced, dice = 0, random.Random()
    crashes = 50 if long else 8
    for crash in range(crashes + 1):
        job = start(*mpirun_command(PROGRAMS / "crashes.py", tmp_path / "disk"))
        output = ""
        # Every fourth is killed while it begins, perhaps in the midst of going back to the last sync.
        begins = crash % 4 == 3 and crash < crashes
        moment = time.monotonic() + dice.random() * 0.4
        if not begins:
            output = read_until(job, "\n")
            assert output.startswith("found "), output
            moment = time.monotonic() + dice.random() * 0.4
        while time.monotonic() < moment:
            if select.select([job.stdout], [], [], max(0, moment - time.monotonic()))[0]:
                output += os.read(job.stdout.fileno(), 1 << 16).decode()
        parts = job.parts()
        victims = dice.sample([parts["DMS"], parts["pager"]], 2) if parts else [*job.processes()]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):  # the launcher has been quicker
                os.kill(victim, signal.SIGKILL)
        rest, _ = job.communicate(timeout=20)
        wait_until_gone(job)
        output += rest
        assert "not as it was" not in output
        if found := re.search(r"found (\d+)", output):
            assert int(found[1]) >= synced, f"a sync that had returned is lost: {synced}, {output}"
        synced = max(map(int, re.findall(r"synced (\d+)\n", output)), default=synced)
    assert synced > 0


def test_a_disk_in_use_and_other_mistakes_get_one_line(start, mpirun, mpirun_command, tmp_path):
    disk = tmp_path / "disk"
    job = start(*resume(mpirun_command, disk, "--pages", "1000000"))  # till the test's end
    read_until(job, "page 4096")
    for arguments, words in (
        (["--disk", disk], "in use by another job"),
        (["--disk", disk, "--no-keep"], "in use by another job"),
        (["--disk", __file__], "is not an EDM disk"),
        (["--disk", ""], "keep: needs a disk"),
    ):
        ended = mpirun("-m", "edm.examples.resume", *arguments)
        lines = [line for line in ended.stdout.splitlines() if "error:" in line]
        assert ended.returncode != 0
        assert len(lines) == 1 and words in lines[0], ended.stdout


@pytest.mark.parametrize("how", ["raise", "exit", "kill"])
def test_what_an_application_wrote_is_on_a_kept_disk_however_it_ended(mpirun, tmp_path, how):
    ended = mpirun(PROGRAMS / "kept.py", tmp_path / "disk", how)
    assert ended.returncode not in (0, None), ended.stdout
    again = mpirun(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert again.returncode == 0 and "kept SUCCESS" in again.stdout, again.stdout


def test_a_flipped_bit_in_the_table_of_a_kept_disk_is_a_sigbus_for_the_next_job(mpirun, tmp_path):
    mpirun(PROGRAMS / "kept.py", tmp_path / "disk", "exit")
    with (tmp_path / "disk").open("r+b") as disk:
        disk.seek(TABLE)
        first = bytearray(disk.read(PAIR))
        first[next(at for at in range(PAIR) if first[at])] ^= 4  # of the epoch
        disk.seek(TABLE)
        disk.write(first)
    again = mpirun(PROGRAMS / "kept.py", tmp_path / "disk", "find")
    assert "page 0: " in again.stdout and "table is damaged" in again.stdout, again.stdout
    assert again.returncode == 128 + signal.SIGBUS, again.stdout


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


def test_any_sequence_of_operations_gives_what_a_plain_bytearray_gives(
    start, mpirun_command, tmp_path_factory, long
):
    """Map, unmap, write, read, sync, crash and resume, on the real kernel, evicting all the time."""

    @settings(
        max_examples=100 if long else 6,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(OPERATIONS, min_size=30, max_size=120))
    def holds(operations):
        folder = tmp_path_factory.mktemp("operations")
        (folder / "list").write_text(json.dumps([["map", 0, 10], *operations]))
        for _ in range(1 + sum(name == "crash" for name, *_ in operations)):
            job = start(
                *mpirun_command(
                    PROGRAMS / "operations.py", folder / "list", folder / "disk", folder / "saved"
                )
            )
            try:
                output, _ = job.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                job.kill_all()
                pytest.fail(f"hangs: {operations}")
            assert "is wrong" not in output and "Traceback" not in output, output
            assert "are wrong" not in output and "error:" not in output, output
            wait_until_gone(job)
        assert "operations SUCCESS" in output, output

    holds()


@pytest.mark.parametrize(("high", "keep"), [(130, False), (8, True)], ids=["scratch", "kept"])
@pytest.mark.parametrize("tracker", TRACKERS)
def test_four_threads_lose_no_update_and_pager_and_dms_do_not_grow(
    mpirun, tmp_path, tracker, high, keep, long
):
    seconds = 300 if long else 6
    arguments = [tmp_path / "pids", seconds, tracker, high, *([tmp_path / "disk"] if keep else [])]
    ended = mpirun(PROGRAMS / "soak.py", *arguments, timeout=seconds + 60)
    assert ended.returncode == 0 and "soak SUCCESS" in ended.stdout, ended.stdout
    assert "Traceback" not in ended.stdout and "refused:" not in ended.stdout, ended.stdout


def test_malformed_messages_are_refused_and_the_dms_goes_on_serving(mpirun):
    ended = mpirun(PROGRAMS / "malformed.py")
    assert ended.returncode == 0 and "malformed SUCCESS" in ended.stdout, ended.stdout[-3000:]


# ---------------------------------------------------------------- who else may look


def test_another_user_can_open_neither_the_disk_nor_the_memory_of_a_job(
    start, mpirun_command, public_path
):
    if os.getuid():
        pytest.skip("becoming another user needs root")
    nobody = pwd.getpwnam("nobody")
    shared = set(Path("/dev/shm").iterdir())
    job = start(*resume(mpirun_command, public_path / "disk"))
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


def test_the_disk_is_for_its_owner_and_edm_makes_no_socket_with_a_name_or_a_port(
    start, mpirun_command, tmp_path
):
    disk = tmp_path / "disk"
    old = os.umask(0)
    try:
        job = start(*resume(mpirun_command, disk))
    finally:
        os.umask(old)
    read_until(job, "page 4096")
    assert disk.stat().st_mode & 0o777 == 0o600
    application = job.parts()["application"]

    def sockets(pid):
        found = set()
        with contextlib.suppress(FileNotFoundError):  # it has ended, or closed one meanwhile
            for fd in os.listdir(f"/proc/{pid}/fd"):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:"):
                    found.add(re.search(r"\d+", name)[0])
        return found

    # The launcher's own are inherited.
    inodes = sockets(application)
    for pid in job.processes().keys() - set(job.parts().values()):
        inodes -= sockets(pid)
    assert inodes
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
