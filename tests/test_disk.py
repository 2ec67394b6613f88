"""dms.Disk: what the disk file promises, alone and after a crash."""

import errno
import os
import random

import pytest

from edm.dms import CRC, HEADER, HEADER_COPY, PAIR, SPT, TABLE, Disk
from edm.messages import DISK
from edm.uffd_ctypes import PAGE_SIZE

PAGES = 300
START = 0x1B58000
END = START + PAGES * PAGE_SIZE


def content(seed, pages=1):
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


class Kept:
    """A kept disk with the SPT that goes with it, opened as the DMS does."""

    def __init__(self, path, start=START, end=END):
        self.range = start, end
        self.disk = Disk(str(path), start, end, keep=True)
        self.spt = SPT((end - start) // PAGE_SIZE, 0)
        for page, states in self.disk.restore():
            self.spt.load(page, states)

    def write(self, page, *seeds):
        for pages, byte in self.disk.write(page, memoryview(b"".join(map(content, seeds)))):
            self.spt.set(pages, byte)

    def free(self, page, count):
        self.disk.free(page, count)
        self.spt.set(range(page, page + count), 0)

    def read(self, page):
        """The page's bytes, or None if it was never written."""
        byte = self.spt.read(page, 1)[0]
        if not byte & DISK:
            return None
        into = bytearray(PAGE_SIZE)
        assert self.disk.read(range(page, page + 1), byte, memoryview(into)) == 1
        return bytes(into)

    def all(self):
        return [self.read(page) for page in range(PAGES)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk"


def crash_and_resume(kept):
    """As after kill -9: the file is all that is left. A copy of it, as the lock is still held."""
    path = f"/proc/self/fd/{kept.disk._fd}"
    copy = os.path.realpath(path) + ".crashed"
    with open(path, "rb") as file, open(copy, "wb") as to:
        to.write(file.read())
    return Kept(copy, *kept.range)


def failing(number):
    """A function that raises the OSError of this number, whatever it is called with."""

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    return fail


def read_after_a_crash(kept, page):
    resumed = crash_and_resume(kept)
    try:
        return resumed.read(page)
    finally:
        resumed.disk.close()


# ---------------------------------------------------------------- one job


def test_a_disk_without_a_path_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    disk = Disk(None, START, END, keep=False)
    disk.write(9, memoryview(content(1)))
    back = bytearray(PAGE_SIZE)
    assert disk.read(range(9, 10), DISK, memoryview(back)) == 1
    assert back == content(1)
    assert list(tmp_path.iterdir()) == []
    disk.close()


@pytest.mark.parametrize("keep", [False, True])
def test_the_disk_file_is_for_its_owner_only(path, keep):
    path.touch(0o666)
    Disk(str(path), START, END, keep).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_freed_pages_give_their_blocks_back(path):
    kept = Kept(path)
    kept.write(0, *range(200))
    kept.disk.sync()
    full = path.stat().st_blocks
    kept.free(0, 190)
    kept.disk.sync()
    assert path.stat().st_blocks < full / 5
    assert kept.all()[190:200] == [content(seed) for seed in range(190, 200)]
    scratch = Disk(None, START, END, keep=False)
    scratch.write(0, memoryview(content(1, 200)))
    full = os.fstat(scratch._fd).st_blocks
    scratch.free(0, 190)
    assert os.fstat(scratch._fd).st_blocks < full / 5


# ---------------------------------------------------------------- the next job


def test_what_was_synced_is_there_when_the_disk_is_opened_again(path):
    kept = Kept(path)
    kept.write(5, 1, 2, 3)
    kept.write(6, 4)
    kept.free(7, 1)
    kept.disk.sync()
    before = kept.all()
    assert before[5:8] == [content(1), content(4), None]
    kept.disk.close()
    assert Kept(path).all() == before


def test_a_crash_goes_back_to_the_last_sync_whatever_was_written_since(path):
    kept = Kept(path)
    kept.write(0, *range(20))
    kept.free(3, 2)
    kept.disk.sync()
    before = kept.all()
    kept.write(0, 100, 101, 102, 103)
    kept.write(1, 110)  # a second time since the sync
    kept.free(8, 4)
    kept.write(9, 120)
    kept.write(40, 130)
    again = crash_and_resume(kept)
    assert again.all() == before
    # And what the crashed job had begun does not come to life with the next sync.
    again.write(50, 140)
    again.disk.sync()
    before[50] = content(140)
    assert again.all() == before
    again.disk.close()


def test_a_crash_before_any_sync_leaves_an_empty_disk(path):
    kept = Kept(path)
    kept.write(0, 1, 2)
    assert crash_and_resume(kept).all() == [None] * PAGES


def test_any_sequence_of_writes_frees_syncs_and_crashes_gives_what_the_last_sync_had(tmp_path):
    for seed in range(30):
        dice, kept = random.Random(seed), Kept(tmp_path / f"disk{seed}")
        now, synced = [None] * PAGES, [None] * PAGES
        for _ in range(60):
            page, count = dice.randrange(40), dice.randint(1, 10)
            action = dice.choice(["write", "write", "write", "free", "sync", "crash"])
            if action == "write":
                seeds = [dice.random() for _ in range(count)]
                kept.write(page, *seeds)
                now[page : page + count] = map(content, seeds)
            elif action == "free":
                kept.free(page, count)
                now[page : page + count] = [None] * count
            elif action == "sync":
                kept.disk.sync()
                synced = now.copy()
            else:
                crashed = kept
                kept, now = crash_and_resume(kept), synced.copy()
                crashed.disk.close()
            assert kept.all() == now
        kept.disk.close()


def test_whatever_bit_of_a_header_is_flipped_the_other_copy_is_taken_and_nothing_is_lost(
    path, caplog
):
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
    for seed in range(3):
        kept.write(0, seed)
        kept.disk.sync()
    kept.disk.close()
    whole = path.read_bytes()
    length = HEADER.size + CRC.size
    for copy in (0, HEADER_COPY):
        for bit in range(8 * length):
            flipped = bytearray(whole)
            flipped[copy + bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            caplog.clear()
            again = Kept(path, START, START + 8 * PAGE_SIZE)
            assert again.read(0) == content(2)
            assert "one of the two copies of its header is damaged" in caplog.text
            again.disk.close()


def test_a_header_that_was_torn_by_a_crash_in_the_sync_leaves_the_other_copy(path, monkeypatch):
    kept = Kept(path)
    kept.write(0, 1)
    kept.disk.sync()
    kept.write(0, 2)
    real = os.pwrite
    written = []

    def torn(fd, content, at):
        if at < TABLE:
            written.append(at)
            real(fd, content[:20], at)
            raise KeyboardInterrupt
        return real(fd, content, at)

    with monkeypatch.context() as crash:
        crash.setattr(os, "pwrite", torn)
        with pytest.raises(KeyboardInterrupt):
            kept.disk.sync()
    assert written and crash_and_resume(kept).read(0) == content(1)


def test_a_failed_sync_is_never_followed_by_one_that_succeeds(path, monkeypatch):
    kept = Kept(path)
    kept.write(0, 1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            kept.disk.sync()
    with pytest.raises(OSError, match="Input/output"):
        kept.disk.sync()


@pytest.mark.parametrize("fails", ["the first fsync", "the header", "the second fsync"])
def test_after_a_sync_that_failed_nothing_is_written_over_what_was_there(path, monkeypatch, fails):
    kept = Kept(path)
    kept.write(0, 1)
    kept.disk.sync()
    kept.write(0, 2)
    real, syncs = os.fsync, []

    def fsync(fd):
        syncs.append(fd)
        if fails == ("the first fsync", "the second fsync")[len(syncs) - 1]:
            raise OSError(5, "Input/output error")
        real(fd)

    def write_header(self, *where):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        if fails == "the header":
            broken.setattr(Disk, "_write_header", write_header)
        with pytest.raises(OSError, match="Input/output|No space"):
            kept.disk.sync()
    for page in (0, 1):
        with pytest.raises(OSError, match="Input/output|No space"):
            kept.write(page, 3)
    with pytest.raises(OSError, match="Input/output|No space"):
        kept.free(0, 1)
    kept.disk.close()
    assert Kept(path).read(0) == content(2 if fails == "the second fsync" else 1)


def test_a_page_that_was_torn_keeps_a_sync_from_returning_until_it_is_whole(path, monkeypatch):
    kept = Kept(path)
    kept.write(5, 1, 2)
    with monkeypatch.context() as broken:

        def half(fd, content, at):
            if at >= kept.disk._data and len(content) < PAGE_SIZE:
                raise OSError(5, "Input/output error")
            return real(fd, content[: len(content) // 2], at)

        real = os.pwrite
        broken.setattr(os, "pwrite", half)
        with pytest.raises(OSError, match="Input/output"):
            kept.write(5, 3)
    with pytest.raises(OSError, match="1 pages could not be written"):
        kept.disk.sync()
    kept.write(5, 4)
    kept.disk.sync()
    assert crash_and_resume(kept).all()[5:7] == [content(4), content(2)]


def test_a_page_that_was_torn_and_then_freed_keeps_no_sync_from_returning(path, monkeypatch):
    for keep in (False, True):
        disk = Disk(str(path), START, END, keep)
        with monkeypatch.context() as full, pytest.raises(OSError, match="Input/output"):
            full.setattr(os, "pwrite", failing(errno.EIO))
            disk.write(3, memoryview(content(1)))
        with pytest.raises(OSError, match="could not be written"):
            disk.sync()
        disk.free(3, 1)
        disk.sync()
        disk.close()
        path.unlink()


def test_pages_that_could_not_be_freed_wholly_are_not_freed_by_a_sync(path, monkeypatch):
    kept = Kept(path)
    kept.write(3, 1)
    kept.disk.sync()
    with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output"):
        broken.setattr(os, "pwrite", failing(errno.EIO))
        kept.disk.free(3, 1)
    with pytest.raises(OSError, match="could not be written"):
        kept.disk.sync()
    assert read_after_a_crash(kept, 3) == content(1)
    kept.free(3, 1)
    kept.disk.sync()
    assert read_after_a_crash(kept, 3) is None


def test_that_no_hole_can_be_punched_is_no_error_once_the_entries_say_it(path, monkeypatch):
    kept = Kept(path)
    kept.write(3, 1, 2)
    kept.disk.sync()
    monkeypatch.setattr("edm.dms.punch_hole", failing(errno.EIO))
    kept.free(3, 1)
    kept.disk.sync()
    assert kept.all() == crash_and_resume(kept).all() == [*[None] * 4, content(2), *[None] * 295]


def test_what_a_resumed_job_goes_on_from_is_durable_before_anything_is_written(path, monkeypatch):
    made(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:HEADER_COPY] + bytes(50) + whole[HEADER_COPY + 50 :])
    calls = []
    real_fsync, real_pwrite = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(
        os, "pwrite", lambda fd, what, at: (calls.append(at), real_pwrite(fd, what, at))[1]
    )
    for _ in range(2):
        Kept(path).disk.close()
        assert calls == [0, "fsync", HEADER_COPY]  # and never again: both say the same now


def test_a_page_that_the_file_system_can_not_read_is_told_and_its_neighbours_are_read(
    path, monkeypatch
):
    disk = Disk(str(path), START, END, keep=False)
    disk.write(0, memoryview(content(1, 4)))
    real = os.preadv

    def preadv(fd, into, at):
        bad = disk._data + 2 * PAGE_SIZE
        if at <= bad < at + sum(map(len, into)):
            raise OSError(5, "Input/output error")
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", preadv)
    into = memoryview(bytearray(4 * PAGE_SIZE))
    assert disk.read(range(4), DISK, into) == 1 and into[:PAGE_SIZE] == content(1, 4)[:PAGE_SIZE]
    assert disk.read(range(3, 4), DISK, into[:PAGE_SIZE]) == 1
    with pytest.raises(OSError, match="Input/output"):
        disk.read(range(2, 3), DISK, into[:PAGE_SIZE])
    with pytest.raises(OSError, match="Input/output"):
        disk.read(range(2, 4), DISK, into[: 2 * PAGE_SIZE])


def test_a_kept_disk_gives_blocks_that_no_sync_needs_back_at_once_and_remembers_little(path):
    kept = Kept(path)
    kept.write(0, *range(100))
    kept.disk.sync()
    synced = kept.all()
    blocks = path.stat().st_blocks
    for _ in range(50):
        kept.write(100, *range(100))
        kept.write(0, *range(200, 210))
        kept.free(100, 100)
        kept.free(0, 10)
        kept.free(0, 300)
    assert path.stat().st_blocks < blocks + 40
    assert len(kept.disk._freed) < 10
    assert crash_and_resume(kept).all() == synced


HISTORIES = {  # of a page: how often it was written and synced, and what came since
    "never written": (0, "sync"),
    "written once": (1, "sync"),
    "written twice": (2, "sync"),
    "written since": (2, "write"),
    "freed": (1, "free, sync"),
    "freed since": (2, "free"),
    "freed, and written since": (1, "free, sync, write"),
}


@pytest.mark.parametrize(("times", "since"), HISTORIES.values(), ids=HISTORIES.keys())
def test_whatever_bit_of_a_pages_table_entries_is_flipped_no_other_bytes_are_read(
    path, times, since
):
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
    kept.write(4, 1)
    kept.write(6, 3)
    for seed in range(times):
        kept.write(5, seed)
        kept.disk.sync()
    for action in since.split(", "):
        if action == "write":
            kept.write(5, 30)
        elif action == "free":
            kept.free(5, 1)
        else:
            kept.disk.sync()
    at = TABLE + 5 * PAIR
    pair = os.pread(kept.disk._fd, PAIR, at)
    for bit in range(8 * PAIR):
        flipped = bytearray(pair)
        flipped[bit // 8] ^= 1 << bit % 8
        os.pwrite(kept.disk._fd, flipped, at)
        resumed = crash_and_resume(kept)
        with pytest.raises(OSError, match="its entry in the disk's table is damaged"):
            resumed.read(5)
        assert (resumed.read(4), resumed.read(6)) == (content(1), content(3))
        resumed.disk.close()


@pytest.mark.parametrize("then", ["write", "free"])
def test_a_page_whose_table_entry_is_damaged_is_whole_again_when_it_is_written_or_freed(path, then):
    kept = Kept(path)
    for seed in (1, 2):
        kept.write(5, seed, seed + 10)
        kept.disk.sync()
    os.pwrite(kept.disk._fd, b"damage", TABLE + 5 * PAIR + 2)
    with pytest.raises(OSError, match="damaged"):
        kept.read(5)
    kept.disk.close()
    kept = Kept(path)
    if then == "write":
        kept.write(5, 3)
    else:
        kept.free(5, 1)
    with pytest.raises(OSError, match="damaged"):  # a crash goes back to it, not to what was before
        read_after_a_crash(kept, 5)
    kept.disk.sync()
    expected = content(3) if then == "write" else None
    assert kept.read(5) == read_after_a_crash(kept, 5) == expected
    assert read_after_a_crash(kept, 6) == content(12)
    if then == "free":
        kept.write(5, 4)
        kept.disk.sync()
        assert read_after_a_crash(kept, 5) == content(4)


def test_what_was_freed_leaves_nothing_in_the_table_even_if_the_job_is_killed_in_the_sync(
    path, monkeypatch
):
    kept = Kept(path)
    kept.write(0, *range(100))
    kept.disk.sync()
    kept.free(0, 100)

    class Killed(Exception):
        pass

    def punch_hole(*where):
        raise Killed

    with monkeypatch.context() as killing:
        killing.setattr("edm.dms.punch_hole", punch_hole)
        with pytest.raises(Killed):
            kept.disk.sync()
    resumed = crash_and_resume(kept)
    assert resumed.all() == [None] * PAGES
    assert os.pread(resumed.disk._fd, 100 * PAIR, TABLE) == bytes(100 * PAIR)


def test_on_a_full_file_system_what_no_sync_needs_makes_room_for_what_is_new(small_file_system):
    pages = 2000
    kept = Kept(small_file_system / "disk", START, START + pages * PAGE_SIZE)
    for round_ in (0, 1000):  # so that half of the blocks are of versions before the last
        for page in range(0, 400, 100):
            kept.write(page, *range(round_ + page, round_ + page + 100))
        kept.disk.sync()
    for page in range(500, 800, 100):
        kept.write(page, *range(page, page + 100))
    kept.write(0, *range(2000, 2050))
    assert [kept.read(page) for page in range(400)] == [
        content(2000 + page if page < 50 else 1000 + page) for page in range(400)
    ]
    assert [kept.read(page) for page in range(500, 800)] == [content(p) for p in range(500, 800)]
    with pytest.raises(OSError, match="No space left"):
        for page in range(800, 2000, 100):
            kept.write(page, *range(page, page + 100))
    page -= 100
    assert kept.read(page) == content(page)  # the last one that fitted
    with pytest.raises(OSError, match="could not be written"):
        kept.disk.sync()
    kept.disk.close()
    resumed = Kept(small_file_system / "disk", START, START + pages * PAGE_SIZE)
    assert [resumed.read(page) for page in range(400)] == [content(1000 + p) for p in range(400)]
    assert {resumed.read(page) for page in range(400, 2000)} == {None}
    resumed.disk.close()


def test_a_batch_that_did_not_fit_leaves_its_room_to_a_smaller_one(small_file_system):
    for keep in (False, True):
        disk = Disk(str(small_file_system / "disk"), START, START + 3000 * PAGE_SIZE, keep)
        with pytest.raises(OSError, match="No space left"):
            disk.write(0, memoryview(content(1, 2000)))
        disk.write(2000, memoryview(content(2, 900)))
        disk.close()
        (small_file_system / "disk").unlink()


def test_a_new_disk_has_room_for_both_of_its_headers(path):
    Kept(path).disk.close()
    whole = path.read_bytes()
    assert whole[:8] == whole[HEADER_COPY:][:8] == b"EDM disk"


def test_a_file_system_that_punches_no_holes_does_not_keep_pages_from_being_freed(
    path, monkeypatch
):
    def punch_hole(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, "fallocate: Operation not supported")

    monkeypatch.setattr("edm.dms.punch_hole", punch_hole)
    disk = Disk(str(path), START, END, keep=False)
    disk.write(0, memoryview(content(1)))
    disk.free(0, 1)
    disk.write(0, memoryview(content(2)))
    into = memoryview(bytearray(PAGE_SIZE))
    assert disk.read(range(1), DISK, into) == 1 and into == content(2)


# ---------------------------------------------------------------- what is refused


def made(path):
    kept = Kept(path)
    kept.write(0, 1)
    kept.disk.sync()
    kept.disk.close()


def refused(path, match, start=START, end=END, keep=True):
    """Refused with these words, and left as it is."""
    before = path.read_bytes(), path.stat().st_mode
    with pytest.raises(ValueError, match=match):
        Disk(str(path), start, end, keep)
    assert (path.read_bytes(), path.stat().st_mode) == before


def test_a_disk_in_use_is_refused(path):
    for keep in (True, False):
        disk = Disk(str(path), START, END, keep)
        disk.write(0, memoryview(content(1)))
        for other in (True, False):
            refused(path, "disk: .* in use by another job", keep=other)
        disk.close()
        path.unlink()


def test_a_file_that_is_no_disk_is_refused_and_left_as_it_is(path):
    for text in (b"x", b"my thesis\n" * 30000):
        for keep in (True, False):
            path.write_bytes(text)
            refused(path, "disk: .* is not an EDM disk", keep=keep)


def test_another_geometry_is_refused(path):
    made(path)
    for start, end in ((START, END + PAGE_SIZE), (START + PAGE_SIZE, END)):
        refused(path, "geometry.*start_addr 0x1b58000", start, end)


def test_another_version_of_the_format_is_refused(path, monkeypatch):
    monkeypatch.setattr("edm.dms.FORMAT", 99)
    made(path)
    monkeypatch.undo()
    refused(path, "version 99")


def test_a_damaged_header_is_told(path):
    made(path)
    with path.open("r+b") as file:
        for at in (0, HEADER_COPY):
            file.seek(at + 30)
            file.write(b"damage")
    refused(path, "damaged")


def test_a_header_that_is_older_than_the_pages_is_told_and_nothing_is_changed(path):
    kept = Kept(path)
    kept.write(0, 1)
    kept.disk.sync()
    before = path.read_bytes()
    kept.write(0, 2)
    kept.disk.sync()
    kept.write(0, 3)
    kept.disk.close()
    now = path.read_bytes()
    path.write_bytes(before[:TABLE] + now[TABLE:])
    refused(path, "damaged: its header is older than its pages")


def test_a_kept_disk_that_was_cut_short_is_told(path):
    made(path)
    os.truncate(path, path.stat().st_size - PAGE_SIZE)
    refused(path, "damaged: it has .* bytes, and should have")


@pytest.mark.parametrize("headers", [0, 1])
def test_a_kept_disk_whose_making_was_interrupted_is_a_new_one(path, caplog, headers):
    if headers:
        Kept(path).disk.close()
        with path.open("r+b") as file:
            file.seek(HEADER_COPY)
            file.write(bytes(HEADER.size + CRC.size))
    else:
        path.touch()
        os.truncate(path, 1 << 20)
    assert Kept(path).all() == [None] * PAGES
    assert not caplog.text


def test_a_kept_disk_is_not_overwritten_by_a_job_that_does_not_keep_it(path):
    made(path)
    refused(path, "kept disk of an earlier job; --keep goes on", keep=False)
    assert Kept(path).read(0) == content(1)


def test_a_disk_that_was_not_kept_is_refused_for_keeping_and_else_begins_anew(path):
    disk = Disk(str(path), START, END, keep=False)
    disk.write(0, memoryview(content(1)))
    disk.close()
    refused(path, "not kept")
    disk = Disk(str(path), START, END, keep=False)
    assert os.pread(disk._fd, PAIR, TABLE) == bytes(PAIR)
    disk.close()
