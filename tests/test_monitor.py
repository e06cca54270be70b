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
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolmm_trl import vote
from evolmm_trl.monitor import Rollout, RolloutLog, hash_start, rollout_metrics
from evolmm_trl.prompts import Answer, Question


def rollout(answers, rewards, **kwargs):
    """A rollout with these (text, words before) answers, of which the first are trained on."""
    return Rollout(
        **{
            "image_id": "a.png",
            "question_completion": "<question>How many?</question>",
            "question": Question("How many?", True),
            "completions": [f"<answer>{text}</answer>" for text, _ in answers],
            "answers": [Answer(text, words) for text, words in answers],
            "tokens": [words + 4 for _, words in answers],
            "vote": vote([text for text, _ in answers]),
            "solver_rewards": rewards,
            "solver_advantages": [reward - 0.5 for reward in rewards],
            "proposer_reward": 0.25,
            "proposer_advantage": -0.5,
            "blind_answers": None,
            "solver_step": 3,
            "proposer_step": None,
            **kwargs,
        }
    )


def lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "rollouts.jsonl"


# One rollout


def test_a_record_holds_all_answers_and_what_the_trained_ones_earned():
    record = rollout([("5", 2), (None, 7), ("5", 0)], [0.8, 0.0], solver_step=None, proposer_step=6).record(4)
    assert record == {
        "step": 4,
        "image_id": "a.png",
        "image_digest": None,
        "question": "How many?",
        "question_completion": "<question>How many?</question>",
        "question_well_formed": True,
        "question_kind": "counting",
        "answers": [
            {
                "completion": "<answer>5</answer>",
                "answer": "5",
                "canonical": "5",
                "tokens": 6,
                "words_before_answer": 2,
                "reward": 0.8,
                "advantage": pytest.approx(0.3),
            },
            {
                "completion": "<answer>None</answer>",
                "answer": None,
                "canonical": None,
                "tokens": 11,
                "words_before_answer": 7,
                "reward": 0.0,
                "advantage": -0.5,
            },
            {
                "completion": "<answer>5</answer>",
                "answer": "5",
                "canonical": "5",
                "tokens": 4,
                "words_before_answer": 0,
                "reward": None,
                "advantage": None,
            },
        ],
        "votes": {"5": 2},
        "majority": "5",
        "agreement": 2 / 3,
        "entropy": pytest.approx(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3)),
        "blind_answers": None,
        "proposer_reward": 0.25,
        "proposer_advantage": -0.5,
        "trained_on": {"solver": None, "proposer": 6},
    }
    json.dumps(record, allow_nan=False)


# Their summary


def test_metrics_are_those_computed_by_hand():
    records = [
        rollout([("5", 2), ("5", 4), ("5", 0)], [1.0, 0.8]).record(1),
        rollout(
            [("1", 6), (None, 0), ("2", 6)], [0.2, 0.0], question=Question("How many?", False), proposer_reward=0.75
        ).record(1),
        rollout([(None, 0), (None, 0), (None, 0)], [0.0, 0.0], question=Question("Which?", True)).record(1),
    ]
    assert rollout_metrics(records) == pytest.approx(
        {
            "solver/reward": 2.0 / 6,  # extra votes earn nothing and are not counted
            "solver/reward_std": math.sqrt((1.0 + 0.64 + 0.04) / 6 - (1 / 3) ** 2),
            "proposer/reward": 1.25 / 3,
            "proposer/reward_std": math.sqrt((0.0625 + 0.5625 + 0.0625) / 3 - (1.25 / 3) ** 2),
            "agreement": (1 + 1 / 3 + 0) / 3,
            "answer_entropy": 2 * math.log(3) / 3,
            "unanimous": 1 / 3,
            "unreadable": 4 / 9,
            "malformed_questions": 1 / 3,
            "words_before_answer": 18 / 9,
        }
    )


def test_metrics_of_a_single_rollout_exist():
    metrics = rollout_metrics([rollout([("5", 0)], [1.0]).record(1)])
    assert metrics["proposer/reward_std"] == metrics["solver/reward_std"] == 0.0
    assert metrics["unanimous"] == 1.0


# The log


def test_each_record_is_one_line_in_order(path):
    log = RolloutLog(path)
    log.write([{"step": 1, "image": 0}, {"step": 1, "image": 1}])
    log.write([{"step": 2, "image": 0}])
    assert lines(path) == [{"step": 1, "image": 0}, {"step": 1, "image": 1}, {"step": 2, "image": 0}]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters()), min_size=1))
