"""The decoder against a plain NumPy float64 one written here; its cache, prefix and padding against its full forward."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import DecoderConfig, init_params, load_pretrained, make_policy
from grpo_jax.models.attention import RopeScaling
from grpo_jax.models.decoder import param_shapes
from tests.programs import products_of

CONFIG = DecoderConfig(37, 3, 24, num_heads=6, num_kv_heads=2, head_dim=8, d_ff=40, max_length=64, rope_theta=500.0)
EVERYTHING = replace(
    CONFIG,
    rope_scaling=RopeScaling(4.0, low=1.0, high=4.0, length=32),
    window=3,
    local_layers=(0, 2),
    local_rope_theta=20.0,
    unrotated_layers=(1,),
    attention_bias=True,
    qk_norm=True,
    offset_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    scale_embedding=True,
    score_width=5,
    attention_softcap=1.5,
    logit_softcap=2.0,
)
VARIANTS = {
    "grouped": CONFIG,
    "untied": replace(CONFIG, tied=False),
    "one key head": replace(CONFIG, num_kv_heads=1),
    "as many key heads": replace(CONFIG, num_kv_heads=6, norm_epsilon=0.1),
    "everything": EVERYTHING,
    "scaled, all rotated": replace(EVERYTHING, unrotated_layers=(), local_rope_theta=None, attention_softcap=None),
    "linear scaling": replace(CONFIG, rope_scaling=RopeScaling(4.0), unrotated_layers=(0,)),
    "window": replace(CONFIG, window=4, local_layers=(0, 1, 2)),
}
MODELS = {"plain": CONFIG, "everything": EVERYTHING, "one cache": replace(EVERYTHING, decode_kernel=True)}
both = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def random_params(config, seed=0):
    """Norms and biases too, so that leaving one out is seen."""
    params = init_params(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def noise(path, x):
        factor = jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
        return x + factor - 1 if path[-1].key.endswith(("norm", "bias")) else x * factor

    return jax.tree_util.tree_map_with_path(noise, params)


def random_tokens(config, rows, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))
    return jnp.asarray(tokens, jnp.int32), jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))


def numpy_logits(config, params, tokens):
    """One sequence, token by token and head by head, in float64 with explicit loops and complex rotations."""
    c, p, width = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params), config.head_dim

    def norm(x, scale):
        return x / np.sqrt(np.sum(x * x) / len(x) + c.norm_epsilon) * (scale + 1 if c.offset_norm else scale)

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def frequency(n, pair):
        local = n in c.local_layers and c.local_rope_theta is not None
        plain = (c.local_rope_theta if local else c.rope_theta) ** (-2.0 * pair / width)
        if n in c.unrotated_layers:
            return 0.0
        if c.rope_scaling is None or local:
            return plain
        factor, low, high, length = c.rope_scaling
        if low is None:
            return plain / factor
        turns = length * plain / (2 * np.pi)
        if turns > high or turns < low:
            return plain if turns > high else plain / factor
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain

    def turn(x, position, n):
        half = width // 2
        pairs = x[:half] + 1j * x[half:]
        pairs = pairs * np.exp(1j * position * np.array([frequency(n, pair) for pair in range(half)]))
        return np.concatenate([pairs.real, pairs.imag])

    def activation(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    stream = [p["embedding"][t] * (np.sqrt(c.d_model) if c.scale_embedding else 1.0) for t in tokens]
    for n in range(c.num_layers):
        w = {name: value[n] for name, value in p["layers"].items()}

        def heads(name, x, w=w):
            x = (x @ w[name] + w.get(f"{name}_bias", 0.0)).reshape(-1, width)
            return [norm(h, w[f"{name}_norm"]) for h in x] if f"{name}_norm" in w else x

        normed = [norm(x, w["attention_norm"]) for x in stream]
        keys = [[turn(h, i, n) for h in heads("key", x)] for i, x in enumerate(normed)]
        values = [heads("value", x) for x in normed]
        for i, x in enumerate(normed):
            out = []
            seen = range(max(0, i + 1 - c.window) if n in c.local_layers else 0, i + 1)
            for head, q in enumerate(heads("query", x)):
                kv = head * c.num_kv_heads // c.num_heads
                scores = np.array([turn(q, i, n) @ keys[j][kv] / np.sqrt(c.score_width or width) for j in seen])
                weights = np.exp(cap(scores, c.attention_softcap))
                out.append(sum(weight * values[j][kv] for weight, j in zip(weights / weights.sum(), seen, strict=True)))
            new = np.concatenate(out) @ w["output"]
            stream[i] = stream[i] + (norm(new, w["attention_post_norm"]) if c.post_norms else new)
        for i, x in enumerate(stream):
            y = norm(x, w["mlp_norm"])
            new = (activation(y @ w["gate"]) * (y @ w["up"])) @ w["down"]
            stream[i] = x + (norm(new, w["mlp_post_norm"]) if c.post_norms else new)
    unembedding = p["embedding"].T if c.tied else p["unembedding"]
    return np.stack([cap(norm(x, p["final_norm"]) @ unembedding, c.logit_softcap) for x in stream])


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_numpy_decoder(name):
    config = VARIANTS[name]
    policy, params = make_policy(config), random_params(config)
    tokens, positions = random_tokens(config, 2, 9)
    hidden, cache = jax.jit(policy.forward)(params, tokens, positions, jnp.ones_like(tokens, bool))
    logits = policy.unembed(params, hidden)
    assert cache is None and logits.dtype == jnp.float32
    for row in range(2):
        np.testing.assert_allclose(logits[row], numpy_logits(config, params, tokens[row]), atol=3e-5, rtol=3e-5)


@both
@pytest.mark.parametrize(("chunks", "traced"), [([7], False), ([4, 1, 2], False), ([3, 4], True), ([1] * 7, True)])
def test_cached_chunks_equal_the_full_forward(chunks, traced, config):
    policy, params = make_policy(config), random_params(config)
    tokens, positions = random_tokens(config, 3, 7)
    mask = jnp.array([[True] * 7, [False] * 2 + [True] * 5, [True, True, False, True, True, True, True]])
    expected, _ = jax.jit(policy.forward)(params, tokens, positions, mask)
    forward = jax.jit(policy.forward, static_argnums=() if traced else 5)
    cache, start, pieces = policy.init_cache(3, 12), 0, []
    for length in chunks:
        now = slice(start, start + length)
        at = jnp.int32(start) if traced else start
        piece, cache = forward(params, tokens[:, now], positions[:, now], mask[:, now], cache, at)
        pieces.append(piece)
        start += length
    np.testing.assert_allclose(jnp.concatenate(pieces, 1)[mask], expected[mask], atol=2e-5)
    np.testing.assert_array_equal(cache["mask"], np.pad(mask, ((0, 0), (0, 5))))


@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["at once", "token by token"])
def test_a_shared_prefix_equals_the_joined_sequences(side, how, config):
    """Three prompts of different lengths, two completions each: what each row gets alone, unpadded, in NumPy."""
    policy, params = make_policy(config), random_params(config)
    group, width, length, lengths = 2, 5, 4, [5, 2, 3]
    prompts, _ = random_tokens(config, 3, width, seed=1)
    completions, steps = random_tokens(config, 3 * group, length, seed=2)
    real = np.arange(width)[None] < np.array(lengths)[:, None]
    mask = jnp.asarray(real if side == "right" else real[:, ::-1])
    positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), 1) - 1, 0)
    forward = jax.jit(policy.forward)
    _, prefix = forward(params, prompts, positions, mask, policy.init_cache(3, width))
    positions, every = steps + jnp.repeat(jnp.array(lengths), group)[:, None], jnp.ones_like(completions, bool)
    if how == "at once":
        hidden, _ = forward(params, completions, positions, every, prefix=prefix)
    else:
        cache, pieces = policy.init_cache(3 * group, length), []
        for i in range(length):
            now = slice(i, i + 1)
            piece, cache = forward(
                params, completions[:, now], positions[:, now], every[:, now], cache, jnp.int32(i), prefix
            )
            pieces.append(piece)
        hidden = jnp.concatenate(pieces, 1)
    logits = policy.unembed(params, hidden)
    for row in range(3 * group):
        joined = np.concatenate([prompts[row // group][mask[row // group]], completions[row]])
        np.testing.assert_allclose(logits[row], numpy_logits(config, params, joined)[-length:], atol=5e-5, rtol=5e-5)


def test_windows_count_positions_not_slots():
    """Two real tokens with padding between them: three slots apart, one position apart, and the window is 2."""
    config = replace(CONFIG, window=2, local_layers=(0, 1, 2))
    policy, params = make_policy(config), random_params(config)
    tokens, mask = jnp.array([[5, 9, 9, 6]]), jnp.array([[True, False, False, True]])
    apart, _ = policy.forward(params, tokens, jnp.array([[0, 0, 0, 1]]), mask)
    logits = policy.unembed(params, apart[:, 3])[0]
    np.testing.assert_allclose(logits, numpy_logits(config, params, [5, 6])[1], atol=3e-5)
    far, _ = policy.forward(params, tokens, jnp.array([[0, 0, 0, 2]]), mask)
    alone, _ = policy.forward(params, tokens[:, 3:], jnp.array([[2]]), mask[:, 3:])
    np.testing.assert_allclose(far[:, 3], alone[:, 0], atol=1e-5)


def test_a_prefix_is_not_repeated_for_its_group():
    """The compiled step never holds an array as large as the prefix's keys repeated over the group."""
    config = replace(CONFIG, num_heads=2, head_dim=64)
    policy, params = make_policy(config), random_params(config)
    prompts, group, slots = 2, 16, 64
    prefix = policy.init_cache(prompts, slots)
    tokens, positions = random_tokens(config, prompts * group, 1)

    def step(params, prefix):
        return policy.forward(params, tokens, positions, tokens >= 0, prefix=prefix)[0]

    memory = jax.jit(step).lower(params, prefix).compile().memory_analysis()
    repeated = 2 * prefix["k"][0].nbytes * group  # keys and values of one layer
    assert memory.temp_size_in_bytes < repeated / 2, (memory.temp_size_in_bytes, repeated)


