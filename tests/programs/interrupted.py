"""A signal handler raises while a space begins, or ends. The program catches that, and begins another one.

interrupted.py start|end DISK
"""

import os
import sys
import time

import edm
from edm import mailbox


class Interrupt(Exception):
    pass


def interrupt(module, name):
    """The next call of this function raises, when it has done its work."""
    function = getattr(module, name)

    def interrupted(*arguments):
        setattr(module, name, function)
        function(*arguments)
        raise Interrupt

    setattr(module, name, interrupted)


def first(space):
    space.mmap(edm.PAGE_SIZE)[0] = 7
    if where == "end":
        interrupt(os, "read")


def second(space):
    area = space.mmap(edm.PAGE_SIZE)
    assert area[0] == (7 if where == "end" else 0)
    area[0] = 8


where, disk = sys.argv[1:]
config = edm.Config(high_threshold=16, disk=disk, keep=True, log_level="error")
if where == "start":
    interrupt(mailbox, "result")  # of HELLO
try:
    edm.run(first, config)
except Interrupt:
    print("interrupted")
deadline = time.monotonic() + 10
while True:
    try:
        edm.run(second, config)
        break
    except ValueError as error:  # the pager of the first one has the disk, for a moment
        assert "in use by another job" in str(error) and time.monotonic() < deadline, error
        time.sleep(0.01)
print("SUCCESS")
