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

"""InternVL3, Gemma 3 and Llama 3.2 Vision beside the Qwen families: their images, their masks, their towers."""

import inspect
import io
import json
import logging
import pickle
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import jinja2
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from tiny_models import tiny_gemma3, tiny_internvl, tiny_mllama, tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, Watch, config, logged, lora, noise_images, snapshot
from transformers import AutoModelForImageTextToText, Gemma3Processor, MllamaProcessor
from transformers.utils import is_torchvision_available
from trl import GRPOTrainer

from evolmm_trl import RolePrompts, load_processor
from evolmm_trl.memory import what_is_trained
from evolmm_trl.processing import special_tokens
from evolmm_trl.prompts import read_question
from evolmm_trl.role_adapters import RoleAdapters, matched_but_left_out, role_lora_configs, vision_modules
from evolmm_trl.rollout.generation import generate
from evolmm_trl.rollout.samples import Sample, collate_prompts, encode_prompts
from evolmm_trl.state import load_samples, save_samples


QWEN = {"qwen2_5_vl": tiny_qwen2_5_vl, "qwen3_vl": tiny_qwen3_vl}
OTHERS = {"internvl": tiny_internvl, "gemma3": tiny_gemma3, "mllama": tiny_mllama}
FAMILIES = QWEN | OTHERS
VISION = {
    "qwen2_5_vl": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "internvl": ["model.vision_tower", "model.multi_modal_projector"],
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "mllama": ["model.vision_model", "model.multi_modal_projector"],
}
# Of the tower and the projector: what has the name of a module of the language model, and what has not
SHARED_NAMES = {
    "qwen2_5_vl": {"gate_proj", "up_proj", "down_proj"},
    "qwen3_vl": set(),
    "internvl": {"q_proj", "k_proj", "v_proj"},
    "gemma3": {"q_proj", "k_proj", "v_proj"},
    "mllama": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
OWN_NAMES = {
    "qwen2_5_vl": {"qkv", "proj", "0", "2"},
    "qwen3_vl": {"qkv", "proj", "linear_fc1", "linear_fc2"},
    "internvl": {"projection_layer", "fc1", "fc2", "linear_1", "linear_2"},
    "gemma3": {"out_proj", "fc1", "fc2"},
    "mllama": {"fc1", "fc2", "multi_modal_projector"},
}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ADAPTER = {"solver": ".default.", "proposer": ".proposer."}

SIZES = ((56, 56), (28, 28), (84, 28), (28, 56))
QUESTIONS = ("How many bars?", "What?", "Which of the bars is the tallest one?", "Is it red?")
COMPLETIONS = ([5, 9], [17, 3, 8, 200, 41], [77], [31, 32, 33, 34])


def pictures(seed=0):
    """Images of several tiles, of one, of several beside each other, and of two."""
    return [noise_images(1, side=84, seed=seed + i)[0].crop((0, 0, *size)) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: str(make(folder / family)) for family, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def make_trainer(base, folder, trainer_class=TalkingTrainer, peft_config=None, processing_class=None, **options):
    return trainer_class(
        model=base,
        args=config(folder, **options),
        train_dataset=Dataset.from_dict({"image": pictures()}),
        processing_class=processing_class,
        peft_config=lora() if peft_config is None else peft_config or None,
    )


@pytest.fixture(scope="module", params=OTHERS)
def trained(request, bases, tmp_path_factory):
    """Six steps of both roles, with all that was printed and warned of."""
    said, printed = [], io.StringIO()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("evolmm_trl").addHandler(handler)
    with redirect_stdout(printed):
        trainer = make_trainer(
            bases[request.param],
            tmp_path_factory.mktemp(request.param),
            max_steps=6,
            save_strategy="steps",
            save_steps=6,
            adam_epsilon=1e-4,
        )
        watch = Watch()
        trainer.add_callback(watch)
        before = snapshot(trainer)
        trainer.train()
    logging.getLogger("evolmm_trl").removeHandler(handler)
    return SimpleNamespace(
        family=request.param,
        base=bases[request.param],
        trainer=trainer,
        watch=watch,
        before=before,
        said=said,
        printed=printed.getvalue(),
    )


# Training


def test_each_role_s_steps_move_its_adapter_and_nothing_else(trained):
    for step in range(6):
        role = trained.trainer.schedule.role(step)
        assert role == ("proposer" if step % 3 == 2 else "solver")
        moved = trained.watch.moved(step)
        assert moved and all(ADAPTER[role] in name and ".language_model." in name for name in moved)
    after = snapshot(trained.trainer)
    vision = [name for name in after if any(f".{module}." in name for module in VISION[trained.family])]
    assert len(vision) > 20
    for name in vision:
        assert torch.equal(after[name], trained.before[name])


def test_the_kl_starts_at_zero_and_rises(trained):
    kl = logged(trained.trainer, "solver/kl")
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-4
    assert trained.trainer._first_batch_checked == trained.trainer._first_step_checked == {"solver", "proposer"}


def test_the_plain_path_is_taken_and_said_once(trained):
    assert not trained.trainer._share_prefix and not trained.trainer._share_features
    said = [message for message in trained.said if "once per answer rather than once per question" in message]
    assert len(said) == 1
    assert f"it is verified for qwen2_5_vl and qwen3_vl, and this model is a {trained.family}." in said[0]


@pytest.mark.parametrize("family", OTHERS)
def test_an_update_that_does_not_see_the_image_is_refused(bases, family, tmp_path):
    class BlindTrainer(TalkingTrainer):
        def _collate(self, *args, **kwargs):
            batch = super()._collate(*args, **kwargs)
            batch["model_inputs"]["pixel_values"].zero_()
            return batch

    trainer = make_trainer(bases[family], tmp_path, BlindTrainer)
    with pytest.raises(RuntimeError, match="The solver's log-probs do not change with the image"):
        trainer.train()


@pytest.mark.parametrize("family", OTHERS)
def test_tower_and_projector_are_frozen_without_adapters_too(bases, family, tmp_path):
    trainer = make_trainer(bases[family], tmp_path, peft_config=False, max_steps=1)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(".language_model." in name for name in moved)
    assert not any(name.startswith(tuple(VISION[family])) for name in moved)


def test_a_tower_that_is_asked_for_is_trained(bases, tmp_path):
    trainer = make_trainer(bases["mllama"], tmp_path, max_steps=2, proposer_update_every=1, freeze_vision_tower=False)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    for step, role in enumerate(("solver", "proposer")):
        inside = {name for name in watch.moved(step) if ".vision_model." in name or ".multi_modal_projector." in name}
        assert inside and all(ADAPTER[role] in name for name in inside)


def test_a_checkpoint_is_loaded_by_plain_peft(trained):
    trainer = trained.trainer
    folder = trainer.rollout_log.path.parent / "checkpoint-6"
    batch = collate_prompts(encode(trainer.processing_class), trainer._tokenizer.pad_token_id)

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits[:, -1]

    outputs = {"base": logits(AutoModelForImageTextToText.from_pretrained(trained.base, dtype=torch.float32))}
    for role, subfolder in (("solver", None), ("proposer", "proposer")):
        model = AutoModelForImageTextToText.from_pretrained(trained.base, dtype=torch.float32)
        outputs[role] = logits(PeftModel.from_pretrained(model, folder, subfolder=subfolder))
        with trainer.roles.using(role):
            torch.testing.assert_close(outputs[role], logits(trainer.model), atol=1e-5, rtol=0)
    with trainer.roles.reference():
        torch.testing.assert_close(outputs["base"], logits(trainer.model), atol=0, rtol=0)
    for one, other in (("solver", "proposer"), ("solver", "base"), ("proposer", "base")):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3


# What the model reads


def conversation(question, image=None):
    messages = RolePrompts(solver="{question}").solver_messages(question)
    if image is not None:
        messages[0]["content"][0]["image"] = image
    return messages


def encode(processor, images=None):
    return encode_prompts(processor, [conversation(q) for q in QUESTIONS], pictures() if images is None else images)


def by_the_processor(processor, question, image):
    """The inputs of one conversation, by the processor's own way from a conversation to tensors."""
    return processor.apply_chat_template(
        [conversation(question, image)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def row_logps(model, inputs, completion):
    """Of a completion's tokens, by the model's own forward of one row."""
    inputs, width = dict(inputs), len(completion)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], dim=1)
    del inputs["attention_mask"]
    for name in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, width))
    if "cross_attention_mask" in inputs:  # the completion sees the image's tiles, as many as there are
        seen = inputs["aspect_ratio_mask"][:, None].expand(-1, width, -1, -1)
        inputs["cross_attention_mask"] = torch.cat([inputs["cross_attention_mask"], seen], dim=1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -width - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def with_crops(processor):
    """Gemma's pan and scan, which the processor's default turns off."""
    processor.images_kwargs = {
        **processor.images_kwargs,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 20,
    }
    return processor


def assert_log_probs_are_those_of_each_row_alone(trainer, processor):
    samples = [
        Sample(prompt, torch.tensor(completion), 0.5)
        for prompt, completion in zip(encode(processor), COMPLETIONS, strict=True)
    ]
    trainer.model.eval()
    batch = trainer._collate(samples, [True] * 4, shared=False)
    with torch.no_grad():
        logps = trainer._completion_logps(trainer.model, batch)
    for row, (question, image, completion) in enumerate(zip(QUESTIONS, pictures(), COMPLETIONS, strict=True)):
        alone = row_logps(trainer.model, by_the_processor(processor, question, image), completion)
        torch.testing.assert_close(logps[row, : len(completion)], alone, atol=1e-5, rtol=0)
        blank = Image.new("RGB", image.size)
        other = row_logps(trainer.model, by_the_processor(processor, question, blank), completion)
        assert (alone - other).abs().max() > 1e-4


@pytest.mark.parametrize("role", ["solver", "proposer"])
def test_log_probs_of_a_ragged_batch_are_those_of_each_row_alone(trained, role):
    with trained.trainer.roles.using(role):
        assert_log_probs_are_those_of_each_row_alone(trained.trainer, trained.trainer.processing_class)


def test_trl_s_forward_alone_does_not_hand_on_what_llama_needs(bases, tmp_path):
    trainer = make_trainer(bases["mllama"], tmp_path)
    inputs = by_the_processor(trainer.processing_class, QUESTIONS[0], pictures()[0])
    known = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert set(inputs) - set(known) == {"aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"}
    with pytest.raises(ValueError, match="`aspect_ratio_ids` must be provided"):
        GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            inputs["input_ids"],
            inputs["attention_mask"],
            2,
            pixel_values=inputs["pixel_values"],
            num_images=[1],
        )


