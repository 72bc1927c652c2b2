"""GSM8K as a dataset of tensorflow-datasets, made of the two official files without TensorFlow. Loads tensorflow-datasets."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from grpo_jax.tasks.rows import read_rows


class GrpoGsm8k(tfds.core.GeneratorBasedBuilder):
    """Questions and reference solutions in the order of the files; the official builder of that name needs the network.

    files: split → JSONL file. The other arguments are those of every builder.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, files: Mapping[str, Path], **kwargs: Any) -> None:
        self._files = files
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"question": tfds.features.Text(), "answer": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self,
            description="Grade school mathematics in words, with solutions (Cobbe et al., arXiv 2110.14168).",
            homepage="https://github.com/openai/grade-school-math",
            license="MIT",
            features=features,
            disable_shuffling=True,  # an index means a line
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {split: self._generate_examples(file) for split, file in self._files.items()}

    def _generate_examples(self, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
        return enumerate(read_rows(file, lambda row: {key: row[key] for key in ("question", "answer")}))


def prepare(files: Mapping[str, Path], data_dir: Path) -> Path:
    """The folder of the prepared dataset in ``data_dir``, made where it is not there yet.

    It is written beside its place and moved there when it is complete, so that no process sees half of it; of two that prepare
    it at once, the first wins and both read the same.
    """
    folder = data_dir / GrpoGsm8k.name / str(GrpoGsm8k.VERSION)
    if folder.exists():
        return folder
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = GrpoGsm8k(files=files, data_dir=os.fspath(data_dir), file_format="array_record")
    nowhere = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints, and not to a log
            builder.download_and_prepare(download_config=nowhere)
    except OSError:
        if not folder.exists():
            raise
    return folder
