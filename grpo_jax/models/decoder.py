"""One decoder-only transformer for all families: RMSNorm first, rotary positions, grouped-query attention, gated layers.

Flax Linen rather than NNX: ``apply`` is already a pure function of a plain nested dict, costs no Python per token, and
a scan over stacked layers with a carried cache reads in a few lines. Parameters are float32 and stacked over layers;
matrices are [in, out]. What differs between layers (a window, the rotation) is data that is scanned with them.

Dimension key: see grpo_jax. Here P are the rows of a prefix, and S the slots of a cache. A slot is where a key is stored, a
position is what rotations and windows see; the two are independent.
"""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from grpo_jax import products
from grpo_jax.models.attention import rotations, soft_capped
from grpo_jax.models.config import REMATS, DecoderConfig
from grpo_jax.models.layer import Cache, Layer, Shared, rms_norm
from grpo_jax.rollout.policy import Policy

Params = dict[str, Any]
NO_WINDOW = 2**31 - 1  # the window of a layer that has none
# Up to so many layers, the loop over them is unrolled where gradients may be taken: in a small model, stacking and clearing what
# the backward pass needs costs as much as computing it. Unrolling costs compilation time.
UNROLLED = 4


def make_policy(config: DecoderConfig) -> Policy:
    """The decoder as pure functions of its parameters.

    ``forward(params, tokens, positions, mask, cache=None, start=0, prefix=None, slots=None, segments=None)`` ->
    (hidden, cache), with tokens and positions [B, L] int32, mask [B, L] bool and hidden [B, L, D] after the last norm.
    Token i sees itself and earlier tokens whose mask is True. With a cache the tokens are written to slots
    [start, start + L) of its first B rows, and token i sees the True slots up to start + i; only the first ``slots``
    (a Python int) are read, and where ``start`` is a Python int, only those below start + L. ``prefix`` is a cache of P
    rows from an earlier call: row b also sees every True slot of prefix row b // (B // P), which is shared, not
    repeated, and never written. ``segments`` [B, L] int32, without a cache only: of the tokens of this call, a token
    sees those of its own segment alone, and the whole prefix. Masked tokens may hold anything; a token that sees
    nothing gets finite values. Windows count positions, not slots. Derivatives are those of reverse mode.

    ``unembed(params, hidden [..., D])`` -> logits [..., V] float32. ``init_cache(batch, length)`` -> an empty cache.
    ``prepare(params, length)`` -> the parameters for a long decode: matrices in ``config.dtype``, an untied unembedding also
    transposed, each layer's parameters also unstacked, and the rotations of ``length`` positions. The other functions take
    either form.

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
        slots: int | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        rows, length = tokens.shape
        if not tokens.shape == positions.shape == mask.shape:
            raise ValueError(
                f"tokens {tokens.shape}, positions {positions.shape} and mask {mask.shape} differ in shape"
            )
        if segments is None and length > config.max_length:
            raise ValueError(f"{length} tokens are more than the model's max_length={config.max_length}")
        if cache is not None:
            # XLA would move a write past the end back over older tokens. A traced start cannot be checked.
            end, fits = length + (start if isinstance(start, int) else 0), cache["mask"].shape
            if rows > fits[0] or end > fits[1]:
                raise ValueError(f"{rows} rows written up to slot {end} do not fit a cache of {fits} (rows, slots)")
            if slots is not None and not end <= slots <= fits[1]:
                raise ValueError(f"slots={slots} must lie between {end}, the end of what is written, and {fits[1]}")
        if cache is None and slots is not None:
            raise ValueError(f"slots={slots} are those of a cache, and there is none")
        if segments is not None and (cache is not None or segments.shape != tokens.shape):
            raise ValueError(f"segments {segments.shape} must be those of tokens {tokens.shape}, without a cache")
        if prefix is not None and rows % prefix["mask"].shape[0]:
            raise ValueError(f"{rows} rows are not a multiple of the {prefix['mask'].shape[0]} rows of the prefix")
        outputs: Any = module.apply({"params": params}, tokens, positions, mask, cache, start, prefix, slots, segments)
        return outputs

    def unembed(params: Params, hidden: Array) -> Array:
        if config.tied:
            embedding = params["embedding"]  # [V, D]
        elif "transposed_unembedding" in params:
            embedding = params["transposed_unembedding"]
        else:
            embedding = products.transposed(params["unembedding"])
        logits = products.unembed(hidden, embedding, dtype)  # [..., V]
        return logits if config.logit_softcap is None else soft_capped(logits, config.logit_softcap)

    def init_cache(batch: int, length: int) -> Cache:
        if length > config.max_length:
            raise ValueError(f"a cache of {length} slots is longer than the model's max_length={config.max_length}")
        shape = batch, config.num_kv_heads, config.head_dim, length
        cache: Cache = {name: tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for name in ("k", "v")}
        cache["mask"] = jnp.zeros((batch, length), bool)
        return cache if config.window is None else cache | {"positions": jnp.zeros((batch, length), jnp.int32)}

    return Policy(forward, unembed, init_cache, functools.partial(_prepare, config))


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters: variance 1 / fan-in, over 2·layers where a block writes to the residual.

    Norms multiply by 1, and biases are 0. The embedding has variance 1 / D, so that tied logits start with unit
    variance. One draw serves all matrices: each separate random array would cost a fraction of a second of compilation.
    ``key`` is a typed key; returns a plain nested dict. Source: the residual scaling is GPT-2's; statistics checked in
    tests/models/test_decoder.py.

    >>> config = DecoderConfig(32, 3, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> init_params(config, jax.random.key(0))["layers"]["gate"].shape
    (3, 8, 16)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    ends = list(itertools.accumulate(leaf.size for _, leaf in leaves))

    @jax.jit
    def sample(key: Array) -> Params:
        flat = jax.random.normal(key, (ends[-1],), jnp.float32)
        params = []
        for (path, leaf), end in zip(leaves, ends, strict=True):
            name = path[-1].key
            fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2] if leaf.ndim > 1 else 1
            variance = 1 / fan_in / (2 * config.num_layers if name in ("output", "down") else 1)
            values = flat[end - leaf.size : end].reshape(leaf.shape) * variance**0.5
            if name.endswith(("norm", "bias")):
                values = jnp.full_like(values, 0.0 if config.offset_norm or name.endswith("bias") else 1.0)
            params.append(values)
        return jax.tree.unflatten(tree, params)

    return sample(key)


def param_shapes(config: DecoderConfig) -> Params:
    """The tree of parameter shapes (``jax.ShapeDtypeStruct``), without allocating anything.

    >>> config = DecoderConfig(32, 3, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> param_shapes(config)["embedding"].shape
    (32, 8)
    """
    tokens, mask = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.int32, jnp.bool_))
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens, mask)["params"]


class Decoder(nn.Module):
    """Embedding, layers, last norm; see ``make_policy`` for the arguments."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache | None = None,
        start: int | Array = 0,
        prefix: Cache | None = None,
        slots: int | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        c = self.config
        B, L = tokens.shape

        # Embed the tokens.
        embedding = self.param("embedding", nn.initializers.zeros, (c.vocab_size, c.d_model), jnp.float32)
        if not c.tied:
            self.param("unembedding", nn.initializers.zeros, (c.d_model, c.vocab_size), jnp.float32)
        # Ids at masked places may be anything; "clip" keeps their embeddings finite, where the default would give NaN.
        hidden = jnp.take(embedding, tokens, axis=0, mode="clip").astype(c.dtype)  # [B, L, D]
        if c.scale_embedding:
            hidden = hidden * jnp.asarray(c.d_model**0.5, hidden.dtype)

        # Write the tokens' mask and positions to the cache, and read there which keys exist: S slots, or without a cache those
        # of the tokens themselves. A call that fills the whole cache builds it anew: nothing of it is read, carried, or
        # differentiated.
        fills_cache = cache is not None and isinstance(start, int) and mask.shape == cache["mask"].shape
        if fills_cache:
            cache = None
        token_slots, key_mask, key_positions = jnp.arange(L, dtype=jnp.int32), mask, [positions]  # [L], [B, S], [B, S]
        if cache is not None:
            cache = {**cache, "mask": lax.dynamic_update_slice(cache["mask"], mask, (0, start))}
            S = cache["mask"].shape[1] if slots is None else slots
            S = min(S, start + L) if isinstance(start, int) else S
            key_mask, token_slots = cache["mask"][:B, :S], token_slots + start
            if c.window is not None:
                cache["positions"] = lax.dynamic_update_slice(cache["positions"], positions, (0, start))
                key_positions = [cache["positions"][:B, :S]]
        if prefix is not None and c.window is not None:
            key_positions.append(prefix["positions"])  # [P, slots]

        # The causal mask: which of the S slots a token sees.
        causal = jnp.arange(key_mask.shape[1], dtype=jnp.int32)[None, :] <= token_slots[:, None]  # [L, S]
        visible = causal[None] & key_mask[:, None, :]  # [B, L, S]
        if segments is not None:
            visible &= segments[:, :, None] == segments[:, None, :]  # [B, L, L]

        # The layers.
        own = _layer_data(c)
        table = self.variables["params"].get("rotations")
        shared = Shared(
            _rotations(c, positions) if table is None else _rows(table, positions),
            visible,
            None if prefix is None else prefix["mask"],
            None if c.window is None else positions,
            () if c.window is None else tuple(key_positions),
            start,
        )
        if cache is not None:
            # A scan over the layers would copy the weights and the cache of each, for every token.
            weights = self.variables["params"]
            unstacked = weights.get("each_layer") or _unstack(weights["layers"], c.num_layers)
            keys, values = [], []
            for i, layer_weights in enumerate(unstacked):
                layer_own = jax.tree.map(lambda x, i=i: x[i], own) | {"cache": (cache["k"][i], cache["v"][i])}
                if prefix is not None:
                    layer_own["prefix"] = prefix["k"][i], prefix["v"][i]
                layer = Layer(c, parent=None)
                hidden, (key, value) = layer.apply({"params": layer_weights}, hidden, layer_own, shared)
                keys.append(key)
                values.append(value)
            cache |= {"k": tuple(keys), "v": tuple(values)}
        else:
            if prefix is not None:
                own["prefix"] = jnp.stack(prefix["k"]), jnp.stack(prefix["v"])  # [layers, P, K, H, slots] each
            scan = nn.scan(
                REMATS[c.remat](Layer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.num_layers,
                unroll=c.num_layers if c.num_layers <= UNROLLED else 1,
            )
            hidden, new_keys = scan(c, fills_cache, name="layers")(hidden, own, shared)  # [B, L, D]
            if fills_cache:
                keys, values = new_keys  # [layers, B, K, H, S] each
                cache = {"k": tuple(jnp.unstack(keys)), "v": tuple(jnp.unstack(values)), "mask": mask}
                cache |= {} if c.window is None else {"positions": positions}

        return rms_norm(hidden, self.param("final_norm", nn.initializers.ones, (c.d_model,), jnp.float32), c), cache


def _prepare(config: DecoderConfig, params: Params, length: int) -> Params:
    """The parameters with what a decode of up to ``length`` positions would otherwise compute for every token."""
    dtype = jnp.dtype(config.dtype)
    prepared = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key.endswith(("norm", "bias")) else x.astype(dtype), params
    )
    # An optimization barrier keeps XLA from moving these into the loop over tokens.
    if not config.tied:  # a product with the other layout takes three times as long on a CPU
        prepared["transposed_unembedding"] = lax.optimization_barrier(prepared["unembedding"].T)  # [V, D]
    # XLA would compute a sine for every layer and head of every token.
    cos, sin = _rotations(config, jnp.arange(length, dtype=jnp.int32)[None])  # [1, length, 1, H / 2], or several kinds
    table = lax.optimization_barrier((cos[..., 0, :, :, :], sin[..., 0, :, :, :]))  # without the axis of rows
    return prepared | {"each_layer": _unstack(prepared["layers"], config.num_layers), "rotations": table}


def _rows(table: tuple[Array, Array], positions: Array) -> tuple[Array, Array]:
    """The cos and sin of these positions, from those of all positions."""
    cos, sin = (jnp.take(x, positions, axis=-3, mode="clip") for x in table)
    return cos, sin


def _unstack(layers: Params, count: int) -> tuple[Params, ...]:
    """The parameters of each layer, of the stacked ones."""
    return tuple({name: x[i] for name, x in layers.items()} for i in range(count))


def _layer_data(config: DecoderConfig) -> dict[str, Any]:
    """What the config lets differ between layers, each [layers]: their windows, and which kind of rotation they have."""
    c = config
    layers = range(c.num_layers)
    differing: dict[str, list[int]] = {}
    if c.window is not None:
        differing["window"] = [min(c.window, NO_WINDOW) if i in c.local_layers else NO_WINDOW for i in layers]
    if c.local_rope_theta is not None or c.unrotated_layers:
        differing["rotation"] = [2 if i in c.unrotated_layers else 1 if i in c.local_layers else 0 for i in layers]
    return {name: jnp.array(values, jnp.int32) for name, values in differing.items()}


def _rotations(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin [B, L, 1, H / 2], or, where layers differ, the kinds that ``_layer_data`` counts, [3, B, L, 1, H / 2]."""
    c = config
    everywhere = rotations(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    if c.local_rope_theta is None and not c.unrotated_layers:
        return everywhere
    local = everywhere if c.local_rope_theta is None else rotations(positions, c.head_dim, c.local_rope_theta)
    none = rotations(jnp.zeros_like(positions), c.head_dim, c.rope_theta)
    cos, sin = (jnp.stack(kinds) for kinds in zip(everywhere, local, none, strict=True))
    return cos, sin
