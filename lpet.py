"""LPET, the low priority eviction thread: lets pages leave that nobody uses.

In the picture: beside the DM-Handler, with the LSPT between them. On one machine it is a process of
its own, forked from the pager, as a thread would wait for the pager's GIL. Over MPI it is a thread of
the pager, as a forked process could not use MPI. The code is the same: it shares nothing with the
DM-Handler but the LSPT and the store.

Interface: run() is LPET. forget() evicts what the application does not need (advice.py), and store()
sends the store what it does not have yet, without evicting it. Both are called by another thread, which
has an Lpet of its own. used() and mark_idle() are the tracker `unmap` (page_idle.py). What it counts is in LSPT.figures.

It sleeps until the resident pages reach a number between the thresholds, or a fault finds no room
(LSPT.wait_to_evict). Then it evicts down to low_threshold.

One eviction (Lpet._evict) is safe under writers, although nothing is protected before it:

    1. claim    HERE → LEAVING: faults of these pages wait.
    2. splice   memfd → pipe: the pipe has references to the pages. Nothing is copied, so a write that comes
                now changes what the pipe has, too.
    3. punch    a hole into the memfd: the pages leave every page table, and all TLBs. No writer is left
                now: what the pipe has is final.
    4. ask      /proc/PID/pagemap for the uffd-wp bits, which the hole does not clear. A page that has the
                bit is clean.
    5. put      the pages are read from the pipe, and the store writes the dirty ones. Clean pages are
                dropped without writing: the store has their bytes. Neighbours that are all dirty go
                from the pipe to the disk file without a copy in between, if the store can do that.
                If all are clean, they are dropped from the pipe, unread.
    6. gone     LEAVING → AWAY. Faults that came meanwhile are woken, and are tried again.

If the store refuses in step 5, the pages are written back into the memfd, and are HERE again. The
order of 2 and 3, and of 3 and 4, matters: bytes or bits that are read while a writer is left may
be old (tests/test_order.py has both wrong orders, which fail).

Which pages leave: a clock goes round the LSPT by address, evict_batch pages at a step, and goes on
where it stopped. Pages that came at least AGE generations ago leave, neighbours together. If a turn of the
clock does not find enough, younger ones do, and then those that came back soon (LSPT.arrived). A page
that the kernel's idle bitmap says was used is passed, and marked idle. While the LSPT is small (lspt.SMALL), or
if the settings are plain, LPET follows the wiki's algorithm in full: in the first turn it asks about every
page, whatever its age, by the tracker that there is. Idle ones leave. The others are passed, and marked idle. If
that was not enough, they leave in order in a second turn. And no more leave than are needed. A page that a system
call of an ordinary user is about to touch is always passed (pins.py).

When the store refuses, because its disk is full or fails, LPET passes dirty pages for REST seconds
(until _again_at). Then it tries again, for GRACE seconds page by page, whatever their age, as some may fit: those
that have a place on the disk already. While a fault waits, it goes on to the next page at once. If a fault has
waited for room, and the store has refused, both for GRACE seconds (since _refused_since), LPET raises the store's
reason, which ends the job.

Rules: an Lpet belongs to one thread. It never takes the LSPT's lock itself.
"""

import errno
import mmap
import os
import re
import time
from contextlib import suppress
from fcntl import F_GETPIPE_SZ, F_SETPIPE_SZ, fcntl

from edm import log
from edm import lspt as l
from edm.lspt import CHOSEN_RUN, LSPT, Claimed, Run, runs
from edm.page_idle import PRESENT, WRITTEN, BitmapTracker, Pagemap
from edm.page_store import Bytes, PageStore, write_all
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, WITH_GIL, Userfaultfd, punch_hole

# Generations. With 2, zipf-distributed accesses fetch 2 % fewer pages, but LPET takes 1.5 times as long for each.
AGE = 1
GRACE = 5.0  # seconds: by then whoever fills the disk may have made room
REST = 0.1  # seconds between two tries of what was refused
# Pages that are to leave, and a few others between them: one more splice costs as much as copying
# four pages.
_SPAN = re.compile(rb"[\x80-\xff]+(?:[^\x80-\xff]{1,4}[\x80-\xff]+)*")


