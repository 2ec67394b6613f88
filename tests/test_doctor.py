"""python -m edm doctor: that it finds what is there, and names what is not."""

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_userfaultfd

from edm import doctor

ROOT = Path(doctor.__file__).parent


def found(output):
    """{check: state} of doctor's lines."""
    return {
        name: state
        for state, name in re.findall(r"^(ok|missing|without) +([^:]+):", output, re.MULTILINE)
    }


@needs_userfaultfd
def test_on_a_machine_that_has_everything_it_says_so(run, mpirun_command):
    ended = run(sys.executable, "-m", "edm", "doctor")
    assert ended.returncode == 0, ended.stdout
    states = found(ended.stdout)
    assert states.keys() == doctor.CHECKS.keys()
    assert "missing" not in states.values()
    for name in ("kernel", "its features", "a page fault", "MPI", "two ranks"):
        assert states[name] == "ok", ended.stdout
    assert "EDM can run here." in ended.stdout


def test_it_is_there_from_the_folder_itself_too(run):
    ended = run(sys.executable, "-m", "edm", "--help", cwd=ROOT)
    assert ended.returncode == 0 and "doctor" in ended.stdout


@pytest.fixture
def package(tmp_path):
    """A folder that has edm and nothing else, for everybody to read."""
    folder = tmp_path / "site"
    folder.mkdir()
    target = folder / "edm"
    target.mkdir()
    for module in ROOT.glob("*.py"):
        (target / module.name).write_bytes(module.read_bytes())
    return folder


def test_without_mpi_it_says_what_is_missing_and_how_to_get_it(run, package, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    settings = [f"PYTHONPATH={package}", "PATH=/nowhere"]
    ended = run("/usr/bin/env", *settings, bare / "bin" / "python", "-m", "edm", "doctor")
    assert ended.returncode == 1, ended.stdout
    states = found(ended.stdout)
    assert states["MPI"] == states["two ranks"] == "missing"
    assert "pip install mpi4py mpich" in ended.stdout and "Traceback" not in ended.stdout
    assert "EDM can't run here." in ended.stdout


@needs_userfaultfd
def test_it_is_right_for_a_user_without_privileges(package, tmp_path):
    """As nobody: whatever the kernel permits, a page fault is handled, and what is not, is said."""
    if os.getuid():
        pytest.skip("becoming nobody needs root")
    nobody = pwd.getpwnam("nobody")
    python = "/usr/bin/python3"  # this one's environment may be in a folder that is root's alone
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    ended = subprocess.run(
        [python, "-m", "edm", "doctor"],
        env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin"},
        user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/", timeout=60,
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    if "No module named" in ended.stderr or "SyntaxError" in ended.stderr:
        pytest.skip(f"{python} can't run EDM: {ended.stderr.splitlines()[-1]}")
    states = found(ended.stdout)
    assert states.keys() == doctor.CHECKS.keys(), ended.stdout + ended.stderr
    assert states["a page fault"] == "ok"
    assert states["idle pages"] == "without"
    assert states["userfaultfd"] == "ok" or "user mode only" in ended.stdout
    assert ended.returncode == (1 if "missing" in states.values() else 0)


def test_a_disk_that_is_memory_is_told(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    state, words, _ = doctor.disk()
    assert state == "without" and "/dev/shm is memory" in words
    monkeypatch.setenv("TMPDIR", str(ROOT))
    state, words, _ = doctor.disk()
    assert f"GiB free in {ROOT}" in words
