"""What is refused: impossible objectives with their reason, and bad arguments by name, before anything is compiled."""

from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objective import (
    CISPO,
    DAPO,
    GPG,
    GRPO,
    GRPO_TRL,
    GSPO,
    MIRROR_GRPO,
    SAPO,
    TWO_KL_GRPO,
    Objective,
    beta_effective,
    contrastive_loss,
    group_advantages,
    grpo_loss,
    grpo_loss_terms,
    named_objective,
)
from grpo_jax.objective.objective import CHOICES, KL_TERMS, _faults

B, T, G = 8, 5, 4
REAL = jnp.linspace(-2.0, -0.1, B * T).reshape(B, T)
ROWS = {"logps": REAL, "old_logps": REAL, "ref_logps": REAL, "advantages": REAL[:, 0], "mask": REAL > -1.5}
CONTRAST = {"logps": REAL, "old_logps": REAL, "rewards": jnp.ones(B), "mask": REAL > -1.5, "group_size": G}

UNKNOWN = [
    ({"kl": "k1"}, r"kl='k1' in the loss has zero expected gradient.*'sequence_reverse'"),
    ({"kl": "sequence"}, r"kl='sequence' is not one of 'sequence_reverse', .*'none'"),
    ({"ratio": "tokens"}, r"ratio='tokens' is not one of 'token', 'sequence', 'sequence_product', 'none'"),
    ({"surrogate": "vespo"}, r"surrogate='vespo' is not one of 'clip', 'cispo', 'sapo'"),
    ({"reduce": "mean"}, r"reduce='mean' is not one of 'sequence_sum', 'sequence_mean', 'token_mean', 'constant'"),
    ({"anchor": "old"}, r"anchor='old' is not one of 'reference', 'previous', 'both'"),
    ({"correction": "is"}, r"correction='is' is not one of 'token', 'sequence', 'none'"),
    ({"overlong": "mask"}, r"overlong='mask' is not one of 'keep', 'ignore'"),
    ({"baseline": "median"}, r"baseline='median' is not one of 'mean', 'leave_one_out', 'none'"),
    ({"scale": "stdd"}, r"scale='stdd' is not one of 'std', 'mean', 'batch_std', 'none'"),
    ({"ddof": 2}, r"ddof=2 is not one of 0, 1"),
    ({"epsilon_in": "root"}, r"epsilon_in='root' is not one of 'variance', 'std'"),
    ({"epsilon": -1e-8}, r"epsilon=-1e-08 must be finite and not negative"),
    ({"epsilon": float("nan")}, r"epsilon=nan must be finite"),
    ({"epsilon": float("inf")}, r"epsilon=inf must be finite"),
]
FAULTS = [
    (SAPO, {"ratio": "none"}, r"surrogate='sapo' bounds a ratio, and ratio='none' has none"),
    (CISPO, {"ratio": "sequence"}, r"surrogate='cispo' weighs tokens.*ratio='sequence'"),
    (CISPO, {"ratio_cap": None}, r"surrogate='cispo' needs ratio_cap"),
    (CISPO, {"reduce": "sequence_sum"}, r"surrogate='cispo' with reduce='sequence_sum'.*grows with their length"),
    (SAPO, {"tau_plus": None}, r"surrogate='sapo' needs tau_plus and tau_minus"),
    (SAPO, {"tau_minus": None}, r"surrogate='sapo' needs tau_plus and tau_minus"),
    (SAPO, {"clip_low": 0.2}, r"clip_low=0\.2 is not read: it belongs to surrogate='clip' and 'cispo'"),
    (GPG, {"clip_low": 0.2}, r"clip_low=0\.2 is not read"),
    (CISPO, {"clip_high": 0.2}, r"clip_high=0\.2 is not read.*ratio_cap"),
    (SAPO, {"ratio_cap": 2.0}, r"ratio_cap=2\.0 is not read: it belongs to surrogate='clip' and 'cispo'"),
    (CISPO, {"dual_clip": 3.0}, r"dual_clip=3\.0 is not read: it belongs to surrogate='clip'"),
    (DAPO, {"tau_plus": 1.0}, r"tau_plus=1\.0 is not read: it belongs to surrogate='sapo'"),
    (DAPO, {"tau_minus": 1.0}, r"tau_minus=1\.0 is not read: it belongs to surrogate='sapo'"),
    (DAPO, {"constant_length": 8}, r"constant_length=8 is not read: it belongs to reduce='constant'"),
    (
        DAPO,
        {"correction_cap": 2.0},
        r"correction_cap=2\.0 is not read: it belongs to correction='token' and 'sequence'",
    ),
    (GRPO, {"clip_low": 0.0}, r"clip_low=0\.0 must be finite and above 0"),
    (GRPO, {"clip_low": float("nan")}, r"clip_low=nan must be finite and above 0"),
    (GRPO, {"clip_low": 1.5}, r"clip_low=1\.5 must be at most 1"),
    (GRPO, {"clip_high": 0.0}, r"clip_high=0\.0 must be finite and above 0"),
    (GRPO, {"clip_high": float("inf")}, r"clip_high=inf must be finite"),
    (CISPO, {"ratio_cap": 0.2}, r"ratio_cap=0\.2 must be finite and above 1"),
    (CISPO, {"ratio_cap": 1.0}, r"ratio_cap=1\.0 must be finite and above 1"),
    (DAPO, {"ratio_cap": 1.28}, r"ratio_cap=1\.28 must lie above 1 \+ clip_high=0\.28"),
    (DAPO, {"dual_clip": 1.0}, r"dual_clip=1\.0 must be finite and above 1"),
    (SAPO, {"tau_plus": 0.0}, r"tau_plus=0\.0 must be finite and above 0"),
    (SAPO, {"tau_minus": -1.0}, r"tau_minus=-1\.0 must be finite and above 0"),
    (GRPO, {"reduce": "constant"}, r"reduce='constant' needs constant_length, in tokens"),
    (GRPO, {"reduce": "constant", "constant_length": 0}, r"constant_length=0 must be finite and above 0"),
    (GRPO, {"reduce": "constant", "constant_length": 2.5}, r"constant_length=2.5 must be a whole number"),
    (GRPO, {"clip_low": True}, r"clip_low=True must be finite and above 0"),
    (DAPO, {"correction": "token"}, r"correction='token' needs correction_cap"),
    (DAPO, {"correction": "token", "correction_cap": 0.0}, r"correction_cap=0\.0 must be finite and above 0"),
    (GRPO, {"correction": "token", "correction_cap": 2.0}, r"correction='token' cannot weigh ratio='sequence_product'"),
    (GSPO, {"correction": "token", "correction_cap": 2.0}, r"correction='token' cannot weigh ratio='sequence'"),
    (
        GRPO,
        {"ratio": "token", "correction": "token", "correction_cap": 2.0},
        r"correction='token' cannot weigh ratio='token' with kl='sequence_reverse'",
    ),
    (DAPO, {"anchor": "both"}, r"anchor='both' needs a KL, and kl='none' has none"),
]


