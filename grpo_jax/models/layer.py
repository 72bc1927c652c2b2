"""One layer of the decoder: attention and a gated feed-forward block, each added to the residual.

Dimension key: see grpo_jax. Here S are the slots of keys that the tokens may see, and P the rows of a shared prefix.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.models.attention import KeyValues, attend, rotate, within_window
from grpo_jax.models.config import ACTIVATIONS, PROJECTED, DecoderConfig
from grpo_jax.models.tpu_attention import CachedLayer
from grpo_jax.products import matmul

# {"k" and "v": of each layer [B, K, H, S], "mask": [B, S] bool}, with windows "positions": [B, S].
# Each layer has its own buffer, with the slots last: decoding reads the first slots where they lie, whole vectors at once.
# With `DecoderConfig.decode_kernel`, "k" and "v" are each one array [B, layers, K·H, S].
Cache = dict[str, Any]


class Shared(NamedTuple):
    """What is the same for all layers of a call.

    Attributes:
      cos_sin: [B, L, 1, H / 2] each; or several kinds of them, [kinds, B, L, 1, H / 2], of which a layer has one.
      visible: [B, L, S] bool, which slots a token may see.
      prefix_visible: [P, S'] bool, which slots of a prefix all tokens may see.
      positions, key_positions: of the tokens [B, L] and of the keys [B, S]; with a prefix again of the tokens, in the order of
        its rows, and of its keys [P, S']; () where no layer has a window.
      start: the slot of the cache where the tokens begin.
      prefix_order: see `KeyValues.order`.
    """

    cos_sin: tuple[Array, ...]
    visible: Array
    prefix_visible: Array | None
    positions: tuple[Array, ...]
    key_positions: tuple[Array, ...]
    start: int | Array
    prefix_order: tuple[Array, int] | None


class Layer(nn.Module):
    """One layer, and the body of the scan over layers.

    Arguments: the hidden states [B, L, D]; ``own``, what only this layer has (the scalars of ``decoder._layer_data``, and keys
    and values [rows, K, H, slots] as ``cache`` and ``prefix`` if given); ``shared``. Returns the hidden states and: with a cache,
    its updated keys and values; without one, those of the tokens if ``returns_keys``, else None.
    """

    config: DecoderConfig
    returns_keys: bool = False

    @nn.compact
    def __call__(self, hidden: Array, own: dict[str, Any], shared: Shared) -> tuple[Array, tuple[Array, Array] | None]:
        c = self.config
        cos, sin = shared.cos_sin
        if "rotation" in own:
            cos, sin = cos[own["rotation"]], sin[own["rotation"]]  # [B, L, 1, H / 2]

        def weight(name: str, *shape: int) -> Array:
            return self.param(name, nn.initializers.zeros, shape, jnp.float32)

        def project(name: str, x: Array, width: int) -> Array:
            projected = matmul(x, weight(name, x.shape[-1], width), hidden.dtype)  # [B, L, width]
            if self.has_variable("params", f"{name}_a"):  # an adapter, see lora.py
                a: Array = self.get_variable("params", f"{name}_a")  # [D, r]
                b: Array = self.get_variable("params", f"{name}_b")  # [r, width]
                projected += matmul(matmul(x, a, hidden.dtype), b, hidden.dtype)
            return checkpoint_name(projected, PROJECTED)

        def norm(name: str, x: Array) -> Array:
            return rms_norm(x, weight(name, x.shape[-1]), c)

        def heads(name: str, x: Array, count: int) -> Array:
            x = project(name, x, count * c.head_dim)  # [B, L, count·H]
            if c.attention_bias:
                x = x + weight(f"{name}_bias", x.shape[-1]).astype(x.dtype)[None, None, :]
            return x.reshape(*x.shape[:2], count, c.head_dim)  # [B, L, count, H]

        def rotated_heads(name: str, x: Array, count: int) -> Array:
            x = heads(name, x, count)  # [B, L, count, H]
            return rotate(norm(f"{name}_norm", x) if c.qk_norm else x, (cos, sin)).astype(hidden.dtype)

        def add_to_residual(name: str, x: Array) -> Array:
            return hidden + (norm(name, x) if c.post_norms else x).astype(hidden.dtype)

        # Queries, keys and values of the tokens.
        x = norm("attention_norm", hidden)  # [B, L, D]
        query = rotated_heads("query", x, c.num_heads)  # [B, L, N, H]
        key = rotated_heads("key", x, c.num_kv_heads).transpose(0, 2, 3, 1)  # [B, K, H, L]
        value = heads("value", x, c.num_kv_heads).astype(hidden.dtype).transpose(0, 2, 3, 1)  # [B, K, H, L]

        # With a cache, write them to it, and see the keys and values in its first slots instead.
        new_keys, visible = (key, value) if self.returns_keys else None, shared.visible[:, None]
        own_keys: KeyValues | CachedLayer = KeyValues(key, value, visible)
        if "cache" in own:
            at, (B, L, S) = (0, 0, 0, shared.start), shared.visible.shape
            if c.decode_kernel:  # a cache of all layers, [rows, layers, K·H, slots]
                at, (key, value) = (0, own["layer"], 0, shared.start), (x.reshape(B, 1, -1, L) for x in (key, value))
            keys, values = (lax.dynamic_update_slice(x, y, at) for x, y in zip(own["cache"], (key, value), strict=True))
            new_keys = keys, values  # of all rows and slots of the cache
            if c.decode_kernel:
                cached = CachedLayer(keys, values, own["layer"], jnp.int32(shared.start + L), visible)
                own_keys = cached if L == 1 else KeyValues(*cached.slice(c.num_kv_heads), visible)
            else:
                own_keys = KeyValues(keys[:B, :, :, :S], values[:B, :, :, :S], visible)

        # Attention to these keys and those of the prefix; in a layer with a window, only to the near ones.
        blocks = [own_keys]
        if shared.prefix_visible is not None:
            prefix_keys, prefix_values = own["prefix"]
            visible = shared.prefix_visible[:, None, None, :]  # [P, 1, 1, S']
            blocks.append(KeyValues(prefix_keys, prefix_values, visible, shared.prefix_order))
        if shared.key_positions:
            pairs = zip(shared.positions, shared.key_positions, strict=True)
            near = [within_window(x, y, own["window"]) for x, y in pairs]  # [P, G, L, S]
            blocks = [x._replace(visible=x.visible & is_near) for x, is_near in zip(blocks, near, strict=True)]
        attended = attend(
            query, blocks, width=c.score_width, softcap=c.attention_softcap, query_block=c.query_block
        )  # [B, L, N·H]
        hidden = add_to_residual("attention_post_norm", project("output", attended, c.d_model))  # [B, L, D]

        # The gated feed-forward block.
        x = norm("mlp_norm", hidden)  # [B, L, D]
        gated = ACTIVATIONS[c.activation](project("gate", x, c.d_ff)) * project("up", x, c.d_ff)  # [B, L, F]
        return add_to_residual("mlp_post_norm", project("down", gated, c.d_model)), new_keys  # [B, L, D]


def rms_norm(x: Array, scale: Array, config: DecoderConfig) -> Array:
    """x / √(mean x² + ε) · scale over the last axis, or · (1 + scale), in float32; arXiv 1910.07467 eq. 4."""
    normed, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    normed = normed * lax.rsqrt(jnp.mean(jnp.square(normed), axis=-1, keepdims=True) + config.norm_epsilon)
    scale = 1 + scale if config.offset_norm else scale
    return (normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)
