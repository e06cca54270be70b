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

from evolmm_trl import Vote, vote


ballots = st.lists(st.sampled_from(["a", "b", "c", "", None]), min_size=1, max_size=12)


def test_a_vote_counts_shares_and_majority():
    result = vote(["7", "12", "12", None, "12"])
    assert result == Vote(
        answers=("7", "12", "12", None, "12"),
        counts={"12": 3, "7": 1},
        majority="12",
        agreement=0.6,
        shares=(0.2, 0.6, 0.6, 0.0, 0.6),
        entropy=pytest.approx(-0.6 * math.log(0.6) - 2 * 0.2 * math.log(0.2), abs=1e-12),
    )


def test_counts_are_ordered_by_frequency_then_by_appearance():
    assert list(vote(["z", "b", "a", "a", "b", "c"]).counts.items()) == [("b", 2), ("a", 2), ("z", 1), ("c", 1)]


def test_a_tie_goes_to_the_answer_that_appeared_first():
    assert vote(["b", "a", "a", "b"]).majority == "b"
    assert vote(["a", "b", "b", "a"]).majority == "a"
    assert vote(["c", "b", "a"]).majority == "c"


def test_an_unreadable_answer_agrees_with_nobody_not_even_with_another():
    result = vote([None, None, None, "a"])
    assert result.shares == (0.0, 0.0, 0.0, 0.25)
    assert result.entropy == pytest.approx(math.log(4), abs=1e-12)


def test_an_unreadable_answer_is_never_the_majority():
    result = vote([None, None, None, None, "a"])
    assert result.majority == "a"
    assert result.agreement == 0.2
    assert result.counts == {"a": 1}


def test_nothing_readable_is_no_majority_no_agreement_and_the_largest_entropy():
    result = vote([None] * 5)
    assert (result.majority, result.agreement, result.counts) == (None, 0.0, {})
    assert result.entropy == pytest.approx(math.log(5), abs=1e-12)


def test_a_unanimous_vote_has_entropy_zero_without_a_sign():
    result = vote(["a"] * 5)
    assert result.agreement == 1.0
    assert str(result.entropy) == "0.0"


def test_the_empty_string_is_an_answer_and_not_an_unreadable_one():
    assert vote(["", "", None]).majority == ""


def test_agreement_is_exactly_the_share_that_an_agreement_band_is_written_with():
    assert vote(["a"] * 3 + ["b", "c"]).agreement == 0.6
    assert vote(["a"] * 3 + list("bcdefgh")).agreement == 0.3


def test_no_answers_are_refused():
    with pytest.raises(ValueError, match="no answers"):
        vote([])


@settings(deadline=None)
@given(ballots)
def test_every_vote_obeys_its_invariants(answers):
    result = vote(answers)
    readable = [answer for answer in answers if answer is not None]
    assert sum(result.counts.values()) == len(readable)
    assert len(result.shares) == len(answers)
    assert all((share == 0) == (answer is None) for share, answer in zip(result.shares, answers, strict=True))
    assert result.agreement == max(result.shares)
    assert 0 <= result.entropy <= math.log(len(answers)) + 1e-12


@settings(deadline=None)
@given(ballots, st.randoms(use_true_random=False))
def test_the_order_of_the_answers_moves_nothing_but_the_order(answers, random):
    shuffled = random.sample(answers, len(answers))
    one, other = vote(answers), vote(shuffled)
    assert one.counts == other.counts
    assert one.agreement == other.agreement
    assert one.entropy == pytest.approx(other.entropy, abs=1e-12)
    assert sorted(one.shares) == sorted(other.shares)
