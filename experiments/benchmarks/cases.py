"""What every form of a benchmark is given: sizes, weights and data, in files that any library can read.

The weights are random, with one exception: the hidden states have a coordinate that no layer writes to, and the row of the
embedding that stands for the end of a completion reads this coordinate alone. So one number decides how often a completion
ends, in every library and with no code of its own: never for completions of fixed length, and after `MEAN_LENGTH` tokens on
average, but at T at the latest, for ragged ones. All forms sample from this one distribution.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import DecoderConfig, init_params, make_policy

PAD, EOS = 0, 1
NEVER = -40.0  # what the end's row holds where completions have a fixed length
WORKS = ("sampling", "update", "iteration")


class Case(NamedTuple):
    """One setting in which forms are compared; letters as in the dimension key of grpo_jax.

    Attributes:
      work: sampling, update or iteration.
      vocabulary: V.
      ragged: whether completions end by themselves.
      prompts, group, prompt_length, completion: P, G, S and T.
      layers, width, heads, kv_heads, head_dim, d_ff: of the decoder, which is Qwen2-like, float32, with tied embeddings.
      mean_length: of ragged completions, in tokens, before T cuts them.
    """

    work: str
    vocabulary: int
    ragged: bool
    prompts: int = 8
    group: int = 8
    prompt_length: int = 64
    completion: int = 128
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    d_ff: int = 1024
    mean_length: float = 40.0

    @property
    def name(self) -> str:
        """What baseline.json calls it."""
        return f"{self.work} {'ragged' if self.ragged else 'fixed'} {self.vocabulary}"


def quick(case: Case) -> Case:
    """The same in small: what the tests and a first look need.

    >>> quick(Case("update", 32000, True)).vocabulary
    2000
    """
    small: dict[str, Any] = {"prompts": 4, "group": 4, "prompt_length": 16, "completion": 32, "mean_length": 10.0}
    return case._replace(vocabulary=case.vocabulary // 16, layers=2, width=64, heads=4, kv_heads=2, d_ff=256, **small)


def decoder(case: Case) -> DecoderConfig:
    """The decoder of a case, as this project describes it."""
    return DecoderConfig(
        case.vocabulary,
        case.layers,
        case.width,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        d_ff=case.d_ff,
        max_length=case.prompt_length + case.completion,
        norm_epsilon=1e-6,
        attention_bias=True,
        family="qwen2",
    )


def write(case: Case, folder: Path) -> dict[str, Any]:
    """Writes ``weights.npz`` (arrays named and shaped as this project's parameters, with slashes) and ``data.npz`` into the
    folder, and returns the request that workers start with. Data: prompts [P, S], completions and mask [B, T], rewards [P, G].
    """
    generator = np.random.default_rng(0)
    prompts = generator.integers(2, case.vocabulary, (case.prompts, case.prompt_length), np.int32)
    rows = case.prompts * case.group
    completions = generator.integers(2, case.vocabulary, (rows, case.completion), np.int32)
    lengths = np.full(rows, case.completion)
    if case.ragged:
        drawn = generator.geometric(1 / case.mean_length, rows)
        ends = drawn <= case.completion
        lengths = np.minimum(drawn, case.completion)
        completions[np.flatnonzero(ends), lengths[ends] - 1] = EOS
    mask = np.arange(case.completion) < lengths[:, None]
    rewards = generator.integers(0, 2, (case.prompts, case.group)).astype(np.float32)
    np.savez(
        folder / "data.npz", prompts=prompts, completions=np.where(mask, completions, PAD), mask=mask, rewards=rewards
    )
    np.savez(
        folder / "weights.npz", allow_pickle=False, **_weights(case, np.repeat(prompts, case.group, 0), completions)
    )
    request = {**case._asdict(), "pad": PAD, "eos": EOS, "folder": str(folder)}
    (folder / "case.json").write_text(json.dumps(request), encoding="utf-8")
    return request


def _weights(case: Case, prompts: np.ndarray, completions: np.ndarray) -> dict[str, np.ndarray]:
    config = decoder(case)
    params = jax.tree.map(np.array, init_params(config, jax.random.key(0)))
    layers, embedding = params["layers"], params["embedding"]
    generator = np.random.default_rng(1)
    for name in ("query_bias", "key_bias", "value_bias"):
        layers[name] = 0.1 * generator.standard_normal(layers[name].shape, np.float32)
    layers["output"][:, :, 0] = layers["down"][:, :, 0] = 0.0
    embedding[:, 0] = 1.0
    embedding[EOS] = 0.0
    embedding[EOS, 0] = NEVER if not case.ragged else _end_row(case, config, params, prompts, completions)
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def _end_row(
    case: Case, config: DecoderConfig, params: dict[str, Any], prompts: np.ndarray, completions: np.ndarray
) -> float:
    """The number with which a completion ends at a token with probability 1 / mean_length on average."""
    policy = make_policy(config)
    tokens = jnp.array(np.concatenate([prompts, completions], 1)[:: case.group])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = policy.forward(params, tokens, positions, tokens >= 0)[0][:, case.prompt_length :: 8]
    logits = np.array(policy.unembed(params, hidden), np.float64)
    logits[..., EOS] = -np.inf
    others = np.log(np.exp(logits).sum(-1))
    direction = np.array(hidden[..., 0], np.float64)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        share = (1 / (1 + np.exp(others - direction * middle))).mean()
        low, high = (middle, high) if share < 1 / case.mean_length else (low, middle)
    return middle
