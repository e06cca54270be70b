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

"""How far N answers to one question agree."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Vote:
    """
    The outcome of a vote among the N answers to one question.

    Args:
        answers (`tuple[str or None, ...]`):
            The N canonical answers, in the order of the samples.
        counts (`dict[str, int]`):
            Number of samples per readable canonical answer, most frequent first, ties in order of appearance.
        majority (`str` or `None`):
            The most frequent readable answer, the first to appear among equals; `None` when no answer is readable.
        agreement (`float`):
            The majority's share of all N samples, in [0, 1]; 0 when no answer is readable.
        shares (`tuple[float, ...]`):
            For each of the N samples, in order, the share p(y_i|x,q) of its own answer; 0 for an unreadable one.
        entropy (`float`):
            Entropy H(x,q) of the empirical answer distribution, in nats. Each unreadable answer is a class of its own,
            so N unreadable answers have the largest entropy, ln N.
    """

    answers: tuple[str | None, ...]
    counts: dict[str, int]
    majority: str | None
    agreement: float
    shares: tuple[float, ...]
    entropy: float


def vote(answers: Sequence[str | None]) -> Vote:
    """
    Counts the answers to one question (EvoLMM, https://huggingface.co/papers/2511.16672: p(a|x,q) = count(a) / N and
    H(x,q) = -sum_a p(a|x,q) ln p(a|x,q)).

    Args:
        answers (`Sequence[str or None]`):
            The N canonical answers, `None` for an unreadable one. An unreadable answer agrees with nobody, not even
            with another unreadable one, and can never be the majority.

    Returns:
        [`Vote`]

    Raises:
        `ValueError`: if `answers` is empty.

    Example:

    ```python
    >>> vote(["12", "12", "7", None]).agreement
    0.5
    ```
    """
    total = len(answers)
    if total == 0:
        raise ValueError("`vote` was given no answers; it needs at least one (use `None` for an unreadable answer).")
    counts = dict(Counter(answer for answer in answers if answer is not None).most_common())
    majority = next(iter(counts), None)
    unreadable = total - sum(counts.values())
    shares = [count / total for count in counts.values()] + [1 / total] * unreadable
    return Vote(
        answers=tuple(answers),
        counts=counts,
        majority=majority,
        agreement=counts[majority] / total if majority is not None else 0.0,
        shares=tuple(counts[answer] / total if answer is not None else 0.0 for answer in answers),
        entropy=-sum(share * math.log(share) for share in shares) + 0.0,  # + 0.0 turns -0.0 into 0.0
    )


def is_settled(vote: Vote, remaining: int) -> bool:
    """
    Whether a vote's majority stays what it is, whatever the answers still to come are.

    Args:
        vote ([`Vote`]):
            The vote among the answers drawn so far.
        remaining (`int`):
            Answers still to be drawn.

    Returns:
        `bool`
    """
    first, second, *_ = [*vote.counts.values(), 0, 0]
    return first - second > remaining
