"""A slow wire between two hosts: wire.py PID PID DELAY LOSS, where the pids are processes of the hosts.

What tc's netem does, for kernels without it: each host gets an Ethernet device, tap0, and what goes into one
comes out of the other DELAY seconds later, but for a part of LOSS, which is lost. Ends with its stdin.
"""

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 2, 0x1000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def tap_of(pid):
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP | IFF_NO_PI))
    return tap


pids, (delay, loss) = sys.argv[1:3], map(float, sys.argv[3:])
taps = [tap_of(pid) for pid in pids]
others, under_way = dict(zip(taps, reversed(taps), strict=True)), deque()
poll = select.poll()
for fd in (0, *taps):
    poll.register(fd, select.POLLIN)
print("ready", flush=True)
while True:
    wait = max(0, under_way[0][0] - time.monotonic()) if under_way else 1
    ready = [fd for fd, _ in poll.poll(1e3 * wait if wait > 1e-3 else 0)]
    if 0 in ready:
        sys.exit()
    for tap in ready:
        for _ in range(64):
            try:
                frame = os.read(tap, 1 << 16)
            except BlockingIOError:
                break
            if random.random() >= loss:
                under_way.append((time.monotonic() + delay, others[tap], frame))
    while under_way and under_way[0][0] <= time.monotonic():
        _, tap, frame = under_way.popleft()
        try:
            os.write(tap, frame)
        except OSError:
            continue  # its queue is full, or it is not up: lost, as on a wire
