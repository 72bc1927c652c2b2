"""Reading into sharded arrays, each byte once and never much at a time; saves that a crash or a reader finds whole."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments.benchmarks import loading
from grpo_jax.models import DecoderConfig, init_params, load_pretrained, pretrained, read_config, save_pretrained
from grpo_jax.models.pretrained import _empty
from grpo_jax.models.safetensors import StoredTensor
from grpo_jax.train.sharding import make_mesh, parameter_shardings

CONFIG = DecoderConfig(48, 3, 16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, max_length=32, tied=False)
OTHER = replace(CONFIG, rope_theta=123.0)  # of the same shapes
SHARDED = 12_000  # bytes: several files
ROOT = Path(__file__).resolve().parent.parent.parent


@cache
def params_of(seed, config=CONFIG):
    return init_params(config, jax.random.key(seed))


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Tracing the decoder for its shapes takes nearly all of the time of loading a model as small as this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "param_shapes", cache(pretrained.param_shapes))
        yield


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def weights(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("model"))


# ------------------------------------------------------------------------------------------------------------ loading

MESHES = [
    {"data": 1, "fsdp": 8},
    {"data": 1, "tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 8},
    {"data": 1, "fsdp": 4, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("limit", [5 << 30, SHARDED], ids=["one file", "shards"])
def test_sharded_arrays_hold_the_same_and_lie_where_they_should(tmp_path, mesh, limit):
    save_pretrained(tmp_path, CONFIG, params_of(0), max_shard_bytes=limit)
    shardings = partial(parameter_shardings, mesh=make_mesh(**mesh))
    _, params = load_pretrained(tmp_path, shardings=shardings)
    same(params_of(0), params)

    def placed(leaf, sharding):
        assert leaf.dtype == jnp.float32 and leaf.committed and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(placed, params, shardings(params))


def test_layers_may_be_spread_too(tmp_path):
    """A sharding of the layer axis: a share holds some of the layers, and reads no other."""
    config = replace(CONFIG, num_layers=4)
    save_pretrained(tmp_path, config, params_of(0, config))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def shardings(shapes):
        spec = jax.sharding.PartitionSpec
        specs = {1: spec("b"), 2: spec("b", "a"), 3: spec("a", "b", None)}
        return jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, specs[leaf.ndim]), shapes)

    same(params_of(0, config), load_pretrained(tmp_path, shardings=shardings)[1])


def test_without_shardings_the_arrays_are_on_the_default_device(tmp_path):
    save_pretrained(tmp_path, CONFIG, params_of(0))
    for leaf in jax.tree.leaves(load_pretrained(tmp_path)[1]):
        assert leaf.devices() == {jax.devices()[0]} and not leaf.committed
    with jax.default_device(jax.devices()[3]):
        assert load_pretrained(tmp_path)[1]["embedding"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize("mesh", [None, *MESHES], ids=str)
def test_every_byte_of_the_tensors_is_read_once(tmp_path, mesh, monkeypatch):
    """So a process reads no more than its devices hold, and what several of them hold only once."""
    save_pretrained(tmp_path, CONFIG, params_of(0))
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    times, pread = np.zeros(size, int), os.pread

    def counted(handle, count, offset):
        times[offset : offset + count] += 1
        return pread(handle, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    shardings = mesh and partial(parameter_shardings, mesh=make_mesh(**mesh))
    load_pretrained(tmp_path, shardings=shardings)
    assert header > 500 and (times[8 + header :] == 1).all()


def test_loaded_arrays_can_be_donated_in_place(tmp_path):
    """An array that shares NumPy's memory cannot: a train step would hold the parameters twice."""
    save_pretrained(tmp_path, CONFIG, params_of(0))
    _, params = load_pretrained(tmp_path)
    before = jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), params)
    after = jax.jit(partial(jax.tree.map, lambda leaf: leaf + 1.0), donate_argnums=0)(params)
    assert jax.tree.map(lambda leaf: leaf.unsafe_buffer_pointer(), after) == before
    same(after, jax.tree.map(lambda leaf: leaf + 1.0, params_of(0)))


def test_host_memory_is_never_where_it_would_be_shared():
    for size in range(1, 100_000, 997):
        values = _empty((size,))
        assert values.ctypes.data % 64 == 32 and values.shape == (size,)


