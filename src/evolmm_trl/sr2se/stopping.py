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

"""
When to stop reasoning: SR2SE's stopping theory, with one consistent charge for length.

Steps are counted from 1 to K. Stopping after step k earns `r_visual + r_ans - length_penalty * k` (Eq. 12), and taking a
step costs nothing beside that. The paper charges length twice, in the terminal reward (Eq. 16) and per step (Eq. 17); a
path would then be worth less than the reward it ends with.
"""

from collections.abc import Sequence

import torch


def hsr_rewards(visual: torch.Tensor, correct: torch.Tensor, length_penalty: float = 0.1) -> torch.Tensor:
    """
    Reward of stopping after each step (Eq. 12): `R_HSR = r_visual + r_ans - length_penalty * k`.

    Args:
        visual (`torch.Tensor`):
            Shape `(n,)`: r_visual, 1 where the description alone leads to the right answer, else 0.
        correct (`torch.Tensor`):
            Shape `(n, K)`: r_ans, 1 where the answer after steps 1..k is right, else 0.
        length_penalty (`float`, *optional*, defaults to `0.1`):
            lambda, the price of a step (authors' code).

    Returns:
        `torch.Tensor`: shape `(n, K)`, float32.
    """
    k = torch.arange(1, correct.shape[1] + 1, device=correct.device)
    return visual.float()[:, None] + correct.float() - length_penalty * k


def stopping_values(rewards: Sequence[float]) -> tuple[list[float], list[float]]:
    """
    Exit and continue values of every step of one path whose rewards are known (Eq. 15 to 17, length charged once):
    `Q_exit(k) = R(k)` and `Q_cont(k) = max(Q_exit(k + 1), Q_cont(k + 1))`.

    Args:
        rewards (`Sequence[float]`):
            The reward, or its expectation, of stopping after step 1, ..., K, as [`hsr_rewards`] gives it.

    Returns:
        `tuple[list[float], list[float]]`: K exit values and K continue values; the last continue value is minus
        infinity, since there is no further step.
    """
    exits, continues, best = list(rewards), [], float("-inf")
    for value in reversed(exits):
        continues.append(best)
        best = max(value, best)
    return exits, continues[::-1]


def stop_labels(rewards: torch.Tensor) -> torch.Tensor:
    """
    Whether stopping after each step earns at least as much as stopping after any later one (Eq. 18 in hindsight). Where no
    step earns anything, the first is the cheapest.

    Args:
        rewards (`torch.Tensor`):
            Shape `(n, K)`, as [`hsr_rewards`] gives them.

    Returns:
        `torch.Tensor`: shape `(n, K)`, bool; the last column is true.
    """
    best_from = rewards.flip(1).cummax(1).values.flip(1)
    return rewards >= best_from


def optimal_stop(rewards: Sequence[float]) -> int:
    """The first step at which stopping is worth as much as going on (Eq. 18), counted from 1."""
    exits, continues = stopping_values(rewards)
    return next(k for k, (exit_, cont) in enumerate(zip(exits, continues, strict=True), 1) if exit_ >= cont)


def greedy_stop(gains: Sequence[float], length_penalty: float) -> int:
    """
    The greedy rule (Eq. 20): stop at the first step whose next step gains no more than it costs.

    Args:
        gains (`Sequence[float]`):
            K - 1 numbers: how much the probability of the right answer rises from step k to k + 1, or an estimate of it.
        length_penalty (`float`):
            lambda.

    Returns:
        `int`: the step, counted from 1; K if every step is worth its price.
    """
    return next((k for k, gain in enumerate(gains, 1) if gain <= length_penalty), len(gains) + 1)


def greedy_regret(gains: Sequence[float], estimates: Sequence[float], length_penalty: float) -> float:
    """
    What the greedy rule loses by using estimates: `J(k*) - J(k_hat)` (Proposition 1), J(k) = E[p_k] - lambda * k.

    Args:
        gains (`Sequence[float]`):
            The K - 1 true gains E[p_(k+1) - p_k].
        estimates (`Sequence[float]`):
            The K - 1 estimates that the rule sees.
        length_penalty (`float`):
            lambda.
    """
    values = [0.0]  # J(k) - J(1)
    for gain in gains:
        values.append(values[-1] + gain - length_penalty)
    return max(values) - values[greedy_stop(estimates, length_penalty) - 1]


def regret_bound(gains: Sequence[float], length_penalty: float, error: float) -> float:
    """
    Proposition 1's bound on [`greedy_regret`]: `error` times the number of steps whose gain is within `error` of the
    price. It holds where the gains do not increase and every estimate is within `error` of its gain.
    """
    return error * sum(abs(gain - length_penalty) <= error for gain in gains)


def expected_calibration_error(scores: torch.Tensor, correct: torch.Tensor, bins: int = 10) -> float:
    """
    Expected calibration error of confidence scores: the mean gap between score and accuracy over bins of equal width,
    weighted by their sizes.

    Args:
        scores (`torch.Tensor`):
            Any shape, in [0, 1].
        correct (`torch.Tensor`):
            The same shape, 0 or 1.
        bins (`int`, *optional*, defaults to `10`):
            Number of bins.
    """
    return sum(count * abs(score - accuracy) for score, accuracy, count in reliability(scores, correct, bins)) / max(
        scores.numel(), 1
    )


def reliability(scores: torch.Tensor, correct: torch.Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """Mean score, accuracy and size of every bin of equal width that is not empty; a reliability diagram's points."""
    scores, correct = scores.flatten().double(), correct.flatten().double()
    which = (scores * bins).long().clamp(max=bins - 1)
    points = []
    for bin_ in range(bins):
        inside = which == bin_
        if inside.any():
            points.append((scores[inside].mean().item(), correct[inside].mean().item(), int(inside.sum())))
    return points
