"""LPET, the low priority eviction thread: lets pages leave that nobody uses.

In the picture: beside the DM-Handler, with the LSPT between them. On one machine it is a process of
its own, forked from the pager, as a thread would wait for the pager's GIL; over MPI it is a thread of
the pager. The code is the same: it shares nothing with the DM-Handler but
the LSPT and the store.

Interface: run() is LPET. store() sends the store what it does not have yet, without evicting it; it
is called by another thread, on an Lpet of that thread's own. figures are in the LSPT.

It sleeps until the DM-Handler finds that many pages are here (LSPT.arrived, LSPT.expect), and evicts
until only low_threshold are left.

One eviction (Lpet._evict) is safe under writers, although nothing is protected before it:

    1. claim    HERE → LEAVING: faults of these pages wait.
    2. take     splice(memfd → pipe): the pipe holds references to the pages. Nothing is copied.
    3. remove   MADV_REMOVE: the pages leave every page table, and all TLBs. No writer is left now:
                what the pipe holds is final.
    4. marks    /proc/PID/pagemap: a page whose mark is still set was clean when it left.
    5. put      the store takes the dirty pages from the pipe; clean pages are dropped without
                writing, as the store has their bytes.
    6. gone     LEAVING → AWAY; faults that came meanwhile are woken, and try again.

If the store refuses in step 5, a second pipe has the same references: the pages go back into the
memfd, and are HERE again. The order of 2 and 3, and of 3 and 4, matters: bytes or marks that are
read while a writer is left may be old (tests/test_order.py has both wrong orders, which fail).

Which pages leave: a clock goes round the LSPT by address, evict_batch pages at a step, and goes on
where it stopped. Pages that came AGE generations ago leave, neighbours together; if a turn of the
clock does not find enough, younger ones do. A page that the kernel's idle bitmap says was used is
passed. While the LSPT is small (lspt.SMALL) the wiki's algorithm is followed in full: every page is
asked, idle ones leave, the others are marked and passed, and if that was not enough, they leave in
order.

When the store refuses, because its disk is full or fails, LPET evicts clean pages only for a while,
and then tries again with half as many at once. If a fault has waited for GRACE seconds of refusals
without any room, LPET raises the store's reason, which ends the job.

Rules: an Lpet belongs to one thread. It holds the LSPT's lock for no system call.
"""

from __future__ import annotations

import bisect
import fcntl
import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from logging import INFO

from edm import log
from edm import lspt as l
from edm.lspt import LSPT, Left, Run, here_runs, runs_of
from edm.page_idle import BitmapTracker, Pagemap, UnmapTracker, pages_in
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, Userfaultfd, tee

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

AGE = 2  # generations: the design's figure, half of a turnover; others were not tried
GRACE = 5.0  # seconds
SHORTEST_REST, LONGEST_REST = 0.02, 1.0  # seconds between two tries of what was refused
SETTLE = 100e-6  # seconds between two looks at pages that somebody else has in its hands


class PagePipe:
    """A pipe that holds references to pages of the memfd, and a second one that holds them again
    until the store has the bytes."""

    def __init__(self, memfd: int) -> None:
        self._memfd = memfd
        self.out, self._in = os.pipe2(os.O_CLOEXEC)
        self._spare_out, self._spare_in = os.pipe2(os.O_CLOEXEC)
        self._null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        self._pages = 0  # in the first pipe, when nobody has read of it
        for pipe in (self.out, self._spare_out):
            # 1 MiB is what any user may have: fs.pipe-max-size, pipe(7).
            size = fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PAGES_AT_ONCE * PAGE_SIZE)
        self.capacity = size // PAGE_SIZE

    def take(self, runs: Iterable[Run]) -> None:
        """memfd → pipe."""
        for page, count in runs:
            self._pages += count
            _splice(self._memfd, self._in, count * PAGE_SIZE, offset_src=page * PAGE_SIZE)

    def keep(self) -> None:
        """Hold everything twice: what is read from `out` can be put back."""
        if tee(self.out, self._spare_in, self._pages * PAGE_SIZE) != self._pages * PAGE_SIZE:
            raise OSError("tee: the second pipe has no room")

    def drop(self) -> None:
        """The store has everything."""
        _splice(self._spare_out, self._null, self._pages * PAGE_SIZE)
        self._pages = 0

    def put_back(self, runs: Iterable[Run]) -> None:
        """second pipe → memfd: the runs that were taken. What is left in the first one is dropped."""
        self._empty(self.out)
        self._put(self._spare_out, runs)

    def clear(self) -> None:
        """Drop everything; the memfd still has it."""
        self._empty(self.out)
        self._empty(self._spare_out)
        self._pages = 0

    def _empty(self, pipe: int) -> None:
        os.set_blocking(pipe, False)
        try:
            while os.splice(pipe, self._null, PAGES_AT_ONCE * PAGE_SIZE):
                pass
        except BlockingIOError:
            pass  # it is empty now
        finally:
            os.set_blocking(pipe, True)

    def return_at_once(self, runs: Iterable[Run]) -> None:
        """pipe → memfd: the runs that were taken, which were not kept twice."""
        self._put(self.out, runs)

    def _put(self, pipe: int, runs: Iterable[Run]) -> None:
        for page, count in runs:
            _splice(pipe, self._memfd, count * PAGE_SIZE, offset_dst=page * PAGE_SIZE)
        self._pages = 0

    def close(self) -> None:
        for fd in (self.out, self._in, self._spare_out, self._spare_in, self._null):
            os.close(fd)


