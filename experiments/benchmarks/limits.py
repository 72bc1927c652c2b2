"""The least time and memory that sampling and an update can take on a device: bytes and operations, counted by hand.

Letters as in the dimension key of grpo_jax. Counted is what the work itself needs, whatever the program: bfloat16 weights are
read once a step, the keys and values of a completion once for each of its tokens, those of a prompt once for its group; a
multiplication and an addition are two operations. What a program does beyond that is its distance from the limit.
"""

from typing import NamedTuple

import numpy as np

from grpo_jax.models import DecoderConfig

NUMBER = 2  # bytes of a bfloat16


class Device(NamedTuple):
    """What a device can do at best.

    Attributes:
      flops: operations per second of dense bfloat16 products.
      bandwidth: bytes per second, read and written.
      memory: bytes, None where it is not known.
    """

    flops: float
    bandwidth: float
    memory: float | None


H200 = Device(790e12, 4.3e12, 139 * 2.0**30)  # measured on one: what predictions assume


class Work(NamedTuple):
    """Groups of completions.

    Attributes:
      lengths: [P, G] tokens of the completions, the last one included.
      prompt: S.
    """

    lengths: np.ndarray
    prompt: int

    @property
    def tokens(self) -> int:
        """Of the completions."""
        return int(self.lengths.sum())


def layer_parameters(config: DecoderConfig) -> int:
    """Weights in the matrices of all layers: what every token is multiplied with.

    >>> layer_parameters(DecoderConfig(32, 2, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64))
    1152
    """
    c = config
    attention = c.d_model * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.d_model * c.d_ff)


def head_parameters(config: DecoderConfig) -> int:
    """Weights in the matrix that makes logits."""
    return config.vocab_size * config.d_model


def cache_bytes(config: DecoderConfig) -> int:
    """Keys and values of one token in all layers.

    >>> cache_bytes(DecoderConfig(32, 2, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64))
    32
    """
    return NUMBER * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def decode_steps(config: DecoderConfig, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and operations of every decode step, float64 [steps].

    Step t ≥ 1 draws token t of the completions longer than t, which see t tokens of their own and S of their prompt.

    >>> tiny = DecoderConfig(32, 2, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> decode_steps(tiny, Work(np.array([[2, 3]]), prompt=5))[0] - 2 * (1152 + 32 * 8)
    array([224., 224.])
    """
    steps = np.arange(1, work.lengths.max())
    live = (work.lengths[..., None] > steps).sum((0, 1), dtype=np.float64)
    groups = (work.lengths.max(1)[:, None] > steps).sum(0, dtype=np.float64)
    weights = layer_parameters(config) + head_parameters(config)
    moved = NUMBER * weights + cache_bytes(config) * (live * steps + groups * work.prompt)
    computed = live * (2 * weights + _attention_flops(config) * (steps + work.prompt))
    return moved, computed


def prefill_flops(config: DecoderConfig, work: Work) -> float:
    """Operations that run the prompts once and make logits for their last positions."""
    prompts, seen = work.lengths.shape[0], (work.prompt + 1) / 2
    each = 2 * layer_parameters(config) + _attention_flops(config) * seen
    return prompts * (work.prompt * each + 2 * head_parameters(config))


def rollout_seconds(config: DecoderConfig, work: Work, device: Device) -> float:
    """The least time of a rollout: every step is bound by the bytes it moves or by what it computes."""
    moved, computed = decode_steps(config, work)
    steps = np.maximum(moved / device.bandwidth, computed / device.flops).sum()
    return float(steps) + prefill_flops(config, work) / device.flops


def update_flops(config: DecoderConfig, work: Work) -> float:
    """Operations of one gradient: 6 per weight and token, and attention; prompts are run once and make no logits.

    Nothing that is computed again in the backward pass counts.
    """
    lengths = work.lengths.astype(np.float64)
    prompts = work.lengths.shape[0]
    tokens = lengths.sum() + prompts * work.prompt
    seen = (lengths * (work.prompt + (lengths + 1) / 2)).sum() + prompts * work.prompt * (work.prompt + 1) / 2
    forward = 2 * layer_parameters(config) * tokens + 2 * head_parameters(config) * lengths.sum()
    return 3 * float(forward + _attention_flops(config) * seen)


def held_bytes(config: DecoderConfig) -> int:
    """float32 parameters, the two moments of Adam, and the gradient: what every update has in memory at once."""
    untied = 0 if config.tied else head_parameters(config)
    return 4 * 4 * (layer_parameters(config) + head_parameters(config) + untied)


def kept_bytes(config: DecoderConfig, tokens: int) -> int:
    """What a gradient of so many tokens has in memory beside `held_bytes`, where layers are computed again: their inputs.

    >>> kept_bytes(DecoderConfig(32, 2, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64), 10)
    320
    """
    return NUMBER * config.num_layers * config.d_model * tokens


def rollout_bytes(config: DecoderConfig, work: Work, spread: int = 1) -> int:
    """float32 parameters, a part of ``spread`` of them, their bfloat16 copy, and all keys and values, those of prompts once for
    their group.
    """
    untied = 0 if config.tied else head_parameters(config)
    parameters = layer_parameters(config) + head_parameters(config) + untied
    prompts, group = work.lengths.shape
    slots = prompts * (group * int(work.lengths.max()) + work.prompt)
    return 4 * parameters // spread + NUMBER * parameters + cache_bytes(config) * slots


def geometric_lengths(prompts: int, group: int, mean: float, longest: int, seed: int = 0) -> np.ndarray:
    """[P, G] lengths of completions that end at a token with probability 1 / mean, and at the latest at ``longest``."""
    return np.minimum(np.random.default_rng(seed).geometric(1 / mean, (prompts, group)), longest)


def _attention_flops(config: DecoderConfig) -> int:
    """Operations of one token for each that it sees: q·k and the sum of values."""
    return 4 * config.num_layers * config.num_heads * config.head_dim
