"""Tunix' own sampler and train step, compiled for an accelerator that is not there; in an interpreter that ``peers.py`` makes.

Reads a line of JSON from standard input: sizes, the work, and arguments of jax's ``get_topology_desc``; writes the optimised
program as text into a file, and a line of JSON: its memory, and the CPU seconds of compiling.
"""

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax  # after the environment is set
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2, RematConfig
from tunix.rl import algo_core
from tunix.rl.common import TrainExample
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.sft.peft_trainer import PeftTrainer
from tunix_worker import Numbers  # beside this file

PAD = 0


def config(request: dict[str, Any], **options: Any) -> ModelConfig:
    """The model, with bfloat16 products."""
    layers, width, heads, kv_heads, head_dim, d_ff, vocabulary = request["sizes"]
    return ModelConfig(
        num_layers=layers,
        vocab_size=vocabulary,
        embed_dim=width,
        hidden_dim=d_ff,
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.bfloat16,
        **options,
    )


def decoding(request: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The loop of its sampler, over bfloat16 parameters."""
    layers, _, _, kv_heads, head_dim, _, vocabulary = request["sizes"]
    rows, prompt, slots = request["rows"], request["prompt"], request["prompt"] + request["completion"]
    model = nnx.eval_shape(lambda: Qwen2(config(request, param_dtype=jnp.bfloat16), rngs=nnx.Rngs(0)))

    class Shapes(Sampler):
        transformer = model  # as it is: merging it anew would need arrays

    sampler = Shapes(model, Numbers(PAD, vocabulary), CacheConfig(slots, layers, kv_heads, head_dim))
    sampler.eos_ids = jnp.array([vocabulary])  # none

    def state(tokens: Any, seed: Any) -> Any:
        options = {"include_logits": False, "forbidden_token_ids": None, "beam_size": None}
        made = sampler.init_sample_state(tokens, slots, temperature=1.0, top_p=1.0, top_k=None, seed=seed, **options)
        return dataclasses.replace(made, num_input_tokens=prompt)

    shapes = jax.eval_shape(state, jax.ShapeDtypeStruct((rows, prompt), jnp.int32), jax.random.PRNGKey(0))
    return jax.jit(sampler._decode_fn, donate_argnums=1), (sampler._flattened_transformer_state, shapes)


def update(request: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A train step on ``rows`` completions, float32 parameters and moments; the backward pass computes layers again."""
    rows, prompt, completion = request["rows"], request["prompt"], request["completion"]
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))

    def make() -> Any:
        model = Qwen2(config(request, remat_config=RematConfig.DECODER), rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, transform, wrt=nnx.Param)

    model, optimizer = nnx.eval_shape(make)
    (graph, params), (optimizer_graph, moments) = nnx.split(model), nnx.split(optimizer)
    options = GRPOConfig(num_generations=request["group"], beta=0.0, epsilon=0.2, loss_agg_mode="token-mean")
    options.temperature = 1.0
    trainer = SimpleNamespace(
        gen_model_input_fn=lambda example: {"train_example": example},
        loss_fn=lambda model, train_example: algo_core.grpo_loss_fn(
            model, train_example, options, PAD, request["sizes"][-1]
        ),
        _lora_enabled=False,
        _has_aux=True,
    )

    def step(params: Any, moments: Any, arrays: Any) -> Any:
        model, optimizer = nnx.merge(graph, params), nnx.merge(optimizer_graph, moments)
        example = TrainExample(*arrays, ref_per_token_logps=None, old_per_token_logps=None)
        loss, _, norm = PeftTrainer._train_step(trainer, model, optimizer, example)
        return nnx.state(model), nnx.state(optimizer), loss, norm

    def array(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = [array(rows, n, dtype=d) for n in (prompt, completion) for d in (jnp.int32, jnp.bool_)]
    arrays = *tokens, array(rows, dtype=jnp.float32)
    return jax.jit(step, donate_argnums=1), (params, moments, arrays)  # as its trainer donates


def main() -> None:
    """Answers one request."""
    request = json.loads(sys.stdin.readline())
    function, shapes = {"sampling": decoding, "update": update}[request["work"]](request)
    device = topologies.get_topology_desc(*request["topology"], **request["topology_options"]).devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=here), shapes)
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    try:
        options = {"xla_dump_to": request["folder"], "xla_dump_hlo_as_text": True}
        lowered = function.trace(*shapes).lower(lowering_platforms=(request["topology"][1],))
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps({"error": str(error)}))
        return
    sizes = compiled.memory_analysis()
    answer = {
        "memory": sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes,
        "compile_seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before,
    }
    # What the compiler writes; of a v6e, jax cannot read it back.
    written = sorted(Path(request["folder"]).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
    text = written[-1].read_text(encoding="utf-8") if written else compiled.as_text()
    Path(request["folder"], "program.txt").write_text(text, encoding="utf-8")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