def _splice(source: int, target: int, length: int, **offset: int) -> None:
    """splice(2) until all is through; one of offset_src, offset_dst or neither."""
    while length:
        done = os.splice(source, target, length, **offset)
        if not done:
            raise OSError("splice: nothing came")
        length -= done
        offset = {name: at + done for name, at in offset.items()}


class Lpet:
    def __init__(
        self,
        lspt: LSPT,
        store: Any,
        memory: mmap.mmap,
        memfd: int,
        uffd: int,
        pagemap: Pagemap,
        start_addr: int,
        batch: int,
        tracker: str,
    ) -> None:
        """memory: the pager's mapping of the memfd, which nobody touches. tracker: its name.

        batch: pages that are looked at and evicted at once.
        """
        self._lspt, self._store = lspt, store
        self._memory, self._uffd, self._pagemap = memory, Userfaultfd(uffd), pagemap
        self._start = start_addr
        self._pipe = PagePipe(memfd)
        self._batch = min(batch, self._pipe.capacity)
        self._tracker: Any = (
            BitmapTracker(pagemap)
            if tracker == BitmapTracker.name
            else UnmapTracker(pagemap, self._unmap)
        )
        self._hand = 0  # the page where the clock goes on
        self._refusal: OSError | None = None  # until _again_at, only clean pages are evicted
        self._again_at, self._backoff = 0.0, SHORTEST_REST  # seconds of the clock; seconds
        self._refused_since = self._wanted_since = math.inf  # seconds of the clock
        self._most = self._batch  # pages to evict at once: fewer after a refusal, as some may fit
        self._log, self._banner = log.logger("Lpet"), log.logger()
        self._info = self._log.isEnabledFor(INFO)

    def run(self) -> None:
        """Evict whenever woken, until told to stop."""
        while self._lspt.lpet_waits():
            if self._evict_until_low_threshold():
                self._wanted_since = math.inf
            elif rest := self._rest():
                time.sleep(min(rest, 0.05))  # short, as it may be told to stop

    def close(self) -> None:
        self._pipe.close()

    # ------------------------------------------------------------ one eviction

    def _evict(self, page: int, count: int, which: bytes) -> int:
        """Evict those pages of a range, at most PAGES_AT_ONCE, that the table says; how many left.

        The steps are explained at the top.
        """
        left = self._lspt.leaving(page, count, which)  # 1
        if not left:
            return 0
        here = [run for each in left for run in here_runs(each)]
        runs = self._take_out(left, here)  # 2, 3, 4
        try:
            self._pipe.keep()
            self._store.put(runs, self._pipe.out)  # 5
        except OSError as error:
            self._pipe.put_back(here)
            self._wake(self._lspt.stays(left))
            self._refused(error, sum(count for _, count in here))
            return 0
        self._pipe.drop()
        self._wake(self._lspt.gone(left))  # 6
        return self._count(runs)

    def _take_out(self, left: list[Left], here: list[Run]) -> list[tuple[int, int, bool]]:
        """Steps 2 to 4: (first page, count, is dirty) of what the pipe holds."""
        self._pipe.take(here)
        self._remove(left)
        return self._pagemap.written(here)

    def _remove(self, left: Iterable[Left]) -> None:
        for first, before in left:
            self._memory.madvise(mmap.MADV_REMOVE, first * PAGE_SIZE, len(before) * PAGE_SIZE)

    def _wake(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._uffd.wake(self._start + page * PAGE_SIZE, PAGE_SIZE)

    def _count(self, runs: Sequence[tuple[int, int, bool]]) -> int:
        pages = sum(count for _, count, _ in runs)
        dirty = sum(count for _, count, dirty in runs if dirty)
        figures = self._lspt.figures
        figures[l.EVICTED_DIRTY] += dirty
        figures[l.EVICTED_CLEAN] += pages - dirty
        figures[l.STORED_BYTES] += dirty * PAGE_SIZE
        if dirty:
            self._backoff, self._refused_since = SHORTEST_REST, math.inf
            self._most = min(2 * self._most, self._batch)
        if self._info:
            for page in pages_in((page, count) for page, count, _ in runs):
                self._log.info("evict page in address: %#x", self._start + page * PAGE_SIZE)
        return pages

    # ------------------------------------------------------------ refusals

    def _refused(self, error: OSError, pages: int) -> None:
        now = time.monotonic()
        self._refusal = error
        self._refused_since = min(self._refused_since, now)
        self._most = max(1, self._most // 2)
        self._again_at = now + self._backoff
        self._backoff = min(2 * self._backoff, LONGEST_REST)
        self._lspt.figures[l.REFUSED] += pages

    def _rest(self) -> float:
        """How many seconds to wait before the next try, if nothing could leave.

        Raises OSError, with the store's errno, when a fault has waited for too long.
        """
        now, wanted = time.monotonic(), self._lspt.room_wanted()
        self._wanted_since = min(self._wanted_since, now) if wanted else math.inf
        if not self._refusal:
            return SETTLE if wanted else 0.0
        if now - max(self._wanted_since, self._refused_since) > GRACE:
            raise OSError(
                self._refusal.errno,
                "no page can be evicted, and the application needs another one: "
                f"{self._refusal.strerror or self._refusal}",
            )
        return max(self._again_at - now, SETTLE)

    # ------------------------------------------------------------ which pages

    def _evict_until_low_threshold(self) -> int:
        """One run; how many pages have left."""
        # Counted once: the pages that come from here on are not this run's business.
        needed = self._lspt.figures[l.RESIDENT] - self._lspt.low
        if needed <= 0:  # it was woken once more than there was need, or pages were freed
            return 0
        self._lspt.figures[l.LPET_RUNS] += 1
        if time.monotonic() >= self._again_at:
            self._refusal = None
        if self._info:
            self._banner.info("\n-----------------START LPET-----------------\n")
            self._show_lspt()
        if self._lspt.high <= l.SMALL:
            pages = self._evict_as_the_wiki_does(needed)
        else:
            pages = self._evict_by_age(needed)
        if self._info:
            self._banner.info("\n-----------------FINISH LPET-----------------\n")
        return pages

    def _evict_by_age(self, needed: int) -> int:
        pages = 0
        for age in range(AGE, -1, -1):
            which, made_for = b"", -1
            for page, count in self._clock():
                generation = self._lspt.figures[l.GENERATION]
                if generation != made_for:
                    which, made_for = self._lspt.older_than(age), generation
                if age and self._tracker.name == BitmapTracker.name:
                    self._pass_used(page, count, which)
                pages += self._evict_some(page, count, which)
                if pages >= needed or self._lspt.stopped():
                    return pages
        return pages

    def _clock(self) -> Iterator[Run]:
        """The space a batch at a step, from where the last one stopped, once round."""
        start = self._hand
        for begin, end in ((start, self._lspt.pages), (0, start)):
            for first, count in self._lspt.used(begin, end - begin):
                for page in range(first, first + count, self._batch):
                    self._hand = min(page + self._batch, first + count)
                    yield page, self._hand - page

    def _pass_used(self, page: int, count: int, which: bytes) -> None:
        """Pages that are old and in use count as if they had come now, and are marked anew."""
        states = self._lspt.state[page : page + count].translate(which)
        old = [page + at for at, what in enumerate(states) if what == 2]
        idle = self._tracker.idle(runs_of(old))
        used = runs_of([page for page in old if page not in idle])
        generation = self._lspt.figures[l.GENERATION]
        for run in used:
            self._wake(self._lspt.stays(self._lspt.leaving(*run, which), generation))
        self._mark(used)

    def _evict_as_the_wiki_does(self, needed: int) -> int:
        runs: Iterable[Run] = self._lspt.here()
        if self._refusal:  # then a page that was written is not to be chosen
            runs = [
                (page, count)
                for run in runs
                for page, count, dirty in self._pagemap.written([run])
                if not dirty
            ]
        pages = list(pages_in(runs))
        at = bisect.bisect_left(pages, self._hand)
        order = pages[at:] + pages[:at]
        idle = self._tracker.idle(runs_of(pages))
        chosen: list[int] = []
        hot: list[int] = []
        for page in order:
            if len(chosen) == needed:
                break
            (chosen if page in idle else hot).append(page)
            self._hand = page + 1
        if len(chosen) < needed and hot:  # every page was passed: now in order
            in_order, hot = hot[: needed - len(chosen)], hot[needed - len(chosen) :]
            self._hand = in_order[-1] + 1
            chosen += in_order
        self._mark(runs_of(sorted(hot)))
        return sum(
            self._evict_some(page, count, l.NO_HOLES) for page, count in runs_of(sorted(chosen))
        )

    def _evict_some(self, page: int, count: int, which: bytes) -> int:
        """_evict, in parts as large as may be; while the store refuses, of clean pages only."""
        pages, end = 0, page + count
        while page < end:
            part = (page, min(self._most, end - page))
            page += part[1]
            if self._refusal:
                for at, length, dirty in self._pagemap.written([part]):
                    pages += 0 if dirty else self._evict(at, length, which)
            else:
                pages += self._evict(*part, which)
        return pages

    def _mark(self, runs: Sequence[Run]) -> None:
        self._tracker.mark(runs)
        self._lspt.figures[l.MARKED_IDLE] += sum(count for _, count in runs)

    def _unmap(self, runs: Iterable[Run]) -> None:
        """Take pages out of the page table, but leave them in the memfd: UnmapTracker's mark."""
        for first, count in runs:
            for page in range(first, first + count, self._batch):
                part = min(self._batch, first + count - page)
                left = self._lspt.leaving(page, part, l.NO_HOLES)
                here = [run for each in left for run in here_runs(each)]
                self._pipe.take(here)
                self._remove(left)
                self._pipe.return_at_once(here)
                self._wake(self._lspt.stays(left))

    def _show_lspt(self) -> None:
        runs = list(self._lspt.here())
        pages = list(pages_in(runs))
        if pages:
            self._log.info("start address: %#x", self._start + pages[0] * PAGE_SIZE)
        idle = self._tracker.idle(runs)
        rows = [
            (self._start + page * PAGE_SIZE, self._pagemap.pfns(page, 1)[0], page in idle)
            for page in pages
        ]
        self._banner.info(log.lspt_table(rows))

    # ------------------------------------------------------------ storing without evicting

    def store(self, track_clean: bool) -> int:
        """Send the store every page that it does not have as it is, and keep it; how many.

        What is written meanwhile is marked as written again. track_clean: the pages have marks.
        Raises OSError if the store refuses one.
        """
        pages = 0
        for first, count in self._lspt.used(0, self._lspt.pages):
            for page in range(first, first + count, self._batch):
                pages += self._store_part(page, min(self._batch, first + count - page), track_clean)
        return pages

    def _store_part(self, page: int, count: int, track_clean: bool) -> int:
        states = self._lspt.state[page : page + count]
        unsettled = runs_of([page + at for at, state in enumerate(states) if l.COMING <= state <= l.AWAITED])  # fmt: skip
        pages = self._store_here(page, count, track_clean)
        for run in unsettled:  # somebody else had them: they are HERE, or have been stored, soon
            while self._lspt.unsettled(*run) and not self._lspt.stopped():
                time.sleep(SETTLE)
            pages += self._store_here(*run, track_clean)
        return pages

    def _store_here(self, page: int, count: int, track_clean: bool) -> int:
        left = self._lspt.leaving(page, count, l.NO_HOLES)
        here = [run for each in left for run in here_runs(each)]
        runs = [run for run in self._pagemap.written(here) if run[2]]
        dirty = [run[:2] for run in runs]
        try:
            if dirty:
                if track_clean:
                    self._protect(dirty, True)
                self._pipe.take(dirty)
                self._store.put(runs, self._pipe.out, stay=True)
        except OSError:
            if track_clean:
                self._protect(dirty, False)
            raise
        finally:
            self._pipe.clear()
            self._wake(self._lspt.stays(left))
        pages = sum(length for _, length in dirty)
        self._lspt.figures[l.STORED_BYTES] += pages * PAGE_SIZE
        return pages

    def _protect(self, runs: Iterable[Run], protect: bool) -> None:
        for page, count in runs:
            try:
                self._uffd.writeprotect(self._start + page * PAGE_SIZE, count * PAGE_SIZE, protect)
            except ProcessLookupError:  # ESRCH: it has ended, and writes no more
                return
