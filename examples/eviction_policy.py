"""LPET evicts the pages that nobody uses: hot pages stay, idle ones go.

    python -m edm.examples.eviction_policy

Twenty pages may be here, and LPET evicts until fifteen are.
"""

import sys

import edm
from edm.examples.layout import Layout, parse_arguments
from edm.log import logger

AREAS = (0x1D4C000, 0x1D51000, 0x1E14000, 0x1E19000, 0x1E20000)
PAGES = 5  # of each area


def user_code(space: edm.Space) -> None:
    layout = Layout(space, {a: f"area {n}" for n, a in enumerate(AREAS, 1)}, args.layout)
    here = f"INSTANCE_{space.instance}"
    length = PAGES * edm.PAGE_SIZE

    def write(number: int) -> None:
        areas[number][:] = bytes([number]) * length

    def check(step: int, on_disk: int) -> None:
        """Every page of this area is on the disk, and every other one here."""
        for number in areas:
            expected = ["DISK" if number == on_disk else here] * PAGES
            found = space.locations(AREAS[number - 1], length)
            if found != expected:
                sys.exit(f"step {step}: the SPT says {found} of area {number}, not {expected}")

    # Step 1: four areas, all written: the twenty pages that may be here.
    areas = {n: space.mmap(length, addr=AREAS[n - 1]) for n in (1, 2, 3, 4)}
    for number in areas:
        write(number)
    layout.step("step 1: areas 1 to 4 are written")

    # Step 2: all are hot. LPET passes each, marks it idle, and then evicts in order: area 1.
    areas[5] = space.mmap(length, addr=AREAS[4])
    write(5)
    layout.step("step 2: area 5 is written; all were hot, so area 1 was evicted, as the first")
    check(2, on_disk=1)

    # Step 3: areas 2 and 3 are used again. Area 4 is idle since LPET marked it.
    write(2)
    write(3)
    first = areas[1][0]
    layout.step("step 3: areas 2 and 3 are written, area 1 is read; area 4 was idle and went")
    if space.locations(AREAS[0], length) != [here] + ["DISK"] * (PAGES - 1):
        sys.exit("step 3: not exactly the first page of area 1 came back")
    for number in (2, 3, 5):
        if space.locations(AREAS[number - 1], length) != [here] * PAGES:
            sys.exit(f"step 3: pages of area {number} were evicted, though they were in use")
    if space.locations(AREAS[3], length) != ["DISK"] * PAGES:
        sys.exit("step 3: area 4, the only idle one, was not evicted")
    if first != 1 or any(bytes(areas[n]) != bytes([n]) * length for n in areas):
        sys.exit("a byte is not what was written")
    tracker = space.figures()["idle_tracker"]
    logger().info("eviction policy SUCCESS, with the idle tracker %s", tracker)


if __name__ == "__main__":
    args, config = parse_arguments(__doc__, high_threshold=20, low_threshold=15)
    edm.main(user_code, config)
