"""SLURM: what is submitted, by a stub that records it, and a real cluster of one node where it is installed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.scale import launching
from bigram_circuits.scale.folder import DONE, QUEUED, WAITING
from bigram_circuits.scale.worker import Worker
from tests.scale.conftest import GRID

SLURM = '[slurm]\npartition = "short"\ntime = 90\nmem = "8GB"\ncpus = 2\ngpus = 0\nparallel = 3\nslurm_qos = "low"\n'
STUBS = {
    "sbatch": 'cp "$1" "$STUB/submitted-$(ls "$STUB" | wc -l).sh"; echo "Submitted batch job 41"',
    "squeue": 'cat "$STUB.queue"',
    "srun": "exit 1",
    "scancel": "exit 0",
    "sacct": "exit 1",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A SLURM that writes down what it is given, and has in its queue what the test says."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir()
    record.mkdir()
    for name, script in STUBS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "record.queue").write_text("")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("STUB", str(record))
    return record


def test_an_array_is_submitted_once_and_says_how_far_it_is(cluster, project, tmp_path, capsys):
    spec = project / "cluster.toml"
    spec.write_text(GRID + SLURM)
    command = ["sweep", str(spec), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--launcher", "slurm"]) == 0
    assert "submitted 4 jobs, 41_0 to 41_3" in capsys.readouterr().out
    (script,) = (path.read_text() for path in cluster.iterdir())
    wanted = (
        "array=0-3%3", "time=90", "partition=short", "mem=8GB", "cpus-per-task=2", "gpus-per-node=0", "qos=low",
        "requeue", "job-name=sweep", "open-mode=append",
    )  # fmt: skip
    for one in wanted:
        assert re.search(rf"^#SBATCH --{one}$", script, re.MULTILINE), one
    assert re.search(r"^#SBATCH --signal=\S+@\d+$", script, re.MULTILINE)
    assert "submitit.core._submit" in script
    assert [one.status for one in bc.load_sweep(tmp_path / "out").runs] == [WAITING] * 4  # it is not in the queue
    queue = cluster.with_suffix(".queue")
    queue.write_text("41_0\n41_1\n41_2\n41_3\n")
    assert cli.main([*command, "--launcher", "slurm"]) == 0
    assert len(list(cluster.iterdir())) == 1
    found = bc.load_sweep(tmp_path / "out")
    assert [(one.status, one.job) for one in found.runs] == [(QUEUED, f"41_{n}") for n in range(4)]
    queue.write_text("41_0\n41_2\n")
    assert cli.main([*command, "--launcher", "slurm", "--workers", "1"]) == 0
    again = sorted(cluster.iterdir())[-1].read_text()
    assert "#SBATCH --array=0-1%1\n" in again


def test_each_job_does_one_run_and_is_started_again(cluster, project, tmp_path):
    spec = project / "cluster.toml"
    spec.write_text(GRID + SLURM)
    bc.sweep(spec, out=tmp_path / "out", launcher="slurm")
    from submitit.core.utils import DelayedSubmission

    names = [one.name for one in bc.load_sweep(tmp_path / "out").runs]
    for number, name in enumerate(names):
        sent = DelayedSubmission.load(tmp_path / "out" / "logs" / f"41_{number}_submitted.pkl")
        assert sent.function == Worker(str((tmp_path / "out").absolute()), (name,))
        again = sent._checkpoint_function()
        assert again.function == sent.function
        assert sent._timeout_countdown > 10


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"partitoin": "x"}, "slurm has no parameter 'partitoin': there are account, "),
        ({"time": "2h"}, "slurm.time must be a whole number of minutes, not '2h'"),
        ({"cpus": 0}, "slurm.cpus_per_task must be a whole number, not 0"),
    ],
)
def test_wrong_parameters_are_an_error_before_anything_starts(parameters, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        bc.sweep({"max_steps": 1, "slurm": parameters}, out=tmp_path / "out", launcher="slurm")
    assert not (tmp_path / "out").exists()


def test_what_slurm_refuses_is_said_in_a_line(cluster, project, tmp_path, monkeypatch):
    sbatch = cluster.parent / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: short' >&2\nexit 1\n")
    with pytest.raises(OSError, match=r"SLURM did not take the jobs: .*invalid partition specified") as found:
        bc.sweep(project / "spec.toml", out=tmp_path / "out", launcher="slurm")
    assert "\n" not in str(found.value)
    monkeypatch.setattr(launching.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    with pytest.raises(OSError, match="there is no SLURM on this machine: the command srun is missing"):
        bc.sweep(project / "spec.toml", out=tmp_path / "out", launcher="slurm")


# --- a real one ---

CONFIG = """ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=short Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def real_cluster(tmp_path_factory, monkeypatch):
    """A cluster of this one machine, whose daemons end with the test."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)]
    if missing or os.getuid() != 0:
        pytest.skip(f"no cluster can be started: {', '.join(missing) or 'root'} is needed")
    root = tmp_path_factory.mktemp("slurm")
    root.chmod(0o755)
    for name in ("state", "spool"):
        (root / name).mkdir()
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(root=root, host=host, ctld=free_port(), slurmd=free_port(), cpus=os.cpu_count())
    (root / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(root / "slurm.conf"))
    files = [
        f"--{name}={root}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={root}/munge.key", *files],
        ["slurmctld", "-D", "-i", "-f", f"{root}/slurm.conf"],
        ["slurmd", "-D", "-f", f"{root}/slurm.conf", "-N", host],
    ]
    daemons = []
    with (root / "daemons.log").open("wb") as log:
        for command in commands:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        try:
            for _ in range(60):
                state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout.strip()
                if state == "idle":
                    break
                time.sleep(1)
            else:
                logs = [path.read_text()[-500:] for path in root.glob("*.log")]
                pytest.skip(f"the cluster does not start (its node is {state or 'unknown'}): {logs}")
            yield root
        finally:
            subprocess.run(["scancel", "--me"], capture_output=True, timeout=60)
            for _ in range(60):  # a job ends a little after its run is done, and no daemon may leave it behind
                if not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip():
                    break
                time.sleep(0.5)
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
            for daemon in daemons:
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


@pytest.mark.slow
def test_a_real_cluster_does_a_sweep(real_cluster, project, swept, tmp_path):
    spec = project / "real.toml"
    spec.write_text(GRID.replace("[1, 10]", "[1]").replace("[0, 1]", "[0, 1, 2]") + "[slurm]\ntime = 10\n")
    found = bc.sweep(spec, out=tmp_path / "out", launcher="slurm")
    assert {one.status for one in found.runs} <= {QUEUED, "learning"}
    until = time.monotonic() + 400
    while not (found := bc.load_sweep(tmp_path / "out")).is_done and time.monotonic() < until:
        time.sleep(2)
    logs = [path.read_text()[-2000:] for path in (tmp_path / "out" / "logs").glob("*.err")]
    assert [one.status for one in found.runs] == [DONE] * 3, (found, logs)
    theirs = {one.settings["seed"]: one for one in swept.runs if one.settings["sparsity_weight"] == 1}
    for one in found.runs:
        if one.settings["seed"] in theirs:
            assert one.load().subnetwork == theirs[one.settings["seed"]].load().subnetwork
    assert bc.sweep(spec, out=tmp_path / "out", launcher="slurm").is_done
    assert (tmp_path / "out" / "table.parquet").is_file()
