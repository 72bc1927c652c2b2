"""Checkpoint folders: exact round trips, the same weights as the safetensors package reads, and hostile folders refused fast."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from grpo_jax.models import DecoderConfig, init_params, load_pretrained, make_policy, read_config, save_pretrained

CONFIG = DecoderConfig(11, 2, 8, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=10, max_length=32, rope_theta=123.0)
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, init_params(CONFIG, jax.random.key(0)))
    return tmp_path / "model"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tied=False, norm_epsilon=1e-6)], ids=["tied", "untied"])
def test_a_saved_model_is_read_back_exactly(tmp_path, config):
    params = init_params(config, jax.random.key(0))
    save_pretrained(tmp_path / "new" / "model", config, params)
    policy, again = load_pretrained(tmp_path / "new" / "model")
    same(params, again)
    assert read_config(tmp_path / "new" / "model") == config
    assert sorted(os.listdir(tmp_path / "new" / "model")) == ["config.json", "model.safetensors"]
    tokens = jnp.arange(5, dtype=jnp.int32)[None]
    expected, _ = make_policy(config).forward(params, tokens, tokens, tokens >= 0)
    np.testing.assert_array_equal(policy.forward(again, tokens, tokens, tokens >= 0)[0], expected)
    save_pretrained(tmp_path / "new" / "model", config, jax.tree.map(lambda x: x * 2, params))
    same(jax.tree.map(lambda x: x * 2, params), load_pretrained(tmp_path / "new" / "model")[1])


def test_names_and_orientation_are_those_of_torch(folder):
    """The file as the safetensors package reads it: torch's [out, in] matrices under transformers' names."""
    _, params = load_pretrained(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert len(tensors) == 2 + 9 * CONFIG.num_layers
    assert tensors[QUERY].shape == (24, 8) and tensors["model.layers.0.mlp.down_proj.weight"].shape == (8, 10)
    np.testing.assert_array_equal(tensors[QUERY].T, params["layers"]["query"][1])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding"])
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 2


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_files_become_float32(folder, dtype):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file({k: v.astype(dtype) for k, v in tensors.items()}, folder / "model.safetensors")
    policy, params = load_pretrained(folder, dtype="bfloat16")
    assert params["embedding"].dtype == jnp.float32 and policy.init_cache(1, 1)["k"][0].dtype == jnp.bfloat16
    expected = tensors[QUERY].T.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(params["layers"]["query"][1], expected)


def test_shards_equal_the_single_file(folder):
    _, expected = load_pretrained(folder)
    split_into_shards(folder)
    same(expected, load_pretrained(folder)[1])


def test_a_real_checkpoint_is_saved_again_byte_for_byte(shared, tmp_path):
    source = shared / "models" / "stories260k"
    _, params = load_pretrained(source)
    save_pretrained(tmp_path, read_config(source), params)
    before, after = (safetensors.numpy.load_file(f / "model.safetensors") for f in (source, tmp_path))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.tobytes() == after[name].tobytes() and values.shape == after[name].shape


def test_parameters_that_do_not_fit_or_are_not_finite_are_not_saved(folder):
    _, params = load_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="do not fit the config"):
        save_pretrained(folder, replace(CONFIG, tied=False), params)
    with pytest.raises(ValueError, match=r"not finite in model\.norm\.weight"):
        save_pretrained(folder, CONFIG, params | {"final_norm": params["final_norm"].at[3].set(jnp.inf)})
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(folder, CONFIG, init_params(CONFIG, jax.random.key(1)))
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------------------------------------------- hostile folders


def edit_config(**entries):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return edit


def edit_header(change):
    """``change`` gets the header's text and returns another; the data stay."""

    def edit(folder):
        whole = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = change(whole[8 : 8 + length].decode()).encode()
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])

    return edit


def edit_entry(**entries):
    def change(text):
        header = json.loads(text)
        header[NORM] |= entries
        return json.dumps(header)

    return edit_header(change)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def split_into_shards(folder, change=lambda where: None, drop=()):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: tensors[n] for n in tensors if where[n] == file}, folder / file)
    change(where)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def shards(change):
    return lambda folder: split_into_shards(folder, change)


