"""One decoder-only transformer of the Llama family: RMSNorm first, rotary positions, grouped-query attention, SwiGLU.

Flax Linen rather than NNX: ``apply`` is already a pure function of a plain nested dict, costs no Python per token, and
a scan over stacked layers with a carried cache reads in a few lines. Parameters are float32 and stacked over layers;
matrices are [in, out].

Dimension key: B rows, L tokens of this call, P prefix rows, S cache slots, V vocabulary, D model width, N query heads,
K key/value heads, H head dim. Slots (where a key is stored) and positions (what the rotation sees) are independent.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from grpo_jax.models.attention import Block, attend, rotate, rotations
from grpo_jax.rollout.policy import Policy

Params = dict[str, Any]
Cache = dict[str, Array]  # {"k", "v": [B, layers, K, S, H], "mask": [B, S] bool}
SIZES = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_length")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a decoder; refuses impossible ones.

    ``max_length`` is the widest array of tokens or slots accepted. ``dtype`` is the type of the matrix products,
    float32 or bfloat16; they accumulate in float32, and norms, softmax and logits are float32. ``remat`` recomputes a
    layer in the backward pass instead of storing its activations (only without a cache). Raises ValueError naming every
    number that cannot be.

    >>> DecoderConfig(32, 1, 8, num_heads=3, num_kv_heads=2, head_dim=4, d_ff=16, max_length=64)
    Traceback (most recent call last):
    ...
    ValueError: num_heads=3 is not a multiple of num_kv_heads=2
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tied: bool = True
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        def wrong(names: tuple[str, ...], kind: str, fits: Callable[[Any], bool]) -> list[str]:
            return [f"{name}={getattr(self, name)!r} is not {kind}" for name in names if not fits(getattr(self, name))]

        faults = wrong(SIZES, "a positive integer", lambda x: type(x) is int and x > 0)
        if not faults and self.num_heads % self.num_kv_heads:
            faults.append(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if not faults and self.head_dim % 2:
            faults.append(f"head_dim={self.head_dim} is odd; the rotation needs pairs")
        positive = ("rope_theta", "norm_epsilon")
        faults += wrong(positive, "a positive number", lambda x: type(x) in (int, float) and 0 < x < math.inf)
        faults += wrong(("tied", "remat"), "True or False", lambda x: type(x) is bool)
        faults += wrong(("dtype",), " or ".join(DTYPES), lambda x: x in DTYPES)
        if faults:
            raise ValueError("; ".join(faults))


def make_policy(config: DecoderConfig) -> Policy:
    """The decoder as three pure functions of its parameters.

    ``forward(params, tokens, positions, mask, cache=None, start=0, prefix=None)`` -> (hidden, cache), with tokens and
    positions [B, L] int32, mask [B, L] bool and hidden [B, L, D] after the last norm. Token i sees itself and earlier
    tokens whose mask is True. With a cache the tokens are written to slots [start, start + L), and token i sees the
    True slots up to start + i; where ``start`` is a Python int, only slots below start + L are read. ``prefix`` is a
    cache of P rows from an earlier call: row b also sees every True slot of prefix row b // (B // P), which is shared,
    not repeated, and never written. Masked tokens may hold anything; a token that sees nothing gets finite values.

    ``unembed(params, hidden [..., D])`` -> logits [..., V] float32. ``init_cache(batch, length)`` -> an empty cache.
    Parameters already in ``config.dtype`` are not cast again: cast once before a long decode.

    Raises ValueError where shapes, lengths or rows do not fit. Source: arXiv 2302.13971 §2.2; checked against a NumPy
    implementation in tests/models/test_decoder.py.

    >>> config = DecoderConfig(32, 1, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> policy, params = make_policy(config), init_params(config, jax.random.key(0))
    >>> tokens = jnp.array([[5, 6, 7]])
    >>> hidden, _ = policy.forward(params, tokens, jnp.arange(3)[None], tokens > 0)
    >>> hidden.shape, policy.unembed(params, hidden).shape
    ((1, 3, 8), (1, 3, 32))
    """
    module = Decoder(config)
    dtype = jnp.dtype(config.dtype)

    def forward(
        params: Params,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache | None = None,
        start: int | Array = 0,
        prefix: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        rows, length = tokens.shape
        if not tokens.shape == positions.shape == mask.shape:
            raise ValueError(
                f"tokens {tokens.shape}, positions {positions.shape} and mask {mask.shape} differ in shape"
            )
        if length > config.max_length:
            raise ValueError(f"{length} tokens are more than the model's max_length={config.max_length}")
        if cache is not None:
            # XLA would move a write past the end back over older tokens. A traced start cannot be checked.
            end, fits = length + (start if isinstance(start, int) else 0), cache["mask"].shape
            if fits[0] != rows or end > fits[1]:
                raise ValueError(f"{rows} rows written up to slot {end} do not fit a cache of {fits} (rows, slots)")
        if prefix is not None and rows % prefix["mask"].shape[0]:
            raise ValueError(f"{rows} rows are not a multiple of the {prefix['mask'].shape[0]} rows of the prefix")
        outputs: Any = module.apply({"params": params}, tokens, positions, mask, cache, start, prefix)
        return outputs

    def unembed(params: Params, hidden: Array) -> Array:
        if config.tied:
            return _matmul(hidden, params["embedding"].T, dtype)
        return _matmul(hidden, params["unembedding"], dtype)

    def init_cache(batch: int, length: int) -> Cache:
        if length > config.max_length:
            raise ValueError(f"a cache of {length} slots is longer than the model's max_length={config.max_length}")
        shape = (batch, config.num_layers, config.num_kv_heads, length, config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "mask": jnp.zeros((batch, length), bool)}

    return Policy(forward, unembed, init_cache)


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters: variance 1 / fan-in, over 2·layers where a block writes to the residual; norms 1.

    The embedding has variance 1 / D, so that tied logits start with unit variance. One draw serves all matrices: each
    separate random array would cost a fraction of a second of compilation. ``key`` is a typed key; returns a plain
    nested dict. Source: the residual scaling is GPT-2's; statistics checked in tests/models/test_decoder.py.

    >>> config = DecoderConfig(32, 3, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> init_params(config, jax.random.key(0))["layers"]["gate"].shape
    (3, 8, 16)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    ends = list(itertools.accumulate(leaf.size for _, leaf in leaves))

    @jax.jit
    def draw(key: Array) -> Params:
        flat = jax.random.normal(key, (ends[-1],), jnp.float32)
        params = []
        for (path, leaf), end in zip(leaves, ends, strict=True):
            name = path[-1].key
            fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2] if leaf.ndim > 1 else 1
            variance = 1 / fan_in / (2 * config.num_layers if name in ("output", "down") else 1)
            values = flat[end - leaf.size : end].reshape(leaf.shape) * variance**0.5
            params.append(jnp.ones_like(values) if name.endswith("norm") else values)
        return jax.tree.unflatten(tree, params)

    return draw(key)


def param_shapes(config: DecoderConfig) -> Params:
    """The tree of parameter shapes (``jax.ShapeDtypeStruct``), without allocating anything.

    >>> config = DecoderConfig(32, 3, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> param_shapes(config)["embedding"].shape
    (32, 8)
    """
    tokens, mask = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.int32, jnp.bool_))
    init = functools.partial(Decoder(config).init, cache=None, start=0, prefix=None)
    return jax.eval_shape(init, jax.random.key(0), tokens, tokens, mask)["params"]


class Decoder(nn.Module):
    """Embedding, scanned layers, last norm; see ``make_policy`` for the arguments."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache | None,
        start: int | Array,
        prefix: Cache | None,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        embedding = self.param("embedding", nn.initializers.zeros, (c.vocab_size, c.d_model), jnp.float32)
        if not c.tied:
            self.param("unembedding", nn.initializers.zeros, (c.d_model, c.vocab_size), jnp.float32)
        # Ids at masked places may be anything; "clip" keeps their embeddings finite, where the default would give NaN.
        hidden = jnp.take(embedding, tokens, axis=0, mode="clip").astype(c.dtype)

        queries = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if cache is not None:
            cache = {**cache, "mask": lax.dynamic_update_slice(cache["mask"], mask, (0, start))}
            mask = cache["mask"][:, : start + len(queries)] if isinstance(start, int) else cache["mask"]
            queries = queries + start
        causal = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :] <= queries[:, None]

        # The cache is carried, not scanned over: XLA then updates it in place instead of restacking it for every token.
        layer = nn.remat(Layer, prevent_cse=False) if c.remat and cache is None else Layer
        axes = (0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
        scan = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=axes, length=c.num_layers
        )
        (hidden, cache), _ = scan(c, name="layers")(
            (hidden, cache),
            jnp.arange(c.num_layers, dtype=jnp.int32),
            rotations(positions, c.head_dim, c.rope_theta),
            causal[None] & mask[:, None, :],
            start,
            prefix,
        )
        scale = self.param("final_norm", nn.initializers.ones, (c.d_model,), jnp.float32)
        return _rms_norm(hidden, scale, c.norm_epsilon), cache


class Layer(nn.Module):
    """One attention block and one feed-forward block, each added to the residual; the body of the scan over layers."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        layer: Array,
        cos_sin: tuple[Array, Array],
        visible: Array,
        start: int | Array,
        prefix: Cache | None,
    ) -> tuple[tuple[Array, Cache | None], None]:
        c = self.config
        hidden, cache = carry

        def project(name: str, x: Array, width: int) -> Array:
            matrix = self.param(name, nn.initializers.zeros, (x.shape[-1], width), jnp.float32)
            return _matmul(x, matrix, hidden.dtype)

        def heads(name: str, x: Array, count: int) -> Array:
            return project(name, x, count * c.head_dim).reshape(*x.shape[:2], count, c.head_dim)

        def norm(name: str, x: Array) -> Array:
            return _rms_norm(x, self.param(name, nn.initializers.ones, (c.d_model,), jnp.float32), c.norm_epsilon)

        x = norm("attention_norm", hidden)
        query = rotate(heads("query", x, c.num_heads), cos_sin).astype(hidden.dtype)
        key = rotate(heads("key", x, c.num_kv_heads), cos_sin).astype(hidden.dtype).swapaxes(1, 2)
        value = heads("value", x, c.num_kv_heads).astype(hidden.dtype).swapaxes(1, 2)
        if cache is not None:
            new = {"k": key, "v": value}
            at = (0, layer, 0, start, 0)
            cache |= {name: lax.dynamic_update_slice(cache[name], new[name][:, None], at) for name in new}
            key, value = (_layer_slots(cache[name], layer, visible.shape[-1]) for name in ("k", "v"))
        blocks: list[Block] = [(key, value, visible)]
        if prefix is not None:
            seen = prefix["mask"][:, None, :]
            shared_key, shared_value = (_layer_slots(prefix[name], layer, seen.shape[-1]) for name in ("k", "v"))
            blocks.append((shared_key, shared_value, seen))
        hidden = hidden + project("output", attend(query, blocks), c.d_model).astype(hidden.dtype)

        x = norm("mlp_norm", hidden)
        gated = jax.nn.silu(project("gate", x, c.d_ff)) * project("up", x, c.d_ff)
        return (hidden + project("down", gated, c.d_model).astype(hidden.dtype), cache), None


def _layer_slots(stacked: Array, layer: Array, slots: int) -> Array:
    """[B, layers, K, S, H] -> [B, K, slots, H]: the first ``slots`` slots of one layer."""
    rows, _, heads, _, width = stacked.shape
    return lax.dynamic_slice(stacked, (0, layer, 0, 0, 0), (rows, 1, heads, slots, width))[:, 0]


def _matmul(x: Array, matrix: Array, dtype: jnp.dtype) -> Array:
    """[..., d] · [d, f] -> [..., f]: a product of ``dtype`` inputs accumulated in float32.

    Rows and tokens are one axis here: XLA's CPU backend takes 2.5 times as long for the gradient of a contraction over two.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    product = jnp.matmul(rows, matrix.astype(dtype), preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:-1], matrix.shape[-1])


def _rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * jnp.expand_dims(scale.astype(jnp.float32), (0, 1))).astype(x.dtype)