def test_images_have_as_many_tiles_and_crops_as_their_family_gives_them(bases):
    rows = {
        name: [len(prompt.image_inputs["pixel_values"]) for prompt in encode(load_processor(bases[name]))]
        for name in OTHERS
    }
    assert rows == {"internvl": [5, 1, 4, 3], "gemma3": [1, 1, 1, 1], "mllama": [1, 1, 1, 1]}
    tiles = [
        prompt.image_inputs["aspect_ratio_mask"].sum().item() for prompt in encode(load_processor(bases["mllama"]))
    ]
    assert tiles == [4, 1, 3, 2]
    crops = [
        len(prompt.image_inputs["pixel_values"]) for prompt in encode(with_crops(load_processor(bases["gemma3"])))
    ]
    assert crops == [1, 1, 4, 3]


def test_log_probs_with_gemma_s_crops_are_those_of_each_row_alone(bases, tmp_path):
    processor = with_crops(load_processor(bases["gemma3"]))
    trainer = make_trainer(bases["gemma3"], tmp_path, processing_class=processor, max_steps=1)
    trainer.train()
    assert_log_probs_are_those_of_each_row_alone(trainer, processor)


def test_a_prompt_is_what_the_processor_makes_of_the_conversation(bases, family):
    processor = load_processor(bases[family])
    for prompt, question, image in zip(encode(processor), QUESTIONS, pictures(), strict=True):
        expected = by_the_processor(processor, question, image)
        tensors = {**prompt.token_inputs, "input_ids": prompt.input_ids}
        assert {*tensors, *prompt.image_inputs, "attention_mask"} == set(expected)
        assert all(tensor.equal(expected[name][0]) for name, tensor in tensors.items())
        assert all(tensor.equal(expected[name]) for name, tensor in prompt.image_inputs.items())


