"""Hugging Face checkpoint folders in and out: config.json and safetensors, read and written as a stream.

A folder is untrusted: nothing in it is executed, every name, shape and type is compared with what config.json implies before
memory is allocated, and a setting that the decoder does not have is refused rather than ignored.
"""

import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from grpo_jax.files import write_text
from grpo_jax.models.config import of_model
from grpo_jax.models.decoder import DecoderConfig, Params, make_policy, param_shapes
from grpo_jax.models.families import config_entries, read_config
from grpo_jax.models.lora import Lora
from grpo_jax.models.safetensors import CHUNK, INDEX, SINGLE, StoredTensor, open_tensors, printable
from grpo_jax.models.weight_names import LAYER_NAMES, ExpectedTensor, adapter_tensors, expected_tensors
from grpo_jax.rollout.policy import Policy

COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # saved by older transformers; never read
SHARD = re.compile(r"model-(\d+-)?\d{5}-of-\d{5}\.safetensors")
Tensors = list[tuple[ExpectedTensor, StoredTensor]]  # of one parameter
STORED = {  # how weights may be written: safetensors' name, and the type
    "float32": ("F32", np.dtype("<f4")),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype("<f2")),
}
STAGING = ".saving-"  # how the name of a folder begins in which a save prepares its files


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    remat: str = "none",
    shardings: Callable[[Any], Any] | None = None,
) -> tuple[Policy, Params]:
    """Reads a Hugging Face folder: (policy, float32 parameters).

    Needs config.json and model.safetensors, or model.safetensors.index.json and its shards; float16 and bfloat16 weights
    become float32. ``dtype`` and ``remat`` are `DecoderConfig`'s. ``shardings`` is a function from the tree of the
    parameters' ``jax.ShapeDtypeStruct`` to a tree of shardings; without it they lie on the default device. Each process
    reads what its devices hold, one device's share of one array at a time: beside the arrays, the host never holds more.

    Raises ValueError naming the file and what is wrong with it: another architecture, a setting that the decoder does not
    have, a missing, unexpected, duplicate or misshapen tensor, a damaged file, a weight that is not finite, a file outside
    the folder, more than the memory there is, or weights only as a pickle. Source: the formats of
    huggingface.co/docs/safetensors and of transformers' config.json.

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
    stated = read_config(folder)
    config = replace(stated, dtype=dtype, remat=remat)
    with ExitStack() as files:
        # Check everything that is known before a weight is read.
        stored = open_tensors(folder, files)
        if read_config(folder) != stated:
            raise ValueError(f"{folder}: another model was saved here just now; load it again")
        _check_tensors(folder, config, stored)
        shapes = param_shapes(config)
        default = jnp.zeros(()).sharding
        placed = jax.tree.map(lambda _: default, shapes) if shardings is None else shardings(shapes)
        _check_memory(folder, shapes, placed)

        # Read each parameter from its tensors: one, or one of each layer.
        tensors_of: dict[str, Tensors] = defaultdict(list)
        for tensor in expected_tensors(config):
            tensors_of[tensor.parameter].append((tensor, stored[tensor.name]))

        def read(path: Any, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
            return _read_parameter(leaf.shape, sharding, tensors_of[path[-1].key], committed=shardings is not None)

        params = jax.tree_util.tree_map_with_path(read, shapes, placed)
    return make_policy(config), params


def check_pretrained(folder: str | os.PathLike[str]) -> None:
    """Raises what `load_pretrained` would, as far as config.json and the headers of the weights tell: in milliseconds."""
    folder = Path(folder)
    with ExitStack() as files:
        _check_tensors(folder, read_config(folder), open_tensors(folder, files))


def save_pretrained(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes config.json and weights so that ``load_pretrained`` reads back exactly these parameters, or rounded to ``dtype``.

    ``dtype`` is float32, bfloat16 or float16. Weights of more than ``max_shard_bytes`` become several files with an index. The
    host holds one tensor at a time. Whoever reads meanwhile, or after a crash at any point, finds the old model or the new one;
    only where the old model is of another config, the folder has no config.json for a moment. Files of the model that was there
    before are removed.

    Raises ValueError where the parameters do not fit the config, or are not finite in ``dtype``: the folder is then as it was.
    Tokenizer files are the caller's to copy. Example: see ``load_pretrained``.
    """
    wanted, shapes = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (param_shapes(config), params))
    if shapes != wanted:
        raise ValueError(f"parameters of shapes {shapes} do not fit the config, which implies {wanted}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is not positive")
    if dtype not in STORED:
        raise ValueError(f"dtype={dtype!r} is not {', '.join(STORED)}")
    entries = config_entries(config) | {"torch_dtype": dtype}
    size = STORED[dtype][1].itemsize
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _divide(expected_tensors(config), size, max_shard_bytes)
    names = _unused_names(folder, len(parts)) if len(parts) > 1 else [SINGLE]
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder) as staging:
        # Prepare all files beside the model that is there.
        staged = Path(staging)
        for name, part in zip(names, parts, strict=True):
            _write_tensors(staged / name, folder, part, params, dtype)
        weight_map = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
        total = sum(size * tensor.size for part in parts for tensor in part)
        _write_json(staged / "config.json", entries)
        _write_json(staged / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

        # Put them in its place, so that whatever is read at any moment belongs together.
        if not _holds(folder, config):  # a config must never stand beside the other's weights
            (folder / "config.json").unlink(missing_ok=True)
        for name in names:  # shards under names that no index mentions; or the one file, which is then what is read
            os.replace(staged / name, folder / name)
        if len(parts) > 1:
            _sync(folder)
            os.replace(staged / INDEX, folder / INDEX)
            (folder / SINGLE).unlink(missing_ok=True)  # which was read instead of the index
        os.replace(staged / "config.json", folder / "config.json")
        _sync(folder)

        # Remove what belongs to the old model, or to a save that was killed.
        if len(parts) == 1:
            (folder / INDEX).unlink(missing_ok=True)
        for path in list(folder.iterdir()):
            if SHARD.fullmatch(path.name) and path.name not in names:
                path.unlink()
            elif path.name.startswith(STAGING) and path != staged:
                shutil.rmtree(path)


def save_adapters(
    folder: str | os.PathLike[str], lora: Lora, adapters: dict[str, Any], *, base: str, dtype: str = "float32"
) -> None:
    """Writes adapters into a folder that PEFT loads: adapter_config.json and adapter_model.safetensors.

    ``adapters`` are as `Lora.init` makes them, not multiplied by α/r; ``base`` names the model that they belong to. Raises
    ValueError where they are not finite in ``dtype``. Source: the format of PEFT's LoraConfig; PEFT itself has read such a folder
    (experiments/LOG.md).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(adapter_tensors(adapters))
    _write_tensors(folder / "adapter_model.safetensors", folder, tensors, {"layers": adapters}, dtype)
    modules = [LAYER_NAMES[name].removesuffix(".weight").rpartition(".")[2] for name in lora.targets]
    entries = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    entries |= {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }
    _write_json(folder / "adapter_config.json", entries)
    _sync(folder)


def _read_parameter(shape: tuple[int, ...], sharding: Sharding, tensors: Tensors, *, committed: bool) -> jax.Array:
    """One parameter from its tensors, share by share; a share that several devices hold is read once."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders[bounds].append(device if committed else None)
    shares: list[jax.Array] = []
    for bounds, devices in holders.items():
        values = _read_share(bounds, tensors)
        shares += jax.block_until_ready([jax.device_put(values, device) for device in devices])
        del values  # before the next is allocated
    return jax.make_array_from_single_device_arrays(shape, sharding, shares) if committed else shares[0]


def _read_share(bounds: tuple[tuple[int, int], ...], tensors: Tensors) -> np.ndarray:
    """The part of a parameter between (start, stop) of each axis."""
    share = _empty(tuple(stop - start for start, stop in bounds))
    starts = tuple(start for start, _ in bounds)
    for tensor, stored in tensors:
        block, start = share, starts
        if tensor.layer is not None:
            if not bounds[0][0] <= tensor.layer < bounds[0][1]:
                continue
            block, start = share[tensor.layer - bounds[0][0]], starts[1:]
        if tensor.is_transposed:
            block, start = block.T, start[::-1]
        stored.read(block, start)
    return share


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 memory off the boundaries of 64 bytes: the CPU device would share it, and what is shared cannot be donated."""
    size = math.prod(shape)
    memory = np.empty(size + 16, np.float32)
    skip = (32 - memory.ctypes.data) % 64 // 4
    return memory[skip : skip + size].reshape(shape)


def _check_tensors(folder: Path, config: DecoderConfig, stored: dict[str, StoredTensor]) -> None:
    if config.num_layers > len(stored):  # before a loop over layers whose number nobody has checked
        raise ValueError(f"{folder}: config.json has {config.num_layers} layers; the weights are {len(stored)} tensors")
    expected = {tensor.name: tensor.shape for tensor in expected_tensors(config)}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected and not COMPUTED.fullmatch(name)]
    misshapen = [
        f"{name} of shape {list(stored[name].shape)} where config.json implies {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = [f"missing {printable(missing)}"] if missing else []
    if config.tied and "lm_head.weight" in unexpected and not missing:  # a copy of the embedding says nothing new
        if not stored["lm_head.weight"].equals(stored["model.embed_tokens.weight"]):
            faults.append("lm_head.weight is not the embedding, though tie_word_embeddings says so")
        unexpected.remove("lm_head.weight")
    faults += [f"unexpected {printable(unexpected)}"] if unexpected else []
    faults += [printable(misshapen)] if misshapen else []
    if faults:
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(faults)}")


def _check_memory(folder: Path, shapes: Any, shardings: Any) -> None:
    """Refuses what cannot fit before any of it is allocated: config.json and a file of zeros may agree on any size."""
    needed: Counter[Any] = Counter()  # bytes by device; all CPU devices share the memory of the host
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        for device in sharding.addressable_devices:
            size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            needed["host" if device.platform == "cpu" else device] += size
    for device, size in needed.items():
        if device == "host":
            limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
        if size > limit:
            raise ValueError(
                f"{folder}: its weights need {size / 1e9:.1f} GB as float32 where there are {limit / 1e9:.1f} GB: "
                "take a smaller model, or spread it over more devices"
            )


def _divide(tensors: Iterable[ExpectedTensor], item: int, most: int) -> list[list[ExpectedTensor]]:
    """Tensors, of so many bytes a number, in files of at most ``most``; one that is larger has a file of its own."""
    parts: list[list[ExpectedTensor]] = []
    room = 0
    for tensor in tensors:
        if not parts or item * tensor.size > room:
            parts.append([])
            room = most
        parts[-1].append(tensor)
        room -= item * tensor.size
    return parts


def _unused_names(folder: Path, count: int) -> list[str]:
    """Names of shards; other ones where the folder has files of these, which may be the model that is still read."""
    for attempt in itertools.count(1):
        stem = "model" if attempt == 1 else f"model-{attempt}"
        names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if not any(os.path.lexists(folder / name) for name in names):
            break
    return names


def _holds(folder: Path, config: DecoderConfig) -> bool:
    """Whether the folder has a model of this config."""
    try:
        return of_model(read_config(folder)) == of_model(config)
    except ValueError:
        return False


def _write_tensors(path: Path, folder: Path, tensors: list[ExpectedTensor], params: Params, dtype: str) -> None:
    """A safetensors file, a tensor at a time; ``folder`` is for messages."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    (label, stored), end = STORED[dtype], 0
    for tensor in tensors:
        nbytes = stored.itemsize * tensor.size
        header[tensor.name] = {"dtype": label, "shape": tensor.shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            name, layer = tensor.parameter, tensor.layer
            values = np.asarray(params[name] if layer is None else params["layers"][name][layer])
            values = values.T if tensor.is_transposed else values
            rows = max(1, CHUNK // (4 * tensor.size // len(values)))  # written at a time
            for first in range(0, len(values), rows):
                with np.errstate(over="ignore"):
                    block = np.ascontiguousarray(values[first : first + rows], stored)
                if not np.isfinite(block).all():
                    raise ValueError(f"not saved to {folder}: values that are not finite in {tensor.name} as {dtype}")
                file.write(block.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, entries: dict[str, Any]) -> None:
    write_text(path, json.dumps(entries, indent=2) + "\n")


def _sync(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
