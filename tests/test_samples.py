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

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_qwen2_5_vl, tiny_qwen3_vl
from transformers import AutoModelForImageTextToText, BatchFeature, GenerationConfig

from evolmm_trl import RolePrompts, load_processor
from evolmm_trl.rollout.samples import (
    ProposerCollator,
    Sample,
    collate_prompts,
    collate_samples,
    encode_about,
    encode_prompts,
    split_evenly,
)
from evolmm_trl.state import load_samples, save_samples


PAD = 250
QUESTIONS = ("How many?", "How many red bars are there in the image?", "Which bar is the tallest?", "Why?")
SIZES = ((60, 60), (90, 60), (30, 60), (84, 84))
COMPLETIONS = ((70, 71, 72), (80,), (65, 66, 67, 68, 69), (90, 91))


@pytest.fixture(scope="module", params=[tiny_qwen2_5_vl, tiny_qwen3_vl], ids=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request, tmp_path_factory):
    path = request.param(tmp_path_factory.mktemp("tiny"))
    return AutoModelForImageTextToText.from_pretrained(path).eval(), load_processor(path)


@pytest.fixture
def model(checkpoint):
    return checkpoint[0]


@pytest.fixture
def processor(checkpoint):
    return checkpoint[1]


def noise(size, seed):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def images():
    return [noise(size, seed) for seed, size in enumerate(SIZES)]


def encode(processor, questions=QUESTIONS, pictures=None):
    conversations = [RolePrompts(solver="{question}").solver_messages(question) for question in questions]
    return encode_prompts(processor, conversations, images() if pictures is None else pictures)


@pytest.fixture
def samples(processor):
    """Ragged prompts about images of different sizes, with completions of different lengths."""
    rows = enumerate(zip(encode(processor), COMPLETIONS, strict=True))
    return [Sample(prompt, torch.tensor(completion), 0.1 * i - 0.15) for i, (prompt, completion) in rows]


def log_probs(model, samples):
    """The model's log-probs of each sample's completion tokens in one padded batch, as TRL's loss forwards them."""
    batch = collate_samples(samples, PAD)
    width = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            **batch["model_inputs"],
        ).logits[:, -width - 1 : -1]
    per_token = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    return [row[mask.bool()] for row, mask in zip(per_token, batch["completion_mask"], strict=True)]


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def assert_equal_prompts(one, other):
    assert one.input_ids.equal(other.input_ids)
    for part in ("token_inputs", "image_inputs", "features"):
        tensors, others = getattr(one, part) or {}, getattr(other, part) or {}
        assert tensors.keys() == others.keys()
        for name in tensors:
            assert tensors[name].dtype == others[name].dtype
            assert tensors[name].equal(others[name])


# Encoding


def test_a_row_is_encoded_as_it_is_alone(processor):
    together = encode(processor)
    assert len({prompt.input_ids.numel() for prompt in together}) > 2
    for row, prompt in enumerate(together):
        (alone,) = encode(processor, QUESTIONS[row : row + 1], images()[row : row + 1])
        assert_equal_prompts(prompt, alone)


def test_a_prompt_holds_its_conversation_and_a_placeholder_per_image_token(processor, model):
    for question, prompt in zip(QUESTIONS, encode(processor), strict=True):
        assert question in processor.tokenizer.decode(prompt.input_ids)
        placeholders = prompt.input_ids == model.config.image_token_id
        merge = processor.image_processor.merge_size
        assert placeholders.sum() == prompt.image_inputs["image_grid_thw"].prod() // merge**2 > 0
        assert prompt.image_inputs["image_grid_thw"].prod() == len(prompt.image_inputs["pixel_values"])
        assert prompt.token_inputs["mm_token_type_ids"].tolist() == placeholders.int().tolist()


def test_a_prompt_does_not_keep_the_other_rows_pixels_alive(processor):
    for prompt in encode(processor):
        pixels = prompt.image_inputs["pixel_values"]
        assert pixels.untyped_storage().nbytes() == pixels.numel() * pixels.element_size()


def test_a_processor_with_an_unknown_layout_is_refused(processor):
    class Unknown(type(processor)):
        def __call__(self, *args, **kwargs):
            return BatchFeature({**super().__call__(*args, **kwargs), "tiles": torch.zeros(1, 9)})

    unknown = Unknown(processor.image_processor, processor.tokenizer, chat_template=processor.chat_template)
    with pytest.raises(
        ValueError, match=r"Unknown returns \['tiles'\].*how to batch. Supported are Qwen2.5-VL, Qwen3-VL"
    ):
        encode(unknown)


