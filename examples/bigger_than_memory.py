"""An array several times as large as what may be here: filled, summed, shuffled, checked.

    python -m edm.examples.bigger_than_memory --size 256 --high-threshold 8192

Nothing but the first line of the code that works on it knows that the array is in EDM.
"""

import argparse
import random
import sys
import time
from array import array
from collections.abc import Iterator

import edm
from edm.report import TABLE

WORDS = edm.PAGE_SIZE // 8  # 64-bit numbers in a page


def work(space: edm.Space) -> None:
    pages = args.size * (1 << 20) // edm.PAGE_SIZE
    numbers = space.mmap(pages * edm.PAGE_SIZE).cast("Q")
    shuffler = random.Random(args.seed)
    began = time.monotonic()

    def page(n: int) -> slice:
        return slice(n * WORDS, (n + 1) * WORDS)

    def page_of(first: int) -> array:
        return array("Q", range(first * WORDS, (first + 1) * WORDS))

    for n in progress("fill", pages):
        numbers[page(n)] = page_of(n)

    total = sum(sum(numbers[page(n)]) for n in progress("sum", pages))

    # Fisher and Yates, with whole pages: at random, all over the array. `order` remembers, in
    # ordinary memory, which page is where.
    order = list(range(pages))
    for n in progress("shuffle", pages):
        other = shuffler.randrange(n, pages)
        order[n], order[other] = order[other], order[n]
        mine = numbers[page(n)].tobytes()
        numbers[page(n)] = numbers[page(other)]
        numbers[page(other)] = memoryview(mine).cast("Q")

    wrong = sum(numbers[page(n)] != page_of(order[n]) for n in progress("check", pages))

    count = pages * WORDS
    seconds = time.monotonic() - began
    figures = space.figures()
    here = f"at most {figures['peak_resident']} pages, of {config.high_threshold} allowed"
    title = f"{pages} pages, {args.size} MiB, in {seconds:.1f} s; here were {here}"
    print(f"{title}\n{TABLE.format(**figures)}")
    if total != count * (count - 1) // 2:
        sys.exit(f"the sum is {total}, not {count * (count - 1) // 2}: FAILURE")
    if wrong:
        sys.exit(f"{wrong} of {pages} pages are not as they were written: FAILURE")
    print("every byte is right: SUCCESS")


def progress(what: str, count: int) -> Iterator[int]:
    """range(count), with a line on stderr that says how far it is."""
    live = sys.stderr.isatty()
    step = max(1, count // (100 if live else 4))
    for n in range(count):
        if n % step == 0:
            end = "\r" if live else "\n"
            print(f"{what:8} {100 * n // count:3} %", end=end, file=sys.stderr, flush=True)
        yield n
    print(f"{what:8} 100 %", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, metavar="MiB", help="of the array (64)")
    parser.add_argument("--seed", type=int, default=1, help="of the shuffling")
    args, config = edm.parse_arguments(parser, high_threshold=2048)
    edm.main(work, config)
