"""A kept disk under faults at any of its system calls, against a model of what it has promised.

It is a PageStore's, or several DMSs have a part of it each. Those are the real ones, and so is their client
(mpi_client.py); between them is a Wire, which delivers messages in any order and kills all at once.

A kept disk is written, freed and synced at random. Meanwhile the process is
killed at a system call, or the machine loses power, which leaves any of the sectors written since the
last fsync; system calls fail, with a part of their work done; and bits flip.
"""

import contextlib
import errno
import os
import random
from pathlib import Path
from struct import Struct
from types import SimpleNamespace

import pytest
from test_page_store import START, Kept, content, get, put, quick_path

from edm.dms import DMS
from edm.edm import Config
from edm.messages import MessageBuffer
from edm.mpi_client import MpiStore
from edm.page_store import CONTENT, EPOCH, FIRST, SECOND, TABLE
from edm.uffd_ctypes import PAGE_SIZE

__all__ = ["quick_path"]  # a fixture

PAGES, SECTOR = 12, 512
END = START + PAGES * PAGE_SIZE
CONFIG = Config(START, END, disk="of each path", keep=True)
STRIPE = 2
BLOCK_PAGES, BLOCK = 3, Struct("<IQ3s12s993x")  # so that there are some, each of two sectors
BLOCK_SIZE = 1024


class Killed(BaseException):
    """Where the process ended."""


class Wire:
    """The communicator of an instance whose DMSs are in this process. Where one of them is killed, the
    others have done what they were asked, or a part of that, or nothing."""

    def __init__(self, machine, dms):
        self.machine, self.dms = machine, dms
        self.asked, self.answers = [], {}

    def Isend(self, message, dms, tag):
        self.asked.append((dms, tag, bytes(message[0])))
        return SimpleNamespace(Test=lambda: True)

    def Irecv(self, message, dms, tag):
        def test():
            self.deliver()
            answer = self.answers.pop((dms, tag))
            message[0][: len(answer)] = answer
            return True

        return SimpleNamespace(Test=test)

    def deliver(self):
        dice, killed = self.machine.dice, None
        dice.shuffle(self.asked)
        while self.asked:
            dms, tag, question = self.asked.pop()
            try:
                answer = self.dms[dms]._handle(len(self.dms), memoryview(question), MessageBuffer())
                self.answers[dms, tag] = bytes(answer)
            except Killed as error:
                killed = error
            if killed and self.asked:
                self.asked = self.asked[dice.randrange(len(self.asked) + 1) :]
                if dice.random() < 0.5:
                    self.machine.fault, self.machine.countdown = killed, dice.randrange(9)
        if killed:
            raise killed


class Striped:
    """The kept disks of several DMSs: as Kept."""

    def __init__(self, path, count, machine):
        self.dms = []
        try:
            for rank in range(count):
                comm, own = SimpleNamespace(size=count + 1, rank=rank), f"{path}.dms{rank}"
                self.dms.append(DMS(comm, count, CONFIG.__replace__(disk=own)))
            offers = [dms.offers for dms in self.dms]
            for dms in machine.dice.sample(self.dms, count):
                dms.start(offers)
            self.store = MpiStore(Wire(machine, self.dms), count, CONFIG)
        except BaseException:
            self.close()
            raise
        self.free, self.sync = self.store.free, self.store.sync

    def read(self, page):
        kind, got = get(self.store, range(page, page + 1))
        return got if kind == CONTENT else None

    def dms_of(self, page):
        """The number of the page's DMS."""
        return page // STRIPE % len(self.dms)

    def close(self):
        for dms in self.dms:
            dms._stores[0].close()


