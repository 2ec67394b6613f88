"""python -m edm run: a program finds everything as plain Python gives it.

Each test runs a program under `python` and under `python -m edm run`, and compares. What the program
has in addition, a space, is in test_launch_space.py.
"""

import compileall
import os
import pty
import re
import select
import shutil
import signal
import site
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import needs_userfaultfd

import edm
from edm import launch
from edm.launch import size_in_bytes

pytestmark = needs_userfaultfd

RUN = ("-m", "edm", "run", "--resident", "16M")
EDM_COMMAND = Path(sys.executable).parent / "edm"
EDM_PTH = [file for folder in site.getsitepackages() for file in Path(folder).glob("edm.pth")]


def both(program, python=(), feed=b"", run=RUN, **options):
    """[(status, stdout, stderr)] of `python ... PROGRAM`, and of `python ... -m edm run PROGRAM`.

    program and feed may be functions that make them anew.
    """
    found = []
    for words in ((), run):
        made, stdin = (x() if callable(x) else x for x in (program, feed))
        ended = subprocess.run(
            [sys.executable, *python, *words, *made], input=stdin, capture_output=True, timeout=60,
            check=False, **options,
        )  # fmt: skip
        found.append(
            (
                ended.returncode,
                *(text.decode(errors="surrogateescape") for text in (ended.stdout, ended.stderr)),
            )
        )
    return found


# ---------------------------------------------------------------- what a program finds

ABOUT = """\
import sys
modules = sorted(sys.modules)
import os, signal
print(__name__, __doc__, __package__, __spec__ and __spec__.name, globals().get("__file__"))
print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.warnoptions, sys._xoptions, sys.executable)
print(os.getcwd(), sorted(os.environ.items()), [os.isatty(n) for n in range(3)])
print(modules, sorted(vars(sys.modules["__main__"])))
print([signal.getsignal(n) for n in signal.valid_signals()], signal.pthread_sigmask(0, ()))
print(sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout.write_through, __debug__)
print("to stderr", file=sys.stderr)
"""


def script(folder):
    (folder / "script.py").write_text(ABOUT)
    return ["script.py"]


def script_in_a_folder(folder):
    (folder / "folder").mkdir()
    script(folder / "folder")
    return ["folder/script.py"]


def compiled(folder):
    compileall.compile_file(folder / script(folder)[0], legacy=True, quiet=1)
    return ["script.pyc"]


def module(folder):
    script(folder)
    return ["-m", "script"]


def module_in_one_word(folder):
    script(folder)
    return ["-mscript"]


def package(folder):
    folder_with_main(folder)
    return ["-m", "folder"]


def code(folder):
    return ["-c", ABOUT]


def standard_input(folder):
    return ["-"]


def dev_stdin(folder):
    return ["/dev/stdin"]


def folder_with_main(folder):
    (folder / "folder").mkdir()
    (folder / "folder" / "__main__.py").write_text(ABOUT)
    return ["folder"]


def zip_file(folder):
    with zipfile.ZipFile(folder / "archive", "w") as archive:
        archive.writestr("__main__.py", ABOUT)
    return ["archive"]


@pytest.mark.parametrize(
    "kind",
    [
        script, script_in_a_folder, compiled, module, module_in_one_word, package, code,
        standard_input, dev_stdin, folder_with_main, zip_file,
    ],
)  # fmt: skip
def test_a_program_of_any_kind_finds_what_plain_python_gives_it(tmp_path, kind):
    program = [*kind(tmp_path), "-c", "--resident", "x y", "--", "-m"]
    plain, within = both(program, feed=ABOUT.encode(), cwd=tmp_path)
    assert within == plain
    assert plain[0] == 0 and plain[1].startswith("__main__"), plain


def test_a_script_may_be_a_fifo_or_a_descriptor(tmp_path):
    def fifo():
        path = tmp_path / "fifo"
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        threading.Thread(target=path.write_text, args=[ABOUT], daemon=True).start()
        return ["fifo"]

    plain, within = both(fifo, cwd=tmp_path)
    assert within == plain and plain[0] == 0, plain
    ends = []

    def descriptor():
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        ends.append(file.fileno())
        return [f"/dev/fd/{file.fileno()}"]

    with open(tmp_path / "text", "w+") as file:
        file.write(ABOUT)
        file.flush()
        plain, within = both(descriptor, cwd=tmp_path, pass_fds=[file.fileno()])
    assert within == plain and plain[0] == 0, plain