class Lpet:
    def __init__(self, lspt: LSPT, store: PageStore, pagemap: Pagemap, hello: object) -> None:
        """hello: see page_for in pager.py. Its idle_tracker is the one that was found."""
        self._lspt, self._store = lspt, store
        self._uffd, self._pagemap = Userfaultfd(lspt.uffd), pagemap
        self._memfd, self._start = hello.fds[1], lspt.start
        self._out, self._in = os.pipe2(os.O_CLOEXEC)
        # A user may have a limited number of such pipes: pipe(7), pipe-user-pages-soft.
        with suppress(PermissionError):
            fcntl(self._in, F_SETPIPE_SZ, PAGES_AT_ONCE * PAGE_SIZE)
        # Looked at, or evicted, at once.
        self._batch = min(hello.evict_batch, fcntl(self._in, F_GETPIPE_SZ) // PAGE_SIZE)
        self._bytes = memoryview(mmap.mmap(-1, PAGES_AT_ONCE * PAGE_SIZE))  # of the claimed pages
        self._tracker = BitmapTracker(pagemap) if hello.idle_tracker == "bitmap" else self
        self._null = 0  # where clean pages go, once LPET runs
        self._hand = 0  # the page where the clock goes on
        # The generation of the clock's last whole turn. Another turn in it would find no page that is AGE old.
        self._turned = -1
        self._again_at = 0.0  # time.monotonic, as is the next
        self._refused_since = float("inf")  # the first refusal since pages have left
        self._log, self._banner, self._info = log.of_box("Lpet")

    def run(self) -> None:
        """Evict whenever woken, until LSPT.stop. Raises OSError when a fault has waited for GRACE seconds."""
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        while needed := self._lspt.wait_to_evict():
            self._banner.info("\n-----------------START LPET-----------------\n")
            left = self._evict_until_low_threshold(needed)
            self._banner.info("\n-----------------END LPET-----------------\n")
            if left == needed:  # short, to see LSPT.stop soon
                time.sleep(REST / 2 if time.monotonic() < self._again_at else l.SETTLE)

    # ------------------------------------------------------------ one eviction

    def _evict(self, claimed: Claimed) -> int:
        """Evict the pages that were claimed, which is step 1. Returns how many.

        The steps are explained at the top. claimed: of at most PAGES_AT_ONCE pages.
        """
        page, _, chosen, leaving = claimed
        if not leaving:
            return 0
        self._say("[LPET] sending eviction request for page in addr %#x", page, chosen)
        spans, written = self._move_out(claimed)  # 2, 3, 4
        pages, dirty, length = chosen.count(255), written.count(255), sum(len(c) for _, c in spans)
        # 5. Of neighbours that are all dirty: pipe → disk, without a copy. If that is not possible, or fails, the
        # bytes are in _bytes then. LPET leaves clean pages in the pipe until the store has agreed.
        at_once = self._store.takes_pipes and len(spans) == 1 and length == dirty * PAGE_SIZE
        unread = self._null and not dirty
        if not (at_once or unread):
            self._empty_pipe(spans)
        if not (at_once and self._store.put_from_pipe(self._out, *spans[0])):
            try:
                self._store.put(leaving, self._content_of(page, written, CHOSEN_RUN))
            except OSError as error:
                self._put_back(claimed, spans if unread else [])
                self._refused(error, pages)
                return 0
        while unread and length:
            length -= os.splice(self._out, self._null, length)
        self._say("[Lpet] - received ack for eviction of page in address : %#x", page, chosen)
        self._lspt.gone(claimed)  # 6
        self._lspt.figures[l.EVICTED_DIRTY] += dirty
        self._lspt.figures[l.EVICTED_CLEAN] += pages - dirty
        self._lspt.figures[l.SENT] += dirty * PAGE_SIZE
        self._refused_since = float("inf")
        return pages

    def _move_out(self, claimed: Claimed) -> tuple[list[Bytes], bytes]:
        """Steps 2 to 4: the claimed pages are in the pipe, and nowhere else. Returns what is in it, with the
        place in _bytes for it, and which pages are dirty."""
        spans = self._content_of(claimed.page, claimed.chosen, _SPAN)
        for first, content in spans:
            at, end = first * PAGE_SIZE, first * PAGE_SIZE + len(content)
            while at < end:
                at += os.splice(self._memfd, self._in, end - at, offset_src=at)
        for first, count in claimed.leaving:
            punch_hole(self._memfd, first * PAGE_SIZE, count * PAGE_SIZE, WITH_GIL)
        return spans, self._pagemap.find(claimed.page, claimed.chosen, WRITTEN)

    def _empty_pipe(self, spans: list[Bytes]) -> None:
        parts = [content for _, content in spans]
        if os.readv(self._out, parts) < sum(map(len, parts)):
            raise RuntimeError("readv: the pipe has less than was put into it")

    def _content_of(self, page: int, chosen: bytes, which: re.Pattern[bytes]) -> list[Bytes]:
        """The runs of pages whose bytes match, with the places in _bytes for their content. page: the first
        page of the range, which has the first place."""
        found = runs(page, chosen, which)
        return [(at, self._bytes[(at - page) * PAGE_SIZE :][: n * PAGE_SIZE]) for at, n in found]

    def _put_back(self, claimed: Claimed, spans: list[Bytes]) -> None:
        """The pages are HERE again. spans: those that are in the pipe; the others are in _bytes. The page table has
        kept their uffd-wp bits: clean pages are still clean."""
        self._empty_pipe(spans)
        for first, content in self._content_of(claimed.page, claimed.chosen, CHOSEN_RUN):
            write_all(self._memfd, content, first * PAGE_SIZE)
        self._lspt.stays(claimed)

    def _say(self, words: str, page: int, chosen: bytes) -> None:
        """Tell the log of each of these pages, from `page` on, that is chosen."""
        for first, count in runs(page, chosen, CHOSEN_RUN) if self._info else ():
            for at in range(first, first + count):
                self._banner.info(words, self._start + at * PAGE_SIZE)

    # ------------------------------------------------------------ refusals

    def _refused(self, error: OSError, pages: int) -> None:
        """Raises OSError, with the store's errno, when a fault has waited for too long."""
        now, wanted_since = time.monotonic(), self._lspt.figures[l.ROOM_WANTED] / 1e9
        self._refused_since = min(self._refused_since, now)
        self._lspt.figures[l.REFUSED] += pages
        waits = 0 < wanted_since <= now  # a fault, and not only advice
        self._again_at = now + (REST if pages > 1 or not waits else 0)
        if waits and now - max(wanted_since, self._refused_since) > GRACE:
            words = "no page can be evicted, and the application needs another one"
            raise OSError(error.errno, f"{words}: {error.strerror}")

    # ------------------------------------------------------------ which pages

    def _evict_until_low_threshold(self, needed: int) -> int:
        """One run of LPET, which is the clock's turns: of each part, what may be evicted leaves at once, until `needed`
        pages have left. Those that come meanwhile are for the next run. Returns how many are still needed.

        The wiki's parts have no more pages than are still needed.
        """
        now, by_the_wiki = self._lspt.generation(), self._lspt.as_the_wiki_does
        if by_the_wiki:
            turns, look = [(-l.LONGER, True), (-l.LONGER, False)], self._lspt.runs_here
            self._show_lspt()
        else:
            by_bitmap = isinstance(self._tracker, BitmapTracker)
            turns = [(AGE, by_bitmap), (0, False), (-l.LONGER, False)][now == self._turned :]
            look = self._lspt.occupied
        if 0 <= time.monotonic() - self._again_at < GRACE:
            turns = turns[-1:]
        for age, asks in turns:
            for page, count in look(self._hand):
                end = page + count
                while page < end:
                    most = 1 if 0 <= time.monotonic() - self._again_at < GRACE else self._batch
                    part = page, min(end - page, most, needed if by_the_wiki else most)
                    page = self._hand = sum(part)
                    needed -= self._evict(self._claim(*part, age, asks))
                    if needed <= 0 or self._lspt.stopped():
                        return needed
            self._turned = now
        return needed

    def _claim(self, page: int, count: int, age: int, asks: bool) -> Claimed:
        """Claim those of these pages that came at least `age` generations ago, but for those that may not leave now:
        dirty ones, while it is too early to try again what was refused. Else, if the tracker is asked, those
        that were used. It marks them idle."""
        which, passed = self._lspt.older_than(age), b""
        chosen = self._lspt.state[page : page + count].translate(which)
        if time.monotonic() < self._again_at:
            passed = self._pagemap.find(page, chosen, WRITTEN)
        elif asks:
            self._say("[LPET] checking if page in addr %#x is idle", page, chosen)
            passed = self._tracker.used(page, chosen)
            self._tracker.mark_idle(page, passed)
        return self._lspt.claim(page, count, which, runs(page, passed, CHOSEN_RUN))

    def _show_lspt(self) -> None:
        """Tell the log of all pages that are HERE, as the wiki prints the LSPT. The page frame number is 0 without
        CAP_SYS_ADMIN: pagemap does not show it then."""
        if self._info and (here := list(self._lspt.runs_here(self._hand))):
            self._log.info("start address: %#x", self._start + here[0][0] * PAGE_SIZE)
            lines = ["page list state: ", "-----START LSPT ----"]
            for page, count in sorted(here):
                for at in range(page, page + count):
                    address, [pfn] = self._start + at * PAGE_SIZE, self._pagemap.pfns(at, 1)
                    idle = self._tracker.used(at, b"\xff") != b"\xff"
                    lines.append(f"address : {address:#x}  pfn : {pfn}  is_idle: {idle:d}")
            self._banner.info("\n".join([*lines, "-----END LSPT ----"]))

    def used(self, page: int, chosen: bytes) -> bytes:
        """As a BitmapTracker's, for the tracker `unmap`."""
        return self._pagemap.find(page, chosen, PRESENT)

    def mark_idle(self, page: int, chosen: bytes) -> None:
        """Take these pages, which may be evicted at once, out of the page table, and put them back into the memfd."""
        for run in runs(page, chosen, CHOSEN_RUN):
            claimed = self._lspt.claim(*run, l.ANY_HERE)
            self._put_back(claimed, self._move_out(claimed)[0])

    def forget(self, advised: list[Run]) -> None:
        """Evict those of these pages that are HERE, but for pinned ones.

        This waits for pages that are COMING, which the application may have used already, and for pages that LPET
        has. It stops when the store refuses some, or the application has ended.
        """
        self._refused_since = float("inf")  # not of an earlier forget
        for claimed in self._lspt.claims(advised, l.ANY_HERE, self._batch, False):
            if claimed.leaving and not self._evict(claimed):
                break

    # ------------------------------------------------------------ storing without evicting

    def store(self, track_clean: bool) -> int:
        """Send the store every page that was written since the store got it. Returns how many. All stay.

        track_clean: clean pages have the uffd-wp bit. Then each dirty page is write-protected before it is read. So a
        later write makes it dirty again, for the next sync. Without, all pages count as written.
        When the application ends, this leaves out the rest; but if the disk is kept, it goes on. Raises OSError if the
        store refuses a page, or LPET has one at the end.
        """
        pages, everything = 0, [(0, self._lspt.pages)]
        for claimed in self._lspt.claims(everything, l.NO_HOLES, self._batch, self._store.kept):
            written = self._pagemap.find(claimed.page, claimed.chosen, WRITTEN)
            dirty = self._content_of(claimed.page, written, CHOSEN_RUN)
            try:
                for at, content in dirty:
                    if track_clean:
                        self._uffd.writeprotect(self._start + at * PAGE_SIZE, len(content), True)
                    if os.preadv(self._memfd, [content], at * PAGE_SIZE) < len(content):
                        raise OSError(errno.EIO, "preadv: a page of the memfd can't be read")
                if dirty:
                    self._store.put([], dirty)
            except OSError:
                for at, content in dirty if track_clean else ():
                    self._uffd.writeprotect(self._start + at * PAGE_SIZE, len(content), False)
                raise
            finally:
                self._lspt.stays(claimed)
            pages += written.count(255)
            self._lspt.figures[l.SENT] += written.count(255) * PAGE_SIZE
            if self._lspt.stopped() and l.LEAVING in claimed.before:  # what is COMING has not come
                raise OSError(errno.EIO, "LPET has ended in the midst of an eviction")
        return pages
