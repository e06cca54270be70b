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
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, lora, noise_images
from transformers import TrainerCallback, TrainerControl, TrainerState

from evolmm_trl import CollapseGuard


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


def evaluations(accuracies, agreements):
    """Evaluations at every tenth step, the first at step 0."""
    rows = [
        {"step": 10 * i, "eval_accuracy_greedy": accuracy, "eval_agreement": agreement}
        for i, (accuracy, agreement) in enumerate(zip(accuracies, agreements, strict=True))
    ]
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
    assert alarm.first_step == alarm.step - 3
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
    assert alarm.condition == "kl" and (alarm.first_step, alarm.step) == (6, 24)


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
    assert alarm.condition == "accuracy" and (alarm.first_step, alarm.step) == (10, 40)
    assert "from 0.550 at step 10 to 0.500" in alarm.reason and "from 0.500 to 0.800" in alarm.reason
    assert guard(evaluation_patience=1).first_alarm(rows).step == 30
    assert guard(max_accuracy_drop=None).first_alarm(rows) is None


def test_accuracy_is_no_alarm_if_agreement_does_not_rise_or_it_recovers():
    falling = [0.50, 0.55, 0.52, 0.50, 0.40]
    assert guard().first_alarm(evaluations(falling, [0.4, 0.9, 0.8, 0.8, 0.8])) is None
    assert guard().first_alarm(evaluations([0.50, 0.55, 0.50, 0.55] * 5, [0.4 + i / 50 for i in range(20)])) is None
    assert guard().first_alarm(evaluations([0.5, 0.49, 0.48, 0.49, 0.48], [0.4, 0.5, 0.6, 0.7, 0.8])) is None


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
        watching.on_train_begin(SimpleNamespace(fp16=fp16, logging_strategy="steps"), TrainerState(), TrainerControl())
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
        ({"window": 0}, "window=0; expected 1 or more"),
        ({"patience": 0}, "patience=0; expected 1 or more"),
        ({"evaluation_patience": 0}, "evaluation_patience=0; expected 1 or more"),
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
        args=config(output_dir, max_steps=10, **kwargs),
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


def test_a_collapsing_run_is_stopped_and_why_is_said(base, tmp_path, caplog):
    watching = CollapseGuard(**ALWAYS)
    with caplog.at_level(logging.WARNING):
        trainer = train(base, tmp_path, watching)
    # The rollouts of steps 1, 2 and 4; step 3 is the proposer's
    assert trainer.state.global_step == watching.alarm.step == 4
    (message,) = [record.message for record in caplog.records if "CollapseGuard" in record.message]
    assert "ended the run at step 4" in message and "answer_entropy was" in message and "min_entropy=99" in message


def test_a_guard_that_would_see_nothing_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="judges what is logged, but logging_strategy='no'"):
        train(base, tmp_path, CollapseGuard(), logging_strategy="no")


@pytest.mark.parametrize("action", ["stop", "rewind"])
def test_the_configuration_adds_a_guard(base, tmp_path, action):
    trainer = TalkingTrainer(
        model=base, args=config(tmp_path, collapse_guard=action), train_dataset=image_dataset(), peft_config=lora()
    )
    (watching,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CollapseGuard)]
    assert watching.action == action
    with pytest.raises(ValueError, match="collapse_guard='cry'; expected one of"):
        config(tmp_path, collapse_guard="cry")


def test_a_run_within_bounds_is_left_alone(base, tmp_path):
    free, watched = Weights(), Weights()
    train(base, tmp_path / "free", free)
    trainer = train(
        base, tmp_path / "watched", watched, CollapseGuard(min_entropy=None, min_distinct_questions=None, max_kl=1e9)
    )
    assert trainer.state.global_step == 10
    assert all(torch.equal(free.after[10][name], watched.after[10][name]) for name in free.after[10])


def test_rewinding_loads_both_roles_from_the_last_checkpoint_before_the_trouble(base, tmp_path, caplog):
    class Late(CollapseGuard):
        """Sees trouble in what follows step 4 alone."""

        def _out_of_bounds(self, row, step):
            return super()._out_of_bounds(row, step) if step > 4 else None

    weights, watching = Weights(), Late(action="rewind", **ALWAYS)
    trainer = train(base, tmp_path, weights, watching, save_strategy="steps", save_steps=1)
    assert (watching.alarm.first_step, watching.alarm.step) == (5, 8)
    assert trainer.state.global_step == 8
    now = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.after[4].items())
    assert any(not torch.equal(now[name], tensor) for name, tensor in weights.after[8].items())
    assert any(".proposer." in name for name in weights.after[4]) and any(
        ".default." in name for name in weights.after[4]
    )
    (message,) = [record.message for record in caplog.records if "CollapseGuard" in record.message]
    assert "checkpoint-4" in message and "lower learning_rate" in message
    # What is saved then is what was gone back to
    trainer.save_model(tmp_path / "saved")
    for file in ("adapter_model.safetensors", "proposer/adapter_model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "checkpoint-4" / file).read_bytes()


def test_with_labelled_questions_rewinding_goes_to_the_best_accuracy(base, tmp_path, monkeypatch):
    accuracies = {0: 0.2, 2: 0.9, 4: 0.5, 6: 0.5}

    class Scored(TalkingTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            step = self.state.global_step
            output.metrics.update(eval_accuracy_greedy=accuracies[step], eval_agreement=0.1 + step / 100)
            return output

    monkeypatch.setitem(globals(), "TalkingTrainer", Scored)
    weights = Weights()
    bounds = {"min_entropy": None, "min_distinct_questions": None, "max_kl": None}
    watching = CollapseGuard(action="rewind", evaluation_patience=2, **bounds)
    evaluation = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    trainer = train(base, tmp_path, weights, watching, save_strategy="steps", save_steps=1, **evaluation)
    assert (watching.alarm.condition, watching.alarm.first_step, trainer.state.global_step) == ("accuracy", 2, 6)
    now = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    # The one that was scored, and not the one that was saved after it
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.after[2].items())


def test_rewinding_without_a_sound_checkpoint_keeps_the_weights_and_says_so(base, tmp_path, caplog):
    trainer = train(base, tmp_path, CollapseGuard(action="rewind", **ALWAYS), save_strategy="steps", save_steps=50)
    assert trainer.state.global_step == 4
    assert "No checkpoint was saved before step 1" in caplog.text
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
    class Broken(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(p for n, p in model.named_parameters() if ".default." in n and p.requires_grad).data.fill_(
                    math.nan
                )

    watching = CollapseGuard()
    trainer = train(base, tmp_path, Broken(), watching, beta=0.0)
    assert (watching.alarm.condition, trainer.state.global_step) == ("non_finite", 2)
