"""completion_logps: values and gradients of the plain form, everywhere a trainer may put it, and bounded memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.objective import completion_logps
from grpo_jax.objective.logps import POSITIONS

B, T, D, V = 3, 7, 6, 11
RNG = np.random.default_rng(0)
HIDDEN, REFERENCE = (jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
MATRIX, OTHER = (jnp.asarray(RNG.normal(size=(D, V)), jnp.float32) for _ in range(2))
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)


def plain(hidden, matrix, targets, *, temperature=1.0):
    full = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, matrix) / temperature)
    chosen = jnp.take_along_axis(full, targets[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(full) * full).sum(-1)


def mixed(score):
    """A scalar to which both outputs and all positions matter differently."""

    def loss(hidden, matrix, temperature, targets=TARGETS):
        logps, entropy = score(hidden, matrix, targets, temperature=temperature)
        return (jnp.sin(logps) * jnp.arange(logps.shape[1], dtype=logps.dtype)[None]).sum() + (entropy**2).sum()

    return loss


def assert_same(actual, wanted, rtol=2e-4, atol=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def value_and_grads(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, 64, None])
def test_values_and_gradients_of_the_plain_form(chunk_size):
    arguments = HIDDEN, MATRIX, jnp.float32(0.7)
    ours = mixed(partial(completion_logps, chunk_size=chunk_size))
    assert_same(value_and_grads(ours)(*arguments), value_and_grads(mixed(plain))(*arguments))


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_alone(which):
    """A symbolic zero for the other output takes another path."""
    loss = lambda score: lambda *a: (score(*a[:2], TARGETS, temperature=a[2])[which] ** 2).sum()  # noqa: E731
    arguments = HIDDEN, MATRIX, jnp.float32(1.3)
    assert_same(
        value_and_grads(loss(partial(completion_logps, chunk_size=2)))(*arguments),
        value_and_grads(loss(plain))(*arguments),
    )


def test_narrow_token_ids():
    matrix = jnp.asarray(RNG.normal(size=(D, 300)), jnp.float32)
    loss = lambda w, targets: completion_logps(HIDDEN, w, targets)[0].sum()  # noqa: E731
    assert_same(*(jax.value_and_grad(loss)(matrix, TARGETS.astype(t)) for t in ("uint8", "int32")))


def test_one_position_and_none():
    one = partial(completion_logps, HIDDEN[:, :1], MATRIX, TARGETS[:, :1])
    assert_same(one(), plain(HIDDEN[:, :1], MATRIX, TARGETS[:, :1]))
    for rows, length in ((3, 0), (0, 7)):
        with pytest.raises(ValueError, match=rf"nothing to score: \[B, T\] = \({rows}, {length}\)"):
            completion_logps(HIDDEN[:rows, :length], MATRIX, TARGETS[:rows, :length])


def test_finite_differences():
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in (HIDDEN[:2, :3], MATRIX, 0.8)]
        directions = [RNG.normal(size=x.shape) for x in arrays]
        loss = mixed(partial(completion_logps, chunk_size=2))

        @jax.jit
        def along(step):
            moved = [jnp.asarray(a) + step * jnp.asarray(d) for a, d in zip(arrays, directions, strict=True)]
            return loss(*moved, targets=TARGETS[:2, :3])

        slope, step = jax.grad(along)(0.0), 1e-5
        np.testing.assert_allclose(slope, (along(step) - along(-step)) / (2 * step), rtol=1e-8)


def test_never_sampled_tokens_of_probability_zero():
    """Their logits are −inf: the rest is scored as if the vocabulary were smaller, with gradients, also of the temperature."""
    allowed = jnp.arange(V) < V - 2
    hidden, targets = HIDDEN, jnp.minimum(TARGETS, V - 3)

    def masked(h, w, temperature):
        head = lambda states: jnp.where(allowed[None, None], states @ w, -jnp.inf)  # noqa: E731
        return mixed(lambda h, _, *a, **k: completion_logps(h, head, *a, chunk_size=2, **k))(h, w, temperature, targets)

    def smaller(h, w, temperature):
        return mixed(plain)(h, w[:, : V - 2], temperature, targets)

    arguments = hidden, MATRIX, jnp.float32(0.7)
    result = value_and_grads(masked)(*arguments)
    assert_same(result, value_and_grads(smaller)(*arguments))
    assert (result[1][1][:, V - 2 :] == 0).all()
    logps, _ = completion_logps(
        hidden, lambda h: jnp.full((*h.shape[:2], 2), -jnp.inf).at[..., 0].set(0.0), TARGETS % 2
    )
    np.testing.assert_array_equal(logps, jnp.where(TARGETS % 2 == 0, 0.0, -jnp.inf))


def test_huge_logits_stay_finite():
    loss = mixed(lambda h, w, t, **k: completion_logps(h, w, t, chunk_size=3, **k))
    for x in jax.tree.leaves(value_and_grads(loss)(1e4 * HIDDEN, MATRIX, jnp.float32(1.0))):
        assert jnp.isfinite(x).all()


def test_reference_in_the_same_pass_has_no_gradient():
    def loss(hidden, matrix, reference_hidden, reference_matrix):
        score = partial(completion_logps, hidden, matrix, TARGETS, temperature=0.7, chunk_size=3)
        logps, entropy, ref_logps = score(reference_hidden=reference_hidden, reference_unembedding=reference_matrix)
        return (logps * ref_logps + entropy).sum(), ref_logps

    (_, ref_logps), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
        HIDDEN, MATRIX, REFERENCE, OTHER
    )
    wanted = plain(REFERENCE, OTHER, TARGETS, temperature=0.7)[0]
    assert_same(ref_logps, wanted)

    def policy_only(h, w):
        logps, entropy = plain(h, w, TARGETS, temperature=0.7)
        return (logps * wanted + entropy).sum()

    assert_same(gradients[:2], jax.grad(policy_only, (0, 1))(HIDDEN, MATRIX))
    assert all((g == 0).all() for g in gradients[2:])
    # With one unembedding for both, its gradient is the policy's alone.
    shared = jax.grad(
        lambda w: (lambda a, b, c: (a * c + b).sum())(
            *completion_logps(HIDDEN, w, TARGETS, temperature=0.7, reference_hidden=REFERENCE)
        )
    )(MATRIX)
    fixed = plain(REFERENCE, MATRIX, TARGETS, temperature=0.7)[0]
    wanted = jax.grad(lambda w: (lambda a, b: (a * fixed + b).sum())(*plain(HIDDEN, w, TARGETS, temperature=0.7)))
    assert_same(shared, wanted(MATRIX))


# A head with parameters two closures deep, and a table of integers, which has no gradient.
PARAMS = {"head": {"kernel": MATRIX, "bias": jnp.asarray(RNG.normal(size=V), jnp.float32)}, "scale": jnp.float32(1.1)}
ORDER = jnp.asarray(RNG.permutation(V), jnp.int32)


def head_of(params, order):
    inner = lambda x: x @ params["head"]["kernel"] + params["head"]["bias"][None, None]  # noqa: E731
    return lambda h: inner(jnp.tanh(h) * params["scale"])[..., order]


def by_function(params, hidden, order, targets=TARGETS):
    logps, entropy = completion_logps(hidden, head_of(params, order), targets, temperature=0.9, chunk_size=3)
    return (logps * jnp.cos(logps)).sum() + entropy.sum()


def by_logits(params, hidden, order, targets=TARGETS):
    full = jax.nn.log_softmax(head_of(params, order)(hidden) / 0.9)
    logps = jnp.take_along_axis(full, targets[..., None], -1)[..., 0]
    return (logps * jnp.cos(logps)).sum() - (jnp.exp(full) * full).sum()


WRAPPERS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "jit inside": lambda f: lambda *a: jax.jit(f)(*a),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: (
        lambda params, hidden, order: jax.lax.scan(
            lambda total, h: (total + f(params, h, order), None), jnp.float32(0), jnp.stack([hidden, 2 * hidden])
        )[0]
    ),
    "vmap over parameters": lambda f: (
        lambda params, hidden, order: jax.vmap(f, (0, None, None))(
            jax.tree.map(lambda x: jnp.stack([x, x / 2]), params), hidden, order
        ).sum()
    ),
    "vmap over everything": lambda f: (
        lambda params, hidden, order: jax.vmap(f)(
            *jax.tree.map(lambda x: jnp.stack([x, x]), (params, hidden, order))
        ).sum()
    ),
    "vmap of gradients": lambda f: (
        lambda params, hidden, order: sum(
            jnp.sin(g).sum()
            for g in jax.tree.leaves(
                jax.vmap(jax.grad(f), (0, 0, None))(
                    *jax.tree.map(lambda x: jnp.stack([x, x / 2]), (params, hidden)), order
                )
            )
        )
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_functions_with_parameters_in_closures(wrapper):
    differentiated = (lambda f: f) if wrapper == "vmap of gradients" else (lambda f: jax.value_and_grad(f, (0, 1)))
    outer = (lambda f: f) if wrapper == "eager" else jax.jit
    ours, wanted = (
        outer(differentiated(WRAPPERS[wrapper](f)))(PARAMS, HIDDEN, ORDER) for f in (by_function, by_logits)
    )
    assert_same(ours, wanted)


@pytest.mark.parametrize(
    "matrix_spec", [PartitionSpec(), PartitionSpec(None, "tensor"), PartitionSpec("data", "tensor")]
)
def test_rows_stay_on_their_devices(matrix_spec):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, length, width, vocabulary = 8, 6, 8, 48
    hidden = jnp.asarray(RNG.normal(size=(rows, length, width)), jnp.float32)
    matrix = jnp.asarray(RNG.normal(size=(width, vocabulary)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, vocabulary, (rows, length)), jnp.int32)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    placed = place(hidden, "data"), place(matrix, *matrix_spec), jnp.float32(0.7), place(targets, "data")
    for head in (lambda w: w, lambda w: lambda h: jnp.dot(h, w)):
        score = lambda h, w, *a, head=head, **k: completion_logps(h, head(w), *a, chunk_size=2, **k)  # noqa: E731
        result = value_and_grads(mixed(score))(*placed)
        assert_same(result, value_and_grads(mixed(plain))(hidden, matrix, jnp.float32(0.7), targets))
        assert result[1][0].sharding.spec[0] == "data"
        logps, _ = jax.jit(score)(*placed[:2], placed[3])
        assert logps.sharding.spec[0] == "data"
        # No device ever holds another's rows: every array of states or logits in the program has 8 / 4 rows.
        text = jax.jit(score).lower(*placed[:2], placed[3]).compile().as_text()
        assert f"[{rows // 4},2,{width}]" in text or f"[{rows // 4 * 2},{width}]" in text
        assert f"f32[{rows},2,{width}]" not in text and f"f32[{rows * 2},{width}]" not in text


def test_bfloat16_inputs_and_float32_sums():
    length = 256
    hidden = jnp.asarray(RNG.normal(size=(2, length, D)), jnp.bfloat16)
    matrix = MATRIX.astype(jnp.bfloat16)
    targets = jnp.asarray(RNG.integers(0, V, (2, length)), jnp.int32)
    loss = lambda score: lambda h, w: score(h, w, targets)[0].sum()  # noqa: E731
    logps, entropy = completion_logps(hidden, matrix, targets, chunk_size=1)
    assert logps.dtype == entropy.dtype == jnp.float32
    wide = hidden.astype(jnp.float32), matrix.astype(jnp.float32)
    assert_same((logps, entropy), plain(*wide, targets))
    gradients = jax.jit(jax.grad(loss(partial(completion_logps, chunk_size=1)), (0, 1)))(hidden, matrix)
    for gradient, wanted in zip(gradients, jax.grad(loss(plain), (0, 1))(*wide), strict=True):
        assert gradient.dtype == jnp.bfloat16
        # 256 chunks summed in bfloat16 would be wrong by units; the rounding of their 512 terms is not.
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=2**-7, atol=0.05)
    mixed_dtypes = completion_logps(hidden, wide[1], targets)
    assert_same(mixed_dtypes, (logps, entropy))


def test_logits_of_all_tokens_never_exist():
    rows, length, width, vocabulary = 4, 512, 4, 65_536
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, length, width), (width, vocabulary))]
    targets = jnp.zeros((rows, length), jnp.int32)

    def memory(chunk_size, reference):
        def loss(h, w):
            more = {"reference_hidden": h} if reference else {}
            return sum(x.sum() for x in completion_logps(h, w, targets, chunk_size=chunk_size, **more))

        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    everything = rows * length * vocabulary * 4
    fixed = 8 * (rows * length * width + width * vocabulary) * 4
    for chunk_size, positions in ((None, POSITIONS), (8, 8 * rows)):
        for reference in (False, True):
            assert memory(chunk_size, reference) < 2 * positions * vocabulary * 4 + fixed < everything


def test_what_nobody_uses_is_not_computed():
    """XLA removes the entropy from a forward pass, and a frozen unembedding's gradient from the backward pass."""
    score = partial(completion_logps, chunk_size=3)

    def cost(f, key):
        return jax.jit(f).lower(HIDDEN, MATRIX).compile().cost_analysis().get(key, 0.0)

    both = cost(lambda h, w: score(h, w, TARGETS), "flops")
    assert cost(lambda h, w: score(h, w, TARGETS)[0], "flops") < both
    loss = lambda h, w: score(h, w, TARGETS)[0].sum()  # noqa: E731
    all_gradients = cost(jax.grad(loss, (0, 1)), "flops")
    with_entropy = cost(jax.grad(lambda h, w: sum(x.sum() for x in score(h, w, TARGETS)), (0, 1)), "flops")
    assert cost(jax.grad(loss), "flops") < all_gradients < with_entropy


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"hidden": HIDDEN[0]}, ValueError, r"hidden must be \[B, T, D\]"),
        ({"targets": TARGETS[:, 1:]}, ValueError, r"\(3, 7, 6\) and \(3, 6\)"),
        ({"targets": TARGETS.astype(jnp.float32)}, TypeError, "targets must be integers, got float32"),
        ({"unembedding": MATRIX.T}, ValueError, r"unembedding must be \[D, V\], got \(11, 6\)"),
        ({"unembedding": lambda h: h.reshape(-1, D)}, ValueError, r"must give logits \[..., V\], gave \[\(21, 6\)\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer, at least 1, got 0"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size must be an integer"),
        ({"hidden": HIDDEN.astype(jnp.int32)}, TypeError, "hidden must be real, got int32"),
        ({"temperature": jnp.ones(B)}, ValueError, "temperature must be a scalar"),
        ({"reference_unembedding": MATRIX}, ValueError, "needs reference_hidden"),
        ({"reference_hidden": HIDDEN[:, 1:]}, ValueError, r"reference_hidden must be \[B, T, D\], got \(3, 6, 6\)"),
        ({"reference_hidden": HIDDEN[..., 1:]}, ValueError, "reference_unembedding must be"),
    ],
)
def test_bad_arguments_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        completion_logps(**({"hidden": HIDDEN, "unembedding": MATRIX, "targets": TARGETS} | changes))


