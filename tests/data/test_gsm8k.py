"""GSM8K: the official rows and no others, kept once, whoever asks first, and an error that says what to do."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.data import gsm8k
from grpo_jax.data.gsm8k import Official, final_answer
from grpo_jax.tasks import Verdict

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE = importlib.import_module("grpo_jax.data.gsm8k")
PREPARED = "grpo_gsm8k/1.0.0"
ROWS = {
    "train": [{"question": f"What is {i} thousand?\u2028", "answer": f"It is\n#### {i + 1},000"} for i in range(30)],
    "test": [
        {"question": f"Take 1 from {i}.", "answer": f"{i}-1=<<{i}-1={i - 1}>>{i - 1}\n#### {i - 1}"} for i in range(20)
    ],
}


def write(folder: Path) -> dict[str, Official]:
    folder.mkdir()
    files = {}
    for split, rows in ROWS.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{split}.jsonl").write_bytes(content)
        files[split] = Official(hashlib.sha256(content).hexdigest(), len(rows))
    return files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files that count as the official ones; nothing is downloaded, and the cache is in the test's own folder."""
    monkeypatch.setattr(MODULE, "FILES", write(tmp_path / "official"))
    monkeypatch.setattr(MODULE, "URL", "http://127.0.0.1:9")
    return tmp_path / "official"


