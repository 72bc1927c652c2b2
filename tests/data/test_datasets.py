"""Datasets as tasks: files and prepared datasets give the same rows, slices are lists' own, and broken rows are named."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from grpo_jax.data import dataset, make_task, read_examples, reasoning_gym
from grpo_jax.data.reasoning import AUDITED
from grpo_jax.tasks import Example, Verdict

ROWS = [{"question": f"{i} + 1?", "answer": i + 1, "topic": "sums"} for i in range(250)]
EXAMPLES = tuple(Example(f"Q: {i} + 1?\nA:", str(i + 1)) for i in range(250))
TEMPLATES = {"prompt": "Q: {question}\nA:", "target": "{answer}"}


class Sums(tfds.core.GeneratorBasedBuilder):
    """A dataset like those of tensorflow-datasets, with configs and an integer, from no source but this file."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="shouted")]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"question": text, "answer": tfds.features.Scalar(np.int64), "topic": text}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        rows = {"train": enumerate(ROWS[:200]), "test": enumerate(ROWS[200:])}
        return {split: self._generate_examples(part) for split, part in rows.items()}

    def _generate_examples(self, rows: Any) -> Any:
        shout = self.builder_config.name == "shouted"
        return ((i, {key: x.upper() if shout and key == "topic" else x for key, x in row.items()}) for i, row in rows)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for config in ("plain", "shouted"):
        builder = Sums(config=config, data_dir=str(folder), file_format="array_record")
        nowhere = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=2)
        builder.download_and_prepare(download_config=nowhere)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=70)
    return path


def test_every_kind_of_source_gives_the_same_examples(tmp_path: Path, data_dir: Path) -> None:
    whole = [write_jsonl(tmp_path / "a.jsonl", ROWS), write_parquet(tmp_path / "b.parquet", ROWS)]
    folder, parts = tmp_path / "folder", tmp_path / "parts"
    folder.mkdir()
    parts.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS[:200])
    write_parquet(folder / "test.parquet", ROWS[200:])
    (folder / "README.md").touch()
    for i, (start, stop) in enumerate(((0, 90), (90, 91), (91, 200))):
        write_parquet(parts / f"train-{i:05}-of-00003.parquet", ROWS[start:stop])
    write_jsonl(parts / "test-00000-of-00001.ndjson", ROWS[200:])
    for source in whole:
        assert read_examples(source, split="train", **TEMPLATES) == EXAMPLES
        assert read_examples(str(source), split="all", **TEMPLATES) == EXAMPLES
    for named in ("sums", "sums/plain", "sums/plain:1.2.0", "sums:1.*.*", data_dir / "sums/plain/1.2.0", folder, parts):
        for split, part in (("train", EXAMPLES[:200]), ("test", EXAMPLES[200:]), ("train+test", EXAMPLES)):
            assert read_examples(named, split=split, **TEMPLATES, data_dir=data_dir) == part, (named, split)
    assert read_examples("sums/shouted", split="test[:1]", prompt="{topic}", target="1", data_dir=data_dir) == (
        ("SUMS", "1"),
    )


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("train[:10%]", EXAMPLES[:20]),
        ("train[33%:67%]", EXAMPLES[66:134]),
        ("train[-3:]", EXAMPLES[197:200]),
        ("train[:-190]", EXAMPLES[:10]),
        ("train[89:92]", EXAMPLES[89:92]),
        ("test[7:9]+train[:1]", EXAMPLES[207:209] + EXAMPLES[:1]),
        ("train + test[98%:]", EXAMPLES[:200] + EXAMPLES[249:]),
        ("train[:1]+train[:1]", EXAMPLES[:1] * 2),
    ],
)
def test_slices(tmp_path: Path, data_dir: Path, spec: str, rows: tuple[Example, ...]) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:200])
    for i, (start, stop) in enumerate(((200, 207), (207, 208), (208, 250))):
        write_parquet(tmp_path / f"test-{i:05}-of-00003.parquet", ROWS[start:stop])
    assert read_examples(tmp_path, split=spec, **TEMPLATES) == rows
    assert read_examples("sums", split=spec, **TEMPLATES, data_dir=data_dir) == rows


