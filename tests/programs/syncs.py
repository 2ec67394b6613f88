"""What sync returns, and that it evicts nothing."""

import sys

import edm

PAGE = edm.PAGE_SIZE


def app(space):
    area = space.mmap(90 * PAGE)

    def write(pages):
        for page in pages:
            area[page * PAGE] = page + 1

    write(range(40))
    sent = [space.sync()]
    sent.append(space.sync())
    write((3, 4, 30))
    sent.append(space.sync())
    write(range(40, 90))
    before = space.figures()
    sent.append(space.sync())
    after = space.figures()
    if sent != [40, 0, 3, 50]:
        sys.exit(f"syncs sent {sent}")
    if after["resident"] != before["resident"] or after["evicted_dirty"] or after["evicted_clean"]:
        sys.exit("a sync has evicted pages")
    if [area[page * PAGE] for page in range(90)] != list(range(1, 91)):
        sys.exit("a page is wrong")
    print("syncs SUCCESS")


edm.main(app, edm.Config(high_threshold=100, low_threshold=50, readahead=1))
