"""A kept PageStore under faults at any of its system calls, against a model of what it has promised.

A kept disk is written, freed and synced at random. Meanwhile the process is
killed at a system call, or the machine loses power, which leaves any of the sectors written since the
last fsync; system calls fail, with a part of their work done; and bits flip.
"""

import errno
import os
import random
from pathlib import Path
from struct import Struct

import pytest
from test_page_store import START, Kept, content, put, quick_path

from edm.page_store import FIRST, SECOND
from edm.uffd_ctypes import PAGE_SIZE

__all__ = ["quick_path"]  # a fixture

PAGES, SECTOR = 12, 512
BLOCK_PAGES, BLOCK = 3, Struct("<IQ3s12s993x")  # so that there are some, each of two sectors
BLOCK_SIZE = 1024


class Killed(BaseException):
    """Where the process ended."""


class Machine:
    """The disk file, and what the model knows of it: each page's content, as a seed; None: never
    written."""

    def __init__(self, path, dice, monkeypatch):
        self.path, self.dice = path, dice
        self.now, self.synced = [None] * PAGES, [None] * PAGES
        self.syncing = None  # what a sync that is under way will leave
        self.dirty = {}  # pages that the disk has not taken yet
        self.flipped = set()  # pages of which a bit was flipped at some time: reading may fail
        self.fault, self.countdown = None, 0
        self.durable = b""
        real_pwrite, real_fallocate = os.pwrite, os.posix_fallocate

        def pwrite(fd, data, at):
            error = self.happens()
            if not error:
                return real_pwrite(fd, data, at)
            part = len(data) * dice.randrange(4) // 4 // 32 * 32
            done = real_pwrite(fd, data[:part], at) if part else 0
            if done and dice.random() < 0.5:
                return done  # a short write, and no error yet
            raise error

        def fsync(fd):
            if error := self.happens():
                raise error
            self.durable = path.read_bytes()

        def posix_fallocate(fd, at, length):
            if error := self.happens():
                raise error
            real_fallocate(fd, at, length)

        def punch_hole(fd, at, length):
            if error := self.happens():
                raise error
            real_pwrite(fd, bytes(length), at)

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
        monkeypatch.setattr("edm.page_store.punch_hole", punch_hole)
        monkeypatch.setattr("edm.page_store.BLOCK_PAGES", BLOCK_PAGES)
        monkeypatch.setattr("edm.page_store.BLOCK", BLOCK)
        monkeypatch.setattr("edm.page_store.BLOCK_SIZE", BLOCK_SIZE)
        self.disk = Kept(path, START, START + PAGES * PAGE_SIZE)

    def happens(self):
        """The fault that was planned, if its time has come."""
        self.countdown -= 1
        if self.fault is None or self.countdown >= 0:
            return None
        fault = self.fault
        if isinstance(fault, Killed) or self.dice.random() < 0.5:
            self.fault = None
        return fault

    def send(self, page, seeds):
        """As an eviction or a store."""
        at = self.dice.randint(0, len(seeds))
        runs = [(page, seeds[:at]), (page + at, seeds[at:])]
        dirty = [(first, b"".join(map(content, of_it))) for first, of_it in runs if of_it]
        try:
            put(self.disk.store, page, len(seeds), *dirty)
        except OSError:
            return False
        for at in range(page, page + len(seeds)):
            self.dirty.pop(at, None)
        return True

    def write(self):
        page = self.dice.randrange(PAGES)
        seeds = [self.dice.randrange(1 << 30) for _ in range(self.dice.randint(1, PAGES - page))]
        self.now[page : page + len(seeds)] = seeds
        self.dirty.update(enumerate(seeds, page))
        self.send(page, seeds)

    def free(self):
        page = self.dice.randrange(PAGES)
        count = self.dice.randint(1, PAGES - page)
        self.disk.free(page, count)
        self.now[page : page + count] = [None] * count
        for at in range(page, page + count):
            self.dirty.pop(at, None)

    def sync(self):
        for page, seed in list(self.dirty.items()):
            if not self.send(page, [seed]):
                with pytest.raises(OSError, match="could not be written"):
                    self.disk.sync()
                return
        self.syncing = self.now.copy()
        try:
            self.disk.sync()
        except OSError:
            self.crash()  # for this job it is over: it may have succeeded, or not
        else:
            self.synced, self.syncing = self.syncing, None

    def flip(self):
        """A bit of a page's bytes, or of a block of the table."""
        page, store = self.dice.randrange(PAGES), self.disk.store
        if self.dice.random() < 0.7:
            block = page // BLOCK_PAGES
            at = store._block_place(self.dice.randrange(2), block) + self.dice.randrange(BLOCK_SIZE)
            self.flipped.update(range(block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES))
        else:
            at = store._place(page, self.dice.choice((FIRST, SECOND)))
            at += self.dice.randrange(PAGE_SIZE)
            self.flipped.add(page)
        with self.path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes((byte ^ 1 << self.dice.randrange(8),)))

    def lose_power(self):
        file = bytearray(self.path.read_bytes())
        for at in range(0, len(file), SECTOR):
            sector = slice(at, at + SECTOR)
            if file[sector] != self.durable[sector] and self.dice.random() < 0.5:
                file[sector] = self.durable[sector]
        self.path.write_bytes(file)

    def crash(self, power=False):
        """And resume: all pages are as at the last sync, or at the one that was under way."""
        self.fault = None
        self.disk.close()
        if power:
            self.lose_power()
        self.disk = Kept(self.path, START, START + PAGES * PAGE_SIZE)
        found = self.read()
        left = [
            state for state in (self.synced, self.syncing) if state and self.agrees(found, state)
        ]
        assert left, (found, self.synced, self.syncing)
        self.now, self.synced, self.syncing = left[-1].copy(), left[-1], None
        self.dirty.clear()

    def read(self):
        """The content of each page; "unreadable" where that is told."""
        found = []
        for page in range(PAGES):
            try:
                found.append(self.disk.read(page))
            except OSError:
                found.append("unreadable")
        return found

    def agrees(self, found, state):
        return all(
            got == (None if seed is None else content(seed))
            or (got == "unreadable" and page in self.flipped)
            for page, (got, seed) in enumerate(zip(found, state, strict=True))
        )

    def check(self):
        found = self.read()
        for page in self.dirty:
            found[page] = content(self.now[page])  # the instance has it
        assert self.agrees(found, self.now), (found, self.now)


