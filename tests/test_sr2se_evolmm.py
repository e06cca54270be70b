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

"""The bridge to EvoLMM: disagreements as preference pairs, and votes that stop when they are settled."""

import itertools
import json
import shutil

import pytest
import torch
from engines import largest_difference, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, logged, lora, noise_images, snapshot
from transformers import AutoModelForImageTextToText

from evolmm_trl import RolePrompts
from evolmm_trl.processing import load_processor
from evolmm_trl.rollout.generation import end_states, sample_seed
from evolmm_trl.rollout.samples import EncodedPrompt, encode_prompts
from evolmm_trl.sr2se import (
    AgreementLabeller,
    ConfidenceGate,
    SRDPOConfig,
    SRDPOTrainer,
    SubPolicies,
    load_preferences,
    train_gate,
)
from evolmm_trl.sr2se.generation import Completion, generate
from evolmm_trl.voting import is_settled, vote


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


def make(base, folder, vote_gate=None, **options):
    return TalkingTrainer(
        model=base,
        args=config(folder, **options),
        train_dataset=image_dataset(),
        peft_config=lora(),
        vote_gate=vote_gate,
    )


def read(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# Disagreements as preference pairs

COLLECT = {
    "max_steps": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}
COLLECT |= {"collect_preferences": True, "preference_agreement": 0.5}


@pytest.fixture(scope="module")
def collected(base, tmp_path_factory):
    """Four steps that collect their disagreements, with a checkpoint after every second."""
    trainer = make(base, tmp_path_factory.mktemp("collected"), **COLLECT)
    trainer.train()
    return trainer


def test_a_disagreement_is_a_pair_of_the_majority_and_another_answer(collected):
    expected = []
    for record in read(collected.rollout_log.path):
        readable = [answer for answer in record["answers"] if answer["canonical"] is not None]
        others = [answer for answer in readable if answer["canonical"] != record["majority"]]
        if not record["question_well_formed"] or not others or record["agreement"] < 0.5:
            continue
        chosen = next(answer for answer in readable if answer["canonical"] == record["majority"])
        expected.append(
            {
                "question": record["question"],
                "ground_truth": record["majority"],
                "chosen": chosen["completion"],
                "rejected": others[0]["completion"],
                "iteration": 0,
            }
        )
    pairs = read(collected.preference_log.path)
    assert expected and len(expected) < len(read(collected.rollout_log.path))
    assert [{name: pair[name] for name in pair if name != "image_path"} for pair in pairs] == expected
    assert sum(logged(collected, "preference_pairs")) == len(pairs)
    pixels = {picture.tobytes() for picture in noise_images(6)}
    for pair in pairs:
        assert pair["image_path"].startswith("_")  # such folders are not pushed to the Hub
        with Image.open(collected.preference_log.path.parent / pair["image_path"]) as image:
            assert image.tobytes() in pixels


def test_the_pairs_are_of_the_image_that_was_asked_about(base, tmp_path):
    options = {"max_steps": 1, "gradient_accumulation_steps": 6, "collect_preferences": True}
    trainer = make(base, tmp_path, preference_agreement=0.3, **options)
    asked, original = set(), trainer._solve

    def solve(model, rows, question_prompts, questions):
        asked.update((question.text, row["image"].tobytes()) for row, question in zip(rows, questions, strict=True))
        return original(model, rows, question_prompts, questions)

    trainer._solve = solve
    trainer.train()
    pairs = read(trainer.preference_log.path)
    assert pairs and len({image for _, image in asked}) == 6
    for pair in pairs:
        with Image.open(tmp_path / pair["image_path"]) as image:
            assert (pair["question"], image.tobytes()) in asked


def test_a_resumed_run_collects_what_one_that_was_not_stopped_collects(base, collected, tmp_path):
    folder = shutil.copytree(collected.args.output_dir, tmp_path / "run")
    state = json.loads((folder / "checkpoint-2" / "evolmm_state.json").read_text())
    assert 0 < state["preference_log_bytes"] < len(collected.preference_log)
    resumed = make(base, folder, **COLLECT)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.preference_log.path.read_bytes() == collected.preference_log.path.read_bytes()


def test_collected_pairs_train_sr_dpo_on_the_solvers_own_prompt(base, collected, tmp_path):
    processor, file = load_processor(base), collected.preference_log.path
    dataset = load_preferences(file, processor, RolePrompts())
    pairs = read(file)
    assert len(dataset) == len(pairs)
    for row, pair in zip(dataset, pairs, strict=True):
        asked = RolePrompts().solver_messages(pair["question"])
        (prompt,) = encode_prompts(processor, [asked], [row["image"]])
        inputs = processor(text=[row["prompt"]], images=[[row["image"]]], return_tensors="pt")
        assert torch.equal(inputs["input_ids"][0], prompt.input_ids)
        assert row["chosen"] == pair["chosen"] + "<|im_end|>"
    args = SRDPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=len(pairs),
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = SRDPOTrainer(base, args, dataset, processing_class=processor, peft_config=lora())
    trainer.train()
    assert logged(trainer, "rewards/margins")[-1] > logged(trainer, "rewards/margins")[0] + 1e-3


def test_without_being_asked_for_nothing_is_collected(base, tmp_path):
    trainer = make(base, tmp_path, max_steps=1)
    trainer.train()
    assert {file.name for file in tmp_path.iterdir() if "preference" in file.name} == set()


# Votes that stop


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=5), st.integers(0, 3))
def test_a_settled_vote_is_one_that_no_further_answers_change(answers, remaining):
    before = vote(answers)
    holds = True
    for further in itertools.product(["a", "b", "new", None], repeat=remaining):
        counts = vote([*answers, *further]).counts
        first = max(counts.values(), default=0)
        holds &= [name for name, count in counts.items() if count == first] == [before.majority]
    assert is_settled(before, remaining) == holds


