"""The table of shardings: every matrix is spread, Adam's moments with it, and sizes that cannot be are refused or left whole."""

import jax
import optax
import pytest
from jax.sharding import PartitionSpec

from grpo_jax.models import DecoderConfig, init_params
from grpo_jax.train.sharding import make_mesh, parameter_shardings
from grpo_jax.train.step import init_state

CONFIG = DecoderConfig(
    vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32, max_length=16, tied=False
)


def test_every_matrix_is_spread_over_fsdp_and_tensor():
    params = init_params(CONFIG, jax.random.key(0))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = jax.eval_shape(lambda p: init_state(p, optax.adam(1e-3)), params)
    for path, sharding in jax.tree_util.tree_leaves_with_path(parameter_shardings(state, mesh)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = name.rsplit("/", 1)[-1]
        spread = {axis for axis in sharding.spec if axis}
        is_matrix = "norm" not in leaf and leaf not in ("count", "updates", "skipped")
        assert spread == ({"fsdp", "tensor"} if is_matrix else set()), name


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(data=1, fsdp=8)
    (sharding,) = jax.tree.leaves(parameter_shardings({"embedding": jax.ShapeDtypeStruct((16, 12), "float32")}, mesh))
    assert sharding.spec == PartitionSpec("tensor", None)


def test_sizes_that_do_not_make_the_devices_are_refused():
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="number of devices, 8"):
        make_mesh(data=3)
    with pytest.raises(ValueError, match="at least 1"):
        make_mesh(fsdp=0)
