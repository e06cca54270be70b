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

"""A bounded sample of a run's images, small, so that people can see later what was asked about."""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


# Of output_dir. Folders whose name starts with an underscore are not pushed to the Hub
REPORT_FOLDER = "_report"
THUMBNAILS_FOLDER = f"{REPORT_FOLDER}/images"
_LONGEST_SIDE = 320  # pixels
_MOST_BYTES = 24_000
_DIGEST = re.compile(r"[0-9a-f]{32}")


def image_digest(image: Image.Image) -> str:
    """A name that an image's pixels give, of 32 hexadecimal digits."""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def thumbnail(image: Image.Image) -> bytes:
    """
    An image in WebP, with at most 320 pixels a side and 24,000 bytes.

    Args:
        image (`PIL.Image.Image`):
            Image in any mode.

    Returns:
        `bytes`
    """
    side = _LONGEST_SIDE
    quality = 75
    small = image.convert("RGB")
    while True:
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=quality)
        if buffer.tell() <= _MOST_BYTES:
            return buffer.getvalue()
        side, quality = side * 3 // 4, 50  # noise, which no codec makes small


def read_thumbnail(run: Path, digest: str) -> bytes | None:
    """
    The thumbnail of an image, if it was kept.

    Args:
        run (`Path`):
            Folder of a run.
        digest (`str`):
            [`image_digest`] as the rollout log has it. It is not trusted: nothing but 32 hexadecimal digits names a file.

    Returns:
        `bytes` or `None`: WebP.
    """
    if not _DIGEST.fullmatch(digest):
        return None
    file = run / THUMBNAILS_FOLDER / f"{digest}.webp"
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        return None
    content = file.read_bytes()
    return content if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


class Thumbnails:
    """
    The thumbnails of the images whose digests are the smallest: a uniform sample of the distinct images of a run, the
    same however the images are ordered or spread over processes, and after a resumption.

    Args:
        run (`Path`):
            Folder of the run. Thumbnails that are there already are part of the sample.
        limit (`int`):
            Most thumbnails that are kept. 0: none.
    """

    def __init__(self, run: Path, limit: int):
        self.folder = run / THUMBNAILS_FOLDER
        self.limit = limit
        self._kept: set[str] | None = None

    def candidates(self, digests: Sequence[str], images: Sequence[Image.Image]) -> dict[str, bytes]:
        """The thumbnails of those of a process's images that belong to the sample so far, by digest."""
        kept = self._digests()
        new = {
            digest: image
            for digest, image in zip(digests, images, strict=True)
            if digest not in kept and self._belongs(digest)
        }
        return {digest: thumbnail(image) for digest, image in new.items()}

    def _digests(self) -> set[str]:
        if self._kept is None:
            # Of the process that writes them; another may see the folder or not, and makes some in vain if not
            self._kept = {file.stem for file in self.folder.glob("*.webp") if _DIGEST.fullmatch(file.stem)}
        return self._kept

    def _belongs(self, digest: str) -> bool:
        return len(self._kept) < self.limit or digest < max(self._kept, default="")

    def keep(self, candidates: dict[str, bytes], write: bool) -> None:
        """
        Takes the thumbnails of all processes into the sample, and removes those that have no more place in it.

        Args:
            candidates (`dict[str, bytes]`):
                [`~Thumbnails.candidates`] of all processes.
            write (`bool`):
                Whether this process writes the files.
        """
        before = self._digests()
        self._kept = set(sorted(before | candidates.keys())[: self.limit])
        if not write:
            return
        for digest in sorted(self._kept - before):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{digest}.tmp"
            temporary.write_bytes(candidates[digest])
            os.replace(temporary, self.folder / f"{digest}.webp")
        for digest in before - self._kept:
            (self.folder / f"{digest}.webp").unlink(missing_ok=True)
