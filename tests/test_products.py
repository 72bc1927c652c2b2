"""Products against NumPy in float64, their gradients against autodiff, and what is multiplied in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax.products import matmul, product, transposed, unembed
from tests.programs import products_of

RNG = np.random.default_rng(0)
B, T, D, V = 2, 3, 5, 7


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


HIDDEN, MATRIX, SLOPE = normal(B, T, D), normal(D, V), normal(B, T, V)
FORMS = {
    "matmul": matmul,
    "unembed": lambda x, w, dtype=None: unembed(x, w.T, dtype),
    "transposed": lambda x, w, dtype=None: unembed(x, transposed(w), dtype),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_product_and_its_gradients_are_those_of_plain_arithmetic(form):
    values, pull = jax.vjp(FORMS[form], jnp.asarray(HIDDEN), jnp.asarray(MATRIX))
    factors = [x.astype(np.float64) for x in (HIDDEN, MATRIX, SLOPE)]
    np.testing.assert_allclose(values, factors[0] @ factors[1], rtol=1e-5, atol=1e-5)
    to_hidden, to_matrix = pull(jnp.asarray(SLOPE))
    np.testing.assert_allclose(to_hidden, factors[2] @ factors[1].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_matrix, np.einsum("btd,btv->dv", factors[0], factors[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_products_of_batches(leading):
    x, y = normal(*leading, 3, 5), normal(*leading, 4, 5)
    slope = normal(*leading, 3, 4)
    values, pull = jax.vjp(product, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(values, np.einsum("...nd,...md->...nm", x, y), rtol=1e-5, atol=1e-5)
    to_x, to_y = pull(jnp.asarray(slope))
    np.testing.assert_allclose(to_x, np.einsum("...nm,...md->...nd", slope, y), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_y, np.einsum("...nm,...nd->...md", slope, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_multiplied_in_both_directions_and_nothing_else_is_rounded(form):
    """Weights stay float32, as the trainer keeps them: so does their gradient."""
    apply = lambda x, w: FORMS[form](x, w, "bfloat16")  # noqa: E731
    hidden, matrix, slope = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(MATRIX), jnp.asarray(SLOPE)

    def both(hidden, matrix, slope):
        values, pull = jax.vjp(apply, hidden, matrix)
        return values, pull(slope)

    dots = list(products_of(jax.make_jaxpr(both)(hidden, matrix, slope).jaxpr))
    assert len(dots) == 3
    for dot in dots:
        assert {x.aval.dtype.name for x in dot.invars} == {"bfloat16"}
        assert dot.outvars[0].aval.dtype == jnp.float32
    values, (to_hidden, to_matrix) = both(hidden, matrix, slope)
    assert (values.dtype, to_hidden.dtype, to_matrix.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    short = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (hidden, matrix, slope)]
    np.testing.assert_allclose(values, short[0] @ short[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(to_matrix, np.einsum("btd,btv->dv", short[0], short[2]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_inside_shard_map_is_that_of_all_rows(form):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def gradient(x, w, slope):
        return jax.grad(lambda w: (FORMS[form](x, w) * slope).sum())(w)

    spread = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole, rows), out_specs=whole))
    np.testing.assert_allclose(
        spread(HIDDEN, MATRIX, SLOPE), gradient(jnp.asarray(HIDDEN), MATRIX, SLOPE), rtol=1e-5, atol=1e-5
    )
