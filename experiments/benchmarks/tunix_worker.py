"""Tunix as a worker of `race`: its own sampler, GRPO loss and trainer's step. Runs in an interpreter that ``peers.py`` makes."""

import itertools
from importlib.metadata import version
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl import algo_core
from tunix.rl.common import TrainExample
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from worker import Prepared, serve  # beside this file: the package needs what this interpreter lacks

PLACES = {
    "attention_norm": ("input_layernorm", "w"),
    "mlp_norm": ("post_attention_layernorm", "w"),
    "query": ("attn", "q_proj", "w"),
    "key": ("attn", "k_proj", "w"),
    "value": ("attn", "v_proj", "w"),
    "output": ("attn", "o_proj", "w"),
    "query_bias": ("attn", "q_bias"),
    "key_bias": ("attn", "k_bias"),
    "value_bias": ("attn", "v_bias"),
    "gate": ("mlp", "gate_proj", "kernel"),
    "up": ("mlp", "up_proj", "kernel"),
    "down": ("mlp", "down_proj", "kernel"),
}


class Numbers:
    """A tokenizer whose texts are token ids."""

    def __init__(self, pad: int, eos: int) -> None:
        self.ends = pad, eos

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none

    def pad_id(self) -> int:
        return self.ends[0]

    def eos_id(self) -> int:
        return self.ends[1]


def prepare(request: dict[str, Any]) -> Prepared:
    """What the worker answers first, and its repetition."""
    pad, eos, length = request["pad"], request["eos"], request["completion"]
    data = dict(np.load(f"{request['folder']}/data.npz"))
    prompts = np.repeat(data["prompts"], request["group"], 0)
    model = _load(request)
    tokenizer = Numbers(pad, eos)
    texts = [tokenizer.decode(row) for row in prompts.tolist()]
    cache = CacheConfig(prompts.shape[1] + length, request["layers"], request["kv_heads"], request["head_dim"])
    sampler = Sampler(model, tokenizer, cache)
    config = GRPOConfig(num_generations=request["group"], beta=0.0, epsilon=0.2, loss_agg_mode="token-mean")
    config.temperature = 1.0
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9))

    def loss(model: Any, train_example: TrainExample) -> Any:
        return algo_core.grpo_loss_fn(model, train_example, config, pad, eos)

    trainer = trainer.with_loss_fn(loss, has_aux=True)
    trainer = trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    train_step, _ = trainer.jit_train_and_eval_step()
    count = itertools.count()

    def rollout() -> tuple[np.ndarray, np.ndarray]:
        sampler.transformer_state = nnx.variables(model, nnx.Param)
        generated = sampler(
            texts, length, prompts.shape[1], temperature=1.0, top_p=1.0, eos_tokens=[eos], seed=next(count)
        )
        rows, mask = np.full((len(texts), length), pad, np.int32), np.zeros((len(texts), length), bool)
        for row, seen, tokens in zip(rows, mask, generated.tokens, strict=True):
            ended = len(tokens) < length  # it drops the end
            row[: len(tokens)], seen[: len(tokens) + ended] = tokens, True
            if ended:
                row[len(tokens)] = eos
        return rows, mask

    def improve(completions: np.ndarray, mask: np.ndarray, rewards: np.ndarray) -> float:
        centred = rewards - rewards.mean(1, keepdims=True)
        advantages = centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
        arrays = prompts, np.ones(prompts.shape, bool), completions, mask, advantages.reshape(-1)
        example = TrainExample(*map(jnp.array, arrays), ref_per_token_logps=None, old_per_token_logps=None)
        return float(train_step(example)[2])

    def repeat() -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if request["work"] == "update":
            mask = data["mask"]
            answer["check"] = [improve(data["completions"], mask, data["rewards"])]
        else:
            completions, mask = rollout()
        if request["work"] == "iteration":
            improve(completions, mask, (completions.sum(1) % 2).astype(np.float32).reshape(data["rewards"].shape))
        return answer | {"tokens": int(mask.sum())}

    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), (1, prompts.shape[1]))
    causal = jnp.tril(jnp.ones((1, prompts.shape[1], prompts.shape[1]), bool))
    logits = model(jnp.array(prompts[:1]), positions, None, causal)[0][0, -1]
    versions = {name: version(name) for name in ("google-tunix", "jax", "flax")}
    check = [*logits[2:6].tolist(), float(jnp.linalg.norm(logits[2:]))]
    return {"versions": versions, "check": check}, repeat


def _load(request: dict[str, Any]) -> Qwen2:
    config = ModelConfig(
        num_layers=request["layers"],
        vocab_size=request["vocabulary"],
        embed_dim=request["width"],
        hidden_dim=request["d_ff"],
        num_heads=request["heads"],
        head_dim=request["head_dim"],
        num_kv_heads=request["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model: Any = Qwen2(config, rngs=nnx.Rngs(0))
    state: Any = nnx.state(model)
    weights = dict(np.load(f"{request['folder']}/weights.npz"))

    def put(place: tuple[Any, ...], value: np.ndarray) -> None:
        leaf = state
        for name in place:
            leaf = leaf[name]
        leaf.set_value(jnp.array(value).reshape(leaf.get_value().shape))

    put(("embedder", "input_embedding"), weights["embedding"])
    put(("final_norm", "w"), weights["final_norm"])
    for name, place in PLACES.items():
        for i, value in enumerate(weights[f"layers/{name}"]):
            put(("layers", i, *place), value)
    nnx.update(model, state)
    return model


if __name__ == "__main__":
    serve(prepare)
