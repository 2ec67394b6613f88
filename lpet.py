"""LPET, the low priority eviction thread: sends pages that nobody uses back to the DMS.

In the picture: in the pager process, beside the DM-Handler, with the LSPT between them.

Interface: run() is the thread; figures() its counts. store() sends the DMS what it does not have
yet, without evicting it: in this thread when LSPT.ask_to_store asks for it, and for the main thread
when this one has ended. A fault that needs room meanwhile gets it, by an eviction in between.

It sleeps until the DM-Handler finds high_threshold pages here, and then evicts until only
low_threshold are left. Which (the wiki's algorithm): it goes round the LSPT from where the last
run stopped. An idle page is evicted. Any other is marked idle and passed. When every page has been
passed and there are still too many, it evicts in order, idle or not. With SMALL pages or more
here, a round is shortened: see LEAST_PASSED.

One eviction, safe under writers (Lpet._send, and then _finish):

    hold             the pages' faults wait from here on
    WRITEPROTECT     those that are DIRTY: a writer now sleeps in a WP fault
    preadv           their bytes, from the memfd
    EVICT            one message for all; wait for the DMS's ack that they are written
    PUNCH_HOLE       the pages leave the memfd and the application's page table
    left, WAKE       who waited faults again, MISSING now, and gets the page back

A CLEAN page is protected already, and as the DMS has its bytes, EVICT only names it. To store a page
is the same, with STORE for EVICT, and without the end: it stays, CLEAN, still write-protected.

When the DMS refuses an eviction, because its disk is full or fails, the DIRTY pages are released, and
for a while LPET evicts CLEAN ones only, before it tries again, with half as many at once. If a fault
has waited for GRACE seconds of refusals without any room, the job ends with the DMS's reason.

Rules: this thread alone turns the LSPT's order, and has the idle tracker and its own MpiClient to
itself. It holds the LSPT's lock for no system call.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from logging import INFO
from typing import Any

from edm import log
from edm import messages as m
from edm.lspt import DIRTY, LSPT, SMALL, HeldRun, Run, runs_of
from edm.mpi_client import PATIENCE, MpiClient
from edm.page_idle import IdleTracker, Pagemap
from edm.uffd_ctypes import PAGE_SIZE, Userfaultfd, punch_hole

RUNS = 32  # in one message: each is a write of its own for the DMS, and a fault may wait for all
# With many pages here, LPET does not pass all of them before it evicts in order: so many for each
# page that must go, depending on how often a page that it had passed was used again.
LEAST_PASSED, MOST_PASSED = 1 / 16, 1.0
GRACE = 5.0  # seconds
SHORTEST_REST, LONGEST_REST = 0.02, 1.0  # seconds between two tries to send what was refused


class Lpet:
    def __init__(
        self,
        uffd: Userfaultfd,
        memfd: int,
        clients: Sequence[MpiClient],
        lspt: LSPT,
        tracker: IdleTracker,
        pagemap: Pagemap,
        start_addr: int,
        high_threshold: int,
        low_threshold: int,
        batch: int,
    ) -> None:
        """Two clients, used in turn. batch: pages that are looked at and evicted at once."""
        self._uffd, self._memfd, self._lspt = uffd, memfd, lspt
        self._clients = list(clients)  # the first is the next one to send with
        # What was sent and is not acknowledged yet, and what is then to be done with it.
        self._sent: tuple[MpiClient, list[HeldRun], Callable[[Sequence[HeldRun]], None]] | None = (
            None
        )
        self._refusal = ""  # the DMS's reason: until _again_at, only CLEAN pages are evicted
        self._again_at, self._backoff = 0.0, SHORTEST_REST  # seconds of the clock; seconds
        self._refused_since = math.inf  # seconds of the clock: DIRTY pages, again and again
        self._tracker, self._pagemap = tracker, pagemap
        self._start, self._batch = start_addr, batch
        self._most = batch  # pages to evict at once: fewer after a refusal, as some may still fit
        self._high, self._low = high_threshold, low_threshold
        self._worth = 0.1  # the share of marked pages that were touched again, of late
        self._log, self._banner = log.logger("Lpet"), log.logger()
        self._info = self._log.isEnabledFor(INFO)
        self._dirty = self._clean = self._marked = self._rounds = self._refused = 0

    def figures(self) -> dict[str, object]:
        """See the top of pager.py."""
        return {
            "evicted_dirty": self._dirty,
            "evicted_clean": self._clean,
            "marked_idle": self._marked,
            "lpet_runs": self._rounds,
            "refused": self._refused,
        }

    def run(self) -> None:
        """Evict whenever woken, until told to stop, or until the application has ended."""
        not_before = 0.0  # seconds of the clock
        try:
            while any(work := self._lspt.wait_for_work(max(0.0, not_before - time.monotonic()))):
                evict, stored = work
                if evict:
                    clean_untried = self._evict_until_low_threshold()
                    if clean_untried and self._lspt.resident >= self._high:
                        self._evict_until_low_threshold()
                    not_before = time.monotonic() + self._rest()
                else:
                    self._answer(stored)
        except ProcessLookupError:
            pass  # ESRCH: the application has ended; the main thread knows, or will
        finally:
            self._finish_sent()  # no answer may be left under way

    def _rest(self) -> float:
        """How many seconds to wait before the next try, if nothing could leave."""
        if not self._refusal or self._lspt.resident < self._high:
            return 0.0
        waiting_since = self._lspt.waiting_since
        if waiting_since and time.monotonic() - max(waiting_since, self._refused_since) > GRACE:
            raise m.DMSError(
                f"no page can be evicted, and the application needs another one: {self._refusal}"
            )
        return max(self._again_at - time.monotonic(), SHORTEST_REST)

    def _refused_for(self, reason: str) -> None:
        self._refusal = reason
        self._refused_since = min(self._refused_since, time.monotonic())
        self._most = max(1, self._most // 2)
        self._again_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, LONGEST_REST)

    # ------------------------------------------------------------ storing

    def _answer(self, stored: Future[int]) -> None:
        try:
            pages = self.store()
        except m.DMSError as error:
            stored.set_exception(error)
        except BaseException:
            stored.cancel()  # nobody is to wait for it
            raise
        else:
            stored.set_result(pages)

    def store(self) -> int:
        """Send every DIRTY page, and keep it; how many there were.

        Raises DMSError if the DMS refuses one.
        """
        self._refusal = ""
        pages = 0
        group: list[Run] = []  # as much as one message may have
        room = self._batch
        for page, count in self._lspt.dirty():
            while count and not self._refusal:
                part = min(count, room)
                group.append((page, part))
                page, count, room = page + part, count - part, room - part
                if not room or len(group) == RUNS:
                    pages += self._store_group(group)
                    group, room = [], self._batch
                    pages += self._make_room()
        pages += self._store_group(group)
        self._finish_sent()
        if self._refusal:
            raise m.DMSError(self._refusal)
        return pages

    def _make_room(self) -> int:
        """Evict, if a fault waits for it: how many DIRTY pages the DMS got by that."""
        before = self._dirty
        if self._lspt.waiting_since:
            self._finish_sent()
            if not self._refusal:
                self._evict_until_low_threshold()
        return self._dirty - before

    def _store_group(self, runs: Sequence[Run]) -> int:
        held = self._lspt.hold_dirty(runs)
        self._send(held, self._keep)
        return sum(count for _, count, _ in held)

    def _keep(self, held: Sequence[HeldRun]) -> None:
        self._wake(self._lspt.stored([(page, count) for page, count, _ in held]))

    # ------------------------------------------------------------ which pages

    def _evict_until_low_threshold(self) -> bool:
        """Was it refused at its very end, before CLEAN pages alone were tried?"""
        self._rounds += 1
        if time.monotonic() >= self._again_at:
            self._refusal = ""
        if self._info:
            self._banner.info("\n-----------------START LPET-----------------\n")
            self._show_lspt()
        # Counted once: the pages that come from here on are not this run's business.
        resident = self._lspt.resident
        needed = resident - self._low
        seen = 0
        to_pass = resident  # so many, and every page has been passed
        if resident >= SMALL:
            to_pass = int(needed * min(max(2 * self._worth, LEAST_PASSED), MOST_PASSED))
        while needed > 0:
            most = self._batch if self._refusal else self._most
            candidates = self._lspt.next_candidates(most)
            if not candidates and not seen:
                time.sleep(PATIENCE)  # nothing can be done, and it would be woken again at once
            if not candidates or self._refusal and seen > resident:
                break  # the rest is COMING, being unmapped, sent, or refused
            chosen, hot, stay = self._choose(candidates, needed, to_pass)
            done = len(chosen) + len(hot) + len(stay)
            seen += done
            to_pass -= len(hot)
            needed -= len(chosen)
            self._tracker.mark(runs_of(sorted(hot)))
            self._marked += len(hot)
            runs = runs_of(sorted(chosen))
            for at in range(0, len(runs), RUNS):
                held = self._lspt.hold(runs[at : at + RUNS], only_clean=bool(self._refusal))
                self._send(held, self._drop)
            if self._refusal:  # since when, some could not be held
                not_held = [p for p in chosen if self._lspt.state[p] == DIRTY]
                needed += len(not_held)
                stay += not_held
            self._lspt.passed(candidates, done, hot + stay)
        refused_before = self._refusal
        self._finish_sent()
        if self._info:
            self._banner.info("\n-----------------FINISH LPET-----------------\n")
        return bool(self._refusal) and not refused_before

    def _choose(
        self, candidates: dict[int, bool], needed: int, to_pass: int
    ) -> tuple[list[int], list[int], list[int]]:
        """In order, until enough are chosen: those to evict, those to mark and pass, and those that
        have to stay, as the DMS refuses DIRTY ones.

        A page that was never marked is not idle. One that was, and was touched since, shows that
        marking was worth it.
        """
        marked = [page for page, was_marked in candidates.items() if was_marked]
        idle = self._tracker.idle(runs_of(sorted(marked)))
        if marked:
            touched = 1 - len(idle) / len(marked)
            self._worth += (touched - self._worth) * min(1.0, len(marked) / SMALL)
        chosen: list[int] = []
        hot: list[int] = []
        stay: list[int] = []
        for page in candidates:
            if len(chosen) == needed:
                break
            if self._refusal and self._lspt.state[page] == DIRTY:
                stay.append(page)
            elif page in idle or len(hot) >= to_pass:
                chosen.append(page)
            else:
                hot.append(page)
        return chosen, hot, stay

    def _show_lspt(self) -> None:
        with self._lspt.lock:
            pages = list(self._lspt.pages())
        if pages:
            self._log.info("start address: %#x", self._start + pages[0] * PAGE_SIZE)
        idle = self._tracker.idle(runs_of(sorted(pages)))
        rows = [
            (self._start + page * PAGE_SIZE, self._pagemap.pfns(page, 1)[0], page in idle)
            for page in pages
        ]
        self._banner.info(log.lspt_table(rows))

    # ------------------------------------------------------------ how they leave

    def _send(self, held: Sequence[HeldRun], acked: Callable[[Sequence[HeldRun]], None]) -> None:
        """Send these pages, at most a batch; what was sent before is then finished.

        So the DMS writes one batch while the next is being read. acked: what is to be done with
        these when the DMS has them; _drop, or _keep to let them stay.
        """
        if not held:
            return
        client = self._clients[0]
        self._ask(client, held, acked)
        before, self._sent = self._sent, (client, held, acked)
        self._clients.reverse()
        self._finish(before)

    def _ask(
        self, client: MpiClient, held: Sequence[HeldRun], acked: Callable[[Sequence[HeldRun]], None]
    ) -> None:
        content = len(held) * m.RUN.size  # where the bytes begin: behind the run table
        body = client.question.body
        at = content
        for index, (page, count, dirty) in enumerate(held):
            m.RUN.pack_into(body, index * m.RUN.size, page, count, dirty)
            if dirty:
                self._read_protected(page, count, body[at : at + count * PAGE_SIZE])
                at += count * PAGE_SIZE
            if self._info and acked == self._drop:
                for p in range(page, page + count):
                    self._log.info("evict page in address: %#x", self._start + p * PAGE_SIZE)
        client.ask_evict(len(held), at - content, stay=acked == self._keep)

    def _finish_sent(self) -> None:
        sent, self._sent = self._sent, None
        self._finish(sent)

    def _finish(self, sent: Any) -> None:
        """Wait until the DMS has written what was sent; or has refused it, which then stays."""
        if not sent:
            return
        client, held, acked = sent
        try:
            client.answer_evict()
        except m.DMSError as error:
            self._refused_for(str(error))
            self._take_back([run for run in held if run[2]])
            clean = [run for run in held if not run[2]]
            # A full disk refuses a message for its dirty pages: those that are clean can leave.
            if clean and len(clean) < len(held) and acked == self._drop:
                self._ask(client, clean, acked)
                self._finish((client, clean, acked))
            else:
                self._take_back(clean)
        else:
            acked(held)
            if any(dirty for _, _, dirty in held):
                self._backoff, self._refused_since = SHORTEST_REST, math.inf
                self._most = min(2 * self._most, self._batch)

    def _read_protected(self, page: int, count: int, into: memoryview) -> None:
        self._uffd.writeprotect_mapped(self._start + page * PAGE_SIZE, count * PAGE_SIZE, True)
        if os.preadv(self._memfd, [into], page * PAGE_SIZE) != count * PAGE_SIZE:
            raise OSError(errno.EIO, "preadv: short read of the memfd")

    def _take_back(self, held: Sequence[HeldRun]) -> None:
        self._refused += sum(count for _, count, _ in held)
        for page, count, dirty in held:
            if dirty:
                address = self._start + page * PAGE_SIZE
                self._uffd.writeprotect_mapped(address, count * PAGE_SIZE, False)
        self._wake(self._lspt.refused([(page, count) for page, count, _ in held]))

    def _drop(self, held: Sequence[HeldRun]) -> None:
        """Give the memory back."""
        runs: list[Run] = []
        for page, count, dirty in held:  # neighbours, one dirty and one not, are punched as one
            if dirty:
                self._dirty += count
            else:
                self._clean += count
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((page, count))
        for page, count in runs:
            punch_hole(self._memfd, page * PAGE_SIZE, count * PAGE_SIZE)
        self._wake(self._lspt.left(runs))

    def _wake(self, pages: Iterable[int]) -> None:
        for awaited in pages:
            self._uffd.wake(self._start + awaited * PAGE_SIZE, PAGE_SIZE)
