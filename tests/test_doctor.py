"""python -m edm doctor: that it finds what is there, and names what is not."""

import configparser
import errno
import os
import pwd
import re
import resource
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import mpi4py
import pytest
from conftest import has_mpich, needs_userfaultfd, python_of

from edm import doctor
from edm import uffd_ctypes as u

ROOT = Path(doctor.__file__).parent
CHECKS = {
    "userfaultfd", "its features", "a page fault", "idle pages", "two ranks", "the tests",
}  # fmt: skip


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
    assert states.keys() == CHECKS
    assert "missing" not in states.values()
    for name in ("its features", "a page fault", "two ranks"):
        assert states[name] == "ok", ended.stdout
    assert "EDM can run here." in ended.stdout


def test_it_names_what_the_tests_need(monkeypatch, capsys):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]["test"].split()
    of_pypi = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}
    names = {of_pypi.get(name, name) for name in doctor.PACKAGES}
    assert {*names, "mpich"} == set(extras)
    has_browser = shutil.which("chromium") or shutil.which("google-chrome")
    has_all = os.getuid() == 0 and shutil.which("cc") and has_browser
    assert doctor.the_tests()[0] == ("ok" if has_all else "without")
    monkeypatch.setattr(doctor, "PACKAGES", ("pytest", "no_such_package"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(doctor, "CHECKS", [doctor.the_tests])
    assert doctor.main() == 0, "EDM runs without them"
    told = capsys.readouterr().out
    assert "those that need no_such_package, a C compiler, chromium, root are skipped" in told
    assert "pip install -e '.[test]'" in told


def test_every_test_file_is_named_with_what_it_proves():
    tests = Path(__file__).parent
    table = (tests / "README.md").read_text()
    named = re.findall(r"^\| `(test_\w+\.py)` \| [^|]{10,} \|$", table, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in tests.glob("test_*.py"))


def test_every_module_has_its_rule_in_contributing():
    root = Path(__file__).parent.parent
    modules = {path.name for path in root.glob("*.py")} - {"__init__.py", "__main__.py", "setup.py"}
    text = (root / "CONTRIBUTING.md").read_text()
    assert [name for name in sorted(modules) if f"`{name}`" not in text] == []


def test_it_is_there_from_the_folder_itself_too(run):
    for command in ([], ["doctor"], ["kernel"]):
        ended = run(sys.executable, "-m", "edm", *command, "--help", cwd=ROOT)
        assert ended.returncode == 0 and "doctor" in ended.stdout
    ended = run(sys.executable, "-c", "import edm; print(edm.prefetch.__module__)", cwd=ROOT)
    assert ended.stdout == "edm.advice\n", ended


def test_modules_of_the_current_folder_and_python_without_docstrings_are_no_hindrance(
    run, tmp_path
):
    (tmp_path / "array.py").write_text("raise SystemExit('mine')")
    ended = run("env", "PYTHONOPTIMIZE=2", sys.executable, "-m", "edm", "doctor", cwd=tmp_path)
    assert ended.returncode == 0 and "mine" not in ended.stdout, ended.stdout
    assert "ok       a page fault" in ended.stdout


@pytest.fixture
def package(public_path):
    """A folder that has edm and nothing else, for everybody to read."""
    folder = public_path / "site"
    folder.mkdir()
    target = folder / "edm"
    target.mkdir()
    for module in ROOT.glob("*.py"):
        (target / module.name).write_bytes(module.read_bytes())
    for part in ("startup", "examples"):
        shutil.copytree(ROOT / part, target / part)
    return folder


def test_without_mpi_it_says_what_is_missing_and_how_to_get_it(run, package, tmp_path):
    bare = tmp_path / "a bare one"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    settings = [f"PYTHONPATH={package}", "PATH=/nowhere"]
    ended = run("/usr/bin/env", *settings, bare / "bin" / "python", "-m", "edm", "doctor")
    assert ended.returncode == 0, ended.stdout
    states = found(ended.stdout)
    assert states["two ranks"] == "without"
    command = f"{shlex.quote(str(bare / 'bin' / 'python'))} -m pip install mpi4py mpich"
    assert f"try: {command}" in ended.stdout and "Traceback" not in ended.stdout
    assert "EDM can run here." in ended.stdout  # on one machine
    # an mpirun alone; and mpi4py, too, without an MPI library
    mpirun = bare / "bin" / "mpirun"
    mpirun.write_text(
        '#!/bin/sh\nshift 2\nexport PMI_SIZE=2\nPMI_RANK=1 "$@" & PMI_RANK=0 "$@"\nwait\n'
    )
    mpirun.chmod(0o755)
    settings.append("MPI4PY_LIBMPI=/nowhere/libmpi.so")
    for missing in ("No module named 'mpi4py'", "/nowhere/libmpi.so"):
        ended = run("/usr/bin/env", *settings, bare / "bin" / "python", "-m", "edm", "doctor")
        assert ended.returncode == 0 and found(ended.stdout)["two ranks"] == "without", ended.stdout
        assert missing in ended.stdout
        assert f"try: {command}; or " in ended.stdout and "Traceback" not in ended.stdout
        shutil.copytree(Path(mpi4py.__file__).parent, package / "mpi4py", dirs_exist_ok=True)


def test_this_environments_mpirun_is_taken_before_the_one_on_path(monkeypatch, tmp_path):
    for folder in ("here/bin", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mpirun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "here"))
    assert doctor.find_mpirun() == str(tmp_path / "here/bin/mpirun")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert doctor.find_mpirun() == str(tmp_path / "elsewhere/mpirun")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_mpirun() is None
    state, words, remedy = doctor.two_ranks()
    assert (state, words) == (
        "without",
        "there is no mpirun",
    ) and "pip install mpi4py mpich" in remedy


def test_an_mpirun_of_another_mpi_is_told(monkeypatch, tmp_path):
    other = tmp_path / "mpirun"
    other.write_text('#!/bin/sh\nshift 2\n"$@" & "$@"\nwait\n')
    other.chmod(0o755)
    monkeypatch.setattr(doctor, "find_mpirun", lambda: str(other))
    state, words, remedy = doctor.two_ranks()
    assert state == "without" and "dms: needs MPI ranks" in words and "-n 2 hostname" in remedy


@needs_userfaultfd
def test_ranks_that_find_themselves_alone_are_told_as_an_mpirun_of_another_mpi(
    monkeypatch, tmp_path
):
    """Each has its variables of another MPI's launcher, and is the only rank of its own job."""
    other = tmp_path / "mpirun"
    name = "OMPI_COMM_WORLD" if has_mpich() else "PMI"
    other.write_text(
        f'#!/bin/sh\nshift 2\nexport {name}_SIZE=2\n{name}_RANK=0 "$@" & {name}_RANK=1 "$@"\nwait\n'
    )
    other.chmod(0o755)
    monkeypatch.setattr(doctor, "find_mpirun", lambda: str(other))
    state, words, _ = doctor.two_ranks()
    assert state == "without" and "from a different MPI implementation" in words


@pytest.fixture
def as_nobody(run, package, public_path):
    """Run `python ...` to its end as nobody, in an environment that has EDM and its MPI.

    It is one of its own, as this test's may be in a folder that is root's alone.
    """
    if os.getuid():
        pytest.skip("becoming nobody needs root")
    nobody = pwd.getpwnam("nobody")
    who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}
    base = python_of(Path(sys.executable).resolve(), who)
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
    assert states.keys() == CHECKS, ended.stdout
    for name in ("a page fault", "two ranks"):
        assert states[name] == "ok", ended.stdout
    assert states["idle pages"] == "without"
    assert (states["userfaultfd"] == "without") == ("user mode only" in ended.stdout)
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


