"""Images from a folder, the Hub or a stream; files that cannot be read are skipped and counted.

Every image is written by a stranger. So a dataset carries the undecoded file, decoding happens in one place, and what
cannot be decoded becomes an [`UnreadableImageError`] with a reason, which the two readers at the end turn into a skip:

    load_images ──► {"image": {"bytes", "path"}, "image_id"} ──► ReadableImages / ReadableImageStream ──► 8-bit RGB

Training reads a stream through [`EndlessImages`], which gives it an order, replacements and a place to resume at.
"""

import errno
import hashlib
import logging
import math
import os
import re
import stat
import struct
import tarfile
import threading
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count, islice
from pathlib import Path, PurePosixPath
from uuid import uuid4

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.fingerprint import Hasher
from huggingface_hub.constants import HF_HUB_CACHE


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COLUMNS = Features({"image": Image(decode=False), "image_id": Value("string")})
FOLDER_SHARDS = 64  # parts of a streamed folder that a shuffle mixes
STREAM_BLOCK = 1000  # rows of a stream that are in memory, undecoded, and are shuffled among each other ...
STREAM_BLOCK_BYTES = 2**29  # ... or fewer, if their files are large
MAX_UNREADABLE_IN_A_ROW = 10_000
LISTING_ROWS = 10_000  # file names that a listing holds in memory before it writes them

# The decoders that strangers' bytes may reach. Not among them: EPS, which would start ghostscript.
PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 2**30
MAX_DECODE_SECONDS = 60
MAX_JPEG_SCANS = 100  # libtiff's limit, too; encoders write about ten. Each costs a pass over all pixels
JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # the markers that a length follows, and the end
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


# Folders that this process was told to take images from, by `load_images`
_listed_folders: set[str] = set()


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
    root = os.path.abspath(folder)
    if include is not None:
        _check_subfolders(root, include)
    dataset = Dataset.from_file(str(_write_listing(root, include)))
    if len(dataset) == 0:
        where = f"folder {str(folder)!r}" + (f" under {sorted(include)}" if include is not None else "")
        raise ValueError(
            f"There are no images in {where}. Expected files ending in {', '.join(IMAGE_SUFFIXES)}, at any depth. "
            "If the images are inside parquet files, pass `datasets.load_dataset(...)` to the trainer instead."
        )
    allow_links_in(root)
    # The rows are paths: streaming them costs nothing and keeps an exact place for `state_dict`.
    return dataset.to_iterable_dataset(num_shards=min(FOLDER_SHARDS, len(dataset))) if streaming else dataset


def allow_links_in(folder: str | Path) -> None:
    """Lets rows name the files of a folder from now on, also those that are links to elsewhere."""
    _listed_folders.add(os.path.realpath(folder))


