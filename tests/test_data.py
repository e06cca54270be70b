import io
import logging
import os
import pickle
import random
import struct
import tarfile
import warnings
import zlib
from functools import partial

import datasets
import fsspec
import numpy as np
import PIL.ImageOps
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from PIL import Image
from torch.utils.data import DataLoader

from evolmm_trl import data
from evolmm_trl.data import (
    MAX_ASPECT_RATIO,
    MAX_DECODED_PIXELS,
    MIN_SIDE,
    SMALLEST_MAX_PIXELS,
    EndlessImages,
    ReadableImages,
    ReadableImageStream,
    UnreadableImageError,
    decode_image,
    load_images,
)


def image(width=32, height=24, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def two_halves(left="red", right="blue"):
    picture = Image.new("RGB", (40, 20), left)
    picture.paste(right, (20, 0, 40, 20))
    return picture


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_announcing(width, height):
    """A valid PNG header and next to no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def close_to(pixel, expected, tolerance=12):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def reason_of(value, **options):
    with pytest.raises(UnreadableImageError) as caught:
        decode_image(value, **options)
    return caught.value.reason


@pytest.fixture
def folder(tmp_path):
    """charts/a.png, charts/deep/b.JPG, photos/c.webp, top.gif; and what is no image of ours."""
    root = tmp_path / "images"
    (root / "charts" / "deep").mkdir(parents=True)
    (root / "photos").mkdir()
    (root / ".cache").mkdir()
    image(seed=1).save(root / "charts" / "a.png")
    image(seed=2).save(root / "charts" / "deep" / "b.JPG")
    image(seed=3).save(root / "photos" / "c.webp")
    image(seed=4).save(root / "top.gif")
    image(seed=5).save(root / ".hidden.png")
    image(seed=6).save(root / ".cache" / "d.png")
    (root / "notes.txt").write_text("not an image")
    (root / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return root


FOLDER_IDS = ["charts/a.png", "charts/deep/b.JPG", "photos/c.webp", "top.gif"]


def ids(dataset):
    return [row["image_id"] for row in dataset]


# ---------------------------------------------------------------------------------------------------------------------
# load_images: a folder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_gives_its_images_in_sorted_order_and_nothing_else(folder, streaming):
    dataset = load_images(folder, streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert dataset.column_names == ["image", "image_id"]
    assert dataset.features["image"] == datasets.Image(decode=False)
    assert ids(dataset) == FOLDER_IDS
    assert next(iter(dataset))["image"] == {"bytes": None, "path": str(folder / "charts" / "a.png")}


def test_paths_of_a_folder_given_relative_hold_after_a_change_of_directory(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    dataset = load_images("images")
    monkeypatch.chdir("/")
    assert len(list(ReadableImageStream(dataset))) == 4


def test_include_keeps_only_the_named_subfolders(folder):
    assert ids(load_images(folder, include=["photos"])) == ["photos/c.webp"]
    assert ids(load_images(folder, include=["photos", "charts"])) == FOLDER_IDS[:3]


def test_include_of_an_absent_subfolder_names_the_available_ones(folder):
    with pytest.raises(ValueError, match=r"\['graphs'\].*Available: \['charts', 'photos'\]"):
        load_images(folder, include=["charts", "graphs"])


def test_links_to_folders_are_not_followed_and_links_to_files_are(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    image().save(outside / "x.png")
    (folder / "loop").symlink_to(folder)
    (folder / "elsewhere").symlink_to(outside)
    (folder / "linked.png").symlink_to(outside / "x.png")
    assert ids(load_images(folder)) == sorted([*FOLDER_IDS, "linked.png"])
    with pytest.raises(ValueError, match="'elsewhere'"):
        load_images(folder, include=["elsewhere"])


def test_a_file_name_that_is_not_utf8_is_left_out_with_a_warning(folder, caplog):
    try:
        os.rename(os.fsencode(folder / "top.gif"), os.fsencode(folder) + b"/\xff.gif")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert ids(load_images(folder)) == FOLDER_IDS[:3]
    assert "1 image names" in caplog.text


def test_a_streamed_folder_resumes_at_its_state(folder):
    dataset = load_images(folder)
    rows = iter(dataset)
    assert [next(rows)["image_id"] for _ in range(2)] == FOLDER_IDS[:2]
    resumed = load_images(folder)
    resumed.load_state_dict(dataset.state_dict())
    assert ids(resumed) == FOLDER_IDS[2:]


def test_a_streamed_folder_is_shared_out_to_dataloader_workers(folder):
    loader = DataLoader(load_images(folder), batch_size=None, num_workers=2)
    assert sorted(ids(loader)) == FOLDER_IDS


def test_a_subfolder_one_may_not_list_is_an_error_and_not_left_out(folder, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("photos"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="photos"):
        load_images(folder)


def test_a_folder_without_images_is_an_error_that_names_the_suffixes(tmp_path):
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(ValueError, match=r"no images in folder.*\.png"):
        load_images(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "./absent", "a/b/c"])
def test_a_source_that_is_nowhere_is_an_error_that_names_what_is_expected(source):
    with pytest.raises(FileNotFoundError, match="no such folder.*Expected a folder, the id of a dataset"):
        load_images(source)


def test_a_single_file_is_no_source(folder):
    with pytest.raises(FileNotFoundError, match="which is a file"):
        load_images(folder / "charts" / "a.png")


def test_a_split_of_a_folder_is_refused(folder):
    with pytest.raises(ValueError, match="has no splits"):
        load_images(folder, split="validation")


# ---------------------------------------------------------------------------------------------------------------------
# load_images: webdataset shards
# ---------------------------------------------------------------------------------------------------------------------


def write_shard(path, files):
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Three shards of two samples each, .png and .jpg mixed, with labels beside the images."""
    for shard in range(3):
        files = {
            f"{shard}/a.png": encoded(image(seed=2 * shard)),
            f"{shard}/a.json": b'{"label": 1}',
            f"{shard}/b.jpg": encoded(image(seed=2 * shard + 1), "JPEG"),
            f"{shard}/b.txt": b"a caption",
        }
        write_shard(tmp_path / f"train-{shard:03d}.tar", files)
    return tmp_path


SHARD_IDS = ["0/a", "0/b", "1/a", "1/b", "2/a", "2/b"]


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000..002}.tar", "train-{000,001,002}.tar"])
@pytest.mark.parametrize("streaming", [True, False])
def test_shards_give_their_images_with_their_keys_and_no_labels(shards, pattern, streaming):
    dataset = load_images(str(shards / pattern), streaming=streaming)
    assert dataset.column_names == ["image", "image_id"]
    assert ids(dataset) == SHARD_IDS
    assert decode_image(next(iter(dataset))["image"]).tobytes() == image(seed=0).tobytes()


