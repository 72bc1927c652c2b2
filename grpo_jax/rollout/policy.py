"""What sampling and scoring need of a language model: three pure functions of its parameters, and one that prepares them."""

from collections.abc import Callable
from typing import Any, NamedTuple


def unchanged(params: Any, length: int) -> Any:
    """The parameters as they are."""
    return params


class Policy(NamedTuple):
    """A language model as pure functions of ``params``; any JAX model can be wrapped into one.

    Token ``i`` sees the keys ``j ≤ i`` whose mask is True; positions and slots are independent, so prompts may be padded on
    either side. What stands at a masked place changes nothing.

    Attributes:
      forward: ``forward(params, tokens [B, L], positions [B, L], mask [B, L], cache=None, start=0, prefix=None, slots=None,
        segments=None) -> (hidden [B, L, D], cache | None)``. With a cache, the L tokens are written to its slots
        ``[start, start + L)`` and see the slots before them. It may have more than B rows: its first B are read and written,
        the others come back as they were. ``slots``, a Python int with ``start + L ≤ slots``, says how many of its first slots
        to read: those behind are known to be empty. ``prefix`` is a cache of P rows that row ``b`` also sees, at its row
        ``b // (B // P)``: the G completions of a prompt share its keys and values without a copy. ``segments`` [B, L] int32,
        without a cache only: of the tokens of this call, a token sees those of its own segment alone, and the whole prefix.
      unembed: ``unembed(params, hidden [..., D]) -> logits [..., V]`` in float32.
      init_cache: ``init_cache(batch, length) -> pytree`` whose leaves all have the leading axis ``batch``.
      prepare: ``prepare(params, length) -> params`` with which the other functions give the same results in less time, at
        positions below ``length``; sampling calls it once and decodes with what it returns. A model whose products are bfloat16
        casts its matrices here, which would otherwise be cast again for every token.
    """

    forward: Callable[..., tuple[Any, Any]]
    unembed: Callable[..., Any]
    init_cache: Callable[[int, int], Any]
    prepare: Callable[[Any, int], Any] = unchanged
