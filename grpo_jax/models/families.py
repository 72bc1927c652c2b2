"""The families of decoders that Hugging Face folders hold: what config.json says, and what the tensors are called."""

import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.models.decoder import DecoderConfig, Params
from grpo_jax.models.stored import plain_file, read_json

REQUIRED = "an entry that must be there"

# Decoder config field: (name in config.json, its default there).
FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "d_model": ("hidden_size", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "d_ff": ("intermediate_size", REQUIRED),
    "max_length": ("max_position_embeddings", REQUIRED),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "tied": ("tie_word_embeddings", False),
}
# What the decoder does not do: entries of config.json that may only have these values.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
# Parameter of a layer: name in the file.
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The config of a Hugging Face folder; ValueError naming what the decoder cannot do. Example: see ``load_pretrained``."""
    path = plain_file(Path(folder), "config.json")
    entries = read_json(path)
    if entries.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {reprlib.repr(entries.get('model_type'))}; supported: 'llama'")
    rope = entries.get("rope_parameters")  # since transformers 5
    if isinstance(rope, dict) and set(rope) <= {"rope_type", "rope_theta"} and rope.get("rope_type") == "default":
        entries = {**rope, **entries}
    elif rope is not None:
        raise ValueError(f"{path}: rope_parameters={reprlib.repr(rope)} is not supported; only rope_type 'default' is")
    for name, allowed in FIXED.items():
        if entries.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: {name}={reprlib.repr(entries[name])} is not supported; it must be {allowed[0]!r}"
            )

    values = {}
    for ours, (theirs, default) in FIELDS.items():
        values[ours] = entries.get(theirs, default)
        if values[ours] is REQUIRED:
            raise ValueError(f"{path}: {theirs} is missing")
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    try:
        if values["head_dim"] is None:
            values["head_dim"] = values["d_model"] // values["num_heads"]
        return DecoderConfig(**values)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {str(error)[:1000]}") from None


def config_entries(config: DecoderConfig) -> dict[str, Any]:
    """What config.json says of a decoder: the inverse of `read_config`."""
    entries = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()}
    entries |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    return entries | {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None}


class Target(NamedTuple):
    """Where a tensor of the file belongs in the parameters; its shape is the file's, [out, in]."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None

    def view(self, params: Params) -> np.ndarray:
        leaf: Any = params
        for step in self.path:
            leaf = leaf[step]
        # torch keeps the embedding as we do, [V, D]; the caller transposes everything.
        return leaf.T if self.path == ("embedding",) else leaf if self.layer is None else leaf[self.layer]


def tensor_targets(config: DecoderConfig) -> Iterator[Target]:
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    out_in = {"query": (queries, c.d_model), "key": (keys, c.d_model), "value": (keys, c.d_model)}
    out_in |= {"output": (c.d_model, queries), "gate": (c.d_ff, c.d_model), "up": (c.d_ff, c.d_model)}
    out_in |= {"down": (c.d_model, c.d_ff)}
    yield Target("model.embed_tokens.weight", (c.vocab_size, c.d_model), ("embedding",))
    yield Target("model.norm.weight", (c.d_model,), ("final_norm",))
    if not c.tied:
        yield Target("lm_head.weight", (c.vocab_size, c.d_model), ("unembedding",))
    for layer in range(c.num_layers):
        for ours, theirs in LAYER_NAMES.items():
            shape = out_in.get(ours, (c.d_model,))
            yield Target(f"model.layers.{layer}.{theirs}.weight", shape, ("layers", ours), layer)
