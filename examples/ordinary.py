"""An ordinary NumPy program, which knows nothing of EDM.

    python -m edm run --resident 128M --stats -m edm.examples.ordinary 1024

builds an array of so many MiB (1024), sorts it, and checks that it is sorted.
"""

import sys
import time

import numpy as np

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
began = time.monotonic()
numbers = np.random.default_rng(1).random(megabytes << 17)  # float64
total, least, most = numbers.sum(), numbers.min(), numbers.max()
print(f"{time.monotonic() - began:6.1f} s: {len(numbers)} numbers, their sum is {total:.6f}")
numbers.sort()
print(f"{time.monotonic() - began:6.1f} s: sorted")
is_sorted = all(
    np.all(part[:-1] <= part[1:])
    for part in (numbers[at : at + (1 << 16) + 1] for at in range(0, len(numbers), 1 << 16))
)
same = numbers[0] == least and numbers[-1] == most and np.isclose(numbers.sum(), total)
print(f"{time.monotonic() - began:6.1f} s: {'SUCCESS' if is_sorted and same else 'FAILURE'}")
sys.exit(not (is_sorted and same))
