"""python -m edm COMMAND: `run` starts a program, `doctor` tells whether EDM can run here."""

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edm", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "doctor"), help="see: COMMAND --help")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own")
    args = parser.parse_args()
    if args.command == "run":
        from edm.launch import main as run

        run(args.arguments)
    else:
        from edm import doctor

        parser = argparse.ArgumentParser(
            prog="python -m edm doctor", description=doctor.__doc__.splitlines()[0]
        )
        parser.parse_args(args.arguments)
        sys.exit(doctor.main())


if __name__ == "__main__":
    main()
