"""Every reference value: its twelve digits against mpmath, and the library in double precision against mpmath.

`errors` lists them all with what the library makes of them.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.theory import (
    Group,
    MeanOnly,
    Whitened,
    WhitenedStd,
    bernoulli_kl,
    clipped_success_map,
    dead_fraction,
    fixed_points,
    flip_limit,
    flip_window,
    flow_point,
    fold_beta,
    forward_kl_fixed_point,
    iterate,
    kl_budget,
    limit_point,
    local_beta_bound,
    log_partition,
    mean_dead_fraction,
    mirror_steps,
    omega,
    omega_minus,
    omega_plus,
    success_map,
    success_map_slope,
)
from tests import exact_theory as exact
from tests.exact_theory import logit, mp, sigmoid

WHITE, EXACTLY_WHITE, GROUP = Whitened(1e-5), Whitened(0.0), Group(8)
# Decimal constants as exact decimals: 0.2 is not a binary number, and twelve digits of a difference could show it.
TWO, THREE, TENTH, HALF = mp.mpf("0.2"), mp.mpf("0.3"), mp.mpf("0.1"), mp.mpf("0.5")


class Case(NamedTuple):
    name: str
    digits: str
    library: Callable[[], object]
    exact: Callable[[], object]


def fold_gain(p_ref: str):
    """Δ at the lower fold for ε → 0."""
    reference = logit(mp.mpf(p_ref))
    return exact.root(lambda d: d - mp.log((d + 2) / (d - 2)) + reference, mp.mpf(2) + mp.mpf("1e-6"), 40)


def flip_gains(p_ref: str):
    """Both Δ at the ends of the flip window for ε → 0, the larger first."""
    reference = logit(mp.mpf(p_ref))
    turn = 2 * mp.sqrt(2)

    def f(d):
        return d - mp.log((d - 2) / (d + 2)) + reference

    return exact.root(f, turn, 60), exact.root(f, mp.mpf(2) + mp.mpf("1e-20"), turn)


def beta_of(gain):
    return 2 / mp.sqrt(gain**2 - 4)


@cache
def two_cycle():
    """(low, high) for p_ref = 1e-3, β = 3, ε = 1e-5."""
    reference = logit(mp.mpf("0.001"))

    def twice(L):
        return exact.step(exact.step(L, reference, 3, WHITE), reference, 3, WHITE)

    L = reference
    for _ in range(200):
        L = twice(L)
    L = mp.findroot(lambda x: twice(x) - x, L)
    return tuple(sorted((sigmoid(L), sigmoid(exact.step(L, reference, 3, WHITE)))))


@cache
def low_point():
    return exact.fixed_point(logit(TWO), 1, WHITE, 0, 2)


def multiplier(L, beta, weights):
    return exact.log_odds_slope(L, weights) / mp.mpf(beta)


@cache
def library_fixed_points():
    return fixed_points(0.2, beta=1.0, weights=WHITE)


def fold_probability(p_ref: float) -> float:
    """Where the fixed point is when it vanishes: B(p) = β_c, by bisection."""
    beta, low, high = fold_beta(p_ref, weights=EXACTLY_WHITE), 0.5, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        rising = float(local_beta_bound(middle, weights=EXACTLY_WHITE)) < beta
        low, high = (middle, high) if rising else (low, middle)
    return low


CASES = [
    Case("ω⁺(0.2), ε = 0", "2.00000000000", lambda: omega_plus(0.2, EXACTLY_WHITE), lambda: mp.sqrt((1 - TWO) / TWO)),
    Case("ω⁻(0.2), ε = 0", "0.500000000000", lambda: omega_minus(0.2, EXACTLY_WHITE), lambda: mp.sqrt(TWO / (1 - TWO))),
    Case("ω⁺(0.1), ε = 1e-2", "2.84604989415", lambda: omega_plus(0.1, Whitened(1e-2)),
         lambda: (1 - TENTH) / mp.sqrt(mp.mpf("0.1"))),
    Case("ω⁻(0.1), ε = 1e-2", "0.316227766017", lambda: omega_minus(0.1, Whitened(1e-2)),
         lambda: TENTH / mp.sqrt(mp.mpf("0.1"))),
    Case("ω⁺(0), ε = 1e-5", "316.227766017", lambda: omega_plus(0.0, WHITE), lambda: mp.sqrt(mp.mpf(10) ** 5)),
    Case("Ω(0.3), ε = 1e-4", "2.18165952144", lambda: omega(0.3, Whitened(1e-4)),
         lambda: 1 / mp.sqrt(mp.mpf("0.2101"))),
    Case("h(0.3), p_ref = 0.2, β = 1, ε = 1e-5", "0.689082325931",
         lambda: success_map(0.3, 0.2, beta=1.0, weights=WHITE),
         lambda: 1 / (1 + 4 * mp.exp(-1 / mp.sqrt(mp.mpf("0.21001"))))),
    Case("h(0.5), p_ref = 0.1, β = 0.5, ε = 1e-2", "0.848784342270",
         lambda: success_map(0.5, 0.1, beta=0.5, weights=Whitened(1e-2)),
         lambda: 1 / (1 + 9 * mp.exp(-2 / mp.sqrt(mp.mpf("0.26"))))),
    Case("h'(0.3), p_ref = 0.2, β = 1, ε = 1e-5", "-0.445232188335",
         lambda: success_map_slope(0.3, 0.2, beta=1.0, weights=WHITE),
         lambda: mp.diff(
             lambda p: 1 / (1 + 4 * mp.exp(-1 / mp.sqrt(p * (1 - p) + mp.mpf("0.00001")))), THREE)),
    Case("p* low, p_ref = 0.2, β = 1, ε = 1e-5", "0.681283437786", lambda: library_fixed_points()[0].p,
         lambda: sigmoid(low_point())),
    Case("its multiplier", "0.389011012374", lambda: library_fixed_points()[0].multiplier,
         lambda: multiplier(low_point(), 1, WHITE)),
    Case("its KL to the reference", "0.541704688723", lambda: bernoulli_kl(library_fixed_points()[0].p, 0.2),
         lambda: exact.kl(low_point(), logit(TWO))),
    Case("p* middle", "0.934713591453", lambda: library_fixed_points()[1].p,
         lambda: sigmoid(exact.fixed_point(logit(TWO), 1, WHITE, 2, 4))),
    Case("p* high, its log-odds", "314.841471656", lambda: library_fixed_points()[2].logit,
         lambda: exact.fixed_point(logit(TWO), 1, WHITE, 200, 400)),
    Case("p* low, p_ref = 0.5, β = 5, ε = 1e-5", "0.600694169590",
         lambda: flow_point(0.5, beta=5.0, weights=WHITE), lambda: sigmoid(exact.fixed_point(0, 5, WHITE, 0, 1))),
    Case("p*, p_ref = 0.3, β = 2, ε = 1e-2", "0.533809708510",
         lambda: flow_point(0.3, beta=2.0, weights=Whitened(1e-2)),
         lambda: sigmoid(exact.fixed_point(logit(THREE), 2, Whitened(1e-2), 0, 1))),
    Case("p*, p_ref = 0.3, β = 2, std + 1e-4", "0.538803324701",
         lambda: flow_point(0.3, beta=2.0, weights=WhitenedStd(1e-4)),
         lambda: sigmoid(exact.fixed_point(logit(THREE), 2, WhitenedStd(1e-4), 0, 1))),
    Case("B(0.9), ε = 1e-5", "1.33311114197", lambda: local_beta_bound(0.9, weights=WHITE),
         lambda: mp.mpf("0.09") * mp.mpf("0.8") / (2 * mp.mpf("0.09001") ** mp.mpf("1.5"))),
    Case("β_c, p_ref = 0.5, ε → 0", "1.50887956154", lambda: fold_beta(0.5, weights=EXACTLY_WHITE),
         lambda: beta_of(fold_gain("0.5"))),
    Case("p_c there", "0.916778279800", lambda: fold_probability(0.5), lambda: HALF + 1 / fold_gain("0.5")),
    Case("β_c, p_ref = 0.2, ε → 0", "0.895700990223", lambda: fold_beta(0.2, weights=EXACTLY_WHITE),
         lambda: beta_of(fold_gain("0.2"))),
    Case("β_c, p_ref = 0.01, ε → 0", "0.400742153350", lambda: fold_beta(0.01, weights=EXACTLY_WHITE),
         lambda: beta_of(fold_gain("0.01"))),
    Case("largest p_ref with a flip, ε → 0", "0.0100391365711", lambda: flip_limit(EXACTLY_WHITE),
         lambda: sigmoid(2 * mp.log(mp.sqrt(2) - 1) - 2 * mp.sqrt(2))),
    Case("lower end of the flip window, p_ref = 1e-3", "0.338205374990",
         lambda: flip_window(1e-3, weights=EXACTLY_WHITE)[0], lambda: beta_of(flip_gains("0.001")[0])),
    Case("upper end of the flip window, p_ref = 1e-3", "5.68142215457",
         lambda: flip_window(1e-3, weights=EXACTLY_WHITE)[1], lambda: beta_of(flip_gains("0.001")[1])),
    Case("2-cycle, high, p_ref = 1e-3, β = 3, ε = 1e-5", "0.633011579742",
         lambda: limit_point(1e-3, beta=3.0, weights=WHITE).p[1], lambda: two_cycle()[1]),
    Case("2-cycle, low", "0.00199486349927", lambda: limit_point(1e-3, beta=3.0, weights=WHITE).p[0],
         lambda: two_cycle()[0]),
    Case("Dr. GRPO p*, p_ref = 0.2, β = 2", "0.291875132741", lambda: flow_point(0.2, beta=2.0, weights=MeanOnly()),
         lambda: sigmoid(logit(TWO) + HALF)),
    Case("mirror step, p = 0.2, β = 2, ε = 1e-5", "0.465969338329",
         lambda: success_map(0.2, 0.2, beta=2.0, weights=WHITE, alpha=0.0),
         lambda: sigmoid(logit(TWO) + 1 / (2 * mp.sqrt(mp.mpf("0.16001"))))),
    Case("mirror Dr. after 5 steps, p_ref = 0.2, β = 2", "0.752819311429",
         lambda: iterate(0.2, 5, beta=2.0, weights=MeanOnly(), alpha=0.0)[-1],
         lambda: sigmoid(logit(TWO) + mp.mpf(5) / 2)),
    Case("two-KL step, p = 0.4, p_ref = 0.2, β = 2, α = 0.25", "0.591441349219",
         lambda: success_map(0.4, 0.2, beta=2.0, weights=WHITE, alpha=0.25),
         lambda: sigmoid(logit(TWO) / 4 + 3 * logit(mp.mpf("0.4")) / 4 + 1 / (2 * mp.sqrt(mp.mpf("0.24001"))))),
    Case("two-KL mean-only p*, p_ref = 0.2, β = 2, α = 0.25", "0.648785644284",
         lambda: limit_point(0.2, beta=2.0, weights=MeanOnly(), alpha=0.25).p, lambda: sigmoid(logit(TWO) + 2)),
    Case("Z, p_ref = p_old = 0.2, β = 1, ε = 1e-5", "1.96295097291",
         lambda: jnp.exp(log_partition(0.2, 0.2, beta=1.0, weights=WHITE)),
         lambda: TWO * mp.exp((1 - TWO) / mp.sqrt(mp.mpf("0.16001")))
         + (1 - TWO) * mp.exp(-TWO / mp.sqrt(mp.mpf("0.16001")))),
    Case("KL(π_1‖π_ref), p_ref = 0.2, β = 1, ε = 1e-5", "0.707519810104",
         lambda: bernoulli_kl(success_map(0.2, 0.2, beta=1.0, weights=WHITE), 0.2),
         lambda: exact.kl(logit(TWO) + 1 / mp.sqrt(mp.mpf("0.16001")), logit(TWO))),
    Case("KL budget, p_ref = 0.2", "1.60943791243", lambda: kl_budget(0.2), lambda: mp.log(5)),
    Case("Ω_G(0.2), G = 8, ddof 0", "2.10672902553", lambda: omega(0.2, GROUP), lambda: exact.omega(logit(TWO), GROUP)),
    Case("Ω_G(0.2), G = 8, ddof 1", "1.97066455507", lambda: omega(0.2, Group(8, 1)),
         lambda: exact.omega(logit(TWO), Group(8, 1))),
    Case("Ω_G(0.2), G = 8, TRL", "1.97020953976", lambda: omega(0.2, Group(8, 1, 1e-4, "std")),
         lambda: exact.omega(logit(TWO), Group(8, 1, 1e-4, "std"))),
    Case("Ω_G(0.5), G = 16, ddof 0", "1.93412260488", lambda: omega(0.5, Group(16)),
         lambda: exact.omega(0, Group(16))),
    Case("Ω_G(0.01), G = 16, ddof 0", "3.73299184637", lambda: omega(0.01, Group(16)),
         lambda: exact.omega(logit(mp.mpf("0.01")), Group(16))),
    Case("Ω_G(0.01), G = 16, ddof 1", "3.61445381313", lambda: omega(0.01, Group(16, 1)),
         lambda: exact.omega(logit(mp.mpf("0.01")), Group(16, 1))),
    Case("ω⁺_G(0.2), G = 8, ddof 0", "1.68538322042", lambda: omega_plus(0.2, GROUP),
         lambda: (1 - TWO) * exact.omega(logit(TWO), GROUP)),
    Case("ω⁻_G(0.2), G = 8, ddof 0", "0.421345805106", lambda: omega_minus(0.2, GROUP),
         lambda: TWO * exact.omega(logit(TWO), GROUP)),
    Case("Ω_4(0.37), ddof 0", "1.62386872108", lambda: omega(0.37, Group(4)),
         lambda: mp.sqrt(3) + (3 - 2 * mp.sqrt(3)) * mp.mpf("0.37") * mp.mpf("0.63")),
    Case("p* at G = 8, p_ref = 0.2, β = 1", "0.624862533686", lambda: flow_point(0.2, beta=1.0, weights=GROUP),
         lambda: sigmoid(exact.fixed_point(logit(TWO), 1, GROUP, 0, 1))),
    Case("dead groups, p = 0.1, G = 8", "0.430467220000", lambda: dead_fraction(0.1, 8),
         lambda: TENTH**8 + (1 - TENTH) ** 8),
    Case("dead groups, p ~ Beta(½, ½), G = 8", "0.392761230469", lambda: mean_dead_fraction(0.5, 0.5, 8),
         lambda: 2 * mp.beta(HALF + 8, HALF) / mp.beta(HALF, HALF)),
    Case("k3 p*, p_ref = 0.2, β = 2", "0.448679622641",
         lambda: forward_kl_fixed_point(0.2, beta=2.0, weights=EXACTLY_WHITE),
         lambda: mp.findroot(lambda p: p - TWO - mp.sqrt(p * (1 - p)) / 2, mp.mpf("0.45"))),
    Case("clipped step, c = 0.2, p_old = p_ref = 0.2, β = 1", "0.291871903464",
         lambda: clipped_success_map(0.2, 0.2, beta=1.0, weights=WHITE, clip=0.2),
         lambda: sigmoid(exact.clipped_step(logit(TWO), logit(TWO), 1, WHITE, TWO, TWO))),
    Case("clipped step, c = 0.2, p_old = p_ref = 0.2, β = 0.2", "0.360000000000",
         lambda: clipped_success_map(0.2, 0.2, beta=0.2, weights=WHITE, clip=0.2),
         lambda: sigmoid(exact.clipped_step(logit(TWO), logit(TWO), TWO, WHITE, TWO, TWO))),
    Case("mirror time to 1 over β, p_0 = 0.01", "2.94125781127", lambda: mirror_steps(0.01, 1.0, beta=1.0),
         lambda: mp.quad(lambda p: 1 / mp.sqrt(p * (1 - p)), [mp.mpf("0.01"), HALF, 1])),
]  # fmt: skip
BOUND = 1e-11  # the worst seen is 1.5e-15


def error(case: Case) -> tuple[float, float]:
    """The library's value and its relative error."""
    with jax.enable_x64(True):
        value = float(case.library())  # type: ignore[arg-type]
    target = case.exact()
    return value, float(abs(mp.mpf(value) / target - 1))  # type: ignore[operator]


def errors() -> list[tuple[int, str, str, float, float]]:
    """(number, name, literal, library value, relative error) of every reference value."""
    return [(number, case.name, case.digits, *error(case)) for number, case in enumerate(CASES, 1)]


def test_there_are_all_51():
    assert len(CASES) == 51


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_value(case):
    target = case.exact()
    unit = mp.mpf(10) ** (mp.floor(mp.log10(abs(target))) - 11)  # of the twelfth digit
    assert len(case.digits.lstrip("-0.").replace(".", "")) == 12
    assert abs(mp.mpf(case.digits) - target) <= unit * mp.mpf("0.5000001")
    assert error(case)[1] <= BOUND
