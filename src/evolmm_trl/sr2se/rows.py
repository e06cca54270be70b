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
from ..data import ImagePaths, UnreadableImageError, decode_image, load_images
from ..thumbnails import image_digest


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
    source: "str | Path | Dataset | IterableDataset",
    needed: tuple[str, ...],
    image_folder: str | Path,
    image_root: str | Path | None = None,
) -> Iterator[Row | BadRow]:
    """
    Reads rows one at a time.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            A JSONL file with `image` (a path), `question` and `answer`; a folder of images; or a dataset with these
            columns, in which the image may be anything that [`load_images`] gives.
        needed (`tuple[str, ...]`):
            Which of `question` and `answer` a row must have.
        image_folder (`str` or `Path`):
            Where images of a dataset that are no files on this machine are written to, under names that their pixels give.
        image_root (`str` or `Path`, *optional*):
            Folder that paths in rows start from and may not leave. Without it the paths in JSONL start from the file's
            folder and may lead into it or the working directory, those in a dataset into the working directory.

    Raises:
        `FileNotFoundError`: if there is nothing at `source`.
        `ValueError`: if the source can never give a needed field, or `image_root` is no folder.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return _read_dataset(source, needed, Path(image_folder), ImagePaths(image_root))
    path = Path(source)
    if path.is_dir():
        if needed:
            raise ValueError(
                f"{str(source)!r} is a folder of images, without {' and '.join(needed)}. Pass a JSONL file with them, or "
                "set labels=False, where the model asks and its majority stands in for the truth."
            )
        return _read_dataset(load_images(path, streaming=False), needed, Path(image_folder), ImagePaths(image_root))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}: expected JSONL or a folder of images.")
    return _read_jsonl(path, needed, paths_beside(path, image_root))


def paths_beside(file: Path, image_root: str | Path | ImagePaths | None) -> ImagePaths:
    """Which images a JSONL file may name: those of `image_root`, or else of its folder and the working directory."""
    if isinstance(image_root, ImagePaths):
        return image_root
    return ImagePaths(image_root) if image_root is not None else ImagePaths(file.absolute().parent, [os.getcwd()])


def find_image(path: str, paths: ImagePaths, index: int, where: str) -> str | BadRow:
    """The file that a row names."""
    where = f"{where} ({path[:200]!r})"
    try:
        file = paths.locate(path)
    except UnreadableImageError as error:
        return BadRow(index, where, error.reason)
    return file if os.path.isfile(file) else BadRow(index, where, "missing image")


def json_lines(path: Path) -> Iterator[tuple[int, str, dict] | BadRow]:
    """Of each line that is not empty, its index, where it stands and the object it holds."""
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            where = f"{path.name}:{index + 1}"
            try:
                record = json.loads(line)
                if b"\\ud" in line.lower():  # half a character, which cannot be written again
                    json.dumps(record, ensure_ascii=False).encode()
            except (ValueError, RecursionError):  # errors of Unicode and of JSON are ValueErrors
                yield BadRow(index, where, "broken JSON")
                continue
            if not isinstance(record, dict):
                yield BadRow(index, where, "not a JSON object")
                continue
            yield index, where, record


def _read_jsonl(path: Path, needed: tuple[str, ...], paths: ImagePaths) -> Iterator[Row | BadRow]:
    for line in json_lines(path):
        if isinstance(line, BadRow):
            yield line
            continue
        index, where, record = line
        if not isinstance(record.get("image"), str) or not record["image"]:
            yield BadRow(index, where, "lacks image")
            continue
        image = find_image(record["image"], paths, index, where)
        yield image if isinstance(image, BadRow) else _row(index, where, image, record, needed)


def _read_dataset(dataset, needed: tuple[str, ...], image_folder: Path, paths: ImagePaths) -> Iterator[Row | BadRow]:
    if dataset.features is not None and isinstance(dataset.features.get("image"), Image):
        dataset = dataset.cast_column("image", Image(decode=False))
    for index, record in enumerate(dataset):
        where = f"row {index}"
        image = record.get("image")
        if image is None:
            yield BadRow(index, where, "lacks image")
            continue
        if isinstance(image, dict):  # content comes first: the path beside it may be of another machine
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, str) and "://" not in image:
            image = find_image(image, paths, index, where)
            yield image if isinstance(image, BadRow) else _row(index, where, image, record, needed)
            continue
        try:
            decoded = decode_image(image)
        except UnreadableImageError as error:
            yield BadRow(index, where, f"unreadable image: {error.reason}")
            continue
        file = image_folder.absolute() / f"{image_digest(decoded)}.png"
        if not file.is_file():
            image_folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")  # every process reads all rows
            decoded.save(temporary, "PNG")
            os.replace(temporary, file)
        yield _row(index, where, str(file), record, needed)


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
        hint = "; if it should be read, set `image_root`" if bad.reason == "path outside the image root" else ""
        logger.warning("Skipped %s: %s%s", bad.where, bad.reason, hint)
    elif seen == 20:
        logger.warning("Further skipped rows are counted and not logged.")