@pytest.mark.parametrize(
    "spec", ["dev", "train[", "train[5]", "train[:201]", "train[101%:]", "", "train[:1x]", "all[:3]"]
)
def test_slices_that_cannot_be(tmp_path: Path, spec: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:200])
    with pytest.raises(ValueError, match=r"split .*There are: train \(200 rows\)"):
        read_examples(tmp_path, split=spec, **TEMPLATES)


def test_the_name_of_a_single_file_is_no_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert read_examples(path, split="train", **TEMPLATES) == EXAMPLES
    with pytest.raises(ValueError, match=r"'test'.* train \(250 rows\); the rows of a single file are its split train"):
        read_examples(path, split="test", **TEMPLATES)
    assert read_examples(tmp_path, split="test", **TEMPLATES) == EXAMPLES


@pytest.mark.parametrize("spec", ["train[:0]", "train[9:3]"])
def test_no_rows(tmp_path: Path, spec: str) -> None:
    for source in (write_jsonl(tmp_path / "a.jsonl", ROWS), write_parquet(tmp_path / "a.parquet", ROWS)):
        with pytest.raises(ValueError, match="has no rows"):
            read_examples(source, split=spec, **TEMPLATES)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="'train' has no rows"):
        read_examples(tmp_path / "empty.jsonl", split="train", **TEMPLATES)


GOOD = b'{"question": "1+1?", "answer": "2"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "an empty line"),
        (b"{", "Expecting property name"),
        (GOOD + b"}", "Extra data"),
        (b"[1]", "wants an object"),
        (b"null", "wants an object"),
        (b"NaN", "NaN is no JSON"),
        (b'{"question": "a", "answer": "2", "score": NaN}', "NaN is no JSON"),
        (b'{"question": "a", "answer": -Infinity}', "-Infinity is no JSON"),
        (b"[" * 100_000, "recursion"),
        (b'{"question": ' * 100_000, "recursion"),
        (b'{"answer": "2"}', "no field 'question'; there are ['answer']"),
        (b'{"question": "a", "question": "b", "answer": "2"}', "a key occurs twice"),
        (b'{"question": "a", "answer": null}', "'answer' is neither text nor a number, but NoneType"),
        (b'{"question": "a", "answer": true}', "'answer' is neither text nor a number, but bool"),
        (b'{"question": ["a"], "answer": "2"}', "'question' is neither text nor a number, but list"),
        (b'{"question": "a", "answer": {"b": 2}}', "'answer' is neither text nor a number, but dict"),
        (b'{"question": "\\ud83d", "answer": "2"}', "'question' holds half a surrogate pair at character 0"),
        (b'{"question": "\xff", "answer": "2"}', "invalid start byte"),
        (b"\xef\xbb\xbf" + GOOD, "BOM"),
        (GOOD.replace(b":", b"\x00:"), "Expecting ':'"),
        (b'{"question": "a", "answer": " \\n"}', "the target is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        read_examples(path, split="train", prompt="{question}", target="{answer}")
    assert len(read_examples(path, split="train[:1]+train[2:]", prompt="{question}", target="{answer}")) == 2


def test_an_empty_prompt_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"question": "\u2003\n", "answer": 1}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the prompt is empty"):
        read_examples(path, split="train", prompt=" {question} ", target="{answer}")


def test_unusual_lines_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "unüsual rows.jsonl"
    rows = ["a\u2028b\x85c", "NUL \x00", "</s> {question}", "😀", " x "]
    lines = [json.dumps({"question": text, "answer": "1"}, ensure_ascii=False) for text in rows]
    lines += [
        '{"question": "\\ud83d\\ude00", "answer": 1}',
        ' { "question" :"y","answer":0.10,"id":1e999, "x": [null] } ',
    ]
    lines += ['{"question": -0, "answer": ' + "9" * 5000 + "}"]
    path.write_bytes("\r\n".join(lines).encode())  # no end to the last line
    examples = read_examples(path, split="train", prompt="{question}", target="{answer}")
    assert [example.prompt for example in examples] == [*rows, "😀", "y", "-0"]
    assert [example.target for example in examples[5:]] == ["1", "0.10", "9" * 5000]  # numbers as they are spelled


