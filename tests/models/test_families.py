"""Every family against transformers' own logits (golden_families.json, made by make_golden_families.py), and its config.json."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from grpo_jax.models import init_params, load_pretrained, make_policy, read_config, save_pretrained
from grpo_jax.models.attention import RopeScaling
from grpo_jax.models.decoder import param_shapes
from grpo_jax.models.families import FAMILIES, config_entries
from grpo_jax.models.weight_names import expected_tensors
from grpo_jax.rollout import PromptBatch, sample_groups, score_groups
from tests.models import make_golden_families
from tests.models.make_golden_families import GOLDEN, make_weight

DATA = json.loads(GOLDEN.read_text())
CASES = DATA["cases"]
TOKENS = jnp.array(DATA["tokens"], jnp.int32)
ROWS, LENGTH = TOKENS.shape
STEPS = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), TOKENS.shape)
PROMPT = (
    9  # tokens that are prefilled where there is a cache or a prefix: longer than the windows, shorter than the rest
)


def write_config(folder, entries):
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{case: (config, policy, params)}, read from folders with the weights that transformers had."""
    loaded = {}
    for name, case in CASES.items():
        folder = write_config(tmp_path_factory.mktemp("model"), case["config"])
        config = read_config(folder)
        tensors = {t.name: make_weight(t.name, t.shape, config.offset_norm) for t in expected_tensors(config)}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        loaded[name] = config, *load_pretrained(folder)
    return loaded


def padded(x, left, right, fill):
    return jnp.pad(x, ((0, 0), (left, right)), constant_values=fill)


def alone(policy, params, left=0, right=0):
    """One forward; padding has junk for tokens and positions."""
    tokens, positions = padded(TOKENS, left, right, 39), padded(STEPS, left, right, 77)
    mask = padded(jnp.ones_like(TOKENS, bool), left, right, False)
    hidden, _ = jax.jit(policy.forward)(params, tokens, positions, mask)
    return hidden[:, left : left + LENGTH]


def cached(policy, params):
    """A prefill, then token by token."""
    real = jnp.ones_like(TOKENS, bool)
    forward = jax.jit(policy.forward)
    hidden, cache = forward(
        params,
        TOKENS[:, :PROMPT],
        STEPS[:, :PROMPT],
        real[:, :PROMPT],
        policy.init_cache(ROWS, LENGTH + 2),
        jnp.int32(0),
    )
    pieces = [hidden]
    for i in range(PROMPT, LENGTH):
        now = slice(i, i + 1)
        hidden, cache = forward(params, TOKENS[:, now], STEPS[:, now], real[:, now], cache, jnp.int32(i))
        pieces.append(hidden)
    return jnp.concatenate(pieces, 1)


def prefixed(policy, params, left, right, step):
    """As in sampling: a padded prompt in one cache, two completions of it in another, ``step`` tokens at a time."""
    forward = jax.jit(policy.forward)
    tokens, positions = padded(TOKENS[:, :PROMPT], left, right, 39), padded(STEPS[:, :PROMPT], left, right, 77)
    mask = padded(jnp.ones((ROWS, PROMPT), bool), left, right, False)
    first, prefix = forward(params, tokens, positions, mask, policy.init_cache(*tokens.shape))
    rest, at = (jnp.repeat(x[:, PROMPT:], 2, axis=0) for x in (TOKENS, STEPS))
    real, cache, pieces = jnp.ones_like(rest, bool), None, []
    if step < rest.shape[1]:
        cache = policy.init_cache(*rest.shape)
    for i in range(0, rest.shape[1], step):
        now = slice(i, i + step)
        hidden, cache = forward(params, rest[:, now], at[:, now], real[:, now], cache, jnp.int32(i), prefix)
        pieces.append(hidden)
    rest = jnp.concatenate(pieces, 1)
    np.testing.assert_allclose(rest[0::2], rest[1::2], atol=1e-5)  # both completions of a prompt are the same here
    return jnp.concatenate([first[:, left : left + PROMPT], rest[::2]], 1)


WAYS = {
    "alone": alone,
    "padded left": lambda policy, params: alone(policy, params, left=3),
    "padded right": lambda policy, params: alone(policy, params, right=3),
    "cached": cached,
    "prefix at once": lambda policy, params: prefixed(policy, params, 3, 0, LENGTH),
    "prefix token by token": lambda policy, params: prefixed(policy, params, 0, 3, 1),
}