@both
def test_padding_side_and_padded_content_do_not_matter(config):
    policy, params = make_policy(config), random_params(config)
    forward = jax.jit(policy.forward)
    tokens, positions = random_tokens(config, 2, 6)
    real = jnp.ones_like(tokens, bool)
    alone, _ = forward(params, tokens, positions, real)
    for left, right in ((3, 0), (0, 3), (2, 1)):
        pad = ((0, 0), (left, right))
        mask = jnp.pad(real, pad)
        outputs = []
        for junk in (0, 36, -1, 2**31 - 1, -(2**31)):
            padded = jnp.where(mask, jnp.pad(tokens, pad), junk)
            where = jnp.where(mask, jnp.pad(positions, pad), jnp.int32(junk % 1000))
            outputs.append(forward(params, padded, where, mask)[0])
        for output in outputs:
            assert bool(jnp.isfinite(output).all()), "a token that sees nothing must be finite"
            np.testing.assert_array_equal(output[:, left : left + 6], outputs[0][:, left : left + 6])
        np.testing.assert_allclose(outputs[0][:, left : left + 6], alone, atol=2e-5)


@both
def test_gradients_through_rows_without_tokens_are_finite_and_right(config):
    policy, params = make_policy(config), random_params(config)
    tokens, positions = random_tokens(config, 2, 5)
    mask = jnp.array([[False, False, True, True, True], [False] * 5])

    def loss(params):
        hidden, _ = policy.forward(params, tokens, positions, mask)
        return jnp.where(mask[:, :, None], jnp.tanh(policy.unembed(params, hidden)), 0.0).sum()

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    ends = [loss(jax.tree.map(lambda x, d, s=s: x + s * 2e-3 * d, params, direction)) for s in (1, -1)]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    np.testing.assert_allclose((ends[0] - ends[1]) / 4e-3, slope, rtol=2e-2)


