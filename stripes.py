"""Stripes: which DMS has a page, where several DMSs share the pages of one space.

In the picture: MpiStore (mpi_client.py) sends each request to the right DMS; each PageStore
(page_store.py) has a Share.

Interface: shares(count) returns a Share for each DMS. ALL is the Share of a single DMS.

A stripe is STRIPE pages. Stripe s belongs to DMS s % N. Each DMS numbers its own pages without gaps, so
that the pages of its stripes are neighbours in its file:

    page in the space     0 ... 63    64 ... 127    128 ... 191    192 ... 255
    belongs to DMS        0           1             0              1
    and has number        0 ... 63    0 ... 63      64 ... 127     64 ... 127

A single DMS has all pages in one endless stripe, with the numbers that they have in the space.
"""

from collections import namedtuple
from collections.abc import Iterator

STRIPE = 64  # pages: a readahead window of 256 goes to four DMSs at once
ENDLESS = 1 << 62


class Share(namedtuple("Share", "which of stripe", defaults=(0, 1, ENDLESS))):
    """The stripes `which`, `which` + `of`, `which` + 2 * `of`, ... A stripe has `stripe` pages."""

    def below(self, page: int) -> int:
        """How many pages of this share come before this page. That is the number of a page of the share."""
        rounds, rest = divmod(page, self.of * self.stripe)
        return rounds * self.stripe + min(max(rest - self.which * self.stripe, 0), self.stripe)

    def page(self, own: int) -> int:
        """The page in the space that has this number in the share."""
        stripe, at = divmod(own, self.stripe)
        return (stripe * self.of + self.which) * self.stripe + at

    def own(self, page: int, count: int) -> range:
        """The numbers in the share of those of count pages from `page` on that belong to it."""
        return range(self.below(page), self.below(page + count))

    def runs(self, page: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The runs of this share's pages among count pages from `page` on: (number in the share, page in
        the space, how many)."""
        pages = self.own(page, count)
        while pages:
            own = pages[0]
            many = min(self.stripe - own % self.stripe, len(pages))
            yield own, self.page(own), many
            pages = pages[many:]


ALL = Share()


def shares(count: int) -> list[Share]:
    """The shares of this many DMSs."""
    return [Share(which, count, STRIPE) for which in range(count)] if count > 1 else [ALL]
