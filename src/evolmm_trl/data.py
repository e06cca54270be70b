"""Images from a folder, the Hub or a stream; files that cannot be read are skipped and counted.

Every image is written by a stranger. So a dataset carries the undecoded file, decoding happens in one place, and what
cannot be decoded becomes an [`UnreadableImageError`] with a reason, which the two readers at the end turn into a skip:

    load_images ──► {"image": {"bytes", "path"}, "image_id"} ──► ReadableImages / ReadableImageStream ──► 8-bit RGB
"""

import logging
import math
import os
import re
import stat
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.fingerprint import Hasher


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COLUMNS = Features({"image": Image(decode=False), "image_id": Value("string")})
FOLDER_SHARDS = 64  # a streamed folder can be spread over this many DataLoader workers or processes

# The decoders that strangers' bytes may reach. Not among them: EPS, which would start ghostscript.
PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 2**30
MAX_DECODED_PIXELS = 89_478_485  # from here on PIL itself warns of a decompression bomb
MIN_SIDE = 4  # pixels; a shorter side holds nothing to ask about
MAX_ASPECT_RATIO = 200  # beyond it the image processors of the Qwen-VL family raise
SMALLEST_MAX_PIXELS = MIN_SIDE**2 * MAX_ASPECT_RATIO  # any accepted image still has MIN_SIDE when shrunk to this

# What PIL raises on damaged files of the formats above, found by fuzzing (tests/test_data.py) and in its sources.
# MemoryError is not among them: the size is checked first, so it means that this machine is short of memory.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


