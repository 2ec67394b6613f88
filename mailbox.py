"""Mailbox: what the application asks of the pager, in memory that both map.

In the picture: the arrow from the application to the pager that is no page fault. A socket would be a
descriptor in a program that knows nothing of it, and may close it: this has none.

Interface: Mailbox(address), made by both ends of the same memory.
    the application     ask(what, page, count, name); call(what, page, count) waits for the answer
    the pager           wait() in a thread of its own; requests(); answer_with(number, ...)

The memory: four u32, then a ring of ENTRIES requests, then one answer.

    asked      how many requests were written so far, modulo 1 << 32: their number
    taken      how many of them the pager has read
    answered   the number of the last one that was answered
    freed      the number of the last FREE or RELEASE that is done

`asked`, `taken` and `answered` are futexes: who waits for one to change sleeps in futex(2).

Rules: one thread at a time asks, and one call at a time is answered. Python runs other threads and
signal handlers while a thread waits here.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from struct import Struct

from edm.uffd_ctypes import PAGE_SIZE, futex_wait, futex_wake

MAPPED, FREE, RELEASE, LOCATIONS, FIGURES, SYNC, END, CLOSE, PREFETCH, FORGET = range(10)

REQUEST = Struct("=BxHxxxxQQ")  # what, bytes of the name, first page, count of pages
ANSWER = Struct("=iI")  # 0, or an errno and then a text; bytes
ENTRY = 256  # bytes: a REQUEST and an area's name, or RUNS
ENTRIES = 128
RING = PAGE_SIZE  # where it begins
ANSWERED = RING + ENTRIES * ENTRY  # where the answer is
CONTENT = ANSWERED + ANSWER.size
MAX_ANSWER = 1 << 16  # bytes of a content
SIZE = -(-(CONTENT + MAX_ANSWER) // PAGE_SIZE) * PAGE_SIZE  # bytes of the memory
NUMBERS = 1 << 32
RUN = Struct("=II")  # of PREFETCH and FORGET: first page, count of pages
RUNS = (ENTRY - REQUEST.size) // RUN.size

_ASKED, _TAKEN, _ANSWERED, _FREED = range(4)


class Mailbox:
    def __init__(self, address: int) -> None:
        """address: in this process, of SIZE bytes that both ends share."""
        self._address = address
        memory = self._memory = memoryview((ctypes.c_ubyte * SIZE).from_address(address)).cast("B")
        self._words = memory[:16].cast("I")
        self._left = 0  # the number of a call whose answer was not waited for to the end

    # ------------------------------------------------------------ the application's end

    def ask(self, what: int, page: int = 0, count: int = 0, name: bytes = b"") -> int:
        """Send a request; its number. Waits only while the ring is full."""
        words, name = self._words, name[: ENTRY - REQUEST.size]
        number = (words[_ASKED] + 1) % NUMBERS
        while (number - words[_TAKEN]) % NUMBERS > ENTRIES:
            self._wait(_TAKEN, words[_TAKEN])
        at = RING + number % ENTRIES * ENTRY
        REQUEST.pack_into(self._memory, at, what, len(name), page, count)
        self._memory[at + REQUEST.size : at + REQUEST.size + len(name)] = name
        self._set(_ASKED, number)
        return number

    def call(self, what: int, page: int = 0, count: int = 0) -> bytes:
        """Send a request, and wait for the answer. Raises OSError with the pager's errno and text."""
        if self._left:  # by a signal handler; the call goes on
            self._wait_for_answer(self._left)
        self._left = number = self.ask(what, page, count)
        self._wait_for_answer(number)
        error, length = ANSWER.unpack_from(self._memory, ANSWERED)
        content = bytes(self._memory[CONTENT : CONTENT + length])
        self._left = 0
        if error:
            raise OSError(error, content.decode())
        return content

    def _wait_for_answer(self, number: int) -> None:
        while (answered := self._words[_ANSWERED]) != number:
            self._wait(_ANSWERED, answered)

    def is_freed(self, number: int) -> bool:
        """Is this FREE or RELEASE done? They are done in order."""
        return (self._words[_FREED] - number) % NUMBERS < NUMBERS // 2

    # ------------------------------------------------------------ the pager's end

    def wait(self, seen: int) -> int:
        """Sleep until there are others than the first `seen` requests; how many there are."""
        self._wait(_ASKED, seen)
        return self._words[_ASKED]

    def requests(self) -> Iterator[tuple[int, int, int, int, bytes]]:
        """(what, number, page, count, name) of each request that was not read yet."""
        words = self._words
        while (number := words[_TAKEN]) != words[_ASKED]:
            number = (number + 1) % NUMBERS
            at = RING + number % ENTRIES * ENTRY
            what, length, page, count = REQUEST.unpack_from(self._memory, at)
            name = bytes(self._memory[at + REQUEST.size : at + REQUEST.size + length])
            self._set(_TAKEN, number)
            yield what, number, page, count, name

    def answer_with(self, number: int, content: bytes = b"", error: int = 0) -> None:
        """Answer a request; error: an errno, whose text is the content."""
        content = content[:MAX_ANSWER]
        ANSWER.pack_into(self._memory, ANSWERED, error, len(content))
        self._memory[CONTENT : CONTENT + len(content)] = content
        self._set(_ANSWERED, number)

    def freed(self, number: int) -> None:
        self._words[_FREED] = number

    def refuse(self, number: int, error: OSError) -> None:
        """answer_with what was raised."""
        self.answer_with(number, str(error.strerror or error).encode(), error.errno or errno.EIO)

    def interrupt(self) -> None:
        """End a wait() that is under way: it tells that nothing has come."""
        futex_wake(self._address + 4 * _ASKED)

    # ------------------------------------------------------------ both

    def _set(self, word: int, value: int) -> None:
        self._words[word] = value
        futex_wake(self._address + 4 * word)

    def _wait(self, word: int, value: int) -> None:
        futex_wait(self._address + 4 * word, value)
