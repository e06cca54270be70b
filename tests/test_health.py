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
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolmm_trl import vote
from evolmm_trl.health import QUESTION_KINDS, RunHealth, cluster_shares, question_kind, run, self_bleu
from evolmm_trl.health import questions as health_questions
from evolmm_trl.health.run import RECENT_QUESTIONS
from evolmm_trl.rewards import blind_share, penalised_proposer_reward


COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
VALUES = [f"What is the value of {colour}?" for colour in COLOURS]
OTHERS = [
    "How many dogs are there?",
    "Is it night?",
    "Who won in 1999?",
    "Name the animal on the roof of the red house.",
]


# Kinds


@pytest.mark.parametrize(
    ("kind", "questions"),
    {
        "yes_no": ["Is the red bar taller than the blue bar?", "does the sign say stop?", "Are there many dogs?"],
        "counting": ["How many bars are taller than 3?", "What is the number of cars?"],
        "colour": ["What colour is the tallest bar?", "Which color has the most?"],
        "arithmetic": ["What is the total of all bars?", "What is red plus blue?", "Find the average of A and B."],
        "comparison": ["Which bar is the tallest?", "Is there more red or more blue?", "Which is older, A or B?"],
        "value": ["What is the value of red?", "How tall is the tower?", "What percentage is blue?"],
        "position": ["Where is the dog?", "What is to the left of the house?"],
        "what": ["What animal is this?", "Who is in the forest?", "Why does he laugh?"],
        "other": ["Name the animal.", "これは何ですか", ""],
    }.items(),
)
def test_kinds_of_questions(kind, questions):
    assert [question_kind(question) for question in questions] == [kind] * len(questions)
    assert kind in QUESTION_KINDS


# Likeness


def test_self_bleu_is_0_of_questions_without_a_common_word_and_1_of_copies():
    assert self_bleu(["a b c d"]) == 0.0
    assert self_bleu(["a b c d", "e f g h"]) == pytest.approx(0.0, abs=0.2)  # smoothing leaves a little
    assert self_bleu(["a b c d"] * 2) == 1.0
    assert self_bleu(["a b c d"], ["a b c d"]) == 1.0
    assert self_bleu(["你喜欢什么颜色"], ["你喜欢什么东西"]) > 0.4  # characters, since Chinese has no spaces


def test_a_template_has_a_higher_self_bleu_than_free_questions():
    assert self_bleu(VALUES) > 0.6 > 0.3 > self_bleu(OTHERS)


def test_cluster_shares_are_those_of_rzero():
    # The slots of a template are one cluster, copies count, and what is like nothing else stands alone
    questions = [*VALUES[:3], OTHERS[0], VALUES[0], OTHERS[1]]
    assert cluster_shares(questions) == [4 / 6, 4 / 6, 4 / 6, 1 / 6, 4 / 6, 1 / 6]
    assert cluster_shares(["one"]) == [1.0]
    assert cluster_shares([]) == []


@pytest.fixture
def compared(monkeypatch):
    """Pairs that are compared, by a likeness that takes no time: questions of the same last digit are alike."""
    pairs = []

    def likeness(a, b):
        pairs.append((a, b))
        return float(a[-1] == b[-1])

    monkeypatch.setattr(health_questions, "_likeness", likeness)
    return pairs


def test_cluster_shares_do_not_depend_on_the_order(compared):
    questions = [f"{i}" for i in range(300)]
    shares = dict(zip(questions, cluster_shares(questions), strict=True))
    random.Random(0).shuffle(questions)
    assert dict(zip(questions, cluster_shares(questions), strict=True)) == shares


def test_clusters_of_many_questions_are_bounded(compared):
    shares = cluster_shares([f"{i}" for i in range(1000)])
    assert len(shares) == 1000 and all(0 < share <= 0.1 for share in shares)
    assert len(compared) <= 1000 * 128  # and not 1000 * 1000
    compared.clear()
    assert cluster_shares(["same"] * 1000) == [1.0] * 1000 and not compared


@settings(deadline=None, max_examples=12)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_whatever_a_proposer_writes_has_a_kind_and_a_share(questions):
    assert all(question_kind(question) in QUESTION_KINDS for question in questions)
    assert all(0 < share <= 1 for share in cluster_shares(questions))
    assert 0 <= self_bleu(questions) <= 1


# A run


def records(questions, tokens=5, majority="5", blind=None):
    """Records of two answers each."""
    answers = {"answers": [{"tokens": tokens}] * 2, "majority": majority, "blind_answers": blind}
    return [{"question": question, **answers} for question in questions]