def move_weights(folder, name, how):
    """The weights lie under ``name``, put there by ``how(outside path, link path)``."""
    outside = folder.parent / "outside.safetensors"
    os.rename(folder / "model.safetensors", outside)
    how(outside, folder / name)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def fifo(name):
    def make(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def hole(text):
    """The tensors after the first move back by 64 bytes, and so does the end of the file."""
    header = json.loads(text)
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] > 0:
            entry["data_offsets"] = [offset + 64 for offset in entry["data_offsets"]]
    return json.dumps(header)


def with_hole(folder):
    edit_header(hole)(folder)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + 64)


def vast_file_of_zeros(folder):
    """A terabyte that takes no space, and a config that it fits."""
    rows = 10**12 // (4 * CONFIG.d_model)
    edit_config(vocab_size=rows)(folder)
    header = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    shift = rows * 4 * CONFIG.d_model - CONFIG.vocab_size * 4 * CONFIG.d_model
    begin = header["model.embed_tokens.weight"]["data_offsets"][0]
    for name, entry in header.items():
        if name == "model.embed_tokens.weight":
            entry["shape"][0], entry["data_offsets"][1] = rows, entry["data_offsets"][1] + shift
        elif "data_offsets" in entry and entry["data_offsets"][0] > begin:
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    end = max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)


def linked(name, target):
    def link(folder):
        (folder / name).unlink()
        os.symlink(target, folder / name)

    return link


def index_then(change):
    def damage(folder):
        split_into_shards(folder)
        change(folder)

    return damage


INDEX = "model.safetensors.index.json"


def several_layers_in_two_files(where):
    """The index sends a tensor to the file that does not hold it."""
    where[QUERY] = "model-00001-of-00002.safetensors" if "2-of" in where[QUERY] else "model-00002-of-00002.safetensors"


def empties(count):
    return ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))