def _write_listing(root: str, include: list[str] | None) -> Path:
    """
    Lists a folder into an Arrow file of the cache of `datasets`, which is then mapped into memory and not read into it.
    The file is named by its content: a folder that has changed is another file, one that has not is the same file for
    all processes.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "evolmm_trl"
    cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(root))
    names = _image_names(root, include)
    unfinished = cache / f"{uuid4().hex}.unfinished"
    try:
        with open(unfinished, "wb") as file, pa.ipc.new_stream(file, COLUMNS.arrow_schema) as writer:
            while part := list(islice(names, LISTING_ROWS)):
                digest.update("\0".join(["", *part]).encode())
                rows = {
                    "image": [{"bytes": None, "path": os.path.join(root, name)} for name in part],
                    "image_id": part,
                }
                writer.write_table(pa.table(rows, schema=COLUMNS.arrow_schema))
        listing = cache / f"folder-{digest.hexdigest()[:32]}.arrow"
        os.replace(unfinished, listing)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return listing


def _image_names(root: str, include: list[str] | None) -> Iterator[str]:
    """Paths of the images relative to `root`, sorted; in memory are the names of one folder at a time and its parents."""
    not_unicode = 0
    open_folders = [_folder_entries(root, "", include)]
    while open_folders:
        for name in open_folders[-1]:
            if name.endswith("/"):
                open_folders.append(_folder_entries(root, name))
                break
            if _is_unicode(name):
                yield name
            else:
                not_unicode += 1
        else:
            open_folders.pop()
    if not_unicode:
        logger.warning("%d image names in %s are not valid UTF-8 and were left out", not_unicode, root)


def _folder_entries(root: str, folder: str, include: list[str] | None = None) -> Iterator[str]:
    """Visible subfolders and images of one folder. Subfolders end in "/", so that their order is that of whole paths."""
    names = []
    with os.scandir(os.path.normpath(os.path.join(root, folder))) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not entry.is_symlink() and (include is None or entry.name in include):
                    names.append(entry.name + "/")
            elif include is None and _is_image_name(entry.name):
                names.append(entry.name)
    names.sort()
    return (folder + name for name in names)


def _check_subfolders(root: str, include: list[str]):
    available = [name[:-1] for name in _folder_entries(root, "") if name.endswith("/")]
    unknown = sorted(set(include) - set(available))
    if unknown:
        raise ValueError(f"`include` names {unknown}, which are not subfolders of {root!r}. Available: {available}.")


def _is_image_name(name: str) -> bool:
    base = name.rpartition("/")[2]
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
            if member.isfile() and _is_image_name(member.name):
                if member.size > MAX_FILE_BYTES:
                    logger.warning("Skipped image %r: file too large (%d bytes)", member.name, member.size)
                    continue
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
            `PIL_FORMATS`; if the image has more than `MAX_DECODED_PIXELS`, more than `MAX_JPEG_SCANS`, a side under
            `MIN_SIDE`, or an aspect ratio above `MAX_ASPECT_RATIO`; or if it takes more than `MAX_DECODE_SECONDS`.
        `TypeError`: if `value` is of no type that can hold an image.
    """
    _check_max_pixels(max_pixels)
    return _decode(_content(value), max_pixels)[0]


def decode_named_image(
    value: PIL.Image.Image | bytes | str | Path | dict, max_pixels: int | None = None
) -> PIL.Image.Image:
    """As [`decode_image`], with an error that names the file where the image is given by its path."""
    try:
        return decode_image(value, max_pixels)
    except UnreadableImageError as error:
        if not isinstance(value, (str, Path)):
            raise
        raise UnreadableImageError(error.reason, f"{value} {error.detail}".strip()) from None


def _check_max_pixels(max_pixels: int | None):
    if max_pixels is not None and max_pixels < SMALLEST_MAX_PIXELS:
        raise ValueError(
            f"`max_pixels` is {max_pixels}, expected at least {SMALLEST_MAX_PIXELS} or None. "
            "It is the area in pixels (width times height), e.g. 1024 * 1024."
        )


def _decode(content: PIL.Image.Image | bytes, max_pixels: int | None) -> tuple[PIL.Image.Image, bool]:
    """The RGB image, and whether it had to be shrunk."""
    # In a thread, since nothing can interrupt a decoder. PIL lets other threads run while it decodes.
    done = Future()
    thread = threading.Thread(target=_decode_into, args=(done, content, max_pixels), daemon=True)
    thread.start()
    # Second by second: of the time in which the whole process stands still, one second counts at most
    for _ in range(MAX_DECODE_SECONDS):
        thread.join(timeout=1)
        if done.done():
            return done.result()
    raise UnreadableImageError("takes too long to decode", f"more than {MAX_DECODE_SECONDS} seconds")


def _decode_into(done: Future, content: PIL.Image.Image | bytes, max_pixels: int | None):
    try:
        done.set_result(_decode_now(content, max_pixels))
    except BaseException as error:  # all of them, to be raised where the result is waited for
        done.set_exception(error)


