# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Rows of image, question and answer from JSONL, a folder of images or a dataset; what cannot be used is named."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Image, IterableDataset

from ..answers import canonical_answer
from ..data import UnreadableImageError, decode_image, load_images


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """
    One row of a source.

    Args:
        index (`int`):
            Its place in the source, from 0, unusable rows counted.
        image_path (`str`):
            The image file.
        question (`str` or `None`), answer (`str` or `None`):
            What was asked and what is true.
    """

    index: int
    image_path: str
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its `index`, `where` it stands and the `reason`."""

    index: int
    where: str
    reason: str


def read_rows(
    source: "str | Path | Dataset | IterableDataset", needed: tuple[str, ...], image_folder: str | Path
) -> Iterator[Row | BadRow]:
    """
    Reads rows one at a time.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            A JSONL file with `image` (a path, relative to the file's folder), `question` and `answer`; a folder of
            images; or a dataset with these columns, in which the image may be anything that [`load_images`] gives.
        needed (`tuple[str, ...]`):
            Which of `question` and `answer` a row must have.
        image_folder (`str` or `Path`):
            Where images of a dataset that are no files on this machine are written to.

    Raises:
        `FileNotFoundError`: if there is nothing at `source`.
        `ValueError`: if the source can never give a needed field.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return _read_dataset(source, needed, Path(image_folder))
    path = Path(source)
    if path.is_dir():
        if needed:
            raise ValueError(
                f"{str(source)!r} is a folder of images, without {' and '.join(needed)}. Pass a JSONL file with them, or "
                "set labels=False, where the model asks and its majority stands in for the truth."
            )
        return _read_dataset(load_images(path, streaming=False), needed, Path(image_folder))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}: expected JSONL or a folder of images.")
    return _read_jsonl(path, needed)


def json_lines(path: Path) -> Iterator[tuple[int, str, dict] | BadRow]:
    """Of each line that is not empty, its index, where it stands and the object it holds."""
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            where = f"{path.name}:{index + 1}"
            try:
                record = json.loads(line)
            except ValueError:  # UnicodeDecodeError and JSONDecodeError are both
                yield BadRow(index, where, "broken JSON")
                continue
            if not isinstance(record, dict):
                yield BadRow(index, where, "not a JSON object")
                continue
            yield index, where, record


def _read_jsonl(path: Path, needed: tuple[str, ...]) -> Iterator[Row | BadRow]:
    for line in json_lines(path):
        if isinstance(line, BadRow):
            yield line
            continue
        index, where, record = line
        if not isinstance(record.get("image"), str) or not record["image"]:
            yield BadRow(index, where, "lacks image")
            continue
        image = path.parent / record["image"]
        if not os.path.isfile(image):  # `Path.is_file` raises on a name that is too long
            yield BadRow(index, f"{where} ({record['image'][:200]})", "missing image")
            continue
        yield _row(index, where, str(image.resolve()), record, needed)


def _read_dataset(dataset, needed: tuple[str, ...], image_folder: Path) -> Iterator[Row | BadRow]:
    if dataset.features is not None and isinstance(dataset.features.get("image"), Image):
        dataset = dataset.cast_column("image", Image(decode=False))
    for index, record in enumerate(dataset):
        where = f"row {index}"
        image = record.get("image")
        if image is None:
            yield BadRow(index, where, "lacks image")
            continue
        path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
        if path is not None and not os.path.isfile(path) and not (isinstance(image, dict) and image.get("bytes")):
            yield BadRow(index, f"{where} ({path[:200]})", "missing image")
            continue
        if path is None or not os.path.isfile(path):
            try:
                decoded = decode_image(image)
            except UnreadableImageError as error:
                yield BadRow(index, where, f"unreadable image: {error.reason}")
                continue
            image_folder.mkdir(parents=True, exist_ok=True)
            path = image_folder / f"{index:08d}.png"
            decoded.save(path)
        yield _row(index, where, str(Path(path).resolve()), record, needed)


def _row(index: int, where: str, image_path: str, record: dict, needed: tuple[str, ...]) -> Row | BadRow:
    fields = {}
    for name in ("question", "answer"):
        value = record.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        usable = isinstance(value, str) and (
            canonical_answer(value) is not None if name == "answer" else value.strip()
        )
        if name in needed and not usable:
            return BadRow(index, where, f"lacks {name}")
        fields[name] = value if usable else None
    return Row(index, image_path, **fields)


def warn_of(bad: BadRow, seen: int) -> None:
    """Logs an unusable row, and after twenty of them that no more are logged."""
    if seen < 20:
        logger.warning("Skipped %s: %s", bad.where, bad.reason)
    elif seen == 20:
        logger.warning("Further skipped rows are counted and not logged.")
