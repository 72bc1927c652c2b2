"""Sampling and update on one accelerator, as shares of what it can do: `python -m experiments.benchmarks.accelerator`.

python -m experiments.benchmarks.accelerator [--size=0.5B,1.5B] [--rows=64,256,512] [--profile] [--quick]

Models shaped like Qwen2.5 with random weights, float32 as the optimizer holds them and multiplied in bfloat16, groups of 16,
prompts of 256 and completions of 1,024 tokens. What the device can do is measured first, by a large copy and a large product.
Sampling is a share of the time that its bytes, or its products, need at that speed; an update's share is its model FLOPs
utilisation. A case is a process of its own; ``--quick`` takes one model and one number of rows, some minutes. With
GRPO_JAX_TRANSFORMERS_PYTHON naming an interpreter that has transformers and torch for the card, transformers' generate and its
continuous batching run too. What to expect of a device that is not there: `experiments.benchmarks.compiled`.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import operations
from experiments.benchmarks.limits import Device, Work, rollout_seconds, update_flops
from experiments.benchmarks.programs import SIZES, WORKS, Setting, decoder
from experiments.benchmarks.race import Form, Worker, write_json

OURS = Form("ours", (sys.executable, "-m", "experiments.benchmarks.device_worker"))
PEER = str(Path(__file__).resolve().parent / "transformers_worker.py")
PEERS = ("generate", "continuous batching")


def measure_device(repeats: int) -> tuple[Device, str]:
    """What the device can do, medians of ``repeats`` measurements, and its name."""
    with tempfile.TemporaryDirectory() as folder, Worker(OURS, {"work": "limits"}, Path(folder)) as worker:
        answers = [worker.ask() for _ in range(repeats + 1)][1:]
        flops, bandwidth = (statistics.median(a[name] for a in answers) for name in ("flops", "bandwidth"))
        return Device(flops, bandwidth, worker.ready["memory"]), worker.ready["device"]


def measure(form: Form, request: dict[str, Any], device: Device, repeats: int) -> dict[str, Any]:
    """The row of a form, a work and a setting: medians of ``repeats`` warm repetitions; or why there is none.

    Args:
      form: the program.
      request: ``work`` and the fields of a `Setting`, and what else the program reads.
      device: what the shares are shares of.
      repeats: repetitions that count, after one that does not.
    """
    setting = Setting(**{name: request[name] for name in Setting._fields})
    row = {"form": form.name, "work": request["work"], "setting": setting._asdict()}
    try:
        with tempfile.TemporaryDirectory() as folder, Worker(form, request, Path(folder)) as worker:
            row |= worker.ready
            answers = [worker.ask() for _ in range(repeats + 1)][1:]
    except RuntimeError as error:  # out of memory, say; the other cases go on
        return row | {"refused": str(error)}
    works = [Work(np.array(a["lengths"]).reshape(-1, setting.group), setting.prompt) for a in answers]
    least = [least_seconds(request["work"], setting, work, device) for work in works]
    measured = {
        "seconds": [a["inside"] for a in answers],
        "tokens_per_second": [work.tokens / a["inside"] for work, a in zip(works, answers, strict=True)],
        "share": [s / a["inside"] for s, a in zip(least, answers, strict=True)],
        "useful": [a["useful"] for a in answers if a.get("useful") is not None],
    }
    for name, values in measured.items():
        if values:
            row[name] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return row | {"limit_seconds": statistics.median(least), "peak": answers[-1]["peak"]}


def least_seconds(work: str, setting: Setting, load: Work, device: Device) -> float:
    """The limit of a rollout or of an update."""
    config = decoder(setting)
    return rollout_seconds(config, load, device) if work == "sampling" else update_flops(config, load) / device.flops


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `measure` as Markdown; the share is of the limit: of bandwidth in sampling, MFU in updates.

    >>> print(table([]), end="")
    | model | rows | work | lengths | form | tokens/s | s (spread) | share | useful | peak GiB | compile s, cold | cached |
    |---|---|---|---|---|---|---|---|---|---|---|---|
    """
    head = ["model", "rows", "work", "lengths", "form", "tokens/s", "s (spread)", "share", "useful", "peak GiB"]
    head += ["compile s, cold", "cached"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        setting = row["setting"]
        cells = [
            setting["size"],
            str(setting["rows"]),
            row["work"],
            "ragged" if setting["ragged"] else "fixed",
            row["form"],
        ]
        if "refused" in row:
            reason = row["refused"].strip().splitlines()[-1][:120]
            lines.append("| " + " | ".join([*cells, f"not run: {reason}", *["–"] * 6]) + " |")
            continue
        s = row["seconds"]
        cells += [f"{row['tokens_per_second']['median']:,.0f}"]
        cells += [f"{s['median']:.3g} ({s['low']:.3g}–{s['high']:.3g})", f"{100 * row['share']['median']:.1f} %"]
        cells += [f"{100 * row['useful']['median']:.0f} %" if "useful" in row else "–"]
        cells += ["–" if row["peak"] is None else f"{row['peak'] / 2**30:.1f}"]
        cells += [f"{row[name]:.1f}" if name in row else "–" for name in ("compile_cold", "compile_cached")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def requests(settings: list[Setting], works: list[str], peer: str | None, trace: Path | None) -> list[Any]:
    """(form, request) of everything to measure, in order."""
    forms_and_requests: list[tuple[Form, dict[str, Any]]] = []
    for setting in settings:
        for work in works:
            lengths = "ragged" if setting.ragged else "fixed"
            folder = None if trace is None else str(trace / f"{work}_{setting.size}_{setting.rows}_{lengths}")
            request = {"work": work, **setting._asdict(), "trace": folder}
            forms_and_requests.append((OURS, request))
            if work == "sampling" and peer:
                command = (peer, PEER)
                forms_and_requests += [
                    (Form(name, command), request | {"form": name} | _peer_model(setting)) for name in PEERS
                ]
    return forms_and_requests


def _peer_model(setting: Setting) -> dict[str, Any]:
    c = decoder(setting)
    numbers = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": c.max_length,
        "tie_word_embeddings": True,
    }
    return {"config": numbers, "stops": c.vocab_size // setting.mean if setting.ragged else 0}


def _settings() -> list[Setting]:
    """What the flags ask for; UsageError where that cannot be."""
    options = flags.FLAGS
    sizes = ["0.5B"] if options.quick and not options["size"].present else options.size
    rows = (
        [64] if options.quick and not options["rows"].present else [int(n) if n.isdigit() else 0 for n in options.rows]
    )
    if unknown := set(sizes) - set(SIZES):
        raise app.UsageError(f"--size={','.join(unknown)}: there are {', '.join(SIZES)}")
    if any(n < 1 or n % options.group for n in rows):
        raise app.UsageError(f"--rows={','.join(options.rows)} must be multiples of --group={options.group}")
    numbers = {name: getattr(options, name) for name in Setting._fields[2:] if name != "ragged"}
    return [Setting(s, n, ragged=r == "ragged", **numbers) for s in sizes for n in rows for r in options.lengths]


def main(arguments: list[str]) -> None:
    """Prints a table and writes accelerator.json, after every case."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    options, settings = flags.FLAGS, _settings()
    repeats, rows = 2 if options.quick else options.repeats, []
    device, name = measure_device(repeats)
    print(f"{name}: {device.flops / 1e12:.4g} TFLOP/s in bfloat16, {device.bandwidth / 1e12:.4g} TB/s\n", flush=True)
    trace = Path(options.out) / "profiles" if options.profile else None
    for form, request in requests(settings, options.works, os.environ.get("GRPO_JAX_TRANSFORMERS_PYTHON"), trace):
        row = measure(form, request, device, repeats)
        rows.append(row)
        write_json(options.out, "accelerator", [{"device": name, **device._asdict()}, *rows])
        print(table([row]) if len(rows) == 1 else table([row]).splitlines()[-1], flush=True)
        if "operations" in row:
            print(f"\n{operations.table(row['operations'])}", flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "")  # whatever jax finds
    flags.DEFINE_list("size", ["0.5B", "1.5B"], f"Models: {', '.join(SIZES)}.")
    flags.DEFINE_list("rows", ["64", "256", "512"], "Completions B at a time.")
    flags.DEFINE_list("works", ["sampling", "update"], f"Of {', '.join(WORKS[:2])}.")
    flags.DEFINE_list("lengths", ["fixed", "ragged"], "Of the completions.")
    flags.DEFINE_integer("group", 16, "G.")
    flags.DEFINE_integer("prompt", 256, "S.")
    flags.DEFINE_integer("completion", 1024, "T.")
    flags.DEFINE_integer("mean", 256, "Mean of ragged lengths, before T cuts them.")
    flags.DEFINE_integer("microbatch", 32_768, "Tokens whose activations exist at once in the update.")
    flags.DEFINE_integer("chunk", 128, "Positions of each row whose logits exist at once in the update.")
    flags.DEFINE_integer("repeats", 5, "Repetitions that count.")
    flags.DEFINE_bool("profile", False, "Trace one repetition of each case, and print where its time goes.")
    flags.DEFINE_string("out", "runs/benchmarks", "Where the JSON and the profiles go.")
    flags.DEFINE_bool("quick", False, "The smaller model, 64 rows, 2 repetitions: a first look.")
    app.run(main)
