"""--mode=evaluate: it measures what the run measured, resumes to the same bits, and refuses what is not its run's."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import flat, validate
from grpo_jax.files import read_sealed, write_json
from grpo_jax.report.run_result import pass_at_k
from grpo_jax.runs import evaluation as mode
from grpo_jax.runs import measurement
from grpo_jax.runs import setup as setup_file
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.directory import open_run_directory
from grpo_jax.runs.errors import CheckpointError, Preempted, RunDirectoryError
from grpo_jax.runs.evaluation import Completion
from grpo_jax.runs.measured_policy import MeasuredPolicy, choose_directory, identity_of
from grpo_jax.runs.reference import measured_reference, reference_params
from grpo_jax.runs.run import Run
from grpo_jax.runs.setup import make_setup
from grpo_jax.tasks import Example, Task, Verdict, find_answer, find_verifier
from grpo_jax.tasks.identity import task_identity
from grpo_jax.theory.__main__ import main as theory
from tests.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]
# Sums to 10 and to 12 have the same characters: one decoder reads both tasks.
TINY = {"task__arithmetic__operand_max": 5, "warm_start__interval": 30, "warm_start__samples": 8}


def config(**changes):
    return tiny_config(**(TINY | changes))


def evaluate(workdir, said=None, **options):
    changes = {key: options.pop(key) for key in list(options) if "__" in key}
    return mode.evaluate(config(**changes), workdir, Console(file=said or io.StringIO(), width=120), **options)


def rows(directory, file="prompts.jsonl"):
    return [json.loads(line) for line in (directory / file).read_text().split("\n") if line]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


@pytest.fixture(scope="module", autouse=True)
def functions():
    """One set of jitted functions for all configs that differ in what is measured alone: tracing them takes the time."""
    make, made = setup_file.make_compiled, {}

    def make_once(config, *arguments, **options):
        measured = ("evaluate.", "verifier.")
        key = str([(k, v) for k, v in flat(config).items() if not k.startswith(measured)])
        if key not in made:
            made[key] = make(config, *arguments, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup_file, "make_compiled", make_once)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it, with what the run measures before and after; only the iterations are not run."""
    workdir, c = tmp_path_factory.mktemp("runs") / "tiny", config()
    setup = make_setup(c, *validate(c, num_devices=8))
    identity = flat(c) | task_identity(setup.task)
    with (
        open_run_directory(workdir, identity) as directory,
        jax.numpy_dtype_promotion("standard"),
    ):  # optax mixes dtypes
        session = Run(c, setup, directory, Console(file=io.StringIO()), None, jax.random.key(0), [])
        measured_reference(session)
        reference = reference_params(session)
        policy = jax.tree.map(lambda x: 1.2 * x, reference)
        checkpoints = Checkpoints(directory / "checkpoints", keep=None)
        for step, params in ((2, reference), (3, policy)):
            checkpoints.save(step, setup.compiled.start(params), {})
        checkpoints.close()
        write_json(directory / "after.json", measurement.measure_in_full(session, policy, reference, 3)[0])
    return workdir


@pytest.fixture(scope="module")
def evaluated(run):
    """The evaluation of its last checkpoint, with what it said."""
    said = io.StringIO()
    result = evaluate(run, said)
    return run / "evaluations" / "iteration-3-arithmetic", result, said.getvalue()


def test_it_measures_what_the_run_measured(run, evaluated):
    directory, result, _ = evaluated
    after, before = (json.loads((run / name).read_text()) for name in ("after.json", "reference.json"))
    assert [row["successes"] for row in rows(directory)] == after["successes"]
    assert 36 < sum(after["successes"]) != sum(before["successes"])
    for key in ("length", "truncated"):
        assert result[key] == pytest.approx(after[key], rel=1e-12)
    assert result["greedy"]["mean"] == after["greedy"]
    assert result["kl"]["mean"] == pytest.approx(after["kl"], rel=1e-6)
    assert list(result["pass"]) == ["1", "2", "4", "8", "16"]
    assert (result["prompts"], result["samples"], result["majority"], result["dropped"]) == (36, 16, None, 0)
    settings = {"verifier": "grpo_jax.tasks.arithmetic:verify", "chat": False, "system": None, "seed": 0, "split": None}
    assert {name: result[name] for name in settings} == settings
    ledger = result["ledger"]  # of the run's own counts of the reference, which is not evaluated yet
    assert ledger["kl"]["mean"] == pytest.approx(result["kl"]["mean"], rel=1e-9)
    parts = (ledger[name]["mean"] for name in ("useful", "within_successes", "within_failures"))
    assert sum(parts) == pytest.approx(ledger["kl"]["mean"], abs=1e-12)
    assert "objective" in ledger and "… useful, kl(p̂‖p_ref)" in (directory / "report.md").read_text()
    reference = evaluate(run, checkpoint="reference")
    assert [row["successes"] for row in rows(run / "evaluations" / "reference-arithmetic")] == before["successes"]
    assert reference["kl"] is None and "ledger" not in reference


