"""One layer of the decoder: attention and a gated feed-forward block, each added to the residual.

Dimension key: B rows, L tokens of this call, S cache slots, N query heads, K key/value heads, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.models.attention import Block, attend, rotate, within
from grpo_jax.models.config import DecoderConfig
from grpo_jax.products import matmul

# {"k" and "v": of each layer [B, K, H, S], "mask": [B, S] bool}, with windows "positions": [B, S].
# A buffer for each layer, and slots last: a step reads the first of them where they are, whole vectors at once.
Cache = dict[str, Any]
PROJECTED = "projected"  # what products with weights make, by name for `jax.checkpoint`
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Layer(nn.Module):
    """One layer, and the body of the scan over layers.

    Arguments of a call: the hidden states [B, L, D]; what is this layer's own, scalars named as in ``decoder._by_layer``, and,
    where there are, ``cache`` and ``prefix``, keys and values [rows, K, H, slots]; cos and sin
    [B, L, 1, H / 2], or several of them to choose from; visible [B, L, slots], and what is visible of the prefix [P, slots];
    where layers have windows, the positions of the queries [B, L], of the keys in the slots [B, slots] and of those of the
    prefix [P, slots]; and the slot where the tokens begin. Returns the hidden states, and with them the cache with the tokens
    written to it; or, without a cache, the keys and values of the tokens where it ``keeps`` them.
    """

    config: DecoderConfig
    keeps: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        layer: dict[str, Any],
        cos_sin: tuple[Array, Array],
        visible: Array,
        prefix_visible: Array | None,
        positions: tuple[Array, ...] | None,
        start: int | Array,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        c = self.config
        if "rotation" in layer:
            cos_sin = cos_sin[0][layer["rotation"]], cos_sin[1][layer["rotation"]]

        def weight(name: str, *shape: int) -> Array:
            return self.param(name, nn.initializers.zeros, shape, jnp.float32)

        def project(name: str, x: Array, width: int) -> Array:
            return checkpoint_name(matmul(x, weight(name, x.shape[-1], width), hidden.dtype), PROJECTED)

        def norm(name: str, x: Array) -> Array:
            return rms_norm(x, weight(name, x.shape[-1]), c)

        def heads(name: str, x: Array, count: int) -> Array:
            x = project(name, x, count * c.head_dim)
            if c.attention_bias:
                x = x + weight(f"{name}_bias", x.shape[-1]).astype(x.dtype)[None, None, :]
            return x.reshape(*x.shape[:2], count, c.head_dim)

        def rotated(name: str, x: Array, count: int) -> Array:
            x = heads(name, x, count)
            return rotate(norm(f"{name}_norm", x) if c.qk_norm else x, cos_sin).astype(hidden.dtype)

        def add(name: str, x: Array) -> Array:
            return hidden + (norm(name, x) if c.post_norms else x).astype(hidden.dtype)

        x = norm("attention_norm", hidden)
        query = rotated("query", x, c.num_heads)
        key = rotated("key", x, c.num_kv_heads).transpose(0, 2, 3, 1)
        value = heads("value", x, c.num_kv_heads).astype(hidden.dtype).transpose(0, 2, 3, 1)
        kept = (key, value) if self.keeps else None
        if "cache" in layer:
            keys, values = layer["cache"]
            keys, values = (lax.dynamic_update_slice(x, y, (0, 0, 0, start)) for x, y in ((keys, key), (values, value)))
            kept, (rows, _, slots) = (keys, values), visible.shape
            key, value = keys[:rows, :, :, :slots], values[:rows, :, :, :slots]
        blocks: list[Block] = [(key, value, visible[:, None])]
        if prefix_visible is not None:
            blocks.append((*layer["prefix"], prefix_visible[:, None, None, :]))
        if positions is not None:
            near = [within(positions[0], key_positions, layer["window"]) for key_positions in positions[1:]]
            blocks = [(k, v, seen & close) for (k, v, seen), close in zip(blocks, near, strict=True)]
        attended = attend(query, blocks, width=c.score_width, softcap=c.attention_softcap)
        hidden = add("attention_post_norm", project("output", attended, c.d_model))

        x = norm("mlp_norm", hidden)
        gated = ACTIVATIONS[c.activation](project("gate", x, c.d_ff)) * project("up", x, c.d_ff)
        return add("mlp_post_norm", project("down", gated, c.d_model)), kept


def rms_norm(x: Array, scale: Array, config: DecoderConfig) -> Array:
    """x / √(mean x² + ε) · scale over the last axis, or · (1 + scale), in float32; arXiv 1910.07467 eq. 4."""
    wide, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_epsilon)
    scale = 1 + scale if config.offset_norm else scale
    return (wide * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)
