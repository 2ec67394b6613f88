"""dms.py and messages.py, without MPI: what the DMS answers to each request."""

import errno
import itertools
import os
import random
import re
import resource
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from mpi4py import MPI
from programs.where import LOCATIONS, tells_locations

from edm import messages as m
from edm.dms import DMS
from edm.edm import Config
from edm.mpi_client import MpiStore
from edm.page_store import CONTENT, DISK, EPOCH, INSTANCE, NEW, NEW_PAGES, STRIPE, SYNC_PHASES
from edm.readahead import MAX_STRIDE
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE

PAGES = 5000
START = 0x1B58000


class TwoRanks:
    rank, size = 0, 2


def settings(path, pages=PAGES, keep=False):
    return Config(START, START + pages * PAGE_SIZE, keep=keep, disk=path)


def served(path, keep):
    return tells_locations(DMS(TwoRanks(), 1, settings(path, keep=keep)))


@pytest.fixture(params=[False, True], ids=["scratch", "kept"])
def dms(tmp_path, request):
    return served(tmp_path / "disk", request.param)


def ask(dms, kind, page=0, count=0, more=None, body=b""):
    """What the DMS answers to instance 0: (kind, count, body); of an ERROR (kind, errno, words)."""
    if more is None:
        more = int(kind == m.GET)  # pages apart
    return handle(dms, m.HEADER.pack(kind, more, count, page) + body)


def handle(dms, question, source=1):
    buffer = m.MessageBuffer()
    buffer.whole[: len(question)] = question
    answer = dms._handle(source, buffer.whole[: len(question)], buffer)
    kind, number, count, _ = m.HEADER.unpack_from(answer)
    body = bytes(answer[m.HEADER.size :])
    if kind == m.ERROR:
        assert count == len(body)
        return kind, number, body
    assert number == 0
    return kind, count, body


def refused(answer):
    """The errno and the words of this answer, which is a refusal."""
    kind, number, words = answer
    assert kind == m.ERROR
    return number, words.decode()


