"""A real two-node Slurm on this host for tests: one slurmctld, two slurmd, run by the calling user.

It needs Debian's packages slurmctld and slurmd, and neither root, systemd, munge nor cgroups.
It keeps no account of jobs (no sacct) and does not limit their memory or CPUs.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

# On a cluster the first host name is an address at which the ranks meet; so it is here.
NODES = ("127.0.0.2", "127.0.0.3")

# cred_expire: a requeued job waits that long (2 minutes by default; below 5 is ignored) before it starts again.
# ReturnToService=1: a node set down stays down until it is resumed (with 2 it would be back at once).
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={uid}
SlurmdUser={uid}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
{only_loopback}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobRequeue=1
KillWait=5
MinJobAge=3600
OverTimeLimit=0
ReturnToService=1
NodeName={nodes[0]} NodeHostName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4096
NodeName={nodes[1]} NodeHostName={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4096
PartitionName=debug Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE
"""
# Unused, but looking for the right plugin by itself slurmd fails where /sys/fs/cgroup is not what it expects.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"


class SlurmCluster:
    """Context manager: both nodes are idle when it begins, and no process of it is left when it ends.

    `folder` must not exist yet; configuration, logs and state go there. `env` is the environment for
    sbatch, scontrol and the like. ValueError if the path of the folder has more than 60 characters,
    for slurmd puts unix sockets into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        if len(str(self.folder)) > 60:
            raise ValueError(f"{self.folder} has more than 60 characters: use a shorter path")
        # The tests may themselves run in a Slurm job, whose variables sbatch and srun would read.
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env = outside | {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for name in ("state", *NODES):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        conf = SLURM_CONF.format(
            host=host,
            uid=os.getuid(),
            folder=self.folder,
            ports=_free_ports(3),
            nodes=NODES,
            # The daemons bind to what the host's name resolves to; where that is not loopback they need all addresses.
            only_loopback="CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if _is_loopback(host) else "",
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        try:
            self._start("slurmctld", "-D", log="slurmctld.log")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node, log=f"slurmd-{node}.log")
            self.wait_until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], timeout=30)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a Slurm client prints, for instance `run("squeue", "-h")`; CalledProcessError if it fails."""
        return subprocess.run(
            command, env=self.env, cwd=cwd, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def wait_until(self, condition: Callable[[], bool], *, timeout: float) -> None:
        """Poll `condition` until it holds; TimeoutError after `timeout` seconds, RuntimeError if a daemon ends."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    raise RuntimeError(f"{daemon.args} ended with {daemon.returncode}: see {self.folder}/*.log")
            with contextlib.suppress(subprocess.CalledProcessError):  # until slurmctld listens
                if condition():
                    return
            time.sleep(0.1)
        raise TimeoutError(f"waited {timeout} s: see {self.folder}/*.log")

    def _start(self, *command: str, log: str) -> None:
        env = self.env | {"PATH": os.environ["PATH"] + ":/usr/sbin"}  # the daemons' folder, not in every user's PATH
        with (self.folder / log).open("wb") as file:
            # In a session of its own: Ctrl-C must not end it before its jobs are cancelled.
            daemon = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self._daemons.append(daemon)

    def _stop(self) -> None:
        # Jobs outlive the daemons: cancel them first, as long as there is someone to ask.
        if self._daemons and all(daemon.poll() is None for daemon in self._daemons):
            with contextlib.suppress(subprocess.SubprocessError, RuntimeError, TimeoutError):
                self.run("scancel", "--user", str(os.getuid()))
                self.wait_until(lambda: not self.run("squeue", "-h"), timeout=10)
        # Nobody reads their state again, so the daemons are killed, and with them what scancel did not reach:
        # proctrack/linuxproc does not find a process whose parent has ended.
        while left := _processes_with(f"SLURM_CONF={self.env['SLURM_CONF']}"):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self._daemons:
            daemon.wait()


def _processes_with(variable: str) -> list[int]:
    """Ids of the live processes that have `variable` ("NAME=value") in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or ended meanwhile
            if variable.encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def submit(
    script: Path, arguments: list[str], folder: Path, tools: Path, shown: str = "$*", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a job script as Slurm would in `folder`, with stand-ins in `tools` for its commands; srun prints `shown`."""
    tools.mkdir(exist_ok=True)
    for name, does in (("scontrol", "echo here"), ("srun", f'echo "{shown}"')):
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    job |= {"SLURM_CPUS_PER_TASK": "2", "SLURM_SUBMIT_DIR": str(folder), "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, env=job | variables, cwd=folder, capture_output=True, text=True, check=False)
