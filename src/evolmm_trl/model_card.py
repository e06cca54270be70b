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

"""The model card that goes beside the adapters."""

from importlib import resources
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import get_config_model_id


_RECIPE = (
    "num_generations",
    "extra_votes",
    "early_votes",
    "reward",
    "baseline",
    "loss_type",
    "learning_rate",
    "max_steps",
    "proposer_update_every",
    "train_proposer",
    "adapters",
    "beta",
    "kl_target",
    "beta_min",
    "temperature",
    "max_completion_length",
    "freeze_vision_tower",
    "seed",
)
_CURVES = ("agreement", "answer_entropy", "solver/reward", "solver/kl", "proposer/reward", "eval_accuracy_greedy")
_ADAPTERS_HOW_TO = """```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{model}")  # the solver
{proposer}```"""
_PROPOSER_HOW_TO = """
# the proposer, which asks the questions, is in the subfolder "proposer"
model.load_adapter("{model}", adapter_name="proposer", subfolder="proposer")
model.set_adapter("proposer")
"""
_WEIGHTS_HOW_TO = """```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{model}")
```"""


def write_model_card(
    trainer,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """
    Writes `README.md` beside the weights: base model, recipe, curves, how to load either role, citation.

    Args:
        trainer ([`EvoLMMTrainer`]):
            The trainer.
        folder (`Path`):
            Where to write it.
        model_name (`str`, *optional*):
            Title; the output folder's name by default.
        dataset_name (`str`, *optional*):
            Hub id of the images.
        tags (`str` or `list[str]`, *optional*):
            Tags beside the trainer's own.
    """
    args = trainer.args
    base = get_config_model_id(trainer.model.config)
    on_hub = not Path(base).is_dir()
    model = trainer.hub_model_id or model_name or Path(args.output_dir).name
    with_adapters = hasattr(trainer.model, "peft_config")
    if with_adapters:
        proposer = _PROPOSER_HOW_TO.format(model=model) if trainer.roles.separate else ""
        what = f"LoRA adapters for `{base if on_hub else Path(base).name}`"
        how_to_load = _ADAPTERS_HOW_TO.format(base=base if on_hub else "BASE_MODEL", model=model, proposer=proposer)
    else:
        what = f"All weights of `{base if on_hub else Path(base).name}`"
        how_to_load = _WEIGHTS_HOW_TO.format(model=model)
    extra_tags = [tags] if isinstance(tags, str) else list(tags or [])
    rows = [log for log in trainer.state.log_history if "agreement" in log or "eval_accuracy_greedy" in log]
    rows = rows[:: max(1, len(rows) // 8)]
    names = [name for name in _CURVES if any(isinstance(row.get(name), float) for row in rows)]
    card = ModelCard.from_template(
        card_data=ModelCardData(
            base_model=base if on_hub else None,
            library_name="peft" if with_adapters else "transformers",
            datasets=dataset_name,
            pipeline_tag="image-text-to-text",
            tags=[*trainer._tag_names, *extra_tags],
        ),
        template_str=resources.files("evolmm_trl").joinpath("templates/model_card.md").read_text(),
        model_name=model_name or Path(args.output_dir).name,
        what=what,
        votes=args.num_votes,
        how_to_load=how_to_load,
        recipe=[(name, f"`{getattr(args, name)}`") for name in _RECIPE],
        curve_names=names,
        curves=[
            [row["step"], *(f"{row[name]:.3f}" if isinstance(row.get(name), float) else "" for name in names)]
            for row in rows
        ],
        versions=", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "peft", "torch", "datasets")),
        citation=trainer._paper["citation"],
    )
    card.save(folder / "README.md")
