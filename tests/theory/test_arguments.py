"""Arguments that mean nothing are refused by every function of the theory, and traced ones are let through."""

import inspect
import math

import jax
import jax.numpy as jnp
import pytest

from grpo_jax import theory
from grpo_jax.theory.arguments import PROBABILITIES

FUNCTIONS = [f for name in theory.__all__ if not inspect.isclass(f := getattr(theory, name)) and callable(f)]
GIVEN = {
    "weights": theory.Group(8),
    "beta": 1.0,
    "alpha": 0.9,
    "r2": 0.5,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "group_size": 8,
}
CASES = [
    (function, name, bad)
    for function in FUNCTIONS
    for name in inspect.signature(function).parameters
    if name in (*PROBABILITIES, "beta")
    for bad in ((0.0, -1.0, math.inf, math.nan) if name == "beta" else (-0.1, 1.1, math.nan))
]


@pytest.mark.parametrize(("function", "name", "bad"), CASES)
def test_what_is_out_of_range_is_refused_by_name(function, name, bad):
    wanted = {n: p for n, p in inspect.signature(function).parameters.items() if p.default is p.empty or n == name}
    arguments = {n: GIVEN.get(n, 0.3) for n in wanted} | {name: bad}
    positional = [x for n, x in arguments.items() if wanted[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    named = {n: x for n, x in arguments.items() if wanted[n].kind is inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(ValueError, match=f"^{name}="):
        function(*positional, **named)


def test_log_odds_may_be_anything_but_nan():
    assert theory.flow_point(-800.0, beta=1.0, weights=theory.Group(8), logits=True) > -800.0
    with pytest.raises(ValueError, match="log-odds"):
        theory.flow_point(math.nan, beta=1.0, weights=theory.Group(8), logits=True)


def test_the_first_bad_entry_is_named_and_traced_ones_pass():
    with pytest.raises(ValueError, match=r"p_ref=1\.5 must"):
        theory.flow_point(jnp.array([0.2, 1.5, 3.0]), beta=1.0, weights=theory.Group(8))
    traced = jax.jit(lambda p, b: theory.flow_point(p, beta=b, weights=theory.Group(8)))
    assert bool(jnp.isnan(traced(1.5, 1.0)))
    assert len({function for function, *_ in CASES}) > 40
