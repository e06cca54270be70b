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

"""How good answers to labelled questions are."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

from ..answers import canonical_answer
from ..prompts import read_answer
from ..voting import vote


@dataclass(frozen=True)
class Scores:
    """
    The scores of one labelled question.

    Args:
        accuracy_greedy (`float`):
            1 if the greedy answer is right, else 0.
        accuracy_sampled (`float`):
            Share of the sampled answers that are right.
        accuracy_majority (`float`):
            1 if the majority of the sampled answers is right, else 0.
        agreement (`float`), entropy (`float`), unreadable (`float`):
            Of the sampled answers.
    """

    accuracy_greedy: float
    accuracy_sampled: float
    accuracy_majority: float
    agreement: float
    entropy: float
    unreadable: float

    @staticmethod
    def mean(scores: Sequence["Scores"]) -> dict[str, float]:
        """The mean of each score."""
        rows = [asdict(score) for score in scores]
        return {name: fmean(row[name] for row in rows) for name in rows[0]}

    @staticmethod
    def vote_gain(scores: Sequence["Scores"]) -> tuple[float, float]:
        """How far the majority is ahead of greedy, paired by question, and the standard error of that."""
        gains = [score.accuracy_majority - score.accuracy_greedy for score in scores]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return fmean(gains), error

    @staticmethod
    def vote_warning(scores: Sequence["Scores"], votes: int) -> str | None:
        """What to say when the majority is not measurably ahead of greedy: self-reward has nothing sound to teach."""
        gain, error = Scores.vote_gain(scores)
        if gain > 2 * error:
            return None
        return (
            f"On {len(scores)} labelled questions the majority of {votes} answers is {100 * gain:+.1f} points (standard "
            f"error {100 * error:.1f}) from the greedy answer: the vote is not measurably ahead. Self-reward can only "
            "teach what the vote knows, and where the vote is behind it lowers accuracy. Watch `eval_accuracy_greedy`, "
            "sample at another `temperature`, add `extra_votes`, or start from a better model."
        )


def score_answers(label: str, greedy: str, sampled: Sequence[str]) -> Scores:
    """
    Scores the completions of one labelled question by [`canonical_answer`].

    Args:
        label (`str`):
            The right answer.
        greedy (`str`):
            The greedy completion.
        sampled (`Sequence[str]`):
            Sampled completions.

    Returns:
        [`Scores`]

    Raises:
        `ValueError`: if the label holds no answer.
    """
    right = canonical_answer(label)
    if right is None:
        raise ValueError(f"The label {label!r} holds no answer; remove such rows from `eval_dataset`.")
    answers = [_read(completion) for completion in sampled]
    votes = vote(answers)
    return Scores(
        accuracy_greedy=float(_read(greedy) == right),
        accuracy_sampled=fmean(answer == right for answer in answers),
        accuracy_majority=float(votes.majority == right),
        agreement=votes.agreement,
        entropy=votes.entropy,
        unreadable=fmean(answer is None for answer in answers),
    )


def _read(completion: str) -> str | None:
    return canonical_answer(read_answer(completion).text)
