"""A long computation that survives being ended: its memory is on a kept disk.

    python -m edm.examples.resume --disk PATH      end it with SIGTERM, or kill -9
    python -m edm.examples.resume --disk PATH      it goes on where it was

Each page of an array is made of the one before it, so none can be made without all of them. The
first page of the space counts how many there are.
"""

import argparse
import hashlib
import sys

import edm

SYNC_EVERY = 4096  # pages: no more are to be made again after kill -9


def following(page: bytes) -> bytes:
    digest = hashlib.sha256(page).digest()
    return digest * (edm.PAGE_SIZE // len(digest))


def say(text: str) -> None:
    print(text, flush=True)


def user_code(space: edm.Space) -> None:
    counter = space.mmap(edm.PAGE_SIZE, addr=space.start_addr).cast("Q")
    array = space.mmap(args.pages * edm.PAGE_SIZE, addr=space.start_addr + edm.PAGE_SIZE)
    done = counter[0]
    say(f"the space has {done} of {args.pages} pages: {'go on' if done else 'begin'}")
    page = bytes(array[(done - 1) * edm.PAGE_SIZE : done * edm.PAGE_SIZE]) if done else b"first"
    for number in range(done, args.pages):
        page = following(page)
        array[number * edm.PAGE_SIZE : (number + 1) * edm.PAGE_SIZE] = page
        counter[0] = number + 1
        if (number + 1) % SYNC_EVERY == 0:
            say(f"page {number + 1}; the sync sent {space.sync()} pages")
    expected = b"first"
    for number in range(args.pages):
        expected = following(expected)
        if array[number * edm.PAGE_SIZE : (number + 1) * edm.PAGE_SIZE] != expected:
            sys.exit(f"page {number} is wrong: resume FAILURE")
    say(f"{done} pages were there, {args.pages - done} were made, all are right: resume SUCCESS")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=65536, help="pages of the array")
    args, config = edm.parse_arguments(parser, keep=True, high_threshold=8192, disk="resume.disk")
    edm.main(user_code, config)