@pytest.mark.parametrize("family", ["gemma3", "mllama"])
def test_a_prompt_begins_once(bases, family):
    processor = load_processor(bases[family])
    for prompt in encode(processor):
        assert (prompt.input_ids == processor.tokenizer.bos_token_id).tolist().index(True) == 0
        assert (prompt.input_ids == processor.tokenizer.bos_token_id).sum() == 1


def test_prompts_come_back_from_disk_as_they_were(bases, family, tmp_path):
    samples = [Sample(prompt, torch.tensor([3, 4]), 0.5) for prompt in encode(load_processor(bases[family]))]
    save_samples(samples, tmp_path / "samples.safetensors")
    for loaded, sample in zip(load_samples(tmp_path / "samples.safetensors"), samples, strict=True):
        for part in ("token_inputs", "image_inputs"):
            one, other = getattr(loaded.prompt, part), getattr(sample.prompt, part)
            assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_no_question_brings_a_turn_or_an_image_of_its_own(bases, family):
    processor = load_processor(bases[family])
    tokenizer = processor.tokenizer
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(marks) >= 7
    special = set(tokenizer.convert_tokens_to_ids(marks))
    asked = read_question(f"<question>{' a '.join(marks)}b</question>", "", special_tokens(tokenizer))
    assert not asked.well_formed
    prompts = encode_prompts(processor, [conversation(asked.text), conversation("a b")], pictures()[:1] * 2)
    counts = [sum(token in special for token in prompt.input_ids.tolist()) for prompt in prompts]
    assert counts[0] == counts[1]