def test_the_official_rows(shared: Path, tmp_path: Path) -> None:
    for split, count in (("train", 7473), ("test", 1319)):
        task = gsm8k(shared / "data" / "gsm8k", split, data_dir=tmp_path)
        rows = [json.loads(line) for line in (shared / "data" / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8")]
        assert len(task.examples) == len(rows) == count == len({example.prompt for example in task.examples})
        assert task.demonstrations is not None and task.answer is not None
        for example, row in zip(task.examples, rows, strict=True):
            assert example.prompt.startswith(row["question"] + "\n")
            assert float(example.target) == float(row["answer"].split("####")[1].replace(",", ""))
            assert task.answer(row["answer"]) == example.target
            assert task.verify(task.demonstrations(example), example.target, False) is Verdict.correct
            assert task.verify(row["answer"], str(int(example.target) + 1), False) is Verdict.wrong
    sliced = gsm8k(shared / "data" / "gsm8k", "test[:1%]+train[-2:]", "{question}", data_dir=tmp_path)
    assert len(sliced.examples) == 15
    assert sliced.examples[0].target == "18"
    assert (
        sliced.examples[-1].target
        == json.loads((shared / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[-1])[
            "answer"
        ].split("#### ")[1]
    )


@pytest.mark.parametrize("verifier", ["number_hash", "number_boxed", "number_tag", "number_last"])
def test_a_demonstration_ends_as_the_prompt_asks(folder: Path, tmp_path: Path, verifier: str) -> None:
    task = gsm8k(folder, verifier=verifier, data_dir=tmp_path)
    assert task.demonstrations is not None
    marks = {"number_hash": "####", "number_boxed": r"\boxed{", "number_tag": "<answer>", "number_last": "number"}
    for i, example in enumerate(task.examples):
        assert marks[verifier] in example.prompt
        assert example.target == str(1000 * (i + 1))
        assert task.verify(task.demonstrations(example), example.target, False) is Verdict.correct
    assert task.demonstrations(task.examples[4]).startswith("It is\n")


def test_it_is_prepared_once(folder: Path, tmp_path: Path) -> None:
    first = gsm8k(folder, "all", data_dir=tmp_path / "kept")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")}
    assert gsm8k(folder, "all", data_dir=tmp_path / "kept").examples == first.examples
    assert gsm8k(None, "all", data_dir=tmp_path / "kept").examples == first.examples  # and needs no files any more
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")} == before


def test_several_processes_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kept" / "grpo_gsm8k" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)  # of one that was killed
    code = (
        "import importlib, sys; module = importlib.import_module('grpo_jax.data.gsm8k')\n"
        f"module.FILES = {{k: module.Official(*v) for k, v in { ({k: tuple(v) for k, v in MODULE.FILES.items()})!r}.items()}}\n"
        "import tensorflow_datasets, grpo_jax.data.gsm8k_builder\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"print(hash(module.gsm8k({str(folder)!r}, 'train', data_dir={str(tmp_path / 'kept')!r}).examples))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(gsm8k(folder, data_dir=tmp_path / "kept").examples) == 30


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "test.jsonl").write_bytes((folder / "test.jsonl").read_bytes().replace(b"Take 1", b"Take 2", 1))
    with pytest.raises(ValueError, match=r"test\.jsonl is not the official test\.jsonl of GSM8K.*use the task dataset"):
        gsm8k(folder, data_dir=tmp_path / "kept")
    (folder / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"official/test\.jsonl: no such file"):
        gsm8k(folder, data_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_download(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"http://127\.0\.0\.1:9/train\.jsonl cannot be downloaded .*set path to their folder"
    ):
        gsm8k(data_dir=tmp_path / "kept")
    monkeypatch.setattr(MODULE, "URL", folder.as_uri())
    assert gsm8k(data_dir=tmp_path / "kept").examples == gsm8k(folder, data_dir=tmp_path / "other").examples
    (folder / "train.jsonl").write_bytes(b"<html>captive portal</html>")
    with pytest.raises(ValueError, match=r"file:.*train\.jsonl is not the official train\.jsonl"):
        gsm8k(data_dir=tmp_path / "third")
    assert not list(tmp_path.glob("third/**/*.jsonl"))


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    gsm8k(folder, data_dir=tmp_path)
    [records] = (tmp_path / PREPARED).glob("*-train.*")
    whole = records.read_bytes()
    records.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=rf"{PREPARED}, train.*cannot be read"):
        gsm8k(folder, data_dir=tmp_path)
    records.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(ValueError, match=rf"{PREPARED}, train.*cannot be read"):
        gsm8k(folder, data_dir=tmp_path)
    records.unlink()
    with pytest.raises(ValueError, match=rf"{PREPARED}, train.*cannot be read"):
        gsm8k(folder, data_dir=tmp_path)
    info = tmp_path / PREPARED / "dataset_info.json"
    info.write_text(info.read_text().replace('"30"', '"29"'))
    with pytest.raises(ValueError, match=r"holds \{'train': 29, 'test': 20\} rows, which is not GSM8K: remove it"):
        gsm8k(folder, data_dir=tmp_path)
    info.unlink()
    with pytest.raises(ValueError, match="nor a prepared dataset"):
        gsm8k(folder, data_dir=tmp_path)
    shutil.rmtree(tmp_path / PREPARED)
    assert len(gsm8k(folder, data_dir=tmp_path).examples) == 30


def test_options_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is kept in a folder of this machine"):
        gsm8k(folder, data_dir="gs://bucket/data")
    with pytest.raises(ValueError, match=r"must hold the field \{question\}, and no other"):
        gsm8k(folder, prompt="{question} {answer}", data_dir=tmp_path)
    with pytest.raises(ValueError, match="verifier 'regex' has no prompt of its own here"):
        gsm8k(folder, verifier="regex", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"\[0\]: target '.*' is not a total"):
        gsm8k(folder, verifier="countdown", prompt="{question}", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"There are: train \(30 rows\), test \(20 rows\)"):
        gsm8k(folder, "dev", data_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="set data_dir to a folder that can be written"):
        gsm8k(folder, data_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("solution", "parts"),
    [
        ("a\n#### 1,234,567 ", ("a\n", "1234567")),
        ("#### 1\nno:\n#### -02", ("#### 1\nno:\n", "-2")),
        ("#### 0.5", None),
        ("#### ", None),
        ("72", None),
        ("#### ７２", None),
    ],
)
def test_the_final_answer(solution: str, parts: tuple[str, str] | None) -> None:
    if parts:
        assert final_answer(solution) == parts
    else:
        with pytest.raises(ValueError, match="does not end in an integer"):
            final_answer(solution)


def test_silent_without_network_and_without_tensorflow(folder: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "module = importlib.import_module('grpo_jax.data.gsm8k')\n"
        f"module.FILES = {{k: module.Official(*v) for k, v in { ({k: tuple(v) for k, v in MODULE.FILES.items()})!r}.items()}}\n"
        f"for _ in range(2): module.gsm8k({str(folder)!r}, 'train[:10%]', data_dir={str(tmp_path / 'kept')!r})\n"
        "assert not {'tensorflow', 'torch', 'requests', 'pandas'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
