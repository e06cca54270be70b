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

"""Large and hostile data: folders of a million files, shards, parquet, mixtures, resuming, corruption, two processes."""

import inspect
import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, lora, noise_images, snapshot
from torch.utils.data import DataLoader

from evolmm_trl import data
from evolmm_trl.data import (
    COLUMNS,
    EndlessImages,
    ImagePaths,
    ReadableImages,
    ReadableImageStream,
    UnreadableImageError,
    decode_image,
    load_images,
)
from evolmm_trl.schedule import RoleSchedule, RolloutStream


SOURCE = Path(__file__).parent.parent / "src"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No test finds what another has listed or built."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(data, "_listed_folders", set())
    # `datasets` sleeps 5 seconds whenever it closes a parquet file
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return folder


def png(seed=0, side=8):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


GOOD = png()


def make_folder(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(GOOD)
    return root


def make_shards(root, shards, images, prefix="s"):
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"{shard:03d}.tar", "w") as tar:
            for i in range(images):
                member = tarfile.TarInfo(f"{prefix}{shard:03d}/{i}.png")
                member.size = len(GOOD)
                tar.addfile(member, io.BytesIO(GOOD))
    return str(root / "*.tar")


def make_parquet(root, files, rows, prefix="p"):
    written = (root / "000.parquet").exists()
    root.mkdir(parents=True, exist_ok=True)
    features = Features({"image": datasets.Image(), "image_id": Value("string")})
    for file in range(0 if written else files):
        ids = [f"{prefix}{file}/{i}" for i in range(rows)]
        images = [{"bytes": GOOD, "path": None}] * rows
        table = Dataset.from_dict({"image": images, "image_id": ids}, features=features)
        table.to_parquet(root / f"{file:03d}.parquet", batch_size=4)
    return load_dataset("parquet", data_files=str(root / "*.parquet"), split="train", streaming=True)


def endless(stream, seed=0, shuffle=True, **options):
    return EndlessImages(ReadableImageStream(stream, **options), seed, shuffle)


def ids(rows):
    return [row["image_id"] for row in rows]


def reason_of(read):
    with pytest.raises(UnreadableImageError) as caught:
        read()
    return caught.value.reason


# ---------------------------------------------------------------------------------------------------------------------
# Folders of many files
# ---------------------------------------------------------------------------------------------------------------------


