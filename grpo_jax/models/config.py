"""What tells one decoder from another: its sizes, and the switches by which the families of models differ."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import contains
from typing import Any

import jax

from grpo_jax.models.attention import RopeScaling

SIZES = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_length")
SWITCHES = ("tied", "attention_bias", "qk_norm", "offset_norm", "post_norms", "scale_embedding", "decode_kernel")
DTYPES = ("float32", "bfloat16")
COMPUTED = ("dtype", "remat", "query_block", "decode_kernel")  # fields of how sums are computed, not of which
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
PROJECTED = "projected"  # the name under which `jax.checkpoint` knows what products with weights make
# From a function to one whose backward pass computes again what it does not keep.
REMATS: dict[str, Callable[[Any], Any]] = {
    "none": lambda function: function,
    "dots": partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(PROJECTED)),
    "full": partial(jax.checkpoint, prevent_cse=False),
}


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of a decoder; refuses impossible ones. What has a default is Llama's.

    Attributes:
      max_length: the widest array of tokens or slots accepted.
      dtype: of the matrix products, float32 or bfloat16; they accumulate in float32, and norms, softmax and logits are
        float32.
      remat: what the backward pass computes again instead of keeping it, in calls without a cache: nothing (none), all of a
        layer but its products with weights (dots), or all of it (full).
      rope_scaling: of the rotations of layers that are not local, and of local ones too without ``local_rope_theta``.
      window: a query of a layer in ``local_layers`` sees only keys that lie fewer positions than this before it.
      local_rope_theta: that of the local layers, where it is not ``rope_theta``.
      unrotated_layers: layers that do not rotate queries and keys.
      attention_bias: queries, keys and values have one.
      qk_norm: queries and keys are normalised, head by head, before the rotation.
      offset_norm: norms multiply by 1 + weight.
      post_norms: what a block adds to the residual is normalised too.
      activation: of the gate, silu or gelu_tanh.
      scale_embedding: embeddings are multiplied by √d_model.
      score_width: attention scores are q·k / √score_width; None for head_dim.
      attention_softcap, logit_softcap: scores, and logits, x become cap · tanh(x / cap).
      query_block: of how many queries of a row the attention scores exist at once, None for all; see `choose_query_block`.
      decode_kernel: a token of each row is decoded by a loop over layers, with a kernel that reads the filled slots of a cache of
        all layers (tpu_attention.py). Where there is no such kernel, its sums are the plain ones.
      family: as which a folder is saved, the model_type of its config.json.

    Raises:
      ValueError: naming every number that cannot be.

    >>> DecoderConfig(32, 1, 8, num_heads=3, num_kv_heads=2, head_dim=4, d_ff=16, max_length=64)
    Traceback (most recent call last):
    ...
    ValueError: num_heads=3 is not a multiple of num_kv_heads=2
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tied: bool = True
    dtype: str = "float32"
    remat: str = "none"
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    local_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    qk_norm: bool = False
    offset_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    scale_embedding: bool = False
    score_width: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    query_block: int | None = None
    decode_kernel: bool = False
    family: str = "llama"

    def __post_init__(self) -> None:
        faults: list[str] = []

        def check(names: tuple[str, ...], kind: str, fits: Callable[[Any], bool]) -> None:
            values = {name: getattr(self, name) for name in names}
            faults.extend(f"{name}={value!r} is not {kind}" for name, value in values.items() if not fits(value))

        def check_optional(names: tuple[str, ...], kind: str, fits: Callable[[Any], bool]) -> None:
            check(names, f"{kind} or None", lambda x: x is None or fits(x))

        # What depends on several sizes is checked only while no fault is known.
        check(SIZES, "a positive integer", _is_size)
        if not faults and self.num_heads % self.num_kv_heads:
            faults.append(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if not faults and self.head_dim % 2:
            faults.append(f"head_dim={self.head_dim} is odd; the rotation needs pairs")
        if not faults:
            check(("local_layers", "unrotated_layers"), "a tuple of layers, ascending", self._are_layers)
        check_optional(("window", "score_width", "query_block"), "a positive integer", _is_size)
        check(("rope_theta", "norm_epsilon"), "a positive number", _is_positive)
        check_optional(("local_rope_theta", "attention_softcap", "logit_softcap"), "a positive number", _is_positive)
        check_optional(("rope_scaling",), "a RopeScaling that can be,", _is_scaling)
        check(SWITCHES, "True or False", lambda x: type(x) is bool)
        for name, choices in (("dtype", DTYPES), ("remat", REMATS), ("activation", ACTIVATIONS)):
            check((name,), " or ".join(choices), partial(contains, tuple(choices)))
        check(("family",), "a name", lambda x: type(x) is str)
        # A window and the layers that have it come together.
        if not faults and (self.window is None) != (not self.local_layers):
            faults.append(f"window={self.window} with local_layers={self.local_layers}; neither is without the other")
        if not faults and self.local_rope_theta is not None and not self.local_layers:
            faults.append(f"local_rope_theta={self.local_rope_theta} without local_layers")
        if faults:
            raise ValueError("; ".join(faults))

    def _are_layers(self, x: Any) -> bool:
        whole = type(x) is tuple and all(type(i) is int and 0 <= i < self.num_layers for i in x)
        return whole and list(x) == sorted(set(x))


def of_model(config: DecoderConfig) -> DecoderConfig:
    """What a folder says of it: the same model, however its sums are computed.

    >>> config = DecoderConfig(32, 1, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> of_model(replace(config, dtype="bfloat16", decode_kernel=True)) == config
    True
    """
    defaults: dict[str, Any] = {f.name: f.default for f in fields(config) if f.name in COMPUTED}
    return replace(config, **defaults)


def _is_size(x: Any) -> bool:
    return type(x) is int and x > 0


def _is_positive(x: Any) -> bool:
    return type(x) in (int, float) and 1e-30 < x < 1e30  # float32 holds it, and its inverse


def _is_scaling(x: Any) -> bool:
    if type(x) is not RopeScaling or not _is_positive(x.factor):
        return False
    bounds = [y for y in (x.low, x.high, x.length) if y is not None]
    return not bounds or (len(bounds) == 3 and all(map(_is_positive, bounds)) and bounds[0] < bounds[1])
