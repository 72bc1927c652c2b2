"""What the tensors of a Hugging Face folder are called, and where they belong in the parameters."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from grpo_jax.models.config import DecoderConfig

# {parameter of a layer: name in the file}; below, what some families add or call otherwise.
LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
BIAS_NAMES = {f"{name}_bias": f"self_attn.{name[0]}_proj.bias" for name in ("query", "key", "value")}
QK_NORM_NAMES = {"query_norm": "self_attn.q_norm.weight", "key_norm": "self_attn.k_norm.weight"}
POST_NORM_NAMES = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}


class ExpectedTensor(NamedTuple):
    """A tensor that a folder must hold, and where it belongs in the parameters.

    Attributes:
      name: in the file.
      shape: in the file, [out, in] for a matrix.
      parameter: its key in the parameters, or in those of the layers.
      layer: which layer of a parameter that is stacked over layers; None for the others.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    layer: int | None = None

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter has the axes in reverse: our matrices are [in, out], but the embedding is [V, D] in both."""
        return self.parameter != "embedding"


def expected_tensors(config: DecoderConfig) -> Iterator[ExpectedTensor]:
    """Every tensor of a folder."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"query": (queries, c.d_model), "output": (c.d_model, queries)}
    shapes |= dict.fromkeys(("key", "value"), (keys, c.d_model))
    shapes |= dict.fromkeys(("gate", "up"), (c.d_ff, c.d_model)) | {"down": (c.d_model, c.d_ff)}
    shapes |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
    shapes |= dict.fromkeys(("query_norm", "key_norm"), (c.head_dim,))
    yield ExpectedTensor("model.embed_tokens.weight", (c.vocab_size, c.d_model), "embedding")
    yield ExpectedTensor("model.norm.weight", (c.d_model,), "final_norm")
    if not c.tied:
        yield ExpectedTensor("lm_head.weight", (c.vocab_size, c.d_model), "unembedding")
    names = LAYER_NAMES | (BIAS_NAMES if c.attention_bias else {})
    names |= (QK_NORM_NAMES if c.qk_norm else {}) | (POST_NORM_NAMES if c.post_norms else {})
    for layer in range(c.num_layers):
        for ours, theirs in names.items():
            shape = shapes.get(ours, (c.d_model,))
            yield ExpectedTensor(f"model.layers.{layer}.{theirs}", shape, ours, layer)


def adapter_tensors(layers: Mapping[str, Any]) -> Iterator[ExpectedTensor]:
    """Every tensor of a folder of adapters, as PEFT names them; ``layers`` has those of `grpo_jax.models.lora`."""
    for ours in [name for name in layers if name.endswith(("_a", "_b"))]:
        target, side = ours.rsplit("_", 1)
        count, *shape = layers[ours].shape
        theirs = LAYER_NAMES[target].removesuffix("weight") + f"lora_{side.upper()}.weight"
        for layer in range(count):
            yield ExpectedTensor(f"base_model.model.model.layers.{layer}.{theirs}", (*shape[::-1],), ours, layer)
