"""Which KL term to train with at 1,000 tokens: bias and noise of its gradient by length, by drift, and around the fixed point.

    python -m experiments.kl_variance [--out=runs/theory] [--quick]

Writes kl_variance.png and kl_variance.json, and prints the tables. What is measured is defined in experiments/kl_gradients.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.kl_gradients import ESTIMATORS, Noise, at_fixed_point, completions_to_match, drifted, measure
from experiments.markov_language import language
from experiments.theory import figures

PER_TOKEN = 0.01  # nats of KL(π‖π_ref) per token, where K grows with T
SCENES = {  # name → K at T tokens, whether completions may end early
    "K = T/100": (lambda length: PER_TOKEN * length, False),
    "K = 1": (lambda length: 1.0, False),
    "K = T/100, with ends": (lambda length: PER_TOKEN * length, True),
}
SHOWN = ("sequence, alone", "sequence", "per decision", "analytic", "token k2")
SAMPLED = 1.0  # nats of drift up to which means of ρ can be sampled
CAPTION = (
    "Root mean square noise of one completion's gradient, groups of 8, eight-token Markov chains. Left: on-policy, K ="
    " KL(π‖π_ref) = T/100 nats. Dotted: the exact bias of the token-wise terms, over |∇KL| (0 for one token, as is the noise of"
    " the analytic one). Middle: T = {length}, K = {kl:g} nats, completions drawn from a π_old at D = KL(π‖π_old) nats; what"
    " is sampled ends at D = 1, the line of the sequence term is by an exact change of measure. Right: the whole gradient,"
    " surrogate and KL at β = 1, over the noise of the surrogate alone; T = {length}, p_ref = {p_ref:.2f}, at the policy of"
    " p* = {p_star:.2f} (left end) and after a change of that policy, of KL(π*‖π) nats, which the reward does not see."
)


def experiment(out: Path, *, quick: bool = False) -> None:
    """Writes kl_variance.png and kl_variance.json into ``out``."""
    # On-policy, by length; off-policy, by drift; and the whole gradient, at the fixed point and around it.
    lengths = (4, 8) if quick else (1, 10, 30, 100, 300, 1000)
    groups = 64 if quick else 512
    long = lengths[-1:] if quick else (100, 1000)
    by_length = {
        name: {t: measure(language(t, kl=kl(t), ends=ends), t, groups) for t in lengths}
        for name, (kl, ends) in SCENES.items()
    }
    drifts = (0.1, 10.0) if quick else (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 30.0)
    by_drift = {t: {d: _off_policy(t, d, groups) for d in drifts} for t in long}
    wanders = (0.0, 1.0) if quick else (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    around = {
        scale: {t: {w: at_fixed_point(t, scale, groups // 2, wander=w) for w in wanders} for t in long}
        for scale in ("std", "none")
    }
    for name, noises in by_length.items():
        print(f"\nOn-policy, {name}: noise of one completion over |∇KL|\n{_length_table(noises)}")
    print(f"\nOn-policy, T = {lengths[-1]}:\n{_summary(by_length, lengths[-1])}")
    for length, drifting in by_drift.items():
        print(f"\nOff-policy, T = {length}, K = {PER_TOKEN * length:g}:\n{_drift_table(drifting)}")
    print(f"\nNoise of the whole gradient over the surrogate's, β = 1:\n{_around_table(around)}")
    numbers = {"on_policy": by_length, "off_policy": by_drift, "fixed_point": around}

    # A panel for each.
    figure, (axes,) = figures.new_figure(1, 3, size=(12, 5.2))
    for axis in axes:
        axis.set(xscale="log", yscale="log")
    _plot_lengths(axes[0], by_length["K = T/100"])
    _plot_drifts(axes[1], by_drift[lengths[-1]])
    _plot_around(axes[2], around["std"][lengths[-1]])
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=8.5
    )
    rest = {name: float(around["std"][lengths[-1]][0.0][name]) for name in ("p_ref", "p_star")}
    caption = CAPTION.format(length=lengths[-1], kl=PER_TOKEN * lengths[-1], **rest)
    figures.save(figure, "kl_variance", numbers, out=out, caption=caption)


def _off_policy(length: int, drift: float, groups: int) -> dict[str, Any]:
    spoken = language(length, kl=PER_TOKEN * length, drift=drift)
    return {"estimators": measure(spoken, length, groups), **drifted(spoken, length, groups)}


def _rows(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    cells = [[x if isinstance(x, str) else _number(float(x)) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _number(x: float) -> str:
    return "0" if abs(x) < 1e-12 else f"{x:.0f}" if 1000 <= x < 1e6 else f"{x:.3g}"


def _length_table(by_length: dict[int, dict[str, Noise]]) -> str:
    rows = [[k, *(x[k].noise for x in by_length.values())] for k in ESTIMATORS]
    return _rows(["noise", *(f"T = {t}" for t in by_length)], rows)


def _summary(by_length: dict[str, dict[int, dict[str, Noise]]], length: int) -> str:
    """Of the longest completions: bias, noise, and how many completions make the sequence term better than a token-wise one."""
    rows = []
    for scene, noises in by_length.items():
        for name in ESTIMATORS:
            x = noises[length][name]
            match = completions_to_match(noises[length]["sequence"], x) if x.bias > 0 else "–"
            rows.append([scene, name, x.bias, x.cosine, x.noise, x.to_surrogate, match])
    return _rows(["", "", "bias", "cosine", "noise / |∇KL|", "noise / surrogate's, β = 1", "N* of sequence"], rows)


def _drift_table(by_drift: dict[float, dict[str, Any]]) -> str:
    head = ["D", "effective share", "beyond e²⁰", "noise: sequence", "per decision", "analytic", "r·k3"]
    head += ["bias: k2", "r·k3", "k3"]
    rows = []
    for drift, x in by_drift.items():
        kinds, sampled = x["estimators"], drift <= SAMPLED
        noises = [kinds[k].noise if sampled else "–" for k in ("per decision", "analytic", "token r·k3")]
        biases = [kinds[k].bias for k in ("token k2", "token r·k3", "token k3")]
        rows.append([f"{drift:g}", x["effective"], x["beyond"], x["noise"], *noises, *biases])
    return _rows(head, rows)


def _around_table(around: dict[str, dict[int, dict[float, dict[str, Any]]]]) -> str:
    rows = []
    for scale, by_length in around.items():
        for length, by_wander in by_length.items():
            for wander, x in by_wander.items():
                left = [x["unbalanced"][k] if wander == 0 else "–" for k in ("sequence", "token k2", "token k3")]
                rows.append([scale, str(length), f"{wander:g}", *(x["noise"][k] for k in SHOWN), *left])
    return _rows(["scale", "T", "KL(π*‖π)", *SHOWN, "left over: sequence", "k2", "k3"], rows)


def _curve(panel: Axes, name: str, x: Any, y: Any, **changes: Any) -> None:
    panel.plot(x, _seen(y), **figures.marker(SHOWN.index(name), label=name) | changes)


def _plot_lengths(panel: Axes, by_length: dict[int, dict[str, Noise]]) -> None:
    for name in SHOWN:
        _curve(panel, name, list(by_length), [x[name].noise for x in by_length.values()])
    for name in ("token k2", "token k3"):
        _bias(panel, name, list(by_length), [x[name].bias for x in by_length.values()])
    panel.set(xlabel="T, tokens", ylabel="noise of one completion / |∇KL|", ylim=(0.01, 100))
    figures.title(panel, "on-policy, by length")


def _plot_drifts(panel: Axes, by_drift: dict[float, dict[str, Any]]) -> None:
    _curve(panel, "sequence", list(by_drift), [x["noise"] for x in by_drift.values()])
    for name in ("per decision", "analytic", "token k2"):
        shown = [d for d in by_drift if d <= SAMPLED or name == "token k2"]
        _curve(panel, name, shown, [by_drift[d]["estimators"][name].noise for d in shown])
    for name in ("token k2", "token r·k3"):
        _bias(panel, name, list(by_drift), [x["estimators"][name].bias for x in by_drift.values()])
    panel.set(xlabel="D, nats per completion", ylim=(0.01, 1000))
    figures.title(panel, "off-policy, by drift")


def _bias(panel: Axes, name: str, x: list[Any], y: list[Any]) -> None:
    """A dotted line, with its name after its last point."""
    values = _seen(y)
    panel.plot(x, values, color=figures.INK, linestyle=":", linewidth=1.2)
    label, end = f"bias, {name[6:]}", (x[-1], values[-1])
    panel.annotate(label, end, (5, 0), textcoords="offset points", fontsize=8, va="center")
    panel.set_xlim(right=8 * x[-1])


def _seen(y: Any) -> np.ndarray:
    """What a logarithmic scale shows: not the rounding of an exact 0."""
    values = np.asarray(y, float)
    return np.where(values < 1e-5, np.nan, values)


def _plot_around(panel: Axes, by_wander: dict[float, dict[str, Any]]) -> None:
    least = min(w for w in by_wander if w > 0) / 3
    for name in SHOWN:
        _curve(panel, name, [w or least for w in by_wander], [x["noise"][name] for x in by_wander.values()])
    panel.axhline(1.0, color=figures.INK, linewidth=0.8)
    panel.set(xlabel="KL(π*‖π), nats per completion", ylabel="noise / noise of the surrogate")
    figures.title(panel, "the whole gradient around p*")


if __name__ == "__main__":
    figures.run(experiment)
