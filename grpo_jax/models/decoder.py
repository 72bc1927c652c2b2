"""One decoder-only transformer for all families: RMSNorm first, rotary positions, grouped-query attention, gated layers.

Pure functions of a plain nested dict of parameters, which are float32; those of the layers are stacked, and matrices are
[in, out]. What differs between layers (a window, the rotation) is data that is scanned with them. A layer is a Flax Linen
module rather than an NNX one: ``apply`` is already such a function, and costs no Python per token.

Dimension key: see grpo_jax. Here P are the rows of a prefix, and S the slots of a cache. A slot is where a key is stored, a
position is what rotations and windows see; the two are independent.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from grpo_jax import products
from grpo_jax.models.attention import rotations, soft_capped
from grpo_jax.models.config import REMATS, DecoderConfig
from grpo_jax.models.layer import Cache, Layer, Shared, rms_norm
from grpo_jax.models.tpu_attention import CachedLayer
from grpo_jax.rollout.policy import Policy

Params = dict[str, Any]
NO_WINDOW = 2**31 - 1  # the window of a layer that has none
# Up to so many layers, the loop over them is unrolled where gradients may be taken: in a small model, stacking and clearing what
# the backward pass needs costs as much as computing it. Unrolling costs compilation time.
UNROLLED = 4


def make_policy(config: DecoderConfig, *, gather: Callable[[Params], Params] | None = None) -> Policy:
    """The decoder as pure functions of its parameters.

    ``forward(params, tokens, positions, mask, cache=None, start=0, prefix=None, slots=None, segments=None, order=None)`` ->
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
    either form. ``gather`` is given the parameters of a layer where it begins, and returns them whole: see
    `grpo_jax.train.sharding.gather_layer`.

    Raises ValueError where shapes, lengths or rows do not fit. Source: arXiv 2302.13971 §2.2; checked against a NumPy
    implementation in tests/models/test_decoder.py.

    >>> config = DecoderConfig(32, 1, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> policy, params = make_policy(config), init_params(config, jax.random.key(0))
    >>> tokens = jnp.array([[5, 6, 7]])
    >>> hidden, _ = policy.forward(params, tokens, jnp.arange(3)[None], tokens > 0)
    >>> hidden.shape, policy.unembed(params, hidden).shape
    ((1, 3, 8), (1, 3, 32))
    """
    return Policy(
        partial(_forward, config, gather),
        partial(_unembed, config),
        partial(_init_cache, config),
        partial(_prepare, config),
        in_place=config.decode_kernel,
    )


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random float32 parameters: variance 1 / fan-in, divided by 2·layers where a block writes to the residual.

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
    c, token = config, jnp.zeros((1, 1), jnp.int32)

    def init(key: Array) -> Params:
        own = jax.tree.map(lambda x: x[0], _layer_data(c))
        positions = () if c.window is None else (token,)
        shared = Shared(_rotations(c, token), token[None] >= 0, None, positions, positions, 0, None)
        layer = Layer(c).init(key, jnp.zeros((1, 1, c.d_model), c.dtype), own, shared)["params"]
        params = {"embedding": jnp.zeros((c.vocab_size, c.d_model)), "final_norm": jnp.zeros(c.d_model)}
        params |= {} if c.tied else {"unembedding": jnp.zeros((c.d_model, c.vocab_size))}
        return params | {"layers": jax.tree.map(lambda x: jnp.zeros((c.num_layers, *x.shape)), layer)}

    return jax.eval_shape(init, jax.random.key(0))


def _forward(
    config: DecoderConfig,
    gather: Callable[[Params], Params] | None,
    params: Params,
    tokens: Array,
    positions: Array,
    mask: Array,
    cache: Cache | None = None,
    start: int | Array = 0,
    prefix: Cache | None = None,
    slots: int | None = None,
    segments: Array | None = None,
    order: Array | None = None,
) -> tuple[Array, Cache | None]:
    c = config
    B, L = tokens.shape

    _check_call(c, tokens, positions, mask, cache, start, prefix, slots, segments, order)

    # Embed the tokens. Ids at masked places may be anything; "clip" keeps their embeddings finite, not NaN as by default.
    hidden = jnp.take(params["embedding"], tokens, axis=0, mode="clip").astype(c.dtype)  # [B, L, D]
    if c.scale_embedding:
        hidden = hidden * jnp.asarray(c.d_model**0.5, hidden.dtype)

    # Write the mask and positions of the tokens to the cache, and read there which keys exist, in S slots; without a cache the
    # keys are those of the tokens themselves. A call that fills the whole cache builds it anew: nothing of it is read, carried,
    # or differentiated.
    fills_cache = cache is not None and isinstance(start, int) and mask.shape == cache["mask"].shape
    if fills_cache:
        cache = None
    token_data = {"mask": mask} if c.window is None else {"mask": mask, "positions": positions}  # [B, L] each
    key_data, token_slots = token_data, jnp.arange(L, dtype=jnp.int32)
    if cache is not None:
        cache = cache | {name: lax.dynamic_update_slice(cache[name], x, (0, start)) for name, x in token_data.items()}
        S = cache["mask"].shape[1] if slots is None else slots
        S = min(S, start + L) if isinstance(start, int) else S
        key_data = {name: cache[name][:B, :S] for name in token_data}  # [B, S] each
        token_slots = token_slots + start  # [L]

    # The causal mask: a token sees the slots up to its own.
    causal = jnp.arange(key_data["mask"].shape[1], dtype=jnp.int32)[None, :] <= token_slots[:, None]  # [L, S]
    visible = causal[None] & key_data["mask"][:, None, :]  # [B, L, S]
    if segments is not None:
        visible &= segments[:, :, None] == segments[:, None, :]  # [B, L, L]

    own = _layer_data(c)  # what differs between the layers, [layers] each
    blocks, query_positions, prefix_order = [key_data], [positions], None
    if prefix is not None:
        blocks, query_positions = [key_data, prefix], [positions, positions]
    if order is not None and cache is not None:
        prefix_order = order, cache["mask"].shape[0]
        query_positions[1] = jnp.zeros((prefix_order[1], L), jnp.int32).at[order].set(positions)
    shared = Shared(
        cos_sin=_rows(params["rotations"], positions) if "rotations" in params else _rotations(c, positions),
        visible=visible,
        prefix_visible=None if prefix is None else prefix["mask"],
        positions=() if c.window is None else tuple(query_positions),
        key_positions=() if c.window is None else tuple(block["positions"] for block in blocks),
        start=start,
        prefix_order=prefix_order,
    )
    layer = Layer(c, returns_keys=fills_cache)

    def apply_layer(weights: Params, hidden: Array, own: dict[str, Any]) -> Any:
        if gather is not None:
            # Not before the layer before it has ended: XLA would gather all layers before the first token.
            weights, hidden = lax.optimization_barrier((weights, hidden))
            weights = gather(weights)
        return layer.apply({"params": weights}, hidden, own, shared)

    if cache is None:
        if prefix is not None:
            own["prefix"] = _by_layer(c, prefix["k"]), _by_layer(c, prefix["v"])  # [layers, P, K, H, slots] each
        remat_layer = REMATS[c.remat](apply_layer)
        hidden, new_keys = lax.scan(
            lambda hidden, layer: remat_layer(layer[0], hidden, layer[1]),
            hidden,  # [B, L, D]
            (params["layers"], own),
            unroll=c.num_layers if c.num_layers <= UNROLLED else 1,
        )
        if fills_cache:
            keys, values = new_keys  # [layers, B, K, H, S] each
            cache = {"k": _cached(c, keys), "v": _cached(c, values), **token_data}
    elif c.decode_kernel:
        own["layer"] = jnp.arange(c.num_layers, dtype=jnp.int32)

        def next_layer(carry: tuple[Array, tuple[Array, Array]], layer: tuple[Params, dict[str, Any]]) -> Any:
            (hidden, keys_values), (weights, own) = carry, layer
            if prefix is not None:
                cached = CachedLayer(prefix["k"], prefix["v"], own["layer"], jnp.int32(0), prefix["mask"])
                own = own | {"prefix": cached.slice(c.num_kv_heads)}
            return apply_layer(weights, hidden, own | {"cache": keys_values}), None

        (hidden, (keys, values)), _ = lax.scan(next_layer, (hidden, (cache["k"], cache["v"])), (params["layers"], own))
        cache |= {"k": keys, "v": values}
    else:
        # A scan would copy the weights and the cache of each layer, for every token.
        keys, values = [], []
        for i, weights in enumerate(params.get("each_layer") or _unstack(params["layers"], c.num_layers)):
            own_of_layer = jax.tree.map(lambda x, i=i: x[i], own) | {"cache": (cache["k"][i], cache["v"][i])}
            if prefix is not None:
                own_of_layer["prefix"] = prefix["k"][i], prefix["v"][i]
            hidden, (key, value) = apply_layer(weights, hidden, own_of_layer)  # [B, L, D]
            keys.append(key)
            values.append(value)
        cache |= {"k": tuple(keys), "v": tuple(values)}

    return rms_norm(hidden, params["final_norm"], c), cache


def _check_call(
    c: DecoderConfig,
    tokens: Array,
    positions: Array,
    mask: Array,
    cache: Cache | None,
    start: int | Array,
    prefix: Cache | None,
    slots: int | None,
    segments: Array | None,
    order: Array | None,
) -> None:
    """Refuses arguments of a call that do not fit together."""
    B, L = tokens.shape
    if not tokens.shape == positions.shape == mask.shape:
        raise ValueError(f"tokens {tokens.shape}, positions {positions.shape} and mask {mask.shape} differ in shape")
    if segments is None and c.max_length < L:
        raise ValueError(f"{L} tokens are more than the model's max_length={c.max_length}")
    if cache is not None:
        # XLA would move a write past the end back over older tokens. A traced start cannot be checked.
        end, fits = L + (start if isinstance(start, int) else 0), cache["mask"].shape
        if fits[0] < B or fits[1] < end:
            raise ValueError(f"{B} rows written up to slot {end} do not fit a cache of {fits} (rows, slots)")
        if slots is not None and not end <= slots <= fits[1]:
            raise ValueError(f"slots={slots} must lie between {end}, the end of what is written, and {fits[1]}")
    if cache is None and slots is not None:
        raise ValueError(f"slots={slots} are those of a cache, and there is none")
    if segments is not None and (cache is not None or segments.shape != tokens.shape):
        raise ValueError(f"segments {segments.shape} must be those of tokens {tokens.shape}, without a cache")
    if order is not None and (prefix is None or cache is None or L > 1 or not c.decode_kernel):
        raise ValueError("order is for one token per row, with a cache and a prefix, and with decode_kernel")
    if order is None and prefix is not None and B % prefix["mask"].shape[0]:
        raise ValueError(f"{B} rows are not a multiple of the {prefix['mask'].shape[0]} rows of the prefix")


def _unembed(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    if config.tied:
        embedding = params["embedding"]  # [V, D]
    elif "transposed_unembedding" in params:
        embedding = params["transposed_unembedding"]
    else:
        embedding = products.transposed(params["unembedding"])
    logits = products.unembed(hidden, embedding, jnp.dtype(config.dtype))  # [..., V]
    return logits if config.logit_softcap is None else soft_capped(logits, config.logit_softcap)


def _init_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    c = config
    if length > c.max_length:
        raise ValueError(f"a cache of {length} slots is longer than the model's max_length={c.max_length}")
    shape = batch, c.num_kv_heads, c.head_dim, length
    if c.decode_kernel:
        shape = batch, c.num_layers, c.num_kv_heads * c.head_dim, length
        cache: Cache = {name: jnp.zeros(shape, c.dtype) for name in ("k", "v")}
    else:
        cache = {name: tuple(jnp.zeros(shape, c.dtype) for _ in range(c.num_layers)) for name in ("k", "v")}
    cache["mask"] = jnp.zeros((batch, length), bool)
    return cache if c.window is None else cache | {"positions": jnp.zeros((batch, length), jnp.int32)}


def _prepare(config: DecoderConfig, params: Params, length: int) -> Params:
    """The parameters with what a decode of up to ``length`` positions would otherwise compute for every token."""
    dtype = jnp.dtype(config.dtype)
    prepared = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key.endswith(("norm", "bias")) else x.astype(dtype), params
    )
    # Optimization barriers keep XLA from computing these for every token after all.
    if not config.tied:  # a product with the other layout takes three times as long on a CPU
        prepared["transposed_unembedding"] = lax.optimization_barrier(prepared["unembedding"].T)  # [V, D]
    # Without this table, XLA would compute a sine for every layer and head of every token.
    cos, sin = _rotations(config, jnp.arange(length, dtype=jnp.int32)[None])  # [1, length, 1, H / 2], or several kinds
    prepared["rotations"] = lax.optimization_barrier((cos[..., 0, :, :, :], sin[..., 0, :, :, :]))  # without rows
    if not config.decode_kernel:
        prepared["each_layer"] = _unstack(prepared["layers"], config.num_layers)
    return prepared


def _cached(config: DecoderConfig, x: Array) -> Array | tuple[Array, ...]:
    """Keys or values [layers, B, K, H, S] as a cache has them."""
    layers, B, K, H, S = x.shape
    return jnp.moveaxis(x.reshape(layers, B, K * H, S), 0, 1) if config.decode_kernel else tuple(jnp.unstack(x))


def _by_layer(config: DecoderConfig, cached: Array | tuple[Array, ...]) -> Array:
    """What `_cached` returned, as it was."""
    if isinstance(cached, tuple):
        return jnp.stack(cached)
    B, layers, _, S = cached.shape
    return jnp.moveaxis(cached, 1, 0).reshape(layers, B, config.num_kv_heads, config.head_dim, S)


def _rows(table: tuple[Array, ...], positions: Array) -> tuple[Array, ...]:
    """The cos and sin of these positions, from those of all positions."""
    return tuple(jnp.take(x, positions, axis=-3, mode="clip") for x in table)


def _unstack(layers: Params, count: int) -> tuple[Params, ...]:
    """The parameters of each layer, of the stacked ones."""
    return tuple({name: x[i] for name, x in layers.items()} for i in range(count))


def _layer_data(config: DecoderConfig) -> dict[str, Any]:
    """What differs between the layers of a config, each [layers]: their windows, and which kind of rotation they have."""
    c = config
    layers = range(c.num_layers)
    differing: dict[str, list[int]] = {}
    if c.window is not None:
        differing["window"] = [min(c.window, NO_WINDOW) if i in c.local_layers else NO_WINDOW for i in layers]
    if c.local_rope_theta is not None or c.unrotated_layers:
        differing["rotation"] = [2 if i in c.unrotated_layers else 1 if i in c.local_layers else 0 for i in layers]
    return {name: jnp.array(values, jnp.int32) for name, values in differing.items()}


def _rotations(config: DecoderConfig, positions: Array) -> tuple[Array, ...]:
    """cos and sin [B, L, 1, H / 2], or, where layers differ, the kinds that ``_layer_data`` counts, [3, B, L, 1, H / 2]."""
    c = config
    everywhere = rotations(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    if c.local_rope_theta is None and not c.unrotated_layers:
        return everywhere
    local = everywhere if c.local_rope_theta is None else rotations(positions, c.head_dim, c.local_rope_theta)
    none = rotations(jnp.zeros_like(positions), c.head_dim, c.rope_theta)
    return tuple(jnp.stack(kinds) for kinds in zip(everywhere, local, none, strict=True))