def test_loading_needs_little_memory_beside_the_arrays(tmp_path):
    """The bar: beside the arrays 1.3 times the largest share and one tensor. The model is small, so 32 MiB are allowed for
    what the allocator keeps; reading the whole model first would take 190 MiB."""
    command = [sys.executable, "-m", "experiments.benchmarks.loading", "--quick", "--nostep", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    rows = json.loads((tmp_path / "loading.json").read_text(encoding="utf-8"))["rows"]
    assert [row["devices"] for row in rows if row["what"] == "load"] == [1, 8]
    for row in rows:
        if row["what"] == "load" and row["peak"] is not None:
            assert row["parameters"] > 200 << 20
            assert row["peak"] - row["before"] - row["parameters"] < row["allowed"] + (32 << 20)


def test_the_benchmark_takes_a_step_that_fits_and_no_other(tmp_path, monkeypatch):
    config = replace(CONFIG, tied=True, max_length=64)
    assert loading.write_checkpoint(tmp_path, config) == 2 * sum(x.size for x in jax.tree.leaves(params_of(0, config)))
    measured = loading.measure_step(tmp_path, "adafactor")
    assert measured["needed"] > measured["parameters"] and "seconds" in measured and "refused" not in measured
    row = {"what": "step", "devices": 1, **measured}
    assert "| step, adafactor | " in loading.table([row])
    monkeypatch.setattr(loading, "SPARE", 1e6)
    measured = loading.measure_step(tmp_path, "sgd")
    if "refused" in measured:  # on Linux
        assert measured["refused"].startswith("not run: needs 1073741.8 GB more")
        assert "| step, sgd | not run" in loading.table([row | measured])


@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 8}], ids=str)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, mesh):
    save_pretrained(tmp_path, CONFIG, params_of(0))
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    shardings = mesh and partial(parameter_shardings, mesh=make_mesh(**mesh))
    name = "model.layers.2.mlp.down_proj.weight"
    for dtype, bad in ((np.float32, np.nan), (np.float16, np.inf), (jnp.bfloat16, -np.inf)):
        for at in ((0, 0), (7, 11), (15, 23)):
            broken = {k: v.astype(dtype) for k, v in tensors.items()}
            broken[name][at] = bad
            safetensors.numpy.save_file(broken, tmp_path / "model.safetensors")
            with pytest.raises(ValueError, match=rf"model\.safetensors: {name} holds values that are not finite"):
                load_pretrained(tmp_path, shardings=shardings)


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    save_pretrained(tmp_path, CONFIG, params_of(0))
    read = StoredTensor.read

    def cut(self, into, start):
        os.truncate(tmp_path / "model.safetensors", 5000)
        return read(self, into, start)

    monkeypatch.setattr(StoredTensor, "read", cut)
    with pytest.raises(ValueError, match=r"model\.safetensors: cut short while .* was read"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("first", [5 << 30, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize("second", [5 << 30, SHARDED], ids=["then one file", "then shards"])
def test_a_folder_saved_to_while_it_is_read_is_read_as_it_was(tmp_path, monkeypatch, first, second):
    save_pretrained(tmp_path, CONFIG, params_of(0), max_shard_bytes=first)
    read, reads = StoredTensor.read, []

    def overtaken(self, into, start):
        reads.append(self.name)
        if len(reads) == 5:
            save_pretrained(tmp_path, CONFIG, params_of(1), max_shard_bytes=second)
        return read(self, into, start)

    monkeypatch.setattr(StoredTensor, "read", overtaken)
    same(params_of(0), load_pretrained(tmp_path)[1])
    same(params_of(1), load_pretrained(tmp_path)[1])


def test_a_config_that_changes_before_the_weights_are_open_is_an_error(tmp_path, monkeypatch):
    save_pretrained(tmp_path, CONFIG, params_of(0))
    monkeypatch.setattr(
        "grpo_jax.models.pretrained.open_tensors", lambda *_: save_pretrained(tmp_path, OTHER, params_of(1))
    )
    with pytest.raises(ValueError, match="another model was saved here just now"):
        load_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------- saving


def test_shards_are_what_the_index_says(tmp_path):
    save_pretrained(tmp_path, CONFIG, params_of(0), max_shard_bytes=SHARDED)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 3 and weights(tmp_path) == sorted([*names, "model.safetensors.index.json"])
    in_shards = {}
    for name in names:
        tensors = safetensors.numpy.load_file(tmp_path / name)
        assert sum(t.nbytes for t in tensors.values()) <= SHARDED
        assert {index["weight_map"][key] for key in tensors} == {name}
        in_shards |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in in_shards.values())
    save_pretrained(tmp_path / "one", CONFIG, params_of(0))
    single = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    assert in_shards.keys() == single.keys() == index["weight_map"].keys()
    for name, values in single.items():
        np.testing.assert_array_equal(in_shards[name], values)
    assert read_config(tmp_path) == read_config(tmp_path / "one")


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path):
    save_pretrained(tmp_path, CONFIG, params_of(0), max_shard_bytes=1)
    assert len(weights(tmp_path)) == 3 + 9 * CONFIG.num_layers + 1
    same(params_of(0), load_pretrained(tmp_path)[1])
    with pytest.raises(ValueError, match="max_shard_bytes=0 is not positive"):
        save_pretrained(tmp_path, CONFIG, params_of(0), max_shard_bytes=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_what_is_saved_may_be_sharded_and_of_half_precision(tmp_path, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params_of(0))
    sharded = jax.device_put(params, parameter_shardings(params, make_mesh(data=1, fsdp=4, tensor=2)))
    save_pretrained(tmp_path, CONFIG, sharded)
    same(jax.tree.map(lambda leaf: leaf.astype(np.float32), params), load_pretrained(tmp_path)[1])


class Killed(BaseException):
    """The process is gone: nothing of it has an effect any more."""


def killed_after(monkeypatch, steps, action):
    """Runs the action, of whose effects on the disk only the first ``steps`` happen; whether it was killed."""
    done = 0

    def mortal(original):
        def call(*arguments, **options):
            nonlocal done
            if done >= steps:
                raise Killed
            done += 1
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, mortal(getattr(os, name)))
        try:
            action()
        except Killed:
            return True
    return False


FORMS = {"one file": 5 << 30, "shards": SHARDED}


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["same config", "other config"])
@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("old", FORMS)
def test_a_save_killed_at_any_step_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, old, new, config):
    """Never a mix; only where the config is another, a moment in which the folder says that it has none."""
    folder, seen = tmp_path / "model", []
    for steps in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        save_pretrained(folder, CONFIG, params_of(0), max_shard_bytes=FORMS[old])
        save = partial(save_pretrained, folder, config, params_of(1), max_shard_bytes=FORMS[new])
        killed = killed_after(monkeypatch, steps, save)
        try:
            params = load_pretrained(folder)[1]
        except ValueError as error:
            assert config == OTHER and str(error).endswith("config.json: no such file")
            seen.append("refused")
        else:
            is_old = equal(params, params_of(0)) and read_config(folder) == CONFIG
            assert is_old or (equal(params, params_of(1)) and read_config(folder) == config)
            seen.append("old" if is_old else "new")
        save()  # the next save is whole, and leaves nothing else behind
        same(params_of(1), load_pretrained(folder)[1])
        assert len(os.listdir(folder)) == (2 if new == "one file" else 2 + len(expected_shards()))
        if not killed:
            break
    assert not killed and seen[0] == "old" and seen[-1] == "new" and len(seen) > 5
    assert [state for i, state in enumerate(seen) if i == 0 or seen[i - 1] != state] == (
        ["old", "new"] if config == CONFIG else ["old", "refused", "new"]
    )