def _decode_now(content: PIL.Image.Image | bytes, max_pixels: int | None) -> tuple[PIL.Image.Image, bool]:
    image = _open(content) if isinstance(content, bytes) else content
    _check_size(image.size)
    target = _size_within(image.size, max_pixels)
    shrink = target != image.size
    with _unreadable_if_pil_fails():
        if shrink and isinstance(content, bytes):
            image.draft(None, target)  # lets the JPEG decoder halve the image as often as it can; others ignore it
        image.load()
        rgb = _to_rgb(image)
        if shrink:
            rgb = rgb.resize(_size_within(rgb.size, max_pixels), PIL.Image.Resampling.LANCZOS)
        return _upright(rgb, _orientation(image)), shrink


class ImagePaths:
    """
    Which files of this machine the rows of a dataset may name. A row is a stranger's, unlike a path in the program.

    Allowed are the files of `root`, of the caches of the Hub and of `datasets`, where downloaded images lie, and of the
    folders given to [`load_images`] so far. In the latter a file may be a link to elsewhere.

    Args:
        root (`str`, *optional*):
            Folder that relative paths start from. If `None`, the working directory.
        also (`Sequence[str]`, *optional*):
            Further folders whose files are allowed.

    Raises:
        `ValueError`: if `root` is no folder.
    """

    def __init__(self, root: str | None = None, also: Sequence[str] = ()):
        self.root = os.path.realpath(root or os.getcwd())
        if not os.path.isdir(self.root):
            raise ValueError(f"`image_root` is {root!r}, expected a folder. Check the path.")
        caches = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
        self._roots = [self.root, *(os.path.realpath(folder) for folder in (*also, *caches))]
        self._listed = sorted(_listed_folders)

    def resolve(self, path: str) -> str:
        """Where `path` leads, if it may."""
        return os.path.realpath(self.locate(path))

    def locate(self, path: str) -> str:
        """Where `path` leads, if it may: the file, or a link to it in a folder that was listed."""
        try:
            full = os.path.join(self.root, path)
            resolved = os.path.realpath(full)
            folder, name = os.path.split(full)
            in_its_folder = os.path.normpath(os.path.join(os.path.realpath(folder), name))
        except ValueError:  # a null byte
            raise UnreadableImageError("missing file") from None
        if _is_within(resolved, self._roots):
            return resolved
        if _is_within(in_its_folder, self._listed):
            return in_its_folder
        raise UnreadableImageError(
            "path outside the image root",
            f"{path!r} is not in {self.root!r}; if it should be read, set `image_root` to the folder of the images",
        )