def errors(case, policy, params, way):
    """|our logits - transformers'| at the places of the file, [rows, places, V]."""
    logits = policy.unembed(params, WAYS[way](policy, params))
    assert logits.dtype == jnp.float32
    return np.abs(np.asarray(logits)[:, DATA["places"]] - np.array(CASES[case]["logits"]))


# One case of each family in all ways; the others differ from it in frequencies alone.
ONE_OF_EACH = ("llama", "mistral", "smollm3", "qwen2 with a window", "qwen3", "gemma2", "gemma3")


@pytest.mark.parametrize(("case", "way"), [(c, w) for c in CASES for w in WAYS if w == "alone" or c in ONE_OF_EACH])
def test_logits_are_those_of_transformers(case, way, models):
    _, policy, params = models[case]
    assert sum(x.size for x in jax.tree.leaves(params)) == CASES[case]["parameters"]
    assert errors(case, policy, params, way).max() < 5e-5


@pytest.mark.parametrize(("case", "way"), [*((c, "alone") for c in ONE_OF_EACH), ("gemma3", "prefix token by token")])
def test_bfloat16_is_as_near_as_that_of_transformers(case, way, models):
    """Both round weights and activations to 8 bits, not at the same places; its own errors are in the file."""
    config, _, params = models[case]
    theirs = CASES[case]["bfloat16"]
    ours = errors(case, make_policy(replace(config, dtype="bfloat16")), params, way)
    assert 0.2 * theirs["mean"] < ours.mean() < 1.1 * theirs["mean"], (ours.mean(), theirs["mean"])
    assert ours.max() < 1.2 * theirs["max"], (ours.max(), theirs["max"])


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama linear", {"rope_scaling": None}),
        ("llama 3.1", {"rope_scaling": RopeScaling(8.0)}),
        ("mistral", {"window": 6}),
        ("smollm3", {"unrotated_layers": (1,)}),
        ("qwen2 with a window", {"local_layers": (0, 1, 2)}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"score_width": None}),
        ("gemma2", {"scale_embedding": False}),
        ("gemma2", {"activation": "silu"}),
        ("gemma2", {"offset_norm": False}),
        ("gemma3", {"local_rope_theta": None}),
        ("gemma3", {"rope_scaling": None}),
    ],
    ids=str,
)
def test_the_numbers_see_every_switch(case, change, models):
    config, _, params = models[case]
    assert errors(case, make_policy(replace(config, **change)), params, "alone").max() > 1e-3


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_gradients_are_finite_and_reach_every_parameter(case, models):
    config, policy, _ = models[case]
    params = init_params(config, jax.random.key(0))
    mask = jnp.arange(LENGTH)[None, :] >= jnp.array([[0], [6]])

    def loss(params):
        logits = policy.unembed(params, policy.forward(params, TOKENS, STEPS, mask)[0])
        return jnp.where(mask[:, :, None], jnp.sin(logits), 0.0).sum()

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert bool(jnp.isfinite(gradient).all()), path
        assert bool((gradient != 0).any()), path


@pytest.mark.parametrize("case", ["mistral", "gemma3"])
def test_sampled_log_probabilities_are_those_of_the_trainer(case, models):
    """Prompts and completions longer than the window of 5, and padded."""
    _, policy, params = models[case]
    mask = np.arange(12)[None] >= np.array([[0], [5]])
    prompts = PromptBatch(TOKENS[:, :12], jnp.asarray(mask), jnp.arange(2, dtype=jnp.int32))
    options = {"group_size": 3, "max_completion": 11, "stop_ids": (2,)}
    rollout = jax.jit(lambda key: sample_groups(policy, params, prompts, key, **options))(jax.random.key(0))
    assert int(rollout.mask.sum(-1).max()) == 11
    logps, _ = jax.jit(lambda: score_groups(policy, params, prompts, rollout.completions, rollout.mask))()
    difference = jnp.where(rollout.mask, rollout.logps - logps.reshape(rollout.logps.shape), 0.0)
    assert float(jnp.abs(difference).max()) < 1e-5
    joined = np.concatenate([TOKENS[1, 5:12], rollout.completions[1, 0]])[None]  # and of one forward without a cache
    at = jnp.arange(joined.shape[1], dtype=jnp.int32)[None]
    hidden, _ = policy.forward(params, jnp.asarray(joined), at, jnp.ones_like(at, bool))
    plain = jax.nn.log_softmax(policy.unembed(params, hidden))[0, 6:-1]
    plain = np.take_along_axis(np.asarray(plain), joined[0, 7:, None], 1)[:, 0]
    length = int(rollout.mask[1, 0].sum())
    np.testing.assert_allclose(rollout.logps[1, 0, :length], plain[:length], atol=1e-5)