@both
def test_gradients_flow_through_a_prefix_as_through_the_joined_sequence(config):
    policy, params = make_policy(config), random_params(config)
    tokens, positions = random_tokens(config, 2, 8)
    mask = jnp.ones_like(tokens, bool)

    def joined(params):
        return jnp.sin(policy.forward(params, tokens, positions, mask)[0][:, 5:]).sum()

    def split(params):
        first, rest = slice(0, 5), slice(5, 8)
        _, prefix = policy.forward(
            params, tokens[:, first], positions[:, first], mask[:, first], policy.init_cache(2, 5)
        )
        hidden, _ = policy.forward(params, tokens[:, rest], positions[:, rest], mask[:, rest], prefix=prefix)
        return jnp.sin(hidden).sum()

    gradients = [jax.jit(jax.grad(f))(params) for f in (joined, split)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), *gradients)


@both
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_value_and_recomputes(config, remat):
    policies = make_policy(config), make_policy(replace(config, remat=remat))
    params = random_params(config)
    tokens, positions = random_tokens(config, 2, 6)

    def loss(policy):
        return lambda params: jnp.sin(policy.forward(params, tokens, positions, tokens >= 0)[0]).sum()

    values = [jax.jit(jax.value_and_grad(loss(policy)))(params) for policy in policies]
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), values[0][1], values[1][1])
    name = {"silu": "logistic", "gelu_tanh": "tanh"}[config.activation]
    programs = [str(jax.make_jaxpr(jax.grad(loss(policy)))(params)) for policy in policies]
    activations, products = ([program.count(x) for program in programs] for x in (name, "dot_general"))
    assert activations[1] > activations[0], "the backward pass of remat must compute the activation again"
    scores_and_values = 2
    again = products[1] - products[0]
    assert again == scores_and_values if remat == "dots" else again > scores_and_values