def test_a_command_that_is_written_in_python_is_found_on_path(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, first in {
        "direct": f"#!{sys.executable} -E\n",
        "by-env": "#!/usr/bin/env python3\n",
        "long": f"#!/bin/sh\n'''exec' '{sys.executable}' \"$0\" \"$@\"\n' '''\n",
    }.items():
        (commands / name).write_text(first + ABOUT)
        (commands / name).chmod(0o755)
        search = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
        plain, _ = both([str(commands / name), "-x"], cwd=tmp_path, env=search)
        _, within = both([name, "-x"], cwd=tmp_path, env=search)
        assert within == plain and plain[0] == 0, plain


def test_a_file_goes_before_a_command_of_its_name(tmp_path):
    (tmp_path / "pytest").write_text("print('the file')")
    plain, within = both(["pytest"], cwd=tmp_path)
    assert within == plain == (0, "the file\n", "")


# ---------------------------------------------------------------- Python's own options

SAFE_PATH = sys.version_info >= (3, 11)


@pytest.mark.parametrize(
    "options",
    [
        ["-O"], ["-OO"], ["-W", "error"], ["-Wignore", "-Wdefault::UserWarning"], ["-X", "dev"],
        ["-Xutf8", "-X", "tracemalloc=2"], ["-u"], ["-B"], ["-s"], ["-bb"], ["-i"], ["-Oqu"],
        ["--check-hash-based-pycs", "always"],
        pytest.param(["-P"], marks=pytest.mark.skipif(not SAFE_PATH, reason="new in 3.11")),
    ],
    ids="".join,
)  # fmt: skip
def test_options_of_python_itself_reach_the_program(tmp_path, options):
    plain, within = both(script(tmp_path), options, cwd=tmp_path)
    assert within == plain and plain[0] == 0, plain


def test_inspection_after_the_program_works(tmp_path):
    plain, within = both(["-c", "x = 42; 1/0"], ["-i"], b"print(x)\n", cwd=tmp_path)
    assert within == plain and plain[1] == "42\n"


@pytest.mark.parametrize(
    ("spelled", "options"),
    [
        (["-medm", "run"], []),
        (["-Om", "edm", "run"], ["-O"]),
        (["-Oumedm", "run"], ["-Ou"]),
        (["-W", "error", "-O", "-m", "edm", "run"], ["-W", "error", "-O"]),
        pytest.param(
            ["-O", str(EDM_COMMAND), "run"],
            ["-O"],
            marks=pytest.mark.skipif(not EDM_COMMAND.exists(), reason="not installed: edm"),
        ),
    ],
)
def test_edm_itself_may_be_spelled_as_any_module(tmp_path, spelled, options):
    plain, _ = both(script(tmp_path), options, cwd=tmp_path)
    _, within = both(script(tmp_path), run=spelled, cwd=tmp_path)
    assert within == plain and plain[0] == 0, plain


@pytest.mark.parametrize("option", ["-I", "-E", "-S", "-IO"])
def test_where_python_ignores_sitecustomize_the_program_runs_plainly_and_a_line_says_so(
    tmp_path, option
):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "edm").symlink_to(Path(edm.__file__).parent)
    search = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    plain, within = both(script(tmp_path), [option], cwd=tmp_path, env=search)
    line, *stderr = within[2].splitlines(keepends=True)
    assert (*within[:2], "".join(stderr)) == plain and plain[0] == 0
    assert line.startswith("python -m edm run: EDM is not used: python -"), line


def test_without_standard_error_nothing_of_edms_is_on_standard_output(run):
    command = f"{sys.executable} -u -I -m edm run --resident 16M -c 'print(1)' 2>&-"
    ended = run("sh", "-c", command)
    assert (ended.returncode, ended.stdout) == (0, "1\n")


# ---------------------------------------------------------------- how a program ends

DIES_IN_ITS_HOOK = """
import os, sys
sys.excepthook = lambda *error: (print("mine", file=sys.stderr), os._exit(3))
1/0
"""
FINALIZED = """
NAME = "a global"
class Last:
    def __del__(self): print(NAME, "is there when finalizers run")
last = Last()
"""
IN_A_THREAD = """
import threading, time
threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
"""
LOGGED = """
import logging, logging.handlers, sys
handler = logging.handlers.MemoryHandler(100, target=logging.StreamHandler(sys.stdout))
logging.getLogger().addHandler(handler)
logging.error("kept until the end")
"""
KILLED = "import os, signal; os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize(
    "code",
    [
        "pass", "1/0", "this is no Python", "raise SystemExit", "import sys; sys.exit(7)",
        "import sys; sys.exit('bye')", "import sys; sys.exit(-1)", "import os; os._exit(5)",
        "raise KeyboardInterrupt", "def f(): raise ValueError('x') from KeyError(1)\nf()",
        "import sys; sys.excepthook = lambda *error: sys.exit(5); 1/0",
        "import sys; sys.excepthook = lambda *error: open('/nowhere'); 1/0",
        "import sys; sys.stderr.close()", "import sys; sys.stdout = None",
        "import ctypes; ctypes.CDLL(None).printf(b'by C\\n')",
        "import atexit; atexit.register(print, 'the end')", "import json; json.loads('{')",
        DIES_IN_ITS_HOOK, FINALIZED, IN_A_THREAD, LOGGED, "import nothing_of_that_name",
        *map(KILLED.format, ("SIGKILL", "SIGTERM", "SIGINT", "SIGSEGV", "SIGPIPE")),
    ],
)  # fmt: skip
def test_a_program_ends_with_its_own_status_and_words(tmp_path, code):
    (tmp_path / "script.py").write_text(code)
    for program in (["-c", code], ["script.py"]):
        plain, within = both(program, cwd=tmp_path)
        assert within == plain