@pytest.mark.undisturbed
@needs_userfaultfd
@pytest.mark.parametrize("most", [1, 2, 3, 4])  # root has no such limit
def test_too_few_processes_are_told_in_one_line(as_nobody, most):
    limit = partial(resource.setrlimit, resource.RLIMIT_NPROC, (most, most))
    ended = as_nobody("-m", "edm", "run", "-c", "print('started')", preexec_fn=limit)
    assert ended.returncode == 2, ended.stdout
    assert f"RLIMIT_NPROC (ulimit -u) is {most}" in ended.stdout, ended.stdout
    assert ended.stdout.replace("started\n", "").count("\n") == 1, ended.stdout


FEATURES = (
    u.NEEDED_FEATURES
    | u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | u.UFFD_FEATURE_POISON
    | u.UFFD_FEATURE_WP_ASYNC
)


@pytest.mark.parametrize(
    ("lacks", "state", "words"),
    [
        (0, "ok", "asynchronous write-protection of shared memory"),
        (u.NEEDED_FEATURES, "missing", "CONFIG_USERFAULTFD"),
        (u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "without", "all pages count as written"),
        (u.UFFD_FEATURE_POISON, "without", "a page that is lost ends the job"),
        (u.UFFD_FEATURE_WP_ASYNC, "without", "first writes are faults"),
    ],
)
def test_what_the_kernels_userfaultfd_lacks_is_told(monkeypatch, lacks, state, words):
    monkeypatch.setattr(u, "open_userfaultfd", lambda: (os.open("/dev/null", 0), u.USER_MODE))
    monkeypatch.setattr(u.Userfaultfd, "api", lambda self, features: FEATURES & ~lacks)
    found, told, _ = doctor.its_features()
    assert found == state and words in told


