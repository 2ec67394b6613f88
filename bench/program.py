"""One program of `python -m bench programs`: what a user of NumPy, pandas or scikit-learn would write.

    python bench/program.py NAME MIB [CGROUP]
    python -m edm run --resident 64M bench/program.py NAME MIB

In the picture: programs.py starts one for each cell and round. It knows nothing of EDM, but for the
advice that `random rows, prefetch` gives.

Interface: MIB is the size of the program's data; its results and copies come on top. CGROUP is a folder
to enter when the libraries are loaded: the interpreter's memory does not count there, as it does not
count for EDM. Prints one line of JSON: "make" and "work" are seconds, "answer" is a number that has to
be the same everywhere, "outside" are the bytes of anonymous memory that making and working have taken.
Under EDM that is what does not live in the space, and so is outside of its limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCH = 256  # rows of a matrix that a data loader takes at once
ROW = 1000  # numbers in such a row: two or three pages

Work = Callable[[], float]  # gives the answer


def sort(size: int) -> Work:
    array = np.random.default_rng(3).random(size // 8)
    return lambda: np.sort(array)[:: 1 << 12].sum()


def transposed(size: int) -> Work:
    side = math.isqrt(size // 8)
    array = np.random.default_rng(3).random((side, side))
    return lambda: array.T.copy()[:: 1 << 8, 7].sum()


def load_and_save(size: int) -> Work:
    folder = tempfile.TemporaryDirectory()
    before, after = f"{folder.name}/before.npy", f"{folder.name}/after.npy"
    np.save(before, np.random.default_rng(3).random(size // 8))
    with open(before, "rb") as file:  # it is to come from the device, whatever memory there is
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def work() -> float:
        np.save(after, np.load(before))
        answer = np.load(after, mmap_mode="r")[:: 1 << 12].sum()
        folder.cleanup()
        return answer

    return work


def random_rows(
    size: int, prefetch: Callable[[np.ndarray, np.ndarray], None] | None = None
) -> Work:
    """Every row once, in random order."""
    dice = np.random.default_rng(3)
    matrix = dice.random((size // 8 // ROW, ROW))
    order = dice.permutation(len(matrix))
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def work() -> float:
        answer = 0.0
        for rows, later in zip(batches, [*batches[1:], batches[0][:0]], strict=True):
            if prefetch:
                prefetch(matrix, later)
            answer += matrix[rows].sum()
        return answer

    return work


def random_rows_prefetch(size: int) -> Work:
    """The same with advice: edm.prefetch, or madvise(2) where there is no EDM."""
    with contextlib.suppress(ImportError, RuntimeError):
        import edm

        if edm.space():
            return random_rows(size, edm.prefetch)
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int

    def will_need(matrix: np.ndarray, rows: np.ndarray) -> None:
        first, length = matrix.ctypes.data, matrix.strides[0]
        for row in rows.tolist():
            at = first + row * length
            page = at & -mmap.PAGESIZE
            madvise(page, at + length - page, mmap.MADV_WILLNEED)

    return random_rows(size, will_need)


def groupby(size: int) -> Work:
    frame = _frame(size)
    functions = {"a": ["sum", "max"], "b": ["std", "min"]}
    return lambda: frame.groupby("key").agg(functions).to_numpy().sum()


def sort_late(size: int) -> Work:
    """A log whose lines came up to a thousand lines late."""
    frame = _frame(size)
    frame["key"] = np.arange(len(frame)) + frame["key"]
    return lambda: frame.sort_values("key")["b"].to_numpy()[:: 1 << 12].sum()


def sort_random(size: int) -> Work:
    """8 million rows, where size is 256 MiB."""
    import pandas as pd

    dice = np.random.default_rng(3)
    columns = {name: dice.random(size // 32) for name in ("key", "a", "b", "c")}
    frame = pd.DataFrame(columns)
    del columns
    return lambda: frame.sort_values("key")["b"].to_numpy()[:: 1 << 12].sum()


def _frame(size: int):
    import pandas as pd

    rows, dice = size // 24, np.random.default_rng(3)
    return pd.DataFrame(
        {"key": dice.integers(0, 1000, rows), "a": dice.random(rows), "b": dice.random(rows)}
    )


def kmeans(size: int) -> Work:
    from sklearn.cluster import KMeans

    data = _points(size, 8)
    return lambda: KMeans(5, n_init=1, max_iter=3, tol=0, random_state=0).fit(data).inertia_


def pca(size: int) -> Work:
    from sklearn.decomposition import PCA

    data = _points(size, 64)
    return lambda: PCA(8).fit(data).explained_variance_.sum()


def _points(size: int, features: int) -> np.ndarray:
    dice = np.random.default_rng(3)
    data = dice.normal(size=(size // 8 // features, features))
    data += dice.integers(0, 5, len(data))[:, None] * 10.0
    return data


# {name: (what makes its data, the library that it needs)}
PROGRAMS = {
    "np.sort": (sort, "numpy"),
    "a.T.copy()": (transposed, "numpy"),
    "np.load, np.save": (load_and_save, "numpy"),
    "random rows": (random_rows, "numpy"),
    "random rows, prefetch": (random_rows_prefetch, "numpy"),
    "pandas groupby": (groupby, "pandas"),
    "pandas sort, late rows": (sort_late, "pandas"),
    "pandas sort, random key": (sort_random, "pandas"),
    "KMeans": (kmeans, "sklearn.cluster"),
    "PCA": (pca, "sklearn.decomposition"),
}


def anonymous() -> int:
    """Bytes of this process's anonymous memory: proc_pid_status(5)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10


def main(name: str, mib: str, cgroup: str = "") -> None:
    make, library = PROGRAMS[name]
    __import__(library)
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    at_start, began = anonymous(), time.perf_counter()
    work = make(int(mib) << 20)
    made = time.perf_counter()
    answer = work()
    ended = time.perf_counter()
    found = {"make": made - began, "work": ended - made, "answer": float(answer)}
    print(json.dumps({**found, "outside": anonymous() - at_start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
