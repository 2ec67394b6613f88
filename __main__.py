"""python -m edm COMMAND: `run` starts a program, `doctor` tells whether EDM can run here, and
`kernel install` gives Jupyter a kernel that runs this way."""

import sys

USAGE = "usage: python -m edm (run | kernel install) (--help | ...), or: python -m edm doctor"


def main() -> None:
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        # Whatever modules the current folder has: from here on they are the program's only.
        del sys.path[0]
    match sys.argv[1:]:
        case ["run", *arguments]:
            from edm import launch

            launch.main(arguments)  # it does not return
        case ["kernel", "install", *arguments]:
            from edm import kernel

            kernel.main(arguments)
        case ["doctor"]:
            from edm import doctor

            sys.exit(doctor.main())
        case [*_, "-h" | "--help"]:
            print(USAGE)
        case _:
            print(USAGE, file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