def expected_shards():
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params_of(0)))
    return range(-(-total // SHARDED)) if total else []


def test_a_first_save_killed_at_any_step_leaves_nothing_that_loads(tmp_path, monkeypatch):
    for steps in range(100):
        folder = tmp_path / str(steps)
        save = partial(save_pretrained, folder, CONFIG, params_of(0), max_shard_bytes=SHARDED)
        if not killed_after(monkeypatch, steps, save):
            break
        if folder.exists() and (folder / "config.json").exists():
            same(params_of(0), load_pretrained(folder)[1])
        else:
            with pytest.raises(ValueError, match=r"config\.json: no such file|no such folder"):
                load_pretrained(folder)
    assert steps > 5
    same(params_of(0), load_pretrained(folder)[1])


def test_other_files_of_the_folder_stay(tmp_path):
    others = ["tokenizer.json", "model-card.md", "adapter_model.safetensors", "README.md", ".gitattributes"]
    for name in others:
        (tmp_path / name).write_text(name)
    save_pretrained(tmp_path, CONFIG, params_of(0), max_shard_bytes=SHARDED)
    save_pretrained(tmp_path, CONFIG, params_of(1))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "config.json", "model.safetensors"])
    assert all((tmp_path / name).read_text() == name for name in others)


# ------------------------------------------------------------------------------------------- Hugging Face's cache


def cached(root, limit=5 << 30, relative=True):
    """A model as the cache holds it: models--ORG--NAME/snapshots/REVISION with links to blobs. Returns the snapshot."""
    model = root / "models--some--model"
    snapshot, blobs = model / "snapshots" / ("f" * 40), model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_pretrained(root / "plain", CONFIG, params_of(0), max_shard_bytes=limit)
    for number, path in enumerate(sorted((root / "plain").iterdir())):
        blob = blobs / f"{number:0{40 if path.suffix == '.json' else 64}x}"
        os.rename(path, blob)
        os.symlink(os.path.relpath(blob, snapshot) if relative else blob, snapshot / path.name)
    return snapshot


