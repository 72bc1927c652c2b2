"""Logits of transformers for a small model of every family, and of folders that others wrote.

With an interpreter that has torch and transformers (here 2.13 and 5.23):

  python tests/models/make_golden_families.py             writes golden_families.json, read by test_families.py
  python tests/models/make_golden_families.py TASK.json   {"folders", "tokens", "out"}: logits per folder, and its
                                                          config.json written again

Weights are a formula of the tensor's name, so that the file holds only config.json entries, tokens and logits. Before a number
is written, transformers must agree with itself: padded on either side, and with its cache, token by token.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden_families.json")
LENGTH, PLACES = 24, (0, 3, 4, 5, 9, 16, 23)
BASE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 5, "sliding_window": 5}
GEMMA |= {"num_hidden_layers": 4}
# Short windows, low caps and fast rotations, so that each of them shows within LENGTH tokens.
CASES = {
    "llama": {"model_type": "llama", "rope_theta": 500.0, "torch_dtype": "float32"},
    "llama linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama 3.1": {
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
        "tie_word_embeddings": True,
    },
    "llama 3.1, since 5": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500.0},
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 10},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2, "rope_theta": 500.0},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2 with a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gemma2": GEMMA
    | {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "rope_theta": 500.0},
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "sliding_window_pattern": 3,
        "rope_theta": 2000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3, since 5": GEMMA
    | {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "final_logit_softcapping": 3.0,
    },
}


def make_weight(name: str, shape: tuple[int, ...], offset_norm: bool) -> np.ndarray:
    """Uniform numbers from raw Philox bits, which NumPy promises not to change; norms around what multiplies by 1."""
    bits = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    centred = ((bits >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5).reshape(shape)
    if name.endswith("norm.weight"):
        centred = 0.8 * centred + (0.0 if offset_norm else 1.0)
    elif len(shape) == 2:
        sharp = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        centred = centred * sharp * (12 / shape[1]) ** 0.5
    return centred.astype(np.float32)


def load(folder, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise ValueError(f"{folder}: {wrong}")
    return model.eval()


def logits_of(model, tokens, **options) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), **options).logits.float().numpy()


def check_itself(model, tokens, expected) -> None:
    import torch
    from transformers import DynamicCache

    length = tokens.shape[1]
    for left, right in ((3, 0), (0, 3)):
        padded = np.pad(tokens, ((0, 0), (left, right)))
        mask = torch.tensor(np.pad(np.ones_like(tokens), ((0, 0), (left, right))))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, left : left + length]
        assert np.abs(logits - expected).max() < 5e-5
    cache, pieces = DynamicCache(config=model.config), []
    for now in [slice(0, 9), *(slice(i, i + 1) for i in range(9, length))]:
        pieces.append(logits_of(model, tokens[:, now], past_key_values=cache, use_cache=True))
    error = np.abs(np.concatenate(pieces, 1) - expected).max()
    assert error < 5e-5, error


def make_case(entries: dict, tokens: np.ndarray) -> dict:
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(entries))
        blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        names = {name: tuple(x.shape) for name, x in blank.state_dict().items()}
        if blank.config.tie_word_embeddings:
            del names["lm_head.weight"]
        offset = entries["model_type"].startswith("gemma")
        weights = {name: make_weight(name, shape, offset) for name, shape in names.items()}
        save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model = load(folder)
        logits = logits_of(model, tokens)
        check_itself(model, tokens, logits)
        half = np.abs(logits_of(load(folder, "bfloat16"), tokens) - logits)
    print(f"{len(weights)} tensors, scale {logits.std():.2f}, bfloat16 {half.mean():.4f} {half.max():.3f}")
    return {
        "config": entries,
        "parameters": sum(x.size for x in weights.values()),
        "logits": [[[round(float(x), 6) for x in row[place]] for place in PLACES] for row in logits],
        "bfloat16": {"mean": float(half.mean()), "max": float(half.max())},
    }


def main() -> None:
    if len(sys.argv) > 1:
        task = json.loads(Path(sys.argv[1]).read_text())
        tokens = np.array(task["tokens"])
        logits = {}
        for name, folder in task["folders"].items():
            model = load(folder)
            model.config.save_pretrained(Path(folder, "again"))
            logits[name] = logits_of(model, tokens)
        np.savez(task["out"], **logits)
        return
    bits = np.random.Philox(key=0).random_raw(2 * LENGTH)
    tokens = (bits % np.uint64(BASE["vocab_size"])).astype(np.int64).reshape(2, LENGTH)
    cases = {}
    for name, entries in CASES.items():
        print(f"{name}: ", end="")
        cases[name] = make_case(BASE | entries, tokens)
    golden = {"tokens": tokens.tolist(), "places": PLACES, "cases": cases}
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