def test_bfloat16_stays_near_float32_and_keeps_float32_logits():
    config = replace(CONFIG, d_model=64, d_ff=128)
    params = random_params(config)
    tokens, positions = random_tokens(config, 4, 16)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(replace(config, dtype=dtype))
        hidden, _ = jax.jit(policy.forward)(params, tokens, positions, tokens >= 0)
        assert hidden.dtype == dtype and policy.init_cache(1, 1)["k"][0].dtype == dtype
        logits[dtype] = policy.unembed(params, hidden)
    assert logits["bfloat16"].dtype == jnp.float32
    error = jnp.abs(logits["bfloat16"] - logits["float32"])
    # A bfloat16 has 8 bits: each of the ~7 roundings along the 3 layers adds up to 2^-9, relative; logits have scale 1.
    assert 1e-4 < float(error.mean()) < 0.02 and float(error.max()) < 0.15, (error.mean(), error.max())
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    again, _ = jax.jit(policy.forward)(cast, tokens, positions, tokens >= 0)
    # Only the norm scales differ, by 2^-9; later roundings amplify it no further than the bound above.
    error = jnp.abs(again.astype(jnp.float32) - hidden.astype(jnp.float32))
    assert float(error.mean()) < 0.02 and float(error.max()) < 0.15, (error.mean(), error.max())


