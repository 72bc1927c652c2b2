"""What starts a run on a cluster: the hardware that is meant, what is restarted, and commands that are really run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grpo_jax.manifests import STOPS, TARGETS, Cluster, manifest, parse_cluster
from tests.pods import ROOT, end, environment, free_port
from tests.tiny_run import flags


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:1x1", Cluster("v5e", "1x1", 1, 1, 1)),
        ("v5e:2x4", Cluster("v5e", "2x4", 1, 1, 8)),
        ("v5e:16x16", Cluster("v5e", "16x16", 1, 64, 4)),
        ("3*v6e:4x4", Cluster("v6e", "4x4", 3, 4, 4)),
        ("v5p:2x2x1", Cluster("v5p", "2x2x1", 1, 1, 4)),
        ("v4:2x2x4", Cluster("v4", "2x2x4", 1, 4, 4)),
        ("h200:4", Cluster("h200", "", 1, 1, 4)),
        ("2*h200:16", Cluster("h200", "", 2, 2, 8)),
    ],
)
def test_hardware_by_its_name(name, expected):
    assert parse_cluster(name) == expected


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:4x4x4", "v5p:2x2", "h200:12", "h200:0", "0*v5e:2x2", "v9:2x2", "v5e:0x4", "v5e:3x5", "v5p:1x1x2", ""],
)
def test_hardware_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="--topology="):
        parse_cluster(name)


COMMAND = ["python", "launch.py", "--config=configs/small.py", "--workdir=gs://bucket/my run"]
COMMAND += ["--sweep=objective.beta=0.5,1; seed=0,1"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_the_flags_of_the_command_line(target):
    topology = "h200:16" if target == "slurm" else "v5e:4x4"
    text = manifest(target, parse_cluster(topology), COMMAND, name="small", image="an/image")
    assert "launch.py --config=configs/small.py" in text
    assert "gs://bucket/my run" in text and "--processes=auto" in text and "an/image" in text
    with pytest.raises(ValueError, match="--name=No"):
        manifest(target, parse_cluster(topology), COMMAND, name="No", image="")


def test_a_job_set_of_slices_restarts_but_not_in_vain():
    (job,) = yaml.safe_load_all(manifest("jobset", parse_cluster("2*v5e:4x4"), COMMAND, name="small", image="i"))
    (hosts,), policy = job["spec"]["replicatedJobs"], job["spec"]["failurePolicy"]
    assert hosts["replicas"] == 2
    spec = hosts["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (4, 4, 0)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [STOPS])
    assert policy["rules"][0]["action"] == "FailJobSet" and policy["maxRestarts"] > 100
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which a policy of pod failures asks for
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_points_of_a_sweep_have_clusters_of_their_own():
    for topology, points, expected in (("3*v5e:4x4", 8, 3), ("3*v5e:2x2", 2, 2), ("v5e:4x4", 4, 1), ("2*h200:8", 4, 2)):
        jobs = list(
            yaml.safe_load_all(manifest("jobset", parse_cluster(topology), COMMAND, name="s", image="i", points=points))
        )
        names = ["s"] if expected == 1 else [f"s-{i}" for i in range(expected)]
        assert [job["metadata"]["name"] for job in jobs] == names
        assert {job["spec"]["replicatedJobs"][0]["replicas"] for job in jobs} == {1}
        words = jobs[0]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
            "command"
        ][2]
        assert ("--processes" in words) == (topology in ("3*v5e:4x4", "v5e:4x4"))
    # Slurm has arrays for that; the tools that wait for one cluster to end are refused.
    script = manifest("slurm", parse_cluster("4*h200:8"), COMMAND, name="s", image="i", points=3)
    assert script.count("#!/bin/bash") == 1 and "#SBATCH --array=0-2\n" in script
    for target in ("gcloud", "skypilot"):
        with pytest.raises(ValueError, match="one cluster at a time"):
            manifest(target, parse_cluster("2*v5e:4x4"), COMMAND, name="s", image="i", points=3)


EIGHT = "--config.data.prompts_per_iteration=8"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--target=jobset",), "wants --target, --topology, and a --workdir"),
        (("--target=slurm", "--topology=v5e:2x2", "--workdir=x"), "starts GPUs"),
        (("--target=xpk", "--topology=h200:4", "--workdir=gs://b/x"), "starts TPUs"),
        (("--target=gcloud", "--topology=2*v5e:2x2", "--workdir=gs://b/x", EIGHT), "one slice"),
        (("--target=jobset", "--topology", "v5e:2x2", "--workdir=gs://b/x"), "--KEY=VALUE"),
        (("--target=jobset", "--topology=v5e:2x2", "--workdir=x"), "a container's folder is lost with it"),
        (("--target=jobset", "--topology=v5e:8x8", "--workdir=gs://b/x"), "nearest: 64 and 128"),
        (("--target=jobset", "--topology=v5e:2x2", "--workdir=gs://b/x", "--sweep=objective.betaa=1"), "betaa"),
    ],
)
def test_what_cannot_be_started_is_refused(more, words):
    command = [sys.executable, "launch.py", "--config=configs/small.py", "--mode=manifest", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def printed(workdir: Path, target: str) -> str:
    """What starts the tiny run on two hosts; its directory is a folder here, which --target=jobset would not take."""
    place = "gs://bucket/run" if target == "jobset" else str(workdir)
    tiny = flags(data__prompts_per_iteration=16)
    command = [sys.executable, "launch.py", "--config=configs/default.py", f"--workdir={place}", *tiny]
    command += ["--mode=manifest", f"--target={target}", "--topology=h200:16"]
    text = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, check=True).stdout
    return text.replace(place, str(workdir))


def with_python(folder: Path) -> dict[str, str]:
    """An environment whose python is that of the tests, and whose other programs may be in the folder."""
    folder.mkdir()
    return environment(1) | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_command_of_a_job_set_runs_on_two_hosts(tmp_path):
    job = yaml.safe_load(printed(tmp_path / "run", "jobset"))
    container = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    shared = with_python(tmp_path / "bin") | {"COORDINATOR": f"127.0.0.1:{free_port()}"}
    pod = [
        subprocess.Popen(
            [*container["command"]],
            cwd=ROOT,
            env=shared | {"PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ended = end(pod)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (tmp_path / "run" / "result.json").exists()


SRUN = """#!/bin/bash
# Stands for Slurm: starts the command on two hosts, which it tells of each other.
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0
SLURM_PROCID=1 "$@" & SLURM_PROCID=0 "$@"
code=$?; wait; exit $code
"""


@pytest.mark.slow
def test_the_script_for_slurm_runs_on_two_hosts_and_is_queued_again_unless_that_would_not_help(tmp_path):
    shared = with_python(tmp_path / "bin") | {"SLURM_JOB_ID": str(free_port())}
    queue = f'echo "$@" >> {tmp_path}/queued'
    for name, lines in (("srun", SRUN), ("squeue", "echo RUNNING"), ("scontrol", queue)):
        text = lines if lines.startswith("#!") else f"#!/bin/bash\n{lines}\n"
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o700)

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", script], cwd=ROOT, env=shared, capture_output=True, text=True, timeout=240)

    done = run(printed(tmp_path / "run", "slurm"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()
    script = printed(tmp_path / "other", "slurm")
    for code, queued in ((2, False), (75, True), (134, True)):
        (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        (tmp_path / "queued").unlink(missing_ok=True)
        assert run(script).returncode == code
        assert (tmp_path / "queued").exists() == queued
