"""A rank of an MPI job: a DMS, or the pager of an instance.

In the picture: what starts both ends of the MPI arrow.

Interface: fork_application(config) is called by every rank of the job, before MPI is initialised. It
returns in the application process of an instance. The parent of an application becomes its pager, and
exits with the application's status. The first Config.dms ranks are the DMSs, which exit when all
instances have ended.

Rules: one process of the job prints a mistake that all ranks have, or that a DMS finds, in one line, before any
application starts. What only one pager can't do its application prints (edm.py), which then ends. The launcher's
signals come to the rank, which passes them on. So the application has a process group of its own.

Every rank forks a child, with a socket pair between them, and sends it one message when MPI is initialised:
the instance's number, if the child is an application; words to print, if the rank is a DMS. None comes if the
rank ends before: then the child ends, too.

The child that a DMS's rank forks is no application. It prints a line when its parent, the DMS, has died. It is
in the parent's process group. A launcher kills that as a whole, so a DMS that the launcher ends is not reported.
One that has exited may be, after the words of EDM or of MPI that say why. MPICH's launcher waits for the end of
this process, too. So its line is there before the job ends.

A DMS has a lifeline for each pager on its machine, and so has its child. When both have ended, the kernel kills
these pagers, which would wait for the DMS forever should the launcher do nothing. Of pagers on other machines only
the launcher knows.
"""

import _thread
import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from typing import Any, NoReturn

from edm import log
from edm.edm import PRINTING, Config, launched, tell
from edm.lifeline import receive, send, socket_pair, tie, untie
from edm.limits import explain, lift
from edm.uffd_ctypes import PAGE_SIZE

# What a launcher sends to a rank, which passes it on to the application. Every rank has these blocked.
ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGALRM
PASSED_ON = *ENDING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
VERSION = 9  # of the messages (messages.py)
TERM_TO_KILL = 3  # seconds from a signal of ENDING until the application is killed


def fork_application(config: Config) -> tuple[Any, int]:
    """In the application, returns the socket that reaches its pager, and the instance's number. Does not
    return in a rank. Raises ValueError if mpi4py.MPI is imported already, OSError if there can't be another
    process.
    """
    if "mpi4py.MPI" in sys.modules:
        raise ValueError("edm: mpi4py.MPI is imported; do that after edm.run, which a job has once")
    for stream in (sys.stdout, sys.stderr):
        print(end="", file=stream, flush=True)  # else both processes would write what is buffered
    ours, theirs = socket_pair()
    if application := os.fork():
        ours.close()
        _run(config, application, theirs)
    theirs.close()
    if launched()[0] < (config.dms or 1):
        _watch(ours)
    os.setpgid(0, 0)
    if (number := receive(ours)[0]) is None:
        os._exit(0)  # the rank has printed why it can't begin
    # The application is no rank: it may use MPI by itself, and so may its children.
    of_rank = re.compile("(?!.*ALLOW_RUN_AS_ROOT)(PMI|OMPI_|PRTE|HYDI|MPI_LOCAL)")
    for name in filter(of_rank.match, list(os.environ)):
        del os.environ[name]
    return ours, number