def voted(base, folder, **options):
    options = {"num_generations": 2, "extra_votes": 5, "reward": "discrete", "train_proposer": False} | options
    trainer = make(base, folder, max_steps=2, **options)
    trainer.train()
    return trainer, read(trainer.rollout_log.path)


@pytest.fixture(scope="module")
def all_votes(base, tmp_path_factory):
    return voted(base, tmp_path_factory.mktemp("all"))


def test_votes_that_are_not_drawn_change_no_majority_and_no_discrete_reward(base, all_votes, tmp_path):
    full, expected = all_votes
    early, records = voted(base, tmp_path, early_votes=True)
    drawn = [len(record["answers"]) for record in records]
    assert all(len(record["answers"]) == 7 for record in expected)
    assert min(drawn) >= 2 and min(drawn) < 7
    for record, whole in zip(records, expected, strict=True):
        n = len(record["answers"])
        assert record["majority"] == whole["majority"]
        # The same answers as far as they are drawn, with the same rewards
        assert [a["completion"] for a in record["answers"]] == [a["completion"] for a in whole["answers"][:n]]
        assert [a["reward"] for a in record["answers"]] == [a["reward"] for a in whole["answers"][:n]]
        assert n == 7 or is_settled(vote([a["canonical"] for a in record["answers"]]), 7 - n)
        if n > 2:
            assert not is_settled(vote([a["canonical"] for a in record["answers"][:-1]]), 8 - n)
    after = snapshot(full)
    assert all(torch.allclose(tensor, after[name], atol=1e-6) for name, tensor in snapshot(early).items())
    assert sum(logged(early, "votes")) == pytest.approx(sum(drawn) / 2)


@pytest.mark.parametrize("threshold", [0.001, 0.999])
def test_a_gate_that_is_sure_spares_all_votes_and_one_that_never_is_spares_none_more(base, tmp_path, threshold):
    gate = ConfidenceGate(32, threshold=threshold).eval()
    _, records = voted(base, tmp_path / "gate", vote_gate=gate, early_votes=True)
    drawn = [len(record["answers"]) for record in records]
    if threshold < 0.5:
        assert drawn == [2] * len(drawn)
    else:
        _, without = voted(base, tmp_path / "none", early_votes=True)
        assert drawn == [len(record["answers"]) for record in without] != [2] * len(drawn)


def test_a_gate_is_asked_about_the_last_answer_with_the_solvers_adapter(base, tmp_path):
    gate, asked = ConfidenceGate(32).eval(), []
    trainer = make(base, tmp_path, gate, max_steps=1, num_generations=2, extra_votes=3, early_votes=True)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    original = gate.forward
    gate.forward = lambda hidden: asked.append(hidden) or torch.zeros(len(hidden)) + 0 * original(hidden)
    solve, given_ids = trainer._solve, {}

    def solve_and_keep(model, rows, question_prompts, questions):
        prompts, ids, texts = solve(model, rows, question_prompts, questions)
        given_ids.update(prompts=prompts, ids=ids)
        for i, hidden in zip([i for i, group in enumerate(ids) if len(group) > 2], asked[0], strict=False):
            with trainer.roles.using("solver"):
                expected = end_states(model, [prompts[i]], [ids[i][1]], trainer._tokenizer.pad_token_id)
            assert torch.allclose(hidden, expected[0], atol=1e-4)
        return prompts, ids, texts

    trainer._solve = solve_and_keep
    trainer.train()
    assert asked and given_ids


@pytest.mark.parametrize("make_model", [tiny_qwen2_5_vl, tiny_qwen3_vl])
def test_the_state_at_an_answers_end_is_the_one_that_generation_saw(make_model, tmp_path):
    path = make_model(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), load_processor(path)
    images = noise_images(3)
    conversations = [RolePrompts().solver_messages(question) for question in ("How many?", "What is it that you see?")]
    conversations.append(conversations[0])
    prompts = encode_prompts(processor, conversations, images)
    rows, keep = [], model.generate

    def generate_and_keep(**kwargs):
        ids = keep(**kwargs)
        rows.extend(ids[:, kwargs["input_ids"].shape[1] :].tolist())
        return ids

    model.generate = generate_and_keep
    groups = generate(model, processor, conversations, images, max_new_tokens=9, with_hidden=True)
    completions = [row[: group[0].tokens] for row, group in zip(rows, groups, strict=True)]
    states = end_states(model, prompts, completions, processor.tokenizer.pad_token_id)
    assert states.shape == (3, 32)
    assert torch.allclose(states, torch.stack([group[0].hidden for group in groups]), atol=1e-4)
    one_less = end_states(model, prompts, [ids[:-1] for ids in completions], processor.tokenizer.pad_token_id)
    assert not torch.allclose(states, one_less, atol=1e-2)
    assert isinstance(prompts[0], EncodedPrompt)


