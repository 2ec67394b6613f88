"""python -m edm kernel install: a Jupyter kernel whose arrays live in a space.

    python -m edm kernel install --resident 8G --name edm

In the picture: nothing. Jupyter starts a kernel by the command line in its kernel spec: here `python -m
edm run`, the options that were given, and ipykernel. So the kernel is the application.

Interface: main(arguments) is the command.

Rules: a mistake is reported in one line, with exit status 2, and nothing is written.

Source: "Kernel specs" in the documentation of jupyter_client.
"""

import argparse
import sys
import tempfile

from edm import launch

PROG = "python -m edm kernel install"
PROGRAM = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]


def main(arguments: list[str]) -> None:
    """Give this user's Jupyter a kernel spec, and say where it is."""
    words = f"Give Jupyter a kernel whose arrays live in EDM's space. It has all options of {launch.PROG}."
    # Without the usage, a mistake is one line.
    parser = argparse.ArgumentParser(PROG, argparse.SUPPRESS, words, allow_abbrev=False)
    parser.add_argument("--name", default="edm", help="what Jupyter calls it (edm)")
    args, options = parser.parse_known_args(arguments)
    if launch.parse([*options, *PROGRAM])[2] != PROGRAM:
        parser.error(f"these are not only options of {launch.PROG}: {' '.join(options)}")
    argv = [sys.executable, "-m", "edm", "run", *options, *PROGRAM]
    spec = {"argv": argv, "display_name": f"Python {sys.version_info[0]} ({args.name})"}
    try:
        from ipykernel.kernelspec import write_kernel_spec
        from jupyter_client.kernelspec import KernelSpecManager

        with tempfile.TemporaryDirectory() as folder:
            source = write_kernel_spec(f"{folder}/kernel", spec)
            place = KernelSpecManager().install_kernel_spec(source, args.name, user=True)
        print(f"kernel {args.name}: {place}")
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