class OneRowPerImage:
    """A processor of images alone, such as LLaVA's."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, images, **kwargs):
        encoded = self.processor(images=images, **kwargs)
        pixels = torch.tensor([[float(image.width), image.height, 1.0] for (image,) in images])
        return BatchFeature({k: encoded[k] for k in ("input_ids", "attention_mask")} | {"pixel_values": pixels})


def test_a_processor_with_one_row_per_image_is_batched_by_rows(processor):
    encoded = encode(OneRowPerImage(processor))
    batch = collate_prompts(encoded, PAD)
    assert batch["pixel_values"].tolist() == [[*size, 1.0] for size in SIZES]
    assert batch.keys() == {"input_ids", "attention_mask", "pixel_values"}


# Images preprocessed once


def test_another_conversation_about_an_image_is_encoded_as_the_processor_would(processor, monkeypatch):
    conversations = [RolePrompts().solver_messages(question) for question in QUESTIONS]
    expected = encode_prompts(processor, conversations, images())
    first = [
        replace(prompt, features={"image": torch.full((2, 3), float(i))}) for i, prompt in enumerate(encode(processor))
    ]
    monkeypatch.setattr(type(processor.image_processor), "__call__", None)  # is not asked again
    again = encode_about(processor, conversations, first, images())
    for i in range(4):
        assert_equal_prompts(replace(again[i], features=None), expected[i])
        assert again[i].image_inputs is first[i].image_inputs and again[i].features is first[i].features


def test_a_processor_of_another_layout_is_asked_again(processor):
    other = OneRowPerImage(processor)
    conversations = [RolePrompts().solver_messages(question) for question in QUESTIONS]
    again = encode_about(other, conversations, encode(other), images())
    for prompt, expected in zip(again, encode_prompts(other, conversations, images()), strict=True):
        assert prompt.input_ids.equal(expected.input_ids)


def test_the_collator_gives_every_row_the_proposer_s_prompt(processor):
    messages = RolePrompts().proposer_messages()
    rows = [{"image": image, "image_id": i} for i, image in enumerate(images())]
    collator = pickle.loads(pickle.dumps(ProposerCollator(processor, messages)))  # as a spawned worker gets it
    collated = collator(rows)
    for row, before, expected in zip(collated, rows, encode_prompts(processor, [messages] * 4, images()), strict=True):
        assert_equal_prompts(row.pop("prompt"), expected)
        assert row == before
    assert collator([]) == []


def test_a_prompt_without_pixels_keeps_its_features_alone(processor):
    prompt = encode(processor)[0]
    assert prompt.without_pixels() is prompt  # there is nothing else to know the image by
    features = {"image": torch.rand(4, 8)}
    kept = replace(prompt, features=features).without_pixels()
    assert kept.image_inputs.keys() == {"image_grid_thw"} and kept.features["image"].equal(features["image"])


# Collating


def test_prompts_are_padded_on_the_left(processor):
    prompts = encode(processor)
    batch = collate_prompts(prompts, PAD)
    width = max(prompt.input_ids.numel() for prompt in prompts)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["mm_token_type_ids"].shape == (4, width)
    for row, prompt in enumerate(prompts):
        padding = width - prompt.input_ids.numel()
        assert batch["input_ids"][row].tolist() == [PAD] * padding + prompt.input_ids.tolist()
        assert batch["attention_mask"][row].tolist() == [0] * padding + [1] * prompt.input_ids.numel()
        assert (
            batch["mm_token_type_ids"][row].tolist()
            == [0] * padding + prompt.token_inputs["mm_token_type_ids"].tolist()
        )


def test_a_collated_batch_is_what_the_processor_makes_of_all_rows(processor):
    texts = [
        processor.apply_chat_template(RolePrompts(solver="{question}").solver_messages(q), add_generation_prompt=True)
        for q in QUESTIONS
    ]
    pictures = [[image] for image in images()]
    expected = processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    batch = collate_prompts(encode(processor), processor.tokenizer.pad_token_id)
    assert batch.keys() == expected.keys()
    assert all(batch[name].equal(expected[name]) for name in batch)


def test_samples_are_padded_outwards_with_their_advantages(samples):
    batch = collate_samples(samples, PAD)
    prompts = collate_prompts([sample.prompt for sample in samples], PAD)
    assert batch["prompt_ids"].equal(prompts["input_ids"])
    assert batch["prompt_mask"].equal(prompts["attention_mask"])
    for row, completion in enumerate(COMPLETIONS):
        assert batch["completion_ids"][row].tolist() == [*completion] + [PAD] * (5 - len(completion))
        assert batch["completion_mask"][row].tolist() == [1] * len(completion) + [0] * (5 - len(completion))
    assert batch["advantages"].tolist() == pytest.approx([-0.15, -0.05, 0.05, 0.15])
    inputs = batch["model_inputs"]
    assert inputs.keys() == {"mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert inputs["mm_token_type_ids"].equal(
        torch.cat([prompts["mm_token_type_ids"], torch.zeros(4, 5, dtype=torch.long)], dim=1)
    )
    assert inputs["pixel_values"].equal(prompts["pixel_values"])
    assert inputs["image_grid_thw"].equal(prompts["image_grid_thw"])


# What the model makes of it


def test_log_probs_of_a_ragged_batch_are_those_of_its_rows_alone(model, samples):
    alone = [log_probs(model, [sample])[0] for sample in samples]
    assert_close(log_probs(model, samples), alone)
    assert_close(log_probs(model, samples[::-1]), alone[::-1])


def test_each_row_sees_its_own_image_and_no_other(model, processor, samples):
    pictures = images()
    pictures[1] = noise(SIZES[1], seed=99)
    changed = encode(processor, pictures=pictures)
    replaced = [Sample(p, s.completion_ids, s.advantage) for p, s in zip(changed, samples, strict=True)]
    before, after = log_probs(model, samples), log_probs(model, replaced)
    assert (before[1] - after[1]).abs().min() > 1e-3
    assert_close(before[:1] + before[2:], after[:1] + after[2:])


def test_log_probs_while_generating_are_those_of_the_loss(model, samples):
    inputs = collate_prompts([sample.prompt for sample in samples], PAD)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    output = model.generate(**inputs, generation_config=config, output_logits=True, return_dict_in_generate=True)
    generated = output.sequences[:, inputs["input_ids"].size(1) :]
    logits = torch.stack(output.logits, dim=1)  # (rows, steps, vocabulary)
    expected = logits.log_softmax(-1).gather(-1, generated[..., None])[..., 0]
    drawn = [Sample(sample.prompt, row, 0.0) for sample, row in zip(samples, generated, strict=True)]
    assert_close(log_probs(model, drawn), list(expected))


# Splitting


@settings(deadline=None)
@given(st.lists(st.integers(), max_size=30), st.integers(1, 12))
def test_a_split_keeps_all_samples_in_order_in_parts_that_differ_by_at_most_one(samples, parts):
    split = split_evenly(samples, parts)
    assert len(split) == parts
    assert [sample for part in split for sample in part] == samples
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1


# Keeping


def test_samples_come_back_from_disk_as_they_were(samples, tmp_path):
    seen = replace(samples[0].prompt.without_pixels(), features={"image": torch.rand(4, 8).bfloat16()})
    many = samples * 3 + [replace(samples[0], prompt=seen)]  # more than ten, whose names begin alike
    save_samples(many, tmp_path / "samples.safetensors")
    loaded = load_samples(tmp_path / "samples.safetensors")
    assert len(loaded) == len(many)
    for one, other in zip(loaded, many, strict=True):
        assert_equal_prompts(one.prompt, other.prompt)
        assert one.completion_ids.dtype == other.completion_ids.dtype
        assert one.completion_ids.equal(other.completion_ids)
        assert one.advantage == other.advantage  # to the last bit


def test_a_model_gives_loaded_samples_the_same_log_probs(model, samples, tmp_path):
    save_samples(samples, tmp_path / "samples.safetensors")
    loaded = load_samples(tmp_path / "samples.safetensors")
    for one, other in zip(log_probs(model, loaded), log_probs(model, samples), strict=True):
        assert one.equal(other)


def test_samples_without_token_types_or_with_shared_and_transposed_tensors_come_back_too(samples, tmp_path):
    shared = torch.arange(6.0).view(2, 3).T
    prompt = type(samples[0].prompt)(samples[0].prompt.input_ids[2:5], {}, {"one": shared, "two": shared})
    save_samples([Sample(prompt, torch.tensor([7]), 1 / 3)], tmp_path / "samples.safetensors")
    (loaded,) = load_samples(tmp_path / "samples.safetensors")
    assert loaded.prompt.input_ids.equal(prompt.input_ids)
    assert loaded.prompt.token_inputs == {}
    assert loaded.prompt.image_inputs.keys() == {"one", "two"}
    assert loaded.prompt.image_inputs["two"].equal(shared)


def test_no_samples_come_back_as_none(tmp_path):
    save_samples([], tmp_path / "samples.safetensors")
    assert load_samples(tmp_path / "samples.safetensors") == []