def _is_within(path: str, folders: list[str]) -> bool:
    return any(path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _content(value, paths: ImagePaths | None = None) -> PIL.Image.Image | bytes:
    """The content of the file, or the image if it is one. Paths are those of the program unless there are rules."""
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise UnreadableImageError("no image")
    if isinstance(value, str) and "://" in value:
        value = _read_remote(value)
    elif isinstance(value, str):
        value = _read_file(value if paths is None else paths.resolve(value))
    elif isinstance(value, Path):
        value = _read_file(value)
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
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UnreadableImageError("missing file", os.strerror(error.errno)) from None
        raise


def _read_remote(url: str) -> bytes:
    # `datasets` gives such paths when it streams image files from the Hub. A row is a stranger's: it must not make
    # this machine fetch from just anywhere, nor read its own files: `file://a::hf://b` reads a.
    *inside, archive = url.split("::")
    if not archive.startswith("hf://") or not all(part.startswith(("zip://", "tar://", "gzip://")) for part in inside):
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
    if content.startswith(b"\xff\xd8"):
        _check_scans(content)
    with _unreadable_if_pil_fails():
        return PIL.Image.open(BytesIO(content), formats=PIL_FORMATS)


def _check_scans(jpeg: bytes):
    """A scan of a hundred bytes costs a pass over all pixels: without a limit, a small file takes hours."""
    scans, position = 0, 2
    while marker := JPEG_SEGMENT.search(jpeg, position):
        kind = jpeg[marker.end() - 1]
        if kind == 0xD9:  # the end of the image
            return
        scans += kind == 0xDA
        if scans > MAX_JPEG_SCANS:
            raise UnreadableImageError("too many scans", f"more than {MAX_JPEG_SCANS}")
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")


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

    def __init__(self, max_pixels: int | None, paths: ImagePaths):
        _check_max_pixels(max_pixels)
        self.max_pixels = max_pixels
        self.paths = paths
        self.skipped: Counter[str] = Counter()
        self.warned_of_shrinking = False

    def read(self, row: dict, index: int) -> dict | None:
        """The row with its `image` decoded and an `image_id`, or `None` if the image is unreadable."""
        image_id = _image_id(row, index)
        try:
            image, shrunk = _decode(_content(row["image"], self.paths), self.max_pixels)
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
        logger.log(logging.WARNING if total <= 5 else logging.INFO, "Skipped image %r: %s", image_id, error)
        if total > 5 and total == 10 ** (len(str(total)) - 1):  # 10, 100, 1000, ...
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
        image_root (`str`, *optional*):
            Folder that paths in rows may not leave, see [`ImagePaths`].

    Raises:
        `ValueError`: if the dataset is empty or has no column `image`; when a row is asked for, if none is readable.
    """

    def __init__(self, dataset, max_pixels: int | None = None, image_root: str | None = None):
        _check_is_one_dataset(dataset)
        if len(dataset) == 0:
            raise ValueError(
                "The dataset is empty, expected at least one row with an image. Check its path and filters."
            )
        columns = getattr(dataset, "column_names", None)
        _check_columns(dataset[0] if columns is None else columns)
        self.dataset = _without_decoding(dataset)
        self._reader = _RowReader(max_pixels, ImagePaths(image_root))
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

    A row whose image cannot be read is counted, logged and left out. Training reads it through [`EndlessImages`].

    Args:
        iterable_dataset ([`~datasets.IterableDataset`] or `torch.utils.data.IterableDataset`):
            Rows with a column `image`: anything [`decode_image`] takes. Other columns are kept. Where there is no
            `image_id`, the image's file name is taken, or else a running index, which starts anew with every pass and
            in every DataLoader worker.
        max_pixels (`int`, *optional*):
            Images with more pixels are shrunk, see [`decode_image`].
        image_root (`str`, *optional*):
            Folder that paths in rows may not leave, see [`ImagePaths`].

    Raises:
        `ValueError`: if the dataset has no column `image`; at the end of a whole pass, if no row was readable.
    """

    def __init__(self, iterable_dataset, max_pixels: int | None = None, image_root: str | None = None):
        _check_is_one_dataset(iterable_dataset)
        columns = getattr(iterable_dataset, "column_names", None)
        if columns is not None:
            _check_columns(columns)
        self.dataset = _without_decoding(iterable_dataset)
        self._reader = _RowReader(max_pixels, ImagePaths(image_root))

    @property
    def skipped(self) -> Counter:
        """How many rows were left out, by reason: in this process, and again in every pass."""
        return self._reader.skipped

    def __iter__(self) -> Iterator[dict]:
        seen = readable = 0
        for row in self.dataset:
            if seen == 0:
                _check_columns(row)
            seen += 1
            row = self._reader.read(row, seen - 1)
            if row is not None:
                readable += 1
                yield row
        # The share of one worker of several may be empty
        if readable == 0 and (seen > 0 or torch.utils.data.get_worker_info() is None):
            raise self._reader.nothing_readable(seen)


@dataclass
class _Block:
    """Rows of a stream that are permuted together, and where they begin."""

    start: dict
    rows: list[tuple[int, dict]]  # with their index in the pass


@dataclass
class _WaitingRow:
    block: _Block
    offset: int  # in the block, after it was permuted
    unreadable: bool = field(default=False)


class EndlessImages:
    """
    The images of a stream in one endless order, pass after pass, that depends on the stream and the seed alone.

    A pass is read in blocks of `STREAM_BLOCK` rows (or `STREAM_BLOCK_BYTES`), which stay undecoded in memory, and each
    block is permuted. The order in which a stream's shards are read is shuffled and mixed by
    [`~datasets.IterableDataset.shuffle`], which is exact to resume as long as its own buffer is not used.

    A row whose image cannot be read is counted, logged and replaced by the next readable one, which is read again in its
    own place. So no other row moves, and a process can decode its own rows alone.

    Args:
        images ([`ReadableImageStream`]):
            The stream, of an [`~datasets.IterableDataset`].
        seed (`int`):
            Seed of the order.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle. `False` reads the rows in order.
    """

    def __init__(self, images: ReadableImageStream, seed: int, shuffle: bool = True):
        if images.dataset._distributed is not None:
            raise ValueError(
                "The stream was split with `split_dataset_by_node`. Every process takes its own part of each rollout, so "
                "that the other parts would be lost. Pass the whole stream."
            )
        self.images = images
        self.seed = seed
        self.shuffle = shuffle
        self.dataset = images.dataset.shuffle(seed=seed, buffer_size=1) if shuffle else images.dataset
        self._said_that_it_ends = False
        self._waiting: deque[_WaitingRow] = deque()
        self._blocks: Iterator[_Block] | None = None  # not begun, so that it can be pickled for a worker

    def take(self, number: int, part: slice = slice(None)) -> list[dict]:
        """
        The next `number` rows, of which those of `part` alone are decoded and returned.

        Raises:
            `ValueError`: if the stream has no rows, no column `image`, or no readable image where one is looked for.
        """
        rows = [self._readable(place) for place in range(number)[part]]
        self._wait_for(number)
        for _ in range(number):
            row = self._waiting.popleft()
            row.block.rows[row.offset] = None
        return rows

    def restart(self):
        """Goes back to the first row of the first pass."""
        self._waiting.clear()
        self._blocks = None

    def state_dict(self) -> dict:
        """The place of the next row, to be kept as JSON."""
        self._wait_for(1)
        row = self._waiting[0]
        return {**row.block.start, "offset": row.offset}

    def load_state_dict(self, state: dict):
        """Goes on from the place of `state`, by what the stream can seek, or else by reading it from the pass's start."""
        start = {name: value for name, value in state.items() if name != "offset"}
        found = self._go_to(start)
        if found != start["rows_hash"] and start["dataset"] is not None:
            logger.warning(
                "The stream's own state leads elsewhere, so its pass is read again up to row %d.", start["first_row"]
            )
            found = self._go_to({**start, "dataset": None})
        if found != start["rows_hash"]:
            logger.warning(
                "The images at row %d of the stream are not those that were there when the checkpoint was saved: the "
                "dataset has changed, or has no fixed order. The run goes on with the images that are there now.",
                start["first_row"],
            )
        self._wait_for(state["offset"] + 1)
        for _ in range(state["offset"]):
            self._waiting.popleft()

    def _go_to(self, start: dict) -> int:
        """Puts the block that begins at `start` next, and returns the hash of its rows."""
        self._waiting.clear()
        self._blocks = self._read_blocks(start)
        with _without_warning_of_shuffle_buffers():
            self._wait_for(1)
        return self._waiting[0].block.start["rows_hash"]

    def _readable(self, place: int) -> dict:
        for tried in count():
            self._wait_for(place + tried + 1)
            row = self._waiting[place + tried]
            whole_pass_tried = row.block.start["epoch"] > self._waiting[place].block.start["epoch"] + 1
            if whole_pass_tried or tried == MAX_UNREADABLE_IN_A_ROW:
                raise self.images._reader.nothing_readable(tried)
            if not row.unreadable:
                index, content = row.block.rows[row.offset]
                readable = self.images._reader.read(content, index)
                if readable is not None:
                    return readable
                row.unreadable = True

    def _wait_for(self, number: int):
        if self._blocks is None:
            self._blocks = self._read_blocks()
        while len(self._waiting) < number:
            block = next(self._blocks)
            self._waiting.extend(_WaitingRow(block, offset) for offset in range(len(block.rows)))

    def _read_blocks(self, start: dict | None = None) -> Iterator[_Block]:
        """All blocks of all passes, from the block at `start` on."""
        epoch, number, first_row = (start["epoch"], start["block"], start["first_row"]) if start else (0, 0, 0)
        rows = self._read_pass(epoch, start)
        while True:
            if start:  # not the dataset's own, which is that of the last row it gave
                state, start = start["dataset"], None
            else:
                state = self.dataset.state_dict() if first_row else None
            content = _next_rows(rows)
            if content:
                place = {"epoch": epoch, "block": number, "first_row": first_row, "dataset": state}
                place["rows_hash"] = _rows_hash(content)
                yield _Block(place, self._permuted(content, epoch, number, first_row))
                number, first_row = number + 1, first_row + len(content)
                continue
            if first_row == 0:
                raise self.images._reader.nothing_readable(0)
            level = logging.INFO if self._said_that_it_ends else logging.WARNING
            logger.log(level, "The stream ended after %d images and is read again, in pass %d.", first_row, epoch + 2)
            self._said_that_it_ends = True
            epoch, number, first_row = epoch + 1, 0, 0
            rows = self._read_pass(epoch)

    def _read_pass(self, epoch: int, start: dict | None = None) -> Iterator[dict]:
        self.dataset.set_epoch(epoch)
        state = start["dataset"] if start else None
        self.dataset.load_state_dict(state)
        # Its own iterator reads another order in a DataLoader worker, with other random numbers even if it is the only
        # one. `iter` does not ask where it is.
        rows = ({name: value[0] for name, value in row.items()} for row in self.dataset.iter(batch_size=1))
        if start and state is None:
            next(islice(rows, start["first_row"], start["first_row"]), None)
        return rows

    def _permuted(self, content: list[dict], epoch: int, number: int, first_row: int) -> list[tuple[int, dict]]:
        _check_columns(content[0])
        order = range(len(content))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, number]).permutation(len(content)).tolist()
        return [(first_row + i, content[i]) for i in order]


