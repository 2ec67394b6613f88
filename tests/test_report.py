"""report.py: what it keeps of a long job, and the page that it writes."""

import itertools
import random
import re
from xml.etree import ElementTree

import pytest

from edm import report
from edm.lspt import AWAY, CLEAN, DIRTY, LOST, NEW
from edm.report import AREAS, CELLS, COLUMNS, EVICTIONS, FAULTS, Report

FIGURES = dict.fromkeys((*FAULTS, *EVICTIONS), 0) | {
    "resident": 10, "peak_resident": 20, "bytes_sent": 5000, "bytes_received": 1 << 30,
    "waited": 1.5, "latency_median": 30.0, "latency_99th": 400.0, "fetched": 7,
}  # fmt: skip
START = 0x10_0000_0000


@pytest.fixture
def clock(monkeypatch):
    """Time as the test sets it: a list of one number."""
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


def sampled(clock, samples, places=1, faults=3):
    """A report of so many samples, a second apart, of which each saw so many faults."""
    made = Report(START)
    for n in range(1, samples + 1):
        clock[0] += 1
        made.came.append((n * 256 % (places * 256), 5))
        made.sample(FIGURES | {"faults_refetch": faults * n}, away=n)
    return made


def written(made, path, state=bytes(1000), latencies=((20.0, 3), (3000.0, 1))):
    made.write(str(path), "a <title> & more", FIGURES, latencies, state)
    return path.read_text()


@pytest.mark.parametrize("samples", [1, 2, 191, 193, 5000])
def test_however_long_a_job_is_its_samples_are_few_and_nothing_of_them_is_lost(clock, samples):
    made = sampled(clock, samples)
    kept = made._samples
    assert len(kept) <= COLUMNS
    assert sum(sample.counts["faults_refetch"] for sample in kept) == 3 * samples
    assert sum(sample.came.total() for sample in kept) == 5 * samples
    assert kept[0].began == 0 and kept[-1].until == samples
    assert all(a.until == b.began for a, b in itertools.pairwise(kept))
    lengths = [sample.until - sample.began for sample in kept[:-1]]
    assert max(lengths, default=0) <= 4 * min(lengths, default=0), "early ones are too coarse"


def test_however_much_memory_a_job_has_its_places_are_few_and_no_page_is_lost(clock):
    made = sampled(clock, 6000, places=6000)
    places = set().union(*(sample.came for sample in made._samples))
    assert len(places) <= CELLS
    assert sum(sample.came.total() for sample in made._samples) == 30000


def test_of_very_many_areas_the_largest_are_remembered(clock):
    made = Report(START)
    sizes = random.Random(1).sample(range(1, 10**6), 10 * AREAS)
    for count in sizes:
        made.mapped(0, count, "x")
        made.unmapped(0, bytes(10))
    kept = [area.count for area in made._gone]
    assert len(kept) <= 2 * AREAS and set(sorted(sizes)[-AREAS:]) <= set(kept)
    assert made._forgotten + len(kept) == len(sizes)


def test_the_page_is_whole_by_itself_and_says_what_was_seen(clock, tmp_path):
    made = sampled(clock, 20, places=3)
    made.mapped(0, 512, "program.py:<12>")
    made.mapped(600, 4, "ended")
    clock[0] += 1
    state = bytes((NEW, AWAY, LOST, CLEAN, DIRTY)) * 200
    made.unmapped(600, state)
    text = written(made, tmp_path / "page.html", state)
    assert "script" not in text.lower() and not re.search(r"(?:src|href)=|url\(|@import", text)
    for part in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(part)
    assert "<title>a &lt;title&gt; &amp; more</title>" in text
    assert text.count("program.py:&lt;12&gt;") >= 2  # in heat map and table
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    row = next(row for row in rows if "program.py" in row)
    assert "0x1000000000" in row and "20.00 s to the end" in row and "2.0 MiB" in row
    assert re.search(r"never accessed 412 KiB.*on the DMS 412 KiB.*lost .*here 816 KiB", row)
    assert "20.00 s to 21.00 s" in next(row for row in rows if "ended" in row)
    for words in ("30 µs median", "1.0 GiB; 7 pages came", "22.6 µs", "2.9 ms", "3 faults"):
        assert words in text, words


def test_a_job_that_did_nothing_has_a_page_too(clock, tmp_path):
    made = Report(START)
    clock[0] += 1
    made.sample(FIGURES, 0)
    text = written(made, tmp_path / "page.html", latencies=())
    assert "There was no fault." in text and "No page came." in text


@pytest.mark.parametrize(
    ("pages", "words"),
    [(0, "0 bytes"), (1, "4.0 KiB"), (3, "12 KiB"), (256, "1.0 MiB"), (10**8, "381 GiB")],
)
def test_sizes_are_in_words(pages, words):
    assert report.size(pages) == words
