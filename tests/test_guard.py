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

import inspect
import json
import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, lora, noise_images
from transformers import TrainerCallback, TrainerControl, TrainerState

from evolmm_trl import CollapseGuard


HEALTH = (Path(__file__).parent.parent / "docs" / "health.md").read_text()

HEALTHY = {
    "loss": 0.1,
    "grad_norm": 1.0,
    "answer_entropy": 0.5,
    "distinct_questions": 0.9,
    "blind_solved": 0.3,
    "solver/kl": 0.05,
}


def history(values, metric, **others):
    """Rows of a log in which one metric takes these values."""
    return [{**HEALTHY, **others, metric: value, "step": i + 1} for i, value in enumerate(values)]


def evaluations(accuracies, agreements, questions=None):
    """Evaluations at every tenth step, the first at step 0. Without a number of questions they have no standard error."""
    rows = [
        {"step": 10 * i, "eval_accuracy_greedy": accuracy, "eval_agreement": agreement}
        for i, (accuracy, agreement) in enumerate(zip(accuracies, agreements, strict=True))
    ]
    if questions is not None:
        for row in rows:
            accuracy = row["eval_accuracy_greedy"]
            row["eval_accuracy_greedy_stderr"] = math.sqrt(accuracy * (1 - accuracy) / questions)
    return rows


def guard(**kwargs):
    thresholds = {
        "window": 3,
        "patience": 2,
        "min_entropy": 0.1,
        "min_distinct_questions": 0.2,
        "max_blind_solved": 0.8,
        "max_kl": 0.5,
        "max_accuracy_drop": 0.02,
        "evaluation_patience": 2,
    }
    return CollapseGuard(**{**thresholds, **kwargs})


# What is judged


@pytest.mark.parametrize(
    ("condition", "metric", "bad"),
    [
        ("entropy", "answer_entropy", 0.0),
        ("distinct_questions", "distinct_questions", 0.05),
        ("blind_solved", "blind_solved", 1.0),
        ("kl", "solver/kl", 3.0),
        ("kl", "proposer/kl", 3.0),
    ],
)
def test_a_metric_out_of_bounds_for_window_and_patience_is_an_alarm(condition, metric, bad):
    good = HEALTHY.get(metric, 0.05)
    assert guard().first_alarm(history([good] * 50, metric)) is None
    alarm = guard().first_alarm(history([good] * 20 + [bad] * 20, metric))
    assert alarm.condition == condition
    # Not at the first values, and not later than it takes to fill every window
    assert 20 + 2 <= alarm.step <= 20 + 3 + 2 - 1
    assert alarm.first_step == alarm.step - 3  # four values
    assert metric in alarm.reason and "for 2 of them in a row" in alarm.reason


@pytest.mark.parametrize("metric", ["answer_entropy", "distinct_questions", "blind_solved", "solver/kl"])
def test_blips_are_none(metric):
    bad = {"answer_entropy": 0.0, "distinct_questions": 0.05, "blind_solved": 0.9, "solver/kl": 0.6}[metric]
    good = HEALTHY[metric]
    assert guard().first_alarm(history([good, good, good, bad, good, good] * 20, metric)) is None
    assert guard(patience=1).first_alarm(history([good] * 9 + [bad] + [good] * 9, metric)) is None


def test_patience_is_counted_in_a_row():
    # Windows of one: bad, good, bad, good, ... never two in a row
    rows = history([0.0, 0.5] * 20, "answer_entropy")
    assert guard(window=1).first_alarm(rows) is None
    assert guard(window=1, patience=1).first_alarm(rows).step == 1


def test_rows_without_a_metric_are_passed_over():
    """A proposer's step logs no agreement, and the rows of a solver's no KL of the proposer."""
    rows = []
    for i in range(40):
        proposing = i % 6 == 5
        rows.append({"step": i + 1, **({"proposer/kl": 9.0} if proposing else {"answer_entropy": 0.5})})
    alarm = guard().first_alarm(rows)
    assert alarm.condition == "kl" and (alarm.first_step, alarm.step) == (1, 24)
    alarm = guard().first_alarm([{"step": 6 * i, "proposer/kl": 9.0 if i > 3 else 0.1} for i in range(1, 20)])
    assert (alarm.first_step, alarm.step) == (13, 36)  # of four values the first, at step 18, covers what follows 12


