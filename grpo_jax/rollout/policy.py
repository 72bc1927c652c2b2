"""What sampling and scoring need of a language model: three pure functions of its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """A language model as pure functions of ``params``; any JAX model can be wrapped into one.

    Token ``i`` sees the keys ``j ≤ i`` whose mask is True; positions and slots are independent, so prompts may be padded on
    either side. What stands at a masked place changes nothing.

    Attributes:
      forward: ``forward(params, tokens [B, L], positions [B, L], mask [B, L], cache=None, start=0, prefix=None) ->
        (hidden [B, L, D], cache | None)``. With a cache, the L tokens are written to its slots ``[start, start + L)`` and see the
        slots before them. ``prefix`` is a cache of P rows that row ``b`` also sees, at its row ``b // (B // P)``: the G
        completions of a prompt share its keys and values without a copy.
      unembed: ``unembed(params, hidden [..., D]) -> logits [..., V]`` in float32.
      init_cache: ``init_cache(batch, length) -> pytree`` whose leaves all have the leading axis ``batch``.
    """

    forward: Callable[..., tuple[Any, Any]]
    unembed: Callable[..., Any]
    init_cache: Callable[[int, int], Any]