@pytest.mark.parametrize(("choice", "match"), UNKNOWN)
def test_unknown_choices_are_named_with_the_known(choice, match):
    with pytest.raises(ValueError, match=match):
        Objective(**choice)


@pytest.mark.parametrize(("near", "choices", "match"), FAULTS)
def test_impossible_objectives_are_refused_with_the_reason(near, choices, match):
    with pytest.raises(ValueError, match=match):
        replace(near, **choices)


def test_every_fault_is_reached():
    """Each line of the list of faults is the first to speak in some case above."""
    first = []
    for near, choices, _ in FAULTS:
        holds = [holds for holds, _ in _faults(SimpleNamespace(**asdict(near) | choices))]
        first.append(holds.index(True))
    assert set(first) == set(range(len(_faults(GRPO))))


def test_a_kl_term_that_is_listed_but_not_written_is_refused(monkeypatch):
    """A new name in the table trains no other term in its place."""
    monkeypatch.setitem(KL_TERMS, "token_new", KL_TERMS["token_forward"])
    monkeypatch.setitem(CHOICES, "kl", (*KL_TERMS, "none"))
    with pytest.raises(ValueError, match="kl='token_new' has no token-wise term here"):
        grpo_loss_terms(**ROWS, beta=0.1, objective=replace(GRPO_TRL, kl="token_new"))


def test_every_kl_has_a_term_a_direction_and_an_end():
    assert CHOICES["kl"] == (*KL_TERMS, "none")
    for kl, term in KL_TERMS.items():
        objective = replace(GRPO_TRL, kl=kl)
        assert jnp.isfinite(grpo_loss_terms(**ROWS, beta=0.1, objective=objective).total)
        assert objective.kl_direction == term.direction in ("reverse", "forward")
        assert objective.fixed_point == term.end


def test_named_objectives_are_changed_by_name():
    with pytest.raises(ValueError, match="objective 'PPO' is not one of GRPO, DR_GRPO"):
        named_objective("PPO")
    with pytest.raises(ValueError, match=r"ratio_cap=0\.5"):
        named_objective("CISPO", ratio_cap=0.5)
    with pytest.raises(TypeError, match="gamma"):
        named_objective("GRPO", gamma=1.0)
    with pytest.raises(TypeError, match="positional"):
        Objective("mean")


