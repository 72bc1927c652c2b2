"""The families of decoders that Hugging Face folders hold, and what their config.json says."""

import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from grpo_jax.models.attention import RopeScaling
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.safetensors import plain_file, read_json

Entries = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model_type of config.json.

    Attributes:
      architecture: transformers' class.
      switches: fields of the decoder that the family implies.
      defaults: what a missing entry means, beyond `DEFAULTS`.
      reads: entries (decoder field: name), beyond `READS`.
      fixed: what the decoder does not do: entries that may only have these values, beyond `FIXED`.
      is_local: of (entries, layer): whether the layer has the window, where there is one; None: no layer has.
      lists_layers: whether the entry layer_types may say so instead.
      needs: entries that may be missing, but not null.
    """

    architecture: str
    switches: Entries = field(default_factory=dict)
    defaults: Entries = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    is_local: Callable[[Entries, int], bool] | None = None
    lists_layers: bool = False
    needs: tuple[str, ...] = ()


READS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_length": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
# What a missing entry means, in transformers 4 and 5. None: as many key heads as heads, and d_model / heads.
DEFAULTS: Entries = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
DEFAULTS |= {"rope_theta": 10000.0}
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
}
SILU = {"hidden_act": ("silu", "swish")}
GELU = {"hidden_activation": ("gelu_pytorch_tanh",)}
QWEN = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
GEMMA = {"offset_norm": True, "post_norms": True, "scale_embedding": True, "activation": "gelu_tanh"}
GEMMA_READS = {"score_width": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping"}
GEMMA_DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
GEMMA_DEFAULTS |= {"query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA_NEEDS = ("query_pre_attn_scalar", "sliding_window")

FAMILIES = {
    "llama": Family("LlamaForCausalLM", fixed=SILU),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        fixed=SILU,
        is_local=lambda entries, layer: True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        },
        fixed=SILU | {"use_sliding_window": (False,)},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        switches={"attention_bias": True},
        defaults=QWEN,
        fixed=SILU | {"attention_bias": (None, False, True)},  # it has biases, whatever this says
        is_local=lambda entries, layer: layer >= entries["max_window_layers"],
        lists_layers=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        switches={"qk_norm": True},
        defaults=QWEN | {"head_dim": 128},
        fixed=SILU,
        is_local=lambda entries, layer: layer >= entries["max_window_layers"],
        lists_layers=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        switches=GEMMA,
        defaults=GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        reads=GEMMA_READS | {"attention_softcap": "attn_logit_softcapping"},
        fixed=GELU,
        is_local=lambda entries, layer: layer % 2 == 0,
        lists_layers=True,
        needs=GEMMA_NEEDS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        switches=GEMMA | {"qk_norm": True},
        defaults=GEMMA_DEFAULTS
        | {
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        reads=GEMMA_READS,
        fixed=GELU | {"attn_logit_softcapping": (None,)},  # transformers reads it and does not apply it
        is_local=lambda entries, layer: (layer + 1) % entries["sliding_window_pattern"] != 0,
        lists_layers=True,
        needs=(*GEMMA_NEEDS, "rope_local_base_freq"),
    ),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES: dict[Any, tuple[str, ...]] = {  # what each needs, in the order of RopeScaling
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MOST_LAYERS = 10_000  # where layers are looked at one by one


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The config of a Hugging Face folder; ValueError naming what the decoder cannot do. Example: see ``load_pretrained``."""
    path = plain_file(Path(folder), "config.json")
    entries = read_json(path)
    try:
        return _decoder_config(entries)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {str(error)[:1000]}") from None


