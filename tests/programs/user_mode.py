"""As for a user who may have userfaultfd for user mode only: system calls on a page that is away.

Run by mpirun. Root may have both kinds, so this takes the lesser one.
"""

import os

from edm import uffd_ctypes
from edm.launch import main

CODE = """
import os, threading, edm
try:
    import numpy as np
except ImportError:
    pass
else:
    numbers = np.frombuffer(bytes(np.arange(1 << 20)), np.int64)  # in ordinary memory
    numbers.tofile("numbers")
    for count, right in ((-1, numbers[1:]), (1 << 20, numbers[1:]), (1000, numbers[1:1001])):
        assert np.array_equal(np.fromfile("numbers", np.int64, count, offset=8), right)
    np.save("numbers.npy", numbers)
    assert np.array_equal(np.load("numbers.npy"), numbers)

area = edm.space().mmap(1 << 20)
area[0] = 1  # a page that is here is no matter

def read(begin):
    with open("/dev/zero", "rb", buffering=0) as file:
        file.readinto(area[begin:])

thread = threading.Thread(target=read, args=(edm.PAGE_SIZE,))
thread.start()
thread.join()
read(2 * edm.PAGE_SIZE)
"""


def open_userfaultfd():
    number = uffd_ctypes._NR_userfaultfd[os.uname().machine]
    flags = os.O_CLOEXEC | os.O_NONBLOCK | uffd_ctypes.UFFD_USER_MODE_ONLY
    return uffd_ctypes._libc.syscall(number, flags), uffd_ctypes.USER_MODE


uffd_ctypes.open_userfaultfd = open_userfaultfd
main(["--resident", "16M", "-c", CODE])
