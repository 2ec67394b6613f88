"""Example 2 of the wiki: LPET evicts two pages to the disk, and one comes back, with its bytes.

python -m edm.examples.eviction                   on one machine
mpirun -n 2 python -m edm.examples.eviction       with a DMS, as in the wiki
"""

import sys

import edm
from edm.examples.layout import Layout, check, parse_arguments
from edm.log import logger

AREA_1, AREA_2 = 0x1D4C000, 0x1D5C000


def user_code(space: edm.Space) -> None:
    layout = Layout(space, {AREA_1: "area 1", AREA_2: "area 2"}, args.layout)
    here = f"INSTANCE_{space.instance}"

    # Step 1: an area of four pages, all of them written.
    area_1 = space.mmap(4 * edm.PAGE_SIZE, addr=AREA_1)
    area_1[:] = b"x" * len(area_1)
    area_1_first_page = bytes(area_1[: edm.PAGE_SIZE])
    layout.step("step 1: four pages of area 1 are written")
    check(space, 1, AREA_1, [here, here, here, here])

    # Step 2: a fifth page. Four is the high threshold: LPET evicts until two are left. All four
    # are hot, so it takes the first two.
    area_2 = space.mmap(edm.PAGE_SIZE, addr=AREA_2)
    area_2[0] = ord("z")
    layout.step("step 2: area 2 is written; LPET has evicted two pages of area 1")
    check(space, 2, AREA_1, ["DISK", "DISK", here, here])
    check(space, 2, AREA_2, [here])

    # Step 3: the first page of area 1 is touched, and fetched from the disk.
    same = area_1[: edm.PAGE_SIZE] == area_1_first_page
    layout.step("step 3: the first page of area 1 is read, and is back")
    check(space, 3, AREA_1, [here, "DISK", here, here])
    check(space, 3, AREA_2, [here])
    if not same:
        sys.exit("compare pages FAILURE")
    logger().info("compare pages SUCCESS")


if __name__ == "__main__":
    args, config = parse_arguments(__doc__, high_threshold=4, low_threshold=2)
    edm.main(user_code, config)