def config_entries(config: DecoderConfig) -> Entries:
    """What config.json says of a decoder, as transformers 4 and 5 read it: the inverse of `read_config`.

    Raises ValueError where the family of the config has no such model.

    >>> config = DecoderConfig(32, 1, 8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16, max_length=64, qk_norm=True)
    >>> config_entries(config)
    Traceback (most recent call last):
    ...
    ValueError: a folder of family 'llama' cannot have qk_norm=True
    """
    c, family = config, _family(config.family)
    entries: Entries = {"architectures": [family.architecture], "model_type": c.family, "torch_dtype": "float32"}
    entries |= {name: allowed[0] for name, allowed in (FIXED | family.fixed).items() if allowed[0] is not None}
    # Unknown here, and not what transformers would assume: tokens of the family's first model.
    entries |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    entries |= {theirs: getattr(c, ours) for ours, theirs in (READS | family.reads).items()}
    entries |= {"rope_theta": c.rope_theta, "rope_scaling": None}
    if c.rope_scaling is not None:
        kind = "linear" if c.rope_scaling.length is None else "llama3"
        entries["rope_scaling"] = {"rope_type": kind} | dict(zip(ROPE_TYPES[kind], c.rope_scaling, strict=False))
    if c.local_rope_theta is not None:
        entries["rope_local_base_freq"] = c.local_rope_theta
    if family.is_local is not None:
        entries["sliding_window"] = c.window
    if "use_sliding_window" in family.defaults:
        entries["use_sliding_window"] = c.window is not None
    if family.lists_layers:
        entries["layer_types"] = [LAYER_TYPES[i in c.local_layers] for i in range(c.num_layers)]
    if "no_rope_layer_interval" in family.defaults:
        entries["no_rope_layers"] = [int(i not in c.unrotated_layers) for i in range(c.num_layers)]
    again = replace(_decoder_config(entries), dtype=c.dtype, remat=c.remat)
    lost = [f"{f.name}={getattr(c, f.name)!r}" for f in fields(c) if getattr(c, f.name) != getattr(again, f.name)]
    if lost:
        raise ValueError(f"a folder of family {c.family!r} cannot have {', '.join(lost)}")
    return entries


def _family(name: Any) -> Family:
    if type(name) is not str or name not in FAMILIES:
        raise ValueError(f"model_type is {reprlib.repr(name)}; supported: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def _decoder_config(given: Entries) -> DecoderConfig:
    """The decoder that config.json describes; ValueError for what is none, TypeError or ArithmeticError for nonsense."""
    family = _family(given.get("model_type"))
    for name, allowed in (FIXED | family.fixed).items():
        if given.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name}={reprlib.repr(given[name])} is not supported; it must be {allowed[0]!r}")
    if empty := [name for name in family.needs if given.get(name, 0) is None]:
        raise ValueError(f"{empty[0]}=None is not supported")
    entries = DEFAULTS | family.defaults | given
    reads = READS | family.reads
    if missing := [theirs for theirs in reads.values() if theirs not in entries]:
        raise ValueError(f"{', '.join(missing)} missing")
    for name, least in (("max_window_layers", 0), ("sliding_window_pattern", 1), ("no_rope_layer_interval", 1)):
        if name in family.defaults and (type(entries[name]) is not int or entries[name] < least):
            raise ValueError(f"{name}={reprlib.repr(entries[name])} is not a whole number from {least}")
    values = {ours: entries[theirs] for ours, theirs in reads.items()}
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    if values["head_dim"] is None:
        values["head_dim"] = values["d_model"] // values["num_heads"]
    config = DecoderConfig(**values, **family.switches, family=given["model_type"])
    config = replace(config, **_windows(entries, family, config), unrotated_layers=_unrotated(entries, family, config))
    return replace(config, **_rope(given, entries, family, config))


def _layers(config: DecoderConfig) -> range:
    if config.num_layers > MOST_LAYERS:  # a number that nobody has compared with the weights
        raise ValueError(f"num_hidden_layers={config.num_layers} is more than {MOST_LAYERS}")
    return range(config.num_layers)


