"""Mailbox: what the application asks of the pager, in memory that both map.

In the picture: the arrow from the application to the pager that is not a page fault. A socket would be
a descriptor in a program that knows nothing of it, and may close it: this has none.

Interface: Mailbox(address), made by both ends of the same memory.
    the application     ask(what, ...); call(what, ...) waits for the answer;
                        is_done and wait_until_done say which requests the pager has done
                        result(answer), also of the answer to HELLO, which comes by the socket
    the pager           requests() in a thread of its own, which sleeps until there is one; answer()
                        while it does one

The memory: two u64, then a ring of ENTRIES requests, then one answer. Requests and answers are pickles. A
request names a method of Pager (pager.py), and has its arguments.

    asked      how many requests were written so far: the number of the last one
    done       the number of the last request that is done. They are done in order

The lower half of each is a futex: waiting for it to change is a sleep in futex(2). There is room for one
answer: the next one replaces it, so only the answer of the last request can be read.

Rules: one thread at a time calls ask or call. The pager's side belongs to one thread, except
interrupt. Python runs other threads and signal handlers while a thread waits here. If a signal
handler raises, the request goes on without the caller.
"""

import _pickle
import ctypes
from collections.abc import Iterator

from edm.uffd_ctypes import PAGE_SIZE, futex_wait, futex_wake

__builtins__ = dict(__builtins__)  # as in address_space.py

ENTRY = 1 << 10  # bytes of a request, a pickle
ENTRIES = 128
ANSWER_AT = PAGE_SIZE + ENTRIES * ENTRY  # where the answer is, a pickle; the ring begins at a page
MAX_ANSWER = 1 << 16  # bytes that an answer may be, and as many more for the pickle
SIZE = ANSWER_AT + 2 * MAX_ANSWER  # bytes of the memory
MAX_NAME = 200  # characters of an area's name, in a request: the last ones
RUNS = 32  # (first page, count of pages) in a request

_ASKED, _DONE = range(2)


def result(answer: bytes | memoryview) -> object:
    """What the pager has answered, unpickled. If that is an exception, raises it."""
    content = _pickle.loads(answer)
    if isinstance(content, Exception):
        raise content
    return content


class Mailbox:
    def __init__(self, address: int) -> None:
        """address: in this process, of SIZE bytes that both ends share."""
        self._address = address
        memory = self._memory = memoryview((ctypes.c_ubyte * SIZE).from_address(address)).cast("B")
        self._words = memory[:16].cast("Q")
        self._ring = [memory[at : at + ENTRY] for at in range(PAGE_SIZE, ANSWER_AT, ENTRY)]

    # ------------------------------------------------------------ the application's end

    def ask(self, what: str, *arguments: object) -> int:
        """Send a request; its number. Waits only while the ring is full."""
        pickled = _pickle.dumps((what, arguments))
        number = self._words[_ASKED] + 1
        self.wait_until_done(number - ENTRIES)
        self._ring[number % ENTRIES][: len(pickled)] = pickled
        self._words[_ASKED] = number
        futex_wake(self._address + 8 * _ASKED)
        return number

    def call(self, what: str, *arguments: object) -> object:
        """Send a request and wait for the answer. See result."""
        self.wait_until_done(self.ask(what, *arguments))
        return result(self._memory[ANSWER_AT:])

    def is_done(self, number: int) -> bool:
        """Has the pager done this request?"""
        return self._words[_DONE] >= number

    def wait_until_done(self, number: int) -> None:
        """Sleep until the pager has done this request."""
        while (done := self._words[_DONE]) < number:
            futex_wait(self._address + 8 * _DONE, done)

    # ------------------------------------------------------------ the pager's end

    def requests(self) -> Iterator[tuple[str, tuple]]:
        """(what, arguments) of each request. It is done when the next one is asked for. If there
        is none, sleep until there is one, or interrupt is called.

        The application is woken once, after the last request: it asks nothing while it waits.
        """
        futex_wait(self._address + 8 * _ASKED, self._words[_DONE])
        while (number := self._words[_DONE]) != self._words[_ASKED]:
            yield _pickle.loads(self._ring[(number + 1) % ENTRIES])
            self._words[_DONE] = number + 1
        futex_wake(self._address + 8 * _DONE)

    def answer(self, answer: object) -> None:
        """Answer the present request, with at most MAX_ANSWER bytes, or another object of about that size."""
        pickled = _pickle.dumps(answer)
        self._memory[ANSWER_AT : ANSWER_AT + len(pickled)] = pickled

    def interrupt(self) -> None:
        """End the sleep of another thread."""
        futex_wake(self._address + 8 * _ASKED)