def eviction(page, count, *dirty, stay=0):
    """PUT's arguments. dirty: (first page, the bytes of it and its neighbours)."""
    body = b"".join(m.RUN.pack(at, len(whole) // PAGE_SIZE) + whole for at, whole in dirty)
    return {"kind": m.PUT, "page": page, "count": count, "more": stay, "body": body}


def content(seed, pages=1):
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


def test_the_first_access_of_a_page_is_answered_with_new_and_noted_in_the_spt(dms):
    assert ask(dms, m.GET, page=7, count=1) == (NEW_PAGES, 1, b"")
    assert ask(dms, LOCATIONS, page=6, count=3) == (LOCATIONS, 3, bytes((NEW, INSTANCE, NEW)))


def test_an_acknowledged_eviction_is_in_the_disk_file_and_the_pages_come_back(dms, tmp_path):
    ask(dms, m.GET, page=7, count=2)
    assert ask(dms, **eviction(7, 2, (7, content(1, 2)))) == (m.OK, 0, b"")
    assert content(1, 2) in (tmp_path / "disk").read_bytes()
    assert ask(dms, LOCATIONS, page=7, count=2)[2] == bytes((DISK, DISK))
    assert ask(dms, m.GET, page=7, count=1) == (CONTENT, 1, content(1, 2)[:PAGE_SIZE])
    assert ask(dms, m.GET, page=8, count=1) == (CONTENT, 1, content(1, 2)[PAGE_SIZE:])


def test_get_answers_for_the_first_pages_that_are_in_the_same_place(dms):
    ask(dms, **eviction(2, 2, (2, content(1, 2))))
    assert ask(dms, m.GET, page=0, count=8)[:2] == (NEW_PAGES, 2)
    assert ask(dms, m.GET, page=2, count=6) == (CONTENT, 2, content(1, 2))
    assert ask(dms, m.GET, page=4, count=4)[:2] == (NEW_PAGES, 4)


def test_get_takes_every_so_maniest_page(dms):
    ask(dms, **eviction(0, 30, (0, content(1, 30))))
    pages = [content(1, 30)[p * PAGE_SIZE : (p + 1) * PAGE_SIZE] for p in (3, 10, 17, 24)]
    assert ask(dms, m.GET, page=3, count=6, more=7) == (CONTENT, 4, b"".join(pages))
    where = ask(dms, LOCATIONS, page=0, count=40)[2]
    assert [p for p in range(40) if where[p] == INSTANCE | DISK] == [3, 10, 17, 24]
    assert ask(dms, m.GET, page=31, count=6, more=7)[:2] == (NEW_PAGES, 6)
    last = PAGES - 1 - 3 * MAX_STRIDE // PAGE_SIZE
    assert ask(dms, m.GET, page=last, count=4, more=MAX_STRIDE // PAGE_SIZE)[:2] == (NEW_PAGES, 4)


def test_a_clean_page_goes_back_without_its_bytes_to_where_it_was(dms):
    ask(dms, **eviction(7, 1, (7, content(1))))
    ask(dms, m.GET, page=7, count=1)
    ask(dms, m.GET, page=8, count=1)
    where = bytes((INSTANCE | DISK, INSTANCE))
    assert ask(dms, LOCATIONS, page=7, count=2)[2] == where
    assert ask(dms, **eviction(7, 2))[0] == m.OK
    assert ask(dms, LOCATIONS, page=7, count=2)[2] == bytes((DISK, NEW))
    assert ask(dms, m.GET, page=7, count=1) == (CONTENT, 1, content(1))
    assert ask(dms, m.GET, page=8, count=1) == (NEW_PAGES, 1, b"")


def test_one_eviction_carries_many_pages_clean_and_dirty(dms):
    ask(dms, **eviction(0, 100, (0, content(1, 100))))
    ask(dms, m.GET, page=0, count=100)
    answer = ask(dms, **eviction(0, 91, (3, content(2, 2)), (90, content(3))))
    assert answer[0] == m.OK
    where = bytes([DISK] * 91 + [INSTANCE | DISK] * 9)
    assert ask(dms, LOCATIONS, page=0, count=100)[2] == where
    assert ask(dms, m.GET, page=3, count=2)[2] == content(2, 2)
    assert ask(dms, m.GET, page=5, count=1)[2] == content(1, 100)[5 * PAGE_SIZE : 6 * PAGE_SIZE]
    assert ask(dms, m.GET, page=90, count=1)[2] == content(3)


def test_a_stored_page_is_on_the_disk_and_stays_in_the_instance(dms):
    ask(dms, m.GET, page=7, count=2)
    assert ask(dms, **eviction(7, 2, (7, content(1, 2)), stay=1))[0] == m.OK
    assert ask(dms, LOCATIONS, page=7, count=2)[2] == bytes((INSTANCE | DISK,)) * 2
    assert ask(dms, **eviction(7, 2))[0] == m.OK
    assert ask(dms, m.GET, page=7, count=2) == (CONTENT, 2, content(1, 2))


def test_a_page_that_is_in_the_instance_is_given_again(dms):
    ask(dms, **eviction(9, 1, (9, content(1))))
    for _ in range(2):
        assert ask(dms, m.GET, page=7, count=2) == (NEW_PAGES, 2, b"")
        assert ask(dms, m.GET, page=9, count=1) == (CONTENT, 1, content(1))


def test_a_page_may_leave_that_the_spt_has_not_in_the_instance(dms):
    assert ask(dms, **eviction(7, 2, (7, content(1))))[0] == m.OK
    assert ask(dms, LOCATIONS, page=7, count=2)[2] == bytes((DISK, NEW))
    assert ask(dms, m.GET, page=7, count=2) == (CONTENT, 1, content(1))


def test_a_page_that_the_disk_has_lost_is_an_error_and_those_around_it_are_read(tmp_path):
    dms = served(tmp_path / "disk", keep=True)
    ask(dms, **eviction(10, 5, (10, content(1, 5))))
    file = tmp_path / "disk"
    at = file.read_bytes().index(content(1, 5)) + 2 * PAGE_SIZE + 100
    with file.open("r+b") as disk:
        disk.seek(at)
        flipped = disk.read(1)[0] ^ 1
        disk.seek(at)
        disk.write(bytes((flipped,)))
    assert ask(dms, m.GET, page=10, count=5) == (CONTENT, 2, content(1, 5)[: 2 * PAGE_SIZE])
    number, reason = refused(ask(dms, m.GET, page=12, count=3))
    assert number == errno.EIO and "checksum" in reason
    assert ask(dms, LOCATIONS, page=12, count=1)[2] == bytes((DISK,))
    assert ask(dms, m.GET, page=13, count=2) == (CONTENT, 2, content(1, 5)[3 * PAGE_SIZE :])


def test_freed_pages_read_as_new(dms):
    ask(dms, **eviction(0, 2, (0, content(1, 2))))
    assert ask(dms, m.FREE, page=0, count=4)[0] == m.OK
    assert ask(dms, m.GET, page=0, count=8)[:2] == (NEW_PAGES, 8)


def test_kept_disks_of_several_dmss_start_from_the_oldest_sync_that_all_of_them_have(tmp_path):
    ranks = SimpleNamespace(rank=0, size=5)  # two instances
    # What this DMS offers of the first, what another one does, and where they start.
    for own, other, start in (
        (range(1), range(1), 0),
        (range(2), range(1, 3), 1),
        (range(1, 3), range(2), 1),
        (range(1, 3), range(3), 1),  # all have prepared 2, and none has committed it
        (range(1, 3), range(2, 4), 2),
        (range(2, 4), range(2), None),
    ):
        dms = DMS(ranks, 3, settings(tmp_path / "disk", 100, keep=True))
        assert dms.offers == [own, range(1)]
        offers = [[own, range(1)], [other, range(1)], [range(9), range(1)]]
        if start is None:
            words = re.escape(f"no sync is on the disks of all DMSs: [{own}, {other}, ")
            with pytest.raises(ValueError, match=words):
                dms.start(offers)
        else:
            dms.start(offers)
            assert [store._words[EPOCH] for store in dms._stores] == [start, 0]
            dms._stores[0].sync([0])  # it ends before the second
        for store in dms._stores:
            store.close()


def test_each_instance_is_told_of_all_dmss_which_of_its_pages_an_earlier_job_has_left(tmp_path):
    ranks = SimpleNamespace(size=4)  # two DMSs, two instances
    pages, told = {0: [(3, 2), (70, 1)], 1: [(STRIPE - 1, 3)]}, []
    for again in (False, True):
        for ranks.rank in (0, 1):
            config = settings(tmp_path / f"disk{ranks.rank}", keep=True)
            dms = DMS(ranks, 2, config)
            dms.start([dms.offers] * 2)
            if again:
                told.append(dms.on_disk())
            else:
                assert dms.on_disk() == [b"", b""]
            for instance, store in enumerate(dms._stores):
                for page, count in pages[instance]:
                    for at in range(page, page + count):
                        if at // STRIPE % 2 == ranks.rank:
                            store.put([], [(at, memoryview(content(at)))])
                store.sync()
                store.close()
    for instance, runs in pages.items():
        store = SimpleNamespace(on_disk=[of_dms[instance] for of_dms in told])
        found = [range(at, at + many) for at, many in MpiStore.runs_on_disk(store)]
        left = [range(at, at + many) for at, many in runs]
        assert sorted(itertools.chain(*found)) == list(itertools.chain(*left))


WRONG = {
    "an unknown kind": {"kind": 77},
    "an answer's kind": {"kind": CONTENT, "count": 1},
    "a stride where none belongs": {"kind": m.FREE, "page": 1, "count": 1, "more": 5},
    "a stride that leaves the space": {"kind": m.GET, "page": 1, "count": 21, "more": 250},
    "no stride": {"kind": m.GET, "page": 1, "count": 2, "more": 0},
    "too large a stride": {"kind": m.GET, "page": 1, "count": 2, "more": 0xFFFF},
    "a page outside": {"kind": m.GET, "page": PAGES, "count": 1},
    "a page far outside": {"kind": m.GET, "page": 2**64 - 1, "count": 2},
    "a range that leaves the space": {"kind": m.GET, "page": PAGES - 1, "count": 2},
    "no pages": {"kind": m.GET, "page": 1, "count": 0},
    "too many pages": {"kind": m.GET, "page": 1, "count": PAGES_AT_ONCE + 1},
    "a GET with a body": {"kind": m.GET, "page": 1, "count": 1, "body": b"x"},
    "a SYNC of a step that there is not": {"kind": m.SYNC, "more": len(SYNC_PHASES)},
    "a FREE of none": {"kind": m.FREE, "page": 1, "count": 0},
    "a FREE outside": {"kind": m.FREE, "page": PAGES - 1, "count": 2},
    "PUT of no pages": eviction(500, 0),
    "PUT of too many pages": eviction(500, PAGES_AT_ONCE + 1),
    "PUT of a page outside": eviction(PAGES, 1),
    "PUT partly of pages outside": eviction(PAGES - 1, 2, (PAGES - 1, content(1))),
    "PUT of a dirty page before its pages": eviction(501, 1, (500, content(1))),
    "PUT partly of dirty pages behind its pages": eviction(500, 1, (500, content(1, 2))),
    "PUT of no dirty pages": eviction(500, 1, (500, b"")),
    "PUT of a dirty page without bytes": eviction(500, 2) | {"body": m.RUN.pack(500, 1)},
    "PUT with bytes missing": eviction(500, 1)
    | {"body": m.RUN.pack(500, 1) + b"x" * (PAGE_SIZE - 1)},
    "PUT with bytes missing of the second run": eviction(500, 2, (500, content(1)))
    | {"body": m.RUN.pack(500, 1) + content(1) + m.RUN.pack(501, 1) + b"x"},
    "PUT with bytes left over": eviction(500, 1) | {"body": b"x"},
    "PUT of pages that neither leave nor stay": eviction(500, 1, stay=2),
    "PUT that stays, of a page outside": eviction(PAGES, 1, (PAGES, content(1)), stay=1),
    "PUT that stays, partly of pages outside": eviction(
        500, 1, (500, content(1)), (PAGES, content(2)), stay=1
    ),
    "SYNC with a body": {"kind": m.SYNC, "body": b"x"},
    "BYE with a body": {"kind": m.BYE, "body": b"x"},
}


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_answered_with_a_reason_and_changes_nothing(dms, request_):
    ask(dms, m.GET, page=500, count=1)
    ask(dms, m.GET, page=600, count=1)
    ask(dms, **eviction(600, 1, (600, content(6))))
    before = ask(dms, LOCATIONS, page=0, count=PAGES)
    number, reason = refused(ask(dms, **request_))
    assert number == errno.EINVAL and reason
    assert ask(dms, LOCATIONS, page=0, count=PAGES) == before
    assert ask(dms, m.GET, page=600, count=1) == (CONTENT, 1, content(6))


def test_who_says_bye_twice_has_left_once(dms):
    for _ in range(2):
        assert ask(dms, m.BYE)[0] == m.OK
    assert dms._left == {dms._stores[0]}


@pytest.mark.parametrize(
    ("error", "number", "words"),
    [
        (OSError(errno.ENOSPC, "it is full"), errno.ENOSPC, "it is full"),
        (MemoryError(), errno.EINVAL, "MemoryError"),
        (ValueError("x" * 5000), errno.EINVAL, "x" * 1000),
        (OSError(errno.EIO, "\u00b5" * 999), errno.EIO, "\u00b5" * 500),
    ],
)
def test_a_reason_travels_with_its_errno(dms, error, number, words):
    dms._requests[m.BYE] = mock.Mock(side_effect=error), 0, 0, 0
    assert refused(ask(dms, m.BYE)) == (number, words)


@pytest.mark.parametrize("length", [MPI.UNDEFINED, 1 << 62])
def test_a_message_that_no_memory_can_take_is_dropped_and_told(dms, length, caplog):
    found = mock.Mock()
    assert not list(dms._exchange(found, 1, 3, length))
    assert not found.mock_calls and "a message of INSTANCE_0 was dropped" in caplog.text


class OneMessage:
    """A message that a DMS has found, and its communicator. It gets this question; `answered` is what it sends."""

    def __init__(self, question):
        self.question, self.answered = question, b""

    def Irecv(self, message):
        message[0][: len(self.question)] = self.question
        return SimpleNamespace(Test=lambda: True)

    def Isend(self, message, source, tag):
        self.answered = bytes(message[0])
        return SimpleNamespace(Test=lambda: True)


def sync_alone(dms):
    """The kind of the answer to a SYNC that is the only message."""
    dms._comm = OneMessage(m.HEADER.pack(m.SYNC, 0, 0, 0))
    for _ in dms._exchange(dms._comm, 1, 3, m.HEADER.size):
        time.sleep(0.001)
    return m.HEADER.unpack_from(dms._comm.answered)[0]


def test_syncs_have_a_thread_of_their_own(dms):
    threads = []
    real = dms._requests[m.SYNC]

    def sync(*asked):
        threads.append(threading.current_thread())
        return real[0](*asked)

    dms._requests[m.SYNC] = sync, *real[1:]
    assert sync_alone(dms) == sync_alone(dms) == m.OK
    assert threads[0] is threads[1] is not threading.main_thread()


def test_a_dms_that_can_have_no_thread_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("no thread")))
    with pytest.raises(RuntimeError, match="no thread"):
        DMS(SimpleNamespace(size=2, rank=0), 1, Config())


def test_a_mistake_in_a_sync_ends_the_dms_and_is_no_answer(dms):
    dms._stores[0].sync = mock.Mock(side_effect=TypeError("a mistake"))
    with pytest.raises(TypeError, match="a mistake"):
        sync_alone(dms)
    assert not dms._comm.answered


def test_random_bytes_never_end_the_dms(dms):
    dice = random.Random(4)
    for _ in range(2000):
        length = dice.choice((0, 1, 15, 16, 17, 40, 200, 5000))
        question = bytearray(dice.randbytes(length))
        if length >= 4:  # a kind that there is, most of the time
            kind, more = dice.choice((*range(1, 8), 99)), dice.randrange(3)
            question[0:4] = bytes((kind, 0, more, 0))
        handle(dms, question)
    assert ask(dms, LOCATIONS, page=0, count=1)[0] == LOCATIONS


def test_a_dms_that_has_no_page_of_a_small_space_takes_part_in_what_all_are_asked(tmp_path):
    ranks = SimpleNamespace(rank=2, size=4)
    dms = tells_locations(DMS(ranks, 3, settings(tmp_path / "disk", 100, keep=True)))
    dms.start([dms.offers] * 3)
    for phase in SYNC_PHASES:
        assert handle(dms, m.HEADER.pack(m.SYNC, phase, 0, 0), 3)[0] == m.OK
    assert handle(dms, m.HEADER.pack(LOCATIONS, 0, 100, 0), 3) == (LOCATIONS, 100, bytes(100))
    for kind in (m.FREE, m.PUT):
        assert handle(dms, m.HEADER.pack(kind, 0, 100, 0), 3)[0] == m.OK


def test_an_eviction_that_the_disk_refuses_is_answered_with_the_reason(dms):
    ask(dms, m.GET, page=900, count=1)
    ask(dms, m.GET, page=7, count=1)
    ask(dms, **eviction(7, 1, (7, content(7))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, hard))  # EFBIG: Python ignores SIGXFSZ
    try:
        answer = ask(dms, **eviction(900, 1, (900, content(1))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused(answer) == (errno.EFBIG, os.strerror(errno.EFBIG))
    assert ask(dms, LOCATIONS, page=900, count=1)[2] == bytes((INSTANCE,))
    assert ask(dms, m.GET, page=7, count=1) == (CONTENT, 1, content(7))
    assert ask(dms, **eviction(900, 1, (900, content(1))))[0] == m.OK
    assert ask(dms, m.GET, page=900, count=1) == (CONTENT, 1, content(1))


def test_an_instance_with_any_number_has_a_store(tmp_path):
    """More than 256 of them, and with any rank."""
    many = SimpleNamespace(rank=0, size=1 + 300)
    dms = DMS(many, 1, settings(tmp_path / "disk"))
    for rank in (1, 257, 300):
        body = eviction(7, 1, (7, content(rank)))["body"]
        handle(dms, m.HEADER.pack(m.PUT, 0, 1, 7) + body, rank)
        assert content(rank) in (tmp_path / f"disk{f'.{rank - 1}' * (rank > 1)}").read_bytes()
    for store in dms._stores:
        store.close()