HOSTILE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (write("config.json", b"{'a': 1}"), "config.json: JSON that cannot be read"),
    "config not UTF-8": (write("config.json", b'{"a": "\xff\xfe"}'), "config.json: JSON that cannot be read"),
    "config a list": (write("config.json", b"[]"), "config.json: its JSON is not an object"),
    "config deep": (write("config.json", b"[" * 100_000), "config.json: JSON that cannot be read"),
    "config huge number": (
        write("config.json", b'{"a":' + b"9" * 5000 + b"}"),
        "config.json: JSON that cannot be read",
    ),
    "config large": (write("config.json", b" " * (9 << 20)), "config.json: more than 2097152 bytes"),
    "config duplicate": (write("config.json", b'{"a":1,"a":2}'), "config.json: .*duplicate a"),
    "config a FIFO": (fifo("config.json"), "config.json: not a regular file"),
    "other family": (edit_config(model_type="mamba"), "model_type is 'mamba'; supported: 'llama'"),
    "other family, 1e12 layers": (
        edit_config(model_type="gemma3_text", num_hidden_layers=10**12),
        "config.json: .*num_hidden_layers=1000000000000",
    ),
    "rope scaling": (edit_config(rope_scaling={"type": "yarn", "factor": 2}), "rope_scaling=.*not supported"),
    "rope of v5": (
        edit_config(rope_parameters={"rope_type": "llama3", "factor": 8}),
        "rope_parameters=.*not supported",
    ),
    "attention bias": (edit_config(attention_bias=True), "attention_bias=True is not supported"),
    "mlp bias": (edit_config(mlp_bias=True), "mlp_bias=True is not supported"),
    "other activation": (edit_config(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "quantised": (edit_config(quantization_config={"bits": 4}), "quantization_config=.*not supported"),
    "vocabulary 1e12": (edit_config(vocab_size=10**12), r"implies \[1000000000000, 8\]"),
    "width 1e300": (edit_config(hidden_size=10**300), "implies"),
    "layers 1e12": (edit_config(num_hidden_layers=10**12), "has 1000000000000 layers; the weights are 20 tensors"),
    "layers as text": (edit_config(num_hidden_layers="2"), "num_layers='2' is not a positive integer"),
    "heads 0": (edit_config(num_attention_heads=0, head_dim=None), "config.json: "),
    "epsilon NaN": (edit_config(rms_norm_eps=float("nan")), "norm_epsilon=nan is not a positive number"),
    "tied, but another head": (
        edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + np.float32(1)})),
        "lm_head.weight is not the embedding, though tie_word_embeddings says so",
    ),
    "tied, and a head of another shape": (
        edit_tensors(lambda t: t.update({"lm_head.weight": np.zeros((10**6, 8), np.float32)})),
        "lm_head.weight is not the embedding, though tie_word_embeddings says so",
    ),
    "one layer more": (edit_config(num_hidden_layers=3), "missing model.layers.2.input_layernorm.weight.* and 4 more"),
    "one layer less": (edit_config(num_hidden_layers=1), "unexpected model.layers.1.* and 4 more"),
    "untied": (edit_config(tie_word_embeddings=False), "missing lm_head.weight"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "empty file": (cut(0), "model.safetensors: not a safetensors file"),
    "seven bytes": (cut(7), "model.safetensors: not a safetensors file"),
    "cut in the header": (cut(100), "model.safetensors: not a safetensors file"),
    "cut in the data": (cut(5000), "model.safetensors: 5000 bytes where its header describes"),
    "bytes appended": (lambda f: os.truncate(f / "model.safetensors", 1 << 16), "65536 bytes where its header"),
    "header 2^63": (write("model.safetensors", (2**63).to_bytes(8, "little") + b"{}"), "not a safetensors file"),
    "header 2^64-1": (write("model.safetensors", b"\xff" * 8 + b"{}"), "not a safetensors file"),
    "header not JSON": (edit_header(lambda text: "x" + text), "model.safetensors: JSON that cannot be read"),
    "header deep": (edit_header(lambda text: '{"a":' * 100_000), "model.safetensors: JSON that cannot be read"),
    "header of 25 000 tensors": (edit_header(lambda text: "{" + empties(25_000) + "," + text[1:]), "unexpected t0, t1"),
    "header of 300 000 tensors": (
        edit_header(lambda text: "{" + empties(300_000) + "," + text[1:]),
        "model.safetensors: a header of [0-9]+ bytes is more than 2097152",
    ),
    "header of 30 MB": (edit_header(lambda text: "{" + " " * 30_000_000 + text[1:]), "a header of 30.* bytes is more"),
    "header 1e12": (write("model.safetensors", (10**12).to_bytes(8, "little") + bytes(100)), "not a safetensors file"),
    "header past the end": (
        write("model.safetensors", (93).to_bytes(8, "little") + bytes(92)),
        "not a safetensors file",
    ),
    "header not UTF-8": (
        write("model.safetensors", (8).to_bytes(8, "little") + b'{"\xff\xfe":1}'[:8]),
        "model.safetensors: JSON that cannot be read",
    ),
    "header a list": (edit_header(lambda text: f"[{text}]"), "model.safetensors: its JSON is not an object"),
    "header empty": (edit_header(lambda text: "{}"), r"model.safetensors: \d+ bytes where its header describes"),
    "duplicate names": (
        edit_header(lambda text: text[:-1].rstrip().rstrip("}") + "}," + text[1:]),
        "model.safetensors: JSON that cannot be read: duplicate",
    ),
    "shape mismatch": (
        edit_tensors(lambda t: t.update({QUERY: np.zeros((8, 24), np.float32)})),
        r"q_proj.weight of shape \[8, 24\] where config.json implies \[24, 8\]",
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop(QUERY)), f"missing {QUERY}"),
    "extra tensor": (
        edit_tensors(lambda t: t.update({"../../etc/passwd": np.zeros(1, np.float32)})),
        "unexpected ../../etc/passwd",
    ),
    "escape codes in a name": (
        edit_tensors(lambda t: t.update({"\x1b[2Jx": np.zeros(1, np.float32)})),
        r"unexpected \\x1b\[2Jx",
    ),
    "bias": (
        edit_tensors(lambda t: t.update({QUERY.replace("weight", "bias"): np.zeros(24, np.float32)})),
        "unexpected model.layers.1.self_attn.q_proj.bias",
    ),
    "NaN weight": (edit_tensors(lambda t: t[NORM].__setitem__(3, np.nan)), f"{NORM} holds values that are not finite"),
    "infinite weight": (edit_tensors(lambda t: t[QUERY].__setitem__((0, 0), np.inf)), f"{QUERY} holds values"),
    "integers": (edit_tensors(lambda t: t.update({NORM: np.ones(8, np.int32)})), "norm.weight has type 'I32'"),
    "negative shape": (edit_entry(shape=[-8]), "the place of model.norm.weight does not fit"),
    "shape beyond the data": (edit_entry(shape=[2**62]), "the place of model.norm.weight does not fit"),
    "shape of 10 000 axes": (edit_entry(shape=[10**9] * 10_000), "the place of model.norm.weight does not fit"),
    "shape whose size wraps to 0": (edit_entry(shape=[2**32, 2**32]), "the place of model.norm.weight does not fit"),
    "shape of fractions": (edit_entry(shape=[8.0]), "the place of model.norm.weight does not fit"),
    "shape of truth": (edit_entry(shape=[True, 8]), "the place of model.norm.weight does not fit"),
    "three axes": (edit_entry(shape=[2, 2, 2]), "the place of model.norm.weight does not fit"),
    "unknown type": (edit_entry(dtype="F99"), "norm.weight has type 'F99'; supported: F32, F16, BF16"),
    "type a list": (edit_entry(dtype=["F32"]), "an entry without dtype, shape and data_offsets"),
    "NUL in a name": (edit_tensors(lambda t: t.update({"a\0b": np.zeros(1, np.float32)})), r"unexpected a\\x00b"),
    "hole between tensors": (with_hole, "does not fit its shape or its neighbours"),
    "vast file of zeros": (vast_file_of_zeros, r"model: its weights need 1000\.0 GB as float32 where there are"),
    "offsets overlap": (edit_entry(data_offsets=[0, 32]), "does not fit its shape or its neighbours"),
    "offsets past the end": (edit_entry(data_offsets=[10**15, 10**15 + 32]), "does not fit its shape"),
    "offsets missing": (edit_entry(data_offsets=[]), "an entry without dtype, shape and data_offsets"),
    "one offset": (edit_entry(data_offsets=[0]), "the place of .* does not fit"),
    "entry without shape": (edit_entry(shape=None), "an entry without dtype, shape and data_offsets"),
    "only .pt": (
        lambda f: os.rename(f / "model.safetensors", f / "consolidated.00.pt"),
        "consolidated.00.pt can run code when opened.*safe_serialization=True",
    ),
    "index of pickles": (
        lambda f: (only_pickle(f), write(INDEX, b'{"weight_map": {"a": "pytorch_model.bin"}}')(f)),
        "pytorch_model.bin: not a safetensors file.*safe_serialization=True",
    ),
    "only a pickle": (only_pickle, "pytorch_model.bin can run code when opened.*safe_serialization=True"),
    "renamed pickle": (write("model.safetensors", pickle.dumps(Bomb())), "a renamed pickle.*safe_serialization=True"),
    "renamed zip": (write("model.safetensors", b"PK\x03\x04" + bytes(100)), "not a safetensors file"),
    "weights a FIFO": (fifo("model.safetensors"), "model.safetensors: not a regular file"),
    "weights a device": (
        lambda f: move_weights(f, "model.safetensors", lambda _, link: os.symlink("/dev/zero", link)),
        "model.safetensors: a link to outside the folder",
    ),
    "weights linked from outside": (
        lambda f: move_weights(f, "model.safetensors", os.symlink),
        "model.safetensors: a link to outside the folder",
    ),
    "weights a folder": (
        lambda f: move_weights(f, "model.safetensors", lambda _, path: path.mkdir()),
        "model.safetensors: not a regular file",
    ),
    "index up": (shards(lambda w: w.update({QUERY: "../x.safetensors"})), "'../x.safetensors' is not the plain name"),
    "index absolute": (shards(lambda w: w.update({QUERY: "/etc/passwd"})), "'/etc/passwd' is not the plain name"),
    "index backslash": (shards(lambda w: w.update({QUERY: "..\\x"})), "is not the plain name"),
    "index NUL": (shards(lambda w: w.update({QUERY: "a\0b"})), "is not the plain name"),
    "index surrogate": (shards(lambda w: w.update({QUERY: "\ud800"})), "is not the plain name"),
    "index long name": (shards(lambda w: w.update({QUERY: "a" * 5000})), "is not the plain name"),
    "index absent shard": (shards(lambda w: w.update({QUERY: "z.safetensors"})), "z.safetensors: no such file"),
    "index not names": (shards(lambda w: w.update({QUERY: 3})), "weight_map is not a map"),
    "index wrong shard": (shards(several_layers_in_two_files), f"{QUERY} not listed for this file"),
    "index not JSON": (index_then(write(INDEX, b"\x80\x04K\x01.")), "index.json: JSON that cannot be read"),
    "index deep": (index_then(write(INDEX, b'{"weight_map":' * 100_000)), "index.json: JSON that cannot be read"),
    "index large": (index_then(write(INDEX, b" " * (9 << 20))), "index.json: more than 2097152 bytes"),
    "index without map": (index_then(write(INDEX, b"{}")), "weight_map is not a map"),
    "index a FIFO": (index_then(fifo(INDEX)), "index.json: not a regular file"),
    "index a link": (index_then(linked(INDEX, "/proc/self/environ")), "index.json: a link to outside the folder"),
    "index shard a FIFO": (
        index_then(fifo("model-00002-of-00002.safetensors")),
        "00002.safetensors: not a regular file",
    ),
    "index of 1 000 shards": (
        shards(lambda w: w.update({f"t{i}": f"{i}.safetensors" for i in range(1000)})),
        "1002 files of weights are more than 500",
    ),
    "config a link": (linked("config.json", "/etc/passwd"), "config.json: a link to outside the folder"),
    "config a link upwards": (linked("config.json", "../other.json"), "config.json: no such file"),
    "config a link to itself": (linked("config.json", "config.json"), "config.json: no such file"),
    "index empty": (shards(lambda w: w.clear()), "has 2 layers; the weights are 0 tensors"),
    "index shard linked from outside": (
        lambda f: (
            split_into_shards(f),
            os.rename(f / "model-00001-of-00002.safetensors", f.parent / "x"),
            os.symlink(f.parent / "x", f / "model-00001-of-00002.safetensors"),
        ),
        "model-00001-of-00002.safetensors: a link to outside the folder",
    ),
}


