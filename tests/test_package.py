"""The package as it is installed: what is in it, the command it brings, and what it says where an extra is not there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from grpo_jax.data import gsm8k, read_examples
from tests.pods import ROOT, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTALLED = "import sys; sys.argv[0] = '/bin/grpo-jax'; from grpo_jax.command import run; run()"


def grpo_jax(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command as its script starts it, in a folder that is no checkout."""
    home = environment(1) | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", INSTALLED, *flags], cwd=folder, env=home, capture_output=True, text=True, timeout=120
    )


def test_every_folder_of_the_package_is_installed_and_the_configs_with_it():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_jax").rglob("*.py")}
    setuptools = PROJECT["tool"]["setuptools"]
    places = {setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]}
    assert places == folders | {"configs"}
    assert PROJECT["project"]["scripts"] == {"grpo-jax": "grpo_jax.command:run"}


def test_the_command_finds_configs_by_name_and_speaks_in_its_own(tmp_path):
    place = ("--workdir=gs://bucket/run", "--mode=manifest", "--target=jobset", "--topology=v5e:2x2")
    done = grpo_jax(tmp_path, "--config=small:amplify", *place, "--config.data.prompts_per_iteration=8")
    assert done.returncode == 0, done.stderr
    assert "exec grpo-jax --config=small:amplify --workdir=gs://bucket/run" in done.stdout
    assert "launch.py" not in done.stdout
    for flags, words in (
        (("--config", "small", "--config.objective.beta=-1"), "grpo-jax: "),
        (("--config=smal",), f"--config=smal: no such file from {tmp_path}; by name there are countdown, default,"),
        ((), "grpo-jax: say which config to run: --config=small"),
    ):
        failed = grpo_jax(tmp_path, *flags)
        assert failed.returncode == 2 and words in failed.stderr, failed.stderr
    assert "--workdir" in grpo_jax(tmp_path, "--help").stdout
    assert not list(tmp_path.iterdir())


def test_a_file_comes_before_a_config_of_that_name_and_may_begin_with_ours(tmp_path):
    (tmp_path / "small").write_text(
        "from configs import default\n\ndef get_config():\n    config = default.get_config()\n"
        "    config.objective.beta = -7.0\n    return config\n"
    )
    failed = grpo_jax(tmp_path, "--config=small")
    assert failed.returncode == 2 and "objective.beta=-7" in failed.stderr, failed.stderr


def test_without_what_runs_need_the_command_says_how_to_get_it(tmp_path):
    code = f"import sys; sys.modules['ml_collections'] = None; {INSTALLED}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("grpo_jax: ") and "pip install 'grpo_jax[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("lacks", "read"),
    [
        ("pyarrow", lambda folder: read_examples(folder / "rows.parquet", split="train", prompt="{q}", target="1")),
        (
            "tensorflow_datasets",
            lambda folder: read_examples("ag_news_subset", split="train", prompt="{q}", target="1"),
        ),
        (
            "tensorflow_datasets",
            lambda folder: read_examples(folder / "rows.jsonl", split="train[:1]", prompt="{q}", target="1"),
        ),
        ("tensorflow_datasets", lambda folder: gsm8k(folder, data_dir=folder)),
    ],
    ids=["Parquet", "TFDS", "slice", "GSM8K"],
)
def test_without_the_extra_of_data_it_is_named(tmp_path, monkeypatch, lacks, read):
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "rows.jsonl").write_text('{"q": "?"}\n')
    for name in [name for name in sys.modules if name.partition(".")[0] == lacks] + [lacks]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs the package {lacks}[\w.]*: pip install 'grpo_jax\[data\]'"):
        read(tmp_path)
    assert len(read_examples(tmp_path / "rows.jsonl", split="train", prompt="{q}", target="1")) == 1
