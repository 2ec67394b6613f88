"""python -m edm run: an ordinary Python program, with more memory than the machine has.

    python -m edm run --resident 12G script.py ...                       on one machine
    mpirun -n 3 python -m edm run --dms 1 --resident 12G script.py ...   rank 0 is a DMS

In the picture: starts it all. The process that the user started checks the command line, and replaces
itself by `python script.py ...`. Before the script, that interpreter imports startup/sitecustomize.py,
which starts EDM. Python itself does all the rest.

Interface: main(arguments) is the command. For kernel.py: parse(arguments) checks a command line. For a program with
options of its own, as edm.parse_arguments: parse_arguments(parser) has an option for each setting.

Rules: a mistake is reported in one line, with exit status 2, before anything is started. Python itself reports a
mistake in what follows EDM's options, and a program that is not there or not in Python. Settings are passed to
startup/sitecustomize.py in one environment variable, which is removed there.

Sources: "Command line and environment" in Python's documentation; proc_meminfo(5); Documentation/
admin-guide/cgroup-v2.rst.
"""

import argparse
import contextlib
import marshal
import os
import re
import shutil
import sys
import time
from typing import Any, NoReturn

from edm import limits
from edm.edm import CHOICES, PAGE_SIZE, PRINTING, Config, launched, tell

PROG = "python -m edm run"
# The default of --resident: DEFAULT_PERCENT of the free memory. But OTHERS bytes are left to the pager, the
# interpreter and small arrays, unless that makes it less than LEAST_PERCENT of the free memory.
DEFAULT_PERCENT, OTHERS, LEAST_PERCENT = 80, 128 << 20, 25


def main(arguments: list[str]) -> None:
    """Become the Python process that runs the program named by the arguments."""
    args, config, program = parse(arguments)
    if sys.flags.ignore_environment or sys.flags.no_site:
        tell(f"{PROG}: EDM is not used: python -I, -E and -S switch it off")
    else:
        before = os.environ.get("PYTHONPATH")
        settings = {"config": vars(config), "threshold": args.numpy_threshold, "PYTHONPATH": before}
        os.environ["EDM_RUN"] = marshal.dumps(settings).hex()
        startup = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")
        os.environ["PYTHONPATH"] = f"{startup}{os.pathsep}{before}" if before else startup
    # In the C locale, Python uses UTF-8 mode, and sets LC_CTYPE to this (PEP 538). The next one has to do so, too.
    if sys.flags.utf8_mode and os.getenv("LC_CTYPE") == "C.UTF-8" and not os.getenv("LC_ALL"):
        os.environ["LC_CTYPE"] = "C"
    # Without a name, which execv refuses, Python's is python3.
    os.execv(sys.executable, [sys.orig_argv[0] or "python3", *_interpreter_options(), *program])


