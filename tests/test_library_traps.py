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

"""What goes wrong without an error in TRL, transformers and PEFT when two roles share a model, and how settings act."""

import ast
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from io import BytesIO
from itertools import count

import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset
from packaging.requirements import Requirement
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_qwen2_5_vl, tiny_tokenizer
from tiny_trainer import TalkingTrainer, Watch, as_speech, config, image_dataset, logged, lora, noise_images, snapshot
from transformers import (
    AutoModelForImageTextToText,
    ProgressCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from evolmm_trl import EvoLMMConfig, EvoLMMTrainer, load_solver
from evolmm_trl.role_adapters import RoleAdapters, add_role_adapter, keep_adapters_precise
from evolmm_trl.rollout.samples import collate_prompts
from evolmm_trl.schedule import RoleSchedule, RolloutSampler


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


class WatchedTrainer(TalkingTrainer):
    """Keeps the prompts and samples of every role, and the batches of its loss."""

    def __init__(self, *args, callbacks=None, **kwargs):
        self.watch = Watch()
        self.shown, self.sampled, self.batches = [], [], []
        super().__init__(*args, callbacks=[self.watch, *(callbacks or [])], **kwargs)

    def _generate_role(self, model, role, prompts, seeds):
        ids = super()._generate_role(model, role, prompts, seeds)
        self.shown.append((role, list(prompts)))
        self.sampled.append((role, ids))
        return ids

    def _batch(self, part):
        batch = super()._batch(part)
        self.batches.append((self.state.global_step, self.role, {**batch}))
        return batch


def make(base, folder, trainer_class=WatchedTrainer, dataset=None, peft_config=None, trainer_options=None, **options):
    return trainer_class(
        model=base,
        args=config(folder, **options),
        train_dataset=image_dataset() if dataset is None else dataset,
        peft_config=lora() if peft_config is None else peft_config or None,
        **(trainer_options or {}),
    )


def records_of(trainer):
    return [json.loads(line) for line in trainer.rollout_log.path.read_text().splitlines()]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Six steps of both roles, with a checkpoint at their end."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make(base, folder, max_steps=6, save_strategy="steps", save_steps=6, adam_epsilon=1e-4)
    trainer.train()
    return trainer


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of the trained run's checkpoint, to be damaged."""
    return shutil.copytree(trained.rollout_log.path.parent / "checkpoint-6", tmp_path / "run" / "checkpoint-6")


# The second adapter silently never trains


def test_both_adapters_are_in_the_optimizer(base, tmp_path):
    trainer = make(base, tmp_path)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    held = {role: [names[id(p)] for g in groups if g["role"] == role for p in g["params"]] for role in trainer.kl}
    assert len(held["solver"]) == len(held["proposer"]) == 28
    assert all(".default." in name for name in held["solver"])
    assert all(".proposer." in name for name in held["proposer"])


@pytest.mark.parametrize("adapter", ["default", "proposer"])
def test_set_adapter_by_someone_else_before_training_is_detected(base, adapter, tmp_path):
    trainer = make(base, tmp_path)
    trainer.model.set_adapter(adapter)
    with pytest.raises(RuntimeError, match="something called `set_adapter`"):
        trainer.train()


@pytest.mark.parametrize("meddle", ["set_adapter", "disable_adapter_layers", "requires_grad"])
def test_meddling_with_the_adapters_during_training_is_detected(base, meddle, tmp_path):
    class Meddler(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step < 4:
                return
            if meddle == "set_adapter":
                model.set_adapter("proposer")
            elif meddle == "disable_adapter_layers":
                model.disable_adapter_layers()
            else:
                next(p for name, p in model.named_parameters() if ".proposer." in name).requires_grad_(False)

    trainer = make(base, tmp_path, max_steps=6, trainer_options={"callbacks": [Meddler()]})
    with pytest.raises(RuntimeError, match="something called `set_adapter` or left `disable_adapter\\(\\)`"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_trainable_tensor_that_the_optimizer_lacks_is_refused(base, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    trainer = make(model, tmp_path, peft_config=False, trainer_options={"optimizers": (optimizer, None)})
    with pytest.raises(
        RuntimeError, match="of the solver's .* trainable tensors are not in the optimizer, such as model"
    ):
        trainer.train()


def test_an_optimizer_made_before_the_proposer_s_adapter_is_refused(base, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="Choose the optimizer with `args.optim`"):
        make(model, tmp_path, trainer_options={"optimizers": (optimizer, None)})


# The names of the adapters, and the layout of a checkpoint


def logits(model, trainer):
    """In eval mode, for the first prompts and images that the trainer has shown to the proposer."""
    with torch.no_grad():
        return model.eval()(**collate_prompts(trainer.shown[0][1], 0)).logits


def test_a_checkpoint_s_root_is_the_solver_and_its_subfolder_the_proposer_for_plain_peft(base, trained):
    folder = trained.rollout_log.path.parent / "checkpoint-6"
    outputs = {"base": logits(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), trained)}
    for role, subfolder in (("solver", None), ("proposer", "proposer")):
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        outputs[role] = logits(PeftModel.from_pretrained(model, folder, subfolder=subfolder), trained)
        with trained.roles.using(role):
            assert torch.allclose(outputs[role], logits(trained.model, trained), atol=1e-6)
    with trained.roles.reference():
        assert torch.equal(outputs["base"], logits(trained.model, trained))
    for one, other in (("solver", "proposer"), ("solver", "base"), ("proposer", "base")):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


def test_load_solver_gives_the_solver(base, trained):
    model, processor = load_solver(base, str(trained.rollout_log.path.parent / "checkpoint-6"), dtype=torch.float32)
    with trained.roles.using("solver"):
        assert torch.allclose(logits(model, trained), logits(trained.model, trained), atol=1e-6)
    assert hasattr(processor, "image_processor")


def test_only_safetensors_and_json_carry_our_state(trained):
    folder = trained.rollout_log.path.parent / "checkpoint-6"
    for adapter in (folder, folder / "proposer"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in adapter.iterdir()}
    of_the_trainer = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    pickled = {file.name for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")}
    assert pickled <= of_the_trainer


def test_the_model_is_the_solver_after_training_even_if_the_last_step_was_the_proposer_s(trained):
    assert trained.schedule.role(trained.state.global_step - 1) == "proposer"
    after = logits(trained.model, trained)
    with trained.roles.using("solver"):
        assert torch.equal(after, logits(trained.model, trained))


def test_a_peft_model_with_both_adapters_is_trained_further(base, trained, tmp_path):
    folder = trained.rollout_log.path.parent / "checkpoint-6"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    model.load_adapter(folder / "proposer", "proposer", is_trainable=True)
    trainer = make(model, tmp_path, peft_config=False)
    assert largest_difference(snapshot(trainer), snapshot(trained)) == 0.0
    trainer.train()
    assert sorted(trainer.model.peft_config) == ["default", "proposer"]
    for step, adapter in enumerate(("default", "default", "proposer")):
        assert trainer.watch.moved(step) and all(f".{adapter}." in name for name in trainer.watch.moved(step))
    # The reference is the base, not the adapters it began with
    assert logged(trainer, "solver/kl")[0] > 1e-3 and logged(trainer, "proposer/kl")[0] > 1e-4


def test_a_peft_model_without_the_proposer_s_adapter_is_refused(base, trained, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, trained.rollout_log.path.parent / "checkpoint-6", is_trainable=True)
    with pytest.raises(
        ValueError, match=r"adapters \['default'\].*needs exactly \['default', 'proposer'\]. Load both"
    ):
        make(model, tmp_path, peft_config=False)


def test_a_peft_model_with_a_peft_config_is_refused(base, tmp_path):
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`PeftModel` instance together with a `peft_config`"):
        make(model, tmp_path)


def test_a_checkpoint_without_the_proposer_is_not_resumed(base, checkpoint):
    shutil.rmtree(checkpoint / "proposer")
    trainer = make(base, checkpoint.parent, max_steps=9)
    with pytest.raises(
        ValueError, match="holds no adapter for the proposer.*lacks adapter_config.json and adapter_model"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_trainer_is_not_resumed(base, checkpoint):
    (checkpoint / "evolmm_state.json").unlink()
    trainer = make(base, checkpoint.parent, max_steps=9)
    with pytest.raises(ValueError, match="lacks evolmm_state.json: it is not a checkpoint of this trainer"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_adapters_is_not_resumed(base, checkpoint):
    trainer = make(base, checkpoint.parent, max_steps=9, peft_config=lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="does not fit this model: .*Use the base model and the `peft_config`"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_at_the_end_is_the_best_of_both_roles(base, tmp_path):
    class EvaluatedTrainer(WatchedTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_best_at_3"] = float(self.state.global_step == 3)
            return output

    trainer = make(
        base,
        tmp_path,
        EvaluatedTrainer,
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="best_at_3",
        greater_is_better=True,
        trainer_options={"eval_dataset": labelled(["1"])},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert largest_difference(snapshot(trainer), trainer.watch.after[2]) == 0.0
    assert largest_difference(trainer.watch.after[5], trainer.watch.after[2]) > 1e-3


# Gradient checkpointing recomputes the forward during backward with whatever adapter is active then


def test_gradient_checkpointing_does_not_change_the_gradients_of_either_role(base, tmp_path):
    runs = [
        make(base, tmp_path / str(on), gradient_checkpointing=on, adam_epsilon=1e-4, max_steps=6)
        for on in (True, False)
    ]
    for trainer in runs:
        trainer.train()
    assert runs[0].model.is_gradient_checkpointing and not runs[1].model.is_gradient_checkpointing
    for step in range(6):
        adapter = ".proposer." if step % 3 == 2 else ".default."
        one, other = ({n: g for n, g in run.watch.gradients[step].items() if adapter in n} for run in runs)
        assert largest_difference(one, other) < 1e-5
        assert max(gradient.abs().max() for gradient in one.values()) > 1e-3


def test_dropout_is_drawn_for_the_role_that_trains_and_for_nothing_else(base, tmp_path):
    trainer = make(base, tmp_path, peft_config=lora(lora_dropout=0.5), max_steps=3)
    trainer.train()
    trainer.model.train()
    batch = {name: value for name, value in trainer.batches[2][2].items() if name != "ref_per_token_logps"}
    with trainer.roles.using("solver"):
        noisy = [trainer._completion_logps(trainer.model, batch) for _ in range(2)]
    assert not torch.equal(*noisy)
    state = torch.get_rng_state()
    quiet = [trainer._reference_logps(batch) for _ in range(2)]
    assert torch.equal(*quiet)
    with trainer._sampling() as model:
        texts = [trainer._generate_role(model, "solver", trainer.shown[0][1][:1], [range(8)]) for _ in range(2)]
    assert texts[0] == texts[1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("role", ["solver", "proposer"])
def test_the_idle_adapter_draws_no_dropout(base, role):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    options = {"lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(model, lora(**options))
    add_role_adapter(model, lora(**options))
    ids = torch.arange(12)[None]

    def draw():
        torch.manual_seed(0)
        return model.train()(input_ids=ids).logits

    model.set_adapter({"solver": "default", "proposer": "proposer"}[role])
    alone = draw()
    with model.disable_adapter():
        untrained = draw()
    roles = RoleAdapters(model)
    roles.activate(role)
    assert torch.equal(draw(), alone)
    with roles.reference():
        assert torch.equal(draw(), untrained)
    assert torch.equal(draw(), alone) and not torch.equal(alone, untrained)


# Prompts, groups, rows


def test_the_solver_is_asked_the_proposer_s_question_about_the_same_image(trained):
    tokenizer = trained.processing_class.tokenizer
    records = records_of(trained)
    for (asker, asked), (role, prompts) in zip(trained.shown[::2], trained.shown[1::2], strict=True):
        assert (asker, role) == ("proposer", "solver")
        step = [records.pop(0) for _ in asked]
        for i, record in enumerate(step):
            assert tokenizer.decode(prompts[i].input_ids).count(f"Question: {record['question']}<|im_end|>") == 1
            assert prompts[i].image_inputs is asked[i].image_inputs
    assert not records


def test_a_micro_batch_of_n_answers_is_one_whole_group(trained):
    for _, role, batch in trained.batches:
        if role == "solver":
            assert len(batch["completion_ids"]) == 3 and batch["completion_mask"].any(dim=1).all()
            assert len(batch["model_inputs"].groups) == 1


def test_every_process_reads_whole_images_and_none_twice():
    def rows(rank, world_size, images):
        sampler = RolloutSampler(12, RoleSchedule(2), images, 2, seed=0, rank=rank, world_size=world_size)
        return list(sampler)

    whole, parts = rows(0, 1, 4), [rows(rank, 2, 2) for rank in range(2)]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole
    assert sorted(index for batch in whole for index in batch) == list(range(12))


def test_a_row_needs_nothing_but_an_image_and_its_other_columns_are_left_alone(base, tmp_path):
    images = noise_images(6)
    bare = Dataset.from_dict({"image": images})
    laden = Dataset.from_dict(
        {"image": images, "prompt": ["?"] * 6, "answer": ["1"] * 6, "question": ["Which?"] * 6, "images": [1] * 6}
    )
    runs = [make(base, tmp_path / str(i), dataset=dataset) for i, dataset in enumerate((bare, laden))]
    for trainer in runs:
        trainer.train()
    assert records_of(runs[0]) == records_of(runs[1])
    assert largest_difference(snapshot(runs[0]), snapshot(runs[1])) == 0.0


class AgreeingTrainer(WatchedTrainer):
    """All answers agree, after 1, 7 and 61 words."""

    def _decode(self, ids):
        return [f"<question>What?</question>{' so' * (0, 6, 60)[i % 3]} <answer>1</answer>" for i in range(len(ids))]


@pytest.mark.parametrize("baseline", ["ema", "group"])
def test_a_unanimous_group_is_not_blown_up_into_a_length_reward(base, baseline, tmp_path):
    trainer = make(base, tmp_path, AgreeingTrainer, baseline=baseline)
    trainer.train()
    records = records_of(trainer)
    assert all(record["agreement"] == 1.0 for record in records)
    for record in records:
        rewards = [answer["reward"] for answer in record["answers"]]
        assert rewards == pytest.approx([1, 1 - 0.1 / 6, 0.9])
        # Divided by the group's standard deviation, these would be as large as 1.4
        assert all(abs(answer["advantage"]) <= 0.1 for answer in record["answers"])


# What is refused, and what the error says


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True}, "`use_vllm=True` is not supported.*Set rollout=.vllm."),
        ({"scale_rewards": "group"}, "scale_rewards='group' is not supported.*Set scale_rewards='none'"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' is not supported.*Set scale_rewards='none'"),
        ({"num_iterations": 2}, "num_iterations=2.*exactly one optimizer step. Leave `num_iterations`"),
        ({"steps_per_generation": 4}, "steps_per_generation=4.*exactly one optimizer step"),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
            r"per_device_train_batch_size \(4\) times gradient_accumulation_steps \(1\) must be a multiple of "
            r"num_generations \(3\).*Set per_device_train_batch_size=3",
        ),
        ({"reward": "binary"}, r"reward='binary'; expected one of \('continuous', 'discrete'\)"),
        ({"baseline": "mean"}, r"baseline='mean'; expected one of \('ema', 'group'\)"),
        ({"adapters": "both"}, r"adapters='both'; expected one of \('separate', 'shared'\)"),
        ({"extra_votes": -1}, "extra_votes=-1; expected 0 or more"),
        ({"agreement_band": [0.8, 0.2]}, r"agreement_band=\[0.8, 0.2\]; expected two shares, 0 <= low <= high <= 1"),
        (
            {"baseline": "group", "gradient_accumulation_steps": 1},
            "a rollout has 1 image. Raise gradient_accumulation",
        ),
        ({"proposer_beta": 0.0}, "either both roles have a reference model or neither has"),
        ({"prompts": {"solver": "Answer."}}, "must contain the field {question}"),
        (
            {"prompts": {"judge": "?"}},
            r"Unknown names in `prompts`: \['judge'\]. Expected some of \['proposer', 'solver'",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_what_to_do(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "peft_config", "message"),
    [
        (
            {},
            {"target_modules": ["q_proj", "lm_head"]},
            "`?lm_head`?.*never be trained.*Remove `?'lm_head'`? from your",
        ),
        (
            {},
            {"target_modules": ["q_proj", "qkv"], "exclude_modules": "nothing"},
            r"puts 2 LoRA layers into the vision tower \(such as model.visual.*set freeze_vision_tower=False",
        ),
        ({}, {"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\].*Remove them"),
        ({}, {"bias": "all"}, "trains biases or uses DoRA.*Set bias='none'"),
        ({}, {"use_dora": True}, "trains biases or uses DoRA.*use_dora=False"),
    ],
)
def test_an_adapter_that_would_not_be_trained_or_not_be_its_role_s_alone_is_refused(
    base, options, peft_config, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        make(base, tmp_path, peft_config=lora(**peft_config), **options)


def test_adapters_of_two_configs_have_their_own_shapes_and_a_wrong_key_is_refused(base, tmp_path):
    trainer = make(base, tmp_path, peft_config={"solver": lora(r=2), "proposer": lora(r=6, target_modules=["q_proj"])})
    ranks = {
        adapter: {p.shape[0] for name, p in trainer.model.named_parameters() if f"lora_A.{adapter}" in name}
        for adapter in ("default", "proposer")
    }
    assert ranks == {"default": {2}, "proposer": {6}}
    trainer.train()
    assert all(".proposer." in name and ".q_proj." in name for name in trainer.watch.moved(2)) and trainer.watch.moved(
        2
    )
    with pytest.raises(ValueError, match=r"keys \['asker', 'solver'\]; expected exactly \['solver', 'proposer'\]"):
        make(base, tmp_path, peft_config={"solver": lora(), "asker": lora()})
    with pytest.raises(ValueError, match="`adapters='shared'` needs one `LoraConfig` for both roles"):
        make(base, tmp_path, peft_config={"solver": lora(), "proposer": lora()}, adapters="shared")


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_only")
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_cannot_see_is_refused(text_only, loaded, tmp_path):
    model = Qwen2ForCausalLM.from_pretrained(text_only) if loaded else text_only
    with pytest.raises(
        ValueError, match="vision tower: `EvoLMMTrainer` trains vision-language models. Pass one, such as"
    ):
        make(model, tmp_path)


def test_a_tokenizer_in_place_of_a_processor_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="which cannot read images. Pass the model's processor, or leave it unset"):
        make(base, tmp_path, trainer_options={"processing_class": tiny_tokenizer()})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"text": ["a"]}), r"columns \['text'\], expected a column `image`.*rename_column"),
        (Dataset.from_dict({"image": []}), "The dataset is empty, expected at least one row"),
    ],
)
def test_a_dataset_without_images_is_refused_at_once(base, dataset, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(base, tmp_path, dataset=dataset)


def test_missing_and_wrong_arguments_are_named(base, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is missing; pass a dataset with a column 'image'"):
        EvoLMMTrainer(model=base, args=config(tmp_path))
    with pytest.raises(TypeError, match="`args` is a GRPOConfig; expected an `EvoLMMConfig`"):
        EvoLMMTrainer(model=base, args=GRPOConfig(str(tmp_path), use_cpu=True), train_dataset=image_dataset())


# TRL's private methods move between minor releases


def test_trl_is_pinned_to_the_minor_release_whose_methods_are_used():
    pinned = next(r for r in map(Requirement, requires("evolmm-trl")) if r.name == "trl")
    assert "1.16.5" in pinned.specifier and "1.17.0" not in pinned.specifier and "1.15.9" not in pinned.specifier
    assert trl.__version__ in pinned.specifier


# Of GRPOTrainer and its parents: what EvoLMMTrainer overrides or calls
SIGNATURES = {
    "__init__": "self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, "
    "reward_processing_classes=None, callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, "
    "tools=None, rollout_func=None, environment_factory=None",
    "_calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    "_finish_current_push": "self",
    "_get_grad_norm": "self, model, grad_norm=None",
    "_get_learning_rate": "self",
    "_get_output_dir": "self, trial",
    "_get_per_token_logps_and_entropies": "self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, "
    "compute_entropy=False, compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, "
    "pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, "
    "mm_token_type_ids=None, image_position_ids=None",
    "_load_best_model": "self",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model=None",
    "_load_optimizer_and_scheduler": "self, checkpoint",
    "_prepare_inputs": "self, generation_batch",
    "_push_from_checkpoint": "self, checkpoint_folder",
    "_run_epoch": "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "_save": "self, output_dir=None, state_dict=None",
    "_save_checkpoint": "self, model, trial",
    "_save_rng_state": "self, output_dir",
    "_set_signature_columns_if_needed": "self",
    "compute_loss": "self, model, inputs, return_outputs=False, num_items_in_batch=None",
    "compute_loss_context_manager": "self",
    "create_model_card": "self, model_name=None, dataset_name=None, tags=None",
    "create_optimizer": "self, model=None",
    "evaluation_loop": "self, dataloader, description, prediction_loss_only=None, ignore_keys=None, "
    "metric_key_prefix='eval'",
    "get_batch_samples": "self, epoch_iterator, num_batches, device",
    "get_decay_parameter_names": "self, model",
    "get_eval_dataloader": "self, eval_dataset=None",
    "get_optimizer_cls_and_kwargs": "args, model=None",
    "get_train_dataloader": "self",
    "is_world_process_zero": "self",
    "log": "self, logs, start_time=None",
    "train": "self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None",
    "training_step": "self, model, inputs, num_items_in_batch",
}


def written_signature(function):
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_method_of_trl_that_is_used_has_the_signature_it_had(name):
    assert written_signature(getattr(GRPOTrainer, name)) == SIGNATURES[name]


def test_every_method_of_trl_that_is_used_is_in_the_list_of_signatures():
    # The trainer, and the rooms of it that are classes of their own
    own = [cls for cls in EvoLMMTrainer.__mro__ if cls.__module__.startswith("evolmm_trl.")]
    assert own[0] is EvoLMMTrainer
    called = {
        node.attr
        for cls in own
        for node in ast.walk(ast.parse(inspect.getsource(cls)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    defined = {name for cls in own for name in vars(cls) if name == "__init__" or not name.startswith("__")}
    assert {name for name in called | defined if callable(getattr(GRPOTrainer, name, None))} == set(SIGNATURES)


# Without PEFT, and with one adapter


def test_without_peft_both_roles_train_all_weights_against_trl_s_reference_model(base, tmp_path):
    trainer = make(base, tmp_path, peft_config=False, learning_rate=1e-3, max_steps=6)
    reference = {name: tensor.clone() for name, tensor in trainer.ref_model.state_dict().items()}
    trainer.train()
    for step in range(6):
        assert any("q_proj" in name for name in trainer.watch.moved(step))
        assert any("embed_tokens" in name for name in trainer.watch.moved(step))
    assert largest_difference(trainer.ref_model.state_dict(), reference) == 0.0
    assert logged(trainer, "solver/kl")[0] == 0.0 and logged(trainer, "solver/kl")[-1] > 1e-3
    assert logged(trainer, "proposer/kl")[0] > 1e-4  # the solver's steps have moved the shared weights


def test_a_shared_adapter_is_trained_by_both_roles_and_saved_alone(base, tmp_path):
    trainer = make(base, tmp_path, adapters="shared", max_steps=6, save_strategy="steps", save_steps=6)
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]
    for step in range(6):
        moved = trainer.watch.moved(step)
        assert moved and all(".default." in name for name in moved)
    assert logged(trainer, "proposer/kl")[0] > 1e-4
    assert not (tmp_path / "checkpoint-6" / "proposer").exists()
    resumed = make(base, tmp_path, adapters="shared", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert largest_difference(snapshot(resumed), snapshot(trainer)) == 0.0


# Settings do what they say


def test_outside_the_agreement_band_nothing_moves_not_by_one_bit(base, tmp_path):
    trainer = make(base, tmp_path, agreement_band=[1.0, 1.0], max_steps=18, proposer_update_every=5, weight_decay=0.1)
    trainer.train()
    inside, outside = [], []
    for record in records_of(trainer):
        assert (record["trained_on"]["solver"] is not None) == (record["agreement"] == 1.0)
        (inside if record["agreement"] == 1.0 else outside).append(record["step"])
    for step in range(18):
        if step % 6 == 5:
            continue
        rows = sum(len(batch["completion_ids"]) for at, _, batch in trainer.batches if at == step)
        if step + 1 in inside:
            assert rows == 3 * inside.count(step + 1)
            assert trainer.watch.moved(step)
        else:
            assert not trainer.watch.moved(step)
    skipped = sorted(set(outside) - set(inside))
    # A first step that has nothing to train on, and one after the momentum has begun
    assert 1 in skipped and skipped[-1] > min(inside)
    assert len(logged(trainer, "solver/kl")) == len(set(inside))


def test_the_baseline_within_the_agreement_band_is_that_of_the_answers_that_are_trained_on(base, tmp_path):
    trainer = make(base, tmp_path, agreement_band=[0.6, 0.7], gradient_accumulation_steps=4, max_steps=5)
    trainer.train()
    by_step = {}
    for record in records_of(trainer):
        rewards, advantages = by_step.setdefault(record["step"], ([], []))
        if record["trained_on"]["solver"]:
            rewards += [answer["reward"] for answer in record["answers"]]
            advantages += [answer["advantage"] for answer in record["answers"]]
    assert any(len(rewards) < 12 for rewards, _ in by_step.values())
    baseline = None
    for rewards, advantages in by_step.values():
        if rewards:
            mean = sum(rewards) / len(rewards)
            baseline = mean if baseline is None else baseline
            assert advantages == pytest.approx([reward - baseline for reward in rewards], abs=1e-5)
            baseline = 0.9 * baseline + 0.1 * mean
    assert trainer.baselines["solver"].value == pytest.approx(baseline, abs=1e-5)


def test_within_the_agreement_band_groups_stay_whole_and_metrics_are_those_of_their_tokens(base, tmp_path):
    runs = []
    for per_device, accumulation in ((3, 4), (12, 1)):
        trainer = make(
            base,
            tmp_path / str(accumulation),
            agreement_band=[0.6, 0.7],
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            adam_epsilon=1e-4,
            max_steps=5,
        )
        trainer.train()
        runs.append(trainer)
    one, other = runs
    assert records_of(one) == records_of(other)
    assert largest_difference(snapshot(one), snapshot(other)) < 1e-5
    for metric in ("solver/kl", "solver/entropy", "proposer/entropy"):
        assert logged(one, metric) and logged(one, metric) == pytest.approx(logged(other, metric), abs=1e-5)
    # A micro-batch without a group is one row that does not count
    rows = [
        (len(b["completion_ids"]), bool(b["completion_mask"].any())) for _, role, b in one.batches if role == "solver"
    ]
    assert set(rows) == {(3, True), (1, False)}


RUN = """
import sys

import torch
from tiny_trainer import TalkingTrainer, config, image_dataset, lora, snapshot

base, folder, accumulation = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {"max_steps": 6, "agreement_band": [0.6, 1.0], "adam_epsilon": 1e-4}
args = config(folder, gradient_accumulation_steps=accumulation, **options)
trainer = TalkingTrainer(model=base, args=args, train_dataset=image_dataset(), peft_config=lora())
before = snapshot(trainer)
trainer.train()
result = {
    "world": (trainer.accelerator.num_processes, trainer.accelerator.distributed_type.value),
    "before": before,
    "after": snapshot(trainer),
}
torch.save(result, f"{folder}/result-{trainer.accelerator.process_index}.pt")
trainer.accelerator.end_training()  # left alone, gloo's threads now and then abort a process that has ended
"""


def test_two_processes_of_which_one_has_fewer_groups_within_the_band_train_as_one_process_does(base, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for processes, accumulation in ((1, 4), (2, 2)):
        command = [*launch, str(processes), str(script), base, str(tmp_path / str(processes)), str(accumulation)]
        subprocess.run(command, env=environment, check=True, timeout=1200, capture_output=True)
    one, first, second = (torch.load(tmp_path / name) for name in ("1/result-0.pt", "2/result-0.pt", "2/result-1.pt"))
    assert one["world"][0] == 1 and first["world"] == second["world"] == (2, "MULTI_CPU")
    assert largest_difference(first["after"], second["after"]) == 0.0
    assert largest_difference(first["after"], one["after"]) < 1e-5
    assert largest_difference(one["after"], one["before"]) > 1e-2
    records = [json.loads(line) for line in (tmp_path / "2" / "rollouts.jsonl").read_text().splitlines()]
    rollouts = [[r["trained_on"]["solver"] is not None for r in records if r["step"] == step] for step in (1, 2, 4, 5)]
    # Of the four images of a rollout, each process has two
    assert any(sum(rollout[:2]) != sum(rollout[2:]) for rollout in rollouts)


def test_extra_votes_count_in_the_vote_and_are_not_trained_on(base, tmp_path):
    trainer = make(base, tmp_path, extra_votes=4)
    trainer.train()
    for record in records_of(trainer):
        assert len(record["answers"]) == 7
        assert [answer["reward"] is not None for answer in record["answers"]] == [True] * 3 + [False] * 4
        assert record["agreement"] * 7 == pytest.approx(max(record["votes"].values(), default=0))
    solver = [[len(group) for group in ids] for role, ids in trainer.sampled if role == "solver"]
    assert solver == [[7, 7], [7, 7]]
    assert sum(len(batch["completion_ids"]) for _, role, batch in trainer.batches if role == "solver") == 12


def test_reward_funcs_are_called_as_trl_calls_them_and_added_with_their_weights(base, tmp_path):
    calls = []

    def parity(prompts, completions, completion_ids, image, question, trainer_state, **kwargs):
        calls.append((prompts, completions, completion_ids, question, trainer_state.global_step))
        assert all(picture.size == (56, 56) for picture in image) and len(image) == len(prompts)
        return [float(sum(ids) % 2) for ids in completion_ids]

    def five(completions, **kwargs):
        return [5.0] * len(completions)

    options = {"reward_funcs": [parity, five]}
    paid = make(base, tmp_path / "paid", reward_weights=[0.5, 2.0], max_steps=1, trainer_options=options)
    unpaid = make(base, tmp_path / "unpaid", max_steps=1)
    for trainer in (paid, unpaid):
        trainer.train()
    prompts, completions, completion_ids, question, step = calls[0]
    assert step == 0 and completion_ids == sum(paid.sampled[1][1], [])
    assert completions == [[{"role": "assistant", "content": as_speech(ids)}] for ids in completion_ids]
    for i, (with_pay, without) in enumerate(zip(records_of(paid), records_of(unpaid), strict=True)):
        for n, (one, other) in enumerate(zip(with_pay["answers"], without["answers"], strict=True)):
            assert one["completion"] == other["completion"]
            extra = 0.5 * (sum(completion_ids[3 * i + n]) % 2) + 2.0 * 5.0
            assert one["reward"] == pytest.approx(other["reward"] + extra)
            assert question[3 * i + n] == with_pay["question"] and with_pay["question"] in str(prompts[3 * i + n])
        assert with_pay["proposer_reward"] == without["proposer_reward"]
    assert logged(paid, "rewards/five/mean") == [5.0]


def test_a_proposer_that_is_not_trained_asks_as_the_base_does(base, tmp_path):
    trainer = make(base, tmp_path, train_proposer=False, max_steps=6)
    trainer.train()
    assert [role for _, role, _ in trainer.batches] == ["solver"] * 12
    assert all(".default." in name for step in range(6) for name in trainer.watch.moved(step))
    assert len(records_of(trainer)) == 12 and not trainer._pending_questions
    assert all(record["trained_on"]["proposer"] is None for record in records_of(trainer))
    with trainer.roles.using("proposer"):
        asked = logits(trainer.model, trainer)
    with trainer.roles.reference():
        assert torch.equal(asked, logits(trainer.model, trainer))


def test_truncated_completions_are_masked_and_do_not_dilute_the_others(base, tmp_path):
    class EndingTrainer(WatchedTrainer):
        """Every other completion of the solver ends; in its second step none does."""

        def _generate_role(self, model, role, prompts, seeds):
            ids = super()._generate_role(model, role, prompts, seeds)
            end = self.processing_class.tokenizer.eos_token_id
            number = count()
            if role == "proposer" or self.state.global_step == 0:
                ids = [[[*row[:3], end] if next(number) % 2 else row for row in group] for group in ids]
            return ids

    trainer = make(base, tmp_path, EndingTrainer, mask_truncated_completions=True, loss_type="dapo")
    trainer.train()
    for step, tokens in ((0, 3 * 4), (1, 0), (2, 2 * 4)):
        batches = [batch for at, _, batch in trainer.batches if at == step]
        assert sum(batch["completion_mask"].sum() for batch in batches) == tokens
        assert all(batch["num_items_in_batch"] == tokens for batch in batches)
        assert bool(trainer.watch.moved(step)) == bool(tokens)


def test_rollouts_and_weights_do_not_depend_on_how_a_step_is_split(base, tmp_path):
    runs = []
    for per_device, accumulation in ((6, 1), (3, 2), (2, 3), (1, 6)):
        trainer = make(
            base,
            tmp_path / str(per_device),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            adam_epsilon=1e-4,
            max_steps=6,
        )
        trainer.train()
        runs.append(trainer)
    for trainer in runs[1:]:
        assert records_of(trainer) == records_of(runs[0])
        assert largest_difference(snapshot(trainer), snapshot(runs[0])) < 1e-5
        for metric in ("solver/kl", "proposer/kl"):
            assert logged(trainer, metric) == pytest.approx(logged(runs[0], metric), abs=1e-5)


class InterruptedTrainer(WatchedTrainer):
    """Ctrl-C in the forward of the second micro-batch of the second step, once."""

    interrupted = False

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if self._step == 3 and compute_entropy and not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)


def test_a_second_run_of_a_trainer_begins_anew_though_the_first_was_interrupted_within_a_step(base, tmp_path):
    trainer = make(base, tmp_path, InterruptedTrainer, beta_min=0.0, kl_rate=0.5)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = records_of(trainer)
    assert {record["step"] for record in first} == {1, 2}
    trainer.batches.clear()
    trainer.train()
    assert [at for at, role, _ in trainer.batches if role == "solver"] == [0, 0, 1, 1]
    records = records_of(trainer)
    assert [record["step"] for record in records] == [1, 1, 2, 2]
    old = (tmp_path / "rollouts.1.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in old] == first
    rewards = [answer["reward"] for record in records[:2] for answer in record["answers"]]
    assert logged(trainer, "solver/baseline")[0] == pytest.approx(sum(rewards) / len(rewards))
    assert logged(trainer, "solver/reward")[0] == pytest.approx(sum(rewards) / len(rewards))
    assert logged(trainer, "solver/beta")[0] == logged(trainer, "proposer/beta")[0] == 0.001
    assert logged(trainer, "novel_questions")[0] == len({r["question"] for r in records[:2]}) / 2


def test_questions_kept_as_features_are_not_resumed_on_the_plain_path(base, tmp_path):
    make(base, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="the vision tower's features.*resume with shared_prefix=True"):
        make(base, tmp_path, shared_prefix=False).train(resume_from_checkpoint=True)


def test_a_given_optimizer_that_deepspeed_would_step_without_samples_is_refused(base, tmp_path):
    class UnderDeepSpeed(TalkingTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="DeepSpeed would step.*agreement_band.*`args.optim`"):
        UnderDeepSpeed(
            model=model,
            args=config(tmp_path, beta=0.0, agreement_band=[0.5, 1.0]),
            train_dataset=image_dataset(),
            optimizers=(optimizer, None),
        )


# Datasets


def test_a_stream_trains_as_the_same_rows_in_memory_do(base, tmp_path):
    dataset = image_dataset(5)
    runs = [
        make(base, tmp_path / name, dataset=rows, shuffle_dataset=False, max_steps=6)
        for name, rows in (("memory", dataset), ("stream", dataset.to_iterable_dataset()))
    ]
    for trainer in runs:
        trainer.train()
    assert records_of(runs[0]) == records_of(runs[1])
    assert [record["image_id"] for record in records_of(runs[1])] == [str(i % 5) for i in range(8)]
    assert largest_difference(snapshot(runs[0]), snapshot(runs[1])) == 0.0


@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_are_skipped_and_named(base, streaming, tmp_path):
    file = BytesIO()
    noise_images(1)[0].save(file, "PNG")
    good = file.getvalue()
    images = [good, b"not an image", good, good[: len(good) // 2], good, b""]
    rows = [{"image": {"bytes": data, "path": None}, "image_id": f"row {i}"} for i, data in enumerate(images)]
    dataset = Dataset.from_list(rows)
    trainer = make(base, tmp_path, dataset=dataset.to_iterable_dataset() if streaming else dataset, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
    assert {record["image_id"] for record in records_of(trainer)} == {"row 0", "row 2", "row 4"}
    assert sum(trainer._images.skipped.values()) >= 3


def test_the_default_config_alone_trains(base, tmp_path):
    class StopAfterOne(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = TalkingTrainer(
        model=base,
        args=EvoLMMConfig(output_dir=str(tmp_path)),
        train_dataset=image_dataset(4),
        peft_config=LoraConfig(target_modules="all-linear"),
        callbacks=[StopAfterOne()],
    )
    before = snapshot(trainer)
    trainer.train()
    assert len(records_of(trainer)) == 4 and all(len(record["answers"]) == 5 for record in records_of(trainer))
    assert largest_difference(snapshot(trainer), before) > 0


# Evaluation and logging


def labelled(answers):
    count = len(answers)
    return Dataset.from_dict({"image": noise_images(count), "question": ["Which?"] * count, "answer": answers})


class RehearsedTrainer(WatchedTrainer):
    """Answers labelled questions greedily with 7, and when sampled with 1, 1 and 2."""

    def _generate_role(self, model, role, prompts, seeds):
        assert all(group[0] is None and None not in group[1:] for group in seeds)
        return [[[7], [1], [1], [2]] for _ in prompts]

    def _decode(self, ids):
        return [f"<answer>{row[0]}</answer>" if len(row) == 1 else as_speech(row) for row in ids]


@pytest.mark.parametrize(("label", "greedy", "ahead"), [("1", 0.0, True), ("7", 1.0, False)])
def test_evaluation_scores_labelled_questions_and_warns_when_the_vote_is_not_ahead(
    base, label, greedy, ahead, tmp_path, caplog
):
    trainer = make(base, tmp_path, RehearsedTrainer, trainer_options={"eval_dataset": labelled([label] * 3 + ["9"])})
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        metrics = trainer.evaluate()
    assert metrics["eval_accuracy_greedy"] == greedy * 0.75
    assert metrics["eval_accuracy_majority"] == (0.75 if ahead else 0.0)
    assert metrics["eval_accuracy_sampled"] == pytest.approx(0.5 if ahead else 0.0)
    assert metrics["eval_agreement"] == pytest.approx(2 / 3) and metrics["eval_unreadable"] == 0.0
    warnings = [record.getMessage() for record in caplog.records if "not measurably ahead" in record.getMessage()]
    assert len(warnings) == (0 if ahead else 1)
    if warnings:
        assert "On 4 labelled questions the majority of 3 answers is -75.0 points" in warnings[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_shows_how_far_it_is(base, streamed, tmp_path, capsys):
    questions = labelled(["1"] * 7)
    if streamed:
        questions = questions.to_iterable_dataset()
    for quiet in (False, True):
        trainer = make(
            base,
            tmp_path,
            RehearsedTrainer,
            disable_tqdm=quiet,
            per_device_eval_batch_size=3,
            trainer_options={"eval_dataset": questions},
        )
        capsys.readouterr()
        trainer.evaluate()
        assert ("| 3/3 [" in capsys.readouterr().err) == (not streamed and not quiet)  # a stream's length is not known
        bars = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
        assert len(bars) == (not quiet) and all(callback.prediction_bar is None for callback in bars)


def test_evaluation_starts_before_training_and_keeps_its_metrics_apart_from_training_s(base, tmp_path, caplog):
    trainer = make(
        base,
        tmp_path,
        max_steps=6,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        trainer_options={"eval_dataset": labelled(["1", "2"])},
    )
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_accuracy_greedy" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    for row in evaluations:
        assert {name for name in row if not name.startswith("eval_")} == {"epoch", "step"}
    records = records_of(trainer)
    for row in (row for row in trainer.state.log_history if "agreement" in row):
        logged_here = [record["agreement"] for record in records if row["step"] - 3 < record["step"] <= row["step"]]
        assert row["agreement"] == pytest.approx(sum(logged_here) / len(logged_here))
        assert {"solver/kl", "proposer/kl"} <= set(row)


def test_an_eval_dataset_without_labels_is_refused(base, tmp_path):
    trainer = make(base, tmp_path, trainer_options={"eval_dataset": image_dataset(2)})
    with pytest.raises(
        ValueError, match=r"`eval_dataset` has the columns \['image'\]; expected 'image', 'question' and"
    ):
        trainer.train()


def test_evaluation_leaves_training_as_it_was(base, trained, tmp_path):
    trainer = make(
        base,
        tmp_path,
        max_steps=6,
        adam_epsilon=1e-4,
        eval_strategy="steps",
        eval_steps=1,
        trainer_options={"eval_dataset": labelled(["1", "2"])},
    )
    trainer.train()
    assert records_of(trainer) == records_of(trained)
    assert largest_difference(snapshot(trainer), snapshot(trained)) == 0.0


def test_completions_are_written_to_trl_s_tables(base, tmp_path):
    trainer = make(base, tmp_path, log_completions=True)
    trainer.train()
    records = records_of(trainer)
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        answers = [answer for record in records if record["step"] == step for answer in record["answers"]]
        assert list(table["step"]) == [step] * 6
        assert [row[0]["content"] for row in table["completion"]] == [answer["completion"] for answer in answers]
        assert list(table["reward"]) == pytest.approx([answer["reward"] for answer in answers])
        assert list(table["advantage"]) == pytest.approx([answer["advantage"] for answer in answers])
        questions = [re.search("Question: (.*)", row[0]["content"])[1] for row in table["prompt"]]
        assert questions == [record["question"] for record in records if record["step"] == step for _ in range(3)]


def test_metrics_reach_tensorboard(base, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(base, tmp_path / "run", report_to="tensorboard")
    trainer.train()
    folder = next((tmp_path).rglob("events.out.tfevents*")).parent
    events = accumulator.EventAccumulator(str(folder)).Reload()
    for metric in ("agreement", "solver/kl", "solver/reward", "proposer/beta"):
        assert [event.value for event in events.Scalars(f"train/{metric}")] == pytest.approx(logged(trainer, metric))


def test_adapters_of_a_quantized_base_are_put_back_into_float32_which_trl_rounds_away(tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(tiny_qwen2_5_vl(tmp_path / "model"))
    model = get_peft_model(base, lora())
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for parameter in adapters.values():
        parameter.data = parameter.data.to(torch.bfloat16)  # what TRL does to a quantized model
    keep_adapters_precise(model)
    assert {p.dtype for p in adapters.values()} == {torch.bfloat16}  # not quantized: left alone
    base.is_loaded_in_4bit = True
    keep_adapters_precise(model)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
