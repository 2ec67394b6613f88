"""python -m edm COMMAND: `run` starts a program, `doctor` tells whether EDM can run here, and
`kernel install` gives Jupyter a kernel that runs this way."""

import sys


def main() -> None:
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        # Whatever modules the current folder has: from here on they are the program's only.
        del sys.path[0]
    if sys.argv[1:2] == ["run"]:  # not by argparse, as every program that is run waits for it
        from edm.launch import main as run

        run(sys.argv[2:])  # it does not return
    if sys.argv[1:3] == ["kernel", "install"]:
        from edm.kernel import main as install_kernel

        install_kernel(sys.argv[3:])
        return
    import argparse

    from edm import doctor

    parser = argparse.ArgumentParser(prog="python -m edm")
    what = (
        "run a program with more memory (see: run --help), give Jupyter a kernel that runs this way (see: "
        "kernel install --help), or tell whether EDM can run here (doctor)"
    )
    parser.add_argument("command", choices=("run", "kernel install", "doctor"), help=what)
    parser.parse_args()
    sys.exit(doctor.main())


if __name__ == "__main__":
    main()