@pytest.mark.parametrize("limit", [5 << 30, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative links", "absolute links"])
def test_a_snapshot_in_the_cache_is_read(tmp_path, limit, relative):
    snapshot = cached(tmp_path, limit, relative)
    assert (snapshot / "config.json").is_symlink()
    same(params_of(0), load_pretrained(snapshot)[1])
    os.symlink(snapshot, tmp_path / "my-model")
    same(params_of(0), load_pretrained(tmp_path / "my-model")[1])


def test_a_folder_that_is_no_model_is_answered_with_what_to_name_instead(tmp_path):
    with pytest.raises(ValueError, match="some/model: no such folder; nothing is downloaded"):
        load_pretrained("some/model")
    model = cached(tmp_path).parent.parent
    with pytest.raises(ValueError, match=r"config\.json: no such file; name one of the folders in .*/snapshots"):
        load_pretrained(model)


def relink(snapshot, target):
    (snapshot / "model.safetensors").unlink()
    os.symlink(target, snapshot / "model.safetensors")


def to_another_model(snapshot):
    other = snapshot.parent.parent.parent / "models--some--other" / "blobs"
    other.mkdir(parents=True)
    os.rename((snapshot / "model.safetensors").resolve(), other / ("b" * 64))
    relink(snapshot, f"../../../models--some--other/blobs/{'b' * 64}")


def blobs_elsewhere(snapshot):
    blobs = snapshot.parent.parent / "blobs"
    os.rename(blobs, snapshot.parent.parent.parent / "elsewhere")
    os.symlink(snapshot.parent.parent.parent / "elsewhere", blobs)


def not_a_hash(snapshot):
    blob = (snapshot / "model.safetensors").resolve()
    os.rename(blob, blob.parent / "id_rsa")
    relink(snapshot, "../../blobs/id_rsa")


def blob_a_link(snapshot):
    blob = (snapshot / "model.safetensors").resolve()
    os.rename(blob, snapshot.parent.parent.parent / "secret")
    os.symlink("../../secret", blob)


def blob_a_fifo(snapshot):
    blob = (snapshot / "model.safetensors").resolve()
    blob.unlink()
    os.mkfifo(blob)


def in_a_folder_of_blobs(snapshot):
    blob = (snapshot / "model.safetensors").resolve()
    (blob.parent / "deeper").mkdir()
    os.rename(blob, blob.parent / "deeper" / blob.name)
    relink(snapshot, f"../../blobs/deeper/{blob.name}")


LINKS = {
    "to another model": to_another_model,
    "blobs a link": blobs_elsewhere,
    "to a file that is no blob": not_a_hash,
    "to a link": blob_a_link,
    "to a FIFO": blob_a_fifo,
    "deeper": in_a_folder_of_blobs,
    "to a device": lambda snapshot: relink(snapshot, "/dev/zero"),
    "to nothing": lambda snapshot: relink(snapshot, f"../../blobs/{'c' * 64}"),
}


@pytest.mark.parametrize("name", LINKS)
def test_other_links_are_refused(tmp_path, name):
    snapshot = cached(tmp_path)
    LINKS[name](snapshot)
    with pytest.raises(ValueError, match=r"a link to outside|not a regular file|neither model") as refusal:
        load_pretrained(snapshot)
    assert str(snapshot) in str(refusal.value)


@pytest.mark.parametrize("rename", ["models", "snapshots"])
def test_the_same_links_elsewhere_are_refused(tmp_path, rename):
    snapshot = cached(tmp_path)
    old = snapshot.parent.parent if rename == "models" else snapshot.parent
    os.rename(old, old.parent / "other")
    moved = next(tmp_path.glob("*/*/" + "f" * 40))
    with pytest.raises(ValueError, match="a link to outside the folder is not followed"):
        load_pretrained(moved)


def test_saving_to_a_snapshot_leaves_the_blobs(tmp_path):
    snapshot = cached(tmp_path)
    blobs = {path: path.read_bytes() for path in (snapshot.parent.parent / "blobs").iterdir()}
    save_pretrained(snapshot, CONFIG, params_of(1))
    assert blobs == {path: path.read_bytes() for path in (snapshot.parent.parent / "blobs").iterdir()}
    same(params_of(1), load_pretrained(snapshot)[1])