def test_initial_weights_have_their_scales_and_depend_on_the_key():
    config = DecoderConfig(512, 4, 64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=256, max_length=64, tied=False)
    params = init_params(config, jax.random.key(0))
    layers = params["layers"]
    scales = {"query": 64, "key": 64, "value": 64, "gate": 64, "up": 64, "output": 64 * 8, "down": 256 * 8}
    for name, inverse in scales.items():
        np.testing.assert_allclose(jnp.std(layers[name]), inverse**-0.5, rtol=0.03)
    for name in ("embedding", "unembedding"):
        np.testing.assert_allclose(jnp.std(params[name]), 64**-0.5, rtol=0.03)
    np.testing.assert_array_equal(layers["mlp_norm"], 1.0)
    more = init_params(replace(config, attention_bias=True, qk_norm=True), jax.random.key(0))["layers"]
    np.testing.assert_array_equal(more["key_bias"], np.zeros((4, 32)))
    np.testing.assert_array_equal(more["query_norm"], np.ones((4, 16)))
    offset = init_params(EVERYTHING, jax.random.key(0))
    for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm", "query_norm", "key_norm"):
        np.testing.assert_array_equal(offset["layers"][name], 0.0)
    np.testing.assert_array_equal(offset["final_norm"], 0.0)
    correlation = np.corrcoef(layers["gate"].ravel(), layers["up"].ravel())[0, 1]
    assert abs(correlation) < 0.02, "two matrices share their draws"
    other = init_params(config, jax.random.key(1))
    assert not np.array_equal(other["embedding"], params["embedding"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), param_shapes(config)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 is not a positive integer"),
        ({"num_layers": 2.0}, "num_layers=2.0 is not a positive integer"),
        ({"d_ff": True}, "d_ff=True is not a positive integer"),
        ({"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rope_theta": float("nan")}, "rope_theta=nan is not a positive number"),
        ({"norm_epsilon": -1.0}, "norm_epsilon=-1.0 is not a positive number"),
        ({"tied": "false"}, "tied='false' is not True or False"),
        ({"dtype": "int8"}, "dtype='int8' is not float32 or bfloat16"),
        ({"rope_theta": 10**400}, "rope_theta=1000.* is not a positive number"),
        ({"window": 4}, r"window=4 with local_layers=\(\); neither is without the other"),
        ({"local_layers": (0,)}, r"window=None with local_layers=\(0,\)"),
        ({"window": 0, "local_layers": (0,)}, "window=0 is not a positive integer or None"),
        ({"window": 4, "local_layers": [0]}, r"local_layers=\[0\] is not a tuple of layers, ascending"),
        ({"window": 4, "local_layers": (1, 1)}, "local_layers=.* is not a tuple of layers, ascending"),
        ({"unrotated_layers": (3,)}, r"unrotated_layers=\(3,\) is not a tuple of layers"),
        ({"local_rope_theta": 9.0}, "local_rope_theta=9.0 without local_layers"),
        ({"rope_scaling": (8.0, None, None, None)}, "rope_scaling=.* is not a RopeScaling that can be"),
        ({"rope_scaling": RopeScaling(8.0, low=1.0)}, "rope_scaling=.* is not a RopeScaling that can be"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 1.0, 64)}, "rope_scaling=.* is not a RopeScaling that can be"),
        ({"qk_norm": 1}, "qk_norm=1 is not True or False"),
        ({"activation": "relu"}, "activation='relu' is not silu or gelu_tanh"),
        ({"score_width": 2.5}, "score_width=2.5 is not a positive integer or None"),
        ({"logit_softcap": 0}, "logit_softcap=0 is not a positive number or None"),
        ({"family": None}, "family=None is not a name"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_calls_that_do_not_fit_are_refused():
    policy, params = make_policy(CONFIG), random_params(CONFIG)
    tokens, positions = random_tokens(CONFIG, 3, 4)
    mask, cache = tokens >= 0, policy.init_cache(3, 6)
    with pytest.raises(ValueError, match="up to slot 7 do not fit a cache"):
        policy.forward(params, tokens, positions, mask, cache, 3)
    with pytest.raises(ValueError, match="3 rows are not a multiple of the 2 rows of the prefix"):
        policy.forward(params, tokens, positions, mask, prefix=policy.init_cache(2, 6))
    with pytest.raises(ValueError, match="differ in shape"):
        policy.forward(params, tokens, positions[:, :3], mask)
    with pytest.raises(ValueError, match="max_length=64"):
        policy.init_cache(1, 65)
    with pytest.raises(ValueError, match="max_length=64"):
        policy.forward(params, *(jnp.zeros((1, 65), jnp.int32),) * 2, jnp.ones((1, 65), bool))


@both
def test_prepared_parameters_give_the_same(config):
    """A prefix, two tokens after it into a cache, and their logits; and matrices are cast once."""
    policy, params = make_policy(config), random_params(config)
    tokens, positions = random_tokens(config, 2, 6)
    mask = jnp.ones_like(tokens, bool)

    def run(params):
        _, prefix = policy.forward(params, *(x[:, :4] for x in (tokens, positions, mask)), policy.init_cache(2, 4))
        cache, states = policy.init_cache(2, 40), []
        for i in (4, 5):
            now = (x[:, i : i + 1] for x in (tokens, positions, mask))
            hidden, cache = policy.forward(params, *now, cache, i - 4, prefix)
            states.append(hidden)
        return policy.unembed(params, jnp.concatenate(states, 1))

    plain, prepared = jax.jit(run)(params), jax.jit(lambda params: run(policy.prepare(params, 40)))(params)
    np.testing.assert_allclose(prepared, plain, atol=1e-5)
    whole = policy.unembed(params, policy.forward(params, tokens, positions, mask)[0])
    np.testing.assert_allclose(prepared, whole[:, 4:], atol=3e-5)
    half = make_policy(replace(config, dtype="bfloat16")).prepare(params, 40)
    rest = {name: x for name, x in half.items() if name != "rotations"}
    float32 = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(rest) if x.dtype == jnp.float32}
    assert float32 and all(name.endswith(("norm", "bias")) for name in float32)


