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

import inspect
import json
import re
import shutil

import health_experiments
import pytest
from health_experiments import ARMS, PAGE, RESULTS, SOUND, first_alarm

from evolmm_trl import CollapseGuard


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


def runs(arm):
    return [row for row in health_experiments.read_results() if row["arm"] == arm]


@pytest.mark.parametrize("arm", ["template", "needs_no_image"])
def test_habits_are_flagged_within_ten_steps_and_live_as_in_their_logs(arm):
    assert len(runs(arm)) == 3
    for row in runs(arm):
        alarm = first_alarm(row)
        assert alarm.step <= 10
        assert (alarm.condition, alarm.step) == (row["alarm"]["condition"], row["alarm"]["step"])


def test_healthy_runs_are_left_alone():
    assert len(runs("healthy")) == 10
    assert all(first_alarm(row) is None and row["steps"] == 300 for row in runs("healthy"))


def test_the_page_states_what_the_logs_give():
    text = PAGE.read_text()
    assert "healthy: the guard ends 0 of 10 runs" in text
    assert re.search(r"one template: flagged in 3 of 3 runs, at step (\d|10), (\d|10), (\d|10), by distinct_q", text)
    assert re.search(r"needs no image: flagged in 3 of 3 runs, at step (\d|10), (\d|10), (\d|10), by blind_s", text)
    sound = [row for arm in SOUND for row in runs(arm)]
    assert len(sound) == 22 and all(row["accuracy"][-1][1] > row["accuracy"][0][1] for row in sound)
    ended = sum(first_alarm(row) is not None for row in sound)
    assert f"**Runs that gain accuracy**: the guard ends {ended} of 22" in text


def test_a_collapse_is_judged_by_the_best_up_to_the_alarm(page, tmp_path, monkeypatch):
    max_kl = inspect.signature(CollapseGuard).parameters["max_kl"].default
    away, stuck = {"solver/kl": 9.0}, {"distinct_questions": 0.1}
    results = [
        # The alarm is at step 7, and the accuracy at it is that of step 6
        result("collapse_on", 20, [(0, 0.7), (3, 0.9), (6, 0.88), (9, 0.99), (400, 0.2)], steps=400, **away),
        result("collapse_on", 21, [(0, 0.7), (3, 0.9), (6, 0.80), (400, 0.89)], steps=400, **stuck),
        result("collapse_on", 22, [(0, 0.7), (400, 0.2)], steps=400),
        result("collapse_on", 23, [(0, 0.7), (400, 0.7)], steps=400),
        result("healthy", 0, [(0, 0.7), (300, 0.9)], **{"solver/kl": max_kl - 0.01}),
        result("template", 0, [(0, 0.7), (9, 0.7)], **stuck),
        result("template", 1, [(0, 0.7), (20, 0.7)]),
        result("repeats", 0, [(0, 0.7), (120, 0.8)], **stuck),
        result("repeats_less", 0, [(0, 0.7), (120, 0.6)], **stuck),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in results))
    monkeypatch.setattr(health_experiments, "RESULTS", file)
    health_experiments.report()
    text = page.read_text()
    assert "an alarm in 2 of 4 runs, at step 7, 7, by distinct_questions (1), kl (1). It comes" in text
    assert (
        "below the best measured up to it in 1 of 4 runs, at most 10.0 points below it, and below the start's in 0."
        in text
    )
    assert "and 2 of 4 end 3 points or more below that best: by -70.0, -1.0, -50.0, +0.0 points" in text
    assert "| `room` | 20 | 7 | kl | 0.700 | 0.900 | 0.880 | -2.0 | 0.200 | -70.0 |" in text
    assert "| `room` | 22 | - | none | 0.700 | 0.700 | 0.200 | -50.0 | 0.200 | -50.0 |" in text
    assert "the guard ends 1 of 2 (base `room`, no penalty, seed 0: distinct_questions at step 7)" in text
    assert "healthy: the guard ends 0 of 1 runs" in text
    assert "flagged in 1 of 2 runs, at step 7, by distinct_questions" in text
    assert f"| `solver/kl` | 0.100 | {max_kl - 0.01:.3f} | `max_kl={max_kl:g}` |" in text
    assert "beyond the threshold of 1 of 5 metrics: `distinct_questions`." in text
    assert "| base `room`, no penalty | 1 | 0.10 | 0.90 | 0.30 | 0.10 | 0.25 | 10.0 | 0.80 |" in text