@pytest.mark.parametrize("error", ["TimeoutError", "ConnectionError", "MemoryError"])
def test_what_a_signal_handler_raises_amid_the_making_of_arrays_is_the_programs(error):
    pytest.importorskip("numpy")
    code = f"""
import numpy, signal
class Late({error}): pass
def late(*_): raise Late
signal.signal(signal.SIGALRM, late)
for i in range(30):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0001 * (i % 10))
        while True: numpy.empty(1 << 18)
    except Late:
        pass
"""
    assert both(["-c", code])[1] == (0, "", "")


@pytest.mark.parametrize(
    "handler",
    ["sys.exit(5)", "sys.exit('stopped')", "os.kill(os.getpid(), signal.SIGINT)", "1 / 0"],
)
def test_a_signal_handler_that_ends_a_program_amid_its_arrays_does_so_in_its_own_way(
    tmp_path, handler
):
    pytest.importorskip("numpy")
    code = f"""
import numpy, os, signal, sys, threading
def on_alarm(*_):
    {handler}
def work():
    a = numpy.ones(300_000)
    while True: a + 1
signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.1)
work()
"""
    (tmp_path / "script.py").write_text(code)
    (status, _, words), *within = (
        found for _ in range(3) for found in both(["script.py"], cwd=tmp_path)
    )
    for found in within:
        assert found[0] == status
        assert ("in on_alarm" in found[2]) == ("in on_alarm" in words)
        assert found[2].splitlines()[-1:] == words.splitlines()[-1:] and "numpy_mem" not in found[2]


def test_warnings_that_are_errors_are_the_programs_own():
    options = ["-X", "warn_default_encoding", "-W", "error", "-X", "dev"]
    plain, within = both(["-c", "print(1)"], options, run=("-m", "edm", "run"))
    assert within == plain


@pytest.mark.parametrize("folder", ["/nowhere", "/proc", ""])
def test_a_tmpdir_that_cant_be_written_is_not_used(folder):
    code = "import tempfile, edm; print(tempfile.gettempdir())"
    plain, within = both(["-c", code], env={**os.environ, "TMPDIR": folder})
    assert within == plain and plain[0] == 0


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (["-m", "nothing"], 1), (["-m", "os.nothing"], 1), (["empty"], 1), (["-m"], 2), (["-c"], 2),
        (["/nowhere/x.py"], 2), (["no-such-command"], 2), (["empty/x.py", "--resident"], 2),
    ],
)  # fmt: skip
def test_what_python_says_of_a_program_that_is_not_there(tmp_path, program, status):
    (tmp_path / "empty").mkdir()
    plain, within = both(program, cwd=tmp_path)
    assert within == plain and plain[0] == status


