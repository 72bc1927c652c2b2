"""Hugging Face checkpoint folders in and out: config.json and safetensors, Llama architecture.

A folder is untrusted: nothing in it is executed, every name, shape and type is compared with what config.json implies before
memory is allocated, and a setting that the decoder does not have is refused rather than ignored.
"""

import json
import os
import reprlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.models.decoder import DecoderConfig, Params, make_policy, param_shapes
from grpo_jax.models.stored import Stored, listed, plain_file, read_json, stored_tensors
from grpo_jax.rollout.policy import Policy

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


def load_pretrained(
    folder: str | os.PathLike[str], *, dtype: str = "float32", remat: bool = False
) -> tuple[Policy, Params]:
    """Reads a Hugging Face folder: (policy, float32 parameters).

    Needs config.json and model.safetensors, or model.safetensors.index.json and its shards; float16 and bfloat16 weights
    become float32. ``dtype`` and ``remat`` are `DecoderConfig`'s. Raises ValueError naming the file and what is wrong with
    it: another architecture, a setting that the decoder does not have, a missing, unexpected, duplicate or misshapen tensor,
    a damaged file, a weight that is not finite, a file outside the folder, or weights only as a pickle. Source: the formats
    of huggingface.co/docs/safetensors and of transformers' LlamaConfig.

    >>> from grpo_jax.models import init_params
    >>> config = DecoderConfig(32, 2, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64)
    >>> params = init_params(config, jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, config, params)
    ...     policy, again = load_pretrained(folder)
    >>> jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    True
    """
    folder = Path(folder)
    config = replace(read_config(folder), dtype=dtype, remat=remat)
    stored = stored_tensors(folder)
    _check_tensors(folder, config, stored)
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), param_shapes(config))
    for target in _targets(config):
        target.view(arrays)[...] = stored[target.name].read().T
    return make_policy(config), jax.tree.map(jnp.asarray, arrays)


def save_pretrained(folder: str | os.PathLike[str], config: DecoderConfig, params: Params) -> None:
    """Writes config.json and model.safetensors (float32) so that ``load_pretrained`` reads back exactly these parameters.

    Each file is written under a temporary name, then renamed. Raises ValueError where the parameters do not fit the config
    or are not finite. Tokenizer files are the caller's to copy. Example: see ``load_pretrained``.
    """
    expected = jax.tree.map(lambda leaf: leaf.shape, param_shapes(config))
    given = jax.tree.map(lambda leaf: leaf.shape, params)
    if given != expected:
        raise ValueError(f"parameters of shapes {given} do not fit the config, which implies {expected}")
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=np.float32), params)
    tensors = {target.name: np.ascontiguousarray(target.view(arrays).T) for target in _targets(config)}
    broken = [name for name, values in tensors.items() if not np.isfinite(values).all()]
    if broken:
        raise ValueError(f"not saved to {folder}: values that are not finite in {listed(broken)}")
    entries = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()}
    entries |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    entries |= {name: allowed[0] for name, allowed in FIXED.items() if allowed[0] is not None}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / "config.json", lambda path: path.write_text(json.dumps(entries, indent=2) + "\n"))


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


class _Target(NamedTuple):
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


def _targets(config: DecoderConfig) -> Iterator[_Target]:
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    out_in = {"query": (queries, c.d_model), "key": (keys, c.d_model), "value": (keys, c.d_model)}
    out_in |= {"output": (c.d_model, queries), "gate": (c.d_ff, c.d_model), "up": (c.d_ff, c.d_model)}
    out_in |= {"down": (c.d_model, c.d_ff)}
    yield _Target("model.embed_tokens.weight", (c.vocab_size, c.d_model), ("embedding",))
    yield _Target("model.norm.weight", (c.d_model,), ("final_norm",))
    if not c.tied:
        yield _Target("lm_head.weight", (c.vocab_size, c.d_model), ("unembedding",))
    for layer in range(c.num_layers):
        for ours, theirs in LAYER_NAMES.items():
            shape = out_in.get(ours, (c.d_model,))
            yield _Target(f"model.layers.{layer}.{theirs}.weight", shape, ("layers", ours), layer)


def _check_tensors(folder: Path, config: DecoderConfig, stored: dict[str, Stored]) -> None:
    if config.num_layers > len(stored):  # before a loop over layers whose number nobody has checked
        raise ValueError(f"{folder}: config.json has {config.num_layers} layers; the weights are {len(stored)} tensors")
    expected = {target.name: target.shape for target in _targets(config)}
    faults = []
    if missing := [name for name in expected if name not in stored]:
        faults.append(f"missing {listed(missing)}")
    if unexpected := [name for name in stored if name not in expected]:
        faults.append(f"unexpected {listed(unexpected)}")
    misshapen = [
        f"{name} of shape {list(stored[name].shape)} where config.json implies {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if misshapen:
        faults.append(listed(misshapen))
    if faults:
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(faults)}")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name, brings it to the disk, and renames it: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
