"""Children: the processes that the application has forked, as the pager sees them.

In the picture: further applications, whose mapping of the memfd is private. address_space.py has their
end. A page that a child misses is brought into the memfd as if the application had read it, with the
application's userfaultfd. The child is woken with its own, tries again, and finds the page in the memfd.
LPET knows nothing of children: what they wrote are copies of their own, and what they only read leaves
their page tables with the hole that it punches.

A child sends four descriptors: its pidfd, its userfaultfd, and both ends of its lifeline, a pipe. As
long as both ends are open, the kernel kills the child when the pager is killed, as its next fault would
hang. With the read end, the pager switches that off if it ends in order: then the application has ended,
and the child may never touch its memory again. A child that has become another program by exec is
killed with the pager, too.

Interface: Children(epoll): the DM-Handler's, which wakes at a child's fault, or end. adopt(fds);
faulting(), which of them have faults to be read; let_go() at the end. `uffds` is empty if there are no
children.

Rules: the DM-Handler's thread; but adopt is for any thread, one at a time, and let_go for the main one
when the DM-Handler has ended.

Sources: userfaultfd(2), pidfd_open(2), fcntl(2) on F_SETSIG and O_ASYNC.
"""

from __future__ import annotations

import fcntl
import os
import select

from edm.uffd_ctypes import Userfaultfd


class Children:
    FDS = 4  # descriptors that a child sends

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll  # which other threads may add to
        self.uffds: dict[int, Userfaultfd] = {}  # by descriptor
        self._sent: dict[int, list[int]] = {}  # by pidfd

    def adopt(self, fds: list[int]) -> None:
        """From now on there is this child, which has sent these. Fewer than it sent: there is room for
        no more here. They are closed, and so is what got lost of them, so that the child is killed."""
        if len(fds) < self.FDS:
            for fd in fds:
                os.close(fd)
            return
        process, uffd = fds[:2]
        self._sent[process], self.uffds[uffd] = fds, Userfaultfd(uffd)
        for fd in (uffd, process):  # the pidfd last: the child may have ended
            self._epoll.register(fd, select.EPOLLIN)

    def faulting(self) -> list[Userfaultfd]:
        """Those whose faults wait to be read. Those that have ended are forgotten."""
        ready = [fd for fd, _ in self._epoll.poll(0)]
        for process in self._sent.keys() & set(ready):
            fds = self._sent.pop(process)
            del self.uffds[fds[1]]
            for fd in fds:
                os.close(fd)
        return [self.uffds[fd] for fd in ready if fd in self.uffds]

    def let_go(self, start: int, length: int) -> None:
        """Nobody brings pages any more: those who wait for one in this range (bytes) try again."""
        for _, uffd, lifeline, _ in self._sent.values():
            fcntl.fcntl(lifeline, fcntl.F_SETFL, 0)  # its end is no accident
            self.uffds[uffd].wake(start, length)