def _windows(entries: Entries, family: Family, config: DecoderConfig) -> Entries:
    """The fields window and local_layers."""
    if family.is_local is None:
        return {}
    used, window = entries.get("use_sliding_window", True), entries["sliding_window"]
    if type(used) is not bool:
        raise ValueError(f"use_sliding_window={reprlib.repr(used)} is not True or False")
    window = window if used else None
    local = tuple(i for i in _layers(config) if family.is_local(entries, i)) if window is not None else ()
    listed = entries.get("layer_types")
    if family.lists_layers and listed is not None:
        if type(listed) is not list or len(listed) != config.num_layers or any(t not in LAYER_TYPES for t in listed):
            raise ValueError(f"layer_types={reprlib.repr(listed)} is not {' or '.join(LAYER_TYPES)} for every layer")
        local = tuple(i for i, kind in enumerate(listed) if kind == LAYER_TYPES[True])
    return {"window": window if local else None, "local_layers": local}


def _unrotated(entries: Entries, family: Family, config: DecoderConfig) -> tuple[int, ...]:
    if "no_rope_layer_interval" not in family.defaults:
        return ()
    interval, listed = entries["no_rope_layer_interval"], entries.get("no_rope_layers")
    if listed is None:
        return tuple(range(interval - 1, len(_layers(config)), interval))
    if type(listed) is not list or len(listed) < config.num_layers or any(x not in (0, 1) for x in listed):
        raise ValueError(f"no_rope_layers={reprlib.repr(listed)} is not 0 or 1 for every layer")
    return tuple(i for i in range(config.num_layers) if not listed[i])


def _rope(given: Entries, entries: Entries, family: Family, config: DecoderConfig) -> Entries:
    """The fields rope_theta, rope_scaling and local_rope_theta, written as before or since transformers 5."""
    has_local = "rope_local_base_freq" in family.defaults
    name = "rope_scaling" if given.get("rope_parameters") is None else "rope_parameters"
    parameters = given.get(name) or {}
    if name == "rope_parameters" and given.get("rope_scaling") is not None:
        raise ValueError("rope_scaling and rope_parameters are both there")
    if type(parameters) is not dict:
        raise ValueError(f"{name}={reprlib.repr(parameters)} is not supported")
    local: Any = {}
    if has_local and name == "rope_parameters":
        if not set(parameters) <= set(LAYER_TYPES) or not all(type(x) is dict for x in parameters.values()):
            raise ValueError(
                f"{name}={reprlib.repr(parameters)} is not supported; it must be by {' and '.join(LAYER_TYPES)}"
            )
        parameters, local = (parameters.get(kind, {}) for kind in LAYER_TYPES)
    theta, scaling = _rotation(name, parameters, entries["rope_theta"])
    stated = given.get("rope_theta", theta)
    if stated != theta:
        raise ValueError(f"rope_theta={reprlib.repr(stated)} is not that of {name}={reprlib.repr(parameters)}")
    values: Entries = {"rope_theta": theta, "rope_scaling": scaling}
    if has_local and config.local_layers:
        values["local_rope_theta"], local_scaling = _rotation(name, local, entries["rope_local_base_freq"])
        if local_scaling is not None:
            raise ValueError(f"{name}={reprlib.repr(local)} of sliding_attention is not supported; only 'default' is")
    return values


def _rotation(name: str, parameters: Entries, theta: Any) -> tuple[Any, RopeScaling | None]:
    """theta and scaling of one dict of rope parameters."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    needed = ROPE_TYPES.get(kind) if type(kind) is str else None
    if needed is None:
        fault = f"rope_type must be one of {', '.join(ROPE_TYPES)}"
    elif missing := [key for key in needed if key not in parameters]:
        fault = f"{', '.join(missing)} missing"
    elif more := [key for key in parameters if key not in ("rope_type", "type", "rope_theta", *needed)]:
        fault = f"{reprlib.repr(more)} has no meaning here"
    else:
        scaling = RopeScaling(*(parameters[key] for key in needed)) if needed else None
        return parameters.get("rope_theta", theta), scaling
    raise ValueError(f"{name}={reprlib.repr(parameters)} is not supported: {fault}")