@pytest.mark.parametrize("handled", ["SIG_DFL", "SIG_IGN", "print_and_exit", "default_int_handler"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_process_that_was_started_is_the_programs(number, handled):
    code = f"""
import os, signal, sys
def print_and_exit(*_): print("came", flush=True); sys.exit(9)
handlers = {{**vars(signal), "print_and_exit": print_and_exit}}
signal.signal({number:d}, handlers["{handled}"])
print(os.getpid(), flush=True); os.read(0, 1)
"""
    found = []
    for words in ((), RUN):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([sys.executable, *words, "-c", code], text=True, **pipes)
        try:
            assert process.stdout.readline() == f"{process.pid}\n"
            # The traceback says where it was: in the read.
            state, deadline = Path(f"/proc/{process.pid}/stat"), time.monotonic() + 20
            while ") S " not in state.read_text() and time.monotonic() < deadline:
                time.sleep(0.001)
            process.send_signal(number)
            if handled == "SIG_IGN":
                process.stdin.write("\n")
            output = process.communicate(timeout=20)
        finally:
            process.kill()
            process.communicate()
        found.append((process.returncode, output))
    assert found[0] == found[1]


# ---------------------------------------------------------------- streams and descriptors


def test_standard_streams_are_those_of_whoever_started_it(tmp_path):
    with open(tmp_path / "output", "w+b") as output:
        output.write(b"before\n")
        output.flush()
        command = [sys.executable, *RUN, "-c", "print('x' * 100000)"]
        subprocess.run(command, stdout=output, check=True, timeout=60)
        output.seek(0)
        assert output.read() == b"before\n" + b"x" * 100000 + b"\n"
    ours, theirs = socket.socketpair()
    ours.sendall(b"over a socket\n" * 1000)
    ours.shutdown(socket.SHUT_WR)
    command = [sys.executable, *RUN, "-c", "import sys; print(len(sys.stdin.read()))"]
    ended = subprocess.run(command, stdin=theirs, capture_output=True, check=True, timeout=60)
    assert ended.stdout == b"14000\n"


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_stream_may_be_closed(tmp_path, closed):
    about = "import sys; print([s is None for s in (sys.stdin, sys.stdout, sys.stderr)], file={})"
    code = about.format("sys.stderr" if closed == 1 else "sys.stdout")
    plain, within = both(["-c", code], cwd=tmp_path, preexec_fn=lambda: os.close(closed))
    assert within == plain and "True" in plain[1] + plain[2]


def test_a_program_has_the_descriptors_that_it_is_given(tmp_path):
    read, write = os.pipe()
    plain, within = both(
        lambda: os.write(write, b"bytes") and ["-c", f"import os; print(os.read({read}, 5))"],
        pass_fds=[read],
    )
    os.close(read)
    os.close(write)
    assert within == plain == (0, "b'bytes'\n", "")


def on_a_terminal(*command):
    """What a command prints on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    output, deadline = b"", time.monotonic() + 60
    try:
        while select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            output += os.read(terminal, 1 << 16)
        os.kill(pid, signal.SIGKILL)
        pytest.fail(f"still running: {output}")
    except OSError:  # EIO: everybody has closed it
        pass
    finally:
        os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, output
    return output.decode()


def test_a_program_on_a_terminal_has_the_terminal():
    code = (
        "import os, sys; print([os.isatty(n) for n in range(3)], sys.stdout.line_buffering,"
        " os.tcgetpgrp(0) == os.getpid() == os.getsid(0))"
    )
    plain = on_a_terminal(sys.executable, "-c", code)
    assert on_a_terminal(sys.executable, *RUN, "-c", code) == plain
    assert plain.startswith("[True, True, True]") and plain.endswith("True\r\n"), plain


# ---------------------------------------------------------------- the environment, other processes

SEES = (
    "import os, sys; print(sys.path, os.environ.get('PYTHONPATH'), 'sitecustomize' in sys.modules)"
)


@pytest.mark.parametrize("before", [None, "", ":", "a", "a::b:", "/nowhere/\udcff"])
def test_pythonpath_is_as_the_user_has_it(tmp_path, before):
    search = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    search |= {} if before is None else {"PYTHONPATH": before}
    plain, within = both(["-X", "utf8", "-c", SEES][2:], cwd=tmp_path, env=search)
    assert within == plain


def test_a_variable_may_have_no_name():
    begin = "import ctypes, os, sys; ctypes.CDLL(None).putenv(b'=x'); os.execv(sys.executable, "
    for words in ((), RUN):
        command = [sys.executable, *words, "-c", "import os; print(os.environ[''])"]
        whole = [sys.executable, "-c", f"{begin}{command})"]
        ended = subprocess.run(whole, capture_output=True, timeout=60, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"x\n", b"")


def test_the_command_may_have_no_name(monkeypatch):
    taken = []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "execv", lambda *command: taken.append(command))
    monkeypatch.setattr(sys, "orig_argv", ["", *RUN, "-c", "pass"])
    monkeypatch.setattr(sys, "argv", ["", *RUN[2:], "-c", "pass"])
    launch.main([*RUN[3:], "-c", "pass"])
    assert taken == [(sys.executable, ["python3", "-c", "pass"])]  # what Python takes for ""


CUSTOMIZED = """\
import sys
sys.customized = __name__, __file__, sys.modules[__name__].__spec__.name, sorted(sys.modules)
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sitecustomize", CUSTOMIZED),
        pytest.param(
            "usercustomize",
            CUSTOMIZED,
            marks=pytest.mark.skipif(not site.ENABLE_USER_SITE, reason="not in a venv"),
        ),
        ("sitecustomize", CUSTOMIZED + "1/0"),
        ("sitecustomize", CUSTOMIZED + "raise ImportError('of its own', name='x')"),
        ("sitecustomize", CUSTOMIZED + "import importlib, json, logging, types"),
    ],
)
def test_the_users_own_sitecustomize_is_run(tmp_path, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    search = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = f"import sys; print(sys.customized, sys.modules.get('{name}'), sorted(sys.modules))"
    plain, within = both(["-c", code], cwd=tmp_path, env=search)
    # The launcher is a Python program as well: what goes wrong there is told by it, too.
    assert within == (*plain[:2], 2 * plain[2])
    assert plain[0] == 0 and "sitecustomize" in plain[1]


CHILD = "import os, sys; print(sorted(os.environ), sys.path, sorted(sys.modules))"
CHILDREN = {
    "a child": f"subprocess.run([sys.executable, '-c', {CHILD!r}])",
    "by fork": "pid = os.fork()\nif pid == 0: print(sorted(os.environ), sys.path)\nelse: os.waitpid(pid, 0)",
    "by exec": f"os.execv(sys.executable, [sys.executable, '-c', {CHILD!r}])",
    "itself": "'AGAIN' in os.environ or os.execve(sys.executable, sys.orig_argv, "
    "{**os.environ, 'AGAIN': ''})\nprint(sys.argv, sys.path, sorted(os.environ))",
    "nested": f"subprocess.run([sys.executable, *{RUN}, '-c', {CHILD!r}])",
    "a subinterpreter": "try: import _interpreters as i\nexcept ImportError: import _xxsubinterpreters as i\n"
    "i.run_string(i.create(), 'import os, sys; print(sorted(os.environ), sys.path, sorted(sys.modules))')",
    "spawned": "import multiprocessing\nif __name__ == '__main__':\n"
    "    p = multiprocessing.get_context('spawn').Process(target=print, args=[1])\n"
    "    p.start(); p.join(); sys.exit(p.exitcode)",
}


@pytest.mark.parametrize("kind", CHILDREN)
def test_other_processes_that_a_program_starts_are_plain(tmp_path, kind):
    code = f"import os, subprocess, sys\n{CHILDREN[kind]}"
    (tmp_path / "script.py").write_text(code)
    for program in (["script.py"], ["-c", code]):
        plain, within = both(program, cwd=tmp_path)
        assert within == plain and plain[0] == 0 and plain[1], plain


# ---------------------------------------------------------------- modules of the same name

OF_THE_LIBRARY = ["argparse", "contextlib", "ctypes", "dataclasses", "edm", "enum", "json", "logging", "queue", "re", "socket", "struct", "threading", "types"]  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_a_module_beside_the_script_goes_before_all_others_of_its_name(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("NAME = 'its own'")
    (tmp_path / "script.py").write_text(f"import {name}; print(vars({name}).get('NAME'))")
    plain, within = both([tmp_path / "script.py"], cwd="/")
    assert within == plain and plain[0] == 0, plain


def test_modules_of_the_current_folder_are_not_edms(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("argparse", "log", "logging", "mpi4py", "numpy", "random", "signal", "socket"):
        (here / f"{name}.py").write_text(f"raise SystemExit('the current folder has {name}')")
    (tmp_path / "script.py").write_text(ABOUT)
    plain, within = both(["../script.py"], cwd=here)
    assert within == plain and plain[0] == 0


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            [str(EDM_COMMAND), "run"],
            marks=pytest.mark.skipif(not EDM_COMMAND.exists(), reason="not installed: edm"),
        ),
        *(
            pytest.param(
                run, marks=pytest.mark.skipif(not EDM_PTH, reason="not installed: edm.pth")
            )
            for run in (["-m", "edm", "run"], ["-Omedm", "run"])
        ),
    ],
    ids=" ".join,
)
def test_edm_itself_is_not_looked_for_in_the_current_folder(tmp_path, run):
    (tmp_path / "edm").mkdir()
    (tmp_path / "edm" / "__init__.py").write_text("raise SystemExit('the current folder has edm')")
    plain, _ = both(["-c", ABOUT], ["-O"] if "-O" in run[0] else [], cwd=tmp_path)
    _, within = both(["-c", ABOUT], run=run, cwd=tmp_path)
    assert within == plain and plain[0] == 0


