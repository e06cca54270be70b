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

"""The page of the experiments on health is what their results give."""

import json
import shutil

import health_experiments
import pytest
from health_experiments import ARMS, PAGE, RESULTS


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A copy of the page, that the report writes to."""
    copy = shutil.copy(PAGE, tmp_path / "health.md")
    monkeypatch.setattr(health_experiments, "PAGE", copy)
    return copy


def result(arm, seed, accuracy, alarm=None, steps=300, **metrics):
    row = {
        "agreement": 0.7,
        "answer_entropy": 0.5,
        "distinct_questions": 0.5,
        "question_self_bleu": 0.9,
        "blind_solved": 0.1,
        "solver/kl": 0.1,
        "proposer/kl": 0.1,
        **metrics,
    }
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "alarm": alarm and {"condition": alarm, "step": steps, "reason": ""},
        "accuracy": accuracy,
        "questions": {"grounded": 0.8},
        "clusters": [0.3] * 5,
        "guessed": [0.25] * 5,
        "log": [{"step": i, **row} for i in range(1, 11)],
        "seconds": 1.0,
    }


def test_the_committed_page_is_what_the_committed_results_give(page):
    health_experiments.report()
    assert page.read_text() == PAGE.read_text()


def test_every_arm_was_run_with_every_seed():
    done = [(row["arm"], row["seed"]) for row in map(json.loads, RESULTS.read_text().splitlines())]
    assert len(set(done)) == len(done)
    assert set(done) == {(arm, seed) for arm, (_, _, _, seeds, _) in ARMS.items() for seed in seeds}


def test_a_collapse_is_judged_by_the_start_and_by_the_best(page, tmp_path, monkeypatch):
    results = [
        result("collapse", 0, [(0, 0.7), (25, 0.9), (40, 0.88)], "distinct_questions", 40),
        result("collapse", 1, [(0, 0.7), (25, 0.9), (60, 0.80)], "distinct_questions", 60),
        result("collapse", 2, [(0, 0.7), (25, 0.6), (60, 0.60)], "kl", 60),
        result("collapse", 3, [(0, 0.7), (300, 0.2)]),
        result("healthy", 0, [(0, 0.7), (300, 0.9)], **{"solver/kl": 0.2}),
        result("template", 0, [(0, 0.7), (9, 0.7)], "distinct_questions", 9),
        result("template", 1, [(0, 0.7), (20, 0.7)], None, 20),
        result("repeats", 0, [(0, 0.7), (120, 0.8)], distinct_questions=0.1),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in results))
    monkeypatch.setattr(health_experiments, "RESULTS", file)
    health_experiments.report()
    text = page.read_text()
    assert "3 of 4 runs ended by the guard" in text
    assert "less than 3 points below the start in 2 of them" in text
    assert "less than 3 points below the best measured before in 1" in text
    assert "healthy: 0 of 1 runs ended" in text
    assert "flagged in 1 of 2 runs, at step 9, by distinct_questions" in text
    assert "| `solver/kl` | 0.200 | 0.200 | `max_kl=0.15` |" in text
    assert "| base `room`, no penalty | 1 | 0.10 | 0.90 | 0.30 | 0.10 | 0.25 | 10.0 | 0.80 |" in text
