"""Advice: what the application knows about its next accesses.

In the picture: beside the application. Requests in the mailbox carry the advice to the pager.

Interface: prefetch(array, rows), forget(array, rows), resident(array, rows). Without rows, each is
about the whole array.

An array is one of NumPy's, or an object that numpy.asarray does not copy, like an area of
Space.mmap. Parts that do not lie in the space are ignored.

Rules: any thread of the application. Raises RuntimeError where there is no space, ImportError where
there is no NumPy, and IndexError for a row that the array does not have, or rows that are no integers.

Source: madvise(2), MADV_WILLNEED and MADV_PAGEOUT.
"""

from edm.edm import space
from edm.uffd_ctypes import PAGE_SIZE


def prefetch(array: object, rows: object = None) -> None:
    """Fetch the pages that only the store has, in the order of the disk.

    This does not wait, unless the mailbox is full: they come while the program goes on, and its
    faults go first. Other pages leave for them, so ask for less than may be resident. rows: indexes
    along the first axis, in any order, or a mask.
    """
    space().advise("prefetch", _ranges(array, rows))


def forget(array: object, rows: object = None) -> None:
    """Evict the pages now, so that others may stay. Touching one brings it back.

    This does not wait, unless the mailbox is full. rows: as for prefetch.
    """
    space().advise("forget", _ranges(array, rows))


def resident(array: object, rows: object = None) -> int:
    """How many of the pages are in memory. rows: as for prefetch."""
    here = f"INSTANCE_{space().instance}"
    return sum(space().locations(*each).count(here) for each in _ranges(array, rows))


def _ranges(array: object, rows: object) -> list[tuple[int, int]]:
    """The (address, bytes) of the pages of the space that these bytes touch, ascending; neighbours are
    one range."""
    import numpy as np

    a = np.asarray(array)
    if rows is None and (a.flags.c_contiguous or a.flags.f_contiguous):
        a = a[np.newaxis]  # it is one row
    indexes = np.arange(len(a)) if rows is None else np.atleast_1d(rows)
    if not a.size or not indexes.size:
        return []
    np.broadcast_to(0, len(a))[indexes]  # IndexError for what is no row; all of these are one zero
    (indexes,) = np.ix_(indexes.ravel())  # of a mask, the numbers of its rows
    indexes = indexes.astype(np.int64) % len(a)
    starts = np.sort(a.__array_interface__["data"][0] + indexes * a.strides[0])
    reach = [(n - 1) * stride for n, stride in zip(a.shape[1:], a.strides[1:], strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + a.itemsize - 1
    inside = (starts + high >= space().start_addr) & (starts + low < space().end_addr)
    begins, ends = ((starts[inside] + to) & -PAGE_SIZE for to in (low, high + PAGE_SIZE))
    new = np.append(True, begins[1:] > ends[:-1])[: begins.size]  # where a range begins
    begins, ends = begins[new], ends[np.roll(new, -1)]
    return list(zip(begins.tolist(), (ends - begins).tolist(), strict=True))
