"""Limits of the user and of a cgroup: a program that runs with them does so under `edm run`, or a line
says which one is in the way."""

import contextlib
import os
import re
import resource
import sys
import uuid
from pathlib import Path

import pytest
from conftest import needs_userfaultfd, wait_for

from edm import launch

pytestmark = needs_userfaultfd

EDM_RUN = (sys.executable, "-m", "edm", "run", "--resident", "16M")
WORK = (
    "import edm; a = edm.space().mmap(32 << 20); a[::4096] = b'x' * (len(a) // 4096); print(sum(a))"
)
DONE = f"{(32 << 20) // 4096 * ord('x')}\n"


def limited(**limits):
    """What a process does before its program begins: set limits, soft and hard ones."""

    def limit():
        for name, value in limits.items():
            value = value if isinstance(value, tuple) else (value, value)
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), value)

    return limit


NOTED = "python -m edm run: {} leaves {} MiB for the space\n"


@pytest.mark.parametrize(
    ("set_limits", "noted"),
    [
        ({"AS": 2 << 30}, NOTED.format("ulimit -v", 1024)),
        ({"AS": 400 << 20}, NOTED.format("ulimit -v", 200)),
        ({"DATA": 1 << 30}, ""),
        ({"STACK": 1 << 20}, ""),
        ({"MEMLOCK": 0}, ""),
        ({"NOFILE": 18}, ""),
        ({"FSIZE": 300 << 20}, NOTED.format("ulimit -f", 100)),
    ],
)
def test_with_a_limit_a_program_runs_and_is_told_of_a_smaller_space(run, set_limits, noted):
    ended = run(*EDM_RUN, "-c", WORK, preexec_fn=limited(**set_limits))
    assert (ended.returncode, ended.stdout) == (0, noted + DONE)


@pytest.mark.parametrize("way", [{}, {"FSIZE": (1 << 20, -1)}, {"NOFILE": (18, 1024)}])
def test_a_soft_limit_is_the_programs_alone(run, way):
    code = f"{WORK}; import resource as r; print(r.getrlimit(r.RLIMIT_FSIZE)[0])"
    ended = run(*EDM_RUN, "-c", code, preexec_fn=limited(**way))
    soft = way.get("FSIZE", resource.getrlimit(resource.RLIMIT_FSIZE))[0]
    assert (ended.returncode, ended.stdout) == (0, f"{DONE}{soft}\n")


def test_an_array_that_is_larger_than_the_whole_space_is_in_ordinary_memory(run):
    pytest.importorskip("numpy")
    code = (
        "import edm, numpy as np; space = edm.space()\n"
        "for size in (16 << 20, 64 << 20):\n"
        "    a = np.ones(size, np.uint8); print(a.sum(), space.start_addr <= a.ctypes.data < space.end_addr)"
    )
    ended = run(*EDM_RUN, "-c", code, preexec_fn=limited(FSIZE=100 << 20))
    noted = NOTED.format("ulimit -f", 33)
    assert (ended.returncode, ended.stdout) == (0, f"{noted}16777216 True\n67108864 False\n")


@pytest.mark.parametrize(
    ("limit", "options", "told"),
    [
        ({"NOFILE": 12}, [], "Too many open files; RLIMIT_NOFILE (ulimit -n) is 12"),
        ({"AS": 1 << 30}, ["--end-addr", "0x2000000000"], "RLIMIT_AS (ulimit -v) is 1073741824"),
        ({"FSIZE": 64 << 20}, ["--end-addr", "0x2000000000"], "RLIMIT_FSIZE (ulimit -f) is 67108864"),
    ],
)  # fmt: skip
def test_a_limit_that_leaves_too_little_is_named_in_one_line(run, limit, options, told):
    ended = run(*EDM_RUN, *options, "-c", "print('started')", preexec_fn=limited(**limit))
    assert ended.returncode == 2 and told in ended.stdout, ended.stdout
    assert ended.stdout.count("\n") == 1, ended.stdout