def test_rows_verdicts_and_samples_agree(evaluated):
    directory, result, _ = evaluated
    prompts, samples = rows(directory), rows(directory, "samples.jsonl")
    assert [row["index"] for row in prompts] == list(range(36))
    assert sum(result["verdicts"].values()) == 36 * 16
    disagreements = 0
    for row in prompts:
        mine = [s for s in samples if s["index"] == row["index"]]
        (greedy,) = (s for s in mine if s["greedy"])
        sampled = [s for s in mine if not s["greedy"]]
        assert [s["sample"] for s in sampled] == list(range(16))
        assert row["successes"] == sum(s["reward"] for s in sampled)
        assert row["greedy"] == bool(greedy["reward"])
        assert row["tokens"] == sum(s["tokens"] for s in sampled)
        assert row["verdicts"] == {v: [s["verdict"] for s in sampled].count(v) for v in {s["verdict"] for s in sampled}}
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(row["target"]) == int(a) + int(b)
        for s in mine:
            right = s["text"] == row["target"] and not s["truncated"]
            assert right == (s["verdict"] == "correct")
            disagreements += right != bool(s["reward"])  # a control token among the digits, which text does not show
    assert result["disagreements"] == disagreements
    means = pass_at_k(np.array([row["successes"] for row in prompts]), 16, 4)
    assert result["pass"]["4"]["mean"] == pytest.approx(means.mean())


def test_what_it_leaves_and_says(evaluated):
    directory, result, said = evaluated
    names = "config.json prompts.jsonl samples.jsonl samples.txt figure.png report.md result.json"
    assert set(files(directory)) == set(names.split())
    assert read_sealed(directory / "result.json") == result
    for words in ("prompts 36/36", "pass@16", "greedy accuracy", "verdicts", "never solved", "dead groups at G = 4"):
        assert words in said, words
    page = (directory / "report.md").read_text()
    assert page.startswith("# iteration-3 on arithmetic\n")
    assert "figure.png" in page
    assert page.count("### prompt") == 2
    text = (directory / "samples.txt").read_text()
    assert len(re.findall("^=== prompt ", text, re.M)) == 36
    assert text.count("\nsample 15: ") == 36


def test_the_planner_reads_its_rows(evaluated, tmp_path, capsys):
    directory, result, _ = evaluated
    out = tmp_path / "plan.json"
    assert theory(["plan", f"--from={directory / 'prompts.jsonl'}", "--beta=1", f"--json={out}"]) == 0
    assert json.loads(out.read_text())["group_size"] == 8
    capsys.readouterr()
    assert theory(["plan", f"--from={directory}", "--beta=1", f"--json={out}"]) == 0
    plan = json.loads(out.read_text())
    assert (plan["prompts"], "16 trials each" in capsys.readouterr().out) == (36, True)
    assert plan["rows"][0]["p_ref"] == pytest.approx(result["success"]["mean"])
    assert plan["group_size"] == result["group_size"] == 4
    assert plan["rows"][0]["dead_groups_start"] == pytest.approx(result["dead_groups"], rel=1e-12)


def test_a_finished_evaluation_is_shown_and_not_computed(run, evaluated, monkeypatch):
    directory, result, _ = evaluated
    before, said = files(directory), io.StringIO()
    monkeypatch.setattr(mode, "judged_completions", None)
    assert evaluate(run, said, verifier__num_workers=2, evaluate__examples=5) == result
    assert "finished evaluation" in said.getvalue()
    assert files(directory) == before


