"""NumPy at a program's end: what is printed is the same with and without EDM."""

import atexit
import builtins
import sys
import threading


def at_exit():
    """It is registered before NumPy is imported, and so called after what NumPy registers."""
    large = sum(float(np.ones(1 << 20).sum()) for _ in range(100))
    print("at exit", large, np.fromiter(range(1000), int).sum())


atexit.register(at_exit)
import numpy as np


class Late:
    """Makes arrays when it is gone."""

    def __init__(self, count, name):
        self.count, self.name = count, name

    def __del__(self, empty=np.empty, write=sys.stdout.write):
        array = empty(self.count)
        array.fill(1)
        write(f"{self.name}: {(array + array)[-1]}\n")


for module in (sys, builtins, threading, np, np.linalg):
    for count in (10, 1 << 20):
        module.late = Late(count, f"{count} in {module.__name__}")
        module.array = np.ones(count)
        late = Late(count, f"{count} in the program")