def test_a_userfaultfd_for_user_mode_only_is_told_with_what_it_lacks(monkeypatch):
    monkeypatch.setattr(u, "open_userfaultfd", lambda: (os.open("/dev/null", 0), u.USER_MODE))
    state, words, remedy = doctor.userfaultfd()
    assert state == "without" and "seccomp" in words and "EFAULT" in words
    assert "sysctl" in remedy


def test_a_process_that_is_not_dumpable_is_refused(as_nobody):
    code = "import ctypes, edm; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); edm.start()"
    ended = as_nobody("-c", code)
    assert ended.returncode == 1
    assert "PermissionError: [Errno 13] Permission denied: '/proc/self/pagemap'" in ended.stdout


@pytest.fixture
def at_the_start_of_each_python(monkeypatch, tmp_path):
    """Have this code executed first by the Pythons that are started."""

    def begin_with(code):
        (tmp_path / "sitecustomize.py").write_text(code)
        search = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{search}".rstrip(os.pathsep))

    return begin_with


NO_USERFAULTFD = """
from edm import uffd_ctypes as u
def fail():
    raise OSError({}, "userfaultfd: the reason")
u.open_userfaultfd = fail
"""


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_userfaultfd_that_there_is_not_is_missing(run, at_the_start_of_each_python, number):
    at_the_start_of_each_python(NO_USERFAULTFD.format(number))
    ended = run(sys.executable, "-m", "edm", "doctor")
    assert ended.returncode == 1 and "EDM can't run here." in ended.stdout, ended.stdout
    states = found(ended.stdout)
    for name in ("userfaultfd", "its features", "a page fault"):
        assert states[name] == "missing", ended.stdout
    assert states["two ranks"] == "without", ended.stdout
    assert "missing  userfaultfd: userfaultfd: the reason\n" in ended.stdout
    remedy = "try: sudo sysctl vm.unprivileged_userfaultfd=1" in ended.stdout
    assert remedy == (number == errno.EPERM), "what a kernel is built without no sysctl gives"


NO_WRITE_PROTECTION = """
from edm import uffd_ctypes as u
api, register = u.Userfaultfd.api, u.Userfaultfd.register
def without_write_protection(self, start, length, write_protect=True):
    if write_protect:
        raise OSError(22, "UFFDIO_REGISTER")
    register(self, start, length, write_protect)
wp = u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
u.Userfaultfd.api = lambda self, features: not features & wp and api(self, features)
u.Userfaultfd.register = without_write_protection
"""


@needs_userfaultfd
def test_a_page_comes_on_a_kernel_without_write_protection_too(at_the_start_of_each_python):
    at_the_start_of_each_python(NO_WRITE_PROTECTION)
    state, words, _ = doctor.a_page_fault()
    assert state == "ok" and "come back" in words


def test_why_no_page_comes_is_told_as_the_pager_says_it(monkeypatch):
    """As on a kernel that makes huge pages of memory files."""
    told = "edm: error: pages can't be written back into memory here: this kernel makes huge pages"
    monkeypatch.setattr(doctor, "_run", lambda *command: [told])
    assert doctor.a_page_fault() == ("missing", told, "")
