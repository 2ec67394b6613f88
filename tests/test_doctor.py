"""python -m edm doctor: that it finds what is there, and names what is not."""

import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mpi4py
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
def package(public_path):
    """A folder that has edm and nothing else, for everybody to read."""
    folder = public_path / "site"
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
    # mpi4py alone, without an MPI library
    shutil.copytree(Path(mpi4py.__file__).parent, package / "mpi4py")
    settings.append("MPI4PY_LIBMPI=/nowhere/libmpi.so")
    ended = run("/usr/bin/env", *settings, bare / "bin" / "python", "-m", "edm", "doctor")
    assert ended.returncode == 1 and found(ended.stdout)["MPI"] == "missing", ended.stdout
    assert "mpi4py finds no MPI library" in ended.stdout
    assert "-m pip install mpich\n" in ended.stdout and "Traceback" not in ended.stdout


def test_an_mpirun_of_another_mpi_is_told(monkeypatch, tmp_path):
    other = tmp_path / "mpirun"
    other.write_text('#!/bin/sh\nshift 2\n"$@" & "$@"\nwait\n')
    other.chmod(0o755)
    monkeypatch.setattr(doctor, "find_mpirun", lambda: str(other))
    state, words, remedy = doctor.two_ranks()
    assert state == "missing" and "are not of the same kind" in words
    assert "pip install --force-reinstall mpich" in remedy


@pytest.fixture
def as_nobody(run, package, public_path):
    """Run `python ...` to its end as nobody, in an environment that has EDM and its MPI.

    It is one of its own, as this test's may be in a folder that is root's alone.
    """
    if os.getuid():
        pytest.skip("becoming nobody needs root")
    nobody = pwd.getpwnam("nobody")
    who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}
    code = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    for base in (Path(sys.executable).resolve(), "/usr/bin/python3"):
        try:
            if not subprocess.run([base, "-c", code], check=False, **who).returncode:
                break
        except OSError:  # it is not there, or not for nobody
            continue
    else:
        pytest.skip("there is no Python of this version that nobody may run")
    environment = public_path / "environment"
    subprocess.run([base, "-m", "venv", "--without-pip", environment], check=True)
    ours = Path(sys.prefix)
    for name in ("bin", "lib", "etc", "share"):  # an MPI from PyPI is there
        if (ours / name).exists():
            shutil.copytree(
                ours / name, environment / name, symlinks=True, dirs_exist_ok=True,
                ignore=lambda folder, names: [n for n in names if n.startswith("python")],
            )  # fmt: skip
    shutil.copytree(Path(mpi4py.__file__).parent, package / "mpi4py")

    def as_nobody(*arguments, **options):
        settings = [f"PYTHONPATH={package}", f"HOME={public_path}"]
        python = environment / "bin" / "python"
        return run("/usr/bin/env", *settings, python, *arguments, **who, **options)

    return as_nobody


@needs_userfaultfd
def test_it_is_right_for_a_user_without_privileges(as_nobody):
    """As nobody: whatever the kernel permits, EDM can run, and what is not permitted is said."""
    ended = as_nobody("-m", "edm", "doctor")
    states = found(ended.stdout)
    assert states.keys() == doctor.CHECKS.keys(), ended.stdout
    for name in ("kernel", "a page fault", "MPI", "two ranks"):
        assert states[name] == "ok", ended.stdout
    assert states["idle pages"] == states["pagemap"] == "without"
    assert states["userfaultfd"] == "ok" or "user mode only" in ended.stdout
    assert ended.returncode == 0 and "EDM can run here." in ended.stdout
    # And so it does.
    code = """if True:
        import edm
        space = edm.space()
        area = space.mmap(100 * edm.PAGE_SIZE)
        area[:] = b"x" * len(area)
        print(area == b"x" * len(area), space.figures()["evicted_dirty"] > 50)
        """
    ended = as_nobody("-m", "edm", "run", "--no-numpy", "--resident", "64K", "-c", code)
    assert (ended.returncode, ended.stdout) == (0, "True True\n")


def test_a_disk_that_is_memory_is_told(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    state, words, _ = doctor.disk()
    assert state == "without" and "/dev/shm is memory" in words
    monkeypatch.setenv("TMPDIR", str(ROOT))
    state, words, _ = doctor.disk()
    assert f"GiB free in {ROOT}" in words
