"""Lifeline: how an application and its pager find each other, and notice each other's end.

In the picture: the arrow from the application to the pager, where it begins and where it ends.

Interface:
    for edm.py, rank.py        spawn_pager, socket_pair
    for what has to be killed  tie(pid); untie
    for both ends              send, try_to_send, receive
                               high; closed_by, is_open: descriptors in a program that may close them

One socket pair connects application and pager. A message is a pickle, and may carry descriptors. The application's
first one is HELLO, a dictionary: the settings, and more, with descriptors. The pager answers with its process id,
when it serves, or with the OSError or ValueError why not. The second message carries the listener of
system_calls.py, if there is one. After that calls go by the mailbox (mailbox.py), and only forked children send by
the socket. The application sees its end when the pager has ended. The answer stays in it with two descriptors, and
children peek at them: the memfd, and the read end of the lifeline, a pipe.

Each end notices the end of the other. The pager polls a pidfd. It has the only write end of the lifeline, and
the kernel kills the application when that is closed: its next fault would hang forever. Each process that the
application forks makes a lifeline of its own, and sends the pager both ends of it (children.py). When the
application has ended, the pager truncates the memfd, and unties the application's children. From then on they get
a SIGBUS when they touch its memory. Over MPI a DMS has a lifeline for each pager on its machine (rank.py).

Rules: the application imports this module, so it imports little. The DM-Handler calls no function of it.

Sources: unix(7), fcntl(2) on F_SETOWN, F_SETSIG and O_ASYNC, posix_spawn(3).
"""

import _pickle
import _signal
import _socket
import contextlib
import ctypes
import fcntl
import os
import posix  # os, without what a program puts there: a forked child uses only this
import sys

MAX_HELLO = 1 << 18  # bytes of a message at most, and as many for its descriptors
HIGH = 512  # the lowest number of a descriptor that stays open: programs use the low ones
# Flags of sendmsg(2) that no program uses: MSG_CONFIRM has no effect here. See system_calls.py.
UNFILTERED = _socket.MSG_NOSIGNAL | _socket.MSG_CONFIRM

# ---------------------------------------------------------------- the beginning

# What the spawned interpreter runs. It finds edm.py, which is the package then, in the folder where that was
# found here. With -I -S, neither the environment nor the current folder can change that.
_BOOT = "import sys; sys.path.append(sys.argv[1]); from edm.pager import spawned; spawned()"


def spawn_pager() -> _socket.socket:
    """Start a pager that is not a child of this process; the socket that connects to it, for Space.

    Descriptor 2 must be open: the pager inherits it. Raises OSError if there can't be another process.
    """
    ours, theirs = socket_pair()
    command = [sys.executable, "-I", "-S", "-c", _BOOT, os.path.dirname(os.path.abspath(__file__))]
    environment = {name: os.environ[name] for name in os.environ if name}  # not "": it is refused
    # Its standard output is standard error, too. dup2(2, 2) clears close-on-exec: posix_spawn(3).
    actions = [(os.POSIX_SPAWN_DUP2, fd, its) for fd, its in ((theirs.fileno(), 0), (2, 1), (2, 2))]
    # All signals are blocked: it ends when the application does, and may be sent what is meant for that. None is
    # ignored, as the program may ignore SIGCHLD: the pager waits for LPET.
    how = dict.fromkeys(("setsigmask", "setsigdef"), _signal.valid_signals())
    pending = _signal.sigpending()
    pid = os.posix_spawn(sys.executable, command, environment, file_actions=actions, **how)
    theirs.close()
    # ECHILD: the program ignores SIGCHLD, or another of its threads waits for any child.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    # The program has blocked it, and expects none.
    if _signal.SIGCHLD in _signal.sigpending() - pending:
        _signal.sigtimedwait([_signal.SIGCHLD], 0)
    return ours


def socket_pair() -> tuple[_socket.socket, _socket.socket]:
    """The two ends of a connection between an application and its pager."""
    ends = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    return tuple(_socket.socket(fileno=high(end.detach())) for end in ends)


def send(control: _socket.socket, message: object, *fds: int) -> None:
    """Send a message, which is pickled, with descriptors."""
    control.settimeout(None)  # the program may have set a default
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, (ctypes.c_int * len(fds))(*fds))]
    control.sendmsg([_pickle.dumps(message)], ancillary, UNFILTERED)


def receive(control: _socket.socket, flags: int = 0) -> tuple[object, list[int]]:
    """A message and its descriptors; None and none if the other end is closed."""
    control.settimeout(None)  # as in send
    flags |= _socket.MSG_CMSG_CLOEXEC
    while True:
        # The other end was closed with messages unread: this error comes once, before its messages.
        with contextlib.suppress(ConnectionResetError):
            content, sent, _, _ = control.recvmsg(MAX_HELLO, MAX_HELLO, flags)
            message = _pickle.loads(content) if content else None
            return message, memoryview(sent[0][2]).cast("i").tolist() if sent else []


def try_to_send(control: _socket.socket, message: object, *fds: int) -> None:
    """As send, but nothing happens if the other end is closed."""
    with contextlib.suppress(ConnectionError):
        send(control, message, *fds)


# ---------------------------------------------------------------- the end


def tie(pid: int) -> tuple[int, int]:
    """The read end of a pipe, and the write end. The kernel kills the process pid when the last process that has the
    write end has closed it, as long as the read end is open in any."""
    read, write = map(high, posix.pipe2(os.O_CLOEXEC))
    fcntl.fcntl(read, fcntl.F_SETOWN, pid)
    fcntl.fcntl(read, fcntl.F_SETSIG, _signal.SIGKILL)
    fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
    return read, write


def untie(read: int) -> None:
    """From here on, the end of this pipe kills nobody."""
    fcntl.fcntl(read, fcntl.F_SETFL, 0)


# ---------------------------------------------------------------- descriptors in a program


def high(fd: int) -> int:
    """Move the descriptor to a number of at least HIGH, if RLIMIT_NOFILE allows that."""
    with contextlib.suppress(OSError):
        low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)
        posix.close(low)
    return fd


def closed_by(stack: contextlib.ExitStack, fd: int) -> int:
    """Have the stack close this descriptor, unless the program has, and return it."""
    inode = posix.fstat(fd).st_ino
    stack.callback(lambda: is_open(fd, inode) and posix.close(fd))
    return fd


def is_open(fd: int, inode: int) -> bool:
    """False if the program has closed this descriptor. Its number may be another file's now."""
    with contextlib.suppress(OSError):  # EBADF
        return posix.fstat(fd).st_ino == inode
    return False
