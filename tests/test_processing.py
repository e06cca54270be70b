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

import pytest
import torch
from PIL import Image
from tiny_models import TAGS, tiny_qwen2_5_vl, tiny_qwen3_vl
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

from evolmm_trl import processing
from evolmm_trl.processing import load_processor


FAMILIES = {
    "qwen2_5_vl": (tiny_qwen2_5_vl, "Qwen2_5_VLProcessor"),
    "qwen3_vl": (tiny_qwen3_vl, "Qwen3VLProcessor"),
}
without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="the image-only processor is not used")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return FAMILIES[request.param][0](tmp_path_factory.mktemp(request.param)), FAMILIES[request.param][1]


def messages(text):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def inputs(processor, sizes=((60, 60), (90, 60))):
    texts = [
        processor.apply_chat_template(
            messages("What is the value" + " of the red bar?" * i), add_generation_prompt=True
        )
        for i in range(len(sizes))
    ]
    images = [[Image.new("RGB", size, (200, 30 * i, 0))] for i, size in enumerate(sizes)]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")


def test_gives_every_tensor_that_grpo_passes_to_the_model(checkpoint):
    path, _ = checkpoint
    processor = load_processor(path)
    batch = inputs(processor)
    expected = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert set(batch) == expected
    image_tokens = (batch["image_grid_thw"].prod(-1) // 4).tolist()
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == image_tokens
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == processor.image_token_id).long())
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(-1).sum()


def test_the_model_reads_what_the_processor_gives(checkpoint):
    path, _ = checkpoint
    model = AutoModelForImageTextToText.from_pretrained(path)
    assert model.num_parameters() < 200_000
    batch = inputs(load_processor(path))
    logits = model(**batch).logits
    batch["pixel_values"] = -batch["pixel_values"]
    assert (model(**batch).logits - logits).abs().max() > 0.1


def test_chat_template_with_an_image_tokenizes_and_processes(checkpoint):
    path, _ = checkpoint
    processor = load_processor(path)
    conversation = messages("Hello")
    conversation[0]["content"][0]["image"] = Image.new("RGB", (60, 60))
    batch = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    text = processor.decode(batch["input_ids"][0])
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert text == f"<|im_start|>user\n{image}Hello<|im_end|>\n<|im_start|>assistant\n"


def test_tags_survive_decoding_and_special_tokens_do_not(checkpoint):
    path, _ = checkpoint
    tokenizer = load_processor(path).tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("<question>a</question><answer>12</answer><|im_end|>")["input_ids"]
    assert all(tokenizer.convert_tokens_to_ids(tag) in ids for tag in TAGS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<question>a</question><answer>12</answer>"


def test_round_trip_keeps_class_name_and_outputs(checkpoint, tmp_path):
    path, class_name = checkpoint
    processor = load_processor(path)
    processor.save_pretrained(tmp_path)  # no config.json beside it, as in an adapter checkpoint
    again = load_processor(tmp_path)
    assert type(again) is type(processor)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == class_name
    for key, value in inputs(processor).items():
        assert torch.equal(value, inputs(again)[key])


def test_saved_files_describe_the_video_processor_that_the_stock_class_loads(checkpoint):
    path, _ = checkpoint
    saved = json.loads((path / "processor_config.json").read_text())
    image, video = saved["image_processor"], saved["video_processor"]
    assert image["image_processor_type"] == "Qwen2VLImageProcessor"
    assert video["video_processor_type"] in ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")
    assert video["patch_size"] == image["patch_size"]


@without_torchvision
def test_class_is_found_by_config_where_no_file_names_it(checkpoint, tmp_path):
    path, class_name = checkpoint
    processor = load_processor(path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        saved = json.loads((tmp_path / name).read_text())
        saved.pop("processor_class", None)
        (tmp_path / name).write_text(json.dumps(saved))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
    assert type(load_processor(tmp_path)).__name__ == class_name


@without_torchvision
def test_videos_raise_instead_of_being_dropped(checkpoint):
    path, _ = checkpoint
    with pytest.raises(ValueError, match="reads images only"):
        load_processor(path)(text=["<|video_pad|>"], videos=[[Image.new("RGB", (60, 60))] * 2])


@without_torchvision
def test_says_once_that_it_reads_images_only(checkpoint, caplog):
    path, _ = checkpoint
    processing._image_only_processors.cache_clear()
    with caplog.at_level(logging.INFO, logger="evolmm_trl.processing"):
        load_processor(path)
        load_processor(path)
    assert [record.message for record in caplog.records].count(
        "torchvision is not installed: the image-only form of the Qwen and InternVL processors is used."
    ) == 1


def test_tiny_models_depend_on_their_seed_alone(tmp_path):
    one, two, other = (
        AutoModelForImageTextToText.from_pretrained(tiny_qwen2_5_vl(tmp_path / name, seed=seed)).state_dict()
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
