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

"""Which role an optimizer step trains, and the images it reads."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, Sampler

from .data import EndlessImages


logger = logging.getLogger(__name__)

SOLVER = "solver"
PROPOSER = "proposer"
ROLES = (SOLVER, PROPOSER)


@dataclass(frozen=True)
class RoleSchedule:
    """
    The role of every optimizer step: `proposer_update_every` solver steps, then one proposer step. Steps are counted
    from 0 over the whole run, so that a resumed run finds its place from the step number alone.

    Args:
        proposer_update_every (`int`):
            Solver steps between two proposer steps (EvoLMM: 5).
        train_proposer (`bool`, *optional*, defaults to `True`):
            Whether there are proposer steps at all.
    """

    proposer_update_every: int
    train_proposer: bool = True

    def __post_init__(self):
        if self.proposer_update_every < 1:
            raise ValueError(
                f"`proposer_update_every` is {self.proposer_update_every}; expected at least 1 solver step before each "
                "proposer step. Set `train_proposer=False` to never train the proposer."
            )

    @property
    def period(self) -> int:
        return self.proposer_update_every + 1

    def role(self, step: int) -> str:
        """The role that optimizer step `step` trains."""
        return PROPOSER if self.train_proposer and step % self.period == self.proposer_update_every else SOLVER

    def solver_steps_before(self, step: int) -> int:
        """How many of the steps 0 to `step - 1` train the solver, which is how many rollouts have been made."""
        return step - step // self.period if self.train_proposer else step

    def next_proposer_step(self, step: int) -> int | None:
        """The step at which the proposer trains on the questions of step `step`; `None` if it is never trained."""
        return step - step % self.period + self.proposer_update_every if self.train_proposer else None

    def steps_for_rollouts(self, rollouts: int) -> int:
        """Optimizer steps of both roles in a run of this many rollouts."""
        return rollouts + rollouts // self.proposer_update_every if self.train_proposer else rollouts


class RolloutSampler(Sampler[list[int]]):
    """
    Batch sampler over a map-style dataset that follows the schedule. It yields one list of row indices per micro-batch:
    at a solver step the images of this process's part of the rollout, then empty lists; at a proposer step empty lists
    only, since the proposer trains on questions it has already asked.

    Rollout k of the run reads positions k*M to (k+1)*M - 1 of one endless sequence, the dataset's permutations one
    after the other, where M is the number of images per rollout over all processes. No image is dropped at the end of
    a pass, the order depends on the seed alone, and a run resumes at any step without reading what came before.

    Args:
        num_rows (`int`):
            Length of the dataset.
        schedule ([`RoleSchedule`]):
            Which steps read images.
        images_per_process (`int`):
            Images per rollout on one process.
        micro_batches (`int`):
            Micro-batches (gradient accumulation steps) per optimizer step.
        seed (`int`):
            Seed of the permutations.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to permute. `False` reads the rows in order.
        rank (`int`, *optional*, defaults to `0`), world_size (`int`, *optional*, defaults to `1`):
            This process and the number of processes.
    """

    def __init__(
        self,
        num_rows: int,
        schedule: RoleSchedule,
        images_per_process: int,
        micro_batches: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_rows = num_rows
        self.schedule = schedule
        self.images_per_process = images_per_process
        self.micro_batches = micro_batches
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        check_same_on_all_processes("numbers of images", num_rows)
        images_per_rollout = images_per_process * world_size
        if num_rows < images_per_rollout:
            logger.warning(
                "The dataset has %d images and a rollout takes %d: every rollout repeats images.",
                num_rows,
                images_per_rollout,
            )
        rollouts_per_epoch = max(1, round(num_rows / images_per_rollout))
        self.steps_per_epoch = schedule.steps_for_rollouts(rollouts_per_epoch)
        self.epoch = 0
        self._permutations: dict[int, torch.Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self, step: int) -> dict:
        """What the order depends on beside the settings. The place in it is known from the step."""
        return {"rows": self.num_rows}

    def load_state_dict(self, state: dict) -> None:
        """Warns if the order is no longer that of the checkpoint."""
        if state != self.state_dict(0):
            logger.warning(
                "The checkpoint was saved when the dataset was %s, and now it has %d images: the run goes on with another "
                "order of images.",
                f"one of {state['rows']} images" if "rows" in state else "a stream",
                self.num_rows,
            )

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if not self.shuffle:
            return offset
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutations = {epoch: torch.randperm(self.num_rows, generator=generator)}
        return self._permutations[epoch][offset].item()

    def __iter__(self) -> Iterator[list[int]]:
        first_step = self.epoch * self.steps_per_epoch
        images_per_rollout = self.images_per_process * self.world_size
        for step in range(first_step, first_step + self.steps_per_epoch):
            rows = []
            if self.schedule.role(step) == SOLVER:
                start = self.schedule.solver_steps_before(step) * images_per_rollout
                start += self.rank * self.images_per_process
                rows = [self._row(position) for position in range(start, start + self.images_per_process)]
            yield rows
            yield from ([] for _ in range(self.micro_batches - 1))


class RolloutStream(IterableDataset):
    """
    The same as [`RolloutSampler`] over a stream: it yields, per micro-batch, the rows of this process's part of the
    rollout or an empty list, and is read as long as someone asks. Rollout k reads the k-th M images of
    [`~data.EndlessImages`], of which every process decodes its own alone.

    The reading can be left to a worker process. `state_dict` is the place behind the rows that were yielded, and not
    behind those that the worker has read ahead.

    Args:
        images ([`~data.EndlessImages`]):
            Images in an endless order.
        schedule ([`RoleSchedule`]), images_per_process (`int`), micro_batches (`int`), rank (`int`), world_size (`int`):
            As in [`RolloutSampler`].
        collate_fn (`Callable`, *optional*, defaults to `list`):
            What is done with the rows of a micro-batch, in the worker if there is one.
        num_workers (`int`, *optional*, defaults to `0`):
            1 to read in a worker process. More would change the order.
    """

    def __init__(
        self,
        images: EndlessImages,
        schedule: RoleSchedule,
        images_per_process: int,
        micro_batches: int,
        rank: int = 0,
        world_size: int = 1,
        collate_fn: Callable[[list[dict]], Any] = list,
        num_workers: int = 0,
    ):
        self.images = images
        self.schedule = schedule
        self.images_per_process = images_per_process
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self._start: dict | None = None
        self._places: deque[dict] = deque(maxlen=2)  # with `async_rollouts` a step is read ahead

    def state_dict(self, step: int) -> dict:
        """
        The place of the first image of optimizer step `step`, of which at most one step more may have been yielded.

        Raises:
            `RuntimeError`: if other steps were yielded last.
        """
        for place in self._places:
            if place["step"] == step:
                return place
        raise RuntimeError(
            f"The stream is at {list(self._places)}, not at step {step}: something read it ahead of training."
        )

    def load_state_dict(self, state: dict) -> None:
        """
        Goes on from what `state_dict` gave. The micro-batches before it are still yielded, for transformers to skip, but
        are empty.
        """
        if "step" in state:
            self._start = state
        else:
            logger.warning(
                "The checkpoint was saved when the dataset was no stream: the run goes on with another order of images."
            )

    def __iter__(self) -> Iterator[Any]:
        for _ in range((self._start["step"] if self._start else 0) * self.micro_batches):
            yield self.collate_fn([])
        # One item per step, so that a worker reads whole rollouts ahead
        steps = DataLoader(
            _StreamedSteps(self, self._start),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # instead of the global one, from which it would draw
        )
        for micro_batch, place in steps:
            # At every step, since a stream may end earlier on one process
            here = {name: place["images"][name] for name in ("epoch", "first_row", "rows_hash")}
            check_same_on_all_processes("places in the stream", here)
            self._places.append(place)
            yield micro_batch
            for _ in range(self.micro_batches - 1):
                yield self.collate_fn([])


class _StreamedSteps(IterableDataset):
    """For each optimizer step its first micro-batch, collated, and the place after it."""

    def __init__(self, stream: RolloutStream, start: dict | None):
        self.stream = stream
        self.start = start

    def __iter__(self) -> Iterator[tuple[Any, dict]]:
        stream, images = self.stream, self.stream.images
        if self.start is None:
            images.restart()
        else:
            images.load_state_dict(self.start["images"])
        first = stream.rank * stream.images_per_process
        part = slice(first, first + stream.images_per_process)
        for step in count(self.start["step"] if self.start else 0):
            rows = []
            if stream.schedule.role(step) == SOLVER:
                rows = images.take(stream.images_per_process * stream.world_size, part)
            yield stream.collate_fn(rows), {"step": step + 1, "images": images.state_dict()}


def check_same_on_all_processes(what: str, value: Any) -> None:
    """
    Fails if processes do not see the same data: each takes its own part of what all of them must see alike.

    Raises:
        `ValueError`: on all processes, if `value` differs on any.
    """
    values = gather_object([value])
    if any(other != value for other in values):
        raise ValueError(
            f"The processes do not see the same data: the {what} are {values}, by process. Pass the whole dataset, the same "
            "on every process and host; if it is a folder, check that all hosts see the same files."
        )


def as_it_is(item: Any) -> Any:
    """A `collate_fn` for what is collated already."""
    return item
