"""python -m edm COMMAND. The only command is doctor: can EDM run here?"""

import argparse
import sys

from edm import doctor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m edm", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="can EDM run on this machine, and what is missing?")
    parser.parse_args()
    sys.exit(doctor.main())


if __name__ == "__main__":
    main()
