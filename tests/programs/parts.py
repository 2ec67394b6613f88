"""Which processes of EDM's a job has, and whether they agree. For the other programs here."""

import os
import time

from edm.edm import launched


def tell(path):
    """Before edm.run: a rank that will be the DMS tells its process id in this file."""
    rank, ranks = launched()
    if ranks > 1 and rank == 0:
        with open(path, "w") as file:
            print(os.getpid(), file=file)


def pids(space, path):
    """In the application: the pager's, LPET's if it is a process of its own, and the DMS's."""
    figures = space.figures()
    found = {figures["pager_pid"], figures["lpet_pid"]}
    if launched()[1] > 1:
        with open(path) as file:
            found.add(int(file.read()))
    return sorted(found)


def check_resident(space):
    """What the pager counts is what the SPT says; soon, as LPET goes on while the application does."""
    deadline = time.monotonic() + 10
    while True:
        there = [at for area in space.areas() for at in space.locations(*area)]
        if space.figures()["resident"] == there.count("INSTANCE_0"):
            return
        assert time.monotonic() < deadline, (space.figures(), there)