def test_whatever_a_model_writes_is_kept_in_one_line(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("log") / "rollouts.jsonl"
    records = [{"question": text, "votes": {text: 5}} for text in [*texts, 'a\nb\r\x85\u2028\x00"\\ü\U0001f600\udc80']]
    RolloutLog(path).write(records)
    assert lines(path) == records
    path.read_bytes().decode("utf-8")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_refused_before_anything_is_written(path, number):
    log = RolloutLog(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write([{"step": 1}, {"reward": number}])
    assert not path.exists()
    assert len(log) == 0
    log.write([{"step": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write([{"step": 2}, {"reward": number}])
    assert lines(path) == [{"step": 1}]


def test_the_length_of_a_log_is_its_bytes_and_0_before_it_starts(path):
    RolloutLog(path).write([{"step": 1}])
    log = RolloutLog(path)
    assert len(log) == 0
    log.write([{"text": "ü"}])
    assert len(log) == path.stat().st_size > 0


def test_the_log_of_an_earlier_run_is_renamed_and_never_overwritten(path):
    for run in range(3):
        log = RolloutLog(path)
        log.write([{"run": run}])
        log.write([{"run": run}])
    assert lines(path) == [{"run": 2}] * 2
    assert lines(path.with_name("rollouts.1.jsonl")) == [{"run": 0}] * 2
    assert lines(path.with_name("rollouts.2.jsonl")) == [{"run": 1}] * 2
    assert len(list(path.parent.iterdir())) == 3


def test_an_earlier_runs_log_is_left_alone_until_there_is_something_to_write(path):
    RolloutLog(path).write([{"run": 0}])
    RolloutLog(path)
    assert lines(path) == [{"run": 0}]


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(path):
    log = RolloutLog(path)
    log.write([{"step": 1}, {"step": 2}])
    length = len(log)
    log.write([{"step": 3}])
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "quest')  # the process was killed here
    resumed = RolloutLog(path)
    resumed.resume(length)
    assert len(resumed) == length
    resumed.write([{"step": 3, "again": True}])
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert list(path.parent.iterdir()) == [path]


def test_a_logs_digest_is_that_of_its_content_however_the_run_was_interrupted(path):
    whole = RolloutLog(path.with_name("whole.jsonl"))
    log = RolloutLog(path)
    assert log.digest == whole.digest
    for step in (1, 2):
        whole.write([{"step": step}])
        log.write([{"step": step}])
    length, digest = len(log), log.digest
    assert digest == hash_start(path, length).hexdigest() == whole.digest
    log.write([{"step": 3, "again": False}])
    assert log.digest != digest
    resumed = RolloutLog(path)
    resumed.resume(length, digest)
    for log in (whole, resumed):
        log.write([{"step": 3}])
    assert resumed.digest == whole.digest != digest


def test_another_runs_log_is_not_continued_and_stays_as_it_is(path):
    log = RolloutLog(path)
    log.write([{"step": 1, "text": "an earlier run"}])
    length, digest = len(log), log.digest
    RolloutLog(path).write([{"step": step, "text": "a newer run"} for step in range(9)])
    newer = path.read_bytes()
    with pytest.raises(ValueError, match=r"not the log of the run to resume.*renames it, to rollouts\.1\.jsonl"):
        RolloutLog(path).resume(length, digest)
    assert path.read_bytes() == newer


def test_a_run_can_be_resumed_from_a_checkpoint_before_its_first_rollout(path):
    RolloutLog(path).resume(0)
    log = RolloutLog(path)
    log.write([{"step": 1}])
    resumed = RolloutLog(path)
    resumed.resume(0)
    resumed.write([{"step": 1, "again": True}])
    assert lines(path) == [{"step": 1, "again": True}]


@pytest.mark.parametrize("exists", [True, False])
def test_a_log_shorter_than_the_checkpoint_is_refused(path, exists):
    log = RolloutLog(path)
    log.write([{"step": 1}])
    size = len(log)
    if not exists:
        path.unlink()
    with pytest.raises(
        ValueError, match=f"has {size if exists else 0} bytes.*when it had {size + 1}.*another output_dir"
    ):
        RolloutLog(path).resume(size + 1)


_WRITE_FOREVER = """
import sys
from evolmm_trl.monitor import RolloutLog

log = RolloutLog(sys.argv[1])
for step in range(10**9):
    log.write([{"step": step, "image": i, "text": "ü" * int(sys.argv[2])} for i in range(8)])
    print(step, flush=True)
"""


@pytest.mark.parametrize(("steps", "length"), [(1, 3_000), (20, 3_000), (1, 10), (100, 10)])
def test_a_run_killed_while_it_writes_leaves_whole_lines_but_perhaps_the_last(path, steps, length):
    command = [sys.executable, "-c", _WRITE_FOREVER, str(path), str(length)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(steps):
            process.stdout.readline()
    finally:
        process.kill()
        said, _ = process.communicate()
    written = max(map(int, said.split()), default=steps - 1)
    whole = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [(record["step"], record["image"]) for record in whole] == [divmod(i, 8) for i in range(len(whole))]
    assert len(whole) >= 8 * (written + 1)  # what was said to be written is there
