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

"""Short training runs of tiny models, for the tests of the trainer."""

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback

from evolmm_trl import EvoLMMConfig, EvoLMMTrainer


def noise_images(count: int, side: int = 56, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def image_dataset(count: int = 6, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"image": noise_images(count, seed=seed)})


def as_speech(ids: list[int]) -> str:
    """
    What a random model "says": a function of its token ids alone, such that some answers agree, some differ, some
    cannot be read, some are long, and some questions are malformed.
    """
    total = sum(ids)
    question = f"<question>What is {total % 7}?</question>" if total % 5 else "What"
    answer = f"<answer>{total % 3}</answer>" if total % 4 else "none"
    return f"{question} {'so ' * (total % 11)}{answer}"


class TalkingTrainer(EvoLMMTrainer):
    """A random model never writes a tag, so its completions are read by `as_speech` in place of its tokenizer."""

    def _decode(self, ids):
        return [as_speech(completion) for completion in ids]


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **kwargs})


def config(output_dir, **kwargs) -> EvoLMMConfig:
    defaults = {
        "max_steps": 3,
        "num_generations": 3,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_question_length": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "write_report": False,  # it takes longer than the training
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if kwargs.get("train_proposer", True):
        defaults["proposer_update_every"] = 2
    return EvoLMMConfig(output_dir=str(output_dir), **{**defaults, **kwargs})


def snapshot(trainer) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def logged(trainer, name: str) -> list[float]:
    """The values of one metric, in the order they were logged."""
    return [row[name] for row in trainer.state.log_history if name in row]


class Watch(TrainerCallback):
    """Copies all tensors before and after every optimizer step, and the gradients of the step."""

    def __init__(self):
        self.before, self.gradients, self.after = [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def moved(self, step):
        return {name for name in self.before[step] if not torch.equal(self.before[step][name], self.after[step][name])}