class UnreadableImageError(ValueError):
    """An image that cannot be used, through no fault of the program.

    Args:
        reason (`str`):
            Which of a few reasons: the readers count skips by it.
        detail (`str`, *optional*, defaults to `""`):
            What is particular to this image.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both, so that the error survives pickling
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


# ---------------------------------------------------------------------------------------------------------------------
# From a source to rows
# ---------------------------------------------------------------------------------------------------------------------


def load_images(
    source: str | Path, split: str = "train", streaming: bool = True, include: list[str] | None = None
) -> Dataset | IterableDataset:
    """
    Lists the images of a folder, a dataset on the Hub or webdataset shards, without decoding any.

    Args:
        source (`str` or `Path`):
            One of

            - a folder, searched recursively in sorted order for the suffixes in `IMAGE_SUFFIXES`. Hidden files and
              folders are left out, and links to folders are not followed. Subfolder names do not become labels.
            - the id of a dataset on the Hub with one image column.
            - webdataset shards: a path or URL that ends in `.tar`, `.tar.gz` or `.tgz`, with globs (`*`) and braces
              (`{0000..0015}`, `{a,b}`).
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub. Folders and shards have none.
        streaming (`bool`, *optional*, defaults to `True`):
            Whether to return an [`~datasets.IterableDataset`], which keeps its place in `state_dict`.
        include (`list[str]`, *optional*):
            First-level subfolders of a folder to keep. The rest of the folder, files at its top included, is left out.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`] with the columns

        - `image`: `{"bytes", "path"}`, not decoded, so that one damaged file cannot stop the iteration.
        - `image_id` (`str`): the path relative to the folder; for shards, the key (the path inside the shard without
          its suffix); for the Hub, the dataset's own `image_id`, or else the file's name, or else a running index.

    Raises:
        `FileNotFoundError`: if there is nothing at `source`.
        `ValueError`: if there are no images at `source`, or if an argument does not apply to it.
    """
    if str(source).endswith(TAR_SUFFIXES):
        _refuse_other_arguments(source, "webdataset shards", split=split, include=include)
        return _load_shards(str(source), streaming)
    if os.path.isdir(source):
        _refuse_other_arguments(source, "a folder", split=split)
        return _load_folder(Path(source), streaming, include)
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) and not os.path.exists(source):
        _refuse_other_arguments(source, "a dataset on the Hub", include=include)
        return _load_from_hub(source, split, streaming)
    found = "which is a file" if os.path.exists(source) else "and there is no such folder"
    raise FileNotFoundError(
        f"`source` is {str(source)!r}, {found}. Expected a folder, the id of a dataset on the Hub, or webdataset shards "
        f"({', '.join(TAR_SUFFIXES)}). Check the path; the working directory is {os.getcwd()!r}."
    )


def _refuse_other_arguments(source: str | Path, kind: str, split: str = "train", include: list[str] | None = None):
    if split != "train":
        raise ValueError(
            f"`split` is {split!r}, but {str(source)!r} is {kind}, which has no splits. "
            "Leave `split` out and pass the path of the images you want."
        )
    if include is not None:
        raise ValueError(
            f"`include` is {include!r}, but {str(source)!r} is {kind}, and `include` names subfolders of a folder. "
            "Leave it out, or `filter` the dataset that is returned."
        )


def _load_folder(folder: Path, streaming: bool, include: list[str] | None) -> Dataset | IterableDataset:
    names = _image_names(folder, include)
    if not names:
        where = f"folder {str(folder)!r}" + (f" under {sorted(include)}" if include is not None else "")
        raise ValueError(
            f"There are no images in {where}. Expected files ending in {', '.join(IMAGE_SUFFIXES)}, at any depth. "
            "If the images are inside parquet files, pass `datasets.load_dataset(...)` to the trainer instead."
        )
    root = os.path.abspath(folder)
    files = [{"bytes": None, "path": os.path.join(root, name)} for name in names]
    dataset = Dataset.from_dict({"image": files, "image_id": names}, features=COLUMNS)
    # The rows are paths in memory: streaming them costs nothing and keeps an exact place for `state_dict`.
    return dataset.to_iterable_dataset(num_shards=min(FOLDER_SHARDS, len(names))) if streaming else dataset


def _image_names(folder: Path, include: list[str] | None) -> list[str]:
    """Paths of the images, relative to `folder`, sorted."""
    tops = [folder] if include is None else _subfolders(folder, include)
    names = [
        (Path(root) / file).relative_to(folder).as_posix()
        for top in tops
        for root, subfolders, files in _walk_visible(top)
        for file in files
        if _is_image_name(file)
    ]
    encodable = sorted(name for name in names if _is_unicode(name))
    if len(encodable) < len(names):
        logger.warning(
            "%d image names in %s are not valid UTF-8 and were left out", len(names) - len(encodable), folder
        )
    return encodable


def _subfolders(folder: Path, include: list[str]) -> list[Path]:
    _, visible, _ = next(_walk_visible(folder))
    available = sorted(name for name in visible if not (folder / name).is_symlink())
    unknown = sorted(set(include) - set(available))
    if unknown:
        raise ValueError(
            f"`include` names {unknown}, which are not subfolders of {str(folder)!r}. Available: {available}."
        )
    return [folder / name for name in sorted(set(include))]


def _walk_visible(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def fail(error: OSError):  # os.walk alone would leave out a folder it may not read
        raise error

    for root, subfolders, files in os.walk(top, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield root, subfolders, files


def _is_image_name(name: str) -> bool:
    base = PurePosixPath(name).name
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _load_shards(pattern: str, streaming: bool) -> Dataset | IterableDataset:
    shards = [file for part in _expand_braces(pattern) for file in fsspec.open_files(part, "rb")]
    missing = [file.full_name for file in shards if not file.fs.exists(file.path)]
    if missing or not shards:
        raise FileNotFoundError(
            f"`source` is {pattern!r}, but there is no such file: {missing[:3] or pattern}. "
            "Expected webdataset shards; check the pattern's folder, and that its braces name only shards that exist."
        )
    kwargs = {"gen_kwargs": {"shards": [file.full_name for file in shards]}, "features": COLUMNS}
    if streaming:
        return IterableDataset.from_generator(_images_in_shards, **kwargs)
    # Without this fingerprint `datasets` would answer from its cache after a shard has changed.
    version = Hasher.hash([(file.full_name, file.fs.ukey(file.path)) for file in shards])
    return Dataset.from_generator(_images_in_shards, fingerprint=version, **kwargs)


def _expand_braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` -> `a08.tar`, `a09.tar`, `a10.tar`; `{a,b}.tar` -> `a.tar`, `b.tar`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first_last = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if first_last:
        first, last = first_last.groups()
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    return [
        whole for one in choices for whole in _expand_braces(pattern[: match.start()] + one + pattern[match.end() :])
    ]


