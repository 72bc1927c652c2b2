"""Every number that peers' own functions gave (TRL, verl, NeMo, prime, open-instruct), against what is ours there.

`CASES` names each case of golden/peers_losses.json: the objective of ours that gives its loss, gradient and metrics, or the
reason why there is none. `METRICS` does so for the names of metrics. A case or metric that neither names fails the tests.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import CISPO, DAPO, GPG, GRPO_TRL, GSPO, SAPO, Objective, group_advantages, grpo_loss

UNCLIPPED = {"clip_low": None, "clip_high": None}
NO_KL, NARROW = {"kl": "none"}, {"clip_high": 0.2}
PLAIN = Objective(ratio="token", **UNCLIPPED, kl="none")  # the unclipped surrogate −r·A, which verl's `agg` aggregates
KL_ALONE = Objective(ratio="token", **UNCLIPPED)  # with advantages of zero


@dataclass
class Loss:
    """What of ours gives a loss of theirs.

    Attributes:
      objective: ours.
      beta: of the loss.
      options: arguments of `grpo_loss`; arrays by the name of the golden file's input.
      zero_advantages: of these rows the caller sets the advantage to zero.
      factor: theirs is ours times this.
      metrics: whether theirs mean ours too.
    """

    objective: Objective
    beta: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    zero_advantages: tuple[int, ...] = ()
    factor: float = 1.0
    metrics: bool = True


CASES: dict[str, Loss | dict[str, Any] | str] = {
    # TRL: loss, gradient, metrics
    "trl/grpo": Loss(replace(GRPO_TRL, **NO_KL)),
    "trl/bnpo": Loss(replace(DAPO, **NARROW)),
    "trl/dr_grpo(maxlen=8)": Loss(replace(GRPO_TRL, **NO_KL, scale="none", reduce="constant", constant_length=8)),
    "trl/dapo": Loss(replace(DAPO, **NARROW)),
    "trl/dapo eps_high=0.28": Loss(DAPO),
    "trl/dapo delta=1.5": Loss(replace(DAPO, **NARROW, ratio_cap=1.5)),
    "trl/cispo eps_high=5": Loss(CISPO),
    "trl/cispo default (eps_high=eps=0.2)": "refused: a cap of 0.2 is an absolute ratio, and scales every gradient by 0.2",
    "trl/sapo": Loss(SAPO),
    "trl/vespo": "not offered: weighs completions by a shaped power of their ratio",
    "trl/vespo + is_ratio": "not offered, as vespo",
    "trl/gspo = grpo,sequence,eps=3e-4/4e-4": Loss(GSPO),
    "trl/gspo = grpo,sequence,eps=0.2": Loss(replace(GSPO, clip_low=0.2, clip_high=0.2)),
    "trl/luspo,sequence,eps=0.2": Loss(replace(GSPO, clip_low=0.2, clip_high=0.2, reduce="sequence_sum")),
    "trl/grpo beta=0.04 k3": Loss(GRPO_TRL, beta=0.04),
    "trl/grpo beta=0.04 bias-corrected": Loss(replace(GRPO_TRL, kl="token_reverse_weighted"), beta=0.04),
    "trl/dapo beta=0.04 k3": Loss(replace(DAPO, **NARROW, kl="token_forward"), beta=0.04),
    "trl/dapo top_entropy_quantile=0.2": "not offered: drops the surrogate of tokens of low entropy; advantages are per row",
    # Their metrics count clipped tokens of the row that is switched off, ours do not.
    "trl/grpo off_policy_mask=0.1": Loss(replace(GRPO_TRL, **NO_KL), zero_advantages=(3,), metrics=False),
    "trl/dapo token IS ratio": Loss(
        replace(DAPO, **NARROW, correction="token", correction_cap=2.0), options={"sampler_logps": "sampler_logps"}
    ),
    "trl/dapo entropy_coef=0.01": Loss(replace(DAPO, **NARROW), options={"entropy_bonus": 0.01}),
    # verl: loss, gradient, metrics
    "verl/policy_loss/vanilla": Loss(replace(DAPO, dual_clip=3.0)),
    "verl/policy_loss/gspo": Loss(replace(GSPO, clip_low=0.2, clip_high=0.28)),
    "verl/policy_loss/sapo": Loss(SAPO),
    "verl/policy_loss/gpg": Loss(GPG),
    "verl/policy_loss/kl_cov": "not offered: a KL to π_old on a drawn share of tokens with high covariance of log π and A",
    "verl/policy_loss/geo_mean": "not offered: clips tokens before their geometric mean, and its clip depends on the sign of A",
    "verl/policy_loss/cispo": Loss(replace(CISPO, clip_low=0.2, ratio_cap=1.28)),
    # verl: the aggregation of −r·A
    "verl/agg/token-mean": Loss(replace(PLAIN, reduce="token_mean")),
    "verl/agg/seq-mean-token-sum": Loss(replace(PLAIN, reduce="sequence_sum")),
    "verl/agg/seq-mean-token-mean": Loss(replace(PLAIN, reduce="sequence_mean")),
    # Theirs divides by the length alone and not by the rows, so it grows with the batch: B = 4 times ours.
    "verl/agg/seq-mean-token-sum-norm": Loss(replace(PLAIN, reduce="constant", constant_length=5), factor=4.0),
    # Advantages: arguments of group_advantages
    "verl/advantage/grpo": {"ddof": 1, "epsilon": 1e-6, "epsilon_in": "std"},
    "verl/advantage/grpo nostd": {"scale": "none"},
    "verl/advantage/grpo_passk": "not offered: rewards the best completion by its lead over the second best",
    "verl/advantage/rloo": {"scale": "none", "baseline": "leave_one_out"},
    "verl/advantage/opo": "not offered: its baseline weighs rewards by completion lengths",
    "verl/advantage/gpg": "differs: scale='none' times prompts per live prompt, a factor that changes β from batch to batch",
    "verl/advantage/TRL group (ddof1, +1e-4)": {"ddof": 1, "epsilon_in": "std"},
    "verl/advantage/TRL batch": {"scale": "batch_std", "ddof": 1, "epsilon_in": "std"},
    "verl/advantage/TRL none / Dr.GRPO / prime / open-instruct centered": {"scale": "none"},
    "verl/advantage/paper population std (ddof0, sqrt(var+1e-5))": {"epsilon": 1e-5},
    "verl/advantage/open-instruct standard (ddof0,+1e-8)": {"epsilon": 1e-8, "epsilon_in": "std"},
    "verl/advantage/MaxRL (prime) (r-m)/m": {"scale": "mean"},
    "verl/advantage/NeMo default (LOO baseline+LOO std, skip std==0)": "not offered: divides by the std of the "
    "others, which is 0 for a lone success: its advantage, the largest, then stays undivided",
    # KL estimators: sum over tokens, and the gradient of the first row
    "verl/kl/k1": "refused: its expected gradient is zero, so β would do nothing",
    "verl/kl/k2": Loss(replace(KL_ALONE, kl="token_reverse"), beta=1.0, zero_advantages=(0, 1, 2, 3), factor=4.0),
    "verl/kl/k3": Loss(replace(KL_ALONE, kl="token_forward"), beta=1.0, zero_advantages=(0, 1, 2, 3), factor=4.0),
}

METRICS = {
    "entropy": "policy/entropy",
    "kl": "kl/token",
    "clip_ratio/low_mean": "policy/clip_low",
    "clip_ratio/high_mean": "policy/clip_high",
    "clip_ratio/region_mean": "policy/clip_fraction",
    "actor/pg_clipfrac": "policy/clip_fraction",
}
OTHER_METRICS = {
    "clip_ratio/low_min": "extremes over rows do not add up over micro-batches",
    "clip_ratio/high_max": "extremes over rows do not add up over micro-batches",
    "cispo_clip_ratio": "counts capped tokens of A > 0 alone; policy/clip_high counts all, which the cap holds alike",
    "policy_loss": "the loss without its bonus",
    "entropy_coef": "an argument",
    "vespo/phi_seq_mean": "vespo is not offered",
    "actor/ppo_kl": "mean log π_old/π of tokens; kl/previous is of completions, and weighed so that it is never negative in mean",
    "actor/pg_clipfrac_lower": "the share that the dual clip decides; not reported",
}
LOSSES = [name for name, ours in CASES.items() if isinstance(ours, Loss)]
ADVANTAGES = [name for name, ours in CASES.items() if isinstance(ours, dict)]


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/peers_losses.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden):
    inputs = {name: jnp.asarray(value, jnp.float32) for name, value in golden["trl"]["inputs"].items()}
    # Their correction is given as the ratio of the trainer's to the sampler's probabilities.
    return inputs | {"sampler_logps": inputs["old_logps"] - jnp.log(inputs["importance_sampling_ratio"])}


@pytest.fixture(scope="module")
def theirs(golden):
    """Every case of the file by its name in `CASES`."""
    verl = {block: golden["verl"][block] for block in ("policy_loss", "agg", "advantage", "kl")}
    named = {f"trl/{name}": case for name, case in golden["trl"]["cases"].items()}
    return named | {f"verl/{block}/{name}": case for block, cases in verl.items() for name, case in cases.items()}


def run(ours: Loss, arrays):
    """(loss, gradient, metrics) of ours on their inputs."""
    advantages = arrays["advantages"].at[jnp.array(ours.zero_advantages, int)].set(0.0)
    options = {k: arrays[v] if isinstance(v, str) else v for k, v in ours.options.items()}

    def loss(logps):
        value, metrics = grpo_loss(
            logps,
            arrays["old_logps"],
            arrays["ref_logps"],
            advantages,
            arrays["mask"] == 1,
            beta=ours.beta,
            objective=ours.objective,
            entropy=arrays["entropies"],
            **options,
        )
        return ours.factor * value, metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["new_logps"])
    return value, gradient, metrics


def test_every_case_and_metric_is_named(golden, theirs):
    assert set(golden) == {"note", "trl", "verl"}
    assert set(golden["trl"]) == {"source", "inputs", "cases"}
    assert set(golden["verl"]) == {"source", "policy_loss", "agg", "advantage", "kl", "advantage_inputs"}
    assert set(theirs) == set(CASES)
    metrics = {name for case in theirs.values() if isinstance(case, dict) for name in case.get("metrics", {})}
    assert metrics == METRICS.keys() | OTHER_METRICS.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_gradients_and_metrics(name, theirs, arrays):
    wanted, ours = theirs[name], CASES[name]
    value, gradient, metrics = run(ours, arrays)
    if not isinstance(wanted, dict):
        return np.testing.assert_allclose(value, wanted, atol=1e-5)
    np.testing.assert_allclose(value, wanted.get("loss", wanted.get("sum")), atol=1e-5)
    for key, slope in (("grad", gradient), ("grad_row0", gradient[0])):
        if key in wanted:
            np.testing.assert_allclose(slope, wanted[key], atol=1e-5)
    compared = wanted.get("metrics", {}).keys() & METRICS.keys() if ours.metrics else ()
    for metric in compared:
        np.testing.assert_allclose(
            metrics[METRICS[metric]], wanted["metrics"][metric], atol=1e-5, err_msg=f"{name}: {metric}"
        )
    return None


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name, golden, theirs):
    inputs = golden["verl"]["advantage_inputs"]
    rewards = jnp.array(inputs["rewards"]).reshape(inputs["groups"], inputs["G"])
    advantages = group_advantages(rewards, **CASES[name]).reshape(-1)
    np.testing.assert_allclose(advantages, theirs[name], atol=1e-5)  # the file prints five decimals


def test_differences_are_what_the_table_says(golden):
    """verl's gpg multiplies by prompts/live prompts; NeMo leaves undivided what it cannot divide."""
    wanted, inputs = golden["verl"]["advantage"], golden["verl"]["advantage_inputs"]
    rewards = np.array(inputs["rewards"]).reshape(inputs["groups"], inputs["G"])
    live = (rewards != rewards[:, :1]).any(-1)
    ours = np.asarray(group_advantages(rewards, scale="none"))
    np.testing.assert_allclose(ours.reshape(-1) * len(live) / live.sum(), wanted["gpg"], atol=1e-5)
    others = np.stack([np.delete(rewards, i, axis=1) for i in range(4)], axis=1)
    std = others.std(-1, ddof=1)
    nemo = (rewards - others.mean(-1)) / np.where(std == 0, 1, std)
    np.testing.assert_allclose(nemo.reshape(-1), wanted["NeMo default (LOO baseline+LOO std, skip std==0)"], atol=1e-5)
    with pytest.raises(ValueError, match=r"ratio_cap=0\.2 must be finite and above 1"):
        replace(CISPO, ratio_cap=0.2)
    with pytest.raises(ValueError, match="kl='k1' in the loss has zero expected gradient"):
        replace(KL_ALONE, kl="k1")
