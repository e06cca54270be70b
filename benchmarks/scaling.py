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

"""
Writes the tables of `docs/scaling.md`: the memory of a process for Qwen2.5-VL of four sizes, by the arithmetic of
`evolmm_trl.memory`. Models are built from their configurations on the meta device, which holds no weights. Nothing is
measured.

    .venv/bin/python benchmarks/scaling.py
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from bench_models import SIZES, Size, make_config
from bench_report import in_place, table
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen2_5_VLForConditionalGeneration
from transformers.integrations import replace_with_bnb_linear

from evolmm_trl import EvoLMMConfig
from evolmm_trl.memory import GB, Memory, Prompt, Sharding, describe, elements, estimate, precision, weight_bytes
from evolmm_trl.role_adapters import RoleAdapters, add_role_adapter, role_lora_configs, vision_tower, without_vision
from evolmm_trl.schedule import PROPOSER, SOLVER
from evolmm_trl.shared_prefix import base_model


PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"

# Of Qwen2.5-VL-*-Instruct, from their configurations. Vocabulary and tower of 32b and 72b are those of 7b, but for the
# tower's inner size
MODELS = {
    "3B": SIZES["3b"],
    "7B": SIZES["7b"],
    "32B": Size(5120, 64, 40, 8, 27648, 152064, 1280, 32, 16, 3456, tied=False),
    "72B": Size(8192, 80, 64, 8, 29568, 152064, 1280, 32, 16, 3456, tied=False),
}
CARDS = (24, 40, 80, 141)  # GB
CONTEXT = GB  # what a process holds on a card beside torch's memory
FRAGMENTS = 1.1  # torch's memory over what is in use
TEXT_TOKENS = 128  # more than the default prompts and the chat template have
GPUS = 8  # of a host
_PARTS = ("weights", "reference", "gradients", "optimizer", "vision_tower", "generation", "update", "peak")


@dataclass(frozen=True)
class Batch:
    """
    Args:
        max_pixels (`int`), rows (`int`), steps (`int`):
            `max_pixels`, `per_device_train_batch_size` and `gradient_accumulation_steps`.
    """

    max_pixels: int
    rows: int
    steps: int


DEFAULT = Batch(1280 * 28 * 28, 5, 4)
SMALL = Batch(512 * 28 * 28, 1, 5)  # 512 image tokens, one image per step, one answer at a time


@dataclass(frozen=True)
class Setup:
    """
    Args:
        name (`str`):
            For people.
        weights (`str`):
            `"4-bit"`, `"bfloat16"` or `"float32"`.
        lora (`bool`):
            Whether LoRA adapters are trained, of rank 16, rather than all weights.
        sharding ([`Sharding`]):
            Over which processes.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`):
            Optimizer.
    """

    name: str
    weights: str
    lora: bool
    sharding: Sharding
    optim: str = "adamw_torch_fused"


SETUPS = (
    Setup("QLoRA, one GPU or DDP", "4-bit", True, Sharding.ddp(GPUS)),
    Setup("LoRA, one GPU or DDP", "bfloat16", True, Sharding.ddp(GPUS)),
    Setup(f"LoRA, ZeRO-3 over {GPUS}", "bfloat16", True, Sharding.zero(3, GPUS)),
    Setup("all weights, 8-bit AdamW, one GPU", "float32", False, Sharding(), "adamw_8bit"),
    Setup(f"all weights, ZeRO-2 over {GPUS}", "bfloat16", False, Sharding.zero(2, GPUS)),
    Setup(f"all weights, ZeRO-3 over {GPUS}", "bfloat16", False, Sharding.zero(3, GPUS)),
    Setup(
        f"all weights, ZeRO-3 over {GPUS}, optimizer in main memory",
        "bfloat16",
        False,
        Sharding.zero(3, GPUS, optimizer_on_cpu=True),
    ),
    Setup(f"all weights, ZeRO-3 over {2 * GPUS}", "bfloat16", False, Sharding.zero(3, 2 * GPUS)),
)


def outlines(size: Size, weights: str) -> PreTrainedModel:
    """A model without weights, quantized or not."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(make_config(size), dtype=dtype)
        if weights == "4-bit":
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
            config = without_vision(config, [vision_tower(model)[0]])
            replace_with_bnb_linear(model, config.llm_int8_skip_modules, config)
            for parameter in model.parameters():
                if precision(parameter) == "float32":  # the biases of the layers that were replaced
                    parameter.data = parameter.data.to(dtype)
            model.is_loaded_in_4bit = True
    return model


def as_trained(model: PreTrainedModel, lora: bool) -> PreTrainedModel | PeftModel:
    """The same with two adapters, or with all weights but the vision tower's trained."""
    name, tower = vision_tower(model)
    if not lora:
        tower.requires_grad_(False)
        return model
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    configs = role_lora_configs(config, "separate", [name])
    with torch.device("meta"):
        model = get_peft_model(model, configs[SOLVER])
        add_role_adapter(model, configs[PROPOSER])
        model.set_requires_grad(["default", "proposer"], requires_grad=True)
    return model


def place(model: PreTrainedModel | PeftModel, setup: Setup, batch: Batch) -> tuple[EvoLMMConfig, Prompt]:
    """The configuration of a run and the size of its prompts."""
    args = EvoLMMConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=True,
        optim=setup.optim,
        max_pixels=batch.max_pixels,
        per_device_train_batch_size=batch.rows,
        gradient_accumulation_steps=batch.steps,
    )
    vision = base_model(model).config.vision_config
    patches = batch.max_pixels // vision.patch_size**2
    image_tokens = patches // vision.spatial_merge_size**2
    return args, Prompt(TEXT_TOKENS + args.max_question_length + image_tokens, patches)


def memory(model: PreTrainedModel | PeftModel, setup: Setup, batch: Batch) -> Memory:
    """The memory of a process."""
    args, prompt = place(model, setup, batch)
    _, tower = vision_tower(base_model(model))
    reference = None if setup.lora else model  # a copy of it
    return estimate(model, tower, args, prompt, setup.sharding, shared_prefix=True, reference=reference)


def example() -> str:
    """What the trainer prints for QLoRA of 7B on one GPU."""
    setup = Setup("", "4-bit", True, Sharding())
    model = as_trained(outlines(MODELS["7B"], setup.weights), setup.lora)
    name, _ = vision_tower(base_model(model))
    args, prompt = place(model, setup, DEFAULT)
    return f"```\n{describe(RoleAdapters(model), [name], args, prompt, setup.sharding, shared_prefix=True)}\n```"


def fits(needed: Memory, card: int) -> bool:
    """Whether it fits a card of so many GB."""
    return needed.peak * FRAGMENTS + CONTEXT <= card * GB


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"


def _base(model: PeftModel) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]


def tables() -> str:
    """The tables, in Markdown."""
    sizes, cards, parts = [], [], []
    for name, size in MODELS.items():
        trained = {}
        for setup in SETUPS:
            kind = setup.weights, setup.lora
            if kind not in trained:
                trained[kind] = as_trained(outlines(size, setup.weights), setup.lora)
            default, small = (memory(trained[kind], setup, batch) for batch in (DEFAULT, SMALL))
            answers = ["yes" if fits(default, c) else "small batch" if fits(small, c) else "-" for c in CARDS]
            cards.append([name, setup.name, *answers])
            parts.append([name, setup.name, *(_gb(getattr(default, part)) for part in _PARTS), _gb(small.peak)])
        half, quantized = (_base(trained[weights, True]) for weights in ("bfloat16", "4-bit"))
        tower = vision_tower(base_model(trained["bfloat16", True]))[1].parameters()
        adapters = [p for p in trained["4-bit", True].parameters() if p.requires_grad]
        counts = [f"{sum(map(elements, tensors)):,}" for tensors in (half, tower, adapters)]
        sizes.append([name, *counts, *(_gb(sum(map(weight_bytes, base))) for base in (half, quantized))])
    counted = ["parameters", "of the vision tower", "of both adapters", "in bfloat16, GB", "in 4 bits, GB"]
    held = [part.replace("_", " ") for part in _PARTS]
    return "\n\n".join(
        [
            table(["model", *counted], sizes),
            table(["model", "setup", *(f"{card} GB" for card in CARDS)], cards),
            table(["model", "setup", *held, "peak, small batch"], parts),
        ]
    )


def written(page: str) -> str:
    """The page with what is calculated in it."""
    return in_place(in_place(page, "table", example()), "scaling", tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
