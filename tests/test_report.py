"""report.py: what it keeps of a long job, and the page that it writes."""

import html
import itertools
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import needs_userfaultfd

from edm import report
from edm.report import AREAS, COLUMNS, PLACES, Report
from edm.uffd_ctypes import PAGE_SIZE

FAULTS = ("faults_first_access", "faults_refetch", "faults_write_protect")
EVICTIONS = ("evicted_clean", "evicted_dirty")
FIGURES = dict.fromkeys((*FAULTS, *EVICTIONS), 0) | {
    "resident": 10, "peak_resident": 20, "bytes_sent": 5000, "bytes_received": 1 << 30,
    "waited": 1.5, "waited_for_store": 0.5, "waited_for_room": 0.25, "latency_median": 30, "latency_99th": 400, "fetched": 7,
    "from_each_dms": [3, 4],
}  # fmt: skip
START = 0x10_0000_0000
BEGAN = 100.0  # seconds
HOSTILE = "</script><script>document.title='theirs'</script> \"quoted\" & <!--<script>"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def clock(monkeypatch):
    """Time as the test sets it: a list of one number."""
    now = [BEGAN]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


class Table:
    """The LSPT, as a report sees it."""

    start = START

    def __init__(self):
        self.areas = []


def begun(title="a title", progress=False):
    """A report that has no samples yet."""
    hello = SimpleNamespace(title=title, progress=progress, report=None, stats=False)
    return Report(hello, [], Table(), SimpleNamespace())


def sampled(clock, samples, places=1, faults=3, areas=(), **options):
    """A report of so many samples, a second apart, of which each saw so many faults."""
    made = begun(**options)
    for n in range(1, samples + 1):
        clock[0] += 1
        made._came.extend([n * 256 % (places * 256)] * 5)
        made._lspt.areas = [(0, 4, ""), (100, n + 6, "grows"), *areas]
        made.sample(FIGURES | {"faults_refetch": faults * n})
    return made


