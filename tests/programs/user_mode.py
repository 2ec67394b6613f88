"""As for a user who may have userfaultfd for user mode only, where there can't be a seccomp filter either:
system calls on a page that is away.

Root may have both, so this takes the lesser one, and refuses the other.
"""

import os
import sys
import threading

from edm import system_calls, uffd_ctypes
from edm.edm import PAGE_SIZE, Config, start
from edm.numpy_mem_handler import numpy_allocator


def open_userfaultfd():
    number = uffd_ctypes._NR_userfaultfd
    flags = os.O_CLOEXEC | os.O_NONBLOCK | uffd_ctypes.UFFD_USER_MODE_ONLY
    return uffd_ctypes._libc.syscall(number, flags), uffd_ctypes.USER_MODE


def listener(*arguments):
    raise PermissionError


def arrays_are_read_from_files(np):
    numbers = np.frombuffer(bytes(np.arange(1 << 20)), np.int64)  # in ordinary memory
    numbers.tofile("numbers")
    with numpy_allocator():
        for count, right in ((-1, numbers[1:]), (1 << 20, numbers[1:]), (1000, numbers[1:1001])):
            assert np.array_equal(np.fromfile("numbers", np.int64, count, offset=8), right)
        np.save("numbers.npy", numbers)
        assert np.array_equal(np.load("numbers.npy"), numbers)


def read(begin):
    with open("/dev/zero", "rb", buffering=0) as file:
        file.readinto(area[begin:])


uffd_ctypes.open_userfaultfd, system_calls.listener = open_userfaultfd, listener
area = start(Config(high_threshold=4096)).mmap(1 << 20)
assert sys.excepthook is sys.__excepthook__, "the code module compares them"
try:
    import numpy
except ImportError:
    pass
else:
    arrays_are_read_from_files(numpy)
area[0] = 1  # a page that is here is no matter
thread = threading.Thread(target=read, args=(PAGE_SIZE,))
thread.start()
thread.join()
read(2 * PAGE_SIZE)
