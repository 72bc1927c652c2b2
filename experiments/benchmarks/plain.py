"""The yardstick: GRPO as one would write it by hand in JAX, for one decoder, with what is known to matter and no more.

It shares nothing with grpo_jax but the names of the weights. What it does: each prompt is run once, and its cache copied to its
group; a jitted ``while_loop`` decodes into a cache of S + T slots, draws a token by inverting the cumulative distribution at
one uniform number per row, and halves its rows when half of them have ended; the update computes log-probabilities in chunks
that are recomputed in the backward pass, over whole rows, or over rows of S + T tokens into which ragged ones are packed.

A worker of `race`: reads requests from standard input, a line each, and answers with a line of JSON.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.benchmarks.worker import Prepared, serve

Params = dict[str, Any]
Cache = list[tuple[Array, Array]]  # keys [rows, K, H, slots] and values [rows, K, slots, H] of each layer
FEWEST_ROWS = 8  # below these a step costs about the same
BUCKET_ROWS, BUCKET_TOKENS = 4, 512
CHUNK = 512  # tokens whose logits exist at once
LEARNING_RATE, CLIP = 1e-6, 1.0


def load(request: dict[str, Any]) -> tuple[Params, dict[str, Array]]:
    """The weights, a dict for each layer, and the data of a case."""
    with np.load(f"{request['folder']}/weights.npz") as weights, np.load(f"{request['folder']}/data.npz") as data:
        stacked = {name.removeprefix("layers/"): weights[name] for name in weights if name.startswith("layers/")}
        layers = [{name: jnp.array(x[i]) for name, x in stacked.items()} for i in range(request["layers"])]
        params = {"embedding": jnp.array(weights["embedding"]), "final_norm": jnp.array(weights["final_norm"])}
        return params | {"layers": layers}, {name: jnp.array(data[name]) for name in data}


def norm(x: Array, scale: Array) -> Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rotate(x: Array, positions: Array) -> Array:
    """x [rows, L, heads, H] at positions [rows, L]."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin, a, b = jnp.cos(angles), jnp.sin(angles), x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def layer(w: Params, x: Array, positions: Array, head_dim: int, attend: Callable[..., Array]) -> Array:
    """One layer on x [rows·L, D], as one axis since XLA is slow at gradients of contractions over two.

    ``attend`` takes queries, keys and values [rows, L, heads, H] and returns [rows·L, N·H].
    """
    h = norm(x, w["attention_norm"])
    heads = lambda name: (h @ w[name] + w[f"{name}_bias"]).reshape(*positions.shape, -1, head_dim)  # noqa: E731
    query, key = rotate(heads("query"), positions), rotate(heads("key"), positions)
    x = x + attend(query, key, heads("value")) @ w["output"]
    h = norm(x, w["mlp_norm"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def attention(query: Array, key: Array, value: Array, visible: Array) -> Array:
    """query [rows, L, N, H] over keys [rows, K, H, slots] and values [rows, K, slots, H] -> [rows·L, N·H]."""
    rows, length, _, head_dim = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(rows, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4) * head_dim**-0.5
    scores = jnp.einsum("bkqh,bkhs->bkqs", query.reshape(rows, kv_heads, -1, head_dim), key)
    by_query = jnp.where(visible, scores.reshape(rows, kv_heads, -1, length, scores.shape[-1]), -1e30)
    weights = jnp.exp(by_query - lax.stop_gradient(by_query.max(-1, keepdims=True))).reshape(scores.shape)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, value) / weights.sum(-1, keepdims=True)
    return out.reshape(rows, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(rows * length, -1)


def whole(params: Params, tokens: Array, positions: Array, visible: Array, head_dim: int) -> tuple[Array, Cache]:
    """Hidden states [rows·L, D] of whole rows, and their keys and values; visible is [rows, 1, 1, L, L] or broadcasts."""
    x, cache = params["embedding"][tokens.reshape(-1)], []

    def attend(query: Array, key: Array, value: Array) -> Array:
        cache.append((key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)))
        return attention(query, *cache[-1], visible)

    for w in params["layers"]:
        x = layer(w, x, positions, head_dim, attend)
    return norm(x, params["final_norm"]), cache


def step(params: Params, token: Array, slot: Array, cache: Cache, head_dim: int) -> tuple[Array, Cache]:
    """Hidden states [rows, D] of one token of each row, written to and placed at ``slot``."""
    x, written = params["embedding"][token], []
    visible = jnp.arange(cache[0][0].shape[3]) <= slot
    positions = jnp.full((len(token), 1), slot)
    for w, (keys, values) in zip(params["layers"], cache, strict=True):

        def attend(query: Array, key: Array, value: Array, keys: Array = keys, values: Array = values) -> Array:
            keys = lax.dynamic_update_slice_in_dim(keys, key.transpose(0, 2, 3, 1), slot, 3)
            values = lax.dynamic_update_slice_in_dim(values, value.swapaxes(1, 2), slot, 2)
            written.append((keys, values))
            return attention(query, keys, values, visible)

        x = layer(w, x, positions, head_dim, attend)
    return norm(x, params["final_norm"]), written


def draw(unembedding: Array, hidden: Array, key: Array) -> tuple[Array, Array]:
    """A token of each row [rows, D], and its log-probability."""
    logits = hidden @ unembedding
    highest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    rows, vocabulary = weights.shape
    # In two levels: blocks of about √V, then the tokens of one block.
    width = 1 << (math.isqrt(vocabulary).bit_length() - 1)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocabulary % width))).reshape(rows, -1, width)
    ends = jnp.cumsum(blocks.sum(-1), -1)
    total = ends[:, -1]
    threshold = jax.random.uniform(key, (rows,)) * total * (1 - 1e-6)
    block = (ends <= threshold[:, None]).sum(-1)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    token = block * width + (jnp.cumsum(inside, -1) <= (threshold - before)[:, None]).sum(-1)
    token = jnp.minimum(token, vocabulary - 1)
    logit = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return token, logit - highest[:, 0] - jnp.log(total)


