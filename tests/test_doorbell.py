"""doorbell.py: a byte in a pipe without a name."""

import threading
import time

from edm.doorbell import LAST_WORDS, Bell, Doorbell


def test_a_bell_wakes_the_doorbell_it_was_made_for():
    doorbell = Doorbell()
    bell = Bell(doorbell.address())
    assert not doorbell.rung() and not doorbell.wait(0)
    bell.ring()
    assert doorbell.wait(10) and doorbell.rung() and not doorbell.rung()
    doorbell.close()
    bell.ring()  # there is nobody any more: that is no error here


def test_a_bell_is_broken_when_the_doorbell_has_been_gone_for_a_while_whoever_asks():
    doorbell = Doorbell()
    bell = Bell(doorbell.address())
    stop, failed = threading.Event(), []

    def ask():
        while not stop.is_set():
            try:
                if bell.is_broken():
                    failed.append("broken too early")
            except RuntimeError as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert not stop.wait(0.5) and not failed
    stop.set()
    for thread in threads:
        thread.join()
    doorbell.close()
    began = time.monotonic()
    while not bell.is_broken():
        assert time.monotonic() - began < LAST_WORDS + 5
    assert time.monotonic() - began >= LAST_WORDS
