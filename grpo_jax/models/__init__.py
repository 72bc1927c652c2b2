"""Decoder-only language models as pure functions, and Hugging Face checkpoints in and out."""

from grpo_jax.models.decoder import DecoderConfig, init_params, make_policy
from grpo_jax.models.families import read_config
from grpo_jax.models.pretrained import load_pretrained, save_pretrained

__all__ = ["DecoderConfig", "init_params", "load_pretrained", "make_policy", "read_config", "save_pretrained"]
