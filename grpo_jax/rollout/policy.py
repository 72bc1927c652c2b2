"""What sampling and scoring need of a language model: two pure functions of its parameters, one that makes a cache, and
one that prepares the parameters.

Dimension key: see grpo_jax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


def unchanged(params: Any, length: int) -> Any:
    """The parameters as they are."""
    return params


class Policy(NamedTuple):
    """A language model as pure functions of ``params``; any JAX model can be wrapped into one.

    Token ``i`` sees the keys ``j ≤ i`` whose mask is True. Positions and slots are independent, so prompts may be padded on
    either side. Tokens whose mask is False change nothing.

    Attributes:
      forward: ``forward(params, tokens [B, L], positions [B, L], mask [B, L], cache=None, start=0, prefix=None, slots=None,
        segments=None) -> (hidden [B, L, D], cache | None)``. With a cache, the L tokens are written to its slots
        ``[start, start + L)`` and see the slots before them. A cache may have more than B rows: the first B are read and
        written, the others come back as they were. ``slots``, a Python int of at least ``start + L``, says how many of the
        first slots to read; the slots behind them are empty. ``prefix`` is a cache of P rows, of which row ``b`` also sees row
        ``b // (B // P)``: the G completions of a prompt share its keys and values without a copy. ``segments`` [B, L] int32 is
        for calls without a cache: a token then sees the tokens of its own segment alone, and the whole prefix.
      unembed: ``unembed(params, hidden [..., D]) -> logits [..., V]`` in float32.
      init_cache: ``init_cache(batch, length) -> pytree`` whose leaves all have the leading axis ``batch``, and as their last
        axis the slots where prompts have a shared beginning.
      prepare: ``prepare(params, length) -> params`` with which the other functions give the same results in less time, at
        positions below ``length``. Sampling calls it once and decodes with its result. A model whose products are bfloat16 casts
        its matrices here; otherwise they would be cast again for every token.
      in_place: with one token per row, keys and values are read where they lie: of a cache the filled slots alone, whatever
        ``slots`` says; and ``forward`` takes ``order`` [B] int32, with which row ``b`` sees prefix row ``order[b] // G``, G being
        the cache's rows over P. No two of ``order`` are equal.
    """

    forward: Callable[..., tuple[Any, Any]]
    unembed: Callable[..., Any]
    init_cache: Callable[[int, int], Any]
    prepare: Callable[[Any, int], Any] = unchanged
    in_place: bool = False