def test_the_first_step_is_all_new_and_a_repeated_question_is_so_once():
    health = RunHealth()
    metrics = health.observe(records([*OTHERS[:3], OTHERS[0]]))
    assert metrics["distinct_questions"] == metrics["novel_questions"] == 0.75
    assert metrics["question_kinds/counting"] == 0.5 and metrics["question_kinds/colour"] == 0.0
    assert {name for name in metrics if "/" in name} == {f"question_kinds/{kind}" for kind in QUESTION_KINDS}
    metrics = health.observe(records([OTHERS[0], OTHERS[3]]))
    assert metrics["novel_questions"] == 0.5
    assert metrics["distinct_questions"] == 4 / 6


def test_distinct_questions_are_counted_among_as_many_whatever_the_images_per_step():
    small, large = RunHealth(), RunHealth()
    questions = [str(i % 7) for i in range(160)]
    for i in range(0, 160, 2):
        one = small.observe(records(questions[i : i + 2]))
    for i in range(0, 160, 32):
        other = large.observe(records(questions[i : i + 32]))
    assert one["distinct_questions"] == other["distinct_questions"] == 7 / RECENT_QUESTIONS


def test_self_bleu_looks_back_over_steps():
    health = RunHealth()
    assert health.observe(records(VALUES[:1]))["question_self_bleu"] == 0.0
    assert health.observe(records(VALUES[1:2]))["question_self_bleu"] > 0.5


def test_the_self_bleu_of_a_large_step_is_that_of_eight_questions_from_all_over_it(monkeypatch):
    judged = []
    monkeypatch.setattr(run, "self_bleu", lambda questions, others: judged.append((questions, [*others])) or 0.0)
    health = RunHealth()
    health.observe(records([str(i) for i in range(64)]))
    health.observe(records([str(i) for i in range(100, 103)]))
    assert judged[0] == (["0", "8", "16", "24", "32", "40", "48", "56"], [])
    assert judged[1] == (["100", "101", "102"], [str(i) for i in range(64)])


def test_answer_length_is_compared_with_the_first_ten_rollouts():
    health = RunHealth()
    assert [health.observe(records("a", 10))["answer_length_drift"] for _ in range(10)] == [1.0] * 10
    metrics = health.observe(records("a", 25))
    assert metrics["answer_tokens"] == 25 and metrics["answer_length_drift"] == 2.5
    assert health.observe(records("a", 5))["answer_length_drift"] == 0.5


def test_a_question_is_solved_blind_if_the_majority_is_the_same_and_readable():
    health = RunHealth()
    assert "blind_solved" not in health.observe(records("abcdefghij"))  # none was asked
    assert "blind_solved" not in health.observe(records("abcdefg", blind=["5", "1", "5"]))  # seven were
    assert health.observe(records("a", blind=["5"]))["blind_solved"] == 1.0
    health.observe(records("abcd", blind=["1", "1", "5"]))
    assert health.observe(records("abcd", majority=None, blind=[None, None]))["blind_solved"] == 0.5
    assert health.observe(records(["a"] * 64, blind=["7"]))["blind_solved"] == 0.0  # of the last 64


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped():
    whole, first = RunHealth(), RunHealth()
    steps = [
        records([str(random.Random(i + j).randrange(40)) for j in range(5)], i + 1, "1", [str(i % 3)])
        for i in range(30)
    ]
    expected = [whole.observe(step) for step in steps]
    for step in steps[:15]:
        first.observe(step)
    resumed = RunHealth()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [resumed.observe(step) for step in steps[15:]] == expected[15:]


# Penalties


def test_the_share_solved_blind_is_that_of_the_readable_majority():
    assert blind_share(vote(["5", "5", "1"]), ["5", "1", "5", None]) == 0.5
    assert blind_share(vote([None, None]), [None, None]) == 0.0


def test_penalties_are_subtracted_down_to_0():
    shares = {"cluster_share": 0.25, "blind_share": 0.4}
    assert penalised_proposer_reward(0.9, **shares) == 0.9
    assert penalised_proposer_reward(0.9, **shares, diversity_weight=1.0) == pytest.approx(0.65)
    assert penalised_proposer_reward(0.9, **shares, blind_weight=0.5) == pytest.approx(0.7)
    assert penalised_proposer_reward(0.9, **shares, diversity_weight=1.0, blind_weight=0.5) == pytest.approx(0.45)
    assert penalised_proposer_reward(0.2, **shares, diversity_weight=1.0) == 0.0
