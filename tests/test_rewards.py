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


import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolmm_trl import discrete_proposer_reward, discrete_solver_rewards, proposer_reward, solver_rewards, vote
from evolmm_trl.rewards import EMABaseline, entropy_scale


# Counts of the answers to one question, N = 5; their entropy, the proposer's reward, the solver's by answer, its mean
REWARD_TABLE = [
    ((5,), 0.0000, 0.0367, (1.0000,), 1.0000),
    ((4, 1), 0.5004, 0.5211, (0.8554, 0.3241), 0.7491),
    ((3, 2), 0.6730, 0.8103, (0.6994, 0.5266), 0.6302),
    ((3, 1, 1), 0.9503, 0.9897, (0.6994, 0.3241), 0.5493),
    ((2, 2, 1), 1.0549, 0.9067, (0.5266, 0.3241), 0.4861),
    ((2, 1, 1, 1), 1.3322, 0.4666, (0.5266, 0.3241), 0.4051),
    ((1, 1, 1, 1, 1), 1.6094, 0.1282, (0.3241,), 0.3241),
]
table = pytest.mark.parametrize(
    ("counts", "entropy", "proposer", "solver", "mean"),
    REWARD_TABLE,
    ids=["-".join(map(str, r[0])) for r in REWARD_TABLE],
)


def ballot(*counts):
    return vote([name for name, count in zip("abcde", counts, strict=False) for _ in range(count)])


def solver(result, words=0, **kwargs):
    return solver_rewards(result, [words] * len(result.shares), **kwargs)


# The reward table of the paper's constants


@table
def test_entropy_is_the_tables(counts, entropy, proposer, solver, mean):
    assert ballot(*counts).entropy == pytest.approx(entropy, abs=5.1e-5)


@table
def test_the_proposers_reward_is_the_tables(counts, entropy, proposer, solver, mean):
    assert proposer_reward(ballot(*counts).entropy) == pytest.approx(proposer, abs=5.1e-5)


@table
def test_the_solvers_reward_of_each_answer_is_the_tables(counts, entropy, proposer, solver, mean):
    result = ballot(*counts)
    by_count = dict(zip(sorted(set(counts), reverse=True), solver, strict=True))
    expected = [by_count[result.counts[answer]] for answer in result.answers]
    assert solver_rewards(result, [0] * 5) == pytest.approx(expected, abs=5.1e-5)


@table
def test_the_solvers_mean_reward_is_the_tables(counts, entropy, proposer, solver, mean):
    assert sum(solver_rewards(ballot(*counts), [0] * 5)) / 5 == pytest.approx(mean, abs=5.1e-5)


# The solver's reward


def test_words_up_to_the_target_are_free():
    assert solver_rewards(ballot(3), [0, 5, 6]) == [1.0, 1.0, 1.0]


def test_each_sample_is_charged_for_its_own_words():
    rewards = solver_rewards(ballot(4), [6, 7, 9, 12])
    assert rewards == pytest.approx([1.0, 1 - 0.1 / 6, 0.95, 0.9])


def test_the_capped_length_penalty_stops_at_its_weight():
    assert solver_rewards(ballot(3), [12, 66, 10_000]) == pytest.approx([0.9, 0.9, 0.9])


def test_another_cap_stops_elsewhere():
    assert solver(ballot(1), 10_000, length_cap=2.5) == pytest.approx([0.75])


def test_the_uncapped_length_penalty_reaches_zero_at_66_words():
    assert solver(ballot(1), 36, length_cap=None) == pytest.approx([0.5])
    assert solver(ballot(1), 65, length_cap=None)[0] > 0.01
    assert solver(ballot(1), 66, length_cap=None) == pytest.approx([0.0], abs=1e-12)


def test_the_uncapped_reward_is_never_negative():
    assert solver(ballot(2), 10_000, length_cap=None) == [0.0, 0.0]


def test_the_length_penalty_multiplies_the_share():
    assert solver(ballot(4, 1), 12) == pytest.approx([0.9 * 0.8**0.7] * 4 + [0.9 * 0.2**0.7])


def test_gamma_is_the_exponent_of_the_share():
    assert solver(ballot(4, 1), gamma=1.0) == pytest.approx([0.8] * 4 + [0.2])
    assert solver(ballot(4, 1), gamma=0.5) == pytest.approx([math.sqrt(0.8)] * 4 + [math.sqrt(0.2)])


def test_length_weight_and_target_are_respected():
    assert solver(ballot(1), 15, length_weight=0.4, length_target=10) == pytest.approx([1 - 0.4 * 0.5])
    assert solver(ballot(1), 10_000, length_weight=0.0, length_cap=None) == [1.0]


def test_an_unreadable_answer_earns_the_solver_nothing():
    result = vote(["a", None, "a", None, None])
    assert solver_rewards(result, [0] * 5) == pytest.approx([0.4**0.7, 0, 0.4**0.7, 0, 0])
    assert solver_rewards(vote([None] * 5), [0] * 5) == [0.0] * 5