FAULTS = {
    "none": [],
    "kills": [Killed],
    "errors": [errno.ENOSPC, errno.EIO, errno.EDQUOT],
    "kills and errors": [Killed, Killed, errno.ENOSPC, errno.EIO],
}


@pytest.mark.parametrize("flips", [False, True], ids=["", "flips"])
@pytest.mark.parametrize("power", [False, True], ids=["", "power"])
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_whatever_fails_and_whenever_it_ends_the_disk_keeps_its_promise(
    quick_path, monkeypatch, request, faults, power, flips
):
    for seed in range(300 if request.config.getoption("--long") else 6):
        dice = random.Random(seed)
        with monkeypatch.context() as patched:
            machine = Machine(Path(f"{quick_path}{seed}"), dice, patched)
            actions = [machine.write] * 6 + [machine.free] * 2 + [machine.sync] * 3
            actions += [lambda crash=machine.crash: crash(power)]
            if flips:
                actions.append(machine.flip)
            for _ in range(60):
                if faults and dice.random() < 0.2:
                    fault = dice.choice(faults)
                    machine.fault = (
                        Killed() if fault is Killed else OSError(fault, os.strerror(fault))
                    )
                    machine.countdown = dice.randrange(12)
                try:
                    dice.choice(actions)()
                except Killed:
                    machine.crash(power)
                machine.check()
            machine.disk.close()
