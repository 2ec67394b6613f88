"""python -m bench programs: the table that it writes."""

import re
import sys
from pathlib import Path

import pytest
from conftest import needs_userfaultfd

pytest.importorskip("numpy", exc_type=ImportError)
from bench.programs import EDM, PLAIN, PROGRAMS, SWAP, Runs, summary, table

ROOT = Path(__file__).parents[1]
NUMBER = r"\d+\.\d\d"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@needs_userfaultfd
def test_a_quick_run_writes_a_table_with_the_times_of_each_program_and_another_one_adds_to_it(
    run, tmp_path
):
    command = [sys.executable, "-m", "bench", "programs", "--quick", "--output", tmp_path]
    for options in (["--only", "np.sort"], ["--add", "--only", "np.load, np.save"]):
        ended = run(*command, *options, cwd=ROOT)
        assert ended.returncode == 0, ended.stdout
    written = (tmp_path / "programs.md").read_text()
    head, _, *rows = (cells(line) for line in written.splitlines() if line.startswith("|"))
    ways = [PLAIN, EDM, SWAP] if SWAP in head else [PLAIN, EDM]
    assert head == ["seconds", *ways, *(f"EDM / {way}" for way in ways if way != EDM),
                    "making the data"]  # fmt: skip
    assert [row[0] for row in rows] == ["np.sort", "np.load, np.save"]
    assert all(re.fullmatch(NUMBER, cell) for row in rows for cell in row[1:-1]), rows
    assert all(float(cell) > 0 for row in rows for cell in row[1 : 1 + len(ways)])
    assert "Rounds: 1; " in written
    assert ("median of the programs" if SWAP in head else "Without swap") in written
    assert all(name in written for name in PROGRAMS)  # those left out are named


def runs(*seconds, cut=False):
    return Runs(list(seconds), list(seconds), cut=cut)


def test_medians_are_compared_and_what_was_cut_off_is_a_bound():
    found = {
        "a": {PLAIN: runs(1), EDM: runs(9, 2, 3), SWAP: runs(6)},
        "b": {PLAIN: runs(1), EDM: runs(4), SWAP: runs(3, 8, cut=True)},
        "c": {PLAIN: runs(2), EDM: runs(8, cut=True), SWAP: runs(4)},
        "d": {PLAIN: runs(2), EDM: runs(8, cut=True), SWAP: runs(8, cut=True)},
    }
    assert [cells(line)[1:6] for line in table(found)[2:]] == [
        ["1.00", "3.00", "6.00", "3.00", "0.50"],
        ["1.00", "4.00", "> 8.00", "4.00", "< 0.50"],
        ["2.00", "> 8.00", "4.00", "> 4.00", "> 2.00"],
        ["2.00", "> 8.00", "> 8.00", "> 4.00", ""],
    ]
    assert "0.50 (to be: ≤ 0.5)" in summary(found) and "none): c." in summary(found)
