"""NumPy on arrays several times as large as what may be here: sort, reduce, multiply.

    python -m edm.examples.numpy_sort --size 256 --high-threshold 8192

The answers are known beforehand. The one line of EDM's is `with edm.numpy_allocator()`.
"""

import argparse
import sys
import time

import edm


def work(space: edm.Space) -> None:
    import numpy as np  # in the application only: a DMS needs none

    began = time.monotonic()

    def check(what: str, right: object) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}: {'right' if right else 'WRONG'}")
        if not right:
            sys.exit("numpy_sort FAILURE")

    count = 1 << (args.size << 17).bit_length() - 1  # float64 numbers, a power of two
    with edm.numpy_allocator():
        # An odd factor modulo a power of two: 0 to count - 1, in no order that is seen.
        numbers = np.arange(count, dtype=np.uint64)
        numbers *= 0x9E3779B97F4A7C15
        numbers &= count - 1
        numbers = numbers.astype(np.float64)
        check("sum", numbers.sum() == count * (count - 1) / 2)
        numbers.sort()
        check("sort", numbers[0] == 0 and bool(np.all(np.diff(numbers) == 1)))
        del numbers

        # a[i, k] = i and b[k, j] = j: their product is i * j * side everywhere, without rounding.
        side = int((args.size << 17) ** 0.5) // 2
        a = np.repeat(np.arange(side, dtype=np.float64), side).reshape(side, side)
        b = np.ascontiguousarray(a.T)
        product = a @ b
        steps = np.arange(side, dtype=np.float64)
        rows = range(0, side, max(1, side // 64))
        check("product", all(np.array_equal(product[i], i * side * steps) for i in rows))
    in_space = sum(length for _, length in space.areas()) >> 20
    figures = space.figures()
    print(f"{in_space} MiB in the space, at most {figures['peak_resident']} pages of them here")
    print("numpy_sort SUCCESS")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, metavar="MiB", help="of the array (256)")
    args, config = edm.parse_arguments(parser, high_threshold=8192)
    edm.main(work, config)