# ---------------------------------------------------------------- the command line


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config, list[str]]:
    """The options, the settings they make, and the program with its arguments: of a command, the path."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [option ...] (SCRIPT | COMMAND | -m MODULE | -c CODE | -) [argument ...]",
        description="Run a Python program with more memory than this machine has. COMMAND is one that is "
        "written in Python, such as pytest.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("program", nargs=argparse.PARSER, help=argparse.SUPPRESS)  # one word, and all behind it
    add(
        "--resident", dest="high_threshold", metavar="SIZE",
        type=lambda text: size_in_bytes(text) // PAGE_SIZE,
        help="memory to use, at most: 512M, 12G, or 80%% of this machine's (default: "
        f"{DEFAULT_PERCENT}%% of what is free)",
    )  # fmt: skip
    arrays = "arrays from this size on are EDM's (1M)"
    add("--numpy-threshold", type=size_in_bytes, metavar="SIZE", default="1M", help=arrays)
    none = {"dest": "numpy_threshold", "action": "store_const", "const": None}
    add("--no-numpy", **none, help="no array is EDM's")
    # The program begins with the first word that is not an option of EDM's. -m and -c look like options, so
    # argparse sees a null byte instead of their dash: no option has such a value.
    words = [re.sub("^-(?=[mc])", "\0", word) for word in arguments]
    args, config = parse_arguments(parser, words, high_threshold=None, end_addr=None, dms=0)
    program = arguments[len(arguments) - len(args.program) :]
    if not program[0].startswith("-") and not os.path.exists(program[0]):
        folders = os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)
        program[0] = shutil.which(program[0], path=os.pathsep.join(folders)) or program[0]
    return args, config, program


def size_in_bytes(text: str) -> int:
    """512M, 12G, or 80% of this machine's memory, in bytes. Raises argparse.ArgumentTypeError."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT]?)(?:i?B)?|(%))", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use 512M, 12G or 80%")
    number, unit, share = found.groups()
    if share:
        return int(_memory()[0] * float(number) / 100)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _config(args: argparse.Namespace) -> Config:
    """The settings. high_threshold and end_addr may be None: for `edm run`, as this machine allows."""
    if args.high_threshold is None:
        # As many instances share this machine's memory, as far as the MPI launcher says: without the DMSs, if all
        # ranks are here.
        ranks = os.environ.get("MPI_LOCALNRANKS") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
        here = int(ranks or 1)
        free = _memory()[1] // max(1, here - (args.dms if here == launched()[1] else 0))
        part = min(free * DEFAULT_PERCENT // 100, free - OTHERS)
        args.high_threshold = max(part, free * LEAST_PERCENT // 100) // PAGE_SIZE
    if args.end_addr is None:
        size, limit = limits.space_size()
        args.end_addr = args.start_addr + size
        if limit:
            tell(f"{PROG}: {limit} leaves {size >> 20} MiB for the space")
    return Config(**{name: getattr(args, name) for name in Config.__annotations__})


def _interpreter_options() -> list[str]:
    """The options of Python between `python` and `-m edm`, or the path of the command `edm`."""
    *options, last = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if last == "edm" and options and re.fullmatch(r"-\w*m", options[-1]):
        last = options.pop() + last
    if joined := re.fullmatch(r"(-\w+)medm", last):
        options.append(joined[1])
    return options


# ---------------------------------------------------------------- settings as options


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None, **defaults: Any
) -> tuple[argparse.Namespace, Config]:
    """Add an option for every setting of Config to the parser, and parse the command line, or these arguments.

    defaults: this program's defaults that differ from Config's. One rank prints a mistake, in one line, and the
    program ends with status 2.
    """
    parser.error = lambda message: refuse(parser, message)
    group = parser.add_argument_group("EDM")
    lines = (Config.__doc__ or "").splitlines()  # python -OO has none
    words = dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    for name, kind in Config.__annotations__.items():
        how = {"type": number if kind.startswith("int") else str, "choices": CHOICES.get(name)}
        if kind == "bool":
            how = {"action": argparse.BooleanOptionalAction}
        option = "--" + name.replace("_", "-")
        default = defaults.get(name, getattr(Config, name))
        group.add_argument(option, default=default, help=words.get(name), **how)
    args = parser.parse_args(arguments)
    try:
        return args, _config(args)
    except (ValueError, OSError) as error:
        refuse(parser, error)


def refuse(parser: argparse.ArgumentParser, error: Exception | str) -> NoReturn:
    """End this rank, with status 2, for a mistake in the command line, which all ranks find. Rank 0 prints it."""
    if launched()[0]:
        time.sleep(PRINTING)
        sys.exit(2)
    parser.exit(2, f"{parser.prog}: error: {error}\n")


def number(text: str) -> int:
    """The int that an option has, in any base; argparse's errors have this function's name."""
    return int(text, 0)


# ---------------------------------------------------------------- this machine's memory


def _memory() -> tuple[int, int]:
    """(all, free) bytes of this machine's memory, within the limits of this process's cgroups."""
    info = dict(re.findall(r"(\w+): +(\d+) kB", _text("/proc/meminfo")))
    total, free = (int(info[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = f"/sys/fs/cgroup/{controllers}{path}"
        while group.startswith("/sys/fs/cgroup"):
            with contextlib.suppress(OSError, ValueError):  # no memory controller; "max"
                limit, used = (int(_text(f"{group}/memory.{name}")) for name in names)
                stat = dict(map(str.split, _text(f"{group}/memory.stat").splitlines()))
                total = min(total, limit)
                free = min(free, limit - used + int(stat["inactive_file"]))
            group = os.path.dirname(group)
    return total, free


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