@pytest.mark.parametrize("name", ["NOFILE", "DATA"])
def test_a_limit_refuses_a_program_or_lets_it_end(run, tmp_path, name):
    options = "--disk", tmp_path / "disk", "--keep"
    code = f"{WORK}; edm.space().sync()"
    statuses = []
    for limit in {"NOFILE": range(12, 20), "DATA": range(10 << 20, 50 << 20, 8 << 20)}[name]:
        ended = run(*EDM_RUN, *options, "-c", code, preexec_fn=limited(**{name: limit}))
        statuses.append(ended.returncode)
        if ended.returncode:
            assert f"RLIMIT_{name} (ulimit -{name[0].lower()}) is {limit}" in ended.stdout
            assert ended.stdout.count("\n") == 1, ended.stdout
        else:
            assert ended.stdout == DONE
    assert statuses == sorted(statuses, reverse=True) and set(statuses) == {0, 2}, statuses


def test_a_space_that_no_disk_has_room_for_is_told_in_one_line(way):
    largest = "--end-addr", hex(1 << 46)  # 64 TiB; ext4 has files of at most 16
    command = *EDM_RUN[1:], *largest, "--dms", int(not way.alone), "-c", "print('started')"
    ended = way.run(*command)
    if ended.stdout == "started\n":
        pytest.skip("this file system has files of 64 TiB")
    assert (ended.returncode, ended.stdout.count("\n")) == (2, 1), ended.stdout
    assert re.search("(File too large|Cannot allocate memory): '", ended.stdout)


def test_a_kept_disk_has_two_places_for_each_page(run, tmp_path):
    options = "--disk", tmp_path / "disk", "--keep"
    ended = run(*EDM_RUN, *options, "-c", WORK, preexec_fn=limited(FSIZE=200 << 20))
    assert (ended.returncode, ended.stdout) == (0, NOTED.format("ulimit -f", 66) + DONE)


# ---------------------------------------------------------------- cgroups


@pytest.mark.parametrize(
    ("free", "resident"), [(64, 16), (128, 32), (200, 72), (640, 512), (10_000, 8000)]
)
def test_the_default_resident_leaves_room_for_what_else_a_program_needs(
    monkeypatch, free, resident
):
    monkeypatch.setattr(launch, "_memory", lambda: (1 << 40, free << 20))
    config = launch.parse(["-"])[1]
    assert config.high_threshold == resident << 8


@pytest.fixture
def cgroup():
    """A function that makes a memory cgroup of so many bytes: the path of its cgroup.procs, and a
    function that tells how many processes were killed in it."""
    v1 = Path("/sys/fs/cgroup/memory")
    parent, name = (v1, "limit_in_bytes") if v1.is_dir() else (v1.parent, "max")
    group = parent / f"edm-test-{uuid.uuid4()}"

    def make(size):
        try:
            group.mkdir()
            (group / f"memory.{name}").write_text(str(size))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be made: {error}")
        if name == "max":
            with contextlib.suppress(OSError):  # there is no swap
                (group / "memory.swap.max").write_text("0")
        events = group / ("memory.events" if name == "max" else "memory.oom_control")
        kills = lambda: dict(map(str.split, events.read_text().splitlines()))["oom_kill"]
        return group / "cgroup.procs", kills

    yield make
    if group.is_dir():
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_in_a_small_cgroup_the_default_resident_is_small_enough(run, cgroup):
    pytest.importorskip("numpy")
    procs, kills = cgroup(200 << 20)
    code = (
        "import numpy as np; a = np.arange(25_000_000.); a[::512] += 1\n"
        "small = [np.ones(1000) for _ in range(2000)]; print(a.sum())"
    )
    ended = run(
        sys.executable, "-m", "edm", "run", "-c", code,
        preexec_fn=lambda: procs.write_text(str(os.getpid())),
    )  # fmt: skip
    assert (ended.returncode, kills()) == (0, "0"), ended.stdout
