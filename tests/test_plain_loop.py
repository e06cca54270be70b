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

"""The trainer's weights are those of `plain_loop.py`, fed the same rollouts."""

import inspect
import json
from pathlib import Path

import plain_loop
import pytest
import torch
from charts import EVOLVE_SEEDS, chart
from datasets import Dataset
from peft import get_peft_model
from plain_loop import Sample, Settings
from tiny_models import tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, logged, lora, snapshot
from transformers import AutoModelForImageTextToText

from evolmm_trl import EvoLMMTrainer


DEMO = Path(__file__).parents[1] / "examples" / "demo"
ADAPTERS = ("default", "proposer")


class Recording:
    """Keeps what the two roles were shown and wrote, as plain samples."""

    def _propose(self, model, rows, prompts):
        ids, texts, questions = super()._propose(model, rows, prompts)
        self.asked = [self._sample(*parts) for parts in zip(prompts, ids, texts, strict=True)]
        return ids, texts, questions

    def _solve(self, *args):
        prompts, ids, texts = super()._solve(*args)
        answers = [
            [self._sample(p, *pair) for pair in zip(*g, strict=True)]
            for p, *g in zip(prompts, ids, texts, strict=True)
        ]
        self.rollouts = [*getattr(self, "rollouts", []), list(zip(self.asked, answers, strict=True))]
        return prompts, ids, texts

    def _sample(self, prompt, ids, text):
        extra = length_reward(completion_ids=[ids])[0] if self.reward_funcs else 0.0
        images = {name: tensor.clone() for name, tensor in prompt.image_inputs.items()}
        return Sample(
            prompt.input_ids.tolist(),
            prompt.token_inputs["mm_token_type_ids"].tolist(),
            images,
            list(ids),
            text,
            extra,
        )


class RecordingTalker(Recording, TalkingTrainer):
    pass


class RecordingTrainer(Recording, EvoLMMTrainer):
    pass


def length_reward(completion_ids, **kwargs):
    return [0.5 * (ids[0] % 2) for ids in completion_ids]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "qwen2_5_vl": tiny_qwen2_5_vl(folder / "qwen2_5_vl"),
        "qwen3_vl": tiny_qwen3_vl(folder / "qwen3_vl"),
        "room": DEMO / "models" / "room",
    }


# By name: the base, the trainer's settings, and the plain loop's. Where a gradient's element is nothing but rounding error,
# AdamW's usual epsilon makes a whole step of it: all runs but the first use a larger one.
RUNS = {
    "ema baseline, mean over each sequence": ("qwen2_5_vl", {"adam_epsilon": 1e-8}, {"eps": 1e-8}),
    "ema baseline, mean over all tokens, two micro-batches": (
        "qwen3_vl",
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "beta": 0.05},
        {"token_mean": True, "beta": {"solver": 0.05, "proposer": 0.05}, "beta_min": {"solver": 0.05, "proposer": 0.05}},
    ),
    "group baseline, discrete reward, extra reward, micro-batches that cut groups": (
        "qwen3_vl",
        {
            "baseline": "group",
            "reward": "discrete",
            "reward_funcs": length_reward,
            "gradient_accumulation_steps": 3,
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "constant",
        },
        {"baseline": "group", "reward": "discrete", "linear_lr": False},
    ),
    "group baseline, dapo, extra votes, a temperature, a beta of its own for each role": (
        "qwen2_5_vl",
        {
            "baseline": "group",
            "loss_type": "dapo",
            "extra_votes": 2,
            "temperature": 0.8,
            "beta": 0.02,
            "beta_min": 1e-4,
            "proposer_beta": 0.2,
        },
        {
            "baseline": "group",
            "token_mean": True,
            "temperature": 0.8,
            "beta": {"solver": 0.02, "proposer": 0.2},
            "beta_min": {"solver": 1e-4, "proposer": 1e-4},
        },
    ),
    "one adapter for both roles": (
        "qwen2_5_vl",
        {"adapters": "shared"},
        {"adapters": {"solver": "default", "proposer": "default"}},
    ),
    "all weights, no adapters": ("qwen3_vl", {"learning_rate": 1e-3}, {"lr": 1e-3, "adapters": {"solver": None, "proposer": None}}),
    "real answers with end tokens": (
        "room",
        {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 5,
            "num_generations": 5,
            "max_completion_length": 16,
            "max_question_length": 16,
            "prompts": json.loads((DEMO / "prompts.json").read_text()),
        },
        {"trained": 5},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=RUNS, ids=lambda name: name)
