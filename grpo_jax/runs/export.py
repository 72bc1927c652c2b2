"""--mode=export: a checkpoint of a run as a Hugging Face folder that other programs load, with a card that says what it is.

Weights are those of the checkpoint; all else is that of the folder the run began from: config.json with its control tokens,
tokenizer, chat template and generation settings.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.files import read_sealed, write_text
from grpo_jax.models import check_pretrained, plain_file, read_config, save_pretrained
from grpo_jax.models.lora import merge
from grpo_jax.models.pretrained import save_adapters
from grpo_jax.processes import count
from grpo_jax.report.markdown import interval_text
from grpo_jax.runs.directory import EVALUATIONS, REFERENCE, RESULT, lock_directory
from grpo_jax.runs.errors import RunDirectoryError
from grpo_jax.runs.measured_policy import MeasuredPolicy, find_policy, stored_config
from grpo_jax.runs.run import say, terminal
from grpo_jax.runs.setup import make_lora, make_setup
from grpo_jax.runs.target import at_chosen_beta
from grpo_jax.storage import fetched, flush_folder, is_here, names, place, write_bytes

COPIED = (  # of the folder that the run began from, where it has them
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
CARD = "README.md"
ADAPTERS_WITH = {CARD, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


def export(
    config: Any,
    workdir: str | Path,
    output: str | Path,
    console: Console | None = None,
    *,
    checkpoint: str = "latest",
    dtype: str = "float32",
    adapters: bool = False,
) -> Path:
    """Writes a checkpoint of a run into a new folder; whoever looks meanwhile finds none, or the whole one.

    Args:
      config: as for `evaluate`.
      workdir: the run directory.
      output: a folder of this machine that is not there yet, or is empty.
      console: where progress is shown; the terminal by default.
      checkpoint: "latest", "reference", "average", or the number of an iteration that was saved.
      dtype: of the weights: "float32", as they are, "bfloat16" or "float16".
      adapters: of a run with ``lora.rank``, as PEFT loads them; without it they are added to the weights.

    Returns:
      The folder.

    Raises:
      ConfigError, RunDirectoryError, CheckpointError, ValueError: each message says what to do.
    """
    console = console or terminal()
    task, objective = validate(config, num_devices=jax.device_count(), training=False)
    if config.model.path is None:
        raise ConfigError(
            ["--mode=export is for models of a folder (model.path): a random decoder has no files to go with"]
        )
    if adapters and (not config.lora.rank or checkpoint == "reference"):
        raise ConfigError(["--adapters is for what a run with lora.rank has trained: there are no adapters here"])
    if count() > 1:
        raise RunDirectoryError("--mode=export runs in one process: start it without --processes or --coordinator")
    folder = place(output)
    if not is_here(folder):
        raise RunDirectoryError(f"--output={output}: must be a folder of this machine")
    if os.path.ismount(folder):
        raise RunDirectoryError(f"--output={folder} is where a file system begins: name a folder in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(f"--output={folder} is there and not empty: choose another")
    source, workdir = Path(fetched(config.model.path)), place(workdir)
    if is_here(workdir) and folder.resolve().is_relative_to(workdir.resolve()):
        raise RunDirectoryError(f"--output={folder} is inside the run directory: choose a folder outside of it")
    if not names(workdir):
        raise RunDirectoryError(f"there is no run in {workdir}, so nothing to export")
    files = {name: plain_file(source, name).read_bytes() for name in COPIED if (source / name).exists()}
    with lock_directory(workdir):  # nothing is written to a checkpoint while it is read
        if (stored := stored_config(workdir, config)) is None:
            raise RunDirectoryError(f"there is no run in {workdir}, so nothing to export")
        setup = make_setup(config, task, objective, training=False)
        policy = find_policy(config, setup, workdir, checkpoint, has_run=True)
        if adapters and policy.name == "reference":
            raise RunDirectoryError(f"{workdir} has no checkpoint of its adapters yet")
        stored |= {"objective.beta": at_chosen_beta(config, workdir).objective.beta}
        card = model_card(stored, policy, workdir, dtype)
        policy = policy._replace(ref_params=None)  # whose memory is then free
    lora = make_lora(config) if adapters else None
    if config.model.stop_ids:  # the run's own ends of a completion
        settings = json.loads(files.get("generation_config.json", b"{}"))
        settings |= {"eos_token_id": list(config.model.stop_ids)}
        files["generation_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    say(console, f"exporting {policy.name} of {workdir}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        staged = Path(staging) / "model"
        files |= {CARD: card.encode()}
        if lora is not None:
            base = hub_name(source) or str(config.model.path)
            save_adapters(staged, lora, lora.split(policy.params), base=base, dtype=dtype)
            for name in ADAPTERS_WITH & files.keys():
                write_bytes(staged / name, files[name])
            flush_folder(staged)
        else:
            _write(staged, source, merge(policy.params), dtype, files)
        os.replace(staged, folder)  # an empty folder, too
    flush_folder(folder.parent)
    say(console, f"{folder}: {dtype} weights, {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return folder


def model_card(stored: dict[str, Any], policy: MeasuredPolicy, workdir: Path, dtype: str) -> str:
    """What the folder is: from which model and run, what was predicted and reached, and the commands."""
    lines: list[tuple[str, str]] = []
    if (workdir / REFERENCE).exists():
        counts = read_sealed(workdir / REFERENCE)
        solved, tried = sum(counts["successes"]), counts["trials"] * len(counts["successes"])
        lines.append(("success of the reference, p_ref", f"{solved / tried:.4f}"))
    result = read_sealed(workdir / RESULT) if (workdir / RESULT).exists() else None
    measured = None  # after training, of these weights
    if result is not None and policy.name == f"iteration-{result['iterations']}":
        measured = result
    elif result is not None and policy.name == f"average-{result['iterations']}":
        measured = result.get("average")
    if result is not None and measured is not None:
        confidence = result["confidence"]
        lines[-1:] = [("success of the reference, p_ref", interval_text(result["p_ref"], confidence))]
        for name, label in (
            ("p_star", "predicted by the theory, p*"),
            ("attainable", "predicted for this network, p†"),
        ):
            if isinstance(interval := result.get(name), dict) and "mean" in interval:
                lines.append((label, interval_text(interval, confidence)))
        lines.append(("success of this model, p̂", interval_text(measured["p_final"], confidence)))
        if (kl := measured["after"].get("kl")) is not None:
            lines.append(("KL(π‖π_ref), nats", f"{kl['mean'] if isinstance(kl, dict) else kl:.4f}"))
    for path in sorted((workdir / EVALUATIONS).glob(f"*/{RESULT}")):
        if (evaluation := read_sealed(path))["checkpoint"] == policy.name:
            lines.append((f"success in evaluations/{path.parent.name}", f"{evaluation['success']['mean']:.4f}"))
    path = Path(stored["model.path"])
    name = hub_name(path) or path.name
    settings = (
        ("base model", name),
        ("checkpoint", f"{policy.name} of {stored['train.iterations']}"),
        ("objective", stored["objective.name"]),
        ("β", f"{stored['objective.beta']:g}"),
        ("learning rate", f"{stored['optimizer.learning_rate']:g}, {stored['optimizer.schedule']}"),
        (
            "prompts × completions an iteration",
            f"{stored['data.prompts_per_iteration']} × {stored['rollout.group_size']}",
        ),
        ("task", stored["task.name"]),
        ("seed", str(stored["seed"])),
        *([("LoRA", f"rank {rank}")] if (rank := stored.get("lora.rank")) else []),
        ("weights", dtype),
    )
    there = "Measured on the prompts of the run, at its temperature:"
    missing = "This card holds no measurement of this checkpoint; `--mode=evaluate` makes one in the run directory."
    return "\n".join(
        [
            *("---", *of_hub(path), "library_name: transformers", "tags: [grpo]", "---", ""),
            *(f"# {name}, trained with GRPO", ""),
            "Trained with grpo_jax (arXiv 2503.06639).",
            *("", "| setting | value |", "|---|---|", *(f"| {label} | {value} |" for label, value in settings)),
            *("", missing if measured is None else there),
            *("", "| quantity | value |", "|---|---|", *(f"| {label} | {value} |" for label, value in lines)),
            *("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
            'model, tokenizer = (x.from_pretrained("FOLDER") for x in (AutoModelForCausalLM, AutoTokenizer))',
            *("```", ""),
            "The whole config and all numbers are in config.json, result.json and report.md of the run directory.",
            "",
        ]
    )


def of_hub(folder: Path) -> list[str]:
    """The line of a card's head that names the model, where the folder is a snapshot in Hugging Face's cache.

    >>> of_hub(Path("hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6")), of_hub(Path("mine"))
    (['base_model: Qwen/Qwen2.5-0.5B'], [])
    """
    name = hub_name(folder)
    return [] if name is None else [f"base_model: {name}"]


def hub_name(folder: Path) -> str | None:
    """The name of the model whose snapshot the folder is in Hugging Face's cache; None for any other folder."""
    names = [part.removeprefix("models--").replace("--", "/") for part in folder.parts if part.startswith("models--")]
    return names[-1] if names and re.fullmatch(r"[\w.-]+/[\w.-]+", names[-1]) else None


def _write(staged: Path, source: Path, params: Any, dtype: str, files: dict[str, bytes]) -> None:
    """Weights, config.json and other files, read back as far as headers tell."""
    stated = read_config(source)
    save_pretrained(staged, stated, params, dtype=dtype)
    entries = json.loads(plain_file(source, "config.json").read_text(encoding="utf-8"))
    entries = {name: value for name, value in entries.items() if name not in ("torch_dtype", "dtype")}
    write_text(staged / "config.json", json.dumps(entries | {"torch_dtype": dtype}, indent=2) + "\n")
    for name, content in files.items():
        write_bytes(staged / name, content)
    flush_folder(staged)
    assert read_config(staged) == stated
    check_pretrained(staged)
