"""Datasets as tasks, tokenizers, prompts as arrays, and the order of visits."""

from grpo_jax.data.chat import ChatFormat, read_chat
from grpo_jax.data.datasets import dataset, make_task, read_examples
from grpo_jax.data.gsm8k import gsm8k
from grpo_jax.data.order import prompt_order
from grpo_jax.data.prompts import PromptSet, Tokenizer, encode_prompts, prompt_batch
from grpo_jax.data.reasoning import reasoning_gym
from grpo_jax.data.stops import stop_table
from grpo_jax.data.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "ChatFormat",
    "HFTokenizer",
    "PromptSet",
    "Tokenizer",
    "dataset",
    "encode_prompts",
    "gsm8k",
    "make_task",
    "prompt_batch",
    "prompt_order",
    "read_chat",
    "read_examples",
    "reasoning_gym",
    "stop_table",
]
