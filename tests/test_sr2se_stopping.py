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

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evolmm_trl.sr2se.stopping import (
    expected_calibration_error,
    greedy_regret,
    greedy_stop,
    hsr_rewards,
    optimal_stop,
    regret_bound,
    reliability,
    stop_labels,
    stopping_values,
)


FLOAT_ERROR = 1e-9
gain = st.floats(-1, 1, allow_nan=False)
price = st.floats(0, 0.5)


def test_the_reward_is_equation_12():
    rewards = hsr_rewards(torch.tensor([True, False]), torch.tensor([[False, True, True], [False, False, True]]), 0.1)
    assert torch.allclose(rewards, torch.tensor([[0.9, 1.8, 1.7], [-0.1, -0.2, 0.7]]))


def test_length_is_charged_once():
    """Stopping at step 3 with both rewards is worth 1.70 from every step before it, as R_HSR says."""
    rewards = hsr_rewards(torch.tensor([True]), torch.tensor([[False, False, True]]), 0.1)[0].tolist()
    exits, continues = stopping_values(rewards)
    assert rewards[2] == pytest.approx(1.70)
    assert exits == rewards
    assert continues[:2] == pytest.approx([1.70, 1.70])
    assert continues[2] == float("-inf")
    assert optimal_stop(rewards) == 3


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_the_optimal_stop_is_where_the_reward_is_largest(rewards):
    assert rewards[optimal_stop(rewards) - 1] == max(rewards)
    assert optimal_stop(rewards) == rewards.index(max(rewards)) + 1


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5), price)
def test_stopping_is_right_where_no_later_step_earns_more(correct, length_penalty):
    rewards = hsr_rewards(torch.zeros(len(correct)), torch.tensor(correct), length_penalty)
    for row, labels in zip(rewards.tolist(), stop_labels(rewards).tolist(), strict=True):
        exits, continues = stopping_values(row)
        assert labels == [exit_ >= cont for exit_, cont in zip(exits, continues, strict=True)]
        assert optimal_stop(row) == labels.index(True) + 1


def test_the_greedy_rule_compares_the_marginal_gain_with_the_price():
    assert greedy_stop([0.4, 0.2, 0.05], 0.1) == 3
    assert greedy_stop([0.05, 0.4], 0.1) == 1
    assert greedy_stop([0.4, 0.4], 0.1) == 3
    assert greedy_stop([0.1], 0.1) == 1  # what a step just pays for is not taken
    assert greedy_stop([], 0.1) == 1


@given(st.lists(gain, min_size=0, max_size=7), price)
def test_exact_gains_that_do_not_increase_have_no_regret(gains, length_penalty):
    gains = sorted(gains, reverse=True)
    assert greedy_regret(gains, gains, length_penalty) == pytest.approx(0, abs=FLOAT_ERROR)


@given(st.lists(st.tuples(gain, st.floats(-1, 1)), min_size=1, max_size=7), price, st.floats(0, 0.3))
def test_proposition_1_bounds_the_regret(draws, length_penalty, error):
    gains = sorted((g for g, _ in draws), reverse=True)
    estimates = [g + error * noise for g, (_, noise) in zip(gains, draws, strict=True)]
    bound = regret_bound(gains, length_penalty, error + FLOAT_ERROR)
    assert greedy_regret(gains, estimates, length_penalty) <= bound + FLOAT_ERROR


@given(st.lists(gain, min_size=2, max_size=7), price)
def test_regret_is_never_negative(gains, length_penalty):
    assume(len(set(gains)) > 1)
    assert greedy_regret(gains, gains[::-1], length_penalty) >= -FLOAT_ERROR


def test_the_bound_is_reached():
    """Every step is worth just under `error` more than it costs, and every estimate says that it is not."""
    gains = [0.1 + 0.049] * 4
    estimates = [g - 0.05 for g in gains]
    assert greedy_regret(gains, estimates, 0.1) == pytest.approx(4 * 0.049)
    assert regret_bound(gains, 0.1, 0.05) == pytest.approx(4 * 0.05)


def test_calibration_error_is_the_weighted_gap():
    scores = torch.tensor([[0.95, 0.95], [0.15, 0.15]])
    correct = torch.tensor([[True, False], [False, False]])
    assert expected_calibration_error(scores, correct) == pytest.approx((2 * 0.45 + 2 * 0.15) / 4)
    assert [count for *_, count in reliability(scores, correct)] == [2, 2]
    assert expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])) == 0
