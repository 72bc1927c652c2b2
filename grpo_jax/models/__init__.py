"""Decoder-only language models as pure functions, and Hugging Face checkpoints in and out."""

from grpo_jax.models.attention import choose_query_block
from grpo_jax.models.decoder import DecoderConfig, init_params, make_policy, param_shapes
from grpo_jax.models.families import read_config
from grpo_jax.models.pretrained import check_pretrained, load_pretrained, save_pretrained
from grpo_jax.models.safetensors import plain_file

__all__ = [
    "DecoderConfig",
    "check_pretrained",
    "choose_query_block",
    "init_params",
    "load_pretrained",
    "make_policy",
    "param_shapes",
    "plain_file",
    "read_config",
    "save_pretrained",
]