def run(request, bases, tmp_path_factory):
    """A trainer after 12 steps, the weights it began with, and the plain loop's model and history on its rollouts."""
    base, options, settings = RUNS[request.param]
    options = {
        "max_steps": 12,
        "proposer_update_every": 5,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,
        **options,
    }
    peft_config = None if "no adapters" in request.param else lora()
    reward_funcs = options.pop("reward_funcs", None)
    images = Dataset.from_dict({"image": [chart(seed).image() for seed in EVOLVE_SEEDS[:6]]})
    trainer = (RecordingTrainer if base == "room" else RecordingTalker)(
        model=str(bases[base]),
        args=config(tmp_path_factory.mktemp("run"), **options),
        train_dataset=images if base == "room" else image_dataset(),
        peft_config=peft_config,
        reward_funcs=reward_funcs,
    )
    before = snapshot(trainer)
    trainer.train()

    model = AutoModelForImageTextToText.from_pretrained(bases[base], dtype=torch.float32)
    reference = None
    if peft_config is None:
        reference = AutoModelForImageTextToText.from_pretrained(bases[base], dtype=torch.float32).eval()
        model.model.visual.requires_grad_(False)
    else:
        model = get_peft_model(model, peft_config)
        if trainer.roles.separate:
            model.add_adapter("proposer", peft_config)
        language_model = model.base_model.model.model.language_model
        assert all("visual" not in n for n, _ in language_model.named_modules())
        remove_lora(model.base_model.model.model.visual)
    model.load_state_dict(before)
    history = plain_loop.train(model, reference, trainer.rollouts, Settings(**settings))
    return trainer, before, model, history


def remove_lora(module):
    """`all-linear` reaches the vision tower, which the trainer leaves alone."""
    for name, child in module.named_children():
        if hasattr(child, "base_layer"):
            setattr(module, name, child.base_layer)
        else:
            remove_lora(child)


def test_weights_are_those_of_the_plain_loop(run):
    trainer, before, model, _ = run
    after, expected = snapshot(trainer), model.state_dict()
    assert after.keys() == expected.keys()
    assert max((after[name] - expected[name]).abs().max() for name in after) < 1e-5
    trained = [name for name in after if "lora_" in name] or [name for name in after if "visual" not in name]
    for adapter in ("default", "proposer") if trainer.roles.separate else ("",):
        moved = [(after[name] - before[name]).abs().max() for name in trained if adapter in name]
        assert min(moved) > 1e-4 and max(moved) > 5e-3


def test_kl_beta_and_baseline_of_every_step_are_those_of_the_plain_loop(run):
    trainer, _, _, history = run
    assert len(history) == 12
    for role in ("solver", "proposer"):
        steps = [step for step in history if step["role"] == role]
        assert logged(trainer, f"{role}/kl") == pytest.approx([step["kl"] for step in steps], abs=1e-5)
        assert logged(trainer, f"{role}/beta") == pytest.approx([step["beta"] for step in steps], rel=1e-4)
        assert steps[-1]["kl"] > 1e-4
    if trainer.args.baseline == "ema":
        steps = [step["baseline"] for step in history if step["role"] == "solver"]
        assert logged(trainer, "solver/baseline") == pytest.approx(steps, abs=1e-5)


def test_rollouts_fed_to_the_plain_loop_teach_something(run):
    trainer, _, _, _ = run
    records = [json.loads(line) for line in trainer.rollout_log.path.read_text().splitlines()]
    assert len(trainer.rollouts) == 10 and len(records) == 20
    assert (
        len(
            {
                round(answer["reward"], 4)
                for record in records
                for answer in record["answers"]
                if answer["reward"] is not None
            }
        )
        >= 2
    )
    assert len({record["proposer_reward"] for record in records}) >= 2


def test_the_plain_loop_is_short_and_knows_nothing_of_trl_or_this_package():
    source = inspect.getsource(plain_loop)
    assert len(source.splitlines()) <= 150
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not any(name in line for line in imports for name in ("trl", "transformers", "peft"))
