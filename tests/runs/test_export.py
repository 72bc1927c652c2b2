"""--mode=export: what a run has learned, as a folder that others load."""

import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.data.tokenizers import HFTokenizer
from grpo_jax.files import read_sealed, write_sealed
from grpo_jax.models import DecoderConfig, init_params, load_pretrained, read_config, save_pretrained
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.errors import CheckpointError, RunDirectoryError
from grpo_jax.runs.evaluation import evaluate
from grpo_jax.runs.export import export
from grpo_jax.runs.loop import train
from grpo_jax.runs.setup import make_setup
from tests.data.chat_folders import make_folders
from tests.tiny_run import tiny_config

MODEL = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "d_ff": 16, "max_length": 64}
GENERATION = '{"eos_token_id": 7, "temperature": 0.6}\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, run directory) of a finished run of a folder's model."""
    root = tmp_path_factory.mktemp("export")
    folder = make_folders(root)["chatml"]
    tokenizer = HFTokenizer(folder)
    decoder = DecoderConfig(tokenizer.vocab_size, d_model=16, **MODEL)
    save_pretrained(folder, decoder, init_params(decoder, jax.random.key(0)))
    entries = json.loads((folder / "config.json").read_text())
    entries |= {"eos_token_id": tokenizer.eos_id, "torch_dtype": "bfloat16", "use_cache": True}
    (folder / "config.json").write_text(json.dumps(entries))
    (folder / "generation_config.json").write_text(GENERATION.replace("7", str(tokenizer.eos_id)))
    (folder / "notes.txt").write_text("not part of a model")
    config = tiny_config(model__path=str(folder), train__iterations=3, train__average=0.5, warm_start__target=0.02)
    with jax.numpy_dtype_promotion("standard"):
        train(config, root / "run", Console(file=io.StringIO()))
    return config, root / "run"


def exported(run, output, **options):
    config, workdir = run
    said = io.StringIO()
    folder = export(config, workdir, output, Console(file=said, width=200), **options)
    assert str(folder) in said.getvalue()
    return folder


def leaves(params):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def test_the_folder_has_the_weights_and_all_else_of_the_source(run, tmp_path):
    folder, source = exported(run, tmp_path / "new" / "model"), Path(run[0].model.path)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"notes.txt"} | {"README.md"}
    for name in names - {"config.json", "model.safetensors", "README.md"}:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    then, now = (json.loads((x / "config.json").read_text()) for x in (source, folder))
    assert now == then | {"torch_dtype": "float32"}  # with the ids of its control tokens, and what we do not read
    assert read_config(folder) == read_config(source)
    assert HFTokenizer(folder).stop_ids == HFTokenizer(source).stop_ids
    trained, before = leaves(load_pretrained(folder)[1]), leaves(load_pretrained(source)[1])
    assert trained.keys() == before.keys() and any((trained[name] != before[name]).any() for name in before)
    assert not list(tmp_path.glob("new/.*"))


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_weights_may_be_rounded(run, tmp_path, dtype, error):
    whole, rounded = exported(run, tmp_path / "whole"), exported(run, tmp_path / "rounded", dtype=dtype)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, rounded)]
    assert 1.8 < sizes[0] / sizes[1] < 2
    assert json.loads((rounded / "config.json").read_text())["torch_dtype"] == dtype
    x, y = (leaves(load_pretrained(folder)[1]) for folder in (whole, rounded))
    for name in x:
        np.testing.assert_allclose(y[name], x[name], rtol=error, atol=1e-7, err_msg=name)


def test_any_checkpoint_and_the_reference(run, tmp_path):
    folders = {name: exported(run, tmp_path / name, checkpoint=name) for name in ("reference", "2", "latest")}
    params = {name: leaves(load_pretrained(folder)[1]) for name, folder in folders.items()}
    for earlier in ("reference", "2"):  # which may be equal: a group that all fail teaches nothing
        assert (params[earlier]["['embedding']"] != params["latest"]["['embedding']"]).any(), earlier
    cards = {name: (folder / "README.md").read_text() for name, folder in folders.items()}
    result = json.loads((run[1] / "result.json").read_text())
    assert f"{result['p_final']['mean']:.4f}" in cards["latest"] and "iteration-3 of 3" in cards["latest"]
    average = (exported(run, tmp_path / "average", checkpoint="average") / "README.md").read_text()
    assert f"{result['average']['p_final']['mean']:.4f}" in average and "average-3 of 3" in average
    assert "This card holds no measurement" in cards["2"]
    assert "p̂" not in cards["2"] and "p_ref" in cards["2"] and "| reference of 3 |" in cards["reference"]


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(RunDirectoryError, match="not empty: choose another"):
        exported(run, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"
    with pytest.raises(RunDirectoryError, match="there is no run in"):
        exported((run[0], tmp_path / "nothing"), tmp_path / "out")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(RunDirectoryError, match="inside the run directory"):
        exported(run, run[1] / "model")
    with pytest.raises(CheckpointError, match=r"--checkpoint=1: .* there are 2, 3"):
        exported(run, tmp_path / "out", checkpoint="1")
    with pytest.raises(ConfigError, match="a random decoder has no files"):
        exported((tiny_config(), run[1]), tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="must be a folder of this machine"):
        exported(run, "gs://bucket/model")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_tokens_that_end_a_completion_in_the_run_end_it_elsewhere(run, tmp_path):
    config, workdir = run
    other = config.copy_and_resolve_references()
    other.model.stop_ids = (5, 7)
    shutil.copytree(workdir, tmp_path / "run")
    stored = read_sealed(tmp_path / "run" / "config.json") | {"model.stop_ids": [5, 7]}
    write_sealed(tmp_path / "run" / "config.json", stored)
    folder = exported((other, tmp_path / "run"), tmp_path / "out")
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings == json.loads(GENERATION) | {"eos_token_id": [5, 7]}


def test_an_evaluation_of_the_same_checkpoint_is_on_the_card(run, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        result = evaluate(run[0], run[1], Console(file=io.StringIO()), checkpoint="2", name="mine")
    card = (exported(run, tmp_path / "out", checkpoint="2") / "README.md").read_text()
    assert f"| success in evaluations/mine | {result['success']['mean']:.4f} |" in card
    assert "evaluations" not in (exported(run, tmp_path / "other") / "README.md").read_text()


@pytest.fixture
def adapted(run, tmp_path):
    """(config, run directory, adapters) of a run that has trained adapters, as far as an export reads it."""
    config, workdir = run[0].copy_and_resolve_references(), tmp_path / "adapted"
    config.lora.rank, config.lora.alpha, config.lora.targets = 2, 3.0, ("query", "down")
    shutil.copytree(run[1], workdir)
    shutil.rmtree(workdir / "checkpoints")
    changed = {"lora.rank": 2, "lora.alpha": 3.0, "lora.targets": ["query", "down"]}
    write_sealed(workdir / "config.json", read_sealed(workdir / "config.json") | changed)
    setup = make_setup(config, *validate(config, num_devices=8, training=False), training=False)
    adapters = jax.tree.map(lambda x: x + 0.25, setup.begin(None, 0))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
    with jax.numpy_dtype_promotion("standard"):
        checkpoints.save(3, setup.compiled.start(adapters), {})
    checkpoints.close()
    return config, workdir, {name: np.asarray(x) for name, x in adapters.items()}


def test_adapters_are_added_to_the_weights_or_a_folder_of_their_own(run, adapted, tmp_path):
    *run_of_adapters, adapters = adapted
    merged = leaves(load_pretrained(exported(run_of_adapters, tmp_path / "merged"))[1])
    source = leaves(load_pretrained(exported(run, tmp_path / "reference", checkpoint="reference"))[1])
    for name in ("query", "down"):
        product = 1.5 * adapters[f"{name}_a"] @ adapters[f"{name}_b"]
        at = f"['layers']['{name}']"
        np.testing.assert_allclose(merged[at], source[at] + product, rtol=1e-5, atol=1e-6)
    assert all((merged[at] == x).all() for at, x in source.items() if "query" not in at and "down" not in at)

    folder = exported(run_of_adapters, tmp_path / "adapters", adapters=True)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert "config.json" not in names and "| LoRA | rank 2 |" in (folder / "README.md").read_text()
    entries = json.loads((folder / "adapter_config.json").read_text())
    assert (entries["r"], entries["lora_alpha"], entries["target_modules"]) == (2, 3.0, ["q_proj", "down_proj"])
    stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    modules = {"query": "self_attn.q_proj", "down": "mlp.down_proj"}
    assert len(stored) == 4
    for name, x in adapters.items():
        target, side = name.split("_")
        theirs = f"base_model.model.model.layers.0.{modules[target]}.lora_{side.upper()}.weight"
        np.testing.assert_allclose(stored[theirs], x[0].T, rtol=1e-6)

    with pytest.raises(ConfigError, match="there are no adapters here"):
        exported(run, tmp_path / "none", adapters=True)
    with pytest.raises(ConfigError, match="there are no adapters here"):
        exported(run_of_adapters, tmp_path / "none", adapters=True, checkpoint="reference")
    assert not (tmp_path / "none").exists()


def test_a_disk_that_fills_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo_jax.runs.export.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
