"""Tokenizers, prompts as arrays, and the order of visits."""

from grpo_jax.data.prompts import PromptSet, Tokenizer, encode_prompts, prompt_batch, prompt_order
from grpo_jax.data.tokenizers import CharTokenizer, HFTokenizer

__all__ = [
    "CharTokenizer",
    "HFTokenizer",
    "PromptSet",
    "Tokenizer",
    "encode_prompts",
    "prompt_batch",
    "prompt_order",
]
