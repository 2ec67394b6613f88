"""Where the pages of a store are, which only tests ask: PageStore's SPT, here and of a DMS."""

from mpi4py import MPI

from edm import messages as m
from edm.page_store import DISK, INSTANCE

LOCATIONS, MOST = 30, 1 << 16  # a kind of message, and the pages of one
LOCATION = bytes(byte & (INSTANCE | DISK) for byte in range(256))


def locations(store, page, count):
    """A byte for each of count pages from page on: NEW, INSTANCE, DISK, or INSTANCE | DISK. store: a PageStore."""
    return store.spt.read(page, count).translate(LOCATION)


def tells_locations(dms):
    """Have this DMS answer LOCATIONS, a question about at most MOST pages, with a byte for each; returns it."""

    def answer(store, pages, answer, *_):
        states = locations(store, pages.start, len(pages))
        return answer.message(LOCATIONS, len(states), 0, states)

    dms._requests[LOCATIONS] = answer, MOST, 0, 0
    return dms


def locations_over_mpi(comm, dmss, page, count, tag):
    """As locations, of what these DMSs have together."""
    together = 0  # zeros for the pages of the others
    for dms in range(dmss):
        comm.Send([m.HEADER.pack(LOCATIONS, 0, count, page), MPI.BYTE], dms, tag)
        answer = bytearray(m.HEADER.size + MOST)
        comm.Recv([answer, MPI.BYTE], dms, tag)
        kind, _, many, _ = m.HEADER.unpack_from(answer)
        assert (kind, many) == (LOCATIONS, count)
        together |= int.from_bytes(answer[m.HEADER.size :][:count], "big")
    return together.to_bytes(count, "big")