SAID = [["7", "7", "8", None], [None, "1", "2", "2"], [None, None, None, None]]


def test_a_vote_gate_learns_whether_the_majority_so_far_is_right(base, monkeypatch):
    policies = SubPolicies(None, load_processor(base))
    labeller = AgreementLabeller(policies, num_answers=4)
    hidden, images = torch.arange(12.0).view(3, 4, 1), noise_images(3)

    def answers(conversations, images, max_new_tokens, samples, seed, with_hidden):
        assert with_hidden and samples == 4
        return [
            [Completion(f"<answer>{a}</answer>" if a else "?", 1, hidden[i, k]) for k, a in enumerate(group)]
            for i, group in enumerate(SAID)
        ]

    monkeypatch.setattr(labeller, "_generate", answers)
    made = labeller.roll_out(images, ["q"] * 3, seed=0, truths=["7", "1", "5"])
    assert len(made.image.unique()) == 3
    assert torch.equal(made.hidden, hidden)
    assert made.correct.int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    made = labeller.roll_out(images, ["q"] * 3, seed=0)
    assert made.correct.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_vote_gate_is_trained_saved_and_used(base, tmp_path):
    model, processor = AutoModelForImageTextToText.from_pretrained(base).eval(), load_processor(base)
    labeller = AgreementLabeller(SubPolicies(model, processor), num_answers=3, max_answer_tokens=4)
    made = labeller.roll_out(noise_images(10), ["How many?"] * 10, seed=sample_seed("votes"))
    assert made.hidden.shape == (10, 3, 32)
    made.correct[:] = made.hidden[..., 0] > 0  # a random model's answers cannot be read
    gate, _ = train_gate(made)
    gate.save_pretrained(tmp_path / "gate")
    again = ConfidenceGate.from_pretrained(tmp_path / "gate")
    assert torch.equal(again(made.hidden), gate(made.hidden)) and again.threshold == gate.threshold
    trainer = make(base, tmp_path, again, num_generations=2, extra_votes=1, early_votes=True, max_steps=1)
    trainer.train()


def test_two_processes_draw_the_votes_of_one(base, tmp_path):
    """Which questions are still voted on, and for how long, differs between the processes."""
    torch.manual_seed(1)
    ConfidenceGate(32, threshold=0.502).save_pretrained(tmp_path / "gate")
    # A small learning rate, or a gate's decision could hang on the last digit of a weight
    options = {"max_steps": 3, "num_generations": 2, "extra_votes": 4, "early_votes": True, "learning_rate": 1e-6}
    arguments = "--vote_gate", str(tmp_path / "gate")
    one = run(None, base, tmp_path / "one", *arguments, **options)[0]
    two = run("ddp", base, tmp_path / "two", *arguments, **options)
    assert [result["processes"] for result in (one, *two)] == [1, 2, 2]
    records, expected = (read(tmp_path / name / "rollouts.jsonl") for name in ("two", "one"))
    named = ("step", "image_id", "question", "majority", "entropy")
    for mine, theirs in zip(records, expected, strict=True):
        assert [mine[name] for name in named] == [theirs[name] for name in named]
        assert [a["completion"] for a in mine["answers"]] == [a["completion"] for a in theirs["answers"]]
    drawn = [len(record["answers"]) for record in records]
    unsettled = [not is_settled(vote([a["canonical"] for a in r["answers"]]), 6 - len(r["answers"])) for r in records]
    assert any(n < 6 and open_ for n, open_ in zip(drawn, unsettled, strict=True)), "the gate should stop some"
    # A step's records are those of the first process and then those of the second
    halves = [(drawn[i : i + 2], drawn[i + 2 : i + 4]) for i in range(0, len(drawn), 4)]
    assert any(max(first) != max(second) for first, second in halves), "the processes should differ in their calls"
    votes = [[row["votes"] for row in result["log"] if "votes" in row] for result in (two[0], one)]
    assert votes[0] == pytest.approx(votes[1]) and votes[0]
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0.0


def test_settings_that_cannot_work_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="early_votes=True, but extra_votes=0"):
        config(tmp_path, early_votes=True)
    with pytest.raises(ValueError, match="no pair would ever be written"):
        config(tmp_path, collect_preferences=True, num_generations=3)
    with pytest.raises(ValueError, match="preference_agreement=2"):
        config(tmp_path, preference_agreement=2)
    with pytest.raises(ValueError, match="never be asked"):
        make(base, tmp_path, ConfidenceGate(32))
    with pytest.raises(ValueError, match="hidden states of size 7"):
        make(base, tmp_path, ConfidenceGate(7), extra_votes=1, early_votes=True)