def spike(index, height, metric="solver/kl"):
    return history([height if i == index else HEALTHY[metric] for i in range(30)], metric)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 29), st.floats(0.2, 1e30), st.integers(3, 7), st.integers(1, 5))
def test_one_spike_of_any_size_never_stops_a_run(index, height, window, patience):
    watching = guard(max_kl=0.15, window=window, patience=patience)
    assert watching.first_alarm(spike(index, height)) is None
    assert watching.first_alarm(spike(index, -height, "answer_entropy")) is None


def test_the_first_step_is_after_the_row_before_those_that_are_judged():
    """A row of every tenth step is the mean over ten steps."""
    rows = [{**row, "step": 10 * row["step"]} for row in history([0.5] * 5 + [0.0] * 9, "answer_entropy")]
    alarm = guard().first_alarm(rows)
    assert (alarm.first_step, alarm.step) == (41, 80)  # the rows of 50 to 80, the oldest of which covers 41 to 50
    rows = [{**row, "step": 10 * row["step"]} for row in history([1.0] * 5 + [math.nan], "grad_norm")]
    alarm = guard().first_alarm(rows)
    assert (alarm.first_step, alarm.step) == (51, 60)


@pytest.mark.parametrize(
    ("option", "metric", "bad"),
    [
        ("min_entropy", "answer_entropy", 0.0),
        ("min_distinct_questions", "distinct_questions", 0.0),
        ("max_blind_solved", "blind_solved", 1.0),
        ("max_kl", "solver/kl", 99.0),
    ],
)
def test_each_condition_can_be_switched_off(option, metric, bad):
    rows = history([bad] * 20, metric)
    assert guard().first_alarm(rows) is not None
    assert guard(**{option: None}).first_alarm(rows) is None


def test_accuracy_that_falls_while_agreement_rises_is_an_alarm():
    rows = evaluations([0.50, 0.55, 0.54, 0.52, 0.50], [0.4, 0.5, 0.6, 0.7, 0.8])
    alarm = guard(evaluation_patience=2).first_alarm(rows)
    assert alarm.condition == "accuracy" and (alarm.first_step, alarm.step) == (11, 40)
    assert "from 0.550 at step 10 to 0.500" in alarm.reason and "from 0.500 to 0.800" in alarm.reason
    assert guard(evaluation_patience=1).first_alarm(rows).step == 30
    assert guard(max_accuracy_drop=None).first_alarm(rows) is None


def test_accuracy_is_no_alarm_if_agreement_does_not_rise_or_it_recovers():
    falling = [0.50, 0.55, 0.52, 0.50, 0.40]
    assert guard().first_alarm(evaluations(falling, [0.4, 0.9, 0.8, 0.8, 0.8])) is None
    assert guard().first_alarm(evaluations([0.50, 0.55, 0.50, 0.55] * 5, [0.4 + i / 50 for i in range(20)])) is None
    assert guard().first_alarm(evaluations([0.5, 0.49, 0.48, 0.49, 0.48], [0.4, 0.5, 0.6, 0.7, 0.8])) is None


def test_a_fall_within_two_standard_errors_is_no_alarm():
    accuracies, agreements = [0.60, 0.56, 0.56, 0.56], [0.4, 0.5, 0.6, 0.7]
    assert guard().first_alarm(evaluations(accuracies, agreements, 200)) is None  # 7.0 points
    assert guard().first_alarm(evaluations(accuracies, agreements, 500)) is None  # 4.4
    alarm = guard().first_alarm(evaluations(accuracies, agreements, 1000))  # 3.1
    assert alarm.step == 20 and "two standard errors (0.031)" in alarm.reason