def test_a_word_count_per_answer_is_needed():
    with pytest.raises(ValueError, match="4 entries but the vote has 5"):
        solver_rewards(ballot(5), [0] * 4)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9),
    st.lists(st.integers(0, 1000), min_size=9, max_size=9),
    st.none() | st.floats(0, 20),
)
def test_solver_rewards_are_between_0_and_1(answers, words, cap):
    result = vote(answers)
    rewards = solver_rewards(result, words[: len(answers)], length_cap=cap)
    assert all(0 <= reward <= 1 for reward in rewards)


# The proposer's reward


def test_the_proposer_earns_most_at_the_mean_and_the_same_on_both_sides():
    assert proposer_reward(0.90) == 1.0
    assert proposer_reward(0.6) == pytest.approx(proposer_reward(1.2))
    assert proposer_reward(0.6) > proposer_reward(0.5) > proposer_reward(0.0)


def test_the_proposers_mean_and_width_can_be_chosen():
    assert proposer_reward(1.5, mean=1.0, std=0.5) == pytest.approx(math.exp(-0.5))


def test_unreadable_answers_are_disagreement_to_the_proposer():
    assert proposer_reward(vote([None] * 5).entropy) == pytest.approx(0.1282, abs=5.1e-5)


def test_the_entropy_scale_is_1_at_the_papers_five_answers():
    assert entropy_scale(5) == 1.0


@pytest.mark.parametrize("votes", [3, 8, 12])
def test_scaled_by_the_number_of_votes_total_disagreement_is_worth_the_same(votes):
    scale = entropy_scale(votes)
    assert scale == pytest.approx(math.log(votes) / math.log(5))
    largest = vote([str(i) for i in range(votes)]).entropy
    assert proposer_reward(largest, mean=0.90 * scale, std=0.35 * scale) == pytest.approx(0.1282, abs=5.1e-5)


# The discrete baseline


def test_discrete_rewards_pay_the_majority_and_nobody_else():
    assert discrete_solver_rewards(vote(["b", "a", "a", None, "a"])) == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_of_two_equal_answers_the_discrete_reward_pays_the_first_to_appear():
    assert discrete_solver_rewards(vote(["b", "a", "a", "b", "c"])) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert discrete_solver_rewards(vote(list("abcde"))) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_discrete_rewards_of_unreadable_answers_are_zero():
    assert discrete_solver_rewards(vote([None] * 5)) == [0.0] * 5
    assert discrete_solver_rewards(vote([None] * 4 + ["a"])) == [0.0] * 4 + [1.0]


@pytest.mark.parametrize(
    ("counts", "reward"),
    [((5,), 0), ((4, 1), 1), ((3, 2), 1), ((2, 2, 1), 1), ((2, 1, 1, 1), 1), ((1, 1, 1, 1, 1), 0)],
)
def test_the_discrete_proposer_is_paid_for_a_majority_that_is_not_everybody(counts, reward):
    assert discrete_proposer_reward(ballot(*counts)) == reward


def test_the_discrete_proposers_majority_is_counted_among_all_votes():
    assert discrete_proposer_reward(vote(["a"] * 4 + [None])) == 1.0
    assert discrete_proposer_reward(vote(["a"] + [None] * 4)) == 0.0
    assert discrete_proposer_reward(vote([None] * 5)) == 0.0


# The baseline


def test_the_first_batchs_mean_starts_the_baseline():
    baseline = EMABaseline()
    assert baseline.value is None
    assert baseline.start(0.6) == 0.6
    assert baseline.update(0.6) == pytest.approx(0.6)


def test_the_baseline_is_fixed_for_a_batch_and_moves_once_after_it():
    baseline = EMABaseline(momentum=0.9)
    baseline.update(0.5)
    assert baseline.start(1.0) == 0.5
    assert baseline.start(1.0) == 0.5
    assert baseline.update(1.0) == pytest.approx(0.55)
    assert baseline.start(0.0) == pytest.approx(0.55)


def test_momentum_is_the_share_of_the_old_value():
    baseline = EMABaseline(momentum=0.75)
    baseline.update(1.0)
    assert baseline.update(0.0) == pytest.approx(0.75)


def test_a_baseline_of_zero_is_not_taken_for_none():
    baseline = EMABaseline()
    baseline.update(0.0)
    assert baseline.start(1.0) == 0.0


@pytest.mark.parametrize("updates", [[], [0.3], [0.3, 0.9]])
def test_a_restored_baseline_goes_on_as_the_saved_one(updates):
    saved, restored = EMABaseline(), EMABaseline()
    for reward in updates:
        saved.update(reward)
    restored.load_state_dict(saved.state_dict())
    assert restored.update(0.7) == saved.update(0.7)
