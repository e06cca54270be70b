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


import json
from itertools import chain, islice

import pytest
from accelerate import skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from evolmm_trl.data import EndlessImages, ReadableImageStream
from evolmm_trl.schedule import PROPOSER, SOLVER, RoleSchedule, RolloutSampler, RolloutStream, as_it_is


schedules = st.builds(RoleSchedule, st.integers(1, 6), st.booleans())
shapes = st.fixed_dictionaries(
    {
        "num_rows": st.integers(1, 30),
        "schedule": schedules,
        "images_per_process": st.integers(1, 5),
        "micro_batches": st.integers(1, 3),
        "world_size": st.integers(1, 3),
    }
)


def epochs(sampler, number):
    """The batches of the first epochs, as the Trainer asks for them."""
    batches = []
    for epoch in range(number):
        sampler.set_epoch(epoch)
        batches.extend(sampler)
    return batches


def over_ranks(number, **shape):
    """For each micro-batch of the first epochs, its rows on all ranks."""
    ranks = [epochs(RolloutSampler(**shape, rank=rank), number) for rank in range(shape["world_size"])]
    return [list(chain(*batches)) for batches in zip(*ranks, strict=True)]


# Roles


def test_five_solver_steps_are_followed_by_one_proposer_step():
    schedule = RoleSchedule(5)
    assert [schedule.role(step) for step in range(12)] == ([SOLVER] * 5 + [PROPOSER]) * 2


def test_the_two_roles_can_alternate():
    schedule = RoleSchedule(1)
    assert [schedule.role(step) for step in range(4)] == [SOLVER, PROPOSER] * 2


def test_without_proposer_training_every_step_is_the_solvers():
    schedule = RoleSchedule(2, train_proposer=False)
    assert {schedule.role(step) for step in range(20)} == {SOLVER}
    assert schedule.next_proposer_step(0) is None
    assert schedule.steps_for_rollouts(7) == 7


def test_a_proposer_step_without_solver_steps_before_it_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 solver step.*train_proposer=False"):
        RoleSchedule(0)


@settings(deadline=None)
@given(schedules, st.integers(0, 50))
def test_solver_steps_before_is_how_many_rollouts_were_made(schedule, step):
    assert schedule.solver_steps_before(step) == sum(schedule.role(earlier) == SOLVER for earlier in range(step))


@settings(deadline=None)
@given(st.builds(RoleSchedule, st.integers(1, 6)), st.integers(0, 50))
def test_questions_wait_for_the_first_proposer_step_after_them(schedule, step):
    waiting = next(later for later in range(step, step + 10) if schedule.role(later) == PROPOSER)
    assert schedule.next_proposer_step(step) == waiting


@settings(deadline=None)
@given(schedules, st.integers(0, 50))
def test_steps_for_rollouts_makes_that_many_rollouts_and_trains_on_the_last_full_round(schedule, rollouts):
    steps = schedule.steps_for_rollouts(rollouts)
    assert schedule.solver_steps_before(steps) == rollouts
    assert schedule.role(steps) == SOLVER or not schedule.train_proposer


# The sampler


