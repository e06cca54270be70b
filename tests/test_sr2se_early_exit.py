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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from charts import VAL_SEEDS, labelled_questions
from demo import load_model
from safetensors.torch import save_file
from test_sr2se_sub_policies import IMAGES, QUESTIONS
from tiny_models import tiny_qwen2_5_vl
from transformers import AutoModelForImageTextToText

from evolmm_trl.processing import load_processor
from evolmm_trl.sr2se import (
    ConfidenceGate,
    EarlyExitReasoner,
    GateRollouts,
    GateTrainingConfig,
    SR2SEConfig,
    SubPolicies,
    SubPolicyPrompts,
    early_exit,
    pipeline,
    train_gate,
)
from evolmm_trl.sr2se.early_exit import exit_log_probs, gate_loss, image_numbers, is_right, threshold_loss
from evolmm_trl.sr2se.stopping import hsr_rewards


DEMO = Path(__file__).parents[1] / "examples" / "demo"


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    path = tiny_qwen2_5_vl(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    return SubPolicies(
        model, load_processor(path), max_perception_tokens=5, max_step_tokens=5, max_answer_tokens=5, batch_size=8
    )


def opening_gate(policies) -> ConfidenceGate:
    """A gate with weights at random, which opens after the first step for half of the questions."""
    torch.manual_seed(0)
    gate = ConfidenceGate(policies.model.config.get_text_config().hidden_size, gate_size=8).eval()
    descriptions = [c.text for c in policies.perceive(IMAGES, QUESTIONS)]
    taken = policies.reason(QUESTIONS, descriptions, [[] for _ in QUESTIONS])
    with torch.no_grad():
        gate.threshold_logit.copy_(torch.stack([gate(c.hidden) for c in taken]).median().add(1e-4).logit())
    return gate


def rollouts(n: int = 200, steps: int = 4, size: int = 6, seed: int = 0, noise: float = 0.3) -> GateRollouts:
    """Questions that are right from a step on, which a direction of the hidden states tells."""
    generator = torch.Generator().manual_seed(seed)
    first_right = torch.randint(1, steps + 2, (n,), generator=generator)  # steps + 1: never
    correct = torch.arange(1, steps + 1) >= first_right[:, None]
    hidden = torch.randn(n, steps, size, generator=generator)
    hidden[..., 0] = 2.0 * correct - 1 + noise * hidden[..., 0]
    return GateRollouts(hidden, correct, first_right <= steps, torch.arange(n))


# The gate


def test_the_score_is_the_sigmoid_of_an_mlp_on_the_hidden_state():
    gate = ConfidenceGate(6, gate_size=3).eval()
    hidden = torch.randn(2, 5, 6)
    first, _, _, last = gate.mlp
    expected = torch.sigmoid(torch.relu(hidden @ first.weight.T + first.bias) @ last.weight.T + last.bias)[..., 0]
    assert torch.allclose(gate(hidden), expected)
    assert gate(hidden).shape == (2, 5)
    assert gate.threshold.item() == pytest.approx(0.7)


def test_the_gate_trains_on_states_of_a_real_model(policies):
    """The authors' gate never trains: its steps are skipped, or fail on shapes, without a word."""
    reasoner = EarlyExitReasoner(policies, max_steps=3)
    descriptions = [c.text for c in policies.perceive(IMAGES, QUESTIONS)]
    made = reasoner.roll_out(IMAGES, QUESTIONS, ["5"] * 4, descriptions, [True, False, True, False])
    assert made.hidden.shape == (4, 3, policies.model.config.get_text_config().hidden_size)
    assert made.correct.shape == (4, 3) and made.visual.tolist() == [True, False, True, False]
    made = replace(made, correct=made.hidden[..., 0] > made.hidden[..., 0].median())
    gate, report = train_gate(made, GateTrainingConfig(epochs=30, held_out=0.25, learning_rate=1e-2))
    assert report["loss"][-1] < 0.5 * report["loss"][0]


def test_the_loss_is_the_binary_cross_entropy_of_every_step():
    gate, made = ConfidenceGate(6).eval(), rollouts(10)
    p = gate(made.hidden)
    y = made.correct.float()
    assert torch.allclose(gate_loss(gate, made.hidden, made.correct), -(y * p.log() + (1 - y) * (1 - p).log()).mean())


def test_labels_may_differ_from_step_to_step_so_that_the_gate_learns_when():
    gate, report = train_gate(rollouts(400), GateTrainingConfig(epochs=40))
    held = rollouts(200, seed=1)
    opens = gate(held.hidden) > 0.5
    assert (opens == held.correct).float().mean() > 0.95
    assert report["held_out_accuracy"] > 0.95 and report["held_out_ece"] < 0.1
    assert report["loss"][-1] < report["loss"][0]


def test_a_gate_on_the_worth_of_stopping_leaves_questions_without_hope_at_once():
    """Eq. 18 to 20; a gate on being right (Eq. 11) never opens for them."""
    made = rollouts(600)
    never = ~made.correct.any(1)
    made.hidden[..., 1] = 3.0 * never[:, None]  # what can be told from the states
    config = {"epochs": 40, "learn_threshold": False}
    right, _ = train_gate(made, GateTrainingConfig(**config))
    stop, report = train_gate(made, GateTrainingConfig(**config, target="stop"))
    assert (right(made.hidden[never])[:, 0] > 0.7).float().mean() < 0.05
    assert (stop(made.hidden[never])[:, 0] > 0.7).float().mean() > 0.95
    solved = made.correct[:, 1] & ~made.correct[:, 0]
    assert (stop(made.hidden[solved]) > 0.7).float().mean(0)[:2].tolist() == pytest.approx([0, 1], abs=0.1)
    assert report["held_out_accuracy"] > 0.9
    with pytest.raises(ValueError, match="target"):
        GateTrainingConfig(target="wrong")


def test_training_is_a_function_of_its_seed():
    def trained(seed):
        return train_gate(rollouts(), GateTrainingConfig(seed=seed))[0].state_dict()

    first, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mlp.0.weight"], other["mlp.0.weight"])


def test_rollouts_that_teach_nothing_are_refused():
    made = rollouts(20)
    with pytest.raises(ValueError, match="All 80 answers of the gate's rollouts are wrong"):
        train_gate(replace(made, correct=torch.zeros_like(made.correct)))
    with pytest.raises(ValueError, match="1 questions about 1 images, too few"):
        train_gate(made[torch.arange(1)])
    with pytest.raises(ValueError, match="20 questions about 1 images, too few"):
        train_gate(replace(made, image=torch.zeros(20, dtype=torch.int64)))


def noise_labels(n: int, per_image: int = 1) -> GateRollouts:
    """Questions whose labels are a coin's, the same for all about one image, and states that give the image away."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(n) // per_image
    right = torch.randint(0, 2, (n,), generator=generator).bool()[image]
    hidden = torch.randn(n, 32, generator=generator)[image][:, None].repeat(1, 3, 1)
    return GateRollouts(hidden, right[:, None].repeat(1, 3), right, image)


def train_on_noise(per_image: int) -> dict:
    config = GateTrainingConfig(epochs=60, dropout=0.0, held_out=0.5, learning_rate=3e-3)
    _, report = train_gate(noise_labels(800, per_image), config)
    assert report["loss"][-1] < 0.1, "learned by heart, or the test says nothing"
    return report


def test_what_the_gate_learned_by_heart_does_not_count_as_calibration():
    """On its own training questions it would be always right, and never too sure."""
    report = train_on_noise(per_image=1)
    assert report["held_out"] == 400
    assert report["held_out_accuracy"] == pytest.approx(0.5, abs=0.1)
    assert report["held_out_ece"] > 0.3


def test_questions_about_one_image_are_held_out_together():
    """A gate that has seen the image in training would know the answer."""
    report = train_on_noise(per_image=4)
    assert report["held_out"] == 400
    assert report["held_out_accuracy"] == pytest.approx(0.5, abs=0.1)


def test_the_threshold_is_learned_on_questions_that_the_gate_was_not_trained_on(monkeypatch):
    """On its own training questions the gate is always right; on others tau must see how it errs."""
    seen = []
    original = early_exit.threshold_loss
    monkeypatch.setattr(early_exit, "threshold_loss", lambda *args: seen.append(args[:2]) or original(*args))
    train_gate(noise_labels(200), GateTrainingConfig(epochs=60, dropout=0.0, batch_size=200, learning_rate=1e-2))
    scores, rewards = seen[0]
    right = rewards[:, 0] > 1  # answer and description, less the price of a step
    assert len(scores) == 40 and ((scores[:, 0] > 0.5) != right).sum() > 10


def test_the_final_gate_learns_from_descriptions_as_in_use(tmp_path, monkeypatch):
    """Decoded greedily, and judged by one greedy answer, whatever the pairs were made with."""
    (tmp_path / "data.jsonl").write_text("")
    config = SR2SEConfig(
        model="model",
        output_dir=str(tmp_path / "run"),
        data=str(tmp_path / "data.jsonl"),
        dtype="float32",
        refinement={"temperature": 0.7, "validation_samples": 3, "validation_required": 2},
        sft={"use_cpu": True},
        dpo={"use_cpu": True},
    )
    asked, run = [], pipeline._Run(config)
    monkeypatch.setattr(run, "_needed", lambda *args: tmp_path)
    monkeypatch.setattr(run, "_policies", lambda *args: None)
    monkeypatch.setattr(run, "_build", lambda policies, folder, config: asked.append(config))
    monkeypatch.setattr(run, "_fit_gate", lambda *args: None)
    run._final_gate(1)
    (made,) = asked
    assert (made.temperature, made.max_refinements) == (0, 0)
    assert (made.validation_samples, made.validation_required) == (1, 1)


def test_images_are_told_apart_by_their_pixels():
    first, again, other = image_numbers([IMAGES[0], IMAGES[0].copy(), IMAGES[1]]).tolist()
    assert first == again != other
    assert image_numbers([IMAGES[0].resize((8, 8)), IMAGES[0].resize((4, 16))]).unique().numel() == 2


def test_a_file_that_holds_no_rollouts_is_refused(tmp_path):
    save_file({"hidden": torch.zeros(1)}, str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="expected the rollouts of a gate"):
        GateRollouts.load(tmp_path / "a.safetensors")


def test_rollouts_are_saved_and_joined(tmp_path):
    made = rollouts(10)
    made[torch.arange(4)].save(tmp_path / "a.safetensors")
    made[torch.arange(4, 10)].save(tmp_path / "b.safetensors")
    joined = GateRollouts.cat([GateRollouts.load(tmp_path / f"{name}.safetensors") for name in "ab"])
    assert len(joined) == 10
    assert torch.equal(joined.hidden, made.hidden) and torch.equal(joined.correct, made.correct)
    assert torch.equal(joined.image, made.image)


# The threshold


def test_exit_probabilities_are_those_of_the_softened_test():
    scores = torch.tensor([[0.6, 0.8, 0.3]])
    e = torch.sigmoid((scores - 0.7) / 0.1)[0]
    expected = torch.tensor([[e[0], (1 - e[0]) * e[1], (1 - e[0]) * (1 - e[1])]])
    log_probs = exit_log_probs(scores, torch.tensor(0.7), 0.1)
    assert torch.allclose(log_probs.exp(), expected)
    assert log_probs.exp().sum().item() == pytest.approx(1)


def test_reinforce_is_an_unbiased_gradient_of_the_expected_reward():
    made = rollouts(6)
    scores, rewards = torch.rand(6, 4), hsr_rewards(made.visual, made.correct)
    exact_threshold = torch.tensor(0.6, requires_grad=True)
    (exit_log_probs(scores, exact_threshold, 0.1).exp() * rewards).sum(1).mean().backward()
    threshold = torch.tensor(0.6, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    threshold_loss(scores, rewards, threshold, 0.1, draws=40_000, generator=generator).backward()
    assert threshold.grad.item() == pytest.approx(-exact_threshold.grad.item(), rel=0.05)


def test_two_draws_are_as_unbiased_as_many():
    """A baseline with the draw itself in it would halve the gradient of two draws."""
    torch.manual_seed(0)
    scores, rewards = torch.rand(4, 4), hsr_rewards(torch.tensor([True, False] * 2), torch.rand(4, 4) > 0.5)
    exact_threshold = torch.tensor(0.6, requires_grad=True)
    (exit_log_probs(scores, exact_threshold, 0.1).exp() * rewards).sum(1).mean().backward()
    threshold = torch.tensor(0.6, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    many = (scores.repeat(50_000, 1), rewards.repeat(50_000, 1))
    threshold_loss(*many, threshold, 0.1, draws=2, generator=generator).backward()
    assert abs(exact_threshold.grad.item()) > 0.05
    assert threshold.grad.item() == pytest.approx(-exact_threshold.grad.item(), rel=0.1)


def test_the_threshold_falls_where_leaving_early_earns_more_and_rises_where_it_earns_less():
    """The authors' update has the opposite sign, and no log-probability."""
    scores = torch.full((64, 3), 0.7)
    earlier_is_better = torch.tensor([[1.0, 0.9, 0.8]]).expand(64, 3)
    for rewards, sign in ((earlier_is_better, 1), (1 - earlier_is_better, -1)):
        threshold = torch.tensor(0.7, requires_grad=True)
        generator = torch.Generator().manual_seed(0)
        threshold_loss(scores, rewards, threshold, 0.1, draws=8, generator=generator).backward()
        assert threshold.grad.item() * sign > 0.01  # a descent step moves against the gradient


def test_learning_the_threshold_leaves_the_gate_alone():
    scores = torch.rand(8, 3, requires_grad=True)
    threshold_loss(scores, torch.rand(8, 3), torch.tensor(0.5, requires_grad=True), 0.1, 4).backward()
    assert scores.grad is None
    fixed, _ = train_gate(rollouts(), GateTrainingConfig(learn_threshold=False))
    learned, report = train_gate(rollouts(), GateTrainingConfig(threshold_learning_rate=0.1))
    assert torch.equal(fixed.mlp[0].weight, learned.mlp[0].weight)
    assert fixed.threshold.item() == pytest.approx(0.7)
    assert learned.threshold.item() == pytest.approx(report["threshold"][-1]) != pytest.approx(0.7, abs=1e-3)


def test_a_threshold_that_starts_too_high_is_learned_to_earn_more():
    config = GateTrainingConfig(epochs=40, threshold=0.99, threshold_learning_rate=0.2)
    _, report = train_gate(rollouts(1000, noise=1.0), config)
    assert report["threshold"][-1] < 0.96
    assert report["reward_after"] > report["reward_before"] + 0.02


# Reasoning


def test_without_a_gate_all_steps_are_taken(policies):
    results = EarlyExitReasoner(policies, max_steps=3).generate(IMAGES, QUESTIONS)
    assert [len(result.steps) for result in results] == [3, 3, 3, 3]
    assert not any(result.exited_early or result.scores for result in results)


def test_reasoning_stops_at_the_first_score_above_the_threshold(policies):
    gate = opening_gate(policies)
    results = EarlyExitReasoner(policies, gate).generate(IMAGES, QUESTIONS)
    assert 1 < len({len(result.steps) for result in results}), "they should differ, or the test says nothing"
    for result in results:
        above = [score > gate.threshold.item() for score in result.scores]
        assert len(above) == len(result.steps)
        assert not any(above[:-1])
        assert result.exited_early == (len(above) < 5)
        assert above[-1] or len(above) == 5
    # To stop where the steps end anyway is not early
    last = EarlyExitReasoner(policies, gate, max_steps=1).generate(IMAGES, QUESTIONS)
    assert any(result.scores[0] > gate.threshold.item() for result in last)
    assert not any(result.exited_early for result in last)


def test_what_has_left_takes_no_part_in_further_steps(policies, monkeypatch):
    gate = opening_gate(policies)
    reasoner, taken = EarlyExitReasoner(policies, gate), []
    original = policies.model.generate

    def generate(**kwargs):
        taken.append(kwargs["input_ids"].shape[0])
        return original(**kwargs)

    monkeypatch.setattr(policies.model, "generate", generate)
    results = reasoner.generate(IMAGES, QUESTIONS)
    depths = [len(result.steps) for result in results]
    by_step = [sum(depth >= k for depth in depths) for k in range(1, max(depths) + 1)]
    assert taken == [4, *by_step, 4]
    assert sum(by_step) < 5 * 4


def test_one_image_gives_what_it_gives_in_a_batch(policies):
    reasoner = EarlyExitReasoner(policies, opening_gate(policies))
    for image, question, expected in zip(IMAGES, QUESTIONS, reasoner.generate(IMAGES, QUESTIONS), strict=True):
        alone = reasoner.generate(image, question)
        assert (alone.steps, alone.answer, alone.tokens) == (expected.steps, expected.answer, expected.tokens)


def test_tokens_are_all_that_was_generated(policies, monkeypatch):
    gate, counted = opening_gate(policies), []
    for name in ("perceive", "reason", "answer"):
        original = getattr(policies, name)

        def count(*args, original=original):
            completions = original(*args)
            counted.extend(completion.tokens for completion in completions)
            return completions

        monkeypatch.setattr(policies, name, count)
    results = EarlyExitReasoner(policies, gate).generate(IMAGES, QUESTIONS)
    assert sum(result.tokens for result in results) == sum(counted)


def test_gate_threshold_steps_and_prompts_are_saved_reloaded_and_used(policies, tmp_path):
    """The authors' learned tau stays in the trainer: it is neither saved nor used."""
    gate = opening_gate(policies)
    reasoner = EarlyExitReasoner(policies, gate, max_steps=4)
    reasoner.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"gate.safetensors", "gate_config.json"}
    again = EarlyExitReasoner.from_pretrained(
        tmp_path,
        policies.model,
        policies.processor,
        max_perception_tokens=5,
        max_step_tokens=5,
        max_answer_tokens=5,
    )
    assert again.gate.threshold.item() == gate.threshold.item() != pytest.approx(0.7)
    assert again.max_steps == 4 and again.policies.prompts == policies.prompts
    expected = [len(result.steps) for result in reasoner.generate(IMAGES, QUESTIONS)]
    assert [len(result.steps) for result in again.generate(IMAGES, QUESTIONS)] == expected
    with torch.no_grad():
        again.gate.threshold_logit.fill_(-20.0)
    assert [len(result.steps) for result in again.generate(IMAGES, QUESTIONS)] == [1] * 4


