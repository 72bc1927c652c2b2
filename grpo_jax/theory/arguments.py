"""Arguments of the theory that mean nothing: refused where they are numbers, and let through where jax traces them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

PROBABILITIES = ("p", "q", "p_0", "p_1", "p_anchor", "p_old", "p_prev", "p_ref", "p_star")


def in_range(function: F) -> F:
    """The function, which raises ValueError for probabilities outside [0, 1], a β that is not positive, and NaN in either.

    With ``logits=True`` the probabilities are log-odds, of which NaN alone is refused. Of traced arrays nothing is known.

    >>> half = in_range(lambda p_ref, *, beta: p_ref / 2)
    >>> half(0.5, beta=1.0)
    0.25
    >>> half(1.5, beta=1.0)
    Traceback (most recent call last):
    ...
    ValueError: p_ref=1.5 must be a probability, from 0 to 1
    """
    signature = inspect.signature(function)
    checked = [name for name in signature.parameters if name in (*PROBABILITIES, "beta", "weights")]
    if not checked:
        return function

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name in checked:
            value = given.get(name)
            if name == "weights":
                if name in given and not hasattr(value, "omega"):
                    raise TypeError(f"weights={value!r} must be a normaliser: Group(8), Whitened(), …")
            elif value is not None and not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
                _check(name, np.asarray(value, np.float64), logits=bool(given.get("logits", False)))
        return function(*args, **kwargs)

    return checking  # type: ignore[return-value]


def _check(name: str, value: np.ndarray, *, logits: bool) -> None:
    if name == "beta":
        bad, words = ~((value > 0) & np.isfinite(value)), "positive and finite"
    elif logits:
        bad, words = np.isnan(value), "log-odds, and not NaN"
    else:
        bad, words = ~((value >= 0) & (value <= 1)), "a probability, from 0 to 1"
    if bad.any():
        raise ValueError(f"{name}={value[bad].flat[0] if value.ndim else value.item():g} must be {words}")