def test_a_template_that_refuses_the_messages_does_so_at_the_start(bases, tmp_path):
    with pytest.raises(jinja2.TemplateError, match="incompatible with system messages"):
        make_trainer(bases["mllama"], tmp_path, prompts={"system": "Be brief."})
    make_trainer(bases["gemma3"], tmp_path, prompts={"system": "Be brief."})


# Generation


def test_a_ragged_batch_is_generated_as_each_row_alone_and_sees_its_image(trained):
    trainer, processor = trained.trainer, trained.trainer.processing_class
    model = trainer.model.eval()
    settings = trainer._generation_config("solver")
    prompts, others = encode(processor), encode(processor, pictures(seed=50))
    seeds = [[None, 1], [None], [None, 2, 3], [None]]
    together = generate(model, prompts, seeds, settings)
    for row, (question, image) in enumerate(zip(QUESTIONS, pictures(), strict=True)):
        assert generate(model, prompts[row : row + 1], seeds[row : row + 1], settings) == together[row : row + 1]
        inputs = by_the_processor(processor, question, image)
        alone = model.generate(
            **inputs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            suppress_tokens=settings.suppress_tokens,
            eos_token_id=trainer.eos_token_ids,
            pad_token_id=trainer._tokenizer.pad_token_id,
        )
        assert together[row][0] == alone[0, inputs["input_ids"].size(1) :].tolist()
    assert generate(model, others, seeds, settings) != together


def test_placeholders_of_images_are_never_sampled(trained):
    trainer = trained.trainer
    image_token = trainer.model.config.image_token_id
    assert image_token in trainer._generation_config("solver").suppress_tokens
    assert image_token in encode(trainer.processing_class)[0].input_ids


# LoRA


def adapted(model):
    return {name for name, _ in model.get_base_model().named_modules() if hasattr(_, "lora_A")}


