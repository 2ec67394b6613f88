"""page_idle.py: pagemap and the idle bitmap, against files that stand for the kernel's."""

import os
from struct import pack, unpack_from

import pytest

from edm import page_idle
from edm.page_idle import BitmapTracker, Pagemap, choose_tracker
from edm.uffd_ctypes import PAGE_SIZE

START = 0x10000
PRESENT = 1 << 63


@pytest.fixture
def pagemap(tmp_path):
    """Pages 0 to 9 of a space at START: page n has frame 100 + 7 * n, but 3 is not present."""
    entries = [PRESENT | 100 + 7 * n for n in range(10)]
    entries[3] = 100 + 7 * 3
    file = tmp_path / "pagemap"
    file.write_bytes(bytes(8 * (START // PAGE_SIZE)) + pack("=10Q", *entries))
    return Pagemap(os.open(file, os.O_RDONLY), START)


@pytest.fixture
def bitmap(tmp_path):
    file = tmp_path / "bitmap"
    file.write_bytes(bytes(8 * 64))
    return file


def test_pagemap_tells_what_is_present_and_in_which_frame(pagemap):
    assert pagemap.present(2, 3) == [True, False, True]
    assert pagemap.pfns(2, 3) == [114, 0, 128]


def test_pagemap_of_a_process_that_has_ended_has_no_pages(tmp_path):
    (tmp_path / "ended").write_bytes(b"")
    gone = Pagemap(os.open(tmp_path / "ended", os.O_RDONLY), START)
    assert gone.present(0, 2) == [False, False] and gone.pfns(0, 2) == [0, 0]


def test_the_bitmap_tracker_marks_the_frames_of_present_pages(pagemap, bitmap):
    flushes = []
    BitmapTracker(pagemap, lambda: flushes.append(1), str(bitmap)).mark([(0, 2), (3, 2)])
    words = unpack_from("=64Q", bitmap.read_bytes())
    assert {64 * w + b for w in range(64) for b in range(64) if words[w] >> b & 1} == {
        100, 107, 128,
    }  # fmt: skip
    assert flushes == [1]


def test_a_page_is_idle_while_its_frames_bit_stands(pagemap, bitmap):
    tracker = BitmapTracker(pagemap, lambda: None, str(bitmap))
    tracker.mark([(0, 10)])
    assert tracker.idle([(0, 10)]) == set(range(10)) - {3}
    words = list(unpack_from("=64Q", bitmap.read_bytes()))
    words[107 // 64] &= ~(1 << 107 % 64)  # the kernel saw page 1 touched
    bitmap.write_bytes(pack("=64Q", *words))
    assert tracker.idle([(0, 5)]) == {0, 2, 4}


def test_a_forced_bitmap_that_is_not_there_is_an_error_that_names_the_remedy(monkeypatch):
    monkeypatch.setattr(page_idle, "BITMAP", "/nowhere/bitmap")
    with pytest.raises(ValueError, match="idle_tracker.*--idle-tracker unmap"):
        choose_tracker("bitmap")
    assert choose_tracker("auto") == choose_tracker("unmap") == "unmap"
