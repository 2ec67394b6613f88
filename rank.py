"""A rank of an MPI job: the DMS, or the pager of an instance.

In the picture: what starts both ends of the MPI arrow.

Interface: fork_application(config) is called by every rank of the job, before MPI is initialised. It
returns in the application process of an instance, and in the DMS's rank when the job has ended. The
parent of an application becomes its pager, and exits with the application's status. end(status) ends a
rank that runs no program.

Rules: a mistake is told in one line, by one process of the job, before any application starts: either
by the application (edm.py), which hears of it from its pager, or by the DMS's rank. Signals of a
launcher come to the rank, which hands them on (Pager.end_by); so the application has a process group
of its own.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import stat
import sys
import termios
import time
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from edm import address_space, log
from edm.edm import TELLING
from edm.messages import DMSGone

if TYPE_CHECKING:
    from edm.edm import Config

READ = 0.3  # seconds that a launcher has to read a message, at most


def fork_application(config: Config) -> tuple[Any, int] | None:
    """In the application: the socket that reaches its pager, and the instance's number.

    None in the DMS's rank, when every instance has ended.
    """
    if "mpi4py.MPI" in sys.modules:
        raise ValueError("edm: mpi4py.MPI is imported already; import it after edm.run, if ever")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # else both would write it
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    application = os.fork()
    if application:
        ours.close()
        _Rank(config, application, socket.socket(fileno=theirs.detach())).run()
        return None
    theirs.close()
    os.setpgid(0, 0)
    instance = ours.recv(1)
    if not instance:
        os._exit(0)  # this rank is the DMS, or has told why it can't be what it is to be
    return ours, instance[0]


class _ToldElsewhere(Exception):
    """The job can't begin, and another process of it tells why."""


class _Rank:
    def __init__(self, config: Config, application: int, control: socket.socket) -> None:
        self._config, self._application, self._control = config, application, control

    def run(self) -> None:
        """Returns if this was the DMS, and the job has ended as it should."""
        from mpi4py import MPI  # this initialises MPI: not before the fork

        world, began = MPI.COMM_WORLD, False
        try:
            if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
                raise OSError(
                    "edm: this MPI library has no MPI_THREAD_MULTIPLE; install one that has"
                )
            comm = world.Dup()
            make = self._make_dms if comm.rank == 0 else self._receive_application
            role = self._make_with_all(MPI, comm, make)
            began = True
            role()
            if comm.rank == 0:
                return
            status = self._applications_status()
        except _ToldElsewhere:
            time.sleep(TELLING)
            status = 2
            if world.rank:  # the DMS's has waited for its child already
                ended = os.waitpid(self._application, 0)[1]
                status = max(0, os.waitstatus_to_exitcode(ended)) or 2
        except (ValueError, OSError) as error:
            print(f"edm: error: {error.args[-1] if began else error}", file=sys.stderr)
            if began and world.rank == 0:
                _abort(world, 2)
            self._control.close()
            status = 2
        except BaseException as error:  # noqa: BLE001 - it ends this process
            # Another rank may be waiting for this one: end the job rather than hang.
            if isinstance(error, DMSGone):
                print(f"edm: error: {error}", file=sys.stderr)
            elif isinstance(error, MPI.Exception):
                reason = str(error).splitlines()[-1]
                print(f"edm: error: MPI: {reason}; a process of the job has died?", file=sys.stderr)
            else:
                traceback.print_exc()
            _abort(world, 1)
        end(status)

    def _make_with_all(self, MPI: Any, comm: Any, make: Any) -> Any:
        """Make this rank's role, if every rank can make its own."""
        failure = role = None
        try:
            role = make(comm)
        except (ValueError, OSError, _ToldElsewhere) as error:
            failure = error
        ready = bytearray([failure is None])
        comm.Allreduce(MPI.IN_PLACE, [ready, MPI.BYTE], MPI.BAND)
        if failure:
            raise failure
        if not ready[0]:
            if comm.rank:  # it waits for an answer, and would tell that there is none
                os.kill(self._application, signal.SIGKILL)
            raise _ToldElsewhere
        return role

    def _make_dms(self, comm: Any) -> Any:
        from edm.dms import DMS

        self._control.close()  # the child that was forked here has nothing to do
        os.waitpid(self._application, 0)
        config = self._config
        return DMS(comm, config.disk, config.start_addr, config.end_addr, config.keep).serve

    def _receive_application(self, comm: Any) -> Any:
        client_log = log.logger("EDM CLIENT")
        client_log.debug("INIT")
        instance = comm.rank - 1
        self._control.send(bytes([instance]))
        hello, fds = address_space.receive_hello(self._control)
        if not fds:
            raise _ToldElsewhere  # the application has ended, and has said why
        client_log.info("userfaultfd permitted by: %s", hello["how"])
        rank_path = str(instance) if comm.size > 2 else ""

        def page() -> None:
            from edm.mpi_client import MpiStore
            from edm.pager import Pager

            config = self._config
            store = MpiStore(comm, 0, config.start_addr, config.end_addr)
            try:
                pager = Pager(config, hello, fds, self._control, store, False, instance, rank_path)
            except BaseException:
                store.close()
                raise
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, frame: pager.end_by(number))
            pager.run()
            client_log.debug("SHUTDOWN!")

        def page_or_refuse() -> None:
            try:
                page()
            except (ValueError, OSError) as error:
                with contextlib.suppress(OSError):  # it serves already, and has closed the socket
                    address_space.send_refusal(self._control, error)
                    raise _ToldElsewhere from None
                raise

        return page_or_refuse

    def _applications_status(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self._application, 0)[1])
        if status < 0:
            name = signal.Signals(-status).name
            log.logger("EDM CLIENT").error("the application was killed by %s", name)
            return 128 - status
        return status


def end(status: int) -> NoReturn:
    """End this rank as MPI wants it, and Python does not notice.

    By exit(3), and not _exit(2): MPICH's launcher kills the other ranks now and then if the library's
    exit functions have not run (measured: 5 jobs of 12).
    """
    from mpi4py import MPI

    sys.stderr.flush()
    MPI.Finalize()
    ctypes.CDLL(None).exit(status)


def _abort(world: Any, status: int) -> NoReturn:
    """End the whole job, but not before the launcher has read why.

    What is in its pipes when MPI_Abort tells it to end, MPICH's throws away (measured: in 21 jobs
    of 250, with both cores taken).
    """
    sys.stderr.flush()
    deadline = time.monotonic() + READ
    while any(map(_unread, (1, 2))) and time.monotonic() < deadline:
        time.sleep(0.001)
    world.Abort(status)
    os._exit(status)  # a launcher that was told not to clean up lets Abort return


def _unread(descriptor: int) -> int:
    """How many bytes nobody has read yet, if it is a pipe; else 0."""
    waiting = array.array("i", [0])
    with contextlib.suppress(OSError):  # it is closed
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
    return waiting[0]