class Scripts(HTMLParser):
    """The scripts of a page, as a browser finds them: [(attributes, content)]."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.found.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem:
            attributes, content = self.found[-1]
            self.found[-1] = attributes, content + data


# 3 faults of 20 µs, and one of 3 ms; as dm_handler.py has them
LATENCIES = [3 if n == 115 else n == 173 for n in range(512)]


def written(made, path, latencies=LATENCIES):
    """Write the page: its text, and the object in it."""
    made._handler.latencies = latencies
    made._hello.report = str(path)
    made.write(FIGURES)
    text = path.read_text(encoding="utf-8")
    (attributes, content), (_, drawing) = Scripts(text).found
    assert attributes == {"type": "application/json", "id": "report"}
    assert drawing.rstrip().endswith('addEventListener("resize", drawings);')
    return text, json.loads(content)


@pytest.mark.parametrize("samples", [1, 2, 127, 129, 5000, 100_000])
def test_however_long_a_job_is_its_samples_are_few_and_nothing_of_them_is_lost(
    clock, tmp_path, samples
):
    made = sampled(clock, samples)
    _, page = written(made, tmp_path / "page.html")
    start, *kept = page["samples"]
    if samples <= COLUMNS:
        assert len(kept) == samples
    else:
        assert len(kept) <= 1 + COLUMNS * (1 + math.log(samples / COLUMNS))
    assert sum(sum(sample["came"].values()) for sample in kept) == 5 * samples
    for sample in kept:  # each counts from the start, so the last has everything
        seconds = sample["until"] - start["until"]
        assert sample["faults_refetch"] == 3 * seconds and sample["away"] == seconds
    assert kept[-1]["until"] - start["until"] == samples
    moments = [start["until"], *(sample["until"] for sample in kept)]
    longest = max(after - before for before, after in itertools.pairwise(moments))
    assert 0 < longest <= 1 + samples / COLUMNS, "a part of the job is too coarse"


def test_what_came_is_told_for_the_interval_in_which_it_came(clock):
    """Of places that are accessed in turn, each has its interval, also after much merging."""
    made = begun()
    made._lspt.areas = [(0, 256 << 20, "")]
    for second in range(2000):
        clock[0] += 1
        made._came.append(second << 20)
        made.sample(FIGURES)
    began = BEGAN
    for sample in made._samples[2:]:
        seconds = range(int(began - BEGAN), int(sample["until"] - BEGAN))
        places = [(second << 20) // made._place * made._place for second in seconds]
        assert sample["came"] == Counter(places)
        began = sample["until"]


@pytest.mark.parametrize("pages", [1, 2, 300, 1_000_000, 1 << 28])
def test_however_much_memory_a_job_has_its_places_are_few_and_no_page_is_lost(clock, pages):
    made = begun()
    randomly = random.Random(1)
    for part in range(1, 251):
        clock[0] += 1
        made._lspt.areas = [(0, pages * part // 250, "it grows")]
        made._came.extend(randomly.choices(range(max(pages * part // 250, 1)), k=1000) * 2)
        made.sample(FIGURES)
        assert len(made._samples[-1]["came"]) <= 2 * PLACES
    assert sum(sample["came"].total() for sample in made._samples[2:]) == 250 * 2000
    places = {page // made._place for sample in made._samples[2:] for page in sample["came"]}
    assert max(places) == (pages - 1) // made._place < PLACES
    assert len(places) >= min(pages, 128), "coarser than the rows of the heat map"


def test_of_very_many_areas_the_largest_are_remembered(clock, tmp_path):
    made = begun()
    sizes = random.Random(1).sample(range(1, 10**6), 10 * AREAS)
    for at in range(0, 10 * AREAS, 10):
        clock[0] += 1
        made._lspt.areas = [(page, count, "x") for page, count in enumerate(sizes[at : at + 10])]
        made.sample(FIGURES)
        assert len(made._areas) <= AREAS
    made._lspt.areas = [(0, 10**6, "the last"), *((10 * page, 1, "") for page in range(1000))]
    made.sample(FIGURES)
    text, page = written(made, tmp_path / "page.html")
    expected = [10**6, *sorted(sizes, reverse=True)[: AREAS - 1]]
    assert [count for _, count, *_ in page["areas"]] == expected
    assert f"largest {AREAS}," in text


def test_the_object_in_the_page_says_what_was_seen(clock, tmp_path):
    made = sampled(clock, 20, places=3, areas=[(600, 4, "ended")])
    clock[0] += 1
    made._lspt.areas = [(0, 512, "program.py:12")]
    made.sample(FIGURES)
    _, page = written(made, tmp_path / "page.html")
    assert page["title"] == "a title" and page["start_addr"] == START
    assert page["page_size"] == PAGE_SIZE and page["samples"][0]["until"] == BEGAN
    assert page["latencies"] == LATENCIES
    assert page["place"] == 4
    assert page["samples"][2] == {
        **FIGURES, "until": BEGAN + 2, "faults_refetch": 6, "away": 6, "came": {"512": 5},
    }  # fmt: skip
    assert [0, 512, "program.py:12", BEGAN + 21, BEGAN + 21] in page["areas"]
    assert [600, 4, "ended", BEGAN + 1, BEGAN + 20] in page["areas"]
    assert [100, 9, "grows", BEGAN + 3, BEGAN + 3] in page["areas"]
    assert page["table"] == report.TABLE.format(**FIGURES)
    assert "\nfrom it      1,073,741,824 bytes; 7 pages came" in page["table"]
    assert "\nfrom DMSs    [3, 4] pages" in page["table"]


def test_the_page_is_whole_by_itself_and_knows_the_names_of_the_object(clock, tmp_path):
    text, page = written(sampled(clock, 3), tmp_path / "page.html")
    assert not re.search(r"(?:src|href)=|url\(|@import|fetch\(|innerHTML|document\.write", text)
    assert set(re.findall(r"\breport\.(\w+)", text)) - {"py"} == page.keys()
    drawn = set(re.findall(r'^  \["(\w+)"', text, re.MULTILINE))
    assert drawn == {*FAULTS, *EVICTIONS, "resident", "away"}


@pytest.mark.parametrize("name", [HOSTILE, "\u2028 \udc80 \0", "REPORT_AS_JSON"])
def test_no_name_can_end_the_script_or_change_the_object(clock, tmp_path, name):
    made = sampled(clock, 1, title=name, areas=[(0, 400, name)])
    text, page = written(made, tmp_path / "page.html")
    assert page["areas"][0][2] == page["title"] == name
    assert text.lower().count("<script") == text.lower().count("</script") == 2


@pytest.mark.skipif(not BROWSER, reason="neither chromium nor google-chrome is on PATH")
@pytest.mark.parametrize("idle", [False, True])
def test_a_browser_draws_it(clock, public_path, run, idle):
    areas = [(0, 512, HOSTILE), (600, 4, "ended")]
    made = sampled(clock, 1 if idle else 20, places=3, title=HOSTILE, areas=areas)
    clock[0] += 1
    made._lspt.areas.pop()
    made.sample(FIGURES)
    if idle:
        made._samples[2]["came"].clear()
    else:
        made._lines = {("few.py:1 in f", 0, 0): [5, 10**8], (HOSTILE, 0, 512): [70, 2 * 10**9]}
    page = public_path / "page.html"
    latencies = [0] * 512 if idle else LATENCIES
    written(made, page, latencies=latencies)
    # Its sockets are in TMPDIR, and the path of a socket has 107 bytes at most: so not in tmp_path.
    ended = run(
        "env", f"HOME={public_path}", f"TMPDIR={public_path}", BROWSER,
        "--headless", "--enable-logging=stderr", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--window-size=1000,2000", f"--user-data-dir={public_path / 'profile'}", "--dump-dom",
        page.as_uri(),
    )  # fmt: skip
    dom = re.sub(r"<script.*?</script>", "", ended.stdout, flags=re.DOTALL)
    assert "Uncaught" not in ended.stdout
    assert html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]) == HOSTILE
    rows = [html.unescape(re.sub("<[^>]*>", "|", r)) for r in re.findall(r"<tr>.*?</tr>", dom)]
    row = next(row for row in rows if "0x1000000000" in row and " s to " in row)
    assert HOSTILE in row and "|1.00 s to the end|" in row
    row = next(row for row in rows if "|ended|" in row)
    assert "0x1000258000" in row and "16 KiB" in row and f"to {1 if idle else 20}.00 s|" in row
    assert any("30 µs median" in row for row in rows)
    sentences = "There was no fault." in dom, "No page came." in dom
    assert sentences == (idle, idle)
    if not idle:
        hot, other = (row.replace("|", "") for row in rows if row.endswith(("|2.00||", "|0.10||")))
        assert hot == f"{HOSTILE}2.0 MiB at 0x1000000000702.00" and other == "few.py:1 in f50.10"
        for words in ("3 faults", "23 µs", "2.9 ms", "21 s", "2.1 MiB"):
            assert f">{words}</text>" in dom or f">{words}</title>" in dom, words
        assert dom.count("<svg") == 5 and "NaN" not in dom and "undefined" not in dom


@needs_userfaultfd
def test_a_job_writes_it(run, tmp_path):
    page = tmp_path / "page.html"
    code = (
        "import edm; a = edm.space().mmap(8 << 20, name='my data'); a[:] = bytes(len(a))\n"
        "edm.space().mmap(1 << 20, name=17)"
    )
    ended = run(
        sys.executable, "-m", "edm", "run", "--no-numpy", "--resident", "1M", "--report", page,
        "-c", code,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "")
    content = json.loads(Scripts(page.read_text(encoding="utf-8")).found[0][1])
    assert "17" in [name for _, _, name, *_ in content["areas"]]
    count = next(count for _, count, name, *_ in content["areas"] if name == "my data")
    assert count * PAGE_SIZE == 8 << 20
    assert sum(sum(sample["came"].values()) for sample in content["samples"]) >= count
    last = content["samples"][-1]
    assert last["resident"] <= 256 and last["evicted_dirty"] > 1000
    assert content["table"].startswith(f"faults       {last['faults_first_access']} first accesses")


def test_a_page_that_cannot_be_written_is_an_oserror(clock, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        written(sampled(clock, 1), tmp_path / "nowhere" / "x.html")


def test_the_template_is_package_data():
    settings = (Path(report.__file__).parent / "setup.cfg").read_text()
    data = settings.partition("[options.package_data]")[2].partition("\n[")[0]
    assert "report.html" in data.split()


def test_progress_is_a_line_with_what_happened_in_the_second_before(clock, capfd, monkeypatch):
    monkeypatch.setattr(report, "SAMPLE", 500)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    made = begun(progress=True)
    made._lspt.areas = [(0, 266 << 10, "")]
    for pages in (10, 40, 45, 50):
        clock[0] += 0.5
        waited = pages / 100
        figures = {
            "fetched": pages, "evicted_clean": pages, "evicted_dirty": pages, "waited": waited,
            "waited_for_store": waited / 2, "waited_for_room": waited / 5, "resident": 10 << 10,
        }  # fmt: skip
        take = made.end if pages == 50 else made.sample  # the last one
        take(FIGURES | figures)
    begin, *lines, end = capfd.readouterr().err.split("\r\x1b[K")
    assert begin == end == ""
    memory = "resident 40 MiB, not here 1024 MiB"
    assert [re.sub(r"\x1b\[\?7[lh]", "", line) for line in lines] == [
        f"waits 20% (reading 10%, for room 4%), {memory}, 20 pages/s come, 40 leave",
        f"waits 40% (reading 20%, for room 8%), {memory}, 40 pages/s come, 80 leave",
        f"waits 35% (reading 18%, for room 7%), {memory}, 35 pages/s come, 70 leave",
        f"waits 10% (reading 5%, for room 2%), {memory}, 10 pages/s come, 20 leave",
    ]
