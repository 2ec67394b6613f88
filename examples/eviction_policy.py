"""LPET evicts the pages that nobody uses: hot pages stay, idle ones go.

    python -m edm.examples.eviction_policy

Twenty pages may be here, and LPET evicts until fifteen are.
"""

import sys

import edm
from edm.examples.layout import Layout, check, parse_arguments
from edm.log import logger

AREAS = (0x1D4C000, 0x1D51000, 0x1E14000, 0x1E19000, 0x1E20000)
PAGES = 5  # of each area


def user_code(space: edm.Space) -> None:
    layout = Layout(space, {a: f"area {n}" for n, a in enumerate(AREAS, 1)}, args.layout)
    here = f"INSTANCE_{space.instance}"
    length = PAGES * edm.PAGE_SIZE

    def write(number: int) -> None:
        areas[number][:] = bytes([number]) * length

    # Step 1: four areas, all written: the twenty pages that may be here.
    areas = {n: space.mmap(length, addr=AREAS[n - 1]) for n in (1, 2, 3, 4)}
    for number in areas:
        write(number)
    layout.step("step 1: areas 1 to 4 are written")

    # Step 2: all are hot. LPET passes each, marks it idle, and then evicts in order: area 1.
    areas[5] = space.mmap(length, addr=AREAS[4])
    write(5)
    layout.step("step 2: area 5 is written; all were hot, so area 1 was evicted, as the first")
    for number, address in enumerate(AREAS, 1):
        check(space, 2, address, ["DISK" if number == 1 else here] * PAGES)

    # Step 3: areas 2 and 3 are used again. Area 4 is idle since LPET marked it.
    write(2)
    write(3)
    first = areas[1][0]
    layout.step("step 3: areas 2 and 3 are written, area 1 is read; area 4 was idle and went")
    check(space, 3, AREAS[0], [here] + ["DISK"] * (PAGES - 1))  # exactly one page came back
    for number in (2, 3, 5):
        check(space, 3, AREAS[number - 1], [here] * PAGES)  # in use
    check(space, 3, AREAS[3], ["DISK"] * PAGES)  # the only idle one
    if first != 1 or any(bytes(areas[n]) != bytes([n]) * length for n in areas):
        sys.exit("a byte is not what was written")
    tracker = space.figures()["idle_tracker"]
    logger().info("eviction policy SUCCESS, with the idle tracker %s", tracker)


if __name__ == "__main__":
    args, config = parse_arguments(__doc__, high_threshold=20, low_threshold=15)
    edm.main(user_code, config)