@both
def test_fewer_rows_and_slots_of_a_cache_are_those_of_a_smaller_one(config):
    """Two chunks written; then one token more in the first rows alone, reading some of the slots: the others stay."""
    policy, params = make_policy(config), random_params(config)
    tokens, positions = random_tokens(config, 5, 7)
    mask = jnp.array([[True] * 7, [False] * 2 + [True] * 5, [True] * 3 + [False] + [True] * 3, [True] * 7, [True] * 7])
    forward = jax.jit(policy.forward, static_argnames="slots")
    expected, _ = forward(params, tokens, positions, mask)
    cache = policy.init_cache(5, 12)
    _, cache = forward(params, tokens[:, :4], positions[:, :4], mask[:, :4], cache, jnp.int32(0), slots=4)
    before = cache
    for i in (4, 5, 6):
        now = (slice(3), slice(i, i + 1))
        hidden, cache = forward(params, *(x[now] for x in (tokens, positions, mask)), cache, jnp.int32(i), slots=8)
        np.testing.assert_allclose(hidden[:, 0], expected[:3, i], atol=2e-5)
    empty = {name: lambda x: x[..., 7:] for name in ("k", "v")}
    for name, leaves in cache.items():
        for leaf, old in zip(jax.tree.leaves(leaves), jax.tree.leaves(before[name]), strict=True):
            np.testing.assert_array_equal(leaf[3:], old[3:], err_msg=name)
            assert not empty.get(name, lambda x: x[:, 7:])(leaf).any(), name
    # Slots beyond those read do not exist for the call, whatever stands there.
    loud = cache | {
        "mask": cache["mask"].at[:, 8:].set(True),
        "v": jax.tree.map(lambda x: x.at[..., 8:].set(jnp.nan), cache["v"]),
    }
    last = (slice(3), slice(6, 7))
    hidden, _ = forward(params, *(x[last] for x in (tokens, positions, mask)), loud, jnp.int32(6), slots=8)
    np.testing.assert_allclose(hidden[:, 0], expected[:3, 6], atol=2e-5)


