"""Which DMS has a page, and what several DMSs are for who starts them."""

import itertools
import random
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import needs_userfaultfd

from edm import messages as m
from edm import rank
from edm.dm_handler import FIRST_PIECE, PIECE, DmHandler
from edm.doctor import find_mpirun
from edm.edm import Config
from edm.mpi_client import MpiStore
from edm.page_store import STRIPE, SYNC_PHASES
from edm.uffd_ctypes import PAGE_SIZE

START, PAGES = 0x1B58000, 2000


class Asked:
    """The communicator of a store whose DMSs answer OK; `questions` is what each of them was sent."""

    def __init__(self, count):
        self.questions = [[] for _ in range(count)]

    def Isend(self, message, dms, tag):
        header, body = m.HEADER.unpack_from(message[0]), bytes(message[0][m.HEADER.size :])
        self.questions[dms].append((*header, body))
        return SimpleNamespace(Test=lambda: True)

    def Irecv(self, message, dms, tag):
        message[0][: m.HEADER.size] = m.HEADER.pack(m.OK, 0, 0, 0)
        return SimpleNamespace(Test=lambda: True)

    def new(self):
        """What each was sent since the last call."""
        found, self.questions = self.questions, [[] for _ in self.questions]
        return found


def striped(count):
    comm = Asked(count)
    return comm, MpiStore(comm, count, Config(START, START + PAGES * PAGE_SIZE))


def dms_of(page, count):
    return page // STRIPE % count


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_page_is_asked_for_of_the_dms_that_it_was_sent_to(count):
    comm, store = striped(count)
    for page in range(0, PAGES, 7):
        put = ([], [(page, memoryview(bytes(PAGE_SIZE)))])
        for ask in (
            lambda page=page: store.ask_get(range(page, page + 1)),
            lambda put=put: store.put(*put),
        ):
            ask()
            sent = comm.new()
            assert [dms for dms in range(count) if sent[dms]] == [dms_of(page, count)]
            assert sent[dms_of(page, count)][0][3] == page


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_what_is_about_a_range_goes_to_the_dmss_that_have_some_of_it_with_their_dirty_pages(count):
    comm, store = striped(count)
    dice = random.Random(count)
    for first, length in ((0, 1), (0, 256), (63, 2), (64, 64), (100, 200), (127, 1), (700, 256)):
        pages = range(first, first + length)
        having = {dms_of(page, count) for page in pages}
        for ask in (store.free, lambda first, length: store.put([(first, length)], [])):
            ask(first, length)
            sent = comm.new()
            assert {dms for dms in range(count) if sent[dms]} == having
            assert all(asked[0][2:4] == (length, first) for asked in sent if asked)
        content = memoryview(dice.randbytes(length * PAGE_SIZE))
        ends = sorted({first, *dice.choices(pages, k=3)})  # runs with a gap behind each
        dirty = [
            (at, content[(at - first) * PAGE_SIZE : (to - first - 1) * PAGE_SIZE])
            for at, to in itertools.pairwise([*ends, first + length + 1])
            if at < to - 1
        ]
        store.put([(first, length)], dirty)
        got = {}
        for dms, [question] in ((dms, asked) for dms, asked in enumerate(comm.new()) if asked):
            body, at = question[4], 0
            while at < len(body):
                page, many = m.RUN.unpack_from(body, at)
                at += m.RUN.size
                for each in range(page, page + many):
                    assert dms_of(each, count) == dms
                    got[each] = body[at : at + PAGE_SIZE]
                    at += PAGE_SIZE
        assert got == {
            page + at: bytes(part[at * PAGE_SIZE :][:PAGE_SIZE])
            for page, part in dirty
            for at in range(len(part) // PAGE_SIZE)
        }
    store.sync()
    assert all(len(asked) == len(SYNC_PHASES) for asked in comm.new())


@pytest.mark.parametrize("step", [1, 2, 7, 64, -1, -7, -64])
def test_a_get_ends_where_a_stripe_does(step):
    for first in (5000, 5055, 5056, 5119, 5120):
        pages = range(first, first + 50 * step, step)
        for count in (1, 2):
            handler = SimpleNamespace(_store=striped(count)[1])
            pieces = [
                list(piece)[:: 1 if step > 0 else -1] for piece in DmHandler._pieces(handler, pages)
            ]
            assert list(itertools.chain(*pieces)) == list(pages)
            stripes = [{page // STRIPE for page in piece} for piece in pieces]
            if count == 1:  # all are in one
                assert [len(piece) for piece in pieces] == [FIRST_PIECE, 50 - FIRST_PIECE]
                continue
            assert all(len(of_piece) == 1 for of_piece in stripes)
            # A piece is as long as it may be.
            most = [FIRST_PIECE, *[PIECE] * (len(pieces) - 1)]
            for at, piece in enumerate(pieces[:-1]):
                assert len(piece) == most[at] or stripes[at] != stripes[at + 1]


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

    def dms(comm, dms, config):
        made.append(config.disk)
        raise SystemExit

    monkeypatch.setattr("edm.dms.DMS", dms)
    for number in range(len(hosts)):
        comm = mock.MagicMock(rank=number)
        with pytest.raises(SystemExit):
            rank._serve_pages(comm, Config(disk="x"), hosts, [], 0, None)
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
    each = re.search(r"from DMSs +\[(\d+), (\d+)\] pages", ended.stdout)
    assert each and min(map(int, each.groups())) > 1000, ended.stdout