TWO, MIRROR = {"objective": TWO_KL_GRPO}, {"objective": MIRROR_GRPO}
CORRECTED = {"objective": replace(GRPO, correction="sequence", correction_cap=2.0)}
BAD = {
    "rank": ({"logps": REAL[0]}, ValueError, r"logps must be \[B, T\], got \(5,\)"),
    "no logps": ({"logps": None}, TypeError, "logps must be an array, got NoneType"),
    "a list for logps": ({"logps": [[0.0]]}, TypeError, "logps must be an array, got list"),
    "a list for a mask": ({"mask": [[True] * T] * B}, TypeError, "mask must be an array, got list"),
    "no mask": ({"mask": None}, TypeError, "mask must be an array, got NoneType"),
    "a list for advantages": ({"advantages": [0.0] * B}, TypeError, "advantages must be an array, got list"),
    "old shape": ({"old_logps": REAL[:, 1:]}, ValueError, r"old_logps.* of logps \(8, 5\), got \(8, 4\)"),
    "ref shape": ({"ref_logps": REAL.T}, ValueError, r"ref_logps.* of logps \(8, 5\), got \(5, 8\)"),
    "ref rank": ({"ref_logps": REAL.reshape(2, 4, 5)}, ValueError, r"ref_logps.* \(8, 5\), got \(2, 4, 5\)"),
    "entropy shape": ({"entropy": REAL[0]}, ValueError, r"entropy.* of logps \(8, 5\), got \(5,\)"),
    "sampler shape": ({"sampler_logps": REAL[:1]}, ValueError, r"sampler_logps.* of logps \(8, 5\), got \(1, 5\)"),
    "mask shape": ({"mask": REAL[:, :1] < 0}, ValueError, r"mask.* of logps \(8, 5\), got \(8, 1\)"),
    "mask dtype": ({"mask": jnp.ones((B, T))}, TypeError, r"mask must be bool \(True counts\), got float32"),
    "integer mask": ({"mask": jnp.ones((B, T), jnp.int32)}, TypeError, r"mask must be bool \(True counts\), got int32"),
    "advantages of tokens": ({"advantages": REAL}, ValueError, r"advantages must be \[B\] = \(8,\).*got \(8, 5\)"),
    "advantages column": ({"advantages": REAL[:, :1]}, ValueError, r"advantages must be \[B\].*got \(8, 1\)"),
    "advantages of groups": ({"advantages": REAL[:2, :4]}, ValueError, r"advantages must be \[B\].*got \(2, 4\)"),
    "integer advantages": ({"advantages": jnp.ones(B, jnp.int32)}, TypeError, "advantages must be real, got int32"),
    "integer logps": ({"logps": jnp.ones((B, T), jnp.int32)}, TypeError, "logps must be real, got int32"),
    "integer ref": ({"ref_logps": jnp.ones((B, T), jnp.int32)}, TypeError, "ref_logps must be real, got int32"),
    "group does not divide": ({"group_size": 3}, ValueError, r"group_size=3 .*divide the 8 rows of logps \(8, 5\)"),
    "group of one": ({"group_size": 1}, ValueError, "group_size=1 must be .*at least 2"),
    "group of none": ({"group_size": 0}, ValueError, "group_size=0 must be .*at least 2"),
    "real group": ({"group_size": 2.0}, ValueError, "group_size=2.0 must be an integer"),
    "no ref": ({"ref_logps": None}, ValueError, "ref_logps may be None only where nothing holds to the reference"),
    "no old": ({"old_logps": None, "beta_mirror": 0.1} | TWO, ValueError, "old_logps is needed for anchor='both'"),
    "mirror of nothing": (MIRROR, ValueError, "beta_mirror=0 with anchor='previous'"),
    "mirror unread": ({"beta_mirror": 0.1}, ValueError, "beta_mirror would do nothing.*TWO_KL_GRPO"),
    "bonus of nothing": ({"entropy_bonus": 0.1}, ValueError, "entropy_bonus needs entropy"),
    "correction of nothing": (CORRECTED, ValueError, "sampler_logps is needed for correction='sequence'"),
    "clip unread": ({"objective": GPG, "clip_low": 0.1}, ValueError, "clip_low would do nothing"),
    "cap unread": ({"objective": CISPO, "clip_high": 0.1}, ValueError, "clip_high would do nothing"),
    "clips": ({"clip_low": jnp.ones(T)}, ValueError, r"clip_low must be a scalar, got shape \(5,\)"),
    "clips of rows": ({"clip_high": jnp.ones((B, 1))}, ValueError, r"clip_high must be a scalar, got shape \(8, 1\)"),
    "clip below": ({"clip_low": -0.5}, ValueError, "clip_low=-0.5 must be finite and not negative"),
    "objective by name": ({"objective": "GRPO"}, TypeError, "objective must be an Objective, .*got 'GRPO'"),
}
WEIGHTS = {
    "beta": {},
    "beta_mirror": {"objective": TWO_KL_GRPO},
    "entropy_bonus": {"entropy": REAL},
}


