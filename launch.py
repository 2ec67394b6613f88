"""python -m edm run: an ordinary Python program, with more memory than the machine has.

    python -m edm run --resident 12G script.py ...                       on one machine
    mpirun -n 3 python -m edm run --dms 1 --resident 12G script.py ...   rank 0 is the DMS

In the picture: starts it all. The process that the user started checks the command line, and then
replaces itself by `python script.py ...`. On its way to the script, that interpreter imports
startup/sitecustomize.py, which starts EDM; see there. All that Python does for a program, Python does.

Interface: main(arguments) is the command.

Rules: a mistake is told in one line, with exit status 2, before anything is started. Settings go to
startup/sitecustomize.py in one environment variable, which is removed there.

Sources: "Command line and environment" in Python's documentation; proc(5); Documentation/admin-guide/
cgroup-v2.rst.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import marshal
import os
import re
import sys
from collections.abc import Sequence

from edm.edm import PAGE_SIZE, Config, add_settings

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import NoReturn

PROG = "python -m edm run"
SHARE = 80  # % of the memory that is free, if nothing is said
SPACE = 256 << 30  # bytes of address space
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")  # an MPI launcher sets one of these


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the Python process that runs the program which the arguments name."""
    parser = _parser()
    options, program = _split(parser, arguments)
    args = parser.parse_args(options)
    try:
        config = _config(args)
        program = _as_python_takes_it(program)
    except ValueError as error:
        parser.error(str(error))
    if sys.flags.ignore_environment or sys.flags.no_site:
        option = "S" if sys.flags.no_site else "I" if sys.flags.isolated else "E"
        why = f"python -{option} ignores the sitecustomize on PYTHONPATH that starts it"
        print(f"{PROG}: EDM is not used: {why}", file=sys.stderr)
    else:
        before = os.environ.get("PYTHONPATH")
        threshold = args.numpy_threshold if args.numpy else None
        settings = {"config": vars(config), "numpy_threshold": threshold, "PYTHONPATH": before}
        os.environ["EDM_RUN"] = marshal.dumps(settings).hex()
        startup = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")
        os.environ["PYTHONPATH"] = f"{startup}{os.pathsep}{before}" if before else startup
    os.execv(sys.executable, [sys.executable, *_interpreter_options(), *program])


# ---------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        usage=f"{PROG} [option ...] (SCRIPT | COMMAND | -m MODULE | -c CODE | -) [argument ...]",
        description="Run a Python program with more memory than this machine has. COMMAND is one "
        "that is written in Python, such as pytest.",
        allow_abbrev=False,
        # With a width, as argparse looks for the terminal's at each option otherwise.
        formatter_class=functools.partial(argparse.HelpFormatter, width=100),
    )
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
    parser.add_argument(
        "--dms", type=int, choices=(0, 1), default=0,
        help="so many ranks of an MPI job keep the pages of the others, and run no program (0)",
    )  # fmt: skip
    left_out = ("high_threshold", "low_threshold", "dms")
    add_settings(parser, left_out, end_addr=Config.start_addr + SPACE)
    return parser


def _split(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """(EDM's options, the program with its own)."""
    at = 0
    while at < len(arguments) and re.match(r"-[^mc]", arguments[at]):
        action = parser._option_string_actions.get(arguments[at])
        at += 1 if action is None or action.nargs == 0 else 2
    return arguments[:at], arguments[at:]


def _as_python_takes_it(program: Sequence[str]) -> Sequence[str]:
    """The program, with a command's path for its name. Raises ValueError if there is no program."""
    if not program:
        raise ValueError("which program? SCRIPT, COMMAND, -m MODULE, -c CODE or -")
    name, *arguments = program
    if name in ("-m", "-c") and not arguments:
        raise ValueError(f"{name}: an argument is missing")
    if name.startswith("-") or os.path.exists(name):
        return program
    import shutil  # takes longer than all the rest here

    own = os.path.dirname(sys.executable)
    path = shutil.which(name, path=own + os.pathsep + os.environ.get("PATH", os.defpath))
    if path is None:
        raise ValueError(f"can't open file {os.path.abspath(name)!r}: there is no such file")
    with open(path, "rb") as file:
        begin = file.readline(4096) + file.readline(4096)
    # The second is pip's, where the path of the interpreter is too long for a first line.
    if not re.match(rb"#!.*python|#!/bin/sh\n'''exec' .*python", begin):
        raise ValueError(f"{path} is not written in Python: its first line names no python")
    return [path, *arguments]


def _interpreter_options() -> list[str]:
    """What stood between `python` and `-m edm`, or the path of the command `edm`."""
    *options, last = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if last == "edm" and options and re.fullmatch(r"-\w*m", options[-1]):
        last = options.pop() + last
    if re.fullmatch(r"-\w*medm", last) and last != "-medm":
        options.append(last.removesuffix("medm"))
    return options


def _config(args: argparse.Namespace) -> Config:
    args.numpy_threshold = size_in_bytes("numpy_threshold", args.numpy_threshold)
    if args.dms and not any(rank in os.environ for rank in RANKS):
        raise ValueError(f"dms: needs MPI ranks; start it as: mpirun -n 3 {PROG} --dms 1 ...")
    if args.resident is None:
        resident = _memory()[1] * SHARE // 100 // _instances_here(args.dms)
    else:
        resident = size_in_bytes("resident", args.resident)
    if resident < 2 * PAGE_SIZE:
        raise ValueError(f"resident: {args.resident} is less than two pages, {2 * PAGE_SIZE} bytes")
    settings = {name: value for name, value in vars(args).items() if name in Config.__annotations__}
    return Config(**settings, high_threshold=resident // PAGE_SIZE)


# ---------------------------------------------------------------- this machine's memory


def size_in_bytes(setting: str, text: str) -> int:
    """512M, 12G, or 80% of this machine's memory, in bytes. Raises ValueError, naming the setting."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT]?)(?:i?B)?|(%))", text)
    if not found:
        raise ValueError(f"{setting}: {text!r} is no size; 512M, 12G or 80% are")
    number, unit, share = found.groups()
    if share:
        return int(_memory()[0] * float(number) / 100)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _instances_here(dms: int) -> int:
    """How many instances share this machine's memory, as far as an MPI launcher tells."""
    here = os.environ.get("MPI_LOCALNRANKS") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    ranks = os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return max(1, int(here or 1) - (dms if here == ranks else 0))  # all are here: the DMS too


def _memory() -> tuple[int, int]:
    """(all, free) bytes of this machine's memory, as far as memory cgroups let this process."""
    info = dict(line.split(":") for line in _lines("/proc/meminfo"))
    total, free = (int(info[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    for line in _lines("/proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        group = path.rstrip("/").split("/")
        for depth in range(len(group)):
            folder = root + "/".join(group[: depth + 1])
            with contextlib.suppress(OSError, ValueError):  # none there; "max"
                limit, used = (int(_lines(f"{folder}/{file}")[0]) for file in (name, usage))
                stat = dict(line.split() for line in _lines(f"{folder}/memory.stat"))
                left = limit - used + int(stat["inactive_file"])
                total, free = min(total, limit), min(free, left)
    return total, free


def _lines(path: str) -> list[str]:
    with open(path) as file:
        return file.read().splitlines()
