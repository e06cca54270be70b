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

"""A sample of rollouts, as pictures with what was asked and answered, for trackio, Weights & Biases and TensorBoard."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from .report.log import shown


# Over a run, so that its size does not grow with its length: 40 times 4 pictures
_TIMES = 40
_ROLLOUTS = 4
_LONGEST_SIDE = 320  # pixels
_LONGEST_QUESTION, _LONGEST_ANSWER = 300, 60  # characters
_MOST_ANSWERS = 8  # that are counted one by one


class RolloutPictures:
    """
    Logs a sample of rollouts to the trackers of `report_to`, beside the scalars that transformers logs there.

    Args:
        callbacks ([`~transformers.trainer_callback.CallbackHandler`]):
            The trainer's callbacks, of which the trackers are some.
    """

    def __init__(self, callbacks: CallbackHandler):
        self._callbacks = callbacks
        self._last: int | None = None

    def log(self, records: Sequence[dict], images: Sequence[Image.Image], max_steps: int) -> None:
        """
        Logs the first few of a step's rollouts, if it is time to.

        Args:
            records (`Sequence[dict]`):
                [`Rollout.record`] of the main process's images.
            images (`Sequence[PIL.Image.Image]`):
                The images.
            max_steps (`int`):
                Optimizer steps of the run.
        """
        step = records[0]["step"]
        time = (step - 1) * _TIMES // max(max_steps, 1)
        trackers = [
            tracker
            for tracker in self._callbacks.callbacks
            if isinstance(tracker, (TensorBoardCallback, WandbCallback, TrackioCallback))
        ]
        if time == self._last or not trackers:
            return
        self._last = time
        sample = [
            (_small(image), _caption(record))
            for image, record in zip(images[:_ROLLOUTS], records[:_ROLLOUTS], strict=True)
        ]
        for tracker in trackers:
            if isinstance(tracker, TensorBoardCallback):
                _log_to_tensorboard(tracker, sample, step)
            elif isinstance(tracker, WandbCallback):
                _log_to_wandb(sample, step)
            else:
                _log_to_trackio(sample, step)


def _log_to_tensorboard(tracker: TensorBoardCallback, sample: list[tuple[Image.Image, str]], step: int) -> None:
    for i, (image, caption) in enumerate(sample):
        tracker.tb_writer.add_image(f"rollouts/{i}", np.asarray(image), step, dataformats="HWC")
        # It reads texts as Markdown: as a block of code, so that nothing in it is
        tracker.tb_writer.add_text(f"rollouts/{i}", "\n".join(f"    {line}" for line in caption.splitlines()), step)


def _log_to_wandb(sample: list[tuple[Image.Image, str]], step: int) -> None:
    import wandb

    if wandb.run is None:  # as with WANDB_MODE=disabled
        return
    images = [wandb.Image(image, caption=caption) for image, caption in sample]
    wandb.log({"rollouts": images, "train/global_step": step})


def _log_to_trackio(sample: list[tuple[Image.Image, str]], step: int) -> None:
    import trackio

    images = {f"rollouts/{i}": trackio.Image(image, caption=caption) for i, (image, caption) in enumerate(sample)}
    trackio.log({**images, "train/global_step": step})


def _small(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return small


def _caption(record: dict) -> str:
    votes = Counter(answer["canonical"] for answer in record["answers"])
    counted = ", ".join(
        f"{'unreadable' if answer is None else shown(answer, _LONGEST_ANSWER)} ({count})"
        for answer, count in votes.most_common(_MOST_ANSWERS)
    )
    if len(votes) > _MOST_ANSWERS:
        others = sum(count for _, count in votes.most_common()[_MOST_ANSWERS:])
        counted += f", {len(votes) - _MOST_ANSWERS} more ({others})"
    return (
        f"{shown(record['question'], _LONGEST_QUESTION)}\n{counted}\nagreement {record['agreement']:.2f}, "
        f"proposer's reward {record['proposer_reward']:.2f}"
    )
