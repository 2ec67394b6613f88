"""The ways in which an application ends: ends.py raise | exit N | kill | return | message."""

import atexit
import os
import signal
import sys
import threading

import edm


def app(space):
    area = space.mmap(10 * edm.PAGE_SIZE)
    area[5000] = 1
    atexit.register(print, "exit function ran")
    threading.Thread(target=print, args=("thread ran",)).start()
    match sys.argv[1:]:
        case ["raise"]:
            raise RuntimeError("boom")
        case ["exit", status]:
            sys.exit(int(status))
        case ["message"]:
            sys.exit("ended with words")
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
    print("application's last words")  # no flush: ending does that


edm.run(app, edm.Config(high_threshold=4))
print("run returned")