@contextmanager
def _without_warning_of_shuffle_buffers():
    # `datasets` warns of a buffer that is lost. Ours holds one row; that of a stream shuffled by its user is noticed by
    # the rows' hash.
    def other(record: logging.LogRecord) -> bool:
        return "without the buffer content" not in record.getMessage()

    library = logging.getLogger("datasets.iterable_dataset")
    library.addFilter(other)
    try:
        yield
    finally:
        library.removeFilter(other)


def _next_rows(rows: Iterator[dict]) -> list[dict]:
    block, size = [], 0
    for row in rows:
        block.append(row)
        size += _size_in_memory(row)
        if len(block) >= STREAM_BLOCK or size >= STREAM_BLOCK_BYTES:
            break
    return block


def _size_in_memory(row: dict) -> int:
    image = row.get("image")
    content = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(content, PIL.Image.Image):
        return 4 * content.width * content.height
    return len(content) if isinstance(content, bytes) else 0


def _rows_hash(rows: list[dict]) -> int:
    """Tells whether rows are the same, by their names and sizes and not by every byte."""
    value = 0
    for row in rows:
        image = row.get("image")
        path = image.get("path") if isinstance(image, dict) else image if isinstance(image, (str, Path)) else None
        value = zlib.crc32(repr((row.get("image_id"), path, _size_in_memory(row))).encode(), value)
    return value


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


def readable_images(
    dataset, max_pixels: int | None = None, image_root: str | None = None
) -> ReadableImages | ReadableImageStream:
    """The reader for a dataset: [`ReadableImageStream`] for a stream, [`ReadableImages`] for one with a length."""
    reader = ReadableImageStream if isinstance(dataset, IterableDataset) else ReadableImages
    return reader(dataset, max_pixels=max_pixels, image_root=image_root)
