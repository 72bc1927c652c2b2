"""The memory that a run is said to need: what lasts, to the byte; what programs add, as XLA compiles them."""

import json

import jax
import pytest

from configs import qwen_gsm8k
from grpo_jax.config import validate
from grpo_jax.runs.errors import RunError
from grpo_jax.runs.memory import (
    check_memory,
    estimate_memory,
    format_bytes,
    lasting_memory,
    memory_table,
    per_device,
)
from grpo_jax.runs.setup import make_setup
from tests.tiny_run import on_one_device, tiny_config

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "hidden_act": "silu",
}  # of Qwen2.5-0.5B-Instruct
QWEN_PARAMETERS = 494_032_768  # as published


def on_first_device(tree):
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("fsdp, tensor", [(1, 1), (4, 2), (2, 1)])
def test_what_lasts_is_what_the_arrays_of_a_run_take_on_a_device(fsdp, tensor):
    config = tiny_config(mesh__fsdp=fsdp, mesh__tensor=tensor)
    setup = make_setup(config, *validate(config, num_devices=8))
    params = setup.initial_params(0)
    state = setup.compiled.start(params)
    lasting = lasting_memory(setup.recipe, setup.shapes, setup.trained, setup.mesh)
    assert lasting["parameters"] == lasting["reference"] == on_first_device(params) == per_device(setup.shapes)
    assert lasting["parameters"] + lasting["optimizer"] == on_first_device(state)


def test_an_average_is_one_more_copy_of_the_parameters():
    plain, averaged = (lasting_memory(s.recipe, s.shapes, s.trained, s.mesh) for _, s in map(setups, (0.0, 0.5)))
    assert list(averaged) == ["parameters", "optimizer", "average", "reference"]
    assert averaged["average"] == plain["parameters"]
    assert averaged["optimizer"] - plain["optimizer"] == 4  # it counts the updates


def setups(average):
    return on_one_device(train__average=average)


@pytest.mark.slow
@pytest.mark.parametrize("regime, mesh", [("ours", {"fsdp": 8}), ("paper", {"data": 4, "tensor": 2})])
def test_the_qwen_config_compiles_for_its_shapes_alone(regime, mesh, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(40)))
    config = qwen_gsm8k.get_config(regime)
    source = {"source": str(rows), "prompt": "{question}", "target": "{answer}", "verifier": "number_boxed"}
    with config.ignore_type():
        config.task.name, config.model.path = "dataset", str(tmp_path)
        config.task.dataset.update(source)
        config.mesh.update(mesh)
    with jax.numpy_dtype_promotion("standard"):
        memory = estimate_memory(config, *validate(config, num_devices=8))
    if regime == "ours":  # all matrices divide by 8; norms and biases are whole everywhere
        assert 4 * QWEN_PARAMETERS / 8 <= memory.lasting["parameters"] < 4 * QWEN_PARAMETERS / 8 * 1.01
    assert memory.lasting["optimizer"] == pytest.approx(2 * memory.lasting["parameters"], rel=1e-3)
    assert memory.working["update"] > memory.lasting["parameters"]  # the gradient, at least
    assert memory.peak == sum(memory.lasting.values()) + max(memory.working.values()) < 80 << 30
    assert memory_table(memory)[-1] == ("peak per device", format_bytes(memory.peak))


def test_a_device_that_is_too_small_is_named(monkeypatch):
    class Small:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1 << 20}

    monkeypatch.setattr(jax, "local_devices", lambda: [Small()])
    check_memory(tiny_config(), {"parameters": 1 << 19, "optimizer": 1 << 19})
    with pytest.raises(
        RunError, match=r"parameters, optimizer need 2\.0 MiB per device, which has 1\.0 MiB: .*mesh\.fsdp"
    ):
        check_memory(tiny_config(), {"parameters": 1 << 20, "optimizer": 1 << 20})


def test_a_host_that_is_too_small_is_named_before_anything_is_made():
    with pytest.raises(RunError, match=r"parameters need 8\.0 TiB per device, which has"):
        check_memory(tiny_config(), {"parameters": 8 << 40})
    with pytest.raises(RunError, match=r"80,000,000 completions of .* lower rollout\.group_size"):
        check_memory(tiny_config(rollout__group_size=10**7, rollout__max_completion=10_000), {"parameters": 1})
