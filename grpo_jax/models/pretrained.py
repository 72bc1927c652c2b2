"""Hugging Face checkpoint folders in and out: config.json and safetensors, Llama architecture.

A folder is untrusted: nothing in it is executed, every name, shape and type is compared with what config.json implies before
memory is allocated, and a setting that the decoder does not have is refused rather than ignored.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.models.decoder import DecoderConfig, Params, make_policy, param_shapes
from grpo_jax.models.families import config_entries, read_config, tensor_targets
from grpo_jax.models.stored import Stored, listed, stored_tensors
from grpo_jax.rollout.policy import Policy


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
    for target in tensor_targets(config):
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
    tensors = {target.name: np.ascontiguousarray(target.view(arrays).T) for target in tensor_targets(config)}
    broken = [name for name, values in tensors.items() if not np.isfinite(values).all()]
    if broken:
        raise ValueError(f"not saved to {folder}: values that are not finite in {listed(broken)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / "config.json", lambda path: path.write_text(json.dumps(config_entries(config), indent=2) + "\n"))


def _check_tensors(folder: Path, config: DecoderConfig, stored: dict[str, Stored]) -> None:
    if config.num_layers > len(stored):  # before a loop over layers whose number nobody has checked
        raise ValueError(f"{folder}: config.json has {config.num_layers} layers; the weights are {len(stored)} tensors")
    expected = {target.name: target.shape for target in tensor_targets(config)}
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