def test_rows_that_are_alike_are_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[3]] * 3)
    assert read_examples(path, split="train", **TEMPLATES) == (EXAMPLES[3],) * 3


def test_values_of_columns(tmp_path: Path) -> None:
    values = [7, -1.5, Decimal("0.10"), "七"]
    for i, value in enumerate(values):
        path = write_parquet(tmp_path / f"{i}.parquet", [{"question": "q", "answer": value}])
        assert read_examples(path, split="train", prompt="{question}", target="{answer}") == (("q", str(value)),)
    for value, message in ((None, "but NoneType"), (True, "but bool"), (float("nan"), "is nan"), ([1], "but list")):
        path = write_parquet(tmp_path / "bad.parquet", [{"question": "q", "answer": value}])
        with pytest.raises(ValueError, match=rf"bad\.parquet\[0\]: field 'answer' .*{message}"):
            read_examples(path, split="train", prompt="{question}", target="{answer}")
    for kind in (pyarrow.float16(), pyarrow.float32(), pyarrow.float64()):
        numbers = np.array([0.1, 42.5], kind.to_pandas_dtype())
        table = pyarrow.table({"question": ["q", "r"], "answer": pyarrow.array(numbers)})
        parquet.write_table(table, tmp_path / "floats.parquet")
        examples = read_examples(tmp_path / "floats.parquet", split="train", prompt="{question}", target="{answer}")
        assert [example.target for example in examples] == ["0.1", "42.5"]
    text = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.binary())
    table = pyarrow.table({"question": pyarrow.StringArray.from_buffers(2, text.buffers()[1], text.buffers()[2])})
    parquet.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match=r"bytes\.parquet\[1\]: .*invalid start byte"):
        read_examples(tmp_path / "bytes.parquet", split="train", prompt="{question}", target="1")


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(
        ValueError, match=r"rows\.parquet: wants one column 'quest'; there are \['question', 'answer', 'topic'\]"
    ):
        read_examples(path, split="train", prompt="{quest}", target="{answer}")
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["question", "question", "answer"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: wants one column 'question'"):
        read_examples(tmp_path / "twice.parquet", split="train", **TEMPLATES)
    (tmp_path / "twice.parquet").unlink()
    whole = path.read_bytes()
    for content in (b"", whole[:-20], b"PAR1" + bytes(100) + b"PAR1", whole[:4] + bytes(300) + whole[304:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.parquet: cannot be read as Parquet"):
            read_examples(path, split="train", **TEMPLATES)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"split 'rows' wants one file, .*there are: rows.jsonl, rows.parquet"):
        read_examples(tmp_path, split="rows", **TEMPLATES)
    for name in ("part-00000-of-00003.jsonl", "part-00002-of-00003.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="split 'part' wants one file, or all parts of one"):
        read_examples(tmp_path, split="part", **TEMPLATES)
    for missing in ("absent.jsonl", "absent.parquet", "data/ab/sent", "../absent", "", "a b"):
        with pytest.raises(ValueError, match=r"no such file or folder|holds no \.jsonl|neither a file"):
            read_examples(tmp_path / missing if missing else missing, split="train", **TEMPLATES)
    (tmp_path / "rows.csv").touch()
    with pytest.raises(ValueError, match=r"rows\.csv: is neither \.jsonl, \.ndjson nor \.parquet"):
        read_examples(tmp_path / "rows.csv", split="train", **TEMPLATES)


def test_a_dataset_that_is_not_prepared_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("ag_news_subset", "glue/cola", "gsm8k", "no_such_dataset:1.0.0"):
        with pytest.raises(
            ValueError, match=rf"{name}: neither a file(.*\n)*.*tfds\.builder\('{name}', file_format='array_record'\)"
        ):
            read_examples(name, split="train", **TEMPLATES, data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_tasks_without_datasets_load_none_of_this() -> None:
    code = (
        "import sys; from grpo_jax.data import make_task; make_task('countdown', num_examples=1)\n"
        "assert not {'tensorflow_datasets', 'grain', 'array_record', 'pyarrow', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent.parent, check=True)


def damage(folder: Path, change: Callable[[bytes], bytes], pattern: str) -> None:
    for path in folder.glob(pattern):
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        ("*train*-00001-of-*", lambda content: content[:-30], "cannot be read"),
        ("*train*-00001-of-*", lambda content: content.replace(b"150 + 1?", b"151 + 1?"), "cannot be read"),
        ("*train*-00001-of-*", lambda content: b"", "cannot be read"),
        (
            "dataset_info.json",
            lambda content: content.replace(b'"100"', b'"90"'),
            "train: has 200 rows, not 180; prepare it again",
        ),
        (
            "dataset_info.json",
            lambda content: content.replace(b"array_record", b"tfrecord"),
            "is stored as tfrecord; prepare",
        ),
        (
            "dataset_info.json",
            lambda content: content.replace(b"array_record", b"parquet"),
            "is stored as parquet; prepare",
        ),
        ("dataset_info.json", lambda content: b"{", "cannot be read as a prepared dataset"),
        ("features.json", lambda content: b"[]", "cannot be read"),
    ],
)
def test_a_damaged_dataset_is_named(
    tmp_path: Path, data_dir: Path, pattern: str, change: Callable[[bytes], bytes], message: str
) -> None:
    folder = tmp_path / "sums" / "plain" / "1.2.0"
    shutil.copytree(data_dir / "sums" / "plain" / "1.2.0", folder)
    damage(folder, change, pattern)
    with pytest.raises(ValueError, match=re.escape(os.fspath(folder)) + ".*" + message):
        read_examples(folder, split="train", **TEMPLATES)
    with pytest.raises(ValueError, match="sums/plain"):
        read_examples("sums/plain", split="train", **TEMPLATES, data_dir=tmp_path)


def test_a_missing_field_of_a_prepared_dataset(data_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"plain/1\.2\.0, train\[0\]: no field 'quest'; there are \['answer', 'question', 'topic'\]"
    ):
        read_examples("sums", split="train", prompt="{quest}", target="{answer}", data_dir=data_dir)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "names no field"),
        ("{{question}}", "names no field"),
        ("{question.__class__}", "not the plain name"),
        ("{question[0]}", "not the plain name"),
        ("{question!r}", "not the plain name"),
        ("{question:>9999999999}", "not the plain name"),
        ("{question:{answer}}", "not the plain name"),
        ("{}", "not the plain name"),
        ("{ }", "not the plain name"),
        ("{question", "expected '}'"),
        ("question}", "Single '}'"),
        (r"{question} \boxed{}", "not the plain name"),
    ],
)
def test_templates_that_cannot_be(tmp_path: Path, template: str, message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_examples(path, split="train", prompt=template, target="{answer}")


def test_templates(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a b": "x{question}", "0": 3, "ü": "%s"}])
    examples = read_examples(path, split="train", prompt="{{{a b}}} {0}{0}{ü}", target="constant")
    assert examples == (Example("{x{question}} 33%s", "constant"),)


def user_verifier(completion: str, target: str, truncated: bool) -> Verdict:
    return Verdict.correct if completion.endswith(target) else Verdict.wrong


def test_dataset(tmp_path: Path, data_dir: Path) -> None:
    task = dataset("sums", **TEMPLATES, verifier="number_hash", split="test", data_dir=data_dir)
    assert (task.name, task.examples, task.demonstrations) == ("sums", EXAMPLES[200:], None)
    assert task.verify("#### 201.0", task.examples[0].target, False) is Verdict.correct
    assert task.answer is not None and task.answer("#### 201.0") == "201"
    words = dataset("sums", "{question}", "word:{topic}", "constraint", data_dir=data_dir)
    assert words.answer is None
    assert words.verify("I like sums.", words.examples[0].target, False) is Verdict.correct


def test_every_target_is_one_that_the_verifier_can_use(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "?", "a": "so\n#### 1,000"}, {"q": "?", "a": "3 or 4"}])
    assert dataset(path, "{q}", "{a}", "number_hash", split="train[:1]").examples[0].target == "so\n#### 1,000"
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the target '3 or 4' is not one number"):
        dataset(path, "{q}", "{a}", "number_hash")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*unknown kind"):
        dataset(path, "{q}", "{a}", "constraint")
    with pytest.raises(ValueError, match="unknown verifier 'numbers'"):
        dataset(path, "{q}", "{a}", "numbers")
    task = dataset(path, "{q}", "{a}", "tests.data.test_datasets:user_verifier")
    assert task.verify("I say 3 or 4", task.examples[1].target, False) is Verdict.correct


