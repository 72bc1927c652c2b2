"""The families of decoders that Hugging Face folders hold, and what their config.json says."""

import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from grpo_jax.files import read_bounded_json
from grpo_jax.models.attention import RopeScaling
from grpo_jax.models.config import DecoderConfig, of_model
from grpo_jax.models.safetensors import JSON_LIMIT, plain_file

Entries = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model_type of config.json.

    Attributes:
      architecture: transformers' class.
      switches: fields of `DecoderConfig` that the family implies.
      defaults: what a missing entry means, beyond `DEFAULTS`.
      reads: {field of `DecoderConfig`: entry that it is read from}, beyond `READS`.
      fixed: {entry: its allowed values} where the decoder does nothing else, beyond `FIXED`.
      is_local: (entries, layer) -> whether the layer has the window, if there is one; None where no layer has it.
      lists_layers: whether the entry layer_types may say which layers have the window.
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


# {field of `DecoderConfig`: the entry of config.json that it is read from}
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
# What a missing entry means in transformers 4 and 5. None: as many key heads as heads, and d_model / heads.
DEFAULTS: Entries = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
}
# Entries with the only values that they may have; the first is what a missing entry means.
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
GEMMA_DEFAULTS = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
GEMMA_DEFAULTS |= {"query_pre_attn_scalar": 256}
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
        | {"final_logit_softcapping": None, "sliding_window_pattern": 6}
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        reads=GEMMA_READS,
        fixed=GELU | {"attn_logit_softcapping": (None,)},  # transformers reads it and does not apply it
        is_local=lambda entries, layer: (layer + 1) % entries["sliding_window_pattern"] != 0,
        lists_layers=True,
        needs=(*GEMMA_NEEDS, "rope_local_base_freq"),
    ),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES: dict[str, tuple[str, ...]] = {  # what each needs, in the order of RopeScaling
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MOST_LAYERS = 10_000  # of a config whose layers are looked at one by one


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The config of a Hugging Face folder; ValueError naming what the decoder cannot do. Example: see ``load_pretrained``."""
    path = plain_file(Path(folder), "config.json")
    entries = read_bounded_json(path, JSON_LIMIT)
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
    # A decoder does not know its special tokens; without these entries transformers would assume its own defaults.
    entries |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    entries |= {theirs: getattr(c, ours) for ours, theirs in (READS | family.reads).items()}

    # Rotations.
    entries |= {"rope_theta": c.rope_theta, "rope_scaling": None}
    if c.rope_scaling is not None:
        kind = "linear" if c.rope_scaling.length is None else "llama3"
        entries["rope_scaling"] = {"rope_type": kind} | dict(zip(ROPE_TYPES[kind], c.rope_scaling, strict=False))
    if c.local_rope_theta is not None:
        entries["rope_local_base_freq"] = c.local_rope_theta

    # What differs between layers.
    if family.is_local is not None:
        entries["sliding_window"] = c.window
    if "use_sliding_window" in family.defaults:
        entries["use_sliding_window"] = c.window is not None
    if family.lists_layers:
        entries["layer_types"] = [LAYER_TYPES[i in c.local_layers] for i in range(c.num_layers)]
    if "no_rope_layer_interval" in family.defaults:
        entries["no_rope_layers"] = [int(i not in c.unrotated_layers) for i in range(c.num_layers)]

    # A family may have no entry for a field of the config; then another config would be read back.
    c, read_back = of_model(c), _decoder_config(entries)
    lost = [f"{f.name}={getattr(c, f.name)!r}" for f in fields(c) if getattr(c, f.name) != getattr(read_back, f.name)]
    if lost:
        raise ValueError(f"a folder of family {c.family!r} cannot have {', '.join(lost)}")
    return entries


def _require(fits: bool, name: str, value: Any, fault: str) -> None:
    if not fits:
        raise ValueError(f"{name}={reprlib.repr(value)} {fault}")


def _family(name: Any) -> Family:
    if type(name) is not str or name not in FAMILIES:
        raise ValueError(f"model_type is {reprlib.repr(name)}; supported: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def _decoder_config(stated: Entries) -> DecoderConfig:
    """The decoder that config.json describes; ValueError for what is none, TypeError or ArithmeticError for nonsense."""
    family = _family(stated.get("model_type"))
    # Refuse what the decoder does not do.
    for name, allowed in (FIXED | family.fixed).items():
        value = stated.get(name, allowed[0])
        _require(value in allowed, name, value, f"is not supported; it must be {allowed[0]!r}")
    for name in family.needs:
        _require(stated.get(name, 0) is not None, name, None, "is not supported")

    # Add the defaults.
    entries = DEFAULTS | family.defaults | stated
    reads = READS | family.reads
    if missing := [theirs for theirs in reads.values() if theirs not in entries]:
        raise ValueError(f"{', '.join(missing)} missing")
    for name, least in (("max_window_layers", 0), ("sliding_window_pattern", 1), ("no_rope_layer_interval", 1)):
        if name in family.defaults:
            fits = type(entries[name]) is int and entries[name] >= least
            _require(fits, name, entries[name], f"is not a whole number from {least}")

    # The sizes first; what differs between layers needs them.
    values = {ours: entries[theirs] for ours, theirs in reads.items()}
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    if values["head_dim"] is None:
        values["head_dim"] = values["d_model"] // values["num_heads"]
    config = DecoderConfig(**values, **family.switches, family=stated["model_type"])
    config = replace(config, **_windows(entries, family, config), unrotated_layers=_unrotated(entries, family, config))
    return replace(config, **_rope(stated, entries, family, config))


def _layers(config: DecoderConfig) -> range:
    if config.num_layers > MOST_LAYERS:  # a number that nobody has compared with the weights
        raise ValueError(f"num_hidden_layers={config.num_layers} is more than {MOST_LAYERS}")
    return range(config.num_layers)


def _windows(entries: Entries, family: Family, config: DecoderConfig) -> Entries:
    """The fields window and local_layers."""
    if family.is_local is None:
        return {}
    used = entries.get("use_sliding_window", True)
    _require(type(used) is bool, "use_sliding_window", used, "is not True or False")
    window = entries["sliding_window"] if used else None
    local = tuple(i for i in _layers(config) if family.is_local(entries, i)) if window is not None else ()
    kinds = entries.get("layer_types")
    if family.lists_layers and kinds is not None:
        fits = type(kinds) is list and len(kinds) == config.num_layers and all(kind in LAYER_TYPES for kind in kinds)
        _require(fits, "layer_types", kinds, f"is not {' or '.join(LAYER_TYPES)} for every layer")
        local = tuple(i for i, kind in enumerate(kinds) if kind == LAYER_TYPES[True])
    return {"window": window if local else None, "local_layers": local}


def _unrotated(entries: Entries, family: Family, config: DecoderConfig) -> tuple[int, ...]:
    if "no_rope_layer_interval" not in family.defaults:
        return ()
    interval, rotates = entries["no_rope_layer_interval"], entries.get("no_rope_layers")  # 1: this layer does rotate
    if rotates is None:
        return tuple(range(interval - 1, len(_layers(config)), interval))
    fits = type(rotates) is list and len(rotates) >= config.num_layers and all(x in (0, 1) for x in rotates)
    _require(fits, "no_rope_layers", rotates, "is not 0 or 1 for every layer")
    return tuple(i for i in range(config.num_layers) if not rotates[i])


def _rope(stated: Entries, entries: Entries, family: Family, config: DecoderConfig) -> Entries:
    """The fields rope_theta, rope_scaling and local_rope_theta, written as before or since transformers 5."""
    has_local = "rope_local_base_freq" in family.defaults
    name = "rope_scaling" if stated.get("rope_parameters") is None else "rope_parameters"
    parameters = stated.get(name) or {}
    if name == "rope_parameters" and stated.get("rope_scaling") is not None:
        raise ValueError("rope_scaling and rope_parameters are both there")
    _require(type(parameters) is dict, name, parameters, "is not supported")

    # Where local layers have rotations of their own, transformers 5 has a dict of parameters for each kind of layer.
    local: Any = {}
    if has_local and name == "rope_parameters":
        fits = set(parameters) <= set(LAYER_TYPES) and all(type(x) is dict for x in parameters.values())
        _require(fits, name, parameters, f"is not supported; it must be by {' and '.join(LAYER_TYPES)}")
        parameters, local = (parameters.get(kind, {}) for kind in LAYER_TYPES)
    theta, scaling = _rotation(name, parameters, entries["rope_theta"])
    stated_theta = stated.get("rope_theta", theta)
    _require(stated_theta == theta, "rope_theta", stated_theta, f"is not that of {name}={reprlib.repr(parameters)}")
    values: Entries = {"rope_theta": theta, "rope_scaling": scaling}
    if has_local and config.local_layers:
        values["local_rope_theta"], local_scaling = _rotation(name, local, entries["rope_local_base_freq"])
        _require(local_scaling is None, name, local, "of sliding_attention is not supported; only 'default' is")
    return values


def _rotation(name: str, parameters: Entries, theta: Any) -> tuple[Any, RopeScaling | None]:
    """theta and scaling of one dict of rope parameters."""
    kind: Any = parameters.get("rope_type", parameters.get("type", "default"))
    known = type(kind) is str and kind in ROPE_TYPES
    _require(known, name, parameters, f"is not supported: rope_type must be one of {', '.join(ROPE_TYPES)}")
    needed = ROPE_TYPES[kind]
    missing = [key for key in needed if key not in parameters]
    _require(not missing, name, parameters, f"is not supported: {', '.join(missing)} missing")
    more = [key for key in parameters if key not in ("rope_type", "type", "rope_theta", *needed)]
    _require(not more, name, parameters, f"is not supported: {reprlib.repr(more)} has no meaning here")
    scaling = RopeScaling(*(parameters[key] for key in needed)) if needed else None
    return parameters.get("rope_theta", theta), scaling
