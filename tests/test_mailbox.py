"""mailbox.py: both ends in this process, each with a thread."""

import ctypes
import errno
import mmap
import signal
import threading

import pytest

from edm import mailbox as m


@pytest.fixture
def memory():
    return mmap.mmap(-1, m.SIZE)


@pytest.fixture
def ends(memory):
    """(the application's end, the pager's end)"""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return m.Mailbox(address), m.Mailbox(address)


@pytest.fixture
def serve(ends):
    """A function that starts the pager's thread: answer(what, ...) gives each answer."""
    _, pager = ends
    ended, threads, seen = threading.Event(), [], []

    def start(answer):
        def work():
            while not ended.is_set():
                for what, arguments in pager.requests():
                    seen.append((what, *arguments))
                    pager.answer(answer(what, *arguments))

        threads.append(threading.Thread(target=work))
        threads[0].start()
        return seen

    yield start
    ended.set()
    while threads and threads[0].is_alive():
        pager.interrupt()
        threads[0].join(0.001)


def echo(what, page, *more):
    return b"%d" % page


@pytest.mark.parametrize("first", [0, (1 << 32) - 200])
def test_requests_are_done_in_order_also_when_the_futexes_begin_again(memory, ends, serve, first):
    application, _ = ends
    memoryview(memory)[:16] = first.to_bytes(8, "little") * 2
    numbers = [application.ask("mapped", page, 1, b"name") for page in range(m.ENTRIES)]
    assert not application.is_done(numbers[0])
    seen = serve(echo)
    for page in range(m.ENTRIES, 1000):  # it waits when the ring is full
        numbers.append(application.ask("mapped", page, 1, b"name"))
    assert application.call("sync", 1000) == b"1000"
    assert all(map(application.is_done, numbers))
    assert seen == [("mapped", page, 1, b"name") for page in range(1000)] + [("sync", 1000)]


def test_the_largest_requests_and_answers_come_whole_and_a_larger_request_is_refused(ends, serve):
    application, _ = ends
    seen = serve(lambda *request: b"x" * m.MAX_ANSWER)
    largest = (1 << 64) - 1, (1 << 64) - 1
    requests = [("mapped", *largest, "\U0001f40d" * m.MAX_NAME), ("prefetch", [largest] * m.RUNS)]
    for request in requests:
        application.ask(*request)
    with pytest.raises(ValueError):
        application.ask("mapped", 0, 1, b"n" * m.ENTRY)
    assert application.call("locations") == b"x" * m.MAX_ANSWER
    assert seen == [*requests, ("locations",)]


def test_an_error_is_raised_with_its_errno_and_text(ends, serve):
    application, _ = ends
    serve(lambda *request: OSError(errno.ENOSPC, "it is full"))
    with pytest.raises(OSError, match="it is full") as caught:
        application.call("sync")
    assert caught.value.errno == errno.ENOSPC


def test_a_call_gets_its_own_answer_though_a_signal_handler_has_ended_the_one_before(ends, serve):
    application, _ = ends
    goes_on = threading.Event()

    def answer(what, page):
        if page == 1:
            goes_on.wait(10)
        return echo(what, page)

    def handler(number, frame):
        raise InterruptedError

    serve(answer)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedError):
            application.call("sync", 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    threading.Timer(0.02, goes_on.set).start()
    assert application.call("sync", 2) == b"2"