def test_make_task(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'sums'; known tasks: arithmetic, stories, countdown, gsm8k, dataset, reasoning_gym"
    ):
        make_task("sums")
    for name, options in (
        ("arithmetic", {"operand": 3}),
        ("gsm8k", {"folder": "."}),
    ):
        with pytest.raises(TypeError, match=r"operand|folder"):
            make_task(name, **options)
    such = {"source": "'rows.jsonl'", "prompt": "'{question}'", "target": "'{answer}'", "verifier": "'number_last'"}
    texts = [f"task.dataset.{key} (such as {value})" for key, value in such.items()]
    for options in ((), ("source", "verifier"), ("source", "prompt", "target")):
        wanted = ", ".join(text for key, text in zip(such, texts, strict=True) if key not in options)
        with pytest.raises(ValueError, match=f"^{re.escape(wanted)} must be set$"):
            make_task("dataset", split="train", **dict.fromkeys(options, "{x}"))
    with pytest.raises(ValueError, match=r"^task\.reasoning_gym\.name \(such as 'gcd'\) must be set$"):
        make_task("reasoning_gym", seed=1)
    assert len(make_task("countdown", num_examples=3).examples) == 3
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert make_task("dataset", source=str(path), verifier="exact", **TEMPLATES).examples == EXAMPLES
    with pytest.raises(
        ValueError, match="'n_queens' is not one of reasoning-gym's audited generators: basic_arithmetic"
    ):
        make_task("reasoning_gym", name="n_queens")


