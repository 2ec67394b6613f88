"""multiprocessing: a forked child reads the memory and can't harm it; spawned ones get what they are
given."""

import multiprocessing
import sys

import edm

PAGE = edm.PAGE_SIZE


def total(content):
    return sum(content)


def touch(area):
    area[0] += 98
    sys.exit(area[0])


if __name__ == "__main__":
    area = edm.space().mmap(10 * PAGE)
    area[:3] = bytes((1, 2, 3))

    child = multiprocessing.get_context("fork").Process(target=touch, args=(area,))
    child.start()
    child.join(30)
    if child.exitcode != 99 or area[0] != 1:
        sys.exit(f"the forked child ended with {child.exitcode}, and the memory has {area[0]}")

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        if pool.map(total, [bytes(area), bytes(area[:2])]) != [6, 3]:
            sys.exit("a spawned process got something else")
    print("processes SUCCESS")