def test_twenty_thousand_files_are_listed_in_order_at_once(tmp_path):
    names = [f"{i % 20}/{i % 7}/{i}{'.png' if i % 2 else '.jpg'}" for i in range(20_000)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    start = time.perf_counter()
    dataset = load_images(tmp_path, streaming=False)
    seconds = time.perf_counter() - start
    in_order = dataset["image_id"][:] == sorted(names)  # outside the assertion: pytest would show the difference
    assert in_order
    assert seconds < 5  # measured: 0.3


class Entry:
    def __init__(self, name):
        self.name = name

    def is_dir(self):
        return "." not in self.name

    def is_symlink(self):
        return False


class SimulatedTree:
    """Stands in for `os.scandir`: as many folders in /simulated, and as many images in each."""

    def __init__(self, folders, files):
        self.folders, self.files = folders, files

    def __call__(self, path):
        top = path == "/simulated"
        names = (f"folder{i:05}" for i in range(self.folders)) if top else (f"{i:07}.jpg" for i in range(self.files))
        return nullcontext(map(Entry, names))


def megabytes(name):
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is reset through /proc")
def test_a_large_tree_is_listed_in_constant_memory(monkeypatch):
    monkeypatch.setattr(os, "scandir", SimulatedTree(folders=300, files=1000))
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    dataset = data._load_folder("/simulated", False, None)
    assert dataset[len(dataset) - 1]["image_id"] == "folder00299/0000999.jpg"
    # Measured: 30, for a million as well. As lists of rows: 1 GB for a million
    assert megabytes("VmHWM") - before < 60


def test_a_listing_is_one_file_per_content_and_is_made_anew_when_the_folder_changes(tmp_path, cache):
    root = make_folder(tmp_path / "images", ["a/0.png", "b/1.png"])
    for _ in range(2):
        assert ids(load_images(root)) == ["a/0.png", "b/1.png"]
    assert len(list(cache.rglob("*"))) == 2  # a folder and a file
    (root / "a" / "0.png").rename(root / "a" / "9.png")
    assert ids(load_images(root)) == ["a/9.png", "b/1.png"]
    assert len(list(cache.rglob("*.arrow"))) == 2


def test_a_listing_that_fails_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    root = make_folder(tmp_path / "images", ["a/0.png", "b/1.png"])
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("b"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        load_images(root)
    assert not list(cache.rglob("*.*"))


def test_a_tree_may_be_deeper_than_pythons_recursion(tmp_path):
    deep = "/".join(["d"] * 500)
    make_folder(tmp_path, [f"{deep}/x.png"])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 300)
    try:
        names = list(data._image_names(str(tmp_path), None))
    finally:
        sys.setrecursionlimit(limit)
    assert names == [f"{deep}/x.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Order and resuming, for every kind of stream
# ---------------------------------------------------------------------------------------------------------------------


def folder_stream(root):
    return load_images(make_folder(root, [f"{i % 5}/{i}.png" for i in range(100)]))


def tar_stream(root):
    return load_images(make_shards(root, shards=25, images=4))


def parquet_stream(root):
    return make_parquet(root, files=4, rows=25)


def row_group_stream(root):
    return make_parquet(root, files=4, rows=25).reshard()


def mixed_stream(root):
    sources = [
        folder_stream(root / "a"),
        tar_stream(root / "b"),
        parquet_stream(root / "c").cast_column("image", COLUMNS["image"]),
    ]
    weights = [0.5, 0.3, 0.2]
    return interleave_datasets(sources, probabilities=weights, seed=1, stopping_strategy="all_exhausted")


def pil_stream(root):
    """A generator of decoded images, whose type is not known beforehand."""

    def rows(shards):
        for shard in shards:
            for i in range(10):
                yield {"image": noise_images(1, side=8)[0], "image_id": f"{shard}/{i}"}

    return IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(10))})


def user_shuffled_stream(root):
    return tar_stream(root).shuffle(seed=3, buffer_size=50)


def mapped_stream(root):
    return tar_stream(root).map(lambda row: {"image_id": row["image_id"].upper()}).filter(lambda row: True)


STREAMS = [
    folder_stream,
    tar_stream,
    parquet_stream,
    row_group_stream,
    mixed_stream,
    mapped_stream,
    pil_stream,
    user_shuffled_stream,
]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data, "STREAM_BLOCK", 16)


@pytest.mark.parametrize(
    ("make", "shuffle"), [*((make, True) for make in STREAMS), (tar_stream, False), (user_shuffled_stream, False)]
)
def test_a_stream_resumes_at_any_row_of_any_pass(make, shuffle, tmp_path, small_blocks, caplog):
    stream = make(tmp_path)
    first = endless(stream, 5, shuffle)
    expected, states = [], []
    for _ in range(50):
        states.append(json.dumps(first.state_dict()))
        expected += ids(first.take(5))
    assert len(set(expected[:80])) >= 50 and len(set(expected)) < len(expected)  # more than one pass
    for k in (7, 19, 42):
        caplog.clear()
        resumed = endless(make(tmp_path), 5, shuffle)
        resumed.load_state_dict(json.loads(states[k]))
        state = resumed.state_dict()
        assert ids(chain(*(resumed.take(5) for _ in range(8)))) == expected[5 * k : 5 * k + 40]
        if make is not user_shuffled_stream:
            assert json.dumps(state) == states[k]
            assert not [record for record in caplog.records if "pass" not in record.getMessage()]


def test_a_resumed_stream_can_be_saved_and_resumed_again(tmp_path, small_blocks):
    stream = tar_stream(tmp_path)
    expected = ids(endless(stream).take(90))
    read = []
    state = None
    for _ in range(30):
        images = endless(tar_stream(tmp_path))
        if state is not None:
            images.load_state_dict(state)
        read += ids(images.take(3))
        state = images.state_dict()
    assert read == expected