@pytest.mark.parametrize("closed", [False, True], ids=["array", "function"])
def test_gradients_inside_shard_map(closed):
    """Rows split over devices by hand: the unembedding's gradient is summed over them."""
    mesh = jax.make_mesh((3,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    rows, whole = jax.P("rows"), jax.P()

    def loss(h, w, targets):
        head = (lambda x: x @ w) if closed else w
        logps, entropy = completion_logps(h, head, targets, chunk_size=3)
        return (logps * jnp.cos(logps) + 0.3 * entropy).sum()

    @jax.jit
    def split(h, w, targets):
        def part(h, w, targets):
            return jax.lax.psum(loss(h, w, targets), "rows")

        return jax.shard_map(part, mesh=mesh, in_specs=(rows, whole, rows), out_specs=whole)(h, w, targets)

    for gradient, wanted in zip(
        *(jax.jit(jax.grad(f, (0, 1)))(HIDDEN, MATRIX, TARGETS) for f in (split, loss)), strict=True
    ):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [1e2, 1e3, -1e3])
def test_an_offset_common_to_all_logits_takes_no_digits(offset):
    """Logits with few bits, so that the offset itself is exact."""
    logits = jnp.round(HIDDEN @ MATRIX * 64) / 64
    score = lambda z: completion_logps(z, jnp.eye(z.shape[-1]), TARGETS)  # noqa: E731
    for shifted, wanted in zip(score(logits + offset), score(logits), strict=True):
        np.testing.assert_allclose(shifted, wanted, atol=1e-6)


def test_tokens_outside_the_vocabulary_are_nan():
    for target in (-1, MATRIX.shape[1]):
        logps, _ = completion_logps(HIDDEN, MATRIX, TARGETS.at[0, 0].set(target))
        assert jnp.isnan(logps[0, 0])
        assert jnp.isfinite(logps[1:]).all()
