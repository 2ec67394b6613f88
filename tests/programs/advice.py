"""What prefetch, forget and resident do with arrays of every shape. argv: high_threshold, pages."""

import sys
import time

import numpy as np

import edm

HIGH = int(sys.argv[1])
ROWS, WORDS = 1024, edm.PAGE_SIZE // 8  # a row is a page


def wait_for(what, why):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.001)


def faults(space):
    figures = space.figures()
    return figures["faults_refetch"] + figures["faults_first_access"]


def many(space, a):
    """There is room for all that is asked for here."""
    edm.forget(a)
    wait_for(lambda: edm.resident(a) == 0, "forget lets every page leave")
    rows = np.random.default_rng(1).permutation(ROWS)[: HIGH // 2]
    asked = {
        "rows": (a, rows, len(rows)),
        "a mask": (a, np.isin(np.arange(ROWS), rows), len(rows)),
        "from the end": (a, rows[:10] - ROWS, 10),
        "a slice": (a[100:300], None, 200),
        "backwards": (a[300:100:-1], None, 200),
        "rows that are parts of pages": (a[:, 3:5], rows[:10], 10),
        "columns": (a[:200, 3:5], None, 200),
        "part of a row": (a[7, 3:5], None, 1),
        "a row that is two pages": (a.reshape(-1, 2 * WORDS), [5, 7], 4),
        "transposed": (a[:200].T, None, 200),
        "an area": (memoryview(a[:10]), None, 10),
        "nothing": (a[:0], None, 0),
        "rows in one byte": (a, rows[rows < 128].astype(np.uint8), (rows < 128).sum()),
        "rows in four bytes": (a, rows.astype(np.int32), len(rows)),
        "no row": (a, [], 0),
    }
    for name, (array, which, pages) in asked.items():
        edm.prefetch(array, which)
        wait_for(lambda: edm.resident(array, which) == pages, f"{name}: {pages} pages come")  # noqa: B023
        assert edm.resident(a) == pages, f"{name}: and no others"
        before = faults(space)
        part = np.asarray(array) if which is None else np.asarray(array)[which]
        assert bool(pages) == bool(part.any())
        assert faults(space) == before, f"{name}: they do not fault"
        edm.forget(a)
        wait_for(lambda: edm.resident(a) == 0, f"{name}: forget")
    for wrong in ([ROWS], [-ROWS - 1], [0, 5000], [1.0], [True], np.ones((ROWS, 2), bool), "rows"):
        try:
            edm.prefetch(a, wrong)
        except IndexError:
            continue
        sys.exit(f"prefetch took {wrong}")


def app(space):
    area = space.mmap((ROWS + 1) * edm.PAGE_SIZE)
    a = np.frombuffer(area, np.float64)[: ROWS * WORDS].reshape(ROWS, WORDS)
    expected = np.arange(ROWS) + 1.0
    assert edm.resident(a) == 0
    address, length = np.int64(a.ctypes.data), np.int64(2 * edm.PAGE_SIZE)
    assert space.locations(address, length) == ["NEW", "NEW"], "NumPy's integers are integers"
    a[:] = expected[:, None]
    outside = np.ones(100_000)
    edm.prefetch(outside)
    edm.forget(outside, [5])
    assert edm.resident(outside) == 0
    if HIGH > 400:
        new = space.mmap(4 * edm.PAGE_SIZE)
        edm.prefetch(new)
        many(space, a)
        assert edm.resident(new) == 0, "zeros that nobody has written do not come"
    for _ in range(3 if HIGH > 400 else 1):  # far more than has room: it ends, and nothing is lost
        edm.prefetch(a)
        edm.prefetch(a, np.arange(ROWS)[::-1])
        assert (a.sum(axis=1) == expected * WORDS).all()
        a += 1
        expected += 1
        edm.forget(a)
        assert (a.sum(axis=1) == expected * WORDS).all()
        assert space.figures()["peak_resident"] <= HIGH
    edm.prefetch(a)  # while this is under way, the program goes on and ends
    del a
    print("advice SUCCESS")


try:
    edm.prefetch(np.ones(3))
except RuntimeError:
    edm.run(app, edm.Config(high_threshold=HIGH, low_threshold=max(1, HIGH * 3 // 4)))