def test_the_order_is_that_of_the_seed_with_and_without_a_worker_and_on_every_rank(tmp_path, small_blocks):
    mixed = mixed_stream(tmp_path)

    def order(seed=0, world_size=1, num_workers=0):
        ranks = []
        for rank in range(world_size):
            images = endless(mixed, seed)
            shape = {"images_per_process": 4 // world_size, "micro_batches": 2, "num_workers": num_workers}
            stream = RolloutStream(images, RoleSchedule(2), rank=rank, world_size=world_size, **shape)
            ranks.append([ids(rows) for rows in islice(stream, 36)])
        return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]

    once = order()
    assert order(num_workers=1) == order(world_size=2) == order(world_size=4, num_workers=1) == once
    assert order(seed=1) != once


def test_a_mixture_has_its_weights(tmp_path):
    rows = ids(endless(mixed_stream(tmp_path)).take(200))
    counts = Counter(name[0] if name[0] in "sp" else "folder" for name in rows)
    assert counts["folder"] == pytest.approx(100, abs=22)
    assert counts["s"] == pytest.approx(60, abs=22)
    assert counts["p"] == pytest.approx(40, abs=22)


def test_map_style_sources_mix_too_and_need_no_state(tmp_path):
    sources = [
        load_images(make_folder(tmp_path / "a", [f"{i}.png" for i in range(10)]), streaming=False),
        load_images(make_shards(tmp_path / "b", 2, 20), streaming=False),
    ]
    mixed = interleave_datasets(sources, probabilities=[0.3, 0.7], seed=0, stopping_strategy="all_exhausted")
    rows = ids(ReadableImages(mixed)[i] for i in range(len(mixed)))
    assert set(rows) == {*ids(sources[0]), *ids(sources[1])}


# Reading what was read before


def test_a_resumed_stream_of_shards_reads_only_the_block_it_is_in(tmp_path, small_blocks, monkeypatch):
    read = []
    images_in_tar = data._images_in_tar

    def counting(file):
        for row in images_in_tar(file):
            read.append(row["image_id"])
            yield row

    monkeypatch.setattr(data, "_images_in_tar", counting)
    pattern = make_shards(tmp_path, shards=100, images=4)

    def make():
        return endless(load_images(pattern))

    images = make()
    images.take(340)
    state, before = images.state_dict(), len(read)
    assert before >= 340
    read.clear()
    resumed = make()
    resumed.load_state_dict(state)
    assert ids(resumed.take(4)) == ids(images.take(4))
    # The block of 16, and of each of the ten shards that are mixed what was read of it before, and two rows ahead
    assert len(read) <= 16 + 10 * 6 < before / 4