@settings(deadline=None)
@given(shapes, st.booleans(), st.integers(0, 3))
def test_no_image_is_lost_or_repeated_within_a_pass_across_the_ends_of_epochs(shape, shuffle, seed):
    rows = list(chain(*over_ranks(5, seed=seed, shuffle=shuffle, **shape)))
    size = shape["num_rows"]
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size]) == list(range(size))
    rest = rows[len(rows) // size * size :]
    assert len(set(rest)) == len(rest)


@settings(deadline=None)
@given(shapes)
def test_proposer_steps_read_nothing_and_solver_steps_a_whole_rollout_at_their_first_micro_batch(shape):
    micro_batches, images = shape["micro_batches"], shape["images_per_process"]
    for rank in range(shape["world_size"]):
        for i, batch in enumerate(epochs(RolloutSampler(seed=0, rank=rank, **shape), 3)):
            step, micro_batch = divmod(i, micro_batches)
            reads = shape["schedule"].role(step) == SOLVER and micro_batch == 0
            assert len(batch) == (images if reads else 0)


@settings(deadline=None)
@given(shapes, st.integers(0, 3))
def test_the_ranks_partition_the_rollout_of_one_process(shape, seed):
    alone = {**shape, "world_size": 1, "images_per_process": shape["images_per_process"] * shape["world_size"]}
    assert over_ranks(3, seed=seed, **shape) == over_ranks(3, seed=seed, **alone)


@settings(deadline=None)
@given(shapes, st.integers(0, 4))
def test_a_run_resumed_at_an_epoch_reads_what_the_uninterrupted_run_reads(shape, epoch):
    whole = epochs(RolloutSampler(seed=0, **shape), epoch + 2)
    resumed = RolloutSampler(seed=0, **shape)
    resumed.set_epoch(epoch)
    assert list(resumed) == whole[epoch * len(resumed) : (epoch + 1) * len(resumed)]


@settings(deadline=None)
@given(shapes)
def test_the_sampler_has_as_many_batches_as_it_says(shape):
    sampler = RolloutSampler(seed=0, **shape)
    assert len(list(sampler)) == len(sampler) == sampler.steps_per_epoch * shape["micro_batches"]


@pytest.mark.parametrize(("num_rows", "rollouts"), [(1, 1), (7, 2), (8, 2), (9, 2), (11, 3), (12, 3), (100, 25)])
def test_an_epoch_is_one_pass_to_the_nearest_rollout(num_rows, rollouts):
    sampler = RolloutSampler(num_rows, RoleSchedule(5), images_per_process=2, micro_batches=1, seed=0, world_size=2)
    assert sampler.steps_per_epoch == rollouts + rollouts // 5


def test_every_pass_has_another_order_and_the_order_depends_on_the_seed_alone():
    def passes(seed):
        sampler = RolloutSampler(40, RoleSchedule(5), images_per_process=8, micro_batches=2, seed=seed)
        rows = list(chain(*epochs(sampler, 3)))
        return rows[:40], rows[40:80]

    first, second = passes(7)
    assert first != second
    assert passes(7) == (first, second)
    assert passes(8)[0] != first


def test_without_shuffling_rows_are_read_in_order():
    sampler = RolloutSampler(5, RoleSchedule(2), images_per_process=3, micro_batches=2, seed=0, shuffle=False)
    assert epochs(sampler, 2) == [[0, 1, 2], [], [3, 4, 0], [], [], [], [1, 2, 3], [], [4, 0, 1], [], [], []]


def test_a_dataset_smaller_than_a_rollout_is_read_again_within_it():
    sampler = RolloutSampler(2, RoleSchedule(5), images_per_process=5, micro_batches=1, seed=0)
    (rows,) = list(sampler)
    assert [sorted(rows[:2]), sorted(rows[2:4])] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_loader_that_skips_batches_reads_what_the_interrupted_epoch_had_left(epoch):
    def loader():
        sampler = RolloutSampler(10, RoleSchedule(2), images_per_process=3, micro_batches=2, seed=0)
        return DataLoader(list(range(100, 110)), batch_sampler=sampler, collate_fn=list)

    uninterrupted = loader()
    uninterrupted.batch_sampler.set_epoch(epoch)
    expected = list(uninterrupted)
    for skipped in range(len(expected) + 1):
        resumed = skip_first_batches(loader(), skipped)
        resumed.batch_sampler.batch_sampler.set_epoch(epoch)  # as transformers' Trainer does, after skipping
        assert list(resumed) == expected[skipped:]
    assert any(expected[2:])


# The stream


class Numbered(ReadableImageStream):
    """Reads no image: a row is its number."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self._reader = self

    def read(self, row, index):
        return row


def numbers(count, shards=1):
    rows = {"row": list(range(count)), "image": [f"{i}.png" for i in range(count)]}
    return Dataset.from_dict(rows).to_iterable_dataset(num_shards=shards)


def rollouts(dataset, schedule, seed=0, shuffle=False, **options):
    return RolloutStream(EndlessImages(Numbered(dataset), seed, shuffle), schedule, **options)


def row_numbers(batches):
    return [[row["row"] for row in batch] for batch in batches]


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_a_stream_is_read_as_a_dataset_is_without_shuffling(shape):
    num_rows = shape.pop("num_rows")
    for rank in range(shape["world_size"]):
        sampler = RolloutSampler(num_rows, seed=0, shuffle=False, rank=rank, **shape)
        expected = epochs(sampler, 2)
        batches = rollouts(numbers(num_rows), rank=rank, **shape)
        assert row_numbers(islice(batches, len(expected))) == expected


@settings(deadline=None, max_examples=8)
@given(shapes, st.integers(0, 3))
def test_the_ranks_partition_the_rollout_of_one_process_over_a_shuffled_stream(shape, seed):
    num_rows = shape.pop("num_rows")

    def read(rank=0, **changed):
        return row_numbers(islice(rollouts(numbers(num_rows), seed=seed, shuffle=True, rank=rank, **changed), 20))

    alone = {**shape, "world_size": 1, "images_per_process": shape["images_per_process"] * shape["world_size"]}
    ranks = [read(rank, **shape) for rank in range(shape["world_size"])]
    assert [list(chain(*batches)) for batches in zip(*ranks, strict=True)] == read(**alone)


def test_every_pass_over_a_shuffled_stream_has_another_order_and_the_seed_alone_decides():
    def passes(seed, **options):
        batches = rollouts(numbers(40), RoleSchedule(1), seed, True, images_per_process=8, micro_batches=1, **options)
        rows = list(chain(*row_numbers(islice(batches, 20))))
        return rows[:40], rows[40:]

    first, second = passes(7)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)
    assert passes(7) == passes(7, num_workers=1) == (first, second)
    assert passes(8)[0] != first


def test_a_stream_iterated_anew_starts_anew():
    batches = rollouts(numbers(7), RoleSchedule(1), images_per_process=2, micro_batches=1)
    assert row_numbers(islice(batches, 5)) == row_numbers(islice(batches, 5)) == [[0, 1], [], [2, 3], [], [4, 5]]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_a_stream_resumed_as_transformers_resumes_it_goes_on_where_it_was(steps, num_workers):
    def make():
        shape = {"images_per_process": 3, "micro_batches": 2, "num_workers": num_workers}
        stream = rollouts(numbers(7), RoleSchedule(2), 0, True, **shape)
        return stream, DataLoader(stream, batch_size=None, collate_fn=as_it_is)

    expected = row_numbers(islice(make()[1], 40))
    stream, loader = make()
    list(islice(loader, steps * 2))
    state = json.loads(json.dumps(stream.state_dict(steps)))  # of what was taken, although a worker has read on
    stream, loader = make()
    stream.load_state_dict(state)
    resumed = skip_first_batches(loader, steps * 2)
    assert row_numbers(islice(resumed, 40 - steps * 2)) == expected[steps * 2 :]


def test_a_stream_that_was_read_ahead_of_training_has_no_state_for_the_step():
    stream = rollouts(numbers(7), RoleSchedule(2), images_per_process=3, micro_batches=1)
    list(islice(stream, 3))
    assert stream.state_dict(3)["step"] == 3
    assert stream.state_dict(2)["step"] == 2  # one step ahead, as `async_rollouts` reads
    with pytest.raises(RuntimeError, match="read it ahead"):
        stream.state_dict(1)


# Saying so


def test_a_dataset_smaller_than_a_rollout_and_a_stream_that_ends_are_said(caplog):
    RolloutSampler(4, RoleSchedule(5), images_per_process=2, micro_batches=1, seed=0, world_size=2)
    assert not caplog.records
    RolloutSampler(3, RoleSchedule(5), images_per_process=2, micro_batches=1, seed=0, world_size=2)
    assert "has 3 images and a rollout takes 4: every rollout repeats images" in caplog.text
    list(islice(rollouts(numbers(3), RoleSchedule(5), images_per_process=4, micro_batches=1), 4))
    assert caplog.text.count("ended after 3 images and is read again, in pass 2") == 1
    assert "in pass 3" not in caplog.text  # once is enough


def test_a_dataset_that_has_changed_since_the_checkpoint_is_said(caplog):
    def sampler(rows):
        return RolloutSampler(rows, RoleSchedule(5), images_per_process=1, micro_batches=1, seed=0)

    sampler(7).load_state_dict(sampler(7).state_dict(12))
    assert not caplog.records
    sampler(8).load_state_dict(sampler(7).state_dict(12))
    assert "the dataset was one of 7 images, and now it has 8" in caplog.text
    stream = rollouts(numbers(7), RoleSchedule(5), images_per_process=1, micro_batches=1)
    list(islice(stream, 2))
    sampler(8).load_state_dict(stream.state_dict(2))
    assert "the dataset was a stream" in caplog.text
    stream.load_state_dict(sampler(7).state_dict(2))
    assert "the dataset was no stream" in caplog.text