@pytest.mark.skipif(not EDM_PTH, reason="not installed: edm.pth")
@pytest.mark.parametrize("name", ["types", "contextlib", "pkgutil"])
def test_what_python_imports_for_its_m_is_not_looked_for_in_the_current_folder(tmp_path, run, name):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    [packages] = bare.glob("lib/python*/site-packages")
    (packages / "edm").symlink_to(Path(edm.__file__).parent)
    shutil.copy(EDM_PTH[0], packages)
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the current folder has it')")
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "script.py").write_text("print('started')")
    ended = run(bare / "bin" / "python", *RUN, "program/script.py", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "started\n")


def test_of_two_ranks_without_a_gil_one_says_so(run, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    [packages] = bare.glob("lib/python*/site-packages")
    (packages / "a.pth").write_text("import sys; sys._is_gil_enabled = lambda: False\n")
    (packages / "edm").symlink_to(Path(edm.__file__).parent)
    for rank in (0, 1):
        variables = f"OMPI_COMM_WORLD_RANK={rank}", "OMPI_COMM_WORLD_SIZE=2"
        ended = run("env", *variables, bare / "bin" / "python", *RUN, "-c", "pass")
        assert (ended.returncode, ended.stdout.count("\n")) == (2, 1 - rank), ended.stdout
        assert rank or "PYTHON_GIL=1 turns it on" in ended.stdout


@pytest.mark.skipif(not EDM_PTH, reason="not installed: edm.pth")
@pytest.mark.parametrize("program", [["-m", "other", "-m", "edm"], ["other", "edm"], ["-mother"]])
def test_other_programs_do_not_get_edm(tmp_path, program):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__main__.py").write_text("import sys; print('edm' in sys.modules)")
    assert both(program, run=(), cwd=tmp_path)[0] == (0, "False\n", "")


def test_a_module_called_numpy_is_not_taken_for_numpy(tmp_path):
    (tmp_path / "numpy.py").write_text("NAME = 'its own'")
    plain, within = both(["-c", "import numpy; print(numpy.NAME, numpy.__file__)"], cwd=tmp_path)
    assert within == plain and plain[0] == 0


IMPORTED = """
import copyreg, ctypes, importlib, importlib.util, inspect, logging, pickle, sys, threading, weakref
print([importlib.util.find_spec(name).origin for name in ("json", "dis", "types")])
import dis, json, types
for module in (ctypes, dis, importlib.util, json, logging, threading, types):
    print(module.__name__, type(module.__loader__), type(module.__spec__.loader), module.__spec__.origin)
    print(module.__loader__ is module.__spec__.loader, len(inspect.getsource(module)))
print(pickle.loads(pickle.dumps(types.SimpleNamespace(a=logging.Formatter))))
del sys.modules["json"]
import json as another
print(another is json, importlib.reload(logging) is logging, threading.main_thread().name)
"""


@pytest.mark.parametrize("what", ["raise KeyError(name)", "raise ImportError(name)", "import none"])
def test_a_numpy_that_cant_be_imported_has_the_traceback_of_plain_python(tmp_path, what):
    (tmp_path / "numpy.py").write_text(f"name = 'its own'\n{what}\n")
    plain, within = both(["-c", "import numpy"], cwd=tmp_path)
    assert within == plain and plain[0] == 1


def test_finders_of_modules_can_be_compared_and_hashed():
    plain, within = both(["-c", "import sys; print(len({*sys.meta_path}) == len(sys.meta_path))"])
    assert within == plain == (0, "True\n", "")


def test_a_finder_that_fails_has_no_frame_of_edms():
    finder = "class Finder:\n    def find_spec(self, *names): raise OSError('its own')\n"
    program = f"import sys\n{finder}sys.meta_path[:0] = [Finder()]\nimport numpy"
    plain, within = both(["-c", program])
    frames = [line for line in within[2].splitlines() if "_bootstrap" not in line]
    assert frames == [line for line in plain[2].splitlines() if "_bootstrap" not in line]
    program = f"import sys\n{finder}sys.meta_path.append(Finder())\nsys.path[:] = []\nimport numpy"
    plain, within = both(["-c", program])
    assert within[0] == plain[0] == 1 and within[2].endswith("\nOSError: its own\n")
    assert "startup" not in within[2], within[2]


def test_numpy_may_be_imported_by_a_loader_of_the_programs_own_and_reloaded(tmp_path):
    (tmp_path / "numpy.py").write_text("print('it is imported')")
    program = """
import importlib, importlib.util, sys

class Own:
    def __init__(self, loader):
        self.loader, self.exec_module = loader, lambda module: loader.exec_module(module)
    def create_module(self, spec):
        return self.loader.create_module(spec)

class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            sys.meta_path.insert(0, self)
            spec.loader = Own(spec.loader)
            return spec

sys.meta_path.insert(0, Finder())
import numpy
importlib.reload(numpy)
"""
    plain, within = both(["-c", program], cwd=tmp_path)
    assert within == plain == (0, "it is imported\n" * 2, "")


def test_a_warning_while_numpy_is_imported_names_the_line_that_imports_it(tmp_path):
    (tmp_path / "numpy.py").write_text("import warnings\nwarnings.warn('old', stacklevel=2)\n")
    (tmp_path / "script.py").write_text("import numpy\n")
    plain, within = both(["script.py"], cwd=tmp_path)
    assert within == plain and "script.py:1: UserWarning" in plain[2]


def test_what_numpy_was_imported_by_can_be_pickled():
    pytest.importorskip("numpy")
    code = (
        "import numpy, pickle; print(pickle.loads(pickle.dumps(numpy.__spec__)) == numpy.__spec__)"
    )
    plain, within = both(["-c", code])
    assert within == plain == (0, "True\n", "")


@pytest.mark.parametrize(
    "locale",
    [
        {}, {"LC_CTYPE": "C"}, {"LC_ALL": "C"}, {"LANG": "C", "LC_CTYPE": "C.UTF-8"},
        {"LANG": "C.UTF-8", "LC_CTYPE": "C"}, {"LC_ALL": "C", "LC_CTYPE": "C.UTF-8"},
        {"LC_CTYPE": "C.UTF-8", "PYTHONUTF8": "1"}, {"PYTHONUTF8": "0"}, {"PYTHONUTF8": "1"},
        {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}, {"LANG": "C.UTF-8", "PYTHONUTF8": "1"},
        {"LC_ALL": "", "LC_CTYPE": "POSIX"}, {"LC_CTYPE": ""},
    ],
)  # fmt: skip
def test_the_locale_is_as_the_user_has_it(locale):
    env = {name: os.environ[name] for name in os.environ if not re.match("LC_|LANG$", name)}
    code = """
import locale, os, sys
print(sys.stdout.encoding, sys.stdin.errors, sys.getfilesystemencoding(), os.environ.get("LC_CTYPE"))
print(locale.getlocale(), locale.getpreferredencoding().lower(), sys.flags.utf8_mode)
print(open(os.devnull).encoding)
"""
    plain, within = both(["-c", code], env=env | locale)
    assert within == plain and plain[0] == 0


def test_modules_of_the_library_are_as_they_always_are(tmp_path):
    plain, within = both(["-c", IMPORTED], cwd=tmp_path)
    assert within == plain and plain[0] == 0
    plain, within = both(["-m", "dis", *script(tmp_path)], cwd=tmp_path)
    assert [re.sub("0x[0-9a-f]+", "", text) for text in (plain[1], plain[2])] == [
        re.sub("0x[0-9a-f]+", "", text) for text in (within[1], within[2])
    ]


EDM_IS_THE_SAME = """
import edm, pickle, sys
assert set(edm.__all__) <= set(dir(edm))
assert edm.space() is sys.modules["edm.edm"].space()
import edm.mailbox
from edm import Config, launch
assert pickle.loads(pickle.dumps(Config())) == Config() and launch.Config is Config
assert edm.mailbox is sys.modules["edm.mailbox"] is edm.address_space.mailbox
print(edm.mailbox.__spec__.loader is edm.mailbox.__loader__)
"""


@pytest.mark.parametrize(
    "cwd", ["/", Path(edm.__file__).parent, Path(edm.__file__).parent / "tests"]
)
def test_a_program_that_imports_edm_gets_the_one_that_was_started(cwd):
    _, within = both(["-c", EDM_IS_THE_SAME], cwd=cwd)
    assert within == (0, "True\n", "")


def test_edm_that_is_not_installed_is_found_as_the_launcher_was(tmp_path):
    python = os.path.realpath(sys.executable)
    command = [python, "-c", "import edm"]
    if not subprocess.run(command, cwd="/", capture_output=True, check=False).returncode:
        pytest.skip("edm is installed for all")
    (tmp_path / "edm").symlink_to(Path(edm.__file__).parent)
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "script.py").write_text("import edm; print(edm.space() is not None)")
    ended = subprocess.run(
        [python, *RUN, "program/script.py"], cwd=tmp_path, capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"True\n", b"")


