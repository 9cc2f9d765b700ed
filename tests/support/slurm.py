"""A Slurm cluster of the test's own, from Debian's package: a controller and two nodes, all on this machine.

Everything stands in a temporary folder: configuration, key, sockets, logs. Needs neither systemd nor cgroups. At the end
the jobs are cancelled and the services end.
"""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.distributed import free_port
from tests.support.programs import slurm
from tests.support.waiting import PATIENCE, until

CONFIGURATION = """
ClusterName=torchslim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MpiDefault=none
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        folder: of everything in it.
        environment: in which Slurm's commands find the cluster.
        port: of the first node, free for a job.
    """

    folder: Path
    environment: dict[str, str]
    port: int

    def call(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def submit(self, script: str, *options: str, cwd: Path) -> str:
        """Submit a job; its id. `options` override those in the script; output goes to `{id}_{task}.out`."""
        path = self.folder / "job.sh"
        path.write_text(script)
        output = f"--output={self.folder}/job-%A_%a.out"
        return self.call("sbatch", "--parsable", f"--chdir={cwd}", output, *options, str(path))

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED, FAILED ... of a job, or of a task "3_1" of an array that has started."""
        text = self.call("scontrol", "show", "job", job, "--oneliner")
        states = {field.partition("=")[2] for field in text.split() if field.startswith("JobState=")}
        return ",".join(sorted(states))

    def finish(self, job: str, seconds: float = PATIENCE) -> str:
        """Wait until a job has ended; its state."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: set(self.state(job).split(",")) <= ended, f"the end of job {job}\n{self.logs()}", seconds)
        return self.state(job)

    def output(self, job: str) -> str:
        """What a job has printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"job-{job}_*.out")))

    def logs(self) -> str:
        """Ends of all logs and outputs, for errors."""
        paths = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(paths))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster; without Slurm the test is skipped, where CI is set it fails instead."""
    programs = slurm()
    host = socket.gethostname().partition(".")[0]
    nodes = (host, f"{host}-second")  # jobs resolve the first name alone
    services: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="torchslim-slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for each in ("state", *nodes):
            (folder / each).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        ports = [free_port() for _ in range(4)]
        user = getpass.getuser()
        configuration = CONFIGURATION.format(host=host, ports=ports, user=user, folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(configuration)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded by slurmd in any case, and not used
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        found = Cluster(folder, environment, ports[3])

        def start(command: Sequence[str | Path], log: str) -> None:
            with (folder / log).open("wb") as output:
                services.append(
                    subprocess.Popen(
                        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                    )
                )

        try:
            files = [f"--{each}-file={folder}/munge.{each}" for each in ("key", "pid", "log", "seed")]
            munged = [programs / "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
            start(munged, "munged.log")
            until((folder / "munge.socket").exists, f"munged: {found.logs()}", 20)
            start([programs / "slurmctld", "-D", "-c"], "slurmctld.log")
            for node in nodes:
                start([programs / "slurmd", "-D", "-N", node], f"{node}.log")

            def ready() -> bool:
                with suppress(RuntimeError):
                    return found.call("sinfo", "--noheader", "--states=idle", "--format=%D") == "2"
                return False

            until(ready, f"two idle nodes\n{found.logs()}", 60)
            yield found
        finally:
            with suppress(Exception):
                found.call("scancel", "--user", user, "--signal=KILL", "--full")
                found.call("scancel", "--user", user)
                until(lambda: not found.call("squeue", "--noheader"), "an empty queue", 20)
            for service in reversed(services):
                service.terminate()
            for service in services:
                try:
                    service.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    service.kill()
                    service.wait()
            end_all(folder)


def end_all(folder: Path) -> None:
    """Kill what the cluster has started and has not ended, such as steps of a job whose node is gone."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)