CHILD = """
import json, resource, sys, time
from grpo_jax.models import load_pretrained

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
undamaged, *hostile = sys.argv[1:]
load_pretrained(undamaged)
first = peak()
for folder in hostile:
    start = time.process_time()
    try:
        load_pretrained(folder)
        error = "accepted"
    except Exception as reason:
        error = type(reason).__name__ + ": " + str(reason)
    print(json.dumps({"error": error, "seconds": time.process_time() - start, "mib": peak() - first}), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What one process says to all hostile folders, one after the other: name -> its folder, error, seconds, and MiB so far."""
    root = tmp_path_factory.mktemp("hostile")
    save_pretrained(root / "undamaged", CONFIG, init_params(CONFIG, jax.random.key(0)))
    folders = {name: root / f"{number}" / "model" for number, name in enumerate(HOSTILE)}
    for name, folder in folders.items():
        shutil.copytree(root / "undamaged", folder)
        HOSTILE[name][0](folder)
    command = [sys.executable, "-c", CHILD, str(root / "undamaged"), *map(str, folders.values())]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == len(HOSTILE), run.stderr[-2000:]
    return {name: {"folder": folders[name]} | line for name, line in zip(HOSTILE, lines, strict=True)}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused(name, refusals):
    """Each is one ValueError that names the file, within a second of work, and nothing in the folder was executed."""
    refusal, (_, message) = refusals[name], HOSTILE[name]
    assert re.search(message, refusal["error"]), refusal["error"]
    assert refusal["error"].startswith("ValueError: ") and str(refusal["folder"]) in refusal["error"]
    assert len(refusal["error"]) < 3000
    assert refusal["seconds"] < 1.0
    assert not (refusal["folder"].parent.parent / "exploded").exists()