def test_a_compressed_shard_is_read(tmp_path):
    path = write_shard(tmp_path / "x.tar.gz", {"k.png": encoded(image())})
    assert ids(load_images(str(path))) == ["k"]


def test_links_and_folders_inside_a_shard_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in [("folder.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("empty.png"))
    assert ids(load_images(tmp_path / "x.tar")) == ["empty"]


def test_a_shard_that_changed_is_read_anew_when_not_streaming(tmp_path):
    path = write_shard(tmp_path / "x.tar", {"old.png": encoded(image())})
    assert ids(load_images(path, streaming=False)) == ["old"]
    write_shard(path, {"new.png": encoded(image()), "two.png": encoded(image())})
    assert ids(load_images(path, streaming=False)) == ["new", "two"]


def test_a_stream_of_shards_resumes_at_its_state(shards):
    dataset = load_images(str(shards / "train-*.tar"))
    rows = iter(dataset)
    for _ in range(3):
        next(rows)
    resumed = load_images(str(shards / "train-*.tar"))
    resumed.load_state_dict(dataset.state_dict())
    assert ids(resumed) == SHARD_IDS[3:]


def test_a_name_inside_a_shard_never_stands_for_a_file_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("k.png")
    write_shard(tmp_path / "x.tar", {"k.png": encoded(Image.new("RGB", (8, 8), "blue"))})
    for streaming in (True, False):
        (row,) = load_images("x.tar", streaming=streaming)
        assert decode_image(row["image"]).getpixel((0, 0)) == (0, 0, 255)


def test_the_rest_of_a_damaged_shard_is_left_out_with_a_warning_and_the_next_is_read(shards, caplog):
    content = (shards / "train-001.tar").read_bytes()
    (shards / "train-001.tar").write_bytes(content[:700])  # inside the first image
    (shards / "train-000.tar").write_bytes(b"this is no tar file at all" * 100)
    assert ids(load_images(str(shards / "train-*.tar"))) == ["2/a", "2/b"]
    assert "train-000.tar" in caplog.text and "train-001.tar" in caplog.text


@pytest.mark.parametrize("pattern", ["train-{000..003}.tar", "test-*.tar", "one.tar"])
def test_a_shard_that_is_missing_is_an_error_at_once(shards, pattern):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_images(str(shards / pattern))


def test_include_is_refused_for_shards(shards):
    with pytest.raises(ValueError, match="`include`"):
        load_images(str(shards / "train-*.tar"), include=["a"])


# ---------------------------------------------------------------------------------------------------------------------
# load_images: the Hub, for which a local parquet file stands in
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def publish(columns, features):
        path = str(tmp_path / "hub.parquet")
        Dataset.from_dict(columns, features=Features(features)).to_parquet(path)

        def load_dataset(repo_id, split, streaming):
            return datasets.load_dataset("parquet", data_files={split: path}, split=split, streaming=streaming)

        monkeypatch.setattr(data, "load_dataset", load_dataset)

    return publish


def hub_image(seed, path=None):
    return {"bytes": encoded(image(seed=seed)), "path": path}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_dataset_keeps_only_its_images_and_takes_file_names_or_an_index_as_ids(hub, streaming):
    hub(
        {"image": [hub_image(0, "a.png"), hub_image(1)], "label": [3, 4]},
        {"image": datasets.Image(), "label": Value("int64")},
    )
    dataset = load_images("user/name", streaming=streaming)
    assert dataset.column_names == ["image", "image_id"]
    assert ids(dataset) == ["a.png", "1"]
    assert dataset.features["image"] == datasets.Image(decode=False)
    assert decode_image(next(iter(dataset))["image"]).tobytes() == image(seed=0).tobytes()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_datasets_own_image_id_is_kept_as_text(hub, streaming):
    hub({"image": [hub_image(0, "a.png")], "image_id": [42]}, {"image": datasets.Image(), "image_id": Value("int64")})
    assert ids(load_images("user/name", streaming=streaming)) == ["42"]


@pytest.mark.parametrize("streaming", [True, False])
def test_the_only_image_column_is_taken_under_any_name(hub, streaming):
    hub({"picture": [hub_image(0)], "text": ["x"]}, {"picture": datasets.Image(), "text": Value("string")})
    assert load_images("user/name", streaming=streaming).column_names == ["image", "image_id"]


def test_image_files_in_a_plain_binary_column_are_taken(hub):
    hub({"image": [encoded(image())]}, {"image": Value("binary")})
    (row,) = load_images("user/name")
    assert decode_image(row["image"]).size == (32, 24)


@pytest.mark.parametrize(
    "features",
    [
        {"text": Value("string")},
        {"left": datasets.Image(), "right": datasets.Image()},
        {"image": Value("string")},
        {"images": List(datasets.Image())},
    ],
)
def test_a_hub_dataset_without_one_clear_image_column_is_an_error_that_lists_its_columns(hub, features):
    rows = {name: [] for name in features}
    hub(rows, features)
    with pytest.raises(ValueError, match=f"no image column.*{list(features)[0]}.*rename_column"):
        load_images("user/name")


@pytest.mark.parametrize("named", [True, False])
def test_a_stream_from_the_hub_resumes_at_its_state(hub, named):
    hub(
        {"image": [hub_image(seed, f"{seed}.png" if named else None) for seed in range(5)]},
        {"image": datasets.Image()},
    )
    stream = EndlessImages(ReadableImageStream(load_images("user/name")), seed=0, shuffle=False)
    names = [f"{i}.png" if named else str(i) for i in range(5)]
    assert ids(stream.take(2)) == names[:2]
    resumed = EndlessImages(ReadableImageStream(load_images("user/name")), seed=0, shuffle=False)
    resumed.load_state_dict(stream.state_dict())
    assert ids(resumed.take(4)) == [*names[2:], names[0]]


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_said_to_be_neither(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="no such folder here.*could not be loaded"):
        load_images("images/train-that-is-not-there")


# ---------------------------------------------------------------------------------------------------------------------
# decode_image: what is readable
# ---------------------------------------------------------------------------------------------------------------------


def test_every_way_to_hold_an_image_gives_the_same_pixels(tmp_path):
    picture, path = image(), tmp_path / "a.png"
    picture.save(path)
    content = path.read_bytes()
    held = [picture, content, path, str(path), {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    for value in [*held, {"bytes": content, "path": "gone.png"}, {"bytes": content}, Image.open(path)]:
        decoded = decode_image(value)
        assert decoded.mode == "RGB" and decoded.tobytes() == picture.tobytes()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert decode_image(encoded(image(), format, **options)).tobytes() == image().tobytes()


def test_the_result_is_loaded_and_needs_its_file_no_more(tmp_path):
    image().save(tmp_path / "a.png")
    decoded = decode_image(Image.open(tmp_path / "a.png"))
    os.remove(tmp_path / "a.png")
    assert decoded.tobytes() == image().tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(format, orientation):
    content = encoded(
        two_halves(), format, exif=with_orientation(orientation), **({"quality": 95} if format == "JPEG" else {})
    )
    expected = PIL.ImageOps.exif_transpose(
        Image.open(io.BytesIO(encoded(two_halves(), exif=with_orientation(orientation))))
    )
    decoded = decode_image(content)
    assert decoded.size == expected.size == ((20, 40) if orientation > 4 else (40, 20))
    for corner in [(2, 2), (decoded.width - 3, decoded.height - 3)]:
        assert close_to(decoded.getpixel(corner), expected.convert("RGB").getpixel(corner))
    assert decoded.getexif().get(0x0112) is None


def test_damaged_exif_leaves_the_image_as_it_is_stored():
    content = encoded(two_halves(), "WEBP", exif=b"Exif\0\0XX*\0\x08\0\0\0garbage")
    assert decode_image(content).size == (40, 20)


def test_cmyk_is_converted():
    assert close_to(
        decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8)), (254, 0, 0)
    )


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped_to_white(format):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(16, 0)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(ramp), format)))
    assert decoded.dtype == np.uint8
    assert np.abs(decoded[0, :, 0].astype(float) - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize("mode", ["I;16B", "I;16L", "I;16"])
def test_either_byte_order_of_16_bit_grey_is_read(mode):
    pixels = np.full((8, 8), 0x8000, dtype=">u2" if mode.endswith("B") else "<u2")
    assert decode_image(Image.frombytes(mode, (8, 8), pixels.tobytes())).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("pixels", [np.linspace(0, 1, 64), np.linspace(-3, 1e38, 64)])
def test_float_pixels_are_stretched_from_black_to_white(pixels):
    picture = Image.fromarray(pixels.astype(np.float32)[None].repeat(16, 0))
    for value in (picture, encoded(picture, "TIFF")):
        row = np.asarray(decode_image(value))[0, :, 0].astype(int)
        assert row[0] == 0 and row[-1] == 255 and (np.diff(row) >= 0).all() and abs(row[32] - 130) < 3


def test_32_bit_integer_pixels_are_stretched_from_black_to_white():
    picture = Image.fromarray(np.linspace(0, 10**9, 64, dtype=np.int32)[None].repeat(16, 0))
    row = np.asarray(decode_image(encoded(picture, "TIFF")))[0, :, 0]
    assert row[0] == 0 and row[-1] == 255


def test_pixels_that_are_not_finite_are_black_and_raise_no_warning():
    pixels = np.full((16, 16), 5, dtype=np.float32)
    pixels[0, :2] = np.nan, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(Image.fromarray(pixels))
    assert decoded.getpixel((0, 0)) == decoded.getpixel((1, 0)) == (0, 0, 0)
    assert decoded.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(mode):
    black, clear = ((0, 0, 0, 255), (0, 0, 0, 0)) if mode == "RGBA" else ((0, 255), (0, 0))
    picture = Image.new(mode, (16, 16), clear)
    picture.paste(black, (0, 0, 8, 16))
    decoded = decode_image(picture)
    assert decoded.getpixel((2, 2)) == (0, 0, 0) and decoded.getpixel((12, 2)) == (255, 255, 255)


def test_half_transparent_pixels_are_mixed_with_white():
    assert close_to(decode_image(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128)))).getpixel((0, 0)), (127,) * 3, 1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(format):
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.paste(0, (0, 0, 8, 16))
    decoded = decode_image(encoded(picture, format, transparency=1))
    assert decoded.getpixel((2, 2)) == (10, 20, 30) and decoded.getpixel((12, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode, key", [("L", 7), ("RGB", (7, 7, 7)), ("1", 0)])
def test_a_transparent_colour_key_becomes_white(mode, key):
    assert decode_image(encoded(Image.new(mode, (16, 16), key), transparency=key)).getpixel((3, 3)) == (255,) * 3


def test_1_bit_images_are_black_and_white():
    picture = two_halves("black", "white").convert("1")
    for format in ("PNG", "TIFF", "BMP"):
        decoded = decode_image(encoded(picture, format))
        assert decoded.getpixel((2, 2)) == (0, 0, 0) and decoded.getpixel((30, 2)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert close_to(decode_image(content).getpixel((8, 8)), (255, 0, 0))


# ---------------------------------------------------------------------------------------------------------------------
# decode_image: what is not
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_file_is_unreadable(format):
    content = encoded(image(64, 64), format)
    assert reason_of(content[: len(content) // 2]) in ("damaged file", "not an image")


def test_an_empty_file_is_unreadable(tmp_path):
    (tmp_path / "a.png").touch()
    assert reason_of(tmp_path / "a.png") == reason_of(b"") == "empty file"


def test_a_missing_file_is_unreadable(tmp_path):
    assert reason_of(tmp_path / "a.png") == "missing file"
    (tmp_path / "file").touch()
    assert reason_of(tmp_path / "file" / "a.png") == "missing file"


def test_a_directory_and_a_pipe_are_unreadable_and_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert reason_of(tmp_path) == reason_of(tmp_path / "pipe.png") == "not a regular file"


def test_a_file_one_may_not_read_is_unreadable(tmp_path):
    image().save(tmp_path / "a.png")
    os.chmod(tmp_path / "a.png", 0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("root may read everything")
    assert reason_of(tmp_path / "a.png") == "no permission to read the file"


def test_no_image_is_unreadable():
    assert reason_of(None) == reason_of({"bytes": None, "path": None}) == "no image"


@pytest.mark.parametrize(
    "content",
    [
        b"just some text",
        b"<html><body>404 Not Found</body></html>",
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n",
    ],
)
def test_text_and_vector_formats_are_no_images(content):
    assert reason_of(content) == "not an image"


def test_ghostscript_is_never_called_on_a_postscript_file(tmp_path, monkeypatch):
    content = encoded(image(), "EPS")
    assert Image.open(io.BytesIO(content)).format == "EPS"  # PIL alone would take it
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("ghostscript was called"))
    assert reason_of(content) == "not an image"


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(data.MAX_FILE_BYTES + 1)  # sparse: takes no space
    assert reason_of(tmp_path / "a.png") == "file too large"


def test_a_tiff_whose_tag_has_the_wrong_type_is_unreadable():
    content = bytearray(encoded(image(), "TIFF"))
    tag = content.index(struct.pack("<HH", 273, 4))  # strip offsets, an unsigned long
    content[tag + 2] = 5  # a fraction
    assert reason_of(bytes(content)) == "damaged file"


@pytest.mark.parametrize("size", [(1, 1), (MIN_SIDE - 1, 50), (50, MIN_SIDE - 1)])
def test_an_image_too_small_to_hold_anything_is_unreadable(size):
    assert reason_of(encoded(image(*size))) == reason_of(image(*size)) == "too small"
    assert decode_image(image(MIN_SIDE, MIN_SIDE)).size == (MIN_SIDE, MIN_SIDE)


def test_a_strip_that_the_image_processor_would_refuse_is_unreadable():
    assert reason_of(image(MIN_SIDE, MIN_SIDE * MAX_ASPECT_RATIO + 1)) == "too elongated"
    assert decode_image(image(MIN_SIDE, MIN_SIDE * MAX_ASPECT_RATIO)).height == MIN_SIDE * MAX_ASPECT_RATIO


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("side", [9_500, 13_000, 50_000])  # PIL is silent or warns; warns; raises
def test_a_decompression_bomb_is_refused_by_its_header_and_never_decoded(side, action, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("the bomb was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        assert reason_of(png_announcing(side, side)) == "too many pixels"


def test_the_pixel_limit_holds_when_pils_own_is_switched_off_and_pils_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert 20_000**2 > MAX_DECODED_PIXELS
    assert reason_of(png_announcing(20_000, 20_000)) == "too many pixels"
    assert Image.MAX_IMAGE_PIXELS is None


def test_a_png_whose_text_unpacks_to_gigabytes_is_unreadable():
    packed = zlib.compress(b"\0" * 2**27)
    content = b"key\0\0" + packed
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    plain = encoded(image())
    assert reason_of(plain[:33] + chunk + plain[33:]) == "damaged file"


@pytest.mark.parametrize("value", [np.zeros((8, 8, 3), np.uint8), ["a.png"], 7, {"url": "a.png"}])
def test_a_column_of_the_wrong_type_is_an_error_and_not_a_skip(value):
    with pytest.raises(TypeError, match="expected a PIL image, bytes, a path"):
        decode_image(value)


def test_a_row_cannot_make_this_machine_fetch_from_just_anywhere(monkeypatch):
    monkeypatch.setattr(fsspec, "open", lambda *_, **__: pytest.fail("something was fetched"))
    for url in ["http://169.254.169.254/latest", "https://example.com/a.png", "hf://x.zip::https://example.com/x.zip"]:
        assert reason_of({"bytes": None, "path": url}) == "remote file that is not on the Hub"


def test_a_file_that_a_hub_stream_points_to_is_fetched(tmp_path, monkeypatch):
    image().save(tmp_path / "a.png")
    monkeypatch.setattr(fsspec, "open", lambda url, mode: open(tmp_path / url.rsplit("/", 1)[1], mode))
    assert decode_image({"bytes": None, "path": "hf://datasets/user/name@main/a.png"}).size == (32, 24)
    assert reason_of("hf://datasets/user/name@main/b.png") == "missing file"


def test_an_unreadable_image_error_survives_pickling_and_says_why():
    error = pickle.loads(pickle.dumps(UnreadableImageError("too small", "1x1")))
    assert (error.reason, str(error)) == ("too small", "too small (1x1)")
    assert isinstance(error, ValueError)


def every_kind_of_file():
    exif = with_orientation(6)
    picture, other = image(40, 30), image(40, 30, seed=1)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        yield encoded(picture, format)
    for format in ("PNG", "JPEG", "WEBP", "TIFF"):
        yield encoded(picture, format, exif=exif)
    for format in ("PNG", "GIF", "WEBP"):
        yield encoded(picture, format, save_all=True, append_images=[other])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        yield encoded(picture, "TIFF", compression=compression)
    for mode in ("L", "1", "P", "RGBA", "LA", "I;16"):
        yield encoded(picture.convert(mode) if mode != "I;16" else Image.new(mode, (40, 30), 40_000), "PNG")
    yield encoded(picture.convert("CMYK"), "JPEG")
    yield encoded(picture, "JPEG", progressive=True)
    yield encoded(picture.convert("P"), "BMP")
    yield encoded(Image.fromarray(np.random.default_rng(0).random((30, 40), dtype=np.float32)), "TIFF")


def damage(content, rng):
    content, kind = bytearray(content), rng.randrange(4)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:  # the header, where lengths and types are
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(min(len(content), 300))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(1, 20)] = rng.randbytes(rng.randrange(20))
    else:  # the end, where a TIFF has its tags
        for _ in range(rng.choice([1, 2, 4])):
            content[-1 - rng.randrange(min(len(content), 300))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(content)


def test_no_damage_to_a_file_raises_anything_but_an_unreadable_image_error(capfd):
    rng = random.Random(0)
    files = list(every_kind_of_file())
    unreadable = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8_000):
            content = damage(rng.choice(files), rng)
            try:
                assert decode_image(content, max_pixels=SMALLEST_MAX_PIXELS).mode == "RGB"
            except UnreadableImageError:
                unreadable += 1
    assert 2_000 < unreadable < 8_000
    capfd.readouterr()  # libtiff writes to stderr


# ---------------------------------------------------------------------------------------------------------------------
# max_pixels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_over_max_pixels_is_shrunk_to_it_and_keeps_its_aspect(format):
    decoded = decode_image(encoded(image(800, 400), format), max_pixels=20_000)
    assert decoded.size == (200, 100)


def test_an_image_within_max_pixels_keeps_its_size():
    assert decode_image(image(100, 80), max_pixels=8_000).size == (100, 80)


def test_a_large_jpeg_is_not_decoded_at_full_size(monkeypatch):
    sizes = []
    load = PIL.ImageFile.ImageFile.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: (sizes.append(self.size), load(self))[1])
    decode_image(encoded(image(1600, 800), "JPEG"), max_pixels=20_000)
    assert sizes[0] == (200, 100)


def test_shrinking_is_antialiased():
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    decoded = np.asarray(decode_image(Image.fromarray(stripes), max_pixels=10_000))
    assert (np.abs(decoded[10:-10, 10:-10].astype(int) - 127) < 10).all()


def test_an_oriented_image_over_max_pixels_is_shrunk_and_turned():
    content = encoded(image(800, 400), "JPEG", exif=with_orientation(6))
    assert decode_image(content, max_pixels=20_000).size == (100, 200)


@pytest.mark.parametrize("max_pixels", [SMALLEST_MAX_PIXELS, 4_000, 4_321])
def test_a_shrunk_strip_stays_within_the_side_and_aspect_limits(max_pixels):
    decoded = decode_image(image(4_000, 20), max_pixels=max_pixels)
    short, long = sorted(decoded.size)
    assert short >= MIN_SIDE and long <= MAX_ASPECT_RATIO * short and short * long <= max_pixels


@pytest.mark.parametrize("max_pixels", [0, -1, SMALLEST_MAX_PIXELS - 1])
def test_a_max_pixels_too_small_to_mean_anything_is_refused(max_pixels):
    for use in (partial(decode_image, image()), partial(ReadableImages, [{"image": image()}])):
        with pytest.raises(ValueError, match="`max_pixels` is .*expected at least"):
            use(max_pixels=max_pixels)


def test_shrinking_is_warned_of_once_per_reader(caplog):
    reader = ReadableImages([{"image": image(200, 200)} for _ in range(5)], max_pixels=10_000)
    assert {row["image"].size for row in reader} == {(100, 100)}
    assert len(caplog.records) == 1 and "max_pixels=10000" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# The readers
# ---------------------------------------------------------------------------------------------------------------------

GOOD, BAD, SMALL = encoded(image()), b"not an image", encoded(image(1, 1))


def rows(*contents):
    """Rows as `datasets` holds them undecoded, with a column of the user's."""
    return [{"image": {"bytes": c, "path": None}, "note": f"n{i}"} for i, c in enumerate(contents)]


def as_dataset(*contents):
    features = Features({"image": datasets.Image(), "note": Value("string")})
    return Dataset.from_list(rows(*contents), features=features)


def as_stream(*contents, shards=1):
    return as_dataset(*contents).to_iterable_dataset(num_shards=shards)


class TorchStream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def map_style(contents):
    return ReadableImages(as_dataset(*contents))


def streamed(contents):
    return ReadableImageStream(as_stream(*contents))


@pytest.mark.parametrize("read", [map_style, streamed])
def test_every_row_has_a_decoded_image_an_id_and_its_other_columns(read):
    first, second = read([GOOD, GOOD])
    assert first["image"].mode == "RGB" and first["image"].tobytes() == image().tobytes()
    assert (first["note"], first["image_id"]) == ("n0", "0")
    assert (second["note"], second["image_id"]) == ("n1", "1")


@pytest.mark.parametrize(
    "read",
    [
        lambda rows, root: ReadableImages(rows, image_root=root),
        lambda rows, root: ReadableImageStream(TorchStream(rows), image_root=root),
    ],
)
def test_the_id_is_the_rows_own_or_the_file_name_or_the_index(tmp_path, read):
    path = tmp_path / "b.png"
    image().save(path)
    given = [{"image": GOOD, "image_id": 12}, {"image": str(path)}, {"image": path}, {"image": Image.open(path)}]
    assert ids(read([*given, {"image": GOOD}], tmp_path)) == ["12", "b.png", "b.png", "b.png", "4"]


def test_a_bad_row_is_replaced_by_the_next_readable_one_and_the_length_stays():
    reader = map_style([GOOD, BAD, SMALL, GOOD, BAD])
    assert len(reader) == 5
    assert [row["note"] for row in reader] == ["n0", "n3", "n3", "n3", "n0"]
    assert reader[-1]["note"] == "n0" and reader[-2]["note"] == "n3"


def test_a_bad_row_is_counted_once_however_often_it_is_asked_for():
    reader = map_style([GOOD, BAD, SMALL, BAD])
    for _ in range(3):
        list(reader)
    assert reader.skipped == {"not an image": 2, "too small": 1}


def test_an_index_out_of_range_is_an_index_error():
    with pytest.raises(IndexError):
        map_style([GOOD])[1]


def test_a_stream_leaves_bad_rows_out_and_counts_them():
    reader = streamed([BAD, GOOD, SMALL, GOOD, BAD])
    assert [row["note"] for row in reader] == ["n1", "n3"]
    assert reader.skipped == {"not an image": 2, "too small": 1}


@pytest.mark.parametrize("read", [map_style, streamed])
def test_a_dataset_with_no_readable_image_is_an_error_that_counts_the_reasons(read):
    with pytest.raises(ValueError, match=r"None of the 3 images.*'not an image': 2.*'too small': 1"):
        next(iter(read([BAD, SMALL, BAD])))


def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match="None of the 0 images"):
        list(ReadableImageStream(TorchStream([])))


def test_the_first_skips_are_logged_with_name_and_reason_and_later_ones_at_powers_of_ten(caplog):
    reader = ReadableImages([*({"image": BAD, "image_id": f"bad\n{i}"} for i in range(150)), {"image": GOOD}])
    reader[0]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 7
    assert messages[0] == "Skipped image 'bad\\n0': not an image (expected PNG, JPEG, WEBP, BMP, GIF, TIFF)"
    assert messages[5].startswith("10 images skipped") and messages[6].startswith("100 images skipped")


def test_damage_inside_the_pixels_does_not_stop_datasets_own_iteration():
    content = encoded(image(64, 64), "JPEG")
    with pytest.raises(OSError):
        as_dataset(content[:500])[0]  # what `datasets` does by itself
    assert [row["note"] for row in streamed([content[:500], content])] == ["n1"]
    assert [row["note"] for row in map_style([content[:500], content])] == ["n1", "n1"]


def test_a_failure_of_the_machine_is_not_taken_for_a_bad_image(tmp_path, monkeypatch):
    image().save(tmp_path / "a.png")

    def too_many_open_files(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(data.Path, "read_bytes", too_many_open_files)
    with pytest.raises(OSError, match="Too many open files"):
        ReadableImages([{"image": tmp_path / "a.png"}])[0]


@pytest.mark.parametrize("reader", [ReadableImages, ReadableImageStream])
def test_a_dataset_without_an_image_column_is_an_error_that_lists_its_columns(reader):
    dataset = as_dataset(GOOD).rename_column("image", "picture")
    dataset = dataset if reader is ReadableImages else dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"\['picture', 'note'\].*rename_column"):
        reader(dataset)


def test_rows_without_an_image_column_are_an_error_where_the_columns_are_not_known_beforehand():
    with pytest.raises(ValueError, match=r"\['picture'\].*rename_column"):
        ReadableImages([{"picture": GOOD}])
    with pytest.raises(ValueError, match=r"\['picture'\].*rename_column"):
        list(ReadableImageStream(TorchStream([{"picture": GOOD}])))


def test_trls_images_column_is_an_error_that_says_to_use_image():
    with pytest.raises(ValueError, match=r"expected `image`: one image per row.*remove_columns='images'"):
        ReadableImages([{"images": [GOOD]}])


def test_a_list_in_the_image_column_is_an_error_at_once():
    dataset = Dataset.from_dict({"image": [[GOOD]]}, features=Features({"image": List(datasets.Image())}))
    with pytest.raises(ValueError, match="is a list"):
        ReadableImages(dataset)


@pytest.mark.parametrize("empty", [[], Dataset.from_dict({"image": []})])
def test_an_empty_dataset_is_an_error(empty):
    with pytest.raises(ValueError, match="empty"):
        ReadableImages(empty)


@pytest.mark.parametrize("reader", [ReadableImages, ReadableImageStream])
def test_a_dict_of_splits_is_an_error_that_says_to_take_one(reader):
    with pytest.raises(ValueError, match=r"dict of \['train'\].*dataset\['train'\]"):
        reader(datasets.DatasetDict({"train": as_dataset(GOOD)}))


def test_both_readers_work_in_dataloader_workers():
    contents = [GOOD, BAD, GOOD, GOOD, SMALL, GOOD]
    for reader in (map_style(contents), ReadableImageStream(as_stream(*contents, shards=3))):
        loader = DataLoader(reader, batch_size=None, num_workers=2)
        assert {row["note"] for row in loader} == {"n0", "n2", "n3", "n5"}


@pytest.mark.parametrize("read", [map_style, streamed])
def test_a_reader_can_be_pickled_as_spawned_workers_need(read):
    reader = read([BAD, GOOD])
    assert next(iter(pickle.loads(pickle.dumps(reader))))["note"] == "n1"


def test_a_worker_without_a_share_of_the_stream_is_no_error():
    loader = DataLoader(streamed([GOOD, GOOD]), batch_size=None, num_workers=2)
    assert [row["note"] for row in loader] == ["n0", "n1"]


def test_a_folder_goes_through_to_decoded_images_and_counts_its_bad_files(folder, caplog):
    (folder / "photos" / "broken.png").write_bytes(GOOD[:60])
    (folder / "photos" / "gone.png").symlink_to(folder / "nothing")
    caplog.set_level(logging.WARNING)
    stream = ReadableImageStream(load_images(folder))
    assert ids(stream) == FOLDER_IDS
    assert stream.skipped == {"damaged file": 1, "missing file": 1}
    assert "photos/broken.png" in caplog.text
    table = ReadableImages(load_images(folder, streaming=False))
    assert len(table) == 6 and {row["image"].mode for row in table} == {"RGB"}