@pytest.mark.parametrize("loss", [grpo_loss, grpo_loss_terms])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case, loss):
    changes, error, match = BAD[case]
    with pytest.raises(error, match=match):
        loss(**{"beta": 0.1} | ROWS | changes)


@pytest.mark.parametrize("loss", [grpo_loss, grpo_loss_terms])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_terms_are_scalar_floats_that_are_not_negative(name, loss):
    arguments = {"beta": 0.1} | ROWS | WEIGHTS[name]
    for weight in (-1.0, float("nan"), float("inf"), np.float64(-1.0)):
        with pytest.raises(ValueError, match=rf"{name}={weight} must be finite and not negative"):
            loss(**arguments | {name: weight})
    for weight in (1, True, np.int64(1), jnp.int32(1), jnp.array(True)):
        with pytest.raises(TypeError, match=rf"{name}=.* must be a float: an integer"):
            loss(**arguments | {name: weight})
    for weight in (jnp.ones(8), np.ones(8), jnp.ones((1, 1))):
        with pytest.raises(ValueError, match=rf"{name} must be a scalar, got shape .*jax\.vmap"):
            loss(**arguments | {name: weight})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"mask": jnp.ones((B, T))}, TypeError, "mask must be bool"),
        ({"logps": REAL[:, 1:]}, ValueError, r"must have the shape of logps \(8, 4\), got \(8, 5\)"),
        ({"advantages": REAL}, ValueError, r"advantages must be \[B\]"),
        ({"beta": jnp.int32(1)}, TypeError, "beta=.*must be a float"),
        ({"beta": jnp.ones(8)}, ValueError, r"beta must be a scalar, got shape \(8,\)"),
    ],
)
def test_refusals_need_no_program(changes, error, match):
    """Shapes and types alone decide: also under jit, grad and vmap, before a program exists."""
    arguments = {"beta": jnp.float32(0.1)} | ROWS | changes
    logps = arguments.pop("logps")

    def loss(logps, others):
        return grpo_loss_terms(logps, **others).total

    for transformed in (jax.jit(loss), jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss))):
        with pytest.raises(error, match=match):
            jax.eval_shape(transformed, logps, arguments)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"logps": REAL[0]}, ValueError, r"must be \[B, T\] alike, got \[\(5,\), \(8, 5\), \(8, 5\)\]"),
        ({"old_logps": REAL[:, 1:]}, ValueError, r"got \[\(8, 5\), \(8, 4\), \(8, 5\)\]"),
        ({"mask": REAL[:1] < 0}, ValueError, r"got \[\(8, 5\), \(8, 5\), \(1, 5\)\]"),
        ({"mask": jnp.ones((B, T))}, TypeError, "mask must be bool"),
        ({"rewards": REAL}, ValueError, r"rewards must be \[B\] = \(8,\), got \(8, 5\)"),
        ({"rewards": jnp.ones((2, 4))}, ValueError, r"rewards must be \[B\] = \(8,\), got \(2, 4\)"),
        ({"group_size": 3}, ValueError, "group_size=3 must be .*at least 2 and divide the 8 rows"),
        ({"group_size": 1}, ValueError, "group_size=1 must be .*at least 2"),
        ({"group_size": 2.0}, ValueError, "group_size=2.0 must be an integer"),
        ({"scale": "batch_std"}, ValueError, "scale='batch_std' is no function of one group's success rate"),
        ({"scale": "stdd"}, ValueError, "scale='stdd' is not one of"),
        ({"baseline": "median"}, ValueError, "baseline='median' is not one of"),
        ({"ddof": 2}, ValueError, "ddof=2 is not one of"),
        ({"epsilon_in": "root"}, ValueError, "epsilon_in='root' is not one of"),
        ({"epsilon": -1.0}, ValueError, "epsilon=-1.0 must be finite and not negative"),
        ({"clip_low": jnp.ones(G)}, ValueError, r"clip_low must be a scalar, got shape \(4,\)"),
        ({"clip_high": jnp.ones((2, 1))}, ValueError, r"clip_high must be a scalar, got shape \(2, 1\)"),
    ],
)
def test_contrastive_loss_names_bad_arguments(changes, error, match):
    arguments = CONTRAST | changes
    with pytest.raises(error, match=match):
        contrastive_loss(**arguments)
    arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in arguments.items() if k not in arrays}
    with pytest.raises(error, match=match):
        jax.eval_shape(jax.jit(lambda arrays: contrastive_loss(**arrays, **static)), arrays)