JUNK = [
    "",
    " \n",
    "nan",
    "NaN",
    "inf",
    "None",
    "True",
    "False",
    "I do not know.",
    "0/0",
    "1/0",
    "[]",
    "{}",
    "9**9**9",
    "\x00",
]
JUNK += ["\ud800", "__import__('os').system('true')", "<answer>", "<answer></answer>", "<answer>nan</answer>", "5 or 6"]


@pytest.mark.parametrize("name", AUDITED)
def test_audit_of_reasoning_gym(name: str) -> None:
    """The generator's own answers are right; junk, the question and the answers to other questions are not."""
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    task = reasoning_gym(name, num_examples=40, seed=5)
    assert len(task.examples) == 40
    assert task.demonstrations is not None and task.answer is not None
    right = [task.demonstrations(example) for example in task.examples]
    answers = [task.answer(text) for text in right]
    assert None not in answers and len(set(answers)) >= 4  # a guess is seldom right
    for (prompt, target), answer in zip(task.examples, answers, strict=True):
        for text, other_answer in zip(right, answers, strict=True):
            assert (task.verify(text, target, False) is Verdict.correct) == (other_answer == answer)
        assert not any(task.verify(text, target, False).reward for text in (*JUNK, prompt, f"{target} {target}1"))
    assert reasoning_gym(name, num_examples=40, seed=5).examples == task.examples
    assert reasoning_gym(name, num_examples=40, seed=6).examples != task.examples


def test_reasoning_gym_options() -> None:
    with pytest.raises(ValueError, match="num_examples=0"):
        reasoning_gym("gcd", num_examples=0)
    try:
        import reasoning_gym as _  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ImportError, match=r"pip install reasoning-gym==0\.1\.25$"):
            reasoning_gym("gcd")
