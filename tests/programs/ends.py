"""The ways in which an application ends: ends.py return | raise | message | exit N | _exit | exec | kill."""

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
    thread = threading.Thread(target=print, args=("thread ran",), kwargs={"flush": True})
    thread.start()
    if sys.argv[1] in ("_exit", "exec", "kill"):
        thread.join()
    match sys.argv[1:]:
        case ["raise"]:
            raise RuntimeError("boom")
        case ["exit", status]:
            sys.exit(int(status))
        case ["message"]:
            sys.exit("ended with words")
        case ["_exit"]:
            os._exit(4)
        case ["exec"]:
            code = "print('another program', flush=True); raise SystemExit(5)"
            os.execv(sys.executable, [sys.executable, "-c", code])
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
    print("application's last words")  # no flush: ending does that


edm.run(app, edm.Config(high_threshold=4))
print("run returned")