@pytest.mark.parametrize(
    ("rewards", "options", "match"),
    [
        (REAL, {"scale": "stdd"}, "scale='stdd' is not one of 'std', 'mean', 'batch_std', 'none'"),
        (REAL, {"baseline": "median"}, "baseline='median' is not one of"),
        (REAL, {"ddof": 2}, "ddof=2 is not one of 0, 1"),
        (REAL, {"epsilon_in": "root"}, "epsilon_in='root' is not one of"),
        (REAL, {"epsilon": -1.0}, "epsilon=-1.0 must be finite and not negative"),
        (jnp.ones((4, 1)), {}, r"at least 2 along the last axis, got shape \(4, 1\)"),
        (jnp.float32(1), {}, r"at least 2 along the last axis, got shape \(\)"),
        (jnp.ones((4, 0)), {}, r"at least 2 along the last axis, got shape \(4, 0\)"),
    ],
)
def test_group_advantages_names_bad_arguments(rewards, options, match):
    for function in (group_advantages, jax.jit(group_advantages, static_argnames=tuple(options))):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(partial(function, **options), rewards)


def test_beta_effective_needs_a_group():
    with pytest.raises(ValueError, match="group_size=1 must be at least 2"):
        beta_effective(1.0, objective=GRPO_TRL, group_size=1)


def test_a_reward_that_is_no_number_shows():
    """NaN is not hidden as a failure: its group is NaN (the trainer then skips the step), the others are what they were."""
    rewards = jnp.array([[jnp.nan, 0, 1, 1], [0, 0, 0, 1]])
    for choices in ({}, {"scale": "none"}, {"scale": "mean"}, {"baseline": "leave_one_out"}):
        advantages = group_advantages(rewards, **choices)
        assert jnp.isnan(advantages[0]).all()
        np.testing.assert_array_equal(advantages[1], group_advantages(rewards[1:], **choices)[0])
    assert jnp.isnan(group_advantages(rewards, scale="batch_std")).all()
    advantages = group_advantages(rewards).reshape(-1)
    assert jnp.isnan(grpo_loss(**ROWS | {"advantages": advantages}, beta=0.1)[0])


def test_numpy_arrays_are_arrays():
    """Of float64 too."""
    wanted = grpo_loss(**ROWS, beta=0.1, group_size=G)
    for kind in (np.float32, np.float64):
        rows = {k: np.asarray(v, bool if k == "mask" else kind) for k, v in ROWS.items()}
        jax.tree.map(np.testing.assert_array_equal, grpo_loss(**rows, beta=kind(0.1), group_size=G), wanted)
        terms = grpo_loss_terms(**rows, beta=0.1, group_size=G)
        np.testing.assert_allclose(terms.total / terms.weight, wanted[0], rtol=1e-5)
        contrast = {k: np.asarray(v) for k, v in CONTRAST.items() if k != "group_size"}
        assert contrastive_loss(**contrast, group_size=G) == contrastive_loss(**CONTRAST)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_widened_first(kind):
    """Log-probabilities, advantages and β of a trainer that computes in bf16: the arithmetic here is of float32."""
    narrow = {k: v if k == "mask" else v.astype(kind) for k, v in ROWS.items()}
    wide = {k: v if k == "mask" else v.astype(jnp.float32) for k, v in narrow.items()}
    wanted = grpo_loss(**wide, beta=0.5, group_size=G)
    jax.tree.map(np.testing.assert_array_equal, grpo_loss(**narrow, beta=kind(0.5), group_size=G), wanted)
    assert wanted[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (None, "must be an array of numbers"),
        ("right", "must be an array of numbers"),
        ([[1.0, 0.0], [1.0]], "must be an array of numbers"),
        ([["a", "b"]], "must be an array of numbers"),
        (jnp.array([[1j, 0j]]), "must be real"),
    ],
)
def test_rewards_that_are_no_real_numbers_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards)


@pytest.mark.parametrize("scale", ["std", "batch_std", "mean", "none"])
def test_no_prompts_have_no_advantages(scale):
    assert group_advantages(jnp.zeros((0, 4)), scale=scale).shape == (0, 4)
