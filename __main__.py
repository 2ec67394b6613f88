"""python -m edm COMMAND: `run` starts a program, `doctor` tells whether EDM can run here."""

import sys


def main() -> None:
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        # Whatever modules the current folder has: from here on they are the program's only.
        del sys.path[0]
    if sys.argv[1:2] == ["run"]:  # not by argparse, as every program that is run waits for it
        from edm.launch import main as run

        run(sys.argv[2:])
    import argparse

    from edm import doctor

    parser = argparse.ArgumentParser(prog="python -m edm")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="run a program with more memory; see: run --help")
    commands.add_parser("doctor", help="tell whether EDM can run on this machine")
    parser.parse_args()
    sys.exit(doctor.main())


if __name__ == "__main__":
    main()