@pytest.mark.parametrize("flips", [0.05, 0.1])
@pytest.mark.parametrize("questions", [200, 500])
def test_accuracy_that_only_fluctuates_hardly_ever_ends_a_run(questions, flips):
    """
    Every question has its own chance to be answered right, which does not change, such that any two evaluations differ on a
    share of `flips`; agreement rises from one evaluation to the next.
    """
    rng, runs, number = np.random.default_rng(0), 300, 60
    undecided = round(2 * flips * questions)
    known = round((0.65 - flips) * questions)
    right = known + rng.binomial(undecided, 0.5, (runs, number))
    assert right.mean() / questions == pytest.approx(0.65, abs=0.01)
    agreements = np.linspace(0.5, 0.8, number)
    ended = sum(
        CollapseGuard().first_alarm(evaluations(run / questions, agreements, questions)) is not None for run in right
    )
    assert ended < 0.02 * runs
    fallen = right - np.round(np.linspace(0, 0.15, number) * questions)
    ended = sum(
        CollapseGuard().first_alarm(evaluations(run / questions, agreements, questions)) is not None for run in fallen
    )
    assert ended > 0.98 * runs


def test_the_documented_falls_are_two_standard_errors_of_one_half():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \|$", HEALTH, re.MULTILINE)
    assert len(rows) == 3
    for questions, points in rows:
        assert points == f"{200 * math.sqrt(0.25 / int(questions.replace(',', ''))):.1f}"


def test_the_documented_defaults_are_those_of_the_guard():
    defaults = {name: p.default for name, p in inspect.signature(CollapseGuard).parameters.items()}
    assert set(defaults) == set(re.findall(r"^ {8}(\w+) \(`", CollapseGuard.__doc__, re.MULTILINE))
    for name, stated in re.findall(r"^ {8}(\w+) \(.*defaults to `(.*?)`\):", CollapseGuard.__doc__, re.MULTILINE):
        assert stated.strip('"') == str(defaults.pop(name)), name
    assert not defaults
    defaults = {name: p.default for name, p in inspect.signature(CollapseGuard).parameters.items()}
    rows = re.findall(r"^\| `\w+` \| .*?`((?:min|max)_\w+)`.* \| ([\d.]+) \|$", HEALTH, re.MULTILINE)
    assert len(rows) == 5 and all(float(value) == defaults[name] for name, value in rows)
    for name, value in re.findall(r"`(window|patience|evaluation_patience)` \((\d+)\)", HEALTH):
        assert int(value) == defaults[name]


def test_the_accuracy_of_one_of_several_datasets_can_be_watched():
    rows = evaluations([0.5, 0.4, 0.4], [0.4, 0.5, 0.6])
    rows = [{name.replace("eval_", "eval_charts_"): value for name, value in row.items()} for row in rows]
    assert guard().first_alarm(rows) is None
    assert guard(accuracy="eval_charts_accuracy_greedy").first_alarm(rows).step == 20


