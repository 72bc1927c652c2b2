"""Explanations: their numbers against the tables and plain Python, their claims against orbits, for every input."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.theory import Group, MeanOnly, Whitened, flow_point
from grpo_jax.theory.explanation import explain


def lines(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines()[1:]}


def test_a_hard_prompt_in_small_groups():
    """p* = 0.0950, half the β gives what β = 2 and 0.5 are known to; k3 0.4730; 0.99^8 + 0.01^8 = 92.3 %."""
    said = lines(explain(0.01, beta=1.0, weights=Group(8)))
    assert "92.3 % of groups of 8" in said["now"]
    assert "p* = 0.095 and stop" in said["end"]
    assert "twice the β 0.0344" in said["change"]
    assert "end at p* = 0.473." in said["other"]
    assert f"ln(1/p_ref) = {math.log(100):.4g}" in said["cost"]
    assert "one fixed point at every β" in said["β"]
    assert "No β makes exact iterations oscillate" in said["β"]


def test_a_prompt_above_its_fold():
    """p_ref = 0.2, β = 1, ε = 1e-5: .6813, .9347 (unstable), ≈ 1; KL .5417; multiplier .389; fold at β = .8957."""
    said = lines(explain(0.2, beta=1.0, weights=Whitened(1e-5)))
    assert "to p* = 0.6813 and stop" in said["end"]
    assert "0.9347 (unstable)" in said["end"]
    assert "errors shrink to 38.9 %" in said["exact"]
    assert "times 0.8957, a fold: p* is 0.8336 just above it" in said["β"]
    assert "β = 19.93" in said["β"]
    assert "= 0.5417 nats" in said["cost"]


def test_a_cycle_a_jump_and_a_run_to_one():
    said = lines(explain(1e-3, beta=3.0, weights=Whitened(1e-5)))
    assert "do not converge: they swing between 0.001995 and 0.633;" in said["exact"]
    assert "to p* = 0.01512 and stop" in said["end"]
    assert re.search(r"from 0\.338\d* to 5\.66\d* its fixed point repels", said["β"])
    assert "jump past it from 0.05" in lines(explain(0.05, beta=0.7, weights=Whitened(1e-5)))["exact"]
    assert "to p* = 1 and stop" in lines(explain(0.2, beta=0.5, weights=Whitened(0.0)))["end"]


def test_k3_and_no_kl():
    said = lines(explain(0.2, beta=2.0, weights=Whitened(0.0), kl="forward"))
    assert "to p* = 0.4487 and stop" in said["end"]
    assert "end there too" in said["exact"]
    assert "No β makes exact iterations oscillate" in said["other"]
    cycle = lines(explain(1e-3, beta=3.0, weights=Whitened(1e-9), kl="forward"))["exact"]
    low, high = map(float, re.search(r"swing between ([\d.]+) and ([\d.]+);", cycle).groups())
    assert (low, high) == (pytest.approx(0.005182, abs=2e-5), pytest.approx(0.78488, abs=2e-4))
    said = lines(explain(0.5, beta=2.0, weights=Group(8), kl="none"))
    assert "p climbs to 1, whatever β is" in said["end"]
    assert "0.6931 nats" in said["cost"]


def test_the_ends_stay():
    assert "p stays 0 at every β" in explain(0, beta=1.0, weights=Group(8))
    assert "p stays 1 at every β" in explain(1.0, beta=1.0, weights=Group(8))


def test_groups_that_push_without_a_baseline_are_not_called_dead():
    said = lines(explain(0.5, beta=1.0, weights=Group(4, baseline="none", scale="none")))
    assert "6.25 % of groups of 4 fail throughout and teach nothing" in said["now"]
    assert "a failure +0," in said["now"]


@given(
    st.floats(1e-6, 1 - 1e-6),
    st.floats(0.05, 50),
    st.sampled_from([Group(2), Group(8), Group(8, ddof=1, epsilon=1e-4, epsilon_in="std"), Whitened(1e-4), MeanOnly()]),
    st.sampled_from(["reverse", "forward"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_said_is_true_for_every_input(p_ref, beta, weights, kl):
    text = explain(p_ref, beta=beta, weights=weights, kl=kl)
    assert "nan" not in text
    assert "inf" not in text.replace("infinit", "")
    assert max(map(len, text.splitlines())) < 400
    said = lines(text)
    if kl == "reverse":
        end = float(flow_point(p_ref, beta=beta, weights=weights))
        shown = re.search(r"p\* = (1 − )?([\d.]+(?:e-\d+)?)", said["end"])
        value = 1 - float(shown[2]) if shown[1] else float(shown[2])
        assert value == pytest.approx(end, rel=6e-4, abs=1e-6)
        if p_ref > 0.01004:  # 1.0039 % is the most that can oscillate
            assert "do not converge" not in said["exact"]
            assert "No β makes exact iterations oscillate" in said["β"]
    if weights == MeanOnly() or weights == Group(2):
        assert "do not converge" not in said["exact"]
        assert kl == "forward" or "one fixed point at every β" in said["β"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("p_ref", {"p_ref": 1.5}),
        ("p_ref", {"p_ref": math.nan}),
        ("beta", {"beta": 0.0}),
        ("beta", {"beta": math.inf}),
        ("kl", {"kl": "k3"}),
    ],
)
def test_wrong_arguments_are_named(name, change):
    good = {"p_ref": 0.2, "beta": 1.0, "weights": Group(8)} | change
    with pytest.raises(ValueError, match=name):
        explain(good.pop("p_ref"), **good)
