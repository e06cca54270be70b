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

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch.utils.data import IterableDataset, Sampler


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
        rollouts_per_epoch = max(1, round(num_rows / (images_per_process * world_size)))
        self.steps_per_epoch = schedule.steps_for_rollouts(rollouts_per_epoch)
        self.epoch = 0
        self._permutations: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if not self.shuffle:
            return offset
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutations = {epoch: torch.randperm(self.num_rows, generator=generator).tolist()}
        return self._permutations[epoch][offset]

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
    rollout or an empty list. The stream is read again from its start when it ends; it goes on as long as it is read.

    Args:
        stream (`Iterable[dict]`):
            Rows, with `set_epoch` called before each pass.
        schedule ([`RoleSchedule`]), images_per_process (`int`), micro_batches (`int`), rank (`int`), world_size (`int`):
            As in [`RolloutSampler`].
    """

    def __init__(
        self,
        stream,
        schedule: RoleSchedule,
        images_per_process: int,
        micro_batches: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.stream = stream
        self.schedule = schedule
        self.images_per_process = images_per_process
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size

    def _endless(self) -> Iterator[dict]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            yield from self.stream

    def __iter__(self) -> Iterator[list[dict]]:
        images = self._endless()
        first = self.rank * self.images_per_process
        for step in count():
            rows = []
            if self.schedule.role(step) == SOLVER:
                rollout = list(islice(images, self.images_per_process * self.world_size))
                rows = rollout[first : first + self.images_per_process]
            yield rows
            yield from ([] for _ in range(self.micro_batches - 1))
