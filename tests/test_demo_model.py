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
import random
from pathlib import Path

import charts
import demo
import evaluate
import numpy as np
import pytest
import torch
from charts import Question, chart, labelled_questions, parse_question, sample_question
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from widen import widen

from evolmm_trl import EvoLMMTrainer
from evolmm_trl.processing import load_processor, processor_class


DEMO = Path(__file__).parents[1] / "examples" / "demo"
MODELS = ("room", "narrow", "noisy")
PROMPTS = json.loads((DEMO / "prompts.json").read_text())
SEEDS = (
    charts.WARM_START_SEEDS,
    charts.VAL_SEEDS,
    charts.EVOLVE_SEEDS,
    charts.GATE_SEEDS,
    charts.TEST_SEEDS,
    charts.FRESH_SEEDS,
    charts.UNSEEN_SEEDS,
)


@pytest.fixture(scope="module")
def room():
    path = DEMO / "models" / "room"
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval(), load_processor(path)


# The charts


def test_no_chart_is_used_in_two_places():
    assert len(set().union(*SEEDS)) == sum(map(len, SEEDS))
    assert len(charts.TEST_SEEDS) >= 2_000


def test_a_chart_is_a_function_of_its_seed_with_three_distinct_bars():
    for seed in range(200):
        assert chart(seed) == chart(seed)
        values = chart(seed).values
        assert len(values) == 3 == len(set(values.values()))
        assert all(1 <= value <= 9 for value in values.values())
    assert np.array_equal(chart(3).image(), chart(3).image())
    assert chart(3).image().size == (84, 84)


def heights_drawn(image: Image.Image, colour: str) -> int:
    """The height in pixels of the bar of `colour`, measured on the image alone."""
    distance = np.linalg.norm(np.asarray(image, dtype=float) - charts.COLOURS[colour], axis=-1)
    return int(((distance < 60).sum(axis=1) >= 7).sum())


def test_answers_are_true_of_the_drawn_image():
    for row in labelled_questions(range(300)):
        question = parse_question(row["question"])
        read = {colour: round(heights_drawn(row["image"], colour) / 8) for colour in charts.COLOURS}
        read = {colour: value for colour, value in read.items() if value > 0}
        assert len(read) == 3
        values = [read[colour] for colour in question.colours]
        truth = {
            "value": lambda values=values: values[0],
            "sum": lambda values=values: sum(values),
            "difference": lambda values=values: max(values) - min(values),
            "total": lambda read=read: sum(read.values()),
            "tallest": lambda read=read: max(read, key=read.get),
        }[question.kind]()
        assert row["answer"] == str(truth)


def test_reading_a_question_back_is_the_inverse_of_asking_it():
    rng = random.Random(0)
    asked = [sample_question(chart(seed), rng) for seed in range(500)]
    assert {question.kind for question in asked} == set(charts.KINDS)
    assert all(parse_question(question.text) == question for question in asked)
    assert parse_question("What is the value of pink?") is None
    assert parse_question("") is None


def test_a_question_about_absent_or_repeated_bars_is_not_grounded_and_has_no_answer():
    drawn = chart(0)
    present, absent = list(drawn.values), [colour for colour in charts.COLOURS if colour not in drawn.values]
    for question in (
        Question("value", (absent[0],)),
        Question("sum", (present[0], absent[0])),
        Question("sum", (present[0], present[0])),
        Question("difference", (present[1], present[1])),
    ):
        assert parse_question(question.text) == question
        assert not question.is_grounded(drawn)
        assert question.answer(drawn) is None
    assert Question("total").is_grounded(drawn)


def test_image_files_hold_pixels_and_no_label(tmp_path):
    seeds = charts.EVOLVE_SEEDS[:5]
    charts.make_images(tmp_path, seeds)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{index:05d}.png" for index in range(5)]
    for file, seed in zip(files, seeds, strict=True):
        image = Image.open(file)
        assert image.info == {} and not image.getexif()
        assert np.array_equal(image, chart(seed).image())