# ---------------------------------------------------------------- the launcher's own options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resident", "12X", "x.py"], "resident: '12X' is not a size"),
        (["--resident", "4K", "x.py"], "resident: 1 pages; at least 2"),
        (["--numpy-threshold", "much", "x.py"], "numpy-threshold: 'much' is not a size"),
        (["--readahead", "0", "x.py"], "readahead: 0 pages"),
        (["--readahead", "many", "x.py"], "--readahead"),
        (["--readahead"], "--readahead"),
        (["--no-such", "x.py"], "--no-such"),
        (["-O", "x.py"], "-O"),
        ([], "required: program"),
        (["--stats"], "required: program"),
        (["--disk", "-m", "x"], "disk, report: a path has no null byte"),
        (["--report", "/nowhere/x.html", "-c", "pass"], "report: /nowhere/x.html can't be written"),
        (["--dms", "1", "x.py"], "dms: needs MPI ranks: mpirun -n 2, or more"),
        (["--dms", "2", "x.py"], "dms: needs MPI ranks: mpirun -n 3, or more"),
    ],
)
@pytest.mark.parametrize("python", [[], ["-OO", "-W", "error"]], ids=["", "-OO"])
def test_a_mistake_is_told_in_one_line_with_status_2(arguments, words, python, tmp_path):
    (tmp_path / "x.py").write_text("print('started')")
    _, within = both(arguments, python, run=RUN[:3], cwd=tmp_path)
    status, output, errors = within
    assert (status, output) == (2, "") and words in errors, within
    assert errors.startswith("python -m edm run: error: ") and errors.count("\n") == 1, errors


