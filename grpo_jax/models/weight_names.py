"""What the tensors of a Hugging Face folder are called, and where they belong in the parameters."""

from collections.abc import Iterator
from typing import NamedTuple

from grpo_jax.models.config import DecoderConfig

# Parameter of a layer: name in the file; with what some families add or call otherwise.
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


class Target(NamedTuple):
    """Where a tensor of the file belongs in the parameters; its shape is the file's, [out, in]."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None


def tensor_targets(config: DecoderConfig) -> Iterator[Target]:
    """Every tensor of a folder."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"query": (queries, c.d_model), "output": (c.d_model, queries)}
    shapes |= dict.fromkeys(("key", "value"), (keys, c.d_model))
    shapes |= dict.fromkeys(("gate", "up"), (c.d_ff, c.d_model)) | {"down": (c.d_model, c.d_ff)}
    shapes |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
    shapes |= dict.fromkeys(("query_norm", "key_norm"), (c.head_dim,))
    yield Target("model.embed_tokens.weight", (c.vocab_size, c.d_model), ("embedding",))
    yield Target("model.norm.weight", (c.d_model,), ("final_norm",))
    if not c.tied:
        yield Target("lm_head.weight", (c.vocab_size, c.d_model), ("unembedding",))
    names = LAYER_NAMES | (BIAS_NAMES if c.attention_bias else {})
    names |= (QK_NORM_NAMES if c.qk_norm else {}) | (POST_NORM_NAMES if c.post_norms else {})
    for layer in range(c.num_layers):
        for ours, theirs in names.items():
            yield Target(f"model.layers.{layer}.{theirs}", shapes.get(ours, (c.d_model,)), ("layers", ours), layer)
