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

"""What the trainer logs and rewards for the health of a run, with tiny random models."""

import json

import pytest
import torch
from tiny_models import tiny_gemma3, tiny_internvl, tiny_mllama, tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, logged, lora, snapshot
from transformers import TrainerCallback

from evolmm_trl.health import cluster_shares
from evolmm_trl.rewards import blind_share, penalised_proposer_reward
from evolmm_trl.voting import vote


FAMILIES = {
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "internvl": tiny_internvl,
    "gemma3": tiny_gemma3,
    "mllama": tiny_mllama,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](path)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_qwen2_5_vl(path)
    return str(path)


def train(base, output_dir, *callbacks, resume=None, **kwargs):
    trainer = TalkingTrainer(
        model=base,
        args=config(output_dir, **kwargs),
        train_dataset=image_dataset(),
        peft_config=lora(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


# Without the image


def test_every_family_answers_without_the_image(family, tmp_path):
    trainer = train(family, tmp_path, max_steps=1, blind_questions=1)
    asked, other = rollouts(tmp_path)
    assert len(asked["blind_answers"]) == 3 and other["blind_answers"] is None
    majority = vote(asked["blind_answers"]).majority
    assert list(trainer.health._solved_blind) == [majority is not None and majority == asked["majority"]]


def test_a_blind_prompt_has_no_image_and_its_answers_do_not_depend_on_it(base, tmp_path, monkeypatch):
    seen = []

    class Watching(TalkingTrainer):
        def _solve_blind(self, model, rows, questions):
            blind = super()._solve_blind(model, rows, questions)
            others = [{**row, "image": None, "prompt": None} for row in rows]  # would fail if it were looked at
            assert super()._solve_blind(model, others, questions) == blind
            seen.extend(blind)
            return blind

    monkeypatch.setitem(globals(), "TalkingTrainer", Watching)
    train(base, tmp_path, max_steps=1, blind_questions=9)  # of the two that there are
    assert len(seen) == 2 and all(len(answers) == 3 for answers in seen)


def test_without_blind_questions_nothing_is_asked_blind_and_training_is_the_same(base, tmp_path):
    plain = train(base, tmp_path / "plain", max_steps=3)
    blind = train(base, tmp_path / "blind", max_steps=3, blind_questions=2)
    assert all(record["blind_answers"] is None for record in rollouts(tmp_path / "plain"))
    assert not plain.health._solved_blind and len(blind.health._solved_blind) == 4
    before, after = snapshot(plain), snapshot(blind)
    assert all(torch.equal(before[name], after[name]) for name in before)


# Penalties


def test_the_proposer_pays_for_repetition_and_for_what_is_solved_blind(base, tmp_path):
    settings = {"max_steps": 1, "gradient_accumulation_steps": 12}
    weights = {"diversity_weight": 0.5, "blind_weight": 0.4}
    train(base, tmp_path / "plain", **settings)
    trainer = train(base, tmp_path / "weighed", **settings, **weights)
    plain, weighed = rollouts(tmp_path / "plain"), rollouts(tmp_path / "weighed")
    (mean_share,) = logged(trainer, "question_cluster_share")
    shares = cluster_shares([record["question"] for record in weighed])
    assert len(set(shares)) > 1
    for before, after, like in zip(plain, weighed, shares, strict=True):
        assert after["answers"][0]["reward"] == before["answers"][0]["reward"]  # the solver's are what they were
        blind = blind_share(vote([a["canonical"] for a in after["answers"]]), after["blind_answers"])
        expected = penalised_proposer_reward(
            before["proposer_reward"], cluster_share=like, blind_share=blind, **weights
        )
        assert after["proposer_reward"] == pytest.approx(expected)
    assert mean_share == pytest.approx(sum(shares) / len(shares))
    assert any(a["proposer_reward"] < b["proposer_reward"] for a, b in zip(weighed, plain, strict=True))


# KL


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_without_a_penalty_the_kl_is_that_which_a_penalty_would_have_seen(base, tmp_path, shared_prefix):
    """A penalty of 1e-12 changes nothing but the KL's being measured, by TRL's own code."""
    settings = {"max_steps": 5, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 6}
    settings |= {"shared_prefix": shared_prefix}
    free = train(base, tmp_path / "free", beta=0.0, **settings)
    held = train(base, tmp_path / "held", beta=1e-12, adaptive_kl=False, **settings)
    for role in ("solver", "proposer"):
        values = logged(free, f"{role}/kl")
        assert values == pytest.approx(logged(held, f"{role}/kl"), rel=1e-3, abs=1e-7)
    assert len(logged(free, "solver/kl")) == 4 and logged(free, "solver/kl")[-1] > 1e-6


# The log


def test_the_log_and_the_rollouts_hold_what_health_is_read_from(base, tmp_path):
    trainer = train(base, tmp_path, max_steps=5)
    names = ("distinct_questions", "novel_questions", "question_self_bleu", "answer_tokens", "answer_length_drift")
    for name in (*names, "question_kinds/what", "time/health"):
        assert len(logged(trainer, name)) == 4  # of the solver's steps
    records = rollouts(tmp_path)
    assert all(record["question_kind"] == "what" for record in records)
    tokens = [answer["tokens"] for record in records for answer in record["answers"]]
    assert all(1 <= number <= 6 for number in tokens)
    first = [answer["tokens"] for record in records[:2] for answer in record["answers"]]
    assert logged(trainer, "answer_tokens")[0] == pytest.approx(sum(first) / len(first))


def test_what_is_new_in_a_resumed_run_is_what_it_would_have_been(base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    whole = train(base, tmp_path / "whole", **settings)
    train(base, tmp_path / "parts", Stop(), **settings)
    resumed = train(base, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"), **settings)
    for name in ("distinct_questions", "novel_questions", "question_self_bleu", "answer_length_drift"):
        assert logged(resumed, name) == logged(whole, name)