def test_a_gate_for_another_model_is_refused(policies, tmp_path):
    with pytest.raises(ValueError, match="hidden states of size 7"):
        EarlyExitReasoner(policies, ConfidenceGate(7))
    with pytest.raises(FileNotFoundError, match="no gate"):
        EarlyExitReasoner.from_pretrained(tmp_path, policies.model, policies.processor)


def test_roll_outs_are_labelled_at_every_step_from_the_same_steps_as_inference():
    """On a model whose answers are read, and are right from a step on that differs."""
    model = SubPolicies(
        *load_model(DEMO / "models" / "sr2se"),
        SubPolicyPrompts(**json.loads((DEMO / "sr2se_prompts.json").read_text())),
        max_perception_tokens=24,
        max_step_tokens=20,
        max_answer_tokens=6,
        batch_size=24,
    )
    rows = labelled_questions(VAL_SEEDS[:24])
    images, questions, truths = ([row[name] for row in rows] for name in ("image", "question", "answer"))
    reasoner = EarlyExitReasoner(model, max_steps=3)
    results = reasoner.generate(images, questions)
    made = reasoner.roll_out(images, questions, truths, [r.description for r in results], [False] * len(rows))
    assert made.correct.any() and len({tuple(column) for column in made.correct.T.tolist()}) > 1, "they should differ"
    for k in range(1, 4):
        answers = EarlyExitReasoner(model, max_steps=k).generate(images, questions)
        assert made.correct[:, k - 1].tolist() == [is_right(r.answer, t) for r, t in zip(answers, truths, strict=True)]
        states = model.reason(questions, [r.description for r in results], [r.steps[: k - 1] for r in results])
        assert torch.allclose(made.hidden[:, k - 1], torch.stack([state.hidden for state in states]), atol=1e-4)
    assert len(made.image.unique()) == len(rows)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [("cannot", "no", False), ("10", "1", False), ("B. a bird", "A", False), ("(A)", "A", True), ("5.0", "5", True)]
    + [(None, "5", False), ("", "5", False)],
)
def test_answers_are_compared_as_answers_and_not_as_substrings(answer, truth, right):
    assert is_right(answer, truth) is right


def test_saved_gates_are_safetensors_and_json(policies, tmp_path):
    EarlyExitReasoner(policies, opening_gate(policies)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "gate_config.json").read_text())["max_steps"] == 5
