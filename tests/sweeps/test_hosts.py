"""A sweep that several hosts share: its points are those of one host, also when hosts die and come."""

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from grpo_jax.storage import names, place
from tests.buckets import NAME, bucket
from tests.pods import end, start
from tests.tiny_run import flags

pytestmark = pytest.mark.skipif(find_spec("gcsfs") is None, reason="needs what tests/requirements.txt installs")

GRID = "objective.beta=0.5,1,3; seed=0,1"


def command(workdir: object, *more: str) -> list[str]:
    changes = {"train__iterations": 30, "checkpoint__interval": 5, "evaluate__interval": 30, "evaluate__samples": 8}
    base = ["launch.py", "--config=configs/default.py", f"--sweep={GRID}", f"--workdir={workdir}"]
    return [*base, *flags(**changes), *more]


@pytest.mark.slow
def test_three_hosts_of_which_one_dies_finish_a_sweep_in_a_bucket_with_the_bytes_of_one_host(tmp_path):
    ((code, _, err),) = end([start(*command(tmp_path / "sweep"))])
    assert code == 0, err
    with bucket() as environment:
        os.environ.update(environment)
        try:
            workdir, until = place(f"{NAME}/sweep"), time.monotonic() + 200
            hosts = [start(*command(workdir)) for _ in range(3)]
            while time.monotonic() < until:  # until the first host has begun to iterate
                running = [name for name in names(workdir) if (workdir / name / "metrics.jsonl").exists()]
                if len(running) >= 2:
                    break
                time.sleep(0.1)
            hosts[0].kill()
            ((code, out, err),) = end([start(*command(workdir, "--list"))])
            assert code == 0 and "running" in out, (out, err)
            (_, *ended) = end(hosts)
            for code, out, err in ended:
                assert code == 0, err
                assert "figure.png are in gs://bucket/sweep" in out
            record = json.loads((workdir / "sweep.json").read_text())
            assert record == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
            assert {point["state"] for point in record["points"]} == {"done"}
            for point in record["points"]:
                for name in ("metrics.jsonl", "reference.json", "result.json"):
                    bytes_here = Path(tmp_path / "sweep" / point["folder"] / name).read_bytes()
                    assert (workdir / point["folder"] / name).read_bytes() == bytes_here, (point, name)
            assert (workdir / "figure.png").read_bytes() == (tmp_path / "sweep" / "figure.png").read_bytes()
        finally:
            for name in environment:
                del os.environ[name]
