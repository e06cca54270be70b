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

import random

import numpy as np
import pytest
from PIL import Image

from evolmm_trl.thumbnails import Thumbnails, image_digest, read_thumbnail, thumbnail


def images(count, start=0):
    return [Image.new("RGB", (20, 10), (i // 256, i % 256, 7)) for i in range(start, start + count)]


def keep(thumbnails, some, write=True):
    digests = [image_digest(image) for image in some]
    thumbnails.keep(thumbnails.candidates(digests, some), write)


def files(run):
    return sorted(file.stem for file in (run / "_report" / "images").iterdir())


def test_the_same_pixels_have_the_same_name_and_others_another():
    first, second = images(2)
    assert image_digest(first) == image_digest(first.copy()) != image_digest(second)
    assert image_digest(Image.new("RGB", (2, 8))) != image_digest(Image.new("RGB", (8, 2)))


def test_the_sample_is_that_of_the_smallest_digests_in_whatever_order_images_come(tmp_path):
    all_images = images(200)
    expected = sorted(image_digest(image) for image in all_images)[:12]
    for seed in range(3):
        shuffled = random.Random(seed).sample(all_images, len(all_images))
        thumbnails = Thumbnails(tmp_path / str(seed), 12)
        for start in range(0, 200, 8):
            keep(thumbnails, shuffled[start : start + 8])
            assert len(files(tmp_path / str(seed))) <= 12
        assert files(tmp_path / str(seed)) == expected


def test_a_resumed_run_ends_with_the_same_sample(tmp_path):
    all_images = images(100)
    keep(Thumbnails(tmp_path, 10), all_images[:60])
    resumed = Thumbnails(tmp_path, 10)
    keep(resumed, all_images[40:])
    assert files(tmp_path) == sorted(image_digest(image) for image in all_images)[:10]


def test_processes_that_write_nothing_follow_the_sample(tmp_path):
    writer, other = Thumbnails(tmp_path, 5), Thumbnails(tmp_path / "not-seen", 5)
    all_images = images(80)
    for start in range(0, 80, 4):
        halves = [all_images[start : start + 2], all_images[start + 2 : start + 4]]
        found = {}
        for process, half in zip((writer, other), halves, strict=True):
            found |= process.candidates([image_digest(image) for image in half], half)
        writer.keep(found, write=True)
        other.keep(found, write=False)
    assert files(tmp_path) == sorted(image_digest(image) for image in all_images)[:5]
    assert not (tmp_path / "not-seen").exists()


def test_an_image_that_is_kept_is_not_made_small_again(tmp_path):
    thumbnails = Thumbnails(tmp_path, 5)
    (image,) = images(1)
    keep(thumbnails, [image])
    assert thumbnails.candidates([image_digest(image)], [image]) == {}


def test_none_are_kept_on_request(tmp_path):
    keep(Thumbnails(tmp_path, 0), images(5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (900, 700)])
def test_a_thumbnail_is_small_whatever_the_image_is(mode, size):
    assert len(thumbnail(Image.new(mode, size))) < 24_000


def test_noise_is_made_small_enough():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8))
    content = thumbnail(noise)
    assert len(content) <= 24_000
    assert content[:4] == b"RIFF"


def test_reading_gives_back_what_was_kept(tmp_path):
    (image,) = images(1)
    keep(Thumbnails(tmp_path, 1), [image])
    assert read_thumbnail(tmp_path, image_digest(image)) == thumbnail(image)


@pytest.mark.parametrize(
    "digest", ["../../../secret", "{folder}/secret", "secret", "A" * 32, "a" * 31, "a" * 32 + "\n", ""]
)
def test_no_other_file_is_read_whatever_the_log_names(tmp_path, digest):
    run = tmp_path / "run"
    keep(Thumbnails(run, 1), images(1))
    digest = digest.format(folder=tmp_path)
    for file in (
        tmp_path / "secret.webp",
        *(run / "_report" / "images" / f"{name}.webp" for name in ("secret", "A" * 32)),
    ):
        file.write_bytes(thumbnail(*images(1)))
    assert read_thumbnail(run, digest) is None


@pytest.mark.parametrize("content", [b"<svg onload=alert(1)>", b"RIFF0000WAVE", b"RIFF0000WEBP" + b"0" * 24_000])
def test_a_file_that_is_no_small_webp_is_not_read(tmp_path, content):
    file = tmp_path / "_report" / "images" / f"{'a' * 32}.webp"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert read_thumbnail(tmp_path, "a" * 32) is None