@both
def test_segments_of_a_row_are_rows_of_their_own(config):
    """Completions of two prompts, packed behind each other and beside padding: each as alone behind its prompt."""
    policy, params = make_policy(config), random_params(config)
    forward = jax.jit(policy.forward)
    prompts, places = random_tokens(config, 2, 4, seed=1)
    real = jnp.array([[True] * 4, [False, True, True, True]])
    starts = real.sum(1).astype(jnp.int32)
    at = jnp.maximum(jnp.cumsum(real.astype(jnp.int32), 1) - 1, 0)
    _, prefix = forward(params, prompts, at, real, policy.init_cache(2, 4))
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1, 2], [3, 1, 1, 7, 7, 7, 7, 7]])
    inside = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 0, 1, 2, 3, 4]])
    mask = jnp.array([[True] * 7 + [False], [True] * 6 + [False] * 2])
    tokens, _ = random_tokens(config, 2, 8, seed=2)
    positions = starts[:, None] + inside
    hidden, cache = forward(params, tokens, positions, mask, prefix=prefix, segments=segments)
    assert cache is None and bool(jnp.isfinite(hidden).all())
    for row in range(2):
        own = jax.tree.map(lambda x, row=row: x[row : row + 1], prefix)
        for segment in set(segments[row].tolist()):
            (places,) = np.nonzero(np.asarray((segments[row] == segment) & mask[row]))
            if len(places):
                piece = (x[row, places][None] for x in (tokens, positions, mask))
                alone, _ = forward(params, *piece, prefix=own)
                np.testing.assert_allclose(hidden[row, places], alone[0], atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 3}, "slots=3 must lie between 4, the end of what is written, and 6"),
        ({"slots": 7}, "slots=7 must lie between 4"),
        ({"slots": 5, "cache": None}, "slots=5 are those of a cache"),
        ({"segments": jnp.zeros((3, 4), jnp.int32)}, "segments .* without a cache"),
        (
            {"segments": jnp.zeros((3, 5), jnp.int32), "cache": None},
            r"segments \(3, 5\) must be those of tokens \(3, 4\)",
        ),
    ],
)
def test_slots_and_segments_that_do_not_fit_are_refused(options, message):
    policy, params = make_policy(CONFIG), random_params(CONFIG)
    tokens, positions = random_tokens(CONFIG, 3, 4)
    with pytest.raises(ValueError, match=message):
        policy.forward(params, tokens, positions, tokens >= 0, **({"cache": policy.init_cache(3, 6)} | options))


def test_a_real_model_tells_its_story(shared):
    """stories260k, greedy from BOS, decoded with a cache in one compiled loop."""
    from grpo_jax.data.tokenizers import HFTokenizer

    folder = shared / "models" / "stories260k"
    policy, params = load_pretrained(folder)
    steps = 60

    def step(carry, i):
        token, cache = carry
        hidden, cache = policy.forward(params, token, jnp.full((1, 1), i), jnp.ones((1, 1), bool), cache, i)
        token = policy.unembed(params, hidden).argmax(-1).astype(jnp.int32)
        return (token, cache), token[0, 0]

    start = (jnp.ones((1, 1), jnp.int32), policy.init_cache(1, steps))
    _, tokens = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32)))()
    text = HFTokenizer(folder).decode(tokens)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    ), text


@pytest.mark.parametrize("config", [CONFIG, replace(EVERYTHING, tied=False, remat="full")], ids=["plain", "everything"])
def test_bfloat16_is_what_is_multiplied_for_gradients_too(config):
    """A float32 slope times a bfloat16 weight would be a float32 product, at half the speed of an accelerator or less."""
    policy = make_policy(replace(config, dtype="bfloat16"))
    params, (tokens, positions) = random_params(config), random_tokens(config, 4, 6)
    mask = jnp.ones(tokens.shape, bool)
    _, prefix = policy.forward(params, tokens[:2], positions[:2], mask[:2], cache=policy.init_cache(2, 6), start=0)

    def loss(params, prefix):
        hidden, _ = policy.forward(params, tokens, positions + 6, mask, prefix=prefix)
        return jnp.square(policy.unembed(params, hidden)).sum()

    keys_values = {name: prefix[name] for name in ("k", "v")}
    gradient = jax.grad(lambda params, keys_values: loss(params, prefix | keys_values), (0, 1))
    dots = list(products_of(jax.make_jaxpr(gradient)(params, keys_values).jaxpr))
    assert len(dots) > 3 * 8
    for dot in dots:
        assert {x.aval.dtype.name for x in dot.invars} == {"bfloat16"}, dot


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_keeps_no_second_copy_of_the_weights(dtype):
    """In a scan over layers it would be one of all of them; few tokens, so that weights are what counts."""
    config = DecoderConfig(16, 8, 128, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=512, max_length=8, dtype=dtype)
    policy, shapes, tokens = make_policy(config), param_shapes(config), jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def loss(params, tokens):
        hidden, _ = policy.forward(params, tokens, tokens, tokens >= 0)
        return policy.unembed(params, hidden).sum()

    memory = jax.jit(jax.grad(loss)).lower(shapes, tokens).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.5 * sum(4 * x.size for x in jax.tree.leaves(shapes))  # 0.2; with a copy 1.2
