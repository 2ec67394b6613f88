"""Hosts on one machine: network namespaces, for MPI jobs of several machines.

    with Hosts(folder, 3) as hosts:
        job = start(*hosts.command("-m", "edm.examples.eviction", on=["edm-b", "edm-a"]))

The hosts are called edm-a, edm-b, and so on. Each has an IP address, a hostname, System V IPC, /dev/shm
and /sys of its own, and a folder of its own at hosts.local. edm-a is where the launcher runs, and it is
connected to each other one by a veth pair; it forwards between them. All but edm-a have pids of their
own, too, so no process finds one of another host by its pid.

A host is a process which holds these namespaces, and ends when its stdin closes. With the first process of
a pid namespace all of its processes end, and with them the other namespaces, and the links: so nothing
is left, even if the tests are killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import PROGRAMS, has_mpich

from edm.doctor import find_mpirun

NETWORK = "10.213"  # .N.1 is edm-a, and .N.2 the N-th other host

HOLD = """set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount --bind "$3/$1" "$3/local"
mount -t tmpfs none /dev/shm
mount -t sysfs none /sys
ip link set lo up
echo ready
exec cat
"""

UP = "timeout 5 sh -c 'until grep -q -e up -e unknown /sys/class/net/{}/operstate; do sleep 0.005; done'"

AGENT = """#!/bin/sh
# In place of ssh: AGENT [option ...] HOST COMMAND ...
while case $1 in -*) ;; *) false;; esac; do shift; done
pid=$(cat "{folder}/pid-$1")
shift
exec nsenter --target "$pid" --all sh -c "$*"
"""


def missing() -> str:
    """Why there can be no hosts here; "" if there can."""
    if os.getuid():
        return "namespaces need root"
    if lacks := [name for name in ("ip", "unshare", "nsenter") if not shutil.which(name)]:
        return f"there is no {' and no '.join(lacks)}"
    return "" if find_mpirun() else "there is no mpirun: pip install mpich"


class Hosts:
    def __init__(self, folder: Path, count: int, wire: tuple[float, float] | None = None) -> None:
        """wire: between two hosts, its delay of one way (seconds), and which part of the frames is lost.

        Raises OSError, or CalledProcessError, if this machine can't do it; so does `with`."""
        self.folder, self.local = folder, folder / "local"
        self.names = [f"edm-{letter}" for letter in "abcdefgh"[:count]]
        self.pids: list[int] = []
        self._wire = wire
        self._holders: list[subprocess.Popen] = []
        self.local.mkdir()
        others = [f"{NETWORK}.{n}.2 {name}\n" for n, name in enumerate(self.names) if n]
        own = f"127.0.0.1 localhost\n{NETWORK}.1.1 {self.names[0]}\n"
        (folder / "hosts").write_text(own + "".join(others))
        (folder / "agent").write_text(AGENT.format(folder=folder))
        (folder / "agent").chmod(0o755)

    def __enter__(self) -> Any:
        try:
            for name in self.names:
                self._hold(name)
            self._run(0, "echo 1 >/proc/sys/net/ipv4/ip_forward")
            for n in range(1, len(self.names)):
                here, there = f"{NETWORK}.{n}.1", f"{NETWORK}.{n}.2"
                link, end = self._lay_wire(*self._wire) if self._wire else self._link(n)
                self._run(0, f"ip addr add {here}/24 dev {link} && ip link set {link} up")
                self._run(n, f"ip addr add {there}/24 dev {end} && ip link set {end} up")
                self._run(n, f"ip route add default via {here}")
                for host, name in (0, link), (n, end):  # MPI does not use it before
                    self._run(host, UP.format(name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            holder.communicate()

    def _hold(self, name: str) -> None:
        (self.folder / name).mkdir()
        pids = ["--pid", "--mount-proc"] if self._holders else []
        script = ["sh", "-c", HOLD, "sh", name, self.folder / "hosts", self.folder]
        command = ["unshare", "--net", "--uts", "--ipc", "--mount", *pids, "--fork", *script]
        pipe = subprocess.PIPE
        holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._holders.append(holder)
        if holder.stdout.readline() != "ready\n":
            raise OSError(f"a host can't be made: {holder.communicate()[1]}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        self.pids.append(int(children.read_text()))
        (self.folder / f"pid-{name}").write_text(f"{self.pids[-1]}")

    def _link(self, n: int) -> tuple[str, str]:
        """Connect this host to the first one; what the two ends are called."""
        ends = ("netns", self.pids[0], "type", "veth", "peer", "name", "e0")
        _call("ip", "link", "add", f"e{n}", *ends, "netns", self.pids[n])
        return f"e{n}", "e0"

    def _lay_wire(self, *how: float) -> tuple[str, str]:
        program = [sys.executable, PROGRAMS / "wire.py", *self.pids, *how]
        pipe = subprocess.PIPE
        wire = subprocess.Popen(list(map(str, program)), stdin=pipe, stdout=pipe, text=True)
        self._holders.append(wire)
        if wire.stdout.readline() != "ready\n":
            raise OSError("a wire can't be made")
        return "tap0", "tap0"

    def _run(self, host: int, script: str) -> None:
        _call(*self.enter(host), "sh", "-c", script)

    def enter(self, host: int) -> list[str]:
        """What a command line begins with that runs a command there."""
        return ["nsenter", "--target", f"{self.pids[host]}", "--all", f"--wd={os.getcwd()}"]

    def command(self, *arguments: object, on: list[str]) -> list[object]:
        """The command line that runs `python ...` with a rank on each of these hosts, in this order."""
        ranks = ["-n", len(on), sys.executable, *arguments]
        into = [*self.enter(0), find_mpirun()]
        agent = self.folder / "agent"
        if has_mpich():
            options = ["-launcher", "ssh", "-launcher-exec", agent]
            return [*into, *options, "-hosts", ",".join(on), "-ppn", 1, *ranks]
        # All hosts have the same cores: bound to the first one each, their ranks would share that.
        options = ["--prtemca", "plm_ssh_agent", agent, "--bind-to", "none"]
        exported = [part for name in ("PATH", "PYTHONPATH") for part in ("-x", name)]
        return [*into, *options, *exported, "--host", ",".join(f"{name}:1" for name in on), *ranks]

    def host_of(self, pid: int) -> str:
        """On which host this process is."""
        ours = [os.stat(f"/proc/{holder}/ns/net").st_ino for holder in self.pids]
        return self.names[ours.index(os.stat(f"/proc/{pid}/ns/net").st_ino)]


def _call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