# ------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_written_as_it_was_read(case, models, tmp_path):
    config, _, params = models[case]
    assert config.family == CASES[case]["config"]["model_type"]
    assert read_config(write_config(tmp_path, config_entries(config))) == config
    save_pretrained(tmp_path / "saved", config, params)
    assert read_config(tmp_path / "saved") == config
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(tmp_path / "saved")[1])


def test_both_ways_of_writing_mean_the_same(models, tmp_path):
    assert models["llama 3.1"][0] == models["llama 3.1, since 5"][0]
    old = CASES["gemma3"]["config"]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_local_base_freq", "rope_scaling")}
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0}}
    rope |= {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    assert (
        read_config(write_config(tmp_path, new | {"rope_parameters": rope, "dtype": "bfloat16"})) == models["gemma3"][0]
    )
    assert models["gemma3"][0].local_layers == (0, 1, 3)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    del new["sliding_window_pattern"]
    listed = new | {"rope_parameters": rope, "layer_types": kinds}
    assert read_config(write_config(tmp_path, listed)) == models["gemma3"][0]


LLAMA, MISTRAL, GEMMA2, GEMMA3 = (CASES[name]["config"] for name in ("llama", "mistral", "gemma2", "gemma3"))
QWEN2, SMOLLM3 = CASES["qwen2 with a window"]["config"], CASES["smollm3"]["config"]
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (LLAMA | {"model_type": "gemma3"}, "model_type is 'gemma3'; supported: 'llama', 'mistral'"),
        (LLAMA | {"model_type": ["llama"]}, "model_type is \\['llama'\\]"),
        (LLAMA | {"attention_bias": True}, "attention_bias=True is not supported"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling=.*rope_type must be one of default"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling=.*not supported"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling=.*factor missing"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling='linear' is not supported"),
        (LLAMA | {"rope_scaling": {"type": {"a": 1}}}, "rope_scaling=.*not supported"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling=.*not a RopeScaling that can be"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling=.*not a RopeScaling that can be"),
        (
            LLAMA | {"rope_scaling": make_golden_families.LLAMA3 | {"type": "llama3", "high_freq_factor": 1.0}},
            "rope_scaling=.*not a RopeScaling that can be",
        ),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast.* has no meaning here"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta=1000.* is not a positive number"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta=500.0 is not that of"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling and rope_parameters are both there",
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (MISTRAL | {"sliding_window": 0}, "window=0 is not a positive integer or None"),
        (MISTRAL | {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is more than 10000"),
        (QWEN2 | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (QWEN2 | {"max_window_layers": "2"}, "max_window_layers='2' is not a whole number from 0"),
        (QWEN2 | {"use_sliding_window": "no"}, "use_sliding_window='no' is not True or False"),
        (QWEN2 | {"layer_types": [SLIDING, FULL]}, "layer_types=.* for every layer"),
        (QWEN2 | {"layer_types": [SLIDING, FULL, "chunked_attention"]}, "layer_types=.* is not full_attention or"),
        (QWEN2 | {"layer_types": [SLIDING, FULL, [FULL]]}, "layer_types=.* is not full_attention or"),
        (QWEN2 | {"layer_types": [SLIDING] * 3, "use_sliding_window": False}, "window=None with local_layers"),
        (SMOLLM3 | {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, "no_rope_layers=.* for every layer"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is not a whole number from 1"),
        (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        (GEMMA2 | {"attn_logit_softcapping": -1}, "attention_softcap=-1 is not a positive number or None"),
        (GEMMA2 | {"sliding_window": None}, "sliding_window=None is not supported"),
        (GEMMA2 | {"query_pre_attn_scalar": None}, "query_pre_attn_scalar=None is not supported"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern=0 is not a whole number from 1"),
        (GEMMA3 | {"rope_local_base_freq": None}, "rope_local_base_freq=None is not supported"),
        (
            GEMMA3 | {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0}},
            "rope_parameters=.* it must be by full_attention and sliding_attention",
        ),
        (
            GEMMA3 | {"rope_scaling": None, "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "of sliding_attention is not supported",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(entries, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refusal:
        read_config(write_config(tmp_path, entries))
    assert str(tmp_path / "config.json") in str(refusal.value) and len(str(refusal.value)) < 1500


def test_a_family_that_has_no_such_model_is_not_saved(models, tmp_path):
    config, _, params = models["gemma3"]
    for change, message in (
        ({"family": "llama"}, "'llama' cannot have .*window=5.*qk_norm=True"),
        ({"attention_softcap": 7.0}, "'gemma3_text' cannot have attention_softcap=7.0"),
        ({"local_rope_theta": None}, "'gemma3_text' cannot have local_rope_theta=None"),
        ({"family": "bert"}, "model_type is 'bert'"),
    ):
        with pytest.raises(ValueError, match=message):
            config_entries(replace(config, **change))
    with pytest.raises(ValueError, match="cannot have"):
        save_pretrained(tmp_path / "model", replace(config, local_rope_theta=None), params)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_defaults_are_those_of_transformers(tmp_path):
    """What a config.json may leave out, by family; the values are those of transformers' configuration classes."""
    sizes = {k: v for k, v in make_golden_families.BASE.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    expected = {
        "llama": {"num_kv_heads": 4, "head_dim": 6, "tied": False, "rope_theta": 10000.0, "window": None},
        "mistral": {"head_dim": 6, "tied": False, "window": 4096, "local_layers": (0, 1, 2), "num_kv_heads": 8},
        "smollm3": {"num_kv_heads": 4, "tied": True, "rope_theta": 2e6, "unrotated_layers": ()},
        "qwen2": {"head_dim": 6, "tied": False, "window": None, "attention_bias": True, "num_kv_heads": 32},
        "qwen3": {"head_dim": 128, "tied": False, "window": None, "qk_norm": True, "num_kv_heads": 32},
        "gemma2": {"head_dim": 256, "window": 4096, "local_layers": (0, 2), "tied": True, "num_kv_heads": 4}
        | {"attention_softcap": 50.0, "logit_softcap": 30.0, "score_width": 256},
        "gemma3_text": {"head_dim": 256, "window": 4096, "local_layers": (0, 1, 2), "rope_theta": 1e6}
        | {"local_rope_theta": 1e4, "logit_softcap": None, "score_width": 256, "num_kv_heads": 4},
    }
    assert expected.keys() == FAMILIES.keys()
    for family, fields in expected.items():
        heads = 4 if fields.get("num_kv_heads", 4) == 4 else 32
        entries = sizes | {"model_type": family, "num_attention_heads": heads, "hidden_size": 6 * heads}
        config = read_config(write_config(tmp_path, entries))
        assert {name: getattr(config, name) for name in fields} == fields
        assert config.norm_epsilon == 1e-6


# --------------------------------------------------------------------------------------------------------- real models


def real(model_type, vocab, width, layers, heads, kv_heads, d_ff, length, **others):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "max_position_embeddings")
    sizes = dict(zip(names, (vocab, width, layers, heads, kv_heads, d_ff, length), strict=True))
    return (
        {"model_type": model_type, "torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0}
        | sizes
        | others
    )


SILU, QWEN = {"hidden_act": "silu"}, {"use_sliding_window": False, "tie_word_embeddings": True, "rope_theta": 1000000.0}
BIASLESS = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
SCALED = make_golden_families.LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
}
GEMMA |= {"cache_implementation": "hybrid", "rms_norm_eps": 1e-06}
# The entries of the published config.json files that matter, and the published number of parameters.
REAL = {
    "Llama-3.2-1B": (
        SILU
        | BIASLESS
        | real("llama", 128256, 2048, 16, 32, 8, 8192, 131072, head_dim=64, rms_norm_eps=1e-05, rope_scaling=SCALED)
        | {"rope_theta": 500000.0, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "TinyLlama-1.1B": (
        SILU | BIASLESS | real("llama", 32000, 2048, 22, 32, 4, 5632, 2048, rope_scaling=None, rope_theta=10000.0),
        1_100_048_384,
    ),
    "Mistral-7B-v0.1": (
        SILU | real("mistral", 32000, 4096, 32, 32, 8, 14336, 32768, sliding_window=4096, rope_theta=10000.0),
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        SILU | real("mistral", 32768, 4096, 32, 32, 8, 14336, 32768, sliding_window=None, rope_theta=1000000.0),
        7_248_023_552,
    ),
    "SmolLM2-135M": (
        SILU
        | BIASLESS
        | real("llama", 49152, 576, 30, 9, 3, 1536, 8192, rope_interleaved=False, rope_scaling=None, rope_theta=100000)
        | {"tie_word_embeddings": True},
        134_515_008,
    ),
    "SmolLM3-3B": (
        SILU
        | BIASLESS
        | real("smollm3", 128256, 2048, 36, 16, 4, 11008, 65536, no_rope_layers=[1, 1, 1, 0] * 9, rope_theta=5000000.0)
        | {"layer_types": ["full_attention"] * 36, "use_sliding_window": False, "sliding_window": None},
        3_075_098_624,
    ),
    "Qwen2.5-0.5B-Instruct": (
        SILU | QWEN | real("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, sliding_window=32768, max_window_layers=21),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        SILU
        | QWEN
        | real("qwen3", 151936, 1024, 28, 16, 8, 3072, 40960, head_dim=128, rope_scaling=None, sliding_window=None)
        | {"attention_bias": False, "max_window_layers": 28},
        596_049_920,
    ),
    "gemma-2-2b-it": (
        GEMMA
        | real("gemma2", 256000, 2304, 26, 8, 4, 9216, 8192, hidden_act="gelu_pytorch_tanh", sliding_window=4096)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0},
        2_614_341_888,
    ),
    "gemma-3-1b-it": (
        GEMMA
        | real("gemma3_text", 262144, 1152, 26, 4, 1, 6912, 32768, sliding_window=512, sliding_window_pattern=6)
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": None}
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000},
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_published_configs_have_the_published_number_of_parameters(name, tmp_path):
    entries, count = REAL[name]
    config = read_config(write_config(tmp_path, entries))
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config))) == count
    assert sum(int(np.prod(target.shape)) for target in expected_tensors(config)) == count
    assert read_config(write_config(tmp_path, config_entries(config))) == config
    assert len(config.local_layers) == {"Mistral-7B-v0.1": 32, "gemma-2-2b-it": 13, "gemma-3-1b-it": 22}.get(name, 0)
    hash(config)


@pytest.mark.slow
def test_transformers_loads_what_is_saved(models, tmp_path):
    """All tensors where it expects them, and the same logits; and we read the config.json that it then writes."""
    python = os.environ.get("GRPO_JAX_TRANSFORMERS_PYTHON")
    if not python:
        pytest.skip("set GRPO_JAX_TRANSFORMERS_PYTHON to an interpreter that has torch and transformers")
    expected, folders = {}, {}
    for i, (case, (config, policy, _)) in enumerate(models.items()):
        params = init_params(config, jax.random.key(i))
        folders[case] = str(tmp_path / str(i))
        save_pretrained(folders[case], config, params)
        expected[case] = policy.unembed(params, alone(policy, params))
    task = {"folders": folders, "tokens": DATA["tokens"], "out": str(tmp_path / "logits.npz")}
    (tmp_path / "task.json").write_text(json.dumps(task))
    script = Path(make_golden_families.__file__)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run([python, script, tmp_path / "task.json"], check=True, env=environment, timeout=1800)
    with np.load(tmp_path / "logits.npz") as theirs:
        assert set(theirs) == set(CASES)
        for case, logits in theirs.items():
            np.testing.assert_allclose(expected[case], logits, atol=2e-4, rtol=0, err_msg=case)
            assert read_config(Path(folders[case], "again")) == models[case][0]
