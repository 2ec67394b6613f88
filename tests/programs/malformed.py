"""Rank 1 sends the real DMS on rank 0 messages that are wrong, by MPI."""

import errno
import random
import re
import sys

from mpi4py import MPI
from where import locations_over_mpi, tells_locations

from edm import messages as m
from edm.dms import DMS
from edm.edm import Config
from edm.page_store import CONTENT, NEW_PAGES
from edm.uffd_ctypes import PAGE_SIZE

START, PAGES, TAG = 0x1B58000, 1000, 5
comm = MPI.COMM_WORLD


def ask(message):
    comm.Send([message, MPI.BYTE], 0, TAG)
    answer = bytearray(m.MAX_MESSAGE)
    status = MPI.Status()
    comm.Recv([answer, MPI.BYTE], 0, TAG, status)
    kind, number, count, _ = m.HEADER.unpack_from(answer)
    return kind, number or count, bytes(answer[m.HEADER.size : status.Get_count(MPI.BYTE)])


def request(kind, page=0, count=0, more=0, body=b""):
    return m.HEADER.pack(kind, more, count, page) + body


PAGE = bytes(PAGE_SIZE)
RUN = m.RUN.pack(1, 1)
DIRTY = {"page": 1, "count": 1, "body": RUN + PAGE}
# One right request of each kind, in an order in which each of them can be done.
RIGHT = {
    m.GET: {"page": 1, "count": 2, "more": 1},
    m.PUT: DIRTY,
    m.FREE: {"page": 1, "count": 2},
    m.SYNC: {},
    m.BYE: {},
}
# What is wrong in each field, and words of the reason.
WRONG = {
    "kind": ((0, 7, 10, m.OK, NEW_PAGES, CONTENT, m.ERROR, 20, 0x7FFF, 0xFFFF), "wrong kind"),
    "more": ((1025, 2000, 0x7FFF, 0xFFFF), "wrong kind|dirty pages from"),
    "count": ((0, PAGES, PAGES + 1, 0x7FFFFFFF, 0xFFFFFFFF), "wrong kind"),
    "page": ((PAGES, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1), "wrong kind"),
    "body": (
        (b"x", RUN + b"x", RUN + PAGE[1:], RUN + PAGE + b"x"),
        "wrong kind|dirty pages from|requires a buffer",
    ),
}


def refused(what, message, reason):
    got, number, said = ask(message)
    if (got, number) != (m.ERROR, errno.EINVAL) or not re.search(reason, said.decode()):
        sys.exit(f"{what} got {got} {said!r}")


def malform():
    for kind, right in RIGHT.items():
        for field, (values, reason) in WRONG.items():
            if field in ("count", "page") and field not in right:
                continue  # it has none
            for value in values:
                wrong = {"kind": kind, **right, field: value}
                refused(f"kind {kind} with {field} {value!r}", request(**wrong), reason)
        if kind == m.PUT:
            for run in ((PAGES, 1), (1, 0), (1, 2), (0, 1), (2, 1), (1, 1 << 31), (1 << 63, 1)):
                wrong = {**right, "body": m.RUN.pack(*run) + PAGE}
                refused(f"a run {run}", request(kind, **wrong), "dirty pages from")
        if kind != m.BYE:  # it is said at the end
            got, _, said = ask(request(kind, **right))
            if got == m.ERROR:
                sys.exit(f"kind {kind} is right, and got {said!r}")
    for length in (0, 1, 15, m.MAX_MESSAGE + 1, 5 * m.MAX_MESSAGE):
        if ask(bytes(length))[0] != m.ERROR:
            sys.exit(f"{length} bytes were taken for a request")
    dice = random.Random(6)
    for _ in range(3000):
        noise = bytearray(dice.randbytes(dice.choice((3, 16, 17, 32, 5000))))
        if dice.random() < 0.8:  # a kind that there is, but for BYE
            noise[:2] = dice.randint(m.GET, m.SYNC).to_bytes(2, "little")
        if noise[:1] == bytes((m.BYE,)):
            noise[1] = 1
        ask(noise)
    if locations_over_mpi(comm, 1, 0, PAGES, TAG) != bytes(PAGES):
        sys.exit("a refused request has changed something")
    print("malformed SUCCESS")


if comm.rank == 0:
    tells_locations(DMS(comm, 1, Config(START, START + PAGES * PAGE_SIZE))).serve()
else:
    try:
        malform()
    finally:
        ask(request(m.BYE))
