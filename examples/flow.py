"""LPET takes idle pages, passes hot ones, and goes on where it stopped: the original's simple flow.

python -m edm.examples.flow                   on one machine
mpirun -n 2 python -m edm.examples.flow       with a DMS, as in the wiki

Twenty pages may be here, and LPET evicts until ten are. Of the three areas' 21 pages one is away each
time that LPET wakes.
"""

import sys

import edm
from edm.examples.layout import Layout, check, parse_arguments
from edm.log import logger

AREA_1, AREA_2, AREA_3 = 0x1D4C000, 0x1E14000, 0x1E82000
NAMES = {AREA_1: "area 1", AREA_2: "area 2", AREA_3: "area 3"}


def user_code(space: edm.Space) -> None:
    layout = Layout(space, NAMES, args.layout)
    here = f"INSTANCE_{space.instance}"

    def page(number: int) -> slice:
        return slice(number * edm.PAGE_SIZE, (number + 1) * edm.PAGE_SIZE)

    # Step 1: the twenty pages that may be here.
    area_1 = space.mmap(10 * edm.PAGE_SIZE, addr=AREA_1)
    area_1[:] = b"x" * len(area_1)
    area_2 = space.mmap(10 * edm.PAGE_SIZE, addr=AREA_2)
    area_2[:] = b"y" * len(area_2)
    layout.step("step 1: areas 1 and 2 are written")
    check(space, 1, AREA_1, [here] * 10)
    check(space, 1, AREA_2, [here] * 10)

    # Step 2: all are hot. LPET passes each, and marks it idle; then it takes the first ten in order.
    area_3 = space.mmap(edm.PAGE_SIZE, addr=AREA_3)
    area_3[0] = ord("z")
    layout.step("step 2: area 3 is written; all were hot, so the first ten went: area 1")
    check(space, 2, AREA_1, ["DISK"] * 10)
    check(space, 2, AREA_2, [here] * 10)

    # Step 3: area 1 comes back. For its last page LPET goes on at area 2, which is idle.
    same = area_1 == b"x" * len(area_1)
    layout.step("step 3: area 1 is read; LPET went on at area 2, and took it, as it was idle")
    check(space, 3, AREA_1, [here] * 10)
    check(space, 3, AREA_2, ["DISK"] * 10)
    check(space, 3, AREA_3, [here])

    # Step 4: area 2 comes back, its first page as the last one. All are hot, and LPET goes on behind
    # area 2: area 3 goes, and nine pages of area 1. The tenth, where it stops, and those of area 2
    # are marked idle, but not the first one of area 2: that comes now.
    for number in (*range(1, 10), 0):
        area_2[page(number)] = b"Y" * edm.PAGE_SIZE
    layout.step("step 4: area 2 is written; all were hot, and LPET went on at area 3")
    check(space, 4, AREA_1, ["DISK"] * 9 + [here])
    check(space, 4, AREA_2, [here] * 10)
    check(space, 4, AREA_3, ["DISK"])

    # Step 5: nine pages of area 1 come back, and then area 3. LPET goes on at the tenth page of area
    # 1, which is idle, passes the first one of area 2, which is hot, and takes the nine others.
    for number in range(9):
        same = same and area_1[page(number)] == b"x" * edm.PAGE_SIZE
    same = same and area_3[0] == ord("z")
    layout.step("step 5: area 1 and 3 are read; the one hot page of area 2 was passed")
    check(space, 5, AREA_1, [here] * 9 + ["DISK"])
    check(space, 5, AREA_2, [here] + ["DISK"] * 9)
    check(space, 5, AREA_3, [here])
    if not same or area_1 != b"x" * len(area_1) or area_2 != b"Y" * len(area_2):
        sys.exit("compare pages FAILURE")
    logger().info("compare pages SUCCESS")


if __name__ == "__main__":
    args, config = parse_arguments(__doc__, high_threshold=20, low_threshold=10)
    edm.main(user_code, config)
