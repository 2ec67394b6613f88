"""python -m edm run: an ordinary Python program, with more memory than the machine has.

    python -m edm run --resident 12G script.py ...          mpirun and one DMS, on this machine
    mpirun -n 2 python -m edm run --resident 12G script.py ...           what the ranks say

In the picture: starts it all. Without mpirun it starts that, with itself as the ranks; in the
application process it is what Python's own command line is to a program.

Interface: main(arguments) is the command.

Rules: the program finds sys.argv, __main__, its tracebacks and exit status as Python gives them. What
mpirun would do to standard input, output and error, which are pipes of its own there and not a
terminal, is undone: the ranks open those of the process that has started mpirun.

Sources: "Command line and environment" in Python's documentation; proc(5); Documentation/admin-guide/
cgroup-v2.rst.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from edm import numpy_mem_handler
from edm.address_space import Space
from edm.edm import Config, add_settings, launched_rank, numpy_allocator, told_in_one_line
from edm.edm import main as run_as_command
from edm.uffd_ctypes import PAGE_SIZE, PR_SET_PDEATHSIG, prctl

STDIO = "EDM_STDIO"  # in the environment of the ranks: whose standard streams are theirs
PROG = "python -m edm run"
SHARE = 80  # % of the memory that is free, if nothing is said
SPACE = 256 << 30  # bytes of address space


_for_ever = contextlib.ExitStack()  # threads and exit functions make arrays after the script's end


def main(arguments: Sequence[str]) -> None:
    """Run the program that the arguments name, and exit with its status."""
    args = _parse(arguments)
    with told_in_one_line(PROG):
        config = _config(args)
        program = _program(args)
    if launched_rank() is None:
        _launch(arguments)
    launcher = os.environ.pop(STDIO, "")
    if launcher:
        _open_streams_of(launcher)

    def app(space: Space) -> None:
        if args.numpy:
            numpy_mem_handler.when_numpy_is_imported(
                lambda: _for_ever.enter_context(numpy_allocator(args.numpy_threshold))
            )
        _run(program)

    run_as_command(app, config)


# ---------------------------------------------------------------- the command line


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [option ...] (SCRIPT | -m MODULE | -c CODE) [argument ...]",
        description="Run a Python program with more memory than this machine has.",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run this module")
    parser.add_argument("-c", dest="code", nargs=argparse.REMAINDER, help="run this code")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="run this file")
    parser.add_argument(
        "--resident", metavar="SIZE",
        help="memory to use, at most: 512M, 12G, or 80%% of this machine's (default: "
        f"{SHARE}%% of what is free)",
    )  # fmt: skip
    parser.add_argument(
        "--numpy", action=argparse.BooleanOptionalAction, default=True,
        help="whether NumPy's large arrays live in the space (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--numpy-threshold", default="1M", metavar="SIZE", help="arrays from this size on (1M)"
    )
    add_settings(parser, ("high_threshold", "low_threshold"), end_addr=Config.start_addr + SPACE)
    args = parser.parse_args(arguments)
    if not (args.module or args.code or args.script):
        parser.error("which program? SCRIPT, -m MODULE or -c CODE")
    return args


def _config(args: argparse.Namespace) -> Config:
    if args.resident is None:
        resident = _memory()[1] * SHARE // 100 // _instances_here()
    else:
        resident = size_in_bytes("resident", args.resident)
    args.numpy_threshold = size_in_bytes("numpy_threshold", args.numpy_threshold)
    if resident < 2 * PAGE_SIZE:
        raise ValueError(f"resident: {args.resident} is less than two pages, {2 * PAGE_SIZE} bytes")
    settings = {name: value for name, value in vars(args).items() if name in Config.__annotations__}
    return Config(**settings, high_threshold=resident // PAGE_SIZE)


def size_in_bytes(setting: str, text: str) -> int:
    """512M, 12G, or 80% of this machine's memory, in bytes. Raises ValueError, naming the setting."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT]?)(?:i?B)?|(%))", text)
    if not found:
        raise ValueError(f"{setting}: {text!r} is no size; 512M, 12G or 80% are")
    number, unit, share = found.groups()
    if share:
        return int(_memory()[0] * float(number) / 100)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _instances_here() -> int:
    """How many instances share this machine's memory, as far as the launcher tells."""
    here = os.environ.get("MPI_LOCALNRANKS") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    ranks = os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return max(1, int(here or 2) - (here == ranks))  # with all of them, the DMS is here