def test_hostile_folders_take_no_memory(refusals):
    """The peak is that of the process: below 300 MB after the last means below it for each."""
    assert list(refusals.values())[-1]["mib"] < 300


@pytest.mark.parametrize(
    "entries", [{"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 77.0}]
)
def test_harmless_entries_are_read(folder, entries):
    edit_config(**entries, attention_dropout=0.0, rope_scaling=None)(folder)
    assert read_config(folder) == replace(CONFIG, rope_theta=77.0)


def test_what_older_versions_of_transformers_saved_too_is_not_needed(folder):
    """The frequencies of the rotation, which the config says; and with a tied model the embedding a second time."""
    _, expected = load_pretrained(folder)
    computed = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}
    edit_tensors(lambda t: t.update(computed | {"lm_head.weight": t["model.embed_tokens.weight"]}))(folder)
    same(expected, load_pretrained(folder)[1])


def test_defaults_are_those_of_transformers(folder):
    entries = json.loads((folder / "config.json").read_text())
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"):
        del entries[name]
    (folder / "config.json").write_text(json.dumps(entries))
    config = read_config(folder)
    assert (config.num_kv_heads, config.head_dim, config.tied) == (4, 2, False)
    assert (config.norm_epsilon, config.rope_theta) == (1e-6, 10000.0)
