"""page_idle.py: pagemap and the idle bitmap, against files that stand for the kernel's."""

import os
import subprocess
from pathlib import Path
from struct import pack, unpack, unpack_from
from types import SimpleNamespace

import pytest

from edm import page_idle
from edm.page_idle import PRESENT, WRITTEN, BitmapTracker, Pagemap, choose_tracker
from edm.uffd_ctypes import PAGE_SIZE

START = 0x10000
THERE, MARK = 1 << 63, 1 << 57


@pytest.fixture
def make(tmp_path):
    """A Pagemap that reads these entries, of pages from START on."""
    opened = []

    def make(entries):
        file = tmp_path / f"pagemap{len(opened)}"
        file.write_bytes(bytes(8 * (START // PAGE_SIZE)) + pack(f"={len(entries)}Q", *entries))
        opened.append(os.open(file, os.O_RDONLY))
        return Pagemap(opened[-1], START)

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture
def pagemap(make):
    """Pages 0 to 9 of a space at START: page n has frame 100 + 7 * n, but 3 is not present."""
    entries = [THERE | 100 + 7 * n for n in range(10)]
    entries[3] = 100 + 7 * 3
    return make(entries)


@pytest.fixture
def bitmap(tmp_path, monkeypatch):
    file = tmp_path / "bitmap"
    file.write_bytes(bytes(8 * 64))
    real = os.pwrite

    def pwrite(fd, word, offset):  # as the kernel: a zero bit changes nothing
        (new,), (old,) = unpack("=Q", word), unpack("=Q", os.pread(fd, 8, offset))
        return real(fd, pack("=Q", old | new), offset)

    monkeypatch.setattr(page_idle.os, "pwrite", pwrite)
    monkeypatch.setattr(page_idle, "BITMAP", str(file))
    return file


def test_pagemap_tells_what_is_present_and_in_which_frame(pagemap):
    assert pagemap.find(2, b"\xff\xff\xff\0\xff", PRESENT) == b"\xff\0\xff\0\xff", (
        "of those asked for"
    )
    assert pagemap.pfns(2, 3) == [114, 0, 128]


def test_pagemap_of_a_process_that_has_ended_has_no_pages(tmp_path):
    with open(tmp_path / "ended", "wb+") as file:
        gone = Pagemap(file.fileno(), START)
        assert gone.find(0, b"\xff\xff", PRESENT) == b"\0\0" and gone.pfns(0, 2) == [0, 0]
        here = bytes((255, 255, 0, 0, 0, 255))
        assert gone.find(0, here, WRITTEN) == here, "so nothing is lost"
        assert gone.is_gone()


def test_pagemap_tells_whether_the_process_is_still_there(pagemap):
    assert not pagemap.is_gone()
    with open("/proc/self/pagemap", "rb", buffering=0) as own:
        assert not Pagemap(own.fileno(), START).is_gone()


def test_a_page_was_written_if_it_has_no_mark_whether_it_is_present_or_not(make):
    marks = [1, 1, 0, 0, 1, 0, 1, 1, 1, 0]
    for present in (THERE, 0):
        pagemap = make([MARK * mark | present | 7 for mark in marks])
        dirty = bytes(0 if mark else 255 for mark in marks)
        assert pagemap.find(0, b"\xff" * 10, WRITTEN) == dirty
        here = bytes((255, 255, 255, 0, 0, 255, 255, 0, 255))
        assert pagemap.find(1, here, WRITTEN) == bytes((0, 255, 255, 0, 0, 0, 0, 0, 255))


def test_no_other_bit_is_taken_for_a_mark(make):
    pagemap = make([~MARK & (1 << 64) - 1, MARK])
    assert pagemap.find(0, b"\xff\xff", WRITTEN) == b"\xff\0"


def bits(bitmap):
    words = unpack_from("=64Q", bitmap.read_bytes())
    return {64 * w + b for w in range(64) for b in range(64) if words[w] >> b & 1}


@pytest.fixture
def drained(monkeypatch):
    """How often the LRU batches were drained."""
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: calls.append(1))
    return calls


def test_the_bitmap_tracker_marks_the_frames_of_present_pages(pagemap, bitmap, drained):
    BitmapTracker(pagemap).mark_idle(0, b"\xff\xff\0\1\xff")
    assert bits(bitmap) == {100, 107, 128}
    BitmapTracker(pagemap).mark_idle(3, b"\xff")
    assert bits(bitmap) == {100, 107, 128}


def test_the_lru_batches_are_drained_before_pages_are_marked(pagemap, bitmap, drained, monkeypatch):
    real = os.pwrite

    def pwrite(fd, words, offset):  # as the kernel: frame 107 can't be marked yet
        hidden = 0 if drained or offset != 107 // 64 * 8 else 1 << 107 % 64
        return real(fd, pack("=Q", *(word & ~hidden for word in unpack("=Q", words))), offset)

    monkeypatch.setattr(page_idle.os, "pwrite", pwrite)
    BitmapTracker(pagemap).mark_idle(0, b"\xff\xff\xff")
    assert bits(bitmap) == {100, 107, 114} and drained == [1]
    BitmapTracker(pagemap).mark_idle(0, b"\0\1")
    assert drained == [1], "that takes long, also for no pages"


def test_a_page_is_idle_while_its_frames_bit_stands(pagemap, bitmap, drained):
    tracker = BitmapTracker(pagemap)
    tracker.mark_idle(0, b"\xff" * 10)
    assert tracker.used(0, b"\xff" * 10) == b"\0\0\0\xff" + bytes(6)
    words = list(unpack_from("=64Q", bitmap.read_bytes()))
    words[107 // 64] &= ~(1 << 107 % 64)  # the kernel saw page 1 touched
    bitmap.write_bytes(pack("=64Q", *words))
    assert tracker.used(0, b"\xff" * 5) == b"\0\xff\0\xff\0"
    assert tracker.used(0, b"\xff\0\xff\1") == b"\0\0\0\1", "of those that are asked about"


def test_a_forced_bitmap_that_is_not_there_is_an_error_that_names_the_remedy(monkeypatch):
    monkeypatch.setattr(page_idle, "BITMAP", "/nowhere/bitmap")
    with pytest.raises(ValueError, match="idle_tracker.*--idle-tracker unmap"):
        choose_tracker("bitmap")
    assert choose_tracker("auto") == choose_tracker("unmap") == "unmap"


def test_auto_takes_the_bitmap_where_it_can_be_used(monkeypatch):
    monkeypatch.setattr(page_idle, "bitmap_missing", lambda: "")
    assert choose_tracker("auto") == choose_tracker("bitmap") == "bitmap"
    assert choose_tracker("unmap") == "unmap"


@pytest.mark.parametrize("missing", ["", "no such file"])
@pytest.mark.parametrize("wanted", ["auto", "unmap"])
def test_a_kernel_that_makes_huge_pages_of_memory_files_is_refused_with_the_remedy(
    monkeypatch, wanted, missing
):
    """LPET writes pages back into the memfd whichever tracker it has: those that the store refuses. The remedy is
    for huge pages of each size."""
    monkeypatch.setattr(page_idle, "bitmap_missing", lambda: missing)
    monkeypatch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_blocks=page_idle.HUGE // 512))
    with pytest.raises(ValueError, match="can't be written back.*makes huge pages") as refused:
        choose_tracker(wanted)
    monkeypatch.undo()
    words, files = str(refused.value).split("tee ")
    assert words.endswith(": echo advise | ")
    command = ["bash", "-c", f"grep -l advise {files}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    there = [folder / "shmem_enabled", *folder.glob("hugepages-*/shmem_enabled")]
    assert sorted(found) == sorted(str(file) for file in there if file.exists())