def _memory() -> tuple[int, int]:
    """(all, free) bytes of this machine's memory, as far as memory cgroups let this process."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(info[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # none there; "max"
                limit, used = (int((folder / file).read_text()) for file in (name, usage))
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                left = limit - used + int(stat["inactive_file"])
                total, free = min(total, limit), min(free, left)
    return total, free


# ---------------------------------------------------------------- starting mpirun


def find_mpirun() -> str | None:
    """The path of mpirun: the one of this Python's environment, else the one on PATH."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


def _launch(arguments: Sequence[str]) -> NoReturn:
    """Run this command under mpirun, and exit with its status."""
    mpirun = find_mpirun()
    if mpirun is None:
        sys.exit(f"{PROG}: error: there is no mpirun; pip install mpich brings one")
    environment = {
        # For Open MPI: root may, and there may be fewer cores than ranks.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        **os.environ,
        STDIO: str(os.getpid()),
    }
    _make_stdin_openable()
    flags = subprocess._args_from_interpreter_flags()
    process = subprocess.Popen(
        [mpirun, "-n", "2", sys.executable, *flags, "-m", "edm", "run", *arguments],
        stdin=subprocess.DEVNULL,
        env=environment,
        # Unsafe with threads only, and there are none here.
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal gives it to mpirun too
    status = process.wait()
    sys.exit(status if status >= 0 else 128 - status)


def _make_stdin_openable() -> None:
    """A socket can't be opened by way of /proc: give the ranks a pipe instead."""
    with contextlib.suppress(OSError):  # it is closed
        if stat.S_ISSOCK(os.fstat(0).st_mode):
            copy = subprocess.Popen(["cat"], stdout=subprocess.PIPE)
            os.dup2(copy.stdout.fileno(), 0)
            copy.stdout.close()


def _open_streams_of(process: str) -> None:
    """Make the standard streams of that process this one's."""
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        # A pipe whose other end is closed would make a blocking open wait for ever.
        path, flags = f"/proc/{process}/fd/{number}", flags | os.O_NONBLOCK | os.O_NOCTTY
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
            if is_file and number > 0:
                continue  # whose position can't be shared so: mpirun writes to it
            stream = os.open(path, flags)
        except OSError:
            continue  # closed, or a socket: mpirun's will have to do
        os.set_blocking(stream, True)
        if is_file:
            position = Path(f"/proc/{process}/fdinfo/{number}").read_text().split()[1]
            os.lseek(stream, int(position), os.SEEK_SET)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())


# ---------------------------------------------------------------- the program


def _program(args: argparse.Namespace) -> tuple[str, str, list[str]]:
    """(script, -m or -c; what; its arguments). Raises ValueError if there is no such script."""
    for kind, words in (("-m", args.module), ("-c", args.code), ("script", args.script)):
        if words:
            break
    what, *arguments = words
    if kind == "script" and not os.path.exists(what):
        raise ValueError(f"can't open file {os.path.abspath(what)!r}: there is no such file")
    return kind, what, arguments


def _run(program: tuple[str, str, list[str]]) -> None:
    """As `python SCRIPT`, `python -m MODULE` and `python -c CODE` do."""
    kind, what, arguments = program
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=__builtins__)
    sys.modules["__main__"] = main
    sys.argv = [what if kind == "script" else kind, *arguments]
    if kind == "-m":
        runpy._run_module_as_main(what)  # what Python itself calls
    elif kind == "-c":
        sys.path[0] = ""
        exec(compile(what, "<string>", "exec"), main.__dict__)  # noqa: S102 - what this is for
    elif os.path.isdir(what) or zipfile.is_zipfile(what) or what.endswith(".pyc"):
        runpy.run_path(what, run_name="__main__")
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(what))
        main.__file__ = os.path.abspath(what)
        source = Path(what).read_bytes()
        exec(compile(source, main.__file__, "exec"), main.__dict__)  # noqa: S102 - likewise