# The models


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_real_classes_and_small(name):
    path = DEMO / "models" / name
    model, processor = Qwen2_5_VLForConditionalGeneration.from_pretrained(path), load_processor(path)
    assert AutoConfig.from_pretrained(path).architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert json.loads((path / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    assert type(processor) is processor_class(Qwen2_5_VLProcessor)
    assert model.dtype == torch.float32
    assert model.num_parameters() <= 2_000_000
    record = json.loads((path / "training.json").read_text())
    assert record["parameters"] == model.num_parameters()


def test_shipped_models_fit_in_a_repository():
    sizes = [file.stat().st_size for name in MODELS for file in (DEMO / "models" / name).iterdir()]
    assert sum(sizes) <= 8_000_000


def test_prompts_are_short_and_tags_survive_decoding(room):
    _, processor = room
    row = labelled_questions(range(1))[0]
    inputs = evaluate.encode(processor, [row["image"]], [PROMPTS["solver"].format(question=row["question"])])
    assert inputs["input_ids"].shape[1] < 45
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9
    ids = processor.tokenizer("<question>a</question><answer>1</answer><|im_end|>")["input_ids"]
    decoded = processor.decode(ids, skip_special_tokens=True)
    assert decoded == "<question>a</question><answer>1</answer>"


def test_greedy_answers_are_those_of_generate(room):
    model, processor = room
    rows = labelled_questions(charts.VAL_SEEDS[:32])
    images, prompts = [row["image"] for row in rows], [PROMPTS["solver"].format(question=r["question"]) for r in rows]
    fast = evaluate.sample(model, processor, images, prompts, samples=3, greedy=True)
    inputs = evaluate.encode(processor, images, prompts)
    assert inputs["attention_mask"].min() == 0, "the prompts should differ in length"
    slow = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for group, expected in zip(fast, slow.tolist(), strict=True):
        assert group[0] == expected[: expected.index(processor.tokenizer.eos_token_id)]


def test_samples_follow_the_distribution_of_the_model(room):
    model, processor = room
    rows = labelled_questions(charts.VAL_SEEDS[:8])
    images, prompts = [row["image"] for row in rows], [PROMPTS["solver"].format(question=r["question"]) for r in rows]
    inputs = evaluate.encode(processor, images, prompts)
    with torch.inference_mode():
        shares = (model(**inputs, logits_to_keep=1).logits[:, -1] / 0.7).softmax(-1)
    drawn = evaluate.sample(model, processor, images, prompts, samples=2_000, temperature=0.7, max_new_tokens=1)
    for share, group in zip(shares, drawn, strict=True):
        counts = torch.bincount(torch.tensor([ids[0] for ids in group]), minlength=len(share))
        assert (counts / 2_000 - share).abs().max() < 0.05  # 4.5 standard errors


def test_an_opening_can_be_forced_or_forbidden(room):
    model, processor = room
    rows = labelled_questions(charts.VAL_SEEDS[:8])
    images, prompts = [row["image"] for row in rows], [PROMPTS["solver"].format(question=r["question"]) for r in rows]
    tag = processor.tokenizer.convert_tokens_to_ids("<answer>")
    forced = evaluate.sample(model, processor, images, prompts, samples=5, prefix="<answer>")
    forbidden = evaluate.sample(model, processor, images, prompts, samples=5, forbid_first="<answer>")
    assert all(ids[0] == tag and ids[1] != tag for group in forced for ids in group)
    assert all(ids[0] != tag for group in forbidden for ids in group)


def test_the_room_base_leaves_its_vote_something_to_teach(room):
    model, processor = room
    measured = evaluate.evaluate_solver(model, processor, labelled_questions(charts.VAL_SEEDS[:300]), PROMPTS)
    assert measured["room"] > 0.10
    assert len(measured["per_question"]["maj20"]) == 300


def test_the_room_base_asks_grounded_questions(room):
    model, processor = room
    asked = evaluate.evaluate_proposer(model, processor, [chart(seed) for seed in charts.VAL_SEEDS[:50]], PROMPTS)
    assert asked["well_formed"] >= asked["parseable"] >= asked["grounded"] > 0.5
    assert sum(asked["kinds"].values()) == pytest.approx(asked["parseable"])


@pytest.mark.parametrize(("base", "ahead"), [("room", True), ("narrow", False), ("noisy", False)])
def test_the_check_with_labelled_questions_warns_where_the_vote_of_five_has_nothing_to_teach(
    base, ahead, tmp_path, caplog
):
    model, processor = demo.load_model(DEMO / "models" / base)
    labelled = Dataset.from_list(labelled_questions(charts.VAL_SEEDS[:200]))
    trainer = EvoLMMTrainer(
        model=model,
        args=demo.demo_config(tmp_path, per_device_eval_batch_size=100),
        train_dataset=labelled.select_columns("image"),
        eval_dataset=labelled,
        processing_class=processor,
        peft_config=demo.demo_lora(),
    )
    with caplog.at_level(logging.WARNING, logger="evolmm_trl.trainer"):
        trainer.evaluate()
    assert ("not measurably ahead" in caplog.text) != ahead


def test_wider_heads_compute_the_same(room, tmp_path):
    narrow, processor = room
    wide, _ = demo.load_model(widen(DEMO / "models" / "room", tmp_path / "wide"))
    assert wide.config.text_config.hidden_size // wide.config.text_config.num_attention_heads == 32
    rows = labelled_questions(charts.TEST_SEEDS[:2])
    inputs = evaluate.encode(processor, [row["image"] for row in rows], [row["question"] for row in rows])
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits, wider = (model(**inputs).logits[seen] for model in (narrow, wide.eval()))
    torch.testing.assert_close(wider, logits, atol=1e-3, rtol=0)
    assert logits.std() > 1
