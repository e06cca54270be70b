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

"""What a sampled answer and a question are worth: the formulas of the paper, and the baseline they are compared with."""

import math
from collections.abc import Sequence

from .voting import Vote


# Mean and standard deviation of the answer entropy that the proposer is paid for, in nats, at N = 5 answers.
PROPOSER_ENTROPY_MEAN = 0.90
PROPOSER_ENTROPY_STD = 0.35
_PAPER_NUM_GENERATIONS = 5


def solver_rewards(
    vote: Vote,
    words_before_answer: Sequence[int],
    *,
    gamma: float = 0.7,
    length_weight: float = 0.1,
    length_target: int = 6,
    length_cap: float | None = 1.0,
) -> list[float]:
    r"""
    Continuous solver rewards (EvoLMM, https://huggingface.co/papers/2511.16672, the solver's reward): for sample i
    with answer y_i and w_i words before it,

    $$r^{sol}_i = p(y_i|x,q)^\gamma \, (1 - \lambda \max(0, (w_i - \tau)/\tau)).$$

    Args:
        vote ([`Vote`]):
            The vote among the N answers.
        words_before_answer (`Sequence[int]`):
            Words before the answer tag, for each of the N samples.
        gamma (`float`, *optional*, defaults to `0.7`):
            Exponent of the share, in (0, 1].
        length_weight (`float`, *optional*, defaults to `0.1`):
            Weight lambda of the length penalty.
        length_target (`int`, *optional*, defaults to `6`):
            Words tau up to which there is no penalty.
        length_cap (`float` or `None`, *optional*, defaults to `1.0`):
            Largest relative excess length that is penalised. 1.0 is the authors' released code, `None` the paper's
            uncapped form.

    Returns:
        `list[float]`: N rewards in [0, 1], never below 0; 0 for an unreadable answer.

    Raises:
        `ValueError`: if the number of lengths is not the number of answers.
    """
    if len(words_before_answer) != len(vote.shares):
        raise ValueError(
            f"`words_before_answer` has {len(words_before_answer)} entries but the vote has {len(vote.shares)} "
            "answers; pass one word count per answer."
        )
    rewards = []
    for share, words in zip(vote.shares, words_before_answer, strict=True):
        excess = max(0.0, (words - length_target) / length_target)
        if length_cap is not None:
            excess = min(length_cap, excess)
        rewards.append(max(0.0, share**gamma * (1 - length_weight * excess)))
    return rewards


def proposer_reward(
    entropy: float, *, mean: float = PROPOSER_ENTROPY_MEAN, std: float = PROPOSER_ENTROPY_STD
) -> float:
    r"""
    Continuous proposer reward (EvoLMM, https://huggingface.co/papers/2511.16672, the proposer's reward): a question is
    worth most when the solver is neither sure nor lost,

    $$r^{prop} = \exp(-(H - \mu_H)^2 / (2 \sigma_H^2)).$$

    Args:
        entropy (`float`):
            Answer entropy H(x,q), in nats.
        mean (`float`, *optional*, defaults to `0.90`):
            Entropy mu_H that is worth most, in nats.
        std (`float`, *optional*, defaults to `0.35`):
            Width sigma_H, in nats.

    Returns:
        `float`: in (0, 1].
    """
    return math.exp(-((entropy - mean) ** 2) / (2 * std**2))


def entropy_scale(num_votes: int) -> float:
    """
    The factor ln N / ln 5 that carries the paper's mu_H and sigma_H, chosen at N = 5, to another number of answers: the
    largest entropy of N answers is ln N.

    Args:
        num_votes (`int`):
            Number N of answers that vote.

    Returns:
        `float`
    """
    return math.log(num_votes) / math.log(_PAPER_NUM_GENERATIONS)


def discrete_solver_rewards(vote: Vote) -> list[float]:
    """
    The discrete baseline of the paper (majority vote): 1 for each sample that gave the majority answer, else 0.

    Args:
        vote ([`Vote`]):
            The vote among the N answers.

    Returns:
        `list[float]`: N rewards. All 0 when no answer is readable.
    """
    return [1.0 if answer is not None and answer == vote.majority else 0.0 for answer in vote.answers]


def discrete_proposer_reward(vote: Vote) -> float:
    """
    The discrete baseline of the paper for the proposer: 1 if the majority has more than one sample but not all, else 0.

    Args:
        vote ([`Vote`]):
            The vote among the N answers.

    Returns:
        `float`
    """
    majority_count = vote.counts[vote.majority] if vote.majority is not None else 0
    return 1.0 if 1 < majority_count < len(vote.shares) else 0.0


def blind_share(vote: Vote, blind_answers: Sequence[str | None]) -> float:
    """
    How far a question is solved without its image.

    Args:
        vote ([`Vote`]):
            The vote with the image.
        blind_answers (`Sequence[str or None]`):
            Canonical answers without it.

    Returns:
        `float`: the share of the answers without the image that are the majority with it; 0 if there is none.
    """
    return sum(vote.majority is not None and answer == vote.majority for answer in blind_answers) / len(blind_answers)


def penalised_proposer_reward(
    reward: float,
    *,
    cluster_share: float = 0.0,
    blind_share: float = 0.0,
    diversity_weight: float = 0.0,
    blind_weight: float = 0.0,
) -> float:
    r"""
    The proposer's reward less the two optional penalties,

    $$r = \max(0, r^{prop} - \lambda_{div} |C| / M - \lambda_{blind} b).$$

    The first is R-Zero's repetition penalty (https://huggingface.co/papers/2508.05004), with the question's cluster C
    among the M questions of the rollout ([`~evolmm_trl.health.cluster_shares`]). The second is this package's own.

    Args:
        reward (`float`):
            Reward r^prop of the question.
        cluster_share (`float`, *optional*, defaults to `0.0`):
            Share |C| / M of the questions that are like it, itself included.
        blind_share (`float`, *optional*, defaults to `0.0`):
            Share b of the answers without the image that are the majority with it.
        diversity_weight (`float`, *optional*, defaults to `0.0`), blind_weight (`float`, *optional*, defaults to `0.0`):
            Weights of the penalties. 0: none.

    Returns:
        `float`: 0 or more.
    """
    return max(0.0, reward - diversity_weight * cluster_share - blind_weight * blind_share)


class EMABaseline:
    """
    Exponential moving average of a role's mean reward (EvoLMM: b <- 0.9 b + 0.1 r). It is fixed for a whole rollout
    batch and moves once after it; the first batch's mean starts it.

    Args:
        momentum (`float`, *optional*, defaults to `0.9`):
            Share of the old value that is kept.
    """

    def __init__(self, momentum: float = 0.9):
        self.momentum = momentum
        self.value: float | None = None

    def start(self, mean_reward: float) -> float:
        """The baseline for a batch with this mean reward: the moving average, or, for the first batch, its own mean."""
        if self.value is None:
            self.value = mean_reward
        return self.value

    def update(self, mean_reward: float) -> float:
        """Moves the baseline by one batch's mean reward and returns it."""
        self.value = self.momentum * self.start(mean_reward) + (1 - self.momentum) * mean_reward
        return self.value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]
