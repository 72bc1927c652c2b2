"""Completions token by token: pieces that make the text, log π/π_ref that adds up to the completion's, and a bounded size."""

from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.data.tokenizers import ByteTokenizer, HFTokenizer
from grpo_jax.runs.completions import LONGEST, MOST_TOKENS, example, kept_rows, pieces
from grpo_jax.runs.measurement import completions_before, judged_samples, measure
from grpo_jax.train.iteration import role_key
from tests.runs.test_measurement import moved, run_of


def test_pieces_are_the_text_cut_where_tokens_end():
    setup = SimpleNamespace(tokenizer=ByteTokenizer(), stop_ids=(2,))
    ids = setup.tokenizer.encode("aé€b")
    assert pieces(setup, [*ids, 2]) == ["a", "", "é", "", "", "€", "b", ""]
    assert pieces(setup, ids[:2]) == ["a", "�"] and pieces(setup, []) == [] and pieces(setup, [2]) == [""]


def test_pieces_of_a_real_tokenizer_join_to_what_it_decodes(shared):
    tokenizer = HFTokenizer(shared / "models" / "stories260k")
    setup = SimpleNamespace(tokenizer=tokenizer, stop_ids=tokenizer.stop_ids)
    text = "Once upon a time,\n  there was a café — 猫 and a dog."
    ids = tokenizer.encode(text)
    found = pieces(setup, ids)
    assert "".join(found) == tokenizer.decode(ids) and len(found) == len(ids)
    assert "".join(found[:8]).startswith("Once u")  # a space belongs to the token that begins with it
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(3 + 256, tokenizer.vocab_size, 40).tolist()  # no single bytes
        assert "".join(pieces(setup, ids)) == tokenizer.decode(ids)


def test_log_ratios_of_tokens_add_up_to_those_of_completions(tmp_path):
    run = run_of(tmp_path, pool=True)
    setup, params = run.setup, run.setup.initial_params(0)
    kept, options = [3, 9], {"samples": 8, "batch_samples": 8}
    measured = measure(run, moved(params), params, 3, kept=kept, **options)
    key = role_key(run.base_key, "probe", 3)
    filled = options | {"num_prompts": 8, "texts": True}  # in the program of the measurement
    (judged,) = judged_samples(run, moved(params), params, key, np.array(kept), **filled)
    assert [row["index"] for row in measured.completions] == kept
    for p, row in enumerate(measured.completions):
        assert (row["prompt"], row["place"]) == (setup.task.examples[kept[p]].prompt, kept[p])
        assert len(row["completions"]) == 4
        for g, one in enumerate(row["completions"]):
            assert "".join(one["pieces"]) == judged.texts[8 * p + g]
            assert len(one["pieces"]) == len(one["log_ratios"]) == int(judged.rollout.mask[p, g].sum())
            assert sum(one["log_ratios"]) == pytest.approx(float(judged.log_ratios[p, g]), abs=3e-3)
            assert (one["reward"], one["verdict"]) == (judged.rewards[p, g], str(judged.verdicts[8 * p + g]))
            assert one["truncated"] == bool(judged.rollout.truncated[p, g])
    assert measure(run, params, params, 3, **options).completions == []
    assert measure(run, params, params, 3, kept=[3], **options).completions[0]["completions"][0]["log_ratios"] is None


def test_those_before_are_the_references_own_under_the_policy_of_the_end(tmp_path):
    run = run_of(tmp_path)
    params, kept = run.setup.initial_params(0), [0, 5, 15]
    before = completions_before(run, moved(params), params, kept)
    own = measure(run, params, params, 0, samples=16, kept=kept).completions
    assert [row["index"] for row in before] == kept
    key, options = role_key(run.base_key, "probe", 0), {"samples": 8, "batch_samples": 8, "num_prompts": 8}
    (judged,) = judged_samples(run, params, moved(params), key, np.array(kept), **options)  # of π_ref, log π_ref/π
    for p, (row, same) in enumerate(zip(before, own, strict=True)):
        for g, (one, other) in enumerate(zip(row["completions"], same["completions"], strict=True)):
            assert one["pieces"] == other["pieces"] and one["reward"] == other["reward"]
            assert sum(one["log_ratios"]) == pytest.approx(-float(judged.log_ratios[p, g]), abs=3e-3)
    assert any(x != 0 for row in before for one in row["completions"] for x in one["log_ratios"])


def test_what_is_kept_is_bounded(tmp_path):
    run = run_of(tmp_path)
    assert kept_rows(run, 100) == list(range(16)) and kept_rows(run, 0) == []
    assert kept_rows(run, 2) == [0, 15]
    run.config.unlock().rollout.max_completion = MOST_TOKENS // 4 // 3
    try:
        assert kept_rows(run, 100) == [0, 7, 15] and kept_rows(run, 100, times=1000) == [0]
    finally:
        run.config.rollout.max_completion = 3
    row = SimpleNamespace(prompt="x" * (LONGEST + 1), target="y")
    setup = SimpleNamespace(task=SimpleNamespace(examples=[row]), probed=np.arange(1))
    assert example(setup, 0) == {"index": 0, "place": 0, "prompt": "x" * LONGEST + "…", "target": "y"}
