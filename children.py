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
adopt(fds) takes a new child, faulting() returns those that have faults, let_go() is for the end.
`uffds` is empty if there are no children.

Rules: the DM-Handler's thread calls faulting. The main thread calls adopt, and let_go when the DM-Handler
has ended.

Sources: userfaultfd(2), pidfd_open(2), fcntl(2) on F_SETSIG and O_ASYNC.
"""

import fcntl
import os
import select

from edm.uffd_ctypes import Userfaultfd


class Children:
    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll  # which other threads may add to
        self.uffds: dict[int, Userfaultfd] = {}  # by descriptor
        self._sent: dict[int, list[int]] = {}  # what each has sent; by pidfd

    def adopt(self, fds: list[int]) -> None:
        """Take a child that has sent these descriptors. If this process had no room for all of them,
        close those that have come, if any: the others are closed already, and the child is killed."""
        if len(fds) < 4:
            for fd in fds:
                os.close(fd)
            return
        process, uffd = fds[:2]
        self._sent[process], self.uffds[uffd] = fds, Userfaultfd(uffd)
        for fd in (uffd, process):  # the pidfd last: the child may have ended
            self._epoll.register(fd, select.EPOLLIN)

    def faulting(self) -> list[Userfaultfd]:
        """The userfaultfds that have messages. Children that have ended are forgotten."""
        ready = [fd for fd, _ in self._epoll.poll(0)]
        for process in self._sent.keys() & set(ready):
            fds = self._sent.pop(process)
            del self.uffds[fds[1]]
            for fd in fds:
                os.close(fd)
        return [self.uffds[fd] for fd in ready if fd in self.uffds]

    def let_go(self, start: int, length: int) -> None:
        """No page comes any more: wake the faults in this range (bytes), and let the children
        live."""
        for _, uffd, lifeline, _ in self._sent.values():
            fcntl.fcntl(lifeline, fcntl.F_SETFL, 0)  # as in lifeline of address_space.py
            self.uffds[uffd].wake(start, length)