@partial(jax.jit, static_argnames=("group", "length", "head_dim", "eos", "compact"))
def sample(
    params: Params, prompts: Array, key: Array, *, group: int, length: int, head_dim: int, eos: int, compact: bool
) -> tuple[Array, Array, Array]:
    """Completions, mask and log-probabilities [P·G, T]."""
    start = prompts.shape[1]
    causal = jnp.tril(jnp.ones((start, start), bool))
    positions = jnp.broadcast_to(jnp.arange(start), prompts.shape)
    hidden, cache = whole(params, prompts, positions, causal, head_dim)
    room = ((0, 0), (0, 0), (0, 0), (0, length))
    grow = lambda x, axes: jnp.pad(jnp.repeat(x, group, 0), [room[a] for a in axes])  # noqa: E731
    cache = [(grow(keys, (0, 1, 2, 3)), grow(values, (0, 1, 3, 2))) for keys, values in cache]
    unembedding = lax.optimization_barrier(params["embedding"].T)  # written down once, and not at every token
    rows = len(prompts) * group
    token, logp = draw(unembedding, jnp.repeat(hidden[start - 1 :: start], group, 0), jax.random.fold_in(key, 0))
    final = (jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), bool), jnp.zeros((rows, length)))
    here = final[0].at[:, 0].set(token), final[1].at[:, 0].set(True), final[2].at[:, 0].set(logp)
    at, done, origin = jnp.int32(1), token == eos, jnp.arange(rows)

    def advance(carry: tuple) -> tuple:
        at, token, done, cache, (tokens, mask, logps) = carry
        hidden, cache = step(params, token, start + at - 1, cache, head_dim)
        drawn, logp = draw(unembedding, hidden, jax.random.fold_in(key, at))
        drawn = jnp.where(done, 0, drawn)
        put = lambda x, new: lax.dynamic_update_slice_in_dim(x, new[:, None], at, 1)  # noqa: E731
        outputs = put(tokens, drawn), put(mask, ~done), put(logps, jnp.where(done, 0.0, logp))
        return at + 1, drawn, done | (drawn == eos), cache, outputs

    while True:
        half = len(origin) // 2 if compact and len(origin) > FEWEST_ROWS else 0
        more = lambda carry, half=half: (carry[0] < length) & ((~carry[2]).sum() > half)  # noqa: E731
        at, token, done, cache, here = lax.while_loop(more, advance, (at, token, done, cache, here))
        final = jax.tree.map(lambda x, y, rows: x.at[rows].set(y), final, here, (origin,) * 3)
        if half == 0:
            return final
        keep = partial(jnp.take, indices=jnp.argsort(done)[:half], axis=0)
        token, done, origin, cache, here = jax.tree.map(keep, (token, done, origin, cache, here))


def token_logps(params: Params, hidden: Array, targets: Array) -> Array:
    """Log-probabilities of targets [n] after hidden states [n, D], in chunks that the backward pass computes again."""

    @jax.checkpoint
    def score(x: tuple[Array, Array]) -> Array:
        logits = x[0] @ params["embedding"].T
        return jnp.take_along_axis(logits, x[1][:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)

    chunk = min(CHUNK, len(targets))
    return lax.map(score, (hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk))).reshape(-1)


