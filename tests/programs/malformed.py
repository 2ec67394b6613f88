"""Rank 1 sends the real DMS on rank 0 messages that are wrong, by MPI."""

import random
import sys

from mpi4py import MPI

from edm import messages as m
from edm.dms import DMS
from edm.uffd_ctypes import PAGE_SIZE

START, PAGES, TAG = 0x1B58000, 1000, 5
comm = MPI.COMM_WORLD


def ask(message):
    comm.Send([message, MPI.BYTE], 0, TAG)
    answer = bytearray(m.MAX_MESSAGE)
    status = MPI.Status()
    comm.Recv([answer, MPI.BYTE], 0, TAG, status)
    kind, _, count, _ = m.HEADER.unpack_from(answer)
    return kind, count, bytes(answer[m.HEADER.size : status.Get_count(MPI.BYTE)])


def request(kind, page=0, count=0, body=b"", stride=0):
    return m.HEADER.pack(kind, stride, count, page) + body


def malform():
    # A right request each, and then every field of it wrong in turn.
    page = bytes(PAGE_SIZE)
    geometry = m.GEOMETRY.pack(m.VERSION, PAGE_SIZE, START, START + PAGES * PAGE_SIZE)
    for kind in (m.HELLO, m.GET, m.EVICT, m.STORE, m.FREE, m.LOCATIONS, m.SYNC, m.BYE, m.RINGS):
        for field, values in {
            "kind": (0, 10, 16, 17, 18, 19, 20, 0x7FFF, 0xFFFF),
            "stride": (1000, 0x7FFF, 0xFFFF),
            "count": (0, PAGES, PAGES + 1, 0x7FFFFFFF, 0xFFFFFFFF),
            "page": (PAGES, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1),
            "body": (b"x", page[:-1], page, page + b"x"),
        }.items():
            if kind in (m.HELLO, m.SYNC, m.BYE, m.RINGS) and field in ("count", "page"):
                continue  # these have none
            if kind in (m.EVICT, m.STORE) and field == "page":
                continue  # this has none of its own: see the run table
            for value in values:
                right = {"kind": kind, "page": 1, "count": 1}
                if kind == m.HELLO:
                    right["body"] = geometry
                if kind in (m.EVICT, m.STORE):
                    right["body"] = m.RUN.pack(1, 1, 1) + page
                if field == "stride":
                    right["count"] = 2  # of one page, no stride is wrong
                if field == "body" and kind in (m.EVICT, m.STORE):
                    value = m.RUN.pack(1, 1, 1) + value + b"x"
                got, _, reason = ask(request(**{**right, field: value}))
                if got != m.ERROR or not reason:
                    sys.exit(f"kind {kind} with {field} {value!r} got {got} {reason!r}")
    for run in ((PAGES, 1, 0), (1, 0, 0), (1, 257, 0), (1, 1, 2), (500, 1, 0), (1 << 63, 1, 1)):
        got, _, reason = ask(request(m.EVICT, 0, 1, m.RUN.pack(*run)))
        if got != m.ERROR or not reason:
            sys.exit(f"a run {run} got {got} {reason!r}")
    for length in (0, 1, 15, m.MAX_MESSAGE + 1, 5 * m.MAX_MESSAGE):
        if ask(bytes(length))[0] != m.ERROR:
            sys.exit(f"{length} bytes were taken for a request")
    dice = random.Random(6)
    for _ in range(3000):
        noise = bytearray(dice.randbytes(dice.choice((3, 16, 17, 32, 5000))))
        if dice.random() < 0.8:  # a kind that there is, but for BYE
            noise[:2] = dice.randint(m.HELLO, m.LOCATIONS).to_bytes(2, "little")
        if noise[:1] == bytes((m.BYE,)):
            noise[1] = 1
        ask(noise)
    kind, count, states = ask(request(m.LOCATIONS, 0, PAGES))
    if (kind, count) != (m.LOCATIONS, PAGES):
        sys.exit("the DMS serves no more")
    if states != bytes(PAGES):
        sys.exit("a refused request has changed something")
    print("malformed SUCCESS")


if comm.rank == 0:
    DMS(comm, None, START, START + PAGES * PAGE_SIZE).serve()
else:
    try:
        malform()
    finally:
        ask(request(m.BYE))
