"""Children: the processes that the application has forked, as the pager sees them.

In the picture: further applications, whose mapping of the memfd is private. address_space.py has
their end. A page that a child misses comes into the memfd as if the application had read it, by the
application's userfaultfd. The child is woken by its own, tries again, and finds the page in the
memfd. LPET knows nothing of children: pages that they have written are copies of their own, and the
hole that it punches takes the others out of their page tables.

A child sends four descriptors: its pidfd, its userfaultfd, and both ends of its lifeline, a pipe.
When the pager is killed, the write end, the only one, is closed, and the kernel kills the child,
whose next fault would hang. When the application has ended, the pager switches this off with the
read end before it ends: the child goes on if it does not touch the memory. A child that has executed
another program is killed with the pager, too.

Interface: Children(epoll) is the DM-Handler's, whose epoll wakes it when a child faults or ends.
adopt(fds) takes a new child, faulting() returns the userfaultfds of those that have faults, let_go() is
for the end. `sent` is empty if there are no children.

Rules: the DM-Handler's thread calls faulting. The main thread calls adopt, and let_go when the DM-Handler
has ended.

Sources: userfaultfd(2), pidfd_open(2).
"""

import os
import select

from edm.lifeline import untie
from edm.uffd_ctypes import Userfaultfd


class Children:
    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll  # which other threads may add to
        self.sent: dict[int, list[int]] = {}  # by pidfd: the descriptors that each child has sent

    def adopt(self, fds: list[int]) -> None:
        """Take a child that has sent these descriptors. If this process had no room for all of them,
        close those that have come, if any: the others are closed already, and the child is killed."""
        if len(fds) < 4:
            for fd in fds:
                os.close(fd)
            return
        process, uffd, _, _ = fds
        self.sent[process] = fds
        for fd in (uffd, process):  # the pidfd last: the child may have ended
            self._epoll.register(fd, select.EPOLLIN)

    def faulting(self) -> list[Userfaultfd]:
        """The userfaultfds that have messages. Children that have ended are forgotten."""
        ready = {fd for fd, _ in self._epoll.poll(0)}
        for process in self.sent.keys() & ready:
            for fd in self.sent.pop(process):
                os.close(fd)
        # A copy: adopt may add a child meanwhile.
        return [Userfaultfd(uffd) for _, uffd, _, _ in self.sent.copy().values() if uffd in ready]

    def let_go(self, start: int, length: int) -> None:
        """No page comes any more: wake the faults in this range (bytes), and let the children
        live."""
        for _, uffd, lifeline, _ in self.sent.values():
            untie(lifeline)
            Userfaultfd(uffd).wake(start, length)
