"""LoRA: some matrices of the layers stay as they are, and what is trained is added to them as a product of two thin ones.

    x W  becomes  x W + (α/r) (x A) B        W [d, f] frozen, A [d, r] random and B [r, f] zero at the start, r the rank

so that training begins at the reference, which is the same policy without A and B: it takes no memory of its own. The decoder
adds the products where it finds "query_a" and "query_b" beside "query" (`grpo_jax.models.layer`).

Source: E. J. Hu et al., arXiv 2106.09685, §4.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.models.decoder import Params

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


class Lora(NamedTuple):
    """What is trained of a decoder.

    Attributes:
      rank: r, at least 1.
      alpha: α; the product of A and B is multiplied by α/r.
      targets: the matrices that have adapters, of `TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def init(self, params: Params, key: jax.Array) -> dict[str, jax.Array]:
        """Adapters of a decoder that change nothing yet: A [layers, d, r] of variance 1/d, and B [layers, r, f] = 0.

        Args:
          params: of the decoder, or their shapes.
          key: typed.

        >>> params = {"layers": {"query": jnp.ones((3, 8, 4))}}
        >>> adapters = Lora(2, 4.0, ("query",)).init(params, jax.random.key(0))
        >>> {name: x.shape for name, x in adapters.items()}
        {'query_a': (3, 8, 2), 'query_b': (3, 2, 4)}
        """
        adapters: dict[str, jax.Array] = {}
        for number, name in enumerate(self.targets):
            layers, d, f = params["layers"][name].shape
            random = jax.random.normal(jax.random.fold_in(key, number), (layers, d, self.rank), jnp.float32)
            adapters |= {f"{name}_a": random * d**-0.5, f"{name}_b": jnp.zeros((layers, self.rank, f), jnp.float32)}
        return adapters

    def join(self, adapters: dict[str, jax.Array], params: Params) -> Params:
        """The parameters of the policy with its adapters, from the adapters and those of the decoder [layers, d, f].

        >>> lora, params = Lora(1, 4.0, ("query",)), {"layers": {"query": jnp.zeros((1, 2, 2))}}
        >>> joined = lora.join({"query_a": jnp.ones((1, 2, 1)), "query_b": jnp.ones((1, 1, 2))}, params)
        >>> joined["layers"]["query_b"].tolist(), merge(joined)["layers"]["query"].tolist()
        ([[[4.0, 4.0]]], [[[4.0, 4.0], [4.0, 4.0]]])
        """
        scale = self.alpha / self.rank
        scaled = {name: x * scale if name.endswith("_b") else x for name, x in adapters.items()}
        return params | {"layers": params["layers"] | scaled}

    def split(self, params: Params) -> dict[str, jax.Array]:
        """The adapters of joined parameters, as they were before."""
        names = [f"{name}_{side}" for name in self.targets for side in "ab"]
        scale = self.alpha / self.rank
        return {name: params["layers"][name] / (scale if name.endswith("_b") else 1.0) for name in names}


def merge(params: Params) -> Params:
    """Joined parameters as those of a decoder without adapters: W + (α/r) A B."""
    layers = params["layers"]
    names = [name for name in layers if name in TARGETS and f"{name}_a" in layers]
    merged = {name: layers[name] + layers[f"{name}_a"] @ layers[f"{name}_b"] for name in names}
    others = {name: x for name, x in layers.items() if not name.endswith(("_a", "_b"))}
    return params | {"layers": others | merged}
