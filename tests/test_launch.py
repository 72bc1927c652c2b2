"""launch.py as a process: a whole run, kill −9 and resume to the same bits, and one clear message for every mistake."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_jax.files import read_sealed, write_sealed
from grpo_jax.runs.checkpoints import Checkpoints
from tests.pods import environment
from tests.tiny_run import flags

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = environment(1)


def command(workdir, *more, config="configs/default.py", tiny=True, **changes):
    tiny_flags = flags(**changes) if tiny else [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    return [sys.executable, "launch.py", f"--config={config}", *tiny_flags, f"--workdir={workdir}", *more]


def launch(workdir, *more, timeout=300, **options):
    return subprocess.run(
        command(workdir, *more, **options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def outcome(workdir) -> tuple[bytes, dict[str, str], dict]:
    """What must be the same bit for bit: the metrics rows, the digest of every leaf, the result."""
    checkpoints = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    (meta,) = (workdir / "checkpoints" / str(checkpoints[-1]) / "meta").glob("meta*")
    stored = json.loads(meta.read_text())
    return (workdir / "metrics.jsonl").read_bytes(), stored, json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = launch(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_a_run_says_what_it_does_and_leaves_everything_behind(unbroken):
    workdir, out = unbroken
    for words in (
        "1 × cpu",
        "parameters",
        "logit p* = logit p_ref + Ω_G(p*)/β",
        "effective",
        "measured p_ref",
        "predicted p*",
    ):
        assert words in out, words
    for words in (
        "final p̂",
        "prediction interval",
        "KL(π‖π_ref)",
        "greedy accuracy",
        "pass@8",
        "warm start",
        "iterations 7/7",
    ):
        assert words in out, words
    names = {p.name for p in workdir.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "samples.json",
        "checkpoints",
        "figure.png",
        "report.md",
        "report.html",
        "probes.jsonl",
    }
    completions = [json.loads(line) for line in (workdir / "completions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in completions] == list(range(16))
    shown = json.loads((workdir / "samples.json").read_text())
    for side in ("before", "after"):
        texts = {row["prompt"]: [("".join(x["pieces"]), x["reward"]) for x in row[side]] for row in completions}
        for example in shown[side]:
            assert texts[example["prompt"]] == [(x["text"], x["reward"]) for x in example["completions"]]
    probes = [json.loads(line) for line in (workdir / "probes.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in probes] == [3, 3, 6, 6]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in rows if r["phase"] == "train"] == list(range(1, 8))
    assert [r["iteration"] for r in rows if r["phase"] == "probe"] == [0, 3, 6]
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert any((workdir / "tensorboard").iterdir())
    result = json.loads((workdir / "result.json").read_text())
    assert len(result["prompts"]["p_star"]) == 16
    assert result["p_ref"]["low"] < result["p_ref"]["mean"] < result["p_star"]["mean"] < 1
    config = json.loads((workdir / "config.json").read_text())
    assert (config["rollout.group_size"], config["objective.beta"]) == (4, 1.0)


def test_a_finished_run_says_so_and_changes_nothing(unbroken):
    workdir, _ = unbroken
    before = outcome(workdir)
    again = launch(workdir)
    assert again.returncode == 0
    assert "finished run" in again.stdout
    assert "final p̂" in again.stdout
    assert outcome(workdir) == before


def wait_for_rows(workdir, count, process=None):
    """Returns once metrics.jsonl holds so many rows, or the process has ended."""
    metrics = workdir / "metrics.jsonl"
    for _ in range(12_000):
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        if process is not None and process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError("no such row within two minutes")


@pytest.mark.slow
def test_killed_anywhere_and_resumed_is_the_unbroken_run_bit_for_bit(tmp_path):
    """kill −9 while starting, in the warm start, and at five places among iterations, probes and checkpoints."""
    more = {"train__iterations": 60, "checkpoint__interval": 4, "evaluate__interval": 5}
    done = launch(tmp_path / "unbroken", **more)
    assert done.returncode == 0, done.stderr
    workdir, delays = tmp_path / "killed", random.Random(0)
    kills = 0
    for rows in (-1, 0, 2, 10, 25, 40, 55):  # rows written when the kill comes; fewer than 0: after seconds
        process = subprocess.Popen(command(workdir, **more), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        if rows < 0:
            time.sleep(2.0)
        else:
            wait_for_rows(workdir, rows, process)
        time.sleep(delays.uniform(0.0, 0.2))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 5
    done = launch(workdir, **more)
    assert done.returncode == 0, done.stderr
    assert outcome(workdir) == outcome(tmp_path / "unbroken")


@pytest.mark.slow
def test_the_comparison_can_fail(unbroken, tmp_path):
    """Negative control: another key, everything else the same, and no part of the outcome agrees."""
    other = tmp_path / "other"
    assert launch(other, seed=1).returncode == 0
    for mine, theirs in zip(outcome(unbroken[0]), outcome(other), strict=True):
        assert mine != theirs


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(tmp_path, number, code):
    workdir = tmp_path / "preempted"
    # Many short iterations: there is always one to be interrupted.
    more = {"checkpoint__interval": 1000, "train__iterations": 400, "evaluate__interval": 1000}
    process = subprocess.Popen(
        command(workdir, **more), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_rows(workdir, 2, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    assert f"stopped by {number.name}; the same command resumes" in error
    assert [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert not (workdir / "result.json").exists()


@pytest.mark.slow
def test_signals_at_any_time_of_a_start_end_it_in_a_line_and_cost_nothing(tmp_path):
    """Among imports, set-up, compilation and measurement; SIGINT once or twice. The run then goes on as if nothing had been."""
    dice = random.Random(1)
    for number, count in ((signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 1)) * 2:
        process = subprocess.Popen(
            command(tmp_path), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(dice.uniform(0.3, 6.0))
        for _ in range(count):
            process.send_signal(number)
            time.sleep(0.1)
        _, error = process.communicate(timeout=120)
        assert process.returncode in ((130 if number == signal.SIGINT else 75), 0), (number, error)
        assert "Traceback" not in error
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_sweep_is_preempted_listed_resumed_and_ends_in_a_figure(tmp_path):
    workdir, sweep = tmp_path / "sweep", "--sweep=objective.beta=0.5,1"
    more = {"checkpoint__interval": 1000, "train__iterations": 200, "evaluate__interval": 1000}
    process = subprocess.Popen(
        command(workdir, sweep, **more),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(workdir / "objective.beta=0.5", 2, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    listed = launch(workdir, sweep, "--list", **more)
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"interrupted[^|]*waiting", listed.stdout, re.S)
    done = launch(workdir, sweep, **more)
    assert done.returncode == 0, done.stderr
    for words in (
        "point 1 of 2: objective.beta=0.5",
        "resuming after iteration",
        "point 2 of 2: objective.beta=1",
        "predicted p*",
    ):
        assert words in done.stdout, words
    assert {p.name for p in workdir.iterdir()} >= {"sweep.json", "sweep.md", "figure.png", "objective.beta=1"}
    again = launch(workdir, sweep, **more)
    assert again.returncode == 0
    assert "point 2 of 2: objective.beta=1: done" in again.stdout and "measuring" not in again.stdout


@pytest.mark.slow
def test_a_sweep_with_a_failed_point_runs_the_others_and_exits_1(tmp_path):
    done = launch(tmp_path / "sweep", "--sweep=warm_start.target=0.999,0.15", warm_start__max_steps=40)
    assert done.returncode == 1, done.stderr
    assert "1 of 2 points failed" in done.stderr and "sweep.md" in done.stderr
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert [point["state"] for point in record] == ["failed", "done"]
    assert "did not reach warm_start.target=0.999" in record[0]["why"]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_reported_and_recomputed(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    (workdir / "result.json").unlink()
    files = [p for p in (workdir / "checkpoints" / "7" / "state").rglob("*") if p.parent.name == "d" and p.is_file()]
    for data in files:
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    assert files
    done = launch(workdir)
    assert done.returncode == 0, done.stderr
    assert "checkpoint 7 is damaged" in done.stderr + done.stdout
    assert "resuming after iteration 6" in done.stdout
    assert outcome(workdir)[0] == outcome(unbroken[0])[0]
    assert outcome(workdir)[2] == outcome(unbroken[0])[2]


MISTAKES = {
    "unknown key": (["--config.objective.betaa=1.0"], 2, r'betaa.*"?beta'),
    "wrong type": (["--config.train.iterations=many"], 2, "iterations"),
    "float for int": (["--config.train.iterations=1.5"], 2, "iterations"),
    "not a number": (["--config.objective.beta=nan"], 2, "objective.beta=nan must be finite"),
    "negative": (["--config.objective.beta=-1.0"], 2, r"objective.beta=-1.0 must be positive"),
    "group of one": (["--config.rollout.group_size=1"], 2, "rollout.group_size=1 must be at least 2"),
    "does not divide": (
        ["--config.train.minibatches=3"],
        2,
        "prompts_per_iteration=8 is not divisible by train.minibatches=3",
    ),
    "more prompts than there are": (["--config.data.prompts_per_iteration=17"], 2, "exceeds the 16 prompts"),
    "no such objective": (["--config.objective.name=PPO"], 2, "PPO.*GRPO"),
    "a KL that does nothing": (["--config.objective.kl=k1"], 2, "zero expected gradient"),
    "no such task": (["--config.task.name=chess"], 2, "chess.*arithmetic"),
    "no such folder": (["--config.model.path=/no/such/folder"], 2, "/no/such/folder"),
    "no such config": (["--config=configs/none.py"], 2, "configs/none.py"),
    "left-over argument": (["config.seed=1"], 2, "config.seed=1"),
    "two at once": (["--config.seed=-1", "--config.train.row_length=0"], 2, "seed=-1[^$]*train.row_length=0"),
    "a truncated distribution in training": (
        ["--config.rollout.top_p=0.9"],
        2,
        "top_p=0.9.*whole distribution.*evaluate",
    ),
    "sweep of an unknown key": (["--sweep=objective.betaa=1,2"], 2, r"--sweep: .*betaa.*Did you mean .?beta"),
    "sweep of a wrong type": (
        ["--sweep=objective.beta=1; train.iterations=1.5"],
        2,
        r"--sweep: .*iterations=1\.5.*int",
    ),
    "sweep over a group": (["--sweep=objective={'beta': 1.0}"], 2, "objective is a group of keys"),
    "sweep with a value twice": (["--sweep=objective.beta=1,2,1.0"], 2, "objective.beta has the value 1 twice"),
    "sweep with conflicts": (
        ["--sweep=objective.beta=-1,1; rollout.group_size=1,4"],
        2,
        r"group_size=1 must be at least 2 \(2 of 4 points: .*beta=-1\.0 must be positive[^(]*\(2 of 4 points",
    ),
    "sweep that measures": (["--sweep=seed=0,1", "--mode=evaluate"], 2, "--sweep is for --mode=train"),
    "list of nothing": (["--list"], 2, "--list shows the points of a --sweep"),
    "impossible mesh": (["--config.mesh.tensor=2"], 2, "mesh.tensor=2"),
    "prompt too long": (["--config.data.max_prompt=4"], 2, "data.max_prompt=4"),
    "a run directory in a file": (["--workdir=README.md"], 1, "cannot use"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_and_no_work(mistake, tmp_path):
    more, code, message = MISTAKES[mistake]
    failed = launch(tmp_path / "run", *more, timeout=60)
    assert failed.returncode == code, failed.stderr
    assert re.search(message, failed.stderr, re.S), failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_config_and_help(tmp_path):
    for config, words in (("configs/none.py", "no such file"), ("configs/small.py:none", "interior, amplify")):
        wrong = [sys.executable, "launch.py", f"--config={config}"]
        failed = subprocess.run(wrong, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert (failed.returncode, words in failed.stderr, "Traceback" in failed.stderr) == (2, True, False)
    bare = subprocess.run([sys.executable, "launch.py"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (bare.returncode, "--config=small" in bare.stderr) == (2, True)
    helped = subprocess.run(
        [sys.executable, "launch.py", "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert "resumes" in helped.stdout + helped.stderr
    assert "--workdir" in helped.stdout + helped.stderr


def test_evaluation_of_the_last_checkpoint_is_the_final_measurement(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    before = outcome(workdir)
    done = launch(workdir, "--mode=evaluate")
    assert done.returncode == 0, done.stderr
    assert "pass@8" in done.stdout
    assert "verdicts" in done.stdout
    (place,) = (workdir / "evaluations").iterdir()
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    found = [row["successes"] / row["trials"] for row in rows]
    assert found == before[2]["prompts"]["p_final"]
    assert outcome(workdir) == before
    plan = [sys.executable, "-m", "grpo_jax.theory", "plan", f"--from={place / 'prompts.jsonl'}", "--beta=1"]
    planned = subprocess.run(plan, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=README.md"], "the config file cannot be run: SyntaxError"),
        (["--mode=evaluate", "--checkpoint=-1"], "--checkpoint='-1' must be"),
        (["--mode=evaluate", "--checkpoint=../../x"], "must be latest, reference, average"),
        (["--mode=evaluate", "--name=../x"], "it names one folder"),
        (["--mode=export"], "--mode=export wants --output=FOLDER"),
        (["--output=x"], "--output is for --mode=export"),
        (["--mode=export", "--output=x"], "a random decoder has no files"),
        (["--config.objective.bta=1"], "unknown config key bta. Did you mean beta?"),
        (["--config.seed.x=1"], "unknown config key seed.x: configs/default.py has them all"),
        (["--config.objektive.beta=1"], "unknown config key objektive. Did you mean objective?"),
        (["--config.model.path=/etc"], "model.path: /etc/config.json: no such file"),
        (["--config.model.path="], "model.path='' is not a folder"),
        (["--sweep=model.path=/etc,/dev"], "no such file"),
        (["--sweep=seed=" + ",".join(map(str, range(2001)))], "2,001 points are more than 2,000"),
        (["--config.model.d_model=1000000000"], "which has"),
        (["--config.model.num_layers=1000000000"], "which has"),
        (["--config.rollout.group_size=100000000"], "rollout.group_size=100000000 must be at most"),
        (["--config.evaluate.final_samples=100000000000"], "must be below 2**31"),
        (["--config.train.iterations=9223372036854775808"], "must be below 2**31"),
        (["--config.task.arithmetic.operand_max=1000000000"], "prompts are more than 1,000,000"),
        (["--config.objective.beta=1e39"], "within what float32 holds"),
        (["--config.objective.beta=1e-320"], "within what float32 holds"),
        (["--config.rollout.temperature=1e-40"], "within what float32 holds"),
    ],
)
def test_mistakes_and_what_cannot_fit_are_refused_in_words_before_anything_is_made(tmp_path, flags, words):
    failed = launch(tmp_path / "run", *flags)
    too_large = "which has" in words  # what fits elsewhere: the machine is wrong, and not the command
    assert failed.returncode == (1 if too_large else 2), failed.stderr
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr
    assert too_large or not (tmp_path / "run").exists()


def test_memory_is_estimated_without_a_run(tmp_path):
    done = launch(tmp_path / "run", "--mode=estimate", "--devices=2")
    assert done.returncode == 0, done.stderr
    assert "peak per device" in done.stdout
    assert "2 × cpu" in done.stdout
    assert not (tmp_path / "run").exists()
    wrong = launch(tmp_path / "run", "--devices=2")
    assert (wrong.returncode, "--mode=estimate" in wrong.stderr) == (2, True)


def test_another_config_in_the_same_directory_is_refused(unbroken):
    before = outcome(unbroken[0])
    failed = launch(unbroken[0], seed=5)
    assert failed.returncode == 2
    assert "seed: 0 there, 5 now" in failed.stderr
    assert outcome(unbroken[0]) == before


def test_a_run_does_not_go_on_with_other_data_or_another_verifier(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    (workdir / "result.json").unlink()
    config = read_sealed(workdir / "config.json")
    write_sealed(workdir / "config.json", config | {"task.examples": "0" * 64})
    failed = launch(workdir)
    assert failed.returncode == 2
    assert "task.examples" in failed.stderr
    assert "task.verify" not in failed.stderr


def test_weights_that_are_a_pickle_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    numbers = dict.fromkeys(sizes, 4) | {"head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu"} | numbers))
    changes = {"model__path": folder, "task__name": "stories", "warm_start__max_steps": 0}
    failed = launch(tmp_path / "run", **changes)
    assert failed.returncode == 2 and not (tmp_path / "run").exists()
    assert "safetensors" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_a_pretrained_model_runs_with_the_host_verifier(shared, tmp_path):
    changes = {
        "model__path": shared / "models/stories260k",
        "train__iterations": 2,
        "data__prompts_per_iteration": 4,
        "rollout__max_completion": 12,
        "evaluate__samples": 8,
        "evaluate__final_samples": 8,
        "attainable__steps": 0,
    }
    more = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    done = launch(tmp_path / "run", *more, config="configs/stories.py", tiny=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["prompts"]["p_ref"]) == 16
    assert sum(result["after"]["verdicts"].values()) == 16 * 8
    assert "Once" in (tmp_path / "run" / "report.md").read_text()


def test_digests_of_the_last_checkpoint_are_those_of_its_leaves(unbroken):
    """The outcome compared above is not vacuous: restoring recomputes every digest."""
    import jax

    from grpo_jax.config import validate
    from grpo_jax.runs.setup import make_setup
    from tests.tiny_run import tiny_config

    config = tiny_config(mesh__data=8)
    setup = make_setup(config, *validate(config, num_devices=8))
    checkpoints = Checkpoints(unbroken[0] / "checkpoints", keep=2)
    step, state, meta = checkpoints.restore_latest(setup.compiled.start(setup.initial_params(config.seed)))
    checkpoints.close()
    assert (step, int(state.updates), meta["base_key"]) == (7, 7, jax.random.key_data(jax.random.key(0)).tolist())
