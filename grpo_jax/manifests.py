"""What starts a run on a cluster: a JobSet for Kubernetes, a batch script for Slurm, a command for Google's or SkyPilot's tools.

Each runs the same command on every host, and starts it again when it ends with anything but success or exit code 2, with which
it says that another start would not help: a bad config, or three starts in a row that came to nothing.
"""

import math
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

PORT = 8476  # where process 0 listens for GPU hosts; TPU hosts find each other, at jax's own port 8482
GRACE = 120  # seconds between SIGTERM and the end: a stretch of iterations and a checkpoint
STOPS = 2  # the exit code after which another start would not help
AGAIN = "1,75,134,137,139"  # where codes must be listed: failed, preempted, aborted, killed, crashed
TARGETS = ("jobset", "slurm", "gcloud", "gcluster", "xpk", "skypilot")

# Of each kind of TPU: GKE's label, the type's name and its unit (cores or chips), and the image of its virtual machines.
_TPU = {
    "v4": ("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
}
_GRIDS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e


class Cluster(NamedTuple):
    """The hardware of a run.

    Attributes:
      kind: v4, v5e, v5p, v6e or h200.
      grid: of a TPU slice, 4x4 or 2x2x1; empty for GPUs.
      slices: of which there are several for larger runs, or for points of a sweep.
      hosts: of a slice.
      chips: accelerators of a host.
    """

    kind: str
    grid: str
    slices: int
    hosts: int
    chips: int

    @property
    def is_tpu(self) -> bool:
        """Whether it is of TPUs."""
        return self.kind in _TPU

    @property
    def type_name(self) -> str:
        """What Google calls a slice, such as v5litepod-16."""
        _, name, unit, _ = _TPU[self.kind]
        return f"{name}-{self.hosts * self.chips * unit}"


def parse_cluster(topology: str) -> Cluster:
    """The hardware of a topology; ValueError for one that does not exist.

    >>> parse_cluster("2*v5e:4x4")
    Cluster(kind='v5e', grid='4x4', slices=2, hosts=4, chips=4)
    >>> parse_cluster("v5e:2x4").hosts, parse_cluster("h200:16").hosts, parse_cluster("v5p:2x2x2").type_name
    (1, 2, 'v5p-16')
    """
    if match := re.fullmatch(r"(?:(\d+)\*)?h200:(\d+)", topology):
        slices, number = int(match[1] or 1), int(match[2])
        if slices < 1 or number < 1 or (number > 8 and number % 8):
            raise ValueError(f"--topology={topology}: hosts have 8 of these; more than 8 must be a multiple of 8")
        return Cluster("h200", "", slices, max(1, number // 8), min(number, 8))
    if not (match := re.fullmatch(r"(?:(\d+)\*)?(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})", topology)):
        raise ValueError(
            f"--topology={topology} must be like v5e:4x4, v6e:8x8, v5p:2x2x1, 2*v5e:4x4 (two slices) or h200:8"
        )
    slices, kind, grid = int(match[1] or 1), match[2], match[3]
    number, is_flat = math.prod(map(int, grid.split("x"))), kind in ("v5e", "v6e")
    if (len(grid.split("x")) == 2) != is_flat or slices < 1 or number < 1:
        raise ValueError(f"--topology={topology}: a slice of {kind} has {2 if is_flat else 3} dimensions")
    if is_flat and grid not in _GRIDS_2D:
        raise ValueError(f"--topology={topology}: slices of {kind} are {', '.join(_GRIDS_2D)}")
    if not is_flat and number % 4:
        raise ValueError(f"--topology={topology}: slices of {kind} have a multiple of 4 chips, from 2x2x1 on")
    chips = number if number <= (8 if is_flat else 4) else 4
    return Cluster(kind, grid, slices, number // chips, chips)


def manifest(
    target: str, cluster: Cluster, words: Sequence[str], *, name: str, image: str, points: int | None = None
) -> str:
    """The text that starts a run.

    Args:
      target: one of `TARGETS`.
      cluster: the hardware.
      words: of the command, ``grpo-jax`` or ``python launch.py`` and flags, with the run directory, which every host must see.
      name: of the run.
      image: of the container, built from the Dockerfile; its directory is the checkout.
      points: of a sweep: as many clusters, at most, as it has points, each of which takes the next free one; None: a single run.

    Raises:
      ValueError: hardware that the target does not start, or a name that Kubernetes refuses.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(f"--name={name} must be of lower-case letters, digits and -, at most 40")
    if target in ("gcloud", "xpk") and not cluster.is_tpu:
        raise ValueError(f"--target={target} starts TPUs; jobset, slurm, gcluster and skypilot start GPUs, too")
    if target == "slurm" and cluster.is_tpu:
        raise ValueError("--target=slurm starts GPUs; TPUs have jobset, gcloud, gcluster, xpk and skypilot")
    make = {"jobset": _jobset, "slurm": _slurm, "gcloud": _gcloud, "gcluster": _gcluster, "xpk": _xpk}.get(
        target, _skypilot
    )
    if points is None:
        if not cluster.is_tpu:  # hosts of GPUs are all alike
            cluster = cluster._replace(slices=1, hosts=cluster.hosts * cluster.slices)
        return make(cluster, words, name, image)
    # A sweep: clusters of one slice that know nothing of each other, and share the directory.
    alone, number = cluster._replace(slices=1), min(points, cluster.slices)
    if target == "slurm":
        return _slurm(alone, words, name, image, number)
    if number > 1 and target in ("gcloud", "skypilot"):
        raise ValueError(
            f"--target={target} starts one cluster at a time: leave out '{number}*', and take a --name for each"
        )
    parts = [make(alone, words, f"{name}-{i}" if number > 1 else name, image) for i in range(number)]
    return ("---\n" if target == "jobset" else "").join(parts)


def command(cluster: Cluster, words: Sequence[str], *, coordinator: str = "$COORDINATOR", own: str = "$PROCESS") -> str:
    """The shell command of a host; TPU hosts find each other, GPU hosts are told by environment variables."""
    parts = [shlex.join(words)]
    hosts = cluster.hosts * cluster.slices
    if hosts > 1 and cluster.is_tpu:
        parts.append("--processes=auto --wait=600")
    elif hosts > 1:
        parts.append(f"--coordinator={coordinator} --num_processes={hosts} --process_id={own} --wait=600")
    return " ".join(parts)


def _jobset(cluster: Cluster, words: Sequence[str], name: str, image: str) -> str:
    environment = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "tpu,cpu" if cluster.is_tpu else "cuda,cpu"}  # or fail
    if cluster.is_tpu:
        label, _, _, _ = _TPU[cluster.kind]
        selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": cluster.grid}
        resources = {"google.com/tpu": cluster.chips}
    else:
        selector = {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
        resources = {"nvidia.com/gpu": cluster.chips}
        environment["LD_LIBRARY_PATH"] = "/usr/local/nvidia/lib64"  # where GKE puts the driver
        environment["COORDINATOR"] = f"{name}-hosts-0-0.{name}:{PORT}"
    variables: list[Any] = [{"name": key, "value": value} for key, value in environment.items()]
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    variables.append({"name": "PROCESS", "valueFrom": {"fieldRef": index}})
    container = {
        "name": "launch",
        "image": image,
        "command": ["bash", "-c", f"exec {command(cluster, words)}"],  # exec: SIGTERM reaches Python
        "env": variables,
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": resources},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": selector,
        "containers": [container],
    }
    in_vain = {"action": "FailJob", "onExitCodes": {"containerName": "launch", "operator": "In", "values": [STOPS]}}
    job = {
        "backoffLimit": 0,
        "completions": cluster.hosts,
        "parallelism": cluster.hosts,
        "completionMode": "Indexed",
        "podFailurePolicy": {"rules": [in_vain]},
        "template": {"spec": pod},
    }
    document = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {
                "maxRestarts": 1000,  # launch.py itself ends what restarts in vain
                "rules": [{"name": "inVain", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "hosts", "replicas": cluster.slices, "template": {"spec": job}}],
        },
    }
    if cluster.is_tpu and cluster.hosts > 1:  # a slice's hosts are those of one node pool
        pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        document["metadata"] = {"name": name, "annotations": pool}
    return yaml.safe_dump(document, sort_keys=False, width=1000)


def _slurm(cluster: Cluster, words: Sequence[str], name: str, image: str, array: int = 1) -> str:
    run = command(cluster, words)
    points = f"\n#SBATCH --array=0-{array - 1}" if array > 1 else ""
    if cluster.hosts > 1:  # Slurm tells each process of the others
        run = f"{shlex.join(words)} --processes=auto --wait=600"
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={cluster.hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={cluster.chips}
#SBATCH --signal=TERM@{GRACE}
#SBATCH --requeue{points}
#SBATCH --open-mode=append
# In a checkout, with its environment activated; or in a container of the image {image}.
export PYTHONUNBUFFERED=1
srun --kill-on-bad-exit=1 {run} &
child=$!
trap 'kill -TERM $child' TERM
wait $child
code=$?
while kill -0 $child 2> /dev/null; do wait $child; code=$?; done  # a signal ends a wait early
# Started again, unless it is done, another start would not help, or it was cancelled.
if [ $code -ne 0 ] && [ $code -ne {STOPS} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def _gcloud(cluster: Cluster, words: Sequence[str], name: str, image: str) -> str:
    _, _, _, system = _TPU[cluster.kind]
    where = '--project="$PROJECT" --zone="$ZONE"'
    inside = f"sudo docker run --rm --privileged --net=host -e PYTHONUNBUFFERED=1 {image} {command(cluster, words)}"
    again = f"until {inside} || [ $? -eq {STOPS} ]; do sleep 10; done"
    if cluster.slices > 1:
        raise ValueError("--target=gcloud starts one slice, or the points of a sweep on several: take jobset for more")
    return f"""gcloud compute tpus tpu-vm create {name} {where} --accelerator-type={cluster.type_name} --version={system}
gcloud compute tpus tpu-vm ssh {name} {where} --worker=all --command={shlex.quote(again)}
gcloud compute tpus tpu-vm delete {name} {where} --quiet
"""


def _gcluster(cluster: Cluster, words: Sequence[str], name: str, image: str) -> str:
    if cluster.is_tpu:
        kind = f"--compute-type={_TPU[cluster.kind][0]} --topology={cluster.grid} --num-slices={cluster.slices}"
    else:
        kind = f"--compute-type=nvidia-h200-{cluster.chips}px --num-nodes={cluster.hosts}"
    coordinator = f"{name}-workload-0-0.{name}:{PORT}"
    run = command(cluster, words, coordinator=coordinator, own="$JOB_COMPLETION_INDEX")
    return (
        f"gcluster job submit --name={name} --image={image} {kind} --grace-period={GRACE}s "
        f"--restart-on-exit-codes={AGAIN} --command={shlex.quote(run)}\n"
    )


def _xpk(cluster: Cluster, words: Sequence[str], name: str, image: str) -> str:
    return (
        f"xpk workload create --workload={name} --docker-image={image} --tpu-type={cluster.type_name} "
        f"--num-slices={cluster.slices} --max-restarts=1000 --restart-on-exit-codes={AGAIN} "
        f"--termination-grace-period-seconds={GRACE} --command={shlex.quote(command(cluster, words))}\n"
    )


def _skypilot(cluster: Cluster, words: Sequence[str], name: str, image: str) -> str:
    accelerators = f"tpu-{cluster.type_name}:1" if cluster.is_tpu else f"H200:{cluster.chips}"
    place = "cd /grpo_jax && " if "launch.py" in words else ""  # the checkout of the Dockerfile's image
    first = f'$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{PORT}'
    document = {
        "name": name,
        "num_nodes": 1 if cluster.is_tpu else cluster.hosts,  # the hosts of a slice are one node
        "resources": {
            "accelerators": accelerators,
            "image_id": f"docker:{image}",
            "job_recovery": {"recover_on_exit_codes": [int(code) for code in AGAIN.split(",")]},
        },
        "envs": {"PYTHONUNBUFFERED": "1"},
        "run": place + command(cluster, words, coordinator=first, own="$SKYPILOT_NODE_RANK") + "\n",
    }
    if cluster.slices > 1:
        raise ValueError(
            "--target=skypilot starts one slice, or the points of a sweep on several: take jobset for more"
        )
    return yaml.safe_dump(document, sort_keys=False, width=1000)
