"""TRL as a worker of `race`: its GRPOTrainer generates, scores and computes the loss. Runs in an interpreter that ``peers.py``
makes. Gradient checkpointing and the chunked log-probabilities are TRL's defaults."""

import tempfile
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from worker import Prepared, serve  # beside this file: the package needs what this interpreter lacks

PLACES = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def prepare(request: dict[str, Any]) -> Prepared:
    """What the worker answers first, and its repetition."""
    data = dict(np.load(f"{request['folder']}/data.npz"))
    prompts, rewards = np.repeat(data["prompts"], request["group"], 0), data["rewards"]
    model = _load(request)
    with torch.no_grad():
        logits = model(torch.tensor(prompts[:1])).logits[0, -1]
    check = [*logits[2:6].tolist(), float(logits[2:].norm())]
    trainer = _trainer(request, model, len(prompts))
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    torch.manual_seed(0)

    def rollout() -> tuple[np.ndarray, np.ndarray]:
        generated, _ = trainer._generate_single_turn(prompts.tolist(), None, {}, request["group"])
        shape = len(prompts), request["completion"]
        rows, mask = np.full(shape, request["pad"], np.int64), np.zeros(shape, bool)
        for row, seen, tokens in zip(rows, mask, generated, strict=True):
            row[: len(tokens)], seen[: len(tokens)] = tokens, True
        return rows, mask

    def improve(completions: np.ndarray, mask: np.ndarray, rewards: np.ndarray) -> float:
        centred = rewards - rewards.mean(1, keepdims=True)
        advantages = centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
        inputs = {
            "prompt_ids": torch.tensor(prompts, dtype=torch.long),
            "prompt_mask": torch.ones(prompts.shape, dtype=torch.long),
            "completion_ids": torch.tensor(completions, dtype=torch.long),
            "completion_mask": torch.tensor(mask).long(),
            "advantages": torch.tensor(advantages.reshape(-1)),
            "num_items_in_batch": torch.tensor(mask.sum()),
        }
        trainer._compute_loss(model, inputs).backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(size)

    def repeat() -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if request["work"] == "update":
            mask = data["mask"]
            answer["check"] = [improve(data["completions"], mask, rewards)]
        else:
            completions, mask = rollout()
        if request["work"] == "iteration":
            width = max(1, mask.any(0).sum())  # as TRL pads: to the longest
            odd = (completions.sum(1) % 2).astype(np.float32).reshape(rewards.shape)
            improve(completions[:, :width], mask[:, :width], odd)
        return answer | {"tokens": int(mask.sum())}

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    return {"versions": versions, "check": check}, repeat


def _trainer(request: dict[str, Any], model: Any, rows: int) -> Any:
    """TRL's trainer with a tokenizer whose texts are token ids; nothing is written."""
    words = {str(i): i for i in range(request["vocabulary"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=str(request["pad"])))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=str(request["pad"]), eos_token=str(request["eos"])
    )
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        num_generations=request["group"],
        max_completion_length=request["completion"],
        temperature=1.0,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["2"] * rows}),
        processing_class=wrapped,
    )


def _load(request: dict[str, Any]) -> Any:
    config = transformers.Qwen2Config(
        vocab_size=request["vocabulary"],
        hidden_size=request["width"],
        intermediate_size=request["d_ff"],
        num_hidden_layers=request["layers"],
        num_attention_heads=request["heads"],
        num_key_value_heads=request["kv_heads"],
        head_dim=request["head_dim"],
        max_position_embeddings=request["prompt_length"] + request["completion"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=request["pad"],
        eos_token_id=request["eos"],
        bos_token_id=None,
        dtype="float32",
    )
    model = transformers.Qwen2ForCausalLM(config)
    weights = dict(np.load(f"{request['folder']}/weights.npz"))
    named = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["final_norm"]}
    named["lm_head.weight"] = weights["embedding"]
    for name, place in PLACES.items():
        for i, value in enumerate(weights[f"layers/{name}"]):
            named[f"model.layers.{i}.{place}"] = value.T if value.ndim == 2 else value
    model.load_state_dict({name: torch.tensor(value) for name, value in named.items()})
    model.tie_weights()
    return model


if __name__ == "__main__":
    serve(prepare)
