"""Completions token by token, for report.html: pieces of text with log π/π_ref, few enough that a run directory stays small.

`PROBES` has those of the measurements on the way, a line for each prompt and iteration; `COMPLETIONS` those before and after, a
line for each measured prompt.

Dimension key: see grpo_jax.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.files import write_jsonl
from grpo_jax.processes import common, host
from grpo_jax.report.run_story import COMPLETIONS
from grpo_jax.runs.run import Run
from grpo_jax.runs.setup import Setup

if TYPE_CHECKING:
    from grpo_jax.runs.measurement import Judged

FEW = 4  # completions of a prompt
MOST_TOKENS = 1 << 17  # that all measurements on the way may keep together, and each of those before and after
LONGEST = 2_000  # characters of a prompt or target


def kept_rows(run: Run, most: int, *, times: int = 1) -> list[int]:
    """Rows of the dataset, evenly spread over the measured ones, whose completions are kept.

    Args:
      run: see `Run`.
      most: of them; one at least is taken of these, whatever `MOST_TOKENS` says.
      times: measurements that keep them.
    """
    probed = run.setup.probed
    allowed = max(1, MOST_TOKENS // (FEW * run.config.rollout.max_completion * max(1, times)))
    places = np.linspace(0, len(probed) - 1, min(allowed, most, len(probed))).astype(int)
    return probed[places].tolist()


def first_completions(
    setup: Setup, judged: "Judged", rows: np.ndarray, kept: Sequence[int], *, sign: int = 1
) -> list[dict[str, Any]]:
    """The first completions of those rows of the dataset that are kept.

    Args:
      setup: of the run.
      judged: completions of these rows, as the verifiers see them.
      rows: of the dataset.
      kept: those among them, and others.
      sign: −1 where the policy and its reference have changed places.

    Returns:
      For each row {"index": of it, "place": among the measured ones, "prompt", "target", "completions"}; of long texts the
      beginning. Each completion has the "pieces" of text that its tokens are, their
      "log_ratios" (log π/π_ref in nats, None without a reference), "reward", "verdict" (None where the device judges) and
      "truncated". The last piece of one that is not truncated may be a stop token, and is empty then.
    """
    few, places = min(FEW, judged.rewards.shape[1]), np.flatnonzero(np.isin(rows, kept))
    rollout, ratios = judged.rollout, judged.token_log_ratios
    completions, mask, truncated = (
        host(x[places, :few]) for x in (rollout.completions, rollout.mask, rollout.truncated)
    )  # [P, few, T], and [P, few]
    token_ratios = None if ratios is None else sign * host(ratios[places, :few])  # [P, few, T]

    def completion(place: int, number: int, g: int) -> dict[str, Any]:
        length, verdicts = int(mask[number, g].sum()), judged.verdicts
        return {
            "pieces": pieces(setup, completions[number, g, :length].tolist()),
            "log_ratios": None if token_ratios is None else rounded(token_ratios[number, g, :length].tolist()),
            "reward": float(judged.rewards[place, g]),
            "verdict": None if verdicts is None else str(verdicts[place * judged.rewards.shape[1] + g]),
            "truncated": bool(truncated[number, g]),
        }

    return [
        example(setup, int(rows[place])) | {"completions": [completion(place, number, g) for g in range(few)]}
        for number, place in enumerate(places.tolist())
    ]


def pieces(setup: Setup, tokens: list[int]) -> list[str]:
    """The pieces of text that tokens are; those that end within a character are empty, and the one that ends it has it.

    A stop token at the end is an empty piece. Each piece is read beside the one before it, since some tokenizers write a token
    otherwise where a text begins.
    """
    stops = bool(tokens) and tokens[-1] in setup.stop_ids
    decode, found, begin, done = setup.tokenizer.decode, [], 0, 0
    length = len(tokens) - stops
    for end in range(1, length + 1):
        before, now = decode(tokens[begin:done]), decode(tokens[begin:end])
        whole = end == length or not now.endswith("\ufffd")
        found.append(now[len(before) :] if whole else "")
        if whole:
            begin, done = done, end
    return found + [""] * stops


def rounded(values: list[float]) -> list[float | None]:
    """Nats to three digits; JSON has no NaN and no infinity.

    >>> rounded([0.12345, float("nan")])
    [0.123, None]
    """
    return [round(x, 3) if math.isfinite(x) else None for x in values]


def example(setup: Setup, row: int) -> dict[str, Any]:
    """A row of the dataset: its index, its place among the measured ones, the beginnings of its prompt and target."""
    found = setup.task.examples[row]
    texts = {"prompt": str(found.prompt), "target": str(found.target)}
    shortened = {name: text if len(text) <= LONGEST else f"{text[:LONGEST]}…" for name, text in texts.items()}
    return {"index": row, "place": int(np.searchsorted(setup.probed, row))} | shortened


def save_completions(run: Run, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Writes `COMPLETIONS`, from what `first_completions` returns of the reference and of the policy at the end."""
    sides = {"before": before, "after": after}
    of_rows = {name: {x["index"]: x["completions"] for x in found} for name, found in sides.items()}
    rows = [
        example(run.setup, row) | {name: found.get(row, []) for name, found in of_rows.items()}
        for row in run.setup.probed.tolist()
    ]
    common(lambda: write_jsonl(run.directory / COMPLETIONS, rows))