@pytest.mark.parametrize("metric", ["loss", "grad_norm", "solver/kl", "proposer/kl", "solver/grad_norm"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_an_alarm_at_once(metric, number):
    alarm = guard().first_alarm(history([1e-3] * 5 + [number], metric))
    assert (alarm.condition, alarm.step) == ("non_finite", 6)
    assert metric in alarm.reason


def test_with_fp16_what_is_not_finite_must_persist():
    def last_step(values, fp16):
        watching = guard(patience=3)
        args = SimpleNamespace(fp16=fp16, logging_strategy="steps", beta=0.0, adaptive_kl=True)
        watching.on_train_begin(args, TrainerState(), TrainerControl())
        for row in history(values, "grad_norm"):
            state, control = TrainerState(global_step=row["step"], is_world_process_zero=True), TrainerControl()
            watching.on_log(SimpleNamespace(), state, control, logs=row)
            if control.should_training_stop:
                return row["step"]
        return None

    blips = [1.0, math.inf, math.inf, 1.0, math.inf, 1.0]
    assert last_step(blips, fp16=True) is None
    assert last_step(blips, fp16=False) == 2
    assert last_step([1.0, math.nan, math.nan, math.nan], fp16=True) == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"action": "cry"}, "action='cry'; expected 'stop' or 'rewind'"),
        ({"window": 0}, "window=0; expected a whole number, 1 or more"),
        ({"patience": "3"}, "patience='3'; expected a whole number, 1 or more"),
        ({"evaluation_patience": 0}, "evaluation_patience=0; expected a whole number, 1 or more"),
        ({"max_kl": "3e-1"}, "max_kl='3e-1'; expected a number, or None"),
        ({"accuracy": "accuracy"}, "accuracy='accuracy'; expected the name of a logged accuracy"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CollapseGuard(**kwargs)


# In training


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_qwen2_5_vl(path)
    return str(path)


def train(base, output_dir, *callbacks, resume=None, **kwargs):
    labelled = Dataset.from_dict({"image": noise_images(2, seed=9), "question": ["a", "b"], "answer": ["1", "2"]})
    evaluated = kwargs.pop("evaluated", False)
    trainer = TalkingTrainer(
        model=base,
        args=config(output_dir, **{"max_steps": 10, **kwargs}),
        train_dataset=image_dataset(),
        eval_dataset=labelled if evaluated else None,
        peft_config=lora(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Weights(TrainerCallback):
    """The trainable weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }


# Every tiny run is out of these bounds from its first step on
ALWAYS = {"window": 2, "patience": 2, "min_distinct_questions": None, "max_kl": None, "min_entropy": 99.0}


class Late(CollapseGuard):
    """Sees trouble in what follows step 4 alone."""

    def _judge(self, row):
        return super()._judge({**row, "answer_entropy": 100.0} if row["step"] <= 4 and "agreement" in row else row)


def test_a_collapsing_run_is_stopped_and_why_is_said(base, tmp_path, caplog):
    watching = CollapseGuard(**ALWAYS)
    with caplog.at_level(logging.WARNING):
        trainer = train(base, tmp_path, watching)
    # The rollouts of steps 1, 2 and 4; step 3 is the proposer's
    assert trainer.state.global_step == watching.alarm.step == 4
    (message,) = [record.message for record in caplog.records if "CollapseGuard" in record.message]
    assert (
        "ended the run at step 4" in message
        and "the median of answer_entropy over the last 2" in message
        and "min_entropy=99" in message
    )


def test_a_guard_that_would_see_nothing_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="judges what is logged, but logging_strategy='no'"):
        train(base, tmp_path, CollapseGuard(), logging_strategy="no")


@pytest.mark.parametrize("given", ["stop", "rewind", {"action": "rewind", "max_kl": 0.3, "min_entropy": None}])
def test_the_configuration_adds_a_guard(base, tmp_path, given):
    trainer = TalkingTrainer(
        model=base, args=config(tmp_path, collapse_guard=given), train_dataset=image_dataset(), peft_config=lora()
    )
    (watching,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CollapseGuard)]
    expected = CollapseGuard(**given) if isinstance(given, dict) else CollapseGuard(given)
    assert {k: v for k, v in vars(watching).items() if k != "_values"} == {
        k: v for k, v in vars(expected).items() if k != "_values"
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cry", "collapse_guard='cry'; expected 'stop', 'rewind', or the arguments of CollapseGuard"),
        ({"action": "cry"}, "action='cry'; expected 'stop' or 'rewind'"),
        (
            {"max_kll": 0.3},
            "collapse_guard holds 'max_kll', which CollapseGuard does not know; expected of action, window",
        ),
        (True, "collapse_guard holds True"),
    ],
)
def test_a_guard_in_the_configuration_that_makes_no_sense_is_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, collapse_guard=given)


def test_a_target_of_the_kl_that_the_guard_forbids_is_warned_of(base, tmp_path, caplog):
    def said(**kwargs):
        caplog.clear()
        train(base, tmp_path, CollapseGuard(max_kl=0.1, min_distinct_questions=None), max_steps=1, **kwargs)
        return [record.message for record in caplog.records if "max_kl=0.1, and" in record.message]

    (message,) = said(kl_target=0.1)
    assert "and kl_target=0.1 lets it come there" in message
    (message,) = said(proposer_kl_target=0.3)
    assert "and proposer_kl_target=0.3" in message
    assert not said(kl_target=0.09)
    assert not said(kl_target=0.5, beta=0.0)


def test_a_run_within_bounds_is_left_alone(base, tmp_path):
    free, watched = Weights(), Weights()
    train(base, tmp_path / "free", free)
    trainer = train(
        base, tmp_path / "watched", watched, CollapseGuard(min_entropy=None, min_distinct_questions=None, max_kl=1e9)
    )
    assert trainer.state.global_step == 10
    assert all(torch.equal(free.after[10][name], watched.after[10][name]) for name in free.after[10])


def test_rewinding_loads_both_roles_from_the_last_checkpoint_before_the_trouble(base, tmp_path, caplog):
    weights, watching = Weights(), Late(action="rewind", **{**ALWAYS, "window": 1})
    trainer = train(base, tmp_path, weights, watching, save_strategy="steps", save_steps=1)
    assert (watching.alarm.first_step, watching.alarm.step) == (5, 7)
    assert trainer.state.global_step == 7
    now = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.after[4].items())
    assert any(not torch.equal(now[name], tensor) for name, tensor in weights.after[7].items())
    assert any(".proposer." in name for name in weights.after[4]) and any(
        ".default." in name for name in weights.after[4]
    )
    (message,) = [record.message for record in caplog.records if "CollapseGuard" in record.message]
    assert "checkpoint-4" in message and "lower learning_rate" in message
    # What is saved then is what was gone back to
    trainer.save_model(tmp_path / "saved")
    for file in ("adapter_model.safetensors", "proposer/adapter_model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "checkpoint-4" / file).read_bytes()


def _score(monkeypatch, accuracies):
    """Trainers that evaluate to these accuracies by step, on many questions, and agree more and more."""

    class Scored(TalkingTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            step = self.state.global_step
            output.metrics.update(
                eval_accuracy_greedy=accuracies[step],
                eval_accuracy_greedy_stderr=0.01,
                eval_agreement=0.1 + step / 100,
            )
            return output

    monkeypatch.setitem(globals(), "TalkingTrainer", Scored)


def test_with_labelled_questions_rewinding_goes_to_the_best_accuracy(base, tmp_path, monkeypatch):
    _score(monkeypatch, {0: 0.2, 2: 0.9, 4: 0.5, 6: 0.5})
    weights = Weights()
    bounds = {"min_entropy": None, "min_distinct_questions": None, "max_kl": None}
    watching = CollapseGuard(action="rewind", evaluation_patience=2, **bounds)
    evaluation = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    trainer = train(base, tmp_path, weights, watching, save_strategy="steps", save_steps=1, **evaluation)
    assert (watching.alarm.condition, watching.alarm.first_step, trainer.state.global_step) == ("accuracy", 3, 6)
    now = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    # The one that was scored, and not the one that was saved after it
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.after[2].items())


def trainable(trainer):
    return {
        name: parameter.detach() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }


class Break(TrainerCallback):
    """Makes the solver's weights what no training survives, before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            next(p for n, p in model.named_parameters() if ".default." in n and p.requires_grad).data.fill_(math.nan)


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_rewinding_never_loads_weights_that_are_not_finite(base, tmp_path, logging_steps):
    watching = CollapseGuard(action="rewind")
    trainer = train(
        base, tmp_path, Break(6), watching, logging_steps=logging_steps, save_strategy="steps", save_steps=1, beta=0.0
    )
    assert (watching.alarm.condition, watching.alarm.step) == ("non_finite", 6 if logging_steps == 1 else 8)
    # The row of step 8 covers the steps from 5 on
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5" if logging_steps == 1 else "checkpoint-4")
    assert all(tensor.isfinite().all() for tensor in trainable(trainer).values())


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_with_labelled_questions_rewinding_stays_out_of_a_runaway(base, tmp_path, monkeypatch, logging_steps):
    """Accuracy is best in the midst of it."""
    _score(monkeypatch, {0: 0.2, 2: 0.5, 4: 0.4, 6: 0.9, 8: 0.9, 10: 0.9})

    watching = Late(action="rewind", **{**ALWAYS, "window": 1, "patience": 2})
    evaluation = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    trainer = train(
        base, tmp_path, watching, logging_steps=logging_steps, save_strategy="steps", save_steps=1, **evaluation
    )
    assert watching.alarm.condition == "entropy" and watching.alarm.first_step == 5
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # 0.5, the best of those before


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_rewinding_takes_no_checkpoint_of_an_earlier_run(base, tmp_path, logging_steps, caplog):
    settings = {"logging_steps": logging_steps, "save_strategy": "steps", "beta": 0.0}
    train(base, tmp_path, save_steps=1, max_steps=5, **settings)
    trainer = train(base, tmp_path, Break(6), CollapseGuard(action="rewind"), save_steps=3, **settings)
    assert trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")  # 4 is the other run's
    shutil.rmtree(tmp_path / "checkpoint-3")
    trainer = train(base, tmp_path, Break(6), CollapseGuard(action="rewind"), save_steps=50, **settings)
    assert (tmp_path / "checkpoint-1").is_dir()  # whose log is empty with logging_steps=2
    assert trainer.state.best_model_checkpoint is None
    first = 6 if logging_steps == 1 else 5
    assert f"This run has no checkpoint with a logged step from before step {first}" in caplog.text


def test_a_resumed_run_rewinds_to_checkpoints_from_before_it_was_stopped(base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    settings = {"save_strategy": "steps", "save_steps": 1, "beta": 0.0}
    train(base, tmp_path, Stop(), **settings)
    resumed = str(tmp_path / "checkpoint-5")
    trainer = train(base, tmp_path, Break(6), CollapseGuard(action="rewind"), resume=resumed, **settings)
    assert trainer.state.best_model_checkpoint == resumed


def test_a_run_that_is_watched_ends_where_its_log_says(base, tmp_path):
    watching = CollapseGuard(**{**ALWAYS, "window": 3})
    trainer = train(base, tmp_path, watching)
    assert watching.alarm is not None
    assert CollapseGuard(**{**ALWAYS, "window": 3}).first_alarm(trainer.state.log_history) == watching.alarm


def test_rewinding_without_a_sound_checkpoint_keeps_the_weights_and_says_so(base, tmp_path, caplog):
    trainer = train(base, tmp_path, CollapseGuard(action="rewind", **ALWAYS), save_strategy="steps", save_steps=50)
    assert trainer.state.global_step == 4
    assert "This run has no checkpoint with a logged step from before step 1" in caplog.text
    with pytest.raises(ValueError, match="action='rewind' needs checkpoints.*save_strategy='no'"):
        train(base, tmp_path / "none", CollapseGuard(action="rewind"))


def test_a_resumed_run_is_judged_as_one_that_was_not_stopped(base, tmp_path):
    bounds = {**ALWAYS, "window": 4}
    whole = CollapseGuard(**bounds)
    train(base, tmp_path / "whole", whole)
    assert whole.alarm.step > 5

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    train(base, tmp_path / "parts", Stop(), CollapseGuard(**bounds), save_strategy="steps", save_steps=5)
    resumed = CollapseGuard(**bounds)
    train(base, tmp_path / "parts", resumed, resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert resumed.alarm == whole.alarm
    # And from what a checkpoint holds it is found where a run would have ended
    rows = json.loads((tmp_path / "parts" / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert CollapseGuard(**ALWAYS).first_alarm(rows).step == 4


def test_a_gradient_that_is_not_finite_ends_the_run_at_its_step(base, tmp_path):
    watching = CollapseGuard()
    trainer = train(base, tmp_path, Break(2), watching, beta=0.0)
    assert (watching.alarm.condition, trainer.state.global_step) == ("non_finite", 2)