def init(params: Params) -> tuple[Params, Params, Params, Array]:
    """Parameters, the two moments of AdamW, and the number of steps."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return jax.tree.map(jnp.copy, params), zeros(params), zeros(params), jnp.int32(0)


@partial(jax.jit, donate_argnums=0, static_argnames="head_dim")
def learn(state: tuple, batch: dict[str, Array], *, head_dim: int) -> tuple[tuple, Array]:
    """A step of AdamW on −Σ A·ratio / number of tokens, after clipping by the norm of the gradient; and this norm.

    batch: tokens, positions and segments [rows, L] (segment 0 is padding), and of the tokens to learn from, padded: from which
    place in the rows each is predicted (``source``), itself (``target``), and its ``advantage`` and ``weight``.
    """
    params, mean, square, count = state

    def loss(params: Params) -> Array:
        length, segments = batch["tokens"].shape[1], batch["segments"]
        visible = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
        hidden, _ = whole(params, batch["tokens"], batch["positions"], visible[:, None, None], head_dim)
        logps = token_logps(params, hidden[batch["source"]], batch["target"])
        ratio = jnp.exp(logps - lax.stop_gradient(logps))  # on-policy: the old policy is this one
        gain = jnp.minimum(ratio * batch["advantage"], jnp.clip(ratio, 0.8, 1.28) * batch["advantage"])
        return -(gain * batch["weight"]).sum() / batch["weight"].sum()

    gradient = jax.grad(loss)(params)
    size = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradient)))
    scale = jnp.minimum(1.0, CLIP / size)
    count = count + 1
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * scale * g, mean, gradient)
    square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * (scale * g) ** 2, square, gradient)
    move = lambda p, m, s: p - LEARNING_RATE * (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.999**count)) + 1e-8)  # noqa: E731
    return (jax.tree.map(move, params, mean, square), mean, square, count), size


def pack(
    prompts: np.ndarray, completions: np.ndarray, mask: np.ndarray, advantages: np.ndarray, *, packed: bool
) -> dict[str, np.ndarray]:
    """The batch of `learn`: rows of prompt and completion as they are, or packed into rows of the same length, first fit."""
    start, width = prompts.shape[1], prompts.shape[1] + completions.shape[1]
    lengths = start + mask.sum(1)
    rows: list[list[int]] = []
    if packed:
        room: list[int] = []
        for i in np.argsort(-lengths, kind="stable"):
            fits = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
            if fits == len(rows):
                rows.append([])
                room.append(width)
            rows[fits].append(i)
            room[fits] -= lengths[i]
    else:
        rows = [[i] for i in range(len(completions))]
    count = -(-len(rows) // BUCKET_ROWS) * BUCKET_ROWS if packed else len(rows)
    tokens, positions, segments = (np.zeros((count, width), np.int32) for _ in range(3))
    sources: list[np.ndarray] = []
    for r, members in enumerate(rows):
        at = 0
        for segment, i in enumerate(members, 1):
            end = at + lengths[i] if packed else at + width
            text = np.concatenate([prompts[i // (len(completions) // len(prompts))], completions[i]])
            tokens[r, at:end], positions[r, at:end] = text[: end - at], np.arange(end - at)
            segments[r, at:end] = segment
            sources.append(np.stack([r * width + at + start + np.flatnonzero(mask[i]), np.full(mask[i].sum(), i)]))
            at = end
    target, owner = np.concatenate(sources, 1)
    total = len(mask) * mask.shape[1] if not packed else -(-len(target) // BUCKET_TOKENS) * BUCKET_TOKENS
    fill = lambda x: np.pad(x, (0, total - len(x)))  # noqa: E731
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "source": fill(target - 1),
        "target": fill(tokens.reshape(-1)[target]),
        "advantage": fill(advantages[owner].astype(np.float32)),
        "weight": fill(np.ones(len(target), np.float32)),
    }


def normalise(rewards: np.ndarray) -> np.ndarray:
    """Advantages [B] of rewards [P, G]."""
    centred = rewards - rewards.mean(1, keepdims=True)
    return (centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def prepare(request: dict[str, Any]) -> Prepared:
    """What the worker answers first, and its repetition."""
    params, data = load(request)
    head_dim, group, ragged = request["head_dim"], request["group"], request["ragged"]
    prompts, rewards = data["prompts"], np.array(data["rewards"])
    options = {"group": group, "length": request["completion"], "head_dim": head_dim, "eos": request["eos"]}
    causal = jnp.tril(jnp.ones((prompts.shape[1],) * 2, bool))
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    hidden, _ = whole(params, prompts, positions, causal, head_dim)
    logits = hidden[prompts.shape[1] - 1] @ params["embedding"].T
    ready = {"versions": {"jax": jax.__version__}, "check": [*logits[2:6].tolist(), float(jnp.linalg.norm(logits[2:]))]}
    state = [init(params)] if request["work"] != "sampling" else []
    compiled, count = [0], itertools.count()

    def rollout(params: Params) -> tuple[np.ndarray, np.ndarray]:
        key = jax.random.key(next(count))
        return jax.device_get(sample(params, prompts, key, **options, compact=ragged)[:2])

    def improve(completions: np.ndarray, mask: np.ndarray, rewards: np.ndarray) -> float:
        batch = pack(np.array(prompts), completions, mask, normalise(rewards), packed=ragged)
        state[0], size = learn(state[0], batch, head_dim=head_dim)
        return float(size)

    def repeat() -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if request["work"] == "sampling":
            _, mask = rollout(params)
        elif request["work"] == "update":
            mask = np.array(data["mask"])
            answer["check"] = [improve(np.array(data["completions"]), mask, rewards)]
        else:
            completions, mask = rollout(state[0][0])
            improve(completions, mask, (completions.sum(1) % 2).astype(np.float32).reshape(rewards.shape))
        programs: list[Any] = [sample, learn]
        before, compiled[0] = compiled[0], sum(program._cache_size() for program in programs)
        return answer | {"tokens": int(mask.sum()), "compiled": compiled[0] > before}

    return ready, repeat


if __name__ == "__main__":
    serve(prepare)
