"""Everything once, from end to end: first access, eviction, fetching back, munmap, a second eviction.

python -m edm.examples.end_to_end                   on one machine
mpirun -n 2 python -m edm.examples.end_to_end       with a DMS, as in the wiki

Whatever is written to the space is written to ordinary memory too, and every byte is compared.
"""

import random
import sys

import edm
from edm.examples.layout import Layout, check, parse_arguments
from edm.log import logger

AREA_1, AREA_2, AREA_3, AREA_4 = 0x1D4C000, 0x1E14000, 0x1E82000, 0x1E89000
PAGES = {AREA_1: 10, AREA_2: 10, AREA_3: 5, AREA_4: 1}


def user_code(space: edm.Space) -> None:
    names = {address: f"area {number}" for number, address in enumerate(PAGES, 1)}
    layout = Layout(space, names, args.layout)
    here = f"INSTANCE_{space.instance}"
    areas: dict[int, memoryview] = {}
    copies: dict[int, bytes] = {}  # what is in each area
    dice = random.Random(1)

    def first_access(address: int) -> None:
        """Map this area, find zeros in it, and write it."""
        areas[address] = space.mmap(PAGES[address] * edm.PAGE_SIZE, addr=address)
        copies[address] = bytes(len(areas[address]))
        compare(address, PAGES[address])
        copies[address] = dice.randbytes(len(areas[address]))
        areas[address][:] = copies[address]

    def compare(address: int, pages: int) -> None:
        length = pages * edm.PAGE_SIZE
        if areas[address][:length] != copies[address][:length]:
            sys.exit(f"compare pages FAILURE: {names[address]}")

    first_access(AREA_1)
    first_access(AREA_2)
    layout.step("step 1: areas 1 and 2 are written, the twenty pages that may be here")
    check(space, 1, AREA_1, [here] * 10)
    check(space, 1, AREA_2, [here] * 10)

    first_access(AREA_3)
    layout.step("step 2: area 3 is written; LPET has evicted area 1")
    check(space, 2, AREA_1, ["DISK"] * 10)
    check(space, 2, AREA_2, [here] * 10)
    check(space, 2, AREA_3, [here] * 5)

    compare(AREA_1, 5)
    layout.step("step 3: five pages of area 1 are read, and are back: there are twenty again")
    check(space, 3, AREA_1, [here] * 5 + ["DISK"] * 5)

    space.munmap(areas.pop(AREA_3))
    layout.step("step 4: area 3 is unmapped")
    if AREA_3 in dict(space.areas()):
        sys.exit("step 4: area 3 is still there")
    first_access(AREA_3)
    layout.step("step 5: area 3 is mapped anew; it was zeros, and is written: twenty again")
    check(space, 5, AREA_2, [here] * 10)
    check(space, 5, AREA_3, [here] * 5)

    first_access(AREA_4)
    layout.step("step 6: area 4 is written; LPET has evicted area 2, which was idle")
    check(space, 6, AREA_1, [here] * 5 + ["DISK"] * 5)
    check(space, 6, AREA_2, ["DISK"] * 10)
    check(space, 6, AREA_4, [here])

    for address, pages in PAGES.items():
        compare(address, pages)
    figures = space.figures()
    if figures["peak_resident"] > config.high_threshold:
        sys.exit(f"{figures['peak_resident']} pages were here, of {config.high_threshold} allowed")
    logger().info("end to end SUCCESS: every byte is as it was written")


if __name__ == "__main__":
    args, config = parse_arguments(__doc__, high_threshold=20, low_threshold=10)
    edm.main(user_code, config)