class Killed(BaseException):
    """As sudden as a signal: nothing catches it."""


def test_sigterm_ends_it_behind_the_block_under_way(run, evaluated, monkeypatch):
    directory, result, _ = evaluated
    write, signals = mode.write_sealed, []

    def write_and_signal(path, entries):
        write(path, entries)
        signals.append(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(mode, "signals_as_flag", lambda: nullcontext(signals))
        patch.setattr(mode, "write_sealed", write_and_signal)
        with pytest.raises(Preempted, match="the same command resumes"):
            evaluate(run, name="stopped")
    stopped = run / "evaluations" / "stopped"
    assert [path.name for path in (stopped / "blocks").iterdir()] == ["000000.json"]
    assert evaluate(run, name="stopped") == result
    assert files(stopped) == files(directory)


@pytest.mark.parametrize("after", [1, 4])
def test_broken_off_anywhere_and_resumed_is_the_unbroken_evaluation(run, evaluated, after, monkeypatch):
    directory, result, _ = evaluated
    name = f"broken-{after}"
    write, written = mode.write_sealed, []

    def write_and_die(path, entries):
        if len(written) == after:
            text = json.dumps(entries)
            path.with_name(f".{path.name}.tmp").write_text(text[: len(text) // 2])  # as a kill while writing leaves it
            raise Killed
        written.append(path.name)
        write(path, entries)

    with monkeypatch.context() as patch:
        patch.setattr(mode, "write_sealed", write_and_die)
        with pytest.raises(Killed):
            evaluate(run, name=name)
    broken, said = run / "evaluations" / name, io.StringIO()
    assert written == [f"{i:06}.json" for i in range(after)]
    assert not (broken / "result.json").exists()
    assert evaluate(run, said, name=name) == result
    assert f"resuming after {8 * after} of 36 prompts" in said.getvalue()
    assert files(broken) == files(directory)


def test_another_task_has_an_evaluation_of_its_own(run, evaluated):
    result = evaluate(run, task__arithmetic__operand_max=6, evaluate__final_samples=8)
    directory = run / "evaluations" / "iteration-3-arithmetic-operand_max-6"
    assert (result["prompts"], result["samples"]) == (49, 8)
    assert rows(directory)[-1]["prompt"] == "6+6="
    assert json.loads((run / "config.json").read_text())["task.arithmetic.operand_max"] == 5


def test_some_prompts_only(run):
    result = evaluate(run, name="few", evaluate__prompts=5, evaluate__final_samples=8)
    found = rows(run / "evaluations" / "few")
    assert result["prompts"] == len({row["index"] for row in found}) == 5
    assert len(rows(run / "evaluations" / "few", "samples.jsonl")) == 5 * (1 + 8)


def test_a_numbered_checkpoint_and_one_that_is_not_there(run):
    few = {"evaluate__prompts": 4, "evaluate__final_samples": 8}
    assert evaluate(run, checkpoint="2", **few)["checkpoint"] == "iteration-2"
    with pytest.raises(CheckpointError, match=r"--checkpoint=99: .* does not hold it; there are 2, 3"):
        evaluate(run, checkpoint="99", **few)
    with pytest.raises(CheckpointError, match="must be latest, reference, average, or the number"):
        evaluate(run, checkpoint="newest", **few)
    with pytest.raises(CheckpointError, match=r"--checkpoint=average: the run keeps no average"):
        evaluate(run, checkpoint="average", **few)


REFUSED = {
    "another model": ({"model__d_model": 32}, r"model.d_model: 16 there, 32 now"),
    "another run": ({"objective__beta": 0.5, "seed": 1}, r"objective.beta: 1.0 there, 0.5 now\n.*seed: 0 there, 1 now"),
    "another alphabet": ({"task__arithmetic__operators": "+-"}, r"characters '\+0123456789=', and .* '\+-0123456789='"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_of_the_measurement_is_refused_by_name(run, evaluated, case):
    changes, message = REFUSED[case]
    before = set((run / "evaluations").iterdir())
    seed = {"seed": changes.pop("seed")} if "seed" in changes else {}
    with pytest.raises(RunDirectoryError, match=message):
        mode.evaluate(config(**changes, **seed), run, Console(file=io.StringIO()))
    assert set((run / "evaluations").iterdir()) == before


def test_another_measurement_of_the_same_name_is_refused_by_key(run, evaluated):
    directory, _, _ = evaluated
    before = files(directory)
    with pytest.raises(RunDirectoryError, match=r"rollout.temperature: 1.0 there, 0.5 now\n.*--name=NAME"):
        evaluate(run, rollout__temperature=0.5, name=directory.name)
    with pytest.raises(RunDirectoryError, match=r"checkpoint.name: 'iteration-3' there, 'reference' now"):
        evaluate(run, checkpoint="reference", name=directory.name)
    assert files(directory) == before
    for name in ("../up", "a/b", ".hidden", ""):
        with pytest.raises(RunDirectoryError, match="--name="):
            evaluate(run, name=name)


def test_another_measurement_without_a_name_gets_one_of_its_own(run, evaluated):
    directory, result, _ = evaluated
    before, said = {path.name for path in directory.parent.iterdir()}, io.StringIO()
    few = {"evaluate__prompts": 3, "evaluate__final_samples": 4}
    found = evaluate(run, **few)
    (name,) = {path.name for path in directory.parent.iterdir()} - before
    assert re.fullmatch(f"{directory.name}-[0-9a-f]{{6}}", name)
    assert (found["prompts"], found["samples"]) == (3, 4)
    assert evaluate(run, said, **few, evaluate__examples=1) == found
    assert "measured before with these settings; --name=NAME measures again" in " ".join(said.getvalue().split())
    assert {path.name for path in directory.parent.iterdir()} == before | {name}
    assert evaluate(run) == result


def test_a_measurement_needs_no_prompts_for_an_iteration(tmp_path):
    """Four prompts where an iteration has eight, and fewer samples than a probe while training."""
    changes = {"task__arithmetic__operand_max": 1, "evaluate__samples": 8, "evaluate__final_samples": 4}
    result = evaluate(tmp_path, **changes, warm_start__max_steps=0, train__minibatches=3)
    assert (result["prompts"], result["samples"]) == (4, 4)
    found = rows(tmp_path / "evaluations" / "initial-arithmetic")
    assert [row["prompt"] for row in found] == ["0+0=", "0+1=", "1+0=", "1+1="]


def test_own_data_is_named_by_its_file_and_told_apart(tmp_path):
    task = SimpleNamespace(name="mine.jsonl", examples=(("1", "1"),), verify=find_verifier("exact"))
    policy = MeasuredPolicy("reference", 0, {}, None)
    names = []
    for split in ("test[:24]", "test[:24%]", "test[:24]"):
        c = config(task__name="dataset", task__dataset={"source": "/data/mine.jsonl", "prompt": "{q}", "split": split})
        identity = identity_of(c, task, policy)
        place = choose_directory(tmp_path, c, task, policy, identity, None)
        names.append(place.name)
        with open_run_directory(place, identity):
            (place / "blocks").mkdir(exist_ok=True)
    assert names[0] == names[2] == "reference-mine.jsonl-test_24_"
    assert re.fullmatch(r"reference-mine\.jsonl-test_24_-[0-9a-f]{6}", names[1])
    assert identity["task.verify"] == "grpo_jax.tasks.structured:verify_exact"


def test_without_a_run_the_initial_model_is_measured_and_a_run_may_follow(tmp_path):
    few = {"evaluate__prompts": 8, "evaluate__final_samples": 8}
    result = evaluate(tmp_path / "new", **few)
    assert (result["checkpoint"], result["kl"]) == ("initial", None)
    assert [p.name for p in (tmp_path / "new" / "evaluations").iterdir()] == ["initial-arithmetic"]
    with pytest.raises(CheckpointError, match="there is no run"):
        evaluate(tmp_path / "new", checkpoint="3", **few)
    with open_run_directory(tmp_path / "new", {"seed": 3}) as workdir:
        assert read_sealed(workdir / "config.json") == {"seed": 3}
        with pytest.raises(RunDirectoryError, match="in use by process"):
            evaluate(tmp_path / "new", **few)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        evaluate(tmp_path, **few)


HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "=== prompt 99: 16 of 16, greedy right\nsample 0: correct",
    "`|\r\u202e\u2028x",
    "9" * 5000,
]


def test_hostile_completions_stay_inert_and_majorities_are_counted(run, monkeypatch):
    def decode(setup, completions, mask):
        return [HOSTILE[i % 4] for i in range(mask.shape[0] * mask.shape[1])]

    def answer(text):
        return {0: "a", 1: "b", 2: "a"}[HOSTILE.index(text)]  # of the fourth it raises: no vote

    def judged(config, **options):
        task, objective = validate(config, **options)
        return task._replace(verify=find_verifier("number_last"), answer=answer), objective

    monkeypatch.setattr(mode, "validate", judged)
    monkeypatch.setattr(measurement, "decode", decode)
    result = evaluate(run, name="hostile", evaluate__prompts=4, evaluate__final_samples=8)
    directory = run / "evaluations" / "hostile"
    assert {"wrong", "unparsable"} <= set(result["verdicts"])
    assert result["disagreements"] == sum(s["reward"] for s in rows(directory, "samples.jsonl"))
    samples = rows(directory, "samples.jsonl")
    for s in samples:  # what the verifier did not judge does not vote
        judged = s["verdict"] in ("correct", "wrong")
        assert s["answer"] == ({0: "a", 1: "b", 2: "a"}.get(HOSTILE.index(s["text"])) if judged else None)
    assert {s["answer"] for s in samples if s["text"] == HOSTILE[2]} == {None}
    for row in rows(directory):
        mine = [s["answer"] for s in samples if s["index"] == row["index"] and not s["greedy"]]
        assert dict(row["answers"]) == {a: mine.count(a) for a in set(mine) - {None}}
    for k, found in result["majority"].items():
        assert 0 <= found["mean"] <= result["pass"][k]["mean"] + 1e-12
    text, page = (directory / "samples.txt").read_text(), (directory / "report.md").read_text()
    for shown in (text, page):
        assert all(c.isprintable() or c == "\n" for c in shown)
    assert {line[:4] for line in text.split("\n")} == {"=== ", "prom", "targ", "gree", "samp", "  │ ", ""}
    assert len(re.findall("^=== prompt", text, re.M)) == 4
    assert max(map(len, text.split("\n"))) < 120
    assert max(map(len, page.split("\n"))) < 1000


@pytest.mark.parametrize("verdict", Verdict)
def test_only_what_was_judged_votes(verdict):
    """An answer function sees no difference between a completion that was cut off and one that ended there."""
    task = Task("echo", (Example("1+1=", "2"),), find_verifier("number_last"), answer=find_answer("number_last"))
    cut = verdict not in ("correct", "wrong")
    sampled = [Completion("It is 2", Verdict.correct, 1.0, 3, False, None)]
    sampled += [Completion("It is 1", verdict, 0.0, 3, cut, None)] * 3
    row = mode._row(task, 0, sampled, sampled[0])
    assert (row["answers"], row["majority"]["4"]) == ([("2", 1)], 1.0) if cut else ([("1", 3), ("2", 1)], 0.0)
    assert mode._sample(task, 0, 0, sampled[1])["answer"] == (None if cut else "1")


SCRIPT = """
import sys
from grpo_jax.environment import prepare_environment
prepare_environment()
from rich.console import Console
from grpo_jax.train import evaluate
from tests.tiny_run import tiny_config
config = tiny_config(task__arithmetic__operand_max=5, evaluate__final_samples=512, data__prompts_per_iteration=4)
evaluate(config, sys.argv[1], Console())
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_the_unbroken_evaluation(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"} | cache

    def start(name):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name)], cwd=ROOT, env=environment)

    broken, unbroken = (tmp_path / name / "evaluations" / "initial-arithmetic" for name in ("broken", "unbroken"))
    process = start("broken")
    for _ in range(12_000):
        if len([*broken.glob("blocks/0*.json")]) >= 2 or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "result.json").exists()
    assert start("broken").wait(300) == 0
    assert start("unbroken").wait(300) == 0
    assert files(broken) == files(unbroken)