def _images_in_shards(shards: list[str]) -> Iterator[dict]:
    # `datasets` has a webdataset loader, but it takes the columns from the first five samples and so fails on a shard
    # that mixes .jpg and .png.
    for shard in shards:
        with fsspec.open(shard, "rb") as file:
            try:
                yield from _images_in_tar(file)
            except (tarfile.ReadError, EOFError, zlib.error) as error:
                logger.warning("The rest of shard %s is damaged and was left out: %s", shard, error)


def _images_in_tar(file) -> Iterator[dict]:
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            if member.isfile() and _is_image_name(member.name) and member.size <= MAX_FILE_BYTES:
                # No "path": `datasets` would prefer a file of that name on this machine to the bytes.
                image = {"bytes": tar.extractfile(member).read(), "path": None}
                yield {"image": image, "image_id": os.path.splitext(member.name)[0]}


def _load_from_hub(repo_id: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        dataset = load_dataset(repo_id, split=split, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise type(error)(
            f"`source` is {repo_id!r}: there is no such folder here (the working directory is {os.getcwd()!r}), and "
            f"as a dataset on the Hub it could not be loaded: {error}"
        ) from error
    if dataset.features is None:  # a stream whose first rows must be read to know
        dataset = dataset._resolve_features()
    column = _image_column(dataset.features, repo_id)
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    dataset = dataset.cast_column("image", Image(decode=False))
    if "image_id" in dataset.column_names:
        return dataset.select_columns(["image", "image_id"]).cast_column("image_id", Value("string"))
    dataset = dataset.select_columns(["image"])
    if streaming:
        return dataset.map(lambda row, index: {"image_id": _image_id(row, index)}, with_indices=True, features=COLUMNS)
    return dataset.add_column("image_id", _ids_from_paths(dataset))


def _image_column(features: Features, source: str) -> str:
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if "image" in images or ("image" not in features and len(images) == 1):
        return "image" if "image" in images else images[0]
    undeclared = features.get("image")  # image files in a parquet that does not say so
    if undeclared == Value("binary") or (isinstance(undeclared, dict) and "bytes" in undeclared):
        return "image"
    raise ValueError(
        f"The dataset {source!r} has no image column to take. Expected a column `image`, or exactly one column of "
        f"type `Image`; its columns are {dict(features)}. Load it with `datasets.load_dataset`, "
        "`rename_column(..., 'image')`, and pass the result to the trainer."
    )


def _ids_from_paths(dataset: Dataset) -> list[str]:
    """What `_image_id` gives for every row of a map-style dataset, without reading the images' bytes."""
    tables = dataset.with_format("arrow").iter(batch_size=1000)
    paths = [path for table in tables for path in table["image"].combine_chunks().field("path").to_pylist()]
    return [_image_id({"image": {"path": path}}, index) for index, path in enumerate(paths)]


def _image_id(row: dict, index: int) -> str:
    """The row's own `image_id`, or its file's name, or its index."""
    if row.get("image_id") is not None:
        return str(row["image_id"])
    image = row["image"]
    if isinstance(image, dict):
        path = image.get("path")
    elif isinstance(image, PIL.Image.Image):
        path = getattr(image, "filename", None)
    else:
        path = image if isinstance(image, (str, Path)) else None
    # `zip://a/b.png::hf://...` is how `datasets` writes a file inside an archive
    return PurePosixPath(str(path).split("::")[0]).name if path else str(index)


# ---------------------------------------------------------------------------------------------------------------------
# From a file to 8-bit RGB
# ---------------------------------------------------------------------------------------------------------------------


def decode_image(
    value: PIL.Image.Image | bytes | str | Path | dict | None, max_pixels: int | None = None
) -> PIL.Image.Image:
    """
    Decodes one image to 8-bit RGB, or says why it cannot be.

    The EXIF orientation is applied, transparency is composited on white, an animation gives its first frame. 16-bit
    grey is scaled to 8 bits; 32-bit integers and floats, which have no defined white, are stretched from their
    smallest to their largest value.

    Args:
        value (`PIL.Image.Image` or `bytes` or `str` or `Path` or `dict`):
            An image, the content of an image file, the path of one (on this machine, or `hf://`), or
            `{"bytes", "path"}`.
        max_pixels (`int`, *optional*):
            An image with more pixels is shrunk to at most this many, keeping its aspect ratio. At least
            `SMALLEST_MAX_PIXELS`.

    Returns:
        `PIL.Image.Image`: in mode RGB, loaded, without metadata.

    Raises:
        [`UnreadableImageError`]: if the file is missing, empty, damaged, too large, or of a format not in
            `PIL_FORMATS`; or if the image has more than `MAX_DECODED_PIXELS`, a side under `MIN_SIDE`, or an aspect
            ratio above `MAX_ASPECT_RATIO`.
        `TypeError`: if `value` is of no type that can hold an image.
    """
    _check_max_pixels(max_pixels)
    return _decode(value, max_pixels)[0]


def _check_max_pixels(max_pixels: int | None):
    if max_pixels is not None and max_pixels < SMALLEST_MAX_PIXELS:
        raise ValueError(
            f"`max_pixels` is {max_pixels}, expected at least {SMALLEST_MAX_PIXELS} or None. "
            "It is the area in pixels (width times height), e.g. 1024 * 1024."
        )


def _decode(value, max_pixels: int | None) -> tuple[PIL.Image.Image, bool]:
    """The RGB image, and whether it had to be shrunk."""
    image = value if isinstance(value, PIL.Image.Image) else _open(_file_content(value))
    _check_size(image.size)
    target = _size_within(image.size, max_pixels)
    shrink = target != image.size
    with _unreadable_if_pil_fails():
        if shrink and image is not value:
            image.draft(None, target)  # lets the JPEG decoder halve the image as often as it can; others ignore it
        image.load()
        rgb = _to_rgb(image)
        if shrink:
            rgb = rgb.resize(_size_within(rgb.size, max_pixels), PIL.Image.Resampling.LANCZOS)
        return _upright(rgb, _orientation(image)), shrink


def _file_content(value) -> bytes:
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise UnreadableImageError("no image")
    if isinstance(value, (str, Path)):
        value = _read_remote(value) if isinstance(value, str) and "://" in value else _read_file(value)
    if not isinstance(value, bytes):
        raise TypeError(
            f"The image is a {type(value).__name__}, expected a PIL image, bytes, a path or a dict with 'bytes' or "
            "'path'. Convert the column `image`, e.g. `dataset.cast_column('image', datasets.Image())`."
        )
    if not value:
        raise UnreadableImageError("empty file")
    return value


def _read_file(path: str | Path) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a directory; or a pipe or device, which would never end
            raise UnreadableImageError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImageError("file too large", f"{status.st_size} bytes, more than {MAX_FILE_BYTES}")
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableImageError("missing file") from None
    except PermissionError:
        raise UnreadableImageError("no permission to read the file") from None


def _read_remote(url: str) -> bytes:
    # `datasets` gives such paths when it streams image files from the Hub. A row is a stranger's: it must not make
    # this machine fetch from just anywhere.
    if not url.split("::")[-1].startswith("hf://"):
        raise UnreadableImageError("remote file that is not on the Hub")
    try:
        with fsspec.open(url, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        raise UnreadableImageError("missing file") from None


@contextmanager
def _unreadable_if_pil_fails():
    try:
        yield
    except PIL.UnidentifiedImageError:
        raise UnreadableImageError("not an image", f"expected {', '.join(PIL_FORMATS)}") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnreadableImageError("too many pixels", str(error)) from error
    except DAMAGED as error:
        raise UnreadableImageError("damaged file", f"{type(error).__name__}: {error}") from error


def _open(content: bytes) -> PIL.Image.Image:
    """Reads the header only."""
    with _unreadable_if_pil_fails():
        return PIL.Image.open(BytesIO(content), formats=PIL_FORMATS)


def _check_size(size: tuple[int, int]):
    short, long = sorted(size)
    detail = f"{size[0]}x{size[1]}"
    if short * long > MAX_DECODED_PIXELS:
        raise UnreadableImageError("too many pixels", f"{detail}, more than {MAX_DECODED_PIXELS}")
    if short < MIN_SIDE:
        raise UnreadableImageError("too small", f"{detail}, a side is under {MIN_SIDE}")
    if long > MAX_ASPECT_RATIO * short:
        raise UnreadableImageError("too elongated", f"{detail}, an aspect ratio above {MAX_ASPECT_RATIO}")


def _size_within(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    width, height = int(width * scale), int(height * scale)
    # Rounding down must not push a strip over the largest aspect ratio.
    return min(width, MAX_ASPECT_RATIO * height), min(height, MAX_ASPECT_RATIO * width)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode[0] in "IF":  # I;16 and its byte orders, I, F: PIL's own conversion clips them at 255
        image = _to_8_bit_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info = {}  # above all no orientation, which an image processor might apply a second time
    return rgb


def _to_8_bit_grey(image: PIL.Image.Image) -> PIL.Image.Image:
    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray((pixels >> 8).astype(np.uint8))
    pixels = np.where(np.isfinite(pixels), pixels, 0).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    return PIL.Image.fromarray(((pixels - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1  # damaged metadata is no reason to lose an image; viewers show it as it is stored, too


def _upright(rgb: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    # Not `ImageOps.exif_transpose`: it writes the other EXIF tags anew, which fails on odd ones.
    turns = PIL.Image.Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


# ---------------------------------------------------------------------------------------------------------------------
# From rows to readable rows
# ---------------------------------------------------------------------------------------------------------------------


class _RowReader:
    """Decodes rows for the two readers below; counts and logs those it cannot."""

    def __init__(self, max_pixels: int | None):
        _check_max_pixels(max_pixels)
        self.max_pixels = max_pixels
        self.skipped: Counter[str] = Counter()
        self.warned_of_shrinking = False

    def read(self, row: dict, index: int) -> dict | None:
        """The row with its `image` decoded and an `image_id`, or `None` if the image is unreadable."""
        image_id = _image_id(row, index)
        try:
            image, shrunk = _decode(row["image"], self.max_pixels)
        except UnreadableImageError as error:
            self._count(image_id, error)
            return None
        if shrunk and not self.warned_of_shrinking:
            self.warned_of_shrinking = True
            logger.warning(
                "Image %r is over max_pixels=%d and was shrunk, as all are that are", image_id, self.max_pixels
            )
        return {**row, "image": image, "image_id": image_id}

    def _count(self, image_id: str, error: UnreadableImageError):
        self.skipped[error.reason] += 1
        total = self.skipped.total()
        if total <= 5:
            logger.warning("Skipped image %r: %s", image_id, error)
        elif total == 10 ** (len(str(total)) - 1):  # 10, 100, 1000, ...
            logger.warning("%d images skipped so far, the last one %r: %s", total, image_id, dict(self.skipped))

    def nothing_readable(self, seen: int) -> ValueError:
        return ValueError(
            f"None of the {seen} images could be read. Reasons: {dict(self.skipped)}. Expected image files that PIL "
            "can open; the warnings above name the first ones. Check that paths in the dataset exist on this machine."
        )


class ReadableImages(torch.utils.data.Dataset):
    """
    A map-style dataset in which every row has a decoded image.

    A row whose image cannot be read is counted, logged and replaced by the next readable one (`i + 1`, `i + 2`, ...,
    from the end on to the start), so that the length stays and the same index always gives the same row.

    Args:
        dataset ([`~datasets.Dataset`] or `torch.utils.data.Dataset` or `list[dict]`):
            Rows with a column `image`: anything [`decode_image`] takes. Other columns are kept. Where there is no
            `image_id`, the image's file name is taken, or else the row's index.
        max_pixels (`int`, *optional*):
            Images with more pixels are shrunk, see [`decode_image`].

    Raises:
        `ValueError`: if the dataset is empty or has no column `image`; when a row is asked for, if none is readable.
    """

    def __init__(self, dataset, max_pixels: int | None = None):
        _check_is_one_dataset(dataset)
        if len(dataset) == 0:
            raise ValueError(
                "The dataset is empty, expected at least one row with an image. Check its path and filters."
            )
        columns = getattr(dataset, "column_names", None)
        _check_columns(dataset[0] if columns is None else columns)
        self.dataset = _without_decoding(dataset)
        self._reader = _RowReader(max_pixels)
        self._unreadable: set[int] = set()

    @property
    def skipped(self) -> Counter:
        """How many rows were unreadable, by reason: each row once, of those asked for in this process."""
        return self._reader.skipped

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        size = len(self)
        start = range(size)[index]  # negative ones, too
        for offset in range(size):
            row = self._read((start + offset) % size)
            if row is not None:
                return row
        raise self._reader.nothing_readable(size)

    def _read(self, index: int) -> dict | None:
        if index in self._unreadable:
            return None
        row = self._reader.read(self.dataset[index], index)
        if row is None:
            self._unreadable.add(index)
        return row


class ReadableImageStream(torch.utils.data.IterableDataset):
    """
    A streaming dataset in which every row has a decoded image.

    A row whose image cannot be read is counted, logged and left out. `state_dict`, `load_state_dict` and `set_epoch`
    are the dataset's own, so that a stream resumes where it was.

    Args:
        iterable_dataset ([`~datasets.IterableDataset`] or `torch.utils.data.IterableDataset`):
            Rows with a column `image`: anything [`decode_image`] takes. Other columns are kept. Where there is no
            `image_id`, the image's file name is taken, or else a running index, which starts anew with every pass and
            in every DataLoader worker.
        max_pixels (`int`, *optional*):
            Images with more pixels are shrunk, see [`decode_image`].

    Raises:
        `ValueError`: if the dataset has no column `image`; at the end of a whole pass, if no row was readable.
    """

    def __init__(self, iterable_dataset, max_pixels: int | None = None):
        _check_is_one_dataset(iterable_dataset)
        columns = getattr(iterable_dataset, "column_names", None)
        if columns is not None:
            _check_columns(columns)
        self.dataset = _without_decoding(iterable_dataset)
        self._reader = _RowReader(max_pixels)
        self._resumed = False

    @property
    def skipped(self) -> Counter:
        """How many rows were left out, by reason: in this process, and again in every pass."""
        return self._reader.skipped

    def __iter__(self) -> Iterator[dict]:
        resumed, self._resumed = self._resumed, False
        seen = readable = 0
        for row in self.dataset:
            if seen == 0:
                _check_columns(row)
            seen += 1
            row = self._reader.read(row, seen - 1)
            if row is not None:
                readable += 1
                yield row
        # What is left of a resumed pass may be empty; so may the share of one worker of several.
        if readable == 0 and not resumed and (seen > 0 or torch.utils.data.get_worker_info() is None):
            raise self._reader.nothing_readable(seen)

    def state_dict(self) -> dict:
        return self.dataset.state_dict()

    def load_state_dict(self, state_dict: dict):
        self._resumed = True
        self.dataset.load_state_dict(state_dict)

    def set_epoch(self, epoch: int):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _check_is_one_dataset(dataset):
    if isinstance(dataset, dict):
        raise ValueError(
            f"The dataset is a dict of {list(dataset)}, expected one dataset. Pass one split, e.g. `dataset['train']`."
        )


def _check_columns(columns):
    columns = list(columns)
    if "image" in columns:
        return
    if "images" in columns:
        raise ValueError(
            f"The dataset has the columns {columns}, expected `image`: one image per row, not a list in `images`. "
            "Write `dataset.map(lambda row: {'image': row['images'][0]}, remove_columns='images')`."
        )
    raise ValueError(
        f"The dataset has the columns {columns}, expected a column `image`. "
        "If one of these holds the image, call `dataset.rename_column(<its name>, 'image')`."
    )


def _without_decoding(dataset):
    """`datasets` would decode in its own way, and raise, while it fetches the row."""
    features = getattr(dataset, "features", None)
    feature = features.get("image") if isinstance(features, Features) else None
    if isinstance(feature, List):
        raise ValueError(
            f"The column `image` is a list ({feature}), expected one image per row. "
            "Write `dataset.map(lambda row: {'image': row['image'][0]})`."
        )
    if isinstance(feature, Image) and feature.decode:
        return dataset.cast_column("image", Image(decode=False))
    return dataset


def readable_images(dataset, max_pixels: int | None = None) -> ReadableImages | ReadableImageStream:
    """The reader for a dataset: [`ReadableImageStream`] for a stream, [`ReadableImages`] for one with a length."""
    reader = ReadableImageStream if isinstance(dataset, IterableDataset) else ReadableImages
    return reader(dataset, max_pixels=max_pixels)