class Machine:
    """The disk files, and what the model knows of them: each page's content, as a seed; None: never
    written. count: of DMSs; 0: there is none."""

    def __init__(self, path, dice, monkeypatch, count=0):
        self.path, self.dice, self.count = path, dice, count
        self.now, self.synced = [None] * PAGES, [None] * PAGES
        self.syncing = None  # what a sync that is under way will leave
        self.syncs = 0  # those that have returned, or were found to be complete
        self.dirty = {}  # pages that the disk has not taken yet
        self.flipped = set()  # pages of which a bit was flipped at some time: reading may fail
        self.fault, self.countdown = None, 0
        self.durable = {}  # of each file
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
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.durable[path] = Path(path).read_bytes()

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
        monkeypatch.setattr("edm.mpi_client.STRIPE", STRIPE)
        self.disk = self.opened()

    def opened(self):
        if self.count:
            return Striped(self.path, self.count, self)
        return Kept(self.path, START, END)

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
                with pytest.raises(OSError):  # for this page, or for the fault that is planned
                    self.disk.sync()
                return
        self.syncing = self.now.copy()
        try:
            self.disk.sync()
        except OSError:
            self.crash()  # for this job it is over: it may have succeeded, or not
        else:
            self.synced, self.syncing = self.syncing, None
            self.syncs += 1

    def flip(self):
        """A bit of a page's bytes, or of a block of the table."""
        page = self.dice.randrange(PAGES)
        store, of_store = self.disk.store, range(PAGES)
        if self.count:
            dms = self.disk.dms_of(page)
            store = self.disk.dms[dms]._stores[0]
            of_store = [other for other in of_store if self.disk.dms_of(other) == dms]
        if self.dice.random() < 0.7:
            block = page // BLOCK_PAGES
            at = store._block_place(self.dice.randrange(2), block) + self.dice.randrange(BLOCK_SIZE)
            self.flipped.update(other for other in of_store if other // BLOCK_PAGES == block)
        else:
            at = store._place(page, self.dice.choice((FIRST, SECOND)))
            at += self.dice.randrange(PAGE_SIZE)
            self.flipped.add(page)
        with open(f"/proc/self/fd/{store.fd}", "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes((byte ^ 1 << self.dice.randrange(8),)))

    def lose_power(self):
        for path in self.path.parent.glob(f"{self.path.name}*"):
            file, durable = bytearray(path.read_bytes()), self.durable.get(str(path), b"")
            for at in range(0, len(file), SECTOR):
                sector = slice(at, at + SECTOR)
                if file[sector] != durable[sector] and self.dice.random() < 0.5:
                    file[sector] = durable[sector]
            path.write_bytes(file)

    def end(self):
        """The processes end: the kernel closes what they had open, also where one was killed midway."""
        self.disk.close()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the one of the listing
                what = os.readlink(f"/proc/self/fd/{fd}")
                if what.startswith(str(self.path)) or "pidfd" in what:  # the client's
                    os.close(int(fd))

    def crash(self, power=False):
        """And resume: all pages are as at the last sync, or at the one that was under way."""
        self.fault = None
        self.end()
        while True:
            if power:
                self.lose_power()
            if self.count and self.dice.random() < 0.3:  # and once more, while it starts
                self.fault, self.countdown = Killed(), self.dice.randrange(4 * self.count)
            try:
                self.disk = self.opened()
                break
            except Killed:
                self.close_files()  # of a store that was not made
        self.fault = None
        found = self.read()
        # A page that can't be read agrees with both states, but may be readable again: a flip was not durable.
        stores = [dms._stores[0] for dms in self.disk.dms] if self.count else [self.disk.store]
        (epoch,) = {store._words[EPOCH] for store in stores}
        state = {self.syncs: self.synced, self.syncs + 1: self.syncing}[epoch]
        assert state and self.agrees(found, state), (found, epoch, self.synced, self.syncing)
        self.now, self.synced, self.syncing, self.syncs = state.copy(), state, None, epoch
        self.dirty.clear()

    def close_files(self):
        """As the kernel does at a process's end."""
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                what = os.readlink(f"/proc/self/fd/{fd}")
                if what.startswith(str(self.path)) or "pidfd" in what:  # the client's
                    os.close(int(fd))

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


@pytest.mark.parametrize("count", range(4), ids=["no DMS", "one", "two", "three"])
@pytest.mark.parametrize("flips", [False, True], ids=["", "flips"])
@pytest.mark.parametrize("power", [False, True], ids=["", "power"])
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_whatever_fails_and_whenever_it_ends_the_disk_keeps_its_promise(
    quick_path, monkeypatch, request, faults, power, flips, count
):
    seeds = 2 if count else 6
    for seed in range(300 if request.config.getoption("--long") else seeds):
        dice = random.Random(seed)
        with monkeypatch.context() as patched:
            machine = Machine(Path(f"{quick_path}-{seed}-"), dice, patched, count)
            actions = [machine.write] * 6 + [machine.free] * 2 + [machine.sync] * 3

            def crash(machine=machine, dice=dice):
                """All are killed; with `power`, the machine mostly loses it at once, or else later."""
                machine.crash(power and dice.random() < 0.8)

            actions.append(crash)
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
                    crash()
                machine.check()
            machine.end()


def test_a_table_that_one_disk_can_not_write_now_keeps_none_from_being_synced_later(
    quick_path, monkeypatch
):
    machine = Machine(quick_path, random.Random(1), monkeypatch, 3)
    store = machine.disk.store
    full, pwrite = machine.disk.dms[1]._stores[0], os.pwrite

    def refused(fd, data, at):
        if fd == full.fd and TABLE <= at < full._data:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, at)

    for seeds in (range(PAGES), range(100, 100 + PAGES)):
        put(store, 0, PAGES, (0, b"".join(map(content, seeds))))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", refused)
            with pytest.raises(OSError, match="No space left"):
                store.sync()
        put(store, 0, 1, (0, content(77)))
        store.sync()
        machine.end()
        machine.disk = machine.opened()
        store = machine.disk.store
        full = machine.disk.dms[1]._stores[0]
        assert machine.read() == [content(seed) for seed in (77, *seeds[1:])]
    machine.end()


@pytest.mark.parametrize("power", [False, True], ids=["", "power"])
@pytest.mark.parametrize("count", [1, 2, 3], ids=["one", "two", "three"])
def test_killed_at_each_call_of_a_sync_all_disks_go_back_to_the_same_one(
    quick_path, monkeypatch, request, count, power
):
    seeds = 30 if request.config.getoption("--long") else 3
    for number in range(1000):  # of the call
        survived = 0
        for seed in range(seeds):  # what the others have done meanwhile differs
            with monkeypatch.context() as patched:
                dice, path = random.Random(seed), Path(f"{quick_path}-{number}-{seed}-")
                machine = Machine(path, dice, patched, count)
                for _ in range(dice.randint(0, 3)):
                    machine.write()
                    machine.sync()
                for _ in range(3):
                    machine.write()
                machine.free()
                machine.fault, machine.countdown = Killed(), number
                try:
                    machine.sync()
                    survived += 1
                except Killed:
                    pass
                machine.crash(power)
                for _ in range(2):  # it goes on from there
                    machine.write()
                    machine.sync()
                    machine.crash(power)
                machine.end()
        if survived == seeds:
            break
    assert 3 * count <= number < 1000
