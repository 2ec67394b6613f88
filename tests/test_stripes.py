"""stripes.py, and what several DMSs are for who starts them."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import needs_userfaultfd

from edm import rank, stripes
from edm.doctor import find_mpirun
from edm.edm import Config
from edm.mpi_client import MpiStore

STRIPE = stripes.STRIPE


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_page_is_of_one_dms_which_numbers_its_own_without_gaps(count):
    found = {}
    for share in stripes.shares(count):
        own = 0
        for page in range(STRIPE * 30 + 7):
            assert share.below(page) == own
            if count == 1 or page // STRIPE % count == share.which:
                assert share.page(own) == page
                found[page] = share
                own += 1
    assert sorted(found) == list(range(STRIPE * 30 + 7))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_runs_of_a_range_are_neighbours_in_the_space_and_with_the_dms(count):
    for first, length in ((0, 1), (0, 300), (63, 2), (64, 64), (100, 1000), (127, 0)):
        pages = []
        for share in stripes.shares(count):
            for own, page, many in share.runs(first, length):
                assert many > 0 and share.below(page) == own
                assert share.below(page + many - 1) == own + many - 1
                pages += range(page, page + many)
        assert sorted(pages) == list(range(first, first + length))


@pytest.mark.parametrize("step", [1, 2, 7, 64, -1, -7, -64])
def test_a_get_ends_where_a_stripe_does(step):
    def together(count, pages):
        return MpiStore.together(SimpleNamespace(_shares=stripes.shares(count)), pages)

    for first in (5000, 5055, 5056, 5119, 5120):
        pages = range(first, first + 50 * step, step)
        assert together(1, pages) >= 50
        of_the_stripe = [page for page in pages if page // STRIPE == first // STRIPE]
        assert list(pages[: together(2, pages)]) == of_the_stripe


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        (["a"], ["x"]),
        (["a", "b", "c"], ["x", "x", "x"]),
        (["a", "a", "b", "a", "b"], ["x", "x.dms1", "x", "x.dms3", "x.dms4"]),
    ],
)
def test_each_dms_has_a_disk_of_its_own_with_the_path_itself_on_a_machine_of_its_own(
    monkeypatch, hosts, names
):
    made = []

    def dms(comm, path, *others):
        made.append(path)
        raise SystemExit

    monkeypatch.setattr("edm.dms.DMS", dms)
    for number in range(len(hosts)):
        with pytest.raises(SystemExit):
            rank._serve_pages(SimpleNamespace(rank=number), Config(disk="x"), hosts, 0, None)
    assert made == names


@needs_userfaultfd
def test_the_readmes_command_for_many_machines_runs_a_program_over_several_dmss(run, tmp_path):
    readme = Path(rank.__file__).with_name("README.md").read_text()
    command = shlex.split(re.search("^mpirun --hostfile .*$", readme, re.MULTILINE)[0])
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("there is no mpirun: pip install mpich")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost\n" * 3)
    here = {"mpirun": [mpirun], "hosts": [hosts], "9": [3], "8": [2], "100G": ["8M", "--stats"]}
    here |= {"python": [sys.executable], "big.py": ["-m", "edm.examples.ordinary", 32]}
    assert here.keys() <= set(command)
    ended = run(*[word for name in command for word in here.get(name, [name])])
    assert ended.returncode == 0 and "SUCCESS" in ended.stdout, ended.stdout
    each = re.search(r"from each +(\d+), (\d+) pages", ended.stdout)
    assert each and min(map(int, each.groups())) > 1000, ended.stdout
