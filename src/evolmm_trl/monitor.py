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

"""What happened in a rollout, kept for people: the log of every rollout and its summary."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from .health.questions import question_kind
from .prompts import Answer, Question
from .voting import Vote


@dataclass(frozen=True)
class Rollout:
    """
    One image, one question, its answers and what all of it was worth.

    Args:
        image_id (`str`):
            The image.
        question_completion (`str`):
            What the proposer wrote.
        question ([`Question`]):
            The same, read.
        completions (`list[str]`):
            What the solver wrote, N + `extra_votes` times.
        answers (`list[Answer]`):
            The same, read.
        tokens (`list[int]`):
            Their lengths in tokens.
        vote ([`Vote`]):
            The vote among all of them.
        solver_rewards (`list[float]`), solver_advantages (`list[float]`):
            Of the first N answers, those that are trained on.
        proposer_reward (`float`), proposer_advantage (`float`):
            Of the question.
        blind_answers (`list[str or None]` or `None`):
            Canonical answers of the solver without the image; `None` if it was not asked.
        solver_step (`int` or `None`), proposer_step (`int` or `None`):
            The optimizer steps, counted from 1, that train on the answers and on the question; `None` for none.
        image_digest (`str`, *optional*):
            A name that the image's pixels give.
    """

    image_id: str
    question_completion: str
    question: Question
    completions: list[str]
    answers: list[Answer]
    tokens: list[int]
    vote: Vote
    solver_rewards: list[float]
    solver_advantages: list[float]
    proposer_reward: float
    proposer_advantage: float
    blind_answers: list[str | None] | None
    solver_step: int | None
    proposer_step: int | None
    image_digest: str | None = None

    def record(self, step: int) -> dict:
        """The rollout as JSON can hold it."""
        trained = len(self.solver_rewards)
        return {
            "step": step,
            "image_id": self.image_id,
            "image_digest": self.image_digest,
            "question": self.question.text,
            "question_completion": self.question_completion,
            "question_well_formed": self.question.well_formed,
            "question_kind": question_kind(self.question.text),
            "answers": [
                {
                    "completion": completion,
                    "answer": answer.text,
                    "canonical": canonical,
                    "tokens": self.tokens[i],
                    "words_before_answer": answer.words_before,
                    "reward": self.solver_rewards[i] if i < trained else None,
                    "advantage": self.solver_advantages[i] if i < trained else None,
                }
                for i, (completion, answer, canonical) in enumerate(
                    zip(self.completions, self.answers, self.vote.answers, strict=True)
                )
            ],
            "votes": self.vote.counts,
            "majority": self.vote.majority,
            "agreement": self.vote.agreement,
            "entropy": self.vote.entropy,
            "blind_answers": self.blind_answers,
            "proposer_reward": self.proposer_reward,
            "proposer_advantage": self.proposer_advantage,
            "trained_on": {"solver": self.solver_step, "proposer": self.proposer_step},
        }

    def preference(self, min_agreement: float) -> dict | None:
        """
        The disagreement as a preference pair: the first completion with the majority's answer, and the first with another
        readable one.

        Args:
            min_agreement (`float`):
                Smallest share of the majority.

        Returns:
            `dict` or `None`: `question`, `ground_truth` (the majority's answer), `chosen`, `rejected` and `iteration` (0,
            since nothing was refined). `None` if the answers agree, too few do, or the question is malformed.
        """
        vote = self.vote
        if not self.question.well_formed or len(vote.counts) < 2 or vote.agreement < min_agreement:
            return None
        other = next(answer for answer in vote.answers if answer not in (None, vote.majority))
        return {
            "question": self.question.text,
            "ground_truth": vote.majority,
            "chosen": self.completions[vote.answers.index(vote.majority)],
            "rejected": self.completions[vote.answers.index(other)],
            "iteration": 0,
        }


def rollout_metrics(records: Sequence[dict]) -> dict[str, float]:
    """
    Summary of one step's rollouts.

    Args:
        records (`Sequence[dict]`):
            [`Rollout.record`] of every image of the step, over all processes.

    Returns:
        `dict[str, float]`: mean and spread of both roles' rewards, agreement, entropy (nats), shares of unanimous
        questions, of unreadable answers and of malformed questions, words before the answer.
    """
    answers = [answer for record in records for answer in record["answers"]]
    rewards = [answer["reward"] for answer in answers if answer["reward"] is not None]
    proposer_rewards = [record["proposer_reward"] for record in records]
    return {
        "solver/reward": fmean(rewards),
        "solver/reward_std": pstdev(rewards),
        "proposer/reward": fmean(proposer_rewards),
        "proposer/reward_std": pstdev(proposer_rewards),
        "agreement": fmean(record["agreement"] for record in records),
        "answer_entropy": fmean(record["entropy"] for record in records),
        "unanimous": fmean(record["agreement"] == 1.0 for record in records),
        "unreadable": fmean(answer["canonical"] is None for answer in answers),
        "malformed_questions": fmean(not record["question_well_formed"] for record in records),
        "words_before_answer": fmean(answer["words_before_answer"] for answer in answers),
    }


class RolloutLog:
    """
    The file `rollouts.jsonl`: one line per image and step. Whole lines are handed to the system in one write, so that
    whatever kills the run, all lines but perhaps the last are complete JSON.

    Args:
        path (`str` or `Path`):
            The file. One left by an earlier run that is not continued is renamed, not overwritten.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._started = False
        self._content = hashlib.blake2b(digest_size=16)

    def __len__(self) -> int:
        """Bytes written."""
        return self.path.stat().st_size if self._started else 0

    @property
    def digest(self) -> str:
        """A name that what was written gives, of 32 hexadecimal digits: what else is of this run says it of this log."""
        return self._content.hexdigest()

    def resume(self, length: int, digest: str | None = None) -> None:
        """Continues the file of an interrupted run, without what was written after its checkpoint."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < length:
            raise ValueError(
                f"{self.path} has {size} bytes, but the checkpoint to resume from was saved when it had {length}. Put "
                "the run's rollout log back, or start a new run in another output_dir."
            )
        content = hash_start(self.path, length)
        if digest is not None and content.hexdigest() != digest:
            raise ValueError(
                f"{self.path} is not the log of the run to resume: its first {length} bytes are not those that the checkpoint "
                "was saved with. Put the run's rollout log back (a newer run in the same output_dir renames it, to "
                f"{self.path.stem}.1{self.path.suffix} or a higher number), or start a new run in another output_dir."
            )
        self._content = content
        if size:
            os.truncate(self.path, length)
        self._started = size > 0

    def write(self, records: Sequence[dict]) -> None:
        # First of all, since a record that JSON cannot hold raises here
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode("ascii")
        if not self._started:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                number = 1
                while (old := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
                    number += 1
                self.path.rename(old)
            self._started = True
        with open(self.path, "ab") as file:
            file.write(lines)
        self._content.update(lines)


def hash_start(path: str | Path, length: int):
    """
    The hash of a log's beginning, whose `hexdigest()` is the `digest` of the [`RolloutLog`] that has written no more.

    Args:
        path (`str` or `Path`):
            The log.
        length (`int`):
            Bytes of its beginning. 0 needs no file.

    Returns:
        `hashlib.blake2b`
    """
    content = hashlib.blake2b(digest_size=16)
    if length:
        with open(path, "rb") as file:
            while length and (part := file.read(min(length, 2**20))):
                content.update(part)
                length -= len(part)
    return content