@pytest.mark.parametrize(("make", "size"), [(tar_stream, len(GOOD)), (pil_stream, 8 * 8 * 4)])
def test_a_block_of_large_files_has_fewer_rows(make, size, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STREAM_BLOCK_BYTES", 3 * size)
    images = endless(make(tmp_path), shuffle=False)
    images.take(4)
    assert images.state_dict()["first_row"] == 3


def test_a_stream_that_cannot_seek_is_read_again_and_says_so(tmp_path, small_blocks, caplog):
    images = endless(user_shuffled_stream(tmp_path))
    images.take(70)
    resumed = endless(user_shuffled_stream(tmp_path))
    resumed.load_state_dict(images.state_dict())
    assert "The stream's own state leads elsewhere, so its pass is read again up to row 64." in caplog.text
    assert "dataset has changed" not in caplog.text
    assert ids(resumed.take(9)) == ids(images.take(9))


def test_a_stream_whose_rows_have_changed_says_so_and_goes_on(tmp_path, small_blocks, caplog):
    images = endless(tar_stream(tmp_path), shuffle=False)
    images.take(70)
    state = images.state_dict()
    make_shards(tmp_path, shards=25, images=4, prefix="other")
    resumed = endless(load_images(str(tmp_path / "*.tar")), shuffle=False)
    resumed.load_state_dict(state)
    assert "The images at row 64 of the stream are not those that were there" in caplog.text
    assert ids(resumed.take(2)) == ["other017/2", "other017/3"]


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read
# ---------------------------------------------------------------------------------------------------------------------


def damaged_stream(damaged, count=60):
    files = [GOOD[:100] if i in damaged else GOOD for i in range(count)]
    rows = {"image": [{"bytes": file, "path": None} for file in files], "image_id": [str(i) for i in range(count)]}
    return Dataset.from_dict(rows, features=COLUMNS).to_iterable_dataset(num_shards=3)


@pytest.mark.parametrize("damaged", [{3}, {0, 1, 2, 59}, set(range(20, 45))])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_corrupt_image_moves_no_other_row_whichever_process_reads_it(damaged, world_size, small_blocks):
    whole = ids(endless(damaged_stream(set())).take(120))
    ranks = [endless(damaged_stream(damaged)) for _ in range(world_size)]
    read = []
    for _ in range(20):
        share = 6 // world_size
        for rank, images in enumerate(ranks):
            read += ids(images.take(6, slice(rank * share, (rank + 1) * share)))
    assert len(read) == 120
    for place, (expected, found) in enumerate(zip(whole, read, strict=True)):
        if int(expected) in damaged:
            expected = next(name for name in whole[place:] if int(name) not in damaged)
        assert found == expected


def test_every_corrupt_image_is_counted_once_a_pass_and_named(small_blocks, caplog):
    caplog.set_level(logging.INFO)
    images = endless(damaged_stream(set(range(0, 60, 3))))
    images.take(60)
    assert images.images.skipped == {"damaged file": 20}
    named = re.findall(r"Skipped image '(\d+)': damaged file", caplog.text)
    assert sorted(map(int, named)) == list(range(0, 60, 3))
    assert sum("Skipped image" in r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING) == 5


def test_a_row_is_decoded_only_by_the_process_whose_part_it_is(small_blocks, monkeypatch):
    decoded = []
    decode_now = data._decode_now
    monkeypatch.setattr(data, "_decode_now", lambda *args: (decoded.append(1), decode_now(*args))[1])
    images = endless(damaged_stream(set()))
    for _ in range(5):
        assert len(images.take(8, slice(2, 4))) == 2
    assert len(decoded) == 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_without_a_readable_image_ends_with_an_error_and_not_in_a_loop(num_workers, small_blocks):
    shape = {"images_per_process": 2, "micro_batches": 1, "num_workers": num_workers}
    with pytest.raises(ValueError, match="None of the .* images could be read.*damaged file"):
        list(RolloutStream(endless(damaged_stream(range(60))), RoleSchedule(1), **shape))


def test_a_stream_without_rows_is_an_error():
    with pytest.raises(ValueError, match="None of the 0 images could be read"):
        endless(damaged_stream(set()).filter(lambda row: False)).take(1)


def test_a_long_run_of_unreadable_images_ends_with_an_error_before_it_fills_the_memory(small_blocks, monkeypatch):
    monkeypatch.setattr(data, "MAX_UNREADABLE_IN_A_ROW", 30)
    images = endless(damaged_stream(set(range(5, 60))), shuffle=False)
    assert ids(images.take(5)) == list("01234")
    with pytest.raises(ValueError, match="None of the 30 images could be read"):
        images.take(1)


def test_a_stream_split_by_node_is_refused():
    split = split_dataset_by_node(damaged_stream(set()), rank=0, world_size=3)
    with pytest.raises(ValueError, match="split_dataset_by_node.*Pass the whole stream"):
        endless(split)


def test_a_member_of_a_shard_that_is_too_large_is_named(tmp_path, monkeypatch, caplog):
    pattern = make_shards(tmp_path, 1, 2)
    monkeypatch.setattr(data, "MAX_FILE_BYTES", len(GOOD) - 1)
    with pytest.raises(ValueError, match="None of the 0 images"):
        list(ReadableImageStream(load_images(pattern)))
    assert "Skipped image 's000/0.png': file too large" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Decoding is bounded
# ---------------------------------------------------------------------------------------------------------------------


def jpeg_with_scans(count, side=1000):
    """A progressive JPEG whose smallest scan, of less than a hundred bytes, is there `count` times more."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    first = content.index(b"\xff\xda")
    table = content.index(b"\xff\xc4", first)
    end = min(
        content.index(marker, table + 4) for marker in (b"\xff\xc4", b"\xff\xd9") if marker in content[table + 4 :]
    )
    return content[:end] + content[table:end] * count + content[end:]


def test_a_jpeg_of_thousands_of_scans_is_refused_without_decoding_them():
    assert decode_image(jpeg_with_scans(20)).size == (1000, 1000)
    bomb = jpeg_with_scans(3000, side=4000)
    assert len(bomb) < 700_000
    start = time.process_time()
    assert reason_of(lambda: decode_image(bomb)) == "too many scans"
    assert time.process_time() - start < 1  # PIL alone: 5 seconds


def test_the_scans_of_a_thumbnail_and_of_what_follows_an_image_are_not_counted():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    content = file.getvalue()
    scans = b"\xff\xda\x00\x02" * 1000
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(scans)) + scans
    assert decode_image(content[:2] + thumbnail + content[2:] + scans).size == (64, 64)


def test_the_slowest_image_within_the_limits_takes_seconds():
    file = io.BytesIO()
    Image.new("RGB", (4700, 4700), "red").save(file, "WEBP", lossless=True, method=0)
    start = time.process_time()
    decode_image(file.getvalue(), max_pixels=10_000)
    seconds = (time.process_time() - start) * data.MAX_DECODED_PIXELS / 4700**2
    assert seconds < data.MAX_DECODE_SECONDS / 2  # measured: 6


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_takes_too_long_is_skipped_in_the_process_and_in_a_worker(num_workers, monkeypatch):
    monkeypatch.setattr(data, "MAX_JPEG_SCANS", 10_000)
    monkeypatch.setattr(data, "MAX_DECODE_SECONDS", 1)
    slow = jpeg_with_scans(2000, side=4000)  # four seconds, in one call of the decoder
    dataset = ReadableImages([{"image": slow}, {"image": GOOD, "image_id": "good"}])
    start = time.perf_counter()
    assert ids(DataLoader(dataset, batch_size=None, num_workers=num_workers)) == ["good", "good"]
    assert time.perf_counter() - start < 30
    if num_workers == 0:
        assert dataset.skipped == {"takes too long to decode": 1}


def test_a_file_of_many_frames_costs_one(tmp_path):
    frames = [Image.new("P", (100, 100), i % 256) for i in range(300)]
    for format in ("GIF", "TIFF"):
        frames[0].save(tmp_path / "many", format, save_all=True, append_images=frames[1:])
        start = time.process_time()
        assert decode_image(tmp_path / "many").size == (100, 100)
        assert time.process_time() - start < 0.5


@pytest.mark.parametrize("format", ["EPS", "ICO", "PPM", "PCX", "TGA", "ICNS", "JPEG2000", "IM", "DDS"])
def test_other_formats_than_the_listed_ones_reach_no_decoder(format, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "x", format)
    assert reason_of(lambda: decode_image(tmp_path / "x")) == "not an image"


# ---------------------------------------------------------------------------------------------------------------------
# Paths in rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """root/inside.png, root/sub/deep.png, and secret.png beside it, to which links in root lead."""
    make_folder(tmp_path, ["root/inside.png", "root/sub/deep.png", "secret/secret.png", "rootless/x.png"])
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret" / "secret.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "secret")
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path


INSIDE = ["inside.png", "sub/deep.png", "sub/../inside.png", "./inside.png", "{root}/inside.png"]
OUTSIDE = [
    "../secret/secret.png",
    "{root}/../secret/secret.png",
    "{root}less/x.png",
    "link.png",
    "linked/secret.png",
    "/etc/hostname",
    "/proc/self/environ",
]


@pytest.mark.parametrize("held", [lambda path: path, lambda path: {"bytes": None, "path": path}])
@pytest.mark.parametrize("given", [True, False])
def test_paths_in_rows_do_not_leave_the_root(places, held, given, caplog):
    def read(path):
        rows = [{"image": held(path.replace("{root}", str(places / "root")))}, {"image": GOOD, "image_id": "next"}]
        dataset = ReadableImages(rows, image_root=str(places / "root") if given else None)
        return dataset[0]["image_id"], dict(dataset.skipped)

    for path in INSIDE:
        assert read(path) == (Path(path).name, {})
    for path in OUTSIDE:
        assert read(path) == ("next", {"path outside the image root": 1})
    assert f"'../secret/secret.png' is not in '{places}/root'; if it should be read, set `image_root`" in caplog.text


def test_relative_paths_start_at_the_root(places):
    rows = [{"image": "secret.png"}]
    assert ReadableImages(rows, image_root=str(places / "secret"))[0]["image_id"] == "secret.png"
    with pytest.raises(ValueError, match="None of the 1 images.*missing file"):
        ReadableImages(rows)[0]


def test_a_root_that_is_no_folder_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="`image_root` is .*expected a folder"):
        ReadableImages([{"image": GOOD}], image_root=str(tmp_path / "absent"))


@pytest.mark.parametrize("format", ["json", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_file_cannot_name_files_outside(places, format, streaming):
    rows = Dataset.from_dict({"image": ["inside.png", str(places / "secret" / "secret.png")]})
    file = str(places / f"rows.{format}")
    getattr(rows, f"to_{format}")(file)
    dataset = load_dataset(format, data_files=file, split="train", streaming=streaming)
    known = dataset.features is not None  # not so for a stream of CSV
    for typed in [dataset, *([dataset.cast_column("image", datasets.Image())] if known else [])]:
        reader = ReadableImageStream(typed) if streaming else ReadableImages(typed)
        assert {row["image_id"] for row in reader} == {"inside.png"}
        assert reader.skipped == {"path outside the image root": 1}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_that_was_listed_needs_no_root(places, monkeypatch, streaming):
    monkeypatch.chdir("/usr")
    listed = load_images(places / "root", streaming=streaming)
    reader = ReadableImageStream(listed) if streaming else ReadableImages(listed)
    assert ids(reader) == ["inside.png", "link.png", "sub/deep.png"] and not reader.skipped


@pytest.mark.parametrize("streaming", [True, False])
def test_imagefolder_has_no_more_rights_than_others(places, streaming):
    dataset = load_dataset("imagefolder", data_dir=str(places / "secret"), split="train", streaming=streaming)
    read = ReadableImageStream if streaming else ReadableImages
    with pytest.raises(ValueError, match="None of the 1 images.*path outside the image root"):
        list(read(dataset))
    assert ids(read(dataset, image_root=str(places / "secret"))) == ["secret.png"]


def test_what_a_saved_dataset_says_of_its_origin_gives_it_no_rights(places):
    dataset = Dataset.from_dict({"image": [str(places / "secret" / "secret.png"), "inside.png"]})
    dataset.info.builder_name = "imagefolder"
    dataset.save_to_disk(places / "saved")
    reader = ReadableImages(datasets.load_from_disk(places / "saved"))
    assert reader[0]["image_id"] == "inside.png" and reader.skipped == {"path outside the image root": 1}


def test_a_row_may_name_a_file_of_a_listed_folder_and_no_other(places, monkeypatch):
    monkeypatch.chdir("/usr")
    load_images(places / "root")
    paths = ImagePaths()
    assert paths.resolve(f"{places}/root/inside.png") == f"{places}/root/inside.png"
    assert paths.resolve(f"{places}/root/link.png") == f"{places}/secret/secret.png"  # the owner's link to a file
    for path in ("secret/secret.png", "root/linked/secret.png", "root/../secret/secret.png", "rootless/x.png"):
        assert reason_of(lambda path=path: paths.resolve(f"{places}/{path}")) == "path outside the image root"


def test_downloaded_files_are_read_and_links_do_not_lead_out_of_the_cache(places, cache, monkeypatch):
    monkeypatch.setattr(data, "HF_HUB_CACHE", str(places / "hub"))
    make_folder(places, ["hub/blobs/0123", "hub/snapshots/x.png"])
    (places / "hub" / "snapshots" / "a.png").symlink_to("../blobs/0123")  # as the Hub's library stores files
    (places / "hub" / "snapshots" / "b.png").symlink_to(places / "secret" / "secret.png")
    make_folder(cache, ["downloads/extracted/c.png"])
    paths = ImagePaths()
    assert paths.resolve(f"{places}/hub/snapshots/a.png") == f"{places}/hub/blobs/0123"
    assert paths.resolve(f"{cache}/downloads/extracted/c.png")
    assert reason_of(lambda: paths.resolve(f"{places}/hub/snapshots/b.png")) == "path outside the image root"


def test_a_mixture_of_listed_folders_needs_no_root(tmp_path):
    folders = [make_folder(tmp_path / name, [f"{name}.png"]) for name in "ab"]
    mixed = interleave_datasets([load_images(folder) for folder in folders], stopping_strategy="all_exhausted")
    assert set(ids(ReadableImageStream(mixed))) == {"a.png", "b.png"}


def test_paths_of_the_program_itself_are_free(places):
    assert decode_image(str(places / "secret" / "secret.png")).size == (8, 8)
    assert ReadableImages([{"image": places / "secret" / "secret.png"}])[0]["image_id"] == "secret.png"


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 300 + ".png", "loop.png", "sub/../sub/gone.png"])
def test_no_path_can_end_the_run(places, path):
    (places / "root" / "loop.png").symlink_to("loop.png")
    for options in ({}, {"image_root": str(places)}):
        dataset = ReadableImages([{"image": path}, {"image": GOOD, "image_id": "next"}], **options)
        assert dataset[0]["image_id"] == "next" and dataset.skipped == {"missing file": 1}


@pytest.mark.parametrize(
    "url",
    [
        "file://{secret}::hf://datasets/user/name",
        "local://{secret}::hf://datasets/user/name",
        "simplecache::file://{secret}::hf://datasets/user/name",
        "file://{secret}",
        "zip://secret.png::file://{secret}",
        "zip://x::local://{secret}::hf://datasets/user/name",
    ],
)
def test_no_url_leads_to_a_file_of_this_machine(places, url):
    url = url.replace("{secret}", str(places / "secret" / "secret.png"))
    assert reason_of(lambda: decode_image(url)) == "remote file that is not on the Hub"


# ---------------------------------------------------------------------------------------------------------------------
# Training runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


def counted_stream(log):
    """Shards of four images, every fifth image damaged, that write down what is read of them, and by which process."""

    def rows(shards):
        for shard in shards:
            for i in range(4):
                with open(log, "a") as file:
                    print(shard, i, os.getpid(), file=file)
                content = io.BytesIO()
                noise_images(1, seed=4 * shard + i)[0].save(content, "PNG")
                damaged = (4 * shard + i) % 5 == 0
                yield {
                    "image": {"bytes": content.getvalue()[: 60 if damaged else None], "path": None},
                    "image_id": f"{shard}/{i}",
                }

    return IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(20))}, features=COLUMNS)


def records(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_a_run_over_a_stream_resumes_bit_for_bit_and_reads_nothing_before_its_shard(base, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STREAM_BLOCK", 8)
    log = tmp_path / "reads"

    def run(**resume):
        options = {"max_steps": 10, "gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 8}
        trainer = TalkingTrainer(
            model=base,
            args=config(tmp_path / "run", dataloader_num_workers=1, shuffle_dataset=False, **options),
            train_dataset=counted_stream(log),
            peft_config=lora(),
        )
        log.write_text("")
        trainer.train(**resume)
        reads = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
        assert os.getpid() not in {process for _, _, process in reads}
        return snapshot(trainer), records(tmp_path / "run"), reads[0][:2]

    weights, answers, first_read = run()
    assert len(answers) == 21 and first_read == (0, 0)
    checkpoint = tmp_path / "run" / "checkpoint-8"
    place = json.loads((checkpoint / "evolmm_state.json").read_text())["images"]["images"]
    assert (place["first_row"], place["offset"]) == (16, 2)
    resumed_weights, resumed_answers, first_read = run(resume_from_checkpoint=str(checkpoint))
    assert resumed_answers == answers
    assert all((weights[name] == resumed_weights[name]).all() for name in weights)
    assert first_read == (3, 0)  # the shard that ends where the block begins; it is still open


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_over_fewer_images_than_a_rollout_takes_ends_and_says_so(base, streaming, tmp_path, caplog):
    dataset = image_dataset(2)
    TalkingTrainer(
        model=base,
        args=config(tmp_path, gradient_accumulation_steps=3, max_steps=2),
        train_dataset=dataset.to_iterable_dataset() if streaming else dataset,
        peft_config=lora(),
    ).train()
    read = [record["image_id"] for record in records(tmp_path)]
    assert len(read) == 6 and Counter(read) == {"0": 3, "1": 3}
    said = "The stream ended after 2 images" if streaming else "The dataset has 2 images and a rollout takes 3"
    assert said in caplog.text


def test_the_trainers_order_is_that_of_the_seed_whatever_the_workers_and_a_corrupt_image_moves_no_other(
    base, tmp_path
):
    def files(damaged=None):
        content = [GOOD[: 100 if i == damaged else None] for i in range(9)]
        rows = {"image": [{"bytes": file, "path": None} for file in content], "image_id": [str(i) for i in range(9)]}
        return Dataset.from_dict(rows, features=COLUMNS)

    trainer = TalkingTrainer(model=base, args=config(tmp_path, max_steps=9), train_dataset=files(), peft_config=lora())

    def order(dataset, workers=0, seed=0):
        trainer.args.dataloader_num_workers, trainer.args.seed = workers, seed
        trainer._images = data.readable_images(dataset)
        return ids(chain(*islice(trainer.get_train_dataloader(), 12)))

    for make in (lambda dataset: dataset, lambda dataset: dataset.to_iterable_dataset(num_shards=3)):
        once = order(make(files()))
        assert len(once) == 8
        assert order(make(files()), workers=1) == order(make(files()), workers=2) == once
        assert order(make(files()), seed=1) != once
        for workers in (0, 2):
            found = order(make(files(int(once[3]))), workers)
            assert [place for place in range(8) if found[place] != once[place]] == [3]


TWO = """
import json, sys
from itertools import islice
from pathlib import Path

import datasets
from accelerate import PartialState
from evolmm_trl import data
from evolmm_trl.schedule import RoleSchedule, RolloutSampler, RolloutStream

state = PartialState(cpu=True)
rank, world = state.process_index, state.num_processes
folder = Path(sys.argv[1])
assert world == 2 and state.distributed_type.value == "MULTI_CPU"
datasets.config.HF_DATASETS_CACHE = folder / "cache"
data.STREAM_BLOCK = 16
place = {"images_per_process": 3, "micro_batches": 2, "rank": rank, "world_size": world}
images = data.load_images(folder / "images")


def read(rows, shuffle=True):
    endless = data.EndlessImages(data.ReadableImageStream(rows), 0, shuffle)
    stream = RolloutStream(endless, RoleSchedule(2), num_workers=1, **place)
    return [[row["image_id"] for row in micro_batch] for micro_batch in islice(stream, 40)], stream.state_dict(20)


def error_of(run):
    try:
        run()
    except ValueError as error:
        return str(error)


found = {
    "same": read(images),
    "lengths": error_of(lambda: RolloutSampler(10 + rank, RoleSchedule(2), seed=0, **place)),
    "folders": error_of(lambda: read(data.load_images(folder / ("images" if rank else "more")))),
    # The first block of 16 rows is the same, and of the next one process has a row less
    "ends": error_of(lambda: read(data.load_images(folder / "more").take(20 - rank), shuffle=False)),
}
(folder / f"{rank}.json").write_text(json.dumps(found))
state.destroy_process_group()  # left alone, gloo's threads now and then abort a process that has ended
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found, their log, and the folder of seven images, one of them damaged."""
    folder = tmp_path_factory.mktemp("two")
    make_folder(folder / "images", [f"{i}.png" for i in range(7)])
    (folder / "images" / "3.png").write_bytes(GOOD[:100])
    make_folder(folder / "more", [f"{i:02d}.png" for i in range(20)])
    (folder / "two.py").write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(folder / "two.py"), str(folder)]
    log = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=True).stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], log, folder / "images"


def test_two_processes_read_one_order_each_its_part_across_the_end_of_a_short_stream(two_processes):
    (first, second), log, folder = two_processes
    assert "ended after 7 images and is read again" in log  # a rollout takes 6: passes end within one, on one rank
    assert "Skipped image '3.png': damaged file" in log
    (first_rows, state), (second_rows, other_state) = first["same"], second["same"]
    assert state == other_state
    stream = endless(load_images(folder))
    for rows, more in zip(first_rows[::2], second_rows[::2], strict=True):
        assert rows + more == (ids(stream.take(6)) if rows else [])


@pytest.mark.parametrize("mode", ["lengths", "folders", "ends"])
def test_processes_that_see_different_data_end_with_an_error_and_do_not_hang(mode, two_processes):
    (first, second), _, _ = two_processes
    assert first[mode] == second[mode]
    assert first[mode].startswith("The processes do not see the same data")
