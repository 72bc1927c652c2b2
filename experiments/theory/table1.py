"""Table 1 of arXiv 2503.06639, computed: six variants, their weights and recurrences, and where these end.

    python -m experiments.theory.table1 [--out=runs/theory]

Writes table1.md and table1.json and prints the former.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments.theory import figures
from grpo_jax.theory import LimitPoint, MeanOnly, Weights, Whitened, fixed_points, limit_point

EPSILON = 1e-5
CASES = ((1e-3, 3.0), (0.01, 1.0), (0.2, 1.0), (0.2, 5.0), (0.5, 5.0))  # (p_ref, β)


class Variant(NamedTuple):
    """A row: its normaliser, the share α of the KL that goes to the reference, and what is known in formulas."""

    name: str
    weights: Weights
    alpha: float
    weight: str
    recurrence: str
    end: str
    stability: str


WHITENED, MEAN = "ω⁺ = (1−p)/√(v+ε), ω⁻ = p/√(v+ε), Ω = 1/√(v+ε)", "ω⁺ = 1−p, ω⁻ = p, Ω = 1"
VARIANTS = (
    Variant(
        "GRPO",
        Whitened(EPSILON),
        1.0,
        WHITENED,
        "L_n = L_ref + Ω(p_{n−1})/β",
        "L* = L_ref + Ω(p*)/β; one or three ᴰ",
        "m = v(2p*−1)/(2β(v+ε)^1.5); attracts if \\|m\\| < 1",
    ),
    Variant(
        "Dr. GRPO", MeanOnly(), 1.0, MEAN, "L_n = L_ref + 1/β", "L_ref + 1/β, after one step", "m = 0; always attracts"
    ),
    Variant(
        "mirror GRPO",
        Whitened(EPSILON),
        0.0,
        WHITENED,
        "L_n = L_{n−1} + Ω(p_{n−1})/β",
        "p = 1, from every p_ref > 0",
        "rate e^{−1/(β√ε)} at p = 1 ᴰ",
    ),
    Variant(
        "mirror Dr. GRPO",
        MeanOnly(),
        0.0,
        MEAN,
        "L_n = L_{n−1} + 1/β",
        "p = 1, from every p_ref > 0",
        "rate e^{−1/β} at p = 1 ᴰ",
    ),
    Variant(
        "two-KL GRPO",
        Whitened(EPSILON),
        0.5,
        WHITENED,
        "L_n = αL_ref + (1−α)L_{n−1} + Ω(p_{n−1})/β ᴰ",
        "those of GRPO at αβ ᴰ",
        "1 − α + αm, m that of GRPO at αβ ᴰ",
    ),
    Variant(
        "two-KL Dr. GRPO",
        MeanOnly(),
        0.5,
        MEAN,
        "L_n = αL_ref + (1−α)L_{n−1} + 1/β ᴰ",
        "L_ref + 1/(αβ) ᴰ",
        "1 − α; always attracts ᴰ",
    ),
)
NOTES = f"""\
L = ln(p/(1−p)) is the log-odds of success, v = p(1−p). Weights and recurrences are stated by the paper (Table 1,
Thms 2, 4, 9, §5), except where marked ᴰ, which is derived here. The paper adds a Rényi correction Δ_R to both two-KL
rows; it is identically 0 for iterates that start at π_ref. Below, ε = {EPSILON:g}, α = ½ for two-KL, and p_0 = p_ref:
the fixed points with their multipliers, and the point or cycle that exact iterations from p_ref really reach. A limit of
1 is 1 up to rounding.
"""


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes table1.md and table1.json into ``out``, and prints the table."""
    del quick  # it is quick
    rows = compute()
    text = markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table1.md").write_text(text, encoding="utf-8")
    figures.write_json(out / "table1.json", rows)
    print(text)


def compute() -> list[dict[str, Any]]:
    """One dict per variant and case: its fixed points with the variant's own multipliers, and its limit."""
    return [
        {
            "variant": variant.name,
            "alpha": variant.alpha,
            "p_ref": p_ref,
            "beta": beta,
            "fixed_points": _ends(variant, p_ref, beta),
            "limit": limit_point(p_ref, beta=beta, weights=variant.weights, alpha=variant.alpha),
        }
        for variant in VARIANTS
        for p_ref, beta in CASES
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The formulas, then the numbers, a column per case."""
    head = ["variant", "weights", "recurrence", "fixed point", "multiplier"]
    formulas = [[v.name, v.weight, v.recurrence, v.end, v.stability] for v in VARIANTS]
    cases = ["variant", *(f"p_ref = {p_ref:g}, β = {beta:g}" for p_ref, beta in CASES)]
    numbers = [[v.name, *(_cell(row) for row in rows if row["variant"] == v.name)] for v in VARIANTS]
    return f"{_table(head, formulas)}\n{NOTES}\n{_table(cases, numbers)}"


def _ends(variant: Variant, p_ref: float, beta: float) -> list[dict[str, Any]]:
    """The fixed points of a variant: for α > 0 those of α = 1 at αβ, damped; for mirror only p = 1."""
    if variant.alpha == 0:
        # 1 − p shrinks by exp(−Ω(1)/β) per iteration.
        rate = float(jnp.exp(-variant.weights.omega(jnp.asarray(jnp.inf)) / beta))
        return [{"p": 1.0, "multiplier": rate, "stable": True}]
    solutions = fixed_points(p_ref, beta=variant.alpha * beta, weights=variant.weights)
    multipliers = [1 - variant.alpha + variant.alpha * point.multiplier for point in solutions]
    return [
        {"p": point.p, "logit": point.logit, "multiplier": m, "stable": abs(m) < 1}
        for point, m in zip(solutions, multipliers, strict=True)
    ]


def _cell(row: dict[str, Any]) -> str:
    points = ", ".join(
        f"{_number(point['p'])} ({point['multiplier']:.3f}{'' if point['stable'] else ', unstable'})"
        for point in row["fixed_points"]
    )
    return f"{points} → **{_limit(row['limit'])}**"


def _limit(limit: LimitPoint) -> str:
    if isinstance(limit.p, tuple):
        return " ↔ ".join(map(_number, limit.p)) if limit.kind == "cycle" else "chaos"
    return _number(limit.p)


def _number(p: float) -> str:
    return "1" if p > 1 - 5e-5 else f"{p:.4f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|\n" for line in lines)


if __name__ == "__main__":
    figures.run(experiment)
