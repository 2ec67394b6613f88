"""Example 1 of the wiki: the first access to a page gets a page of zeros.

python -m edm.examples.zero_page                   on one machine
mpirun -n 2 python -m edm.examples.zero_page       with a DMS, as in the wiki
"""

import sys

import edm
from edm.examples.layout import Layout, parse_arguments
from edm.log import logger

AREA_1 = 0x1D4C000


def user_code(space: edm.Space) -> None:
    layout = Layout(space, {AREA_1: "area 1"}, args.layout)
    area_1 = space.mmap(edm.PAGE_SIZE, addr=AREA_1)
    layout.step("mapped: nothing has touched area 1 yet")
    area_1[0] = ord("x")  # the page fault
    layout.step("written: area 1 has its page")
    logger("Usercode").debug("area_1[0] %c", area_1[0])
    rest_is_zero = not any(area_1[1:])
    if area_1[0] != ord("x") or not rest_is_zero:
        sys.exit("zero page FAILURE")
    if space.locations(AREA_1, edm.PAGE_SIZE) != [f"INSTANCE_{space.instance}"]:
        sys.exit("the SPT does not say that the page is in the instance")


if __name__ == "__main__":
    args, config = parse_arguments(__doc__)
    edm.main(user_code, config)