def _watch(rank: Any) -> NoReturn:
    """Outlive the DMS, our parent, which has the other end of this socket, and print a line if it dies. When it ends
    in order, it kills this process first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    # Nothing comes if it can't begin, and has printed why. The descriptors that come stay open until this process ends.
    if (words := receive(rank)[0]) and not receive(rank)[0]:
        os.setpgid(0, 0)  # the launcher may kill the DMS's group before the line is told
        tell(f"edm: error: {words}")
        time.sleep(PRINTING)  # MPICH's launcher waits for this process
    os._exit(0)


def _run(config: Config, application: int, control: Any) -> NoReturn:
    """Be this rank."""
    lift()
    from edm.pager import SWITCH_INTERVAL, print_error  # not in the application

    # In MPI's threads, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as in spawn_pager of lifeline.py
    try:
        from mpi4py import MPI  # this initialises MPI: not before the fork

        if MPI.COMM_WORLD.size != launched()[1]:  # each rank is alone
            raise RuntimeError("mpirun and mpi4py's MPI library are not of the same kind")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no library
        time.sleep(PRINTING if launched()[0] else 0)  # rank 0 prints it
        os._exit(2 if launched()[0] else print_error(OSError(f"MPI: {error}; see edm doctor")))

    log.start(config.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL)  # in a DMS, faults would wait for a sync that computes
    comm, dms, status = MPI.COMM_WORLD, config.dms or 1, 0
    settings = VERSION, PAGE_SIZE, config.start_addr, config.end_addr, config.keep, dms
    try:
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise OSError("this MPI library has no MPI_THREAD_MULTIPLE; install one that has")
        # Where pids are valid: the inode of a pid namespace, and the boot id of its machine. See
        # namespaces(7), proc(5).
        with open("/proc/sys/kernel/random/boot_id") as file:
            pids_of = os.stat("/proc/self/ns/pid").st_ino, file.read()
        ours = os.uname().nodename, (pids_of, os.getpid()), settings
        hosts, processes, of_each = map(list, zip(*comm.allgather(ours), strict=True))
        if len(set(of_each)) > 1:
            fields = "(version, page size, start_addr, end_addr, keep, DMSs)"
            _begin_with_all(comm, f"instance and DMS differ in {fields}: {of_each}", application)
        if comm.rank < dms:
            _serve_pages(comm, config, hosts[:dms], processes, application, control)
        else:
            status = _page(comm, dms, config, application, control)
    except BaseException as error:  # noqa: BLE001 - it ends this process
        _abort(comm, print_error(error))  # the other ranks may be waiting for this one
    _end(status)


def _serve_pages(
    comm: Any, config: Config, hosts: list[str], processes: list[Any], watching: int, control: Any
) -> None:
    """Be a DMS. hosts: of each DMS. processes: of each rank: where its pid is valid, and the pid."""
    from edm.dms import DMS

    dms, wrong, here = None, None, hosts[comm.rank]
    if config.disk and here in hosts[: comm.rank]:  # an earlier DMS has the path itself
        config = config.__replace__(disk=f"{config.disk}.dms{comm.rank}")
    among_dmss = comm.Create_group(comm.group.Incl(range(len(hosts))))
    try:
        try:
            dms = DMS(comm, len(hosts), config)
        finally:  # the other DMSs wait for this one's offers
            offers = among_dmss.allgather(dms and dms.offers)
        if all(offers) and config.keep and len(hosts) > 1:
            dms.start(offers)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of a thread
        explain(error)
        wrong = str(error)
    _begin_with_all(comm, wrong, watching)
    ours, _ = processes[comm.rank]
    # Each write end has a higher number than its read end, and so is closed before it: see Pager.__init__. The child
    # has them, too, and ends when it has told of the DMS's death: before that, a launcher that sees a pager die might
    # kill it. A message has at most 253 descriptors (SCM_MAX_FD).
    pagers = [tie(pid) for there, pid in processes[len(hosts) :] if there == ours]
    send(control, f"the DMS of rank {comm.rank} on host {here} has died", *sum(pagers[:126], ()))
    comm.alltoall([b""] * len(hosts) + dms.on_disk())
    dms.serve()
    for read, _ in pagers:
        untie(read)
    os.kill(watching, signal.SIGKILL)


def _page(comm: Any, dms: int, config: Config, application: int, control: Any) -> int:
    """Be the pager of an instance. Returns its exit status if it fails, else the application's."""
    from edm.mpi_client import MpiStore
    from edm.pager import LOG, page_for

    def open_store(hello: Any) -> MpiStore:
        hello.ended_by = ended_by
        _begin_with_all(comm, None, application)
        store.on_disk = comm.alltoall([b""] * comm.size)
        return store

    # What may fail is first: then this rank ends the job, and the application does not begin.
    store = MpiStore(comm, dms, config)
    ended_by: list[str] = []
    _thread.start_new_thread(_pass_on, (application, ended_by))
    send(control, comm.rank - dms)
    failed = page_for(control, open_store)
    if failed is None:  # the application has ended, and has printed why
        _begin_with_all(comm, "", application)
    status = os.waitstatus_to_exitcode(os.waitpid(application, 0)[1])
    if status < 0 and not failed:
        LOG.error("the application was killed by signal %d, %s", -status, signal.strsignal(-status))
        return 128 - status
    return failed or status


def _pass_on(application: int, ended_by: list[str]) -> NoReturn:
    """A thread: pass the launcher's signals on to the application, and to its subprocesses, as a terminal does. ended_by
    gets the names of those of ENDING that come. The second one kills the application: TERM_TO_KILL seconds after the
    first, that is SIGALRM."""
    while True:
        number = signal.sigwait(PASSED_ON)
        if number in ENDING:
            ended_by.append(signal.Signals(number).name)
            signal.alarm(TERM_TO_KILL)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(application, signal.SIGKILL if len(ended_by) > 1 else number)


def _begin_with_all(comm: Any, wrong: str | None, child: int) -> None:
    """Return if all ranks are ready. If one is not, print what is wrong, and end all ranks, each with its child.

    wrong: what is wrong with this rank; None if nothing is, "" if the child has ended and printed that.
    """
    of_each = comm.allgather(wrong)
    if any(words is not None for words in of_each):
        if wrong and not any(of_each[: comm.rank]):  # the first one prints it
            tell(f"edm: error: {wrong}")
        if wrong != "":  # an application may wait for the pager's answer, and would report its end
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(PRINTING)
        _end(2)


def _end(status: int) -> NoReturn:
    """End this rank's MPI, and the process without Python's exit functions.

    By exit(3), not _exit(2): if the exit functions of the MPI library do not run, MPICH's launcher
    sometimes kills the other ranks (measured: in 5 jobs of 12).
    """
    from mpi4py import MPI

    MPI.Finalize()
    ctypes.CDLL(None).exit(status)


def _abort(comm: Any, status: int) -> NoReturn:
    """End the whole job, once the launcher has read why: MPICH's may drop what is in its pipes when a rank ends
    (measured, on two busy cores: in 21 jobs of 250; in 1 of 46 whose DMS on another host was killed)."""
    time.sleep(PRINTING)
    comm.Abort(status)
    os._exit(status)  # Abort returns if the launcher was told not to clean up