def test_a_report_in_a_folder_that_was_removed_is_refused_in_one_line(run, tmp_path):
    (folder := tmp_path / "folder").mkdir()
    code = f"import os, sys; os.rmdir({str(folder)!r}); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, *RUN[:3], "--report", "x.html", "-c", "pass"]
    ended = run(sys.executable, "-c", code, *command, cwd=folder)
    words = "python -m edm run: error: [Errno 2] No such file or directory\n"
    assert (ended.returncode, ended.stdout) == (2, words)


def test_what_python_says_of_a_command_that_is_not_written_in_python(tmp_path):
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\necho $1\n")
    command.chmod(0o755)
    search = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name, path in (("command", command), ("ls", shutil.which("ls"))):
        plain, _ = both([path], env=search)
        _, within = both([name], env=search)
        assert within == plain and "SyntaxError: " in plain[2] and str(path) in plain[2], plain


def test_options_end_where_the_program_begins(capfd, monkeypatch):
    became = []
    monkeypatch.setattr(os, "execv", lambda *command: became.append(command[1]))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-O", "-m", "edm", "run", "-c", "1"])
    monkeypatch.setattr(sys, "argv", ["__main__.py", "run", "-c", "1"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for options in (["--resident=16M", "--stats"], ["--resident", "16M", "--no-numpy"], []):
        for program in (["-c", "pass", "--stats"], ["-mabc", "--no-such"], ["-", "-h"]):
            launch.main([*options, *program])
            assert became.pop() == ["python", "-O", *program]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_option_on_standard_output(option):
    _, (status, output, errors) = both([option], run=RUN[:3])
    assert (status, errors) == (0, "")
    for name in ("--resident", "--no-numpy", "--numpy-threshold", "--dms", "--stats", "COMMAND"):
        assert name in output


def test_several_instances_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.setattr(launch, "_memory", lambda: (10_000 << 20, 4000 << 20))
    monkeypatch.setenv("PMI_RANK", "1")
    for dms, here, ranks, mib in (
        ("0", "", "", 3200), ("0", "2", "2", 1600), ("0", "2", "4", 1600), ("1", "2", "2", 3200),
        ("1", "5", "5", 800), ("1", "2", "3", 1600),
    ):  # fmt: skip
        monkeypatch.setenv("MPI_LOCALNRANKS", here)
        monkeypatch.setenv("PMI_SIZE", ranks)
        config = launch.parse(["--dms", dms, "-"])[1]
        assert config.high_threshold == (mib << 20) // 4096


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("12G", 12 << 30), ("1.5KiB", 1536), ("2TB", 2 << 40), ("8192", 8192)],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


def test_the_resident_size_may_be_given_in_pages_too():
    for options in (["--resident", "8M"], ["--resident", "1G", "--high-threshold", "2048"]):
        config = launch.parse([*options, "--low-threshold", "7", "-"])[1]
        assert (config.high_threshold, config.low_threshold) == ((8 << 20) // edm.PAGE_SIZE, 7)


def test_a_share_is_of_this_machines_memory(monkeypatch):
    monkeypatch.setattr(launch, "_memory", lambda: (1000 << 20, 400 << 20))
    assert size_in_bytes("80%") == 800 << 20


def test_the_startup_folder_has_nothing_else_that_a_program_could_import():
    startup = Path(edm.__file__).parent / "startup"
    names = {path.name for path in startup.iterdir()} - {"__pycache__"}
    assert names == {"sitecustomize.py"} and stat.S_ISREG((startup / names.pop()).stat().st_mode)