def last_names(names):
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("targets", ["all-linear", "projections", "gate_proj", r".*\.(q_proj|fc1|up_proj)"])
def test_lora_targets_leave_the_vision_tower_out(bases, family, targets):
    target_modules = {"projections": sorted(PROJECTIONS), "gate_proj": ["gate_proj"]}.get(targets, targets)
    model = AutoModelForImageTextToText.from_pretrained(bases[family])
    vision = vision_modules(model)
    assert vision == vision_modules(bases[family]) == VISION[family]
    configs = role_lora_configs(lora(target_modules=target_modules), "separate", vision)
    model = get_peft_model(model, configs["solver"])
    expected = {
        "gate_proj": {"gate_proj"},
        r".*\.(q_proj|fc1|up_proj)": {"q_proj", "up_proj"},
    }.get(targets, PROJECTIONS)
    assert last_names(adapted(model)) == expected
    assert all(".language_model." in name for name in adapted(model))
    left_out = matched_but_left_out(model, vision)
    also = {
        "all-linear": SHARED_NAMES[family] | OWN_NAMES[family],
        "projections": SHARED_NAMES[family],
        "gate_proj": SHARED_NAMES[family] & {"gate_proj"},
        r".*\.(q_proj|fc1|up_proj)": (SHARED_NAMES[family] | OWN_NAMES[family]) & {"q_proj", "fc1", "up_proj"},
    }[targets]
    assert last_names(left_out) == also
    assert all(name.startswith(tuple(vision)) for name in left_out)


def test_lora_layers_are_in_the_tower_when_it_is_asked_for(bases, family):
    model = AutoModelForImageTextToText.from_pretrained(bases[family])
    configs = role_lora_configs(lora(), "separate", ())
    model = get_peft_model(model, configs["solver"])
    inside = {name for name in adapted(model) if name.startswith(tuple(VISION[family]))}
    assert last_names(inside) == SHARED_NAMES[family] | OWN_NAMES[family]
    assert matched_but_left_out(model, VISION[family]) == []
    printed = what_is_trained(RoleAdapters(model).parameters("solver"))
    assert ("mlp.0, mlp.2" in printed) == (family == "qwen2_5_vl")


def test_the_modules_chosen_and_left_out_are_printed_once(trained):
    vision = VISION[trained.family]
    left_out = matched_but_left_out(trained.trainer.model, vision)
    names = ", ".join(sorted(SHARED_NAMES[trained.family] | OWN_NAMES[trained.family]))
    assert trained.printed.count(f"LoRA on {', '.join(sorted(PROJECTIONS))}\n") == 2  # a role each
    assert len(re.findall(r"vision tower +[\d,]+  frozen", trained.printed)) == 1
    assert (
        trained.printed.count(
            f"`target_modules` matches {len(left_out)} modules of {vision[0]} and {vision[1]} too, which are left out: {names}."
        )
        == 1
    )


# Processors


def test_processors_are_the_families_own(bases, tmp_path):
    assert type(load_processor(bases["gemma3"])) is Gemma3Processor
    assert type(load_processor(bases["mllama"])) is MllamaProcessor
    processor = load_processor(bases["internvl"])
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert type(again) is type(processor) and type(again).__name__ == "InternVLProcessor"
    assert again.image_seq_length == 4 and pickle.loads(pickle.dumps(again)).image_seq_length == 4
    for one, other in zip(encode(again), encode(processor), strict=True):
        assert one.input_ids.equal(other.input_ids)
        assert one.image_inputs["pixel_values"].equal(other.image_inputs["pixel_values"])
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "InternVLProcessor"
    assert saved["video_processor"]["video_processor_type"] == "InternVLVideoProcessor"
    assert saved["video_processor"]["size"] == saved["image_processor"]["size"]


@pytest.mark.skipif(is_torchvision_available(), reason="the image-only processor is not used")
def test_videos_raise_instead_of_being_dropped(bases):
    with pytest.raises(ValueError, match="reads images only"):
        load_processor(bases["internvl"])(text=["<video>"], videos=[[Image.new("RGB", (28, 28))] * 2])
