"""Stripes: which DMS has a page, where several have the pages of one space.

In the picture: an MpiStore (mpi_client.py) asks by them; a PageStore (page_store.py) has one Share.

Interface: shares(count) is one Share for each DMS. ALL is the only one's.

A stripe is STRIPE pages. Stripe s belongs to DMS s % N. That DMS numbers its pages without gaps, so that
neighbours of a stripe are neighbours in its file, and so are the stripes that follow each other there:

    page in the space     0 ... 63    64 ... 127    128 ... 191    192 ... 255
    of two, DMS           0           1             0              1
    has it as its own     0 ... 63    0 ... 63      64 ... 127     64 ... 127

One DMS alone has all pages, in one stripe without an end, by the numbers that they have in the space.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator

STRIPE = 64  # pages: a readahead window of 256 goes to four DMSs at once
ENDLESS = 1 << 62


class Share(namedtuple("Share", "which of stripe", defaults=(0, 1, ENDLESS))):
    """Every of-th stripe, from the which-th on."""

    def below(self, page: int) -> int:
        """How many of the pages before this one it has. For a page of its own, that is its number."""
        rounds, rest = divmod(page, self.of * self.stripe)
        return rounds * self.stripe + min(max(rest - self.which * self.stripe, 0), self.stripe)

    def page(self, own: int) -> int:
        """The number in the space of its page of this number."""
        stripe, at = divmod(own, self.stripe)
        return (stripe * self.of + self.which) * self.stripe + at

    def own(self, page: int, count: int) -> range:
        """Its numbers of those that it has of count pages from this one on."""
        return range(self.below(page), self.below(page + count))

    def runs(self, page: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Its pages among count ones from this page on, in runs: the number of the first, here and in
        the space; and how many."""
        pages = self.own(page, count)
        while pages:
            own = pages[0]
            many = min(self.stripe - own % self.stripe, len(pages))
            yield own, self.page(own), many
            pages = pages[many:]


ALL = Share()


def shares(count: int) -> list[Share]:
    """The share of each of so many DMSs."""
    return [Share(which, count, STRIPE) for which in range(count)] if count > 1 else [ALL]
