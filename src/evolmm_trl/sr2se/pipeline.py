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
SR2SE from the first stage to the last (Algorithm 2), each stage alone or all at once:

    sft ──► pairs ──► gate ──► dpo ──► final_gate          (a round; the next one starts from its model)

`pairs` writes the preference pairs and, from the same descriptions, the rollouts that `gate` is trained on. The gate is
fitted again after SR-DPO, since it reads hidden states of a model that has changed.
"""

import gc
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from ..data import ImagePaths, allow_links_in
from ..engines import keep_saved_names
from ..processing import load_processor, special_tokens
from ..prompts import RolePrompts, user_message, without_marks
from ..role_adapters import (
    check_adapted_modules,
    check_target_modules,
    keep_adapters_precise,
    keep_gradients_on_cpu,
    vision_modules,
    without_modules,
    without_vision,
)
from ..solver import load_solver
from .early_exit import EarlyExitReasoner, GateRollouts, GateTrainingConfig, train_gate
from .generation import chat_texts, process_state
from .refinement import (
    AgreementLabeller,
    OtherSettings,
    RefinementConfig,
    absolute,
    build_pairs,
    rows_and_digest,
    write_json,
)
from .rows import BadRow, Row, paths_beside, read_rows, warn_of
from .sr_dpo import SRDPOConfig, SRDPOTrainer, decoding_images, holds_special_token, load_preferences
from .sub_policies import SubPolicies, SubPolicyPrompts


logger = logging.getLogger(__name__)

STAGES = ("sft", "pairs", "gate", "dpo", "final_gate")

_DTYPES = ("bfloat16", "float16", "float32", "auto")


@dataclass
class SR2SEConfig:
    """
    A run of the pipeline. The sections that are dictionaries hold fields of the class that is named.

    Args:
        model (`str`):
            Id or path of the base model.
        output_dir (`str` or `Path`):
            Where everything is written.
        data (`str`):
            JSONL with `image`, `question` and `answer`; without labels also a folder of images.
        labels (`bool`, *optional*, defaults to `True`):
            `False`: the proposer asks where a row has no question, and the majority of the solver's answers stands in for
            the truth.
        rounds (`int`, *optional*, defaults to `1`):
            How often pairs to final_gate are repeated, each round from the model of the last.
        sft_data (`str`, *optional*):
            JSONL with `image`, `question` and `answer` to fine-tune on first. Without it the base model is the SFT model.
        image_root (`str`, *optional*):
            Folder that image paths in `data` and `sft_data` start from and may not leave. Without it they start from the
            file's folder and may lead into it or the working directory.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of the base model: `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"`, as it is stored. Training uses bf16 where
            it is `"bfloat16"`. Weights that are trained themselves are in float32 from then on, since less would lose small
            steps: in training, on the disk and in use.
        attn_implementation (`str`, *optional*):
            As in `from_pretrained`.
        lora (`dict`, *optional*):
            Fields of [`~peft.LoraConfig`], such as `r`. One adapter is trained on from stage to stage, and never merged,
            which would round it. Without it all weights are trained.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to train LoRA on a base in 4 bits (QLoRA).
        max_steps (`int`, *optional*, defaults to `5`):
            K, the most reasoning steps.
        gate_rows (`int`, *optional*, defaults to `5000`):
            How many rows the gate is trained on.
        prompts (`dict`, *optional*):
            Fields of [`SubPolicyPrompts`].
        role_prompts (`dict`, *optional*):
            Fields of [`RolePrompts`], for proposer and solver.
        generation (`dict`, *optional*):
            Arguments of [`SubPolicies`], such as `batch_size` and `max_perception_tokens`.
        labeller (`dict`, *optional*):
            Arguments of [`AgreementLabeller`], such as `num_answers`.
        refinement (`dict`, *optional*), gate (`dict`, *optional*):
            Fields of [`RefinementConfig`] and [`GateTrainingConfig`].
        sft (`dict`, *optional*), dpo (`dict`, *optional*):
            Fields of [`~trl.SFTConfig`] and [`SRDPOConfig`].
        seed (`int`, *optional*, defaults to `42`):
            Of every stage.
    """

    model: str
    output_dir: str | Path
    data: str
    labels: bool = True
    rounds: int = 1
    sft_data: str | None = None
    image_root: str | None = None
    dtype: str = "bfloat16"
    attn_implementation: str | None = None
    lora: dict | None = None
    load_in_4bit: bool = False
    max_steps: int = 5
    gate_rows: int = 5000
    prompts: dict = field(default_factory=dict)
    role_prompts: dict = field(default_factory=dict)
    generation: dict = field(default_factory=dict)
    labeller: dict = field(default_factory=dict)
    refinement: dict = field(default_factory=dict)
    gate: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    dpo: dict = field(default_factory=dict)
    seed: int = 42

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        _check_types(values, get_type_hints(SR2SEConfig), {*_NUMBERS, str, dict, Path})
        if self.dtype not in _DTYPES or (self.dtype == "auto" and self.load_in_4bit):
            expected = _DTYPES[:-1] if self.load_in_4bit else _DTYPES
            raise ValueError(f"`dtype` is {self.dtype!r}; expected one of {', '.join(expected)}.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` is {self.rounds}; expected at least 1.")
        if self.load_in_4bit and self.lora is None:
            raise ValueError("`load_in_4bit` needs `lora`: weights in 4 bits cannot be trained themselves.")
        for name in ("data", "sft_data", "image_root"):
            path = getattr(self, name)
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"`{name}` is {path!r}, but there is no such file or folder.")
        # Everything is built once now, so that a wrong name or value is said before the first stage and not after hours
        self.sub_policy_prompts()
        RolePrompts.from_dict(self.role_prompts)
        for section, annotated, make in (
            ("refinement", RefinementConfig, self.refinement_config),
            ("gate", GateTrainingConfig, self.gate_config),
            ("lora", LoraConfig, self.lora_config),
            ("sft", SFTConfig, lambda: self.sft_config(Path(self.output_dir))),
            ("dpo", SRDPOConfig, lambda: self.dpo_config(Path(self.output_dir))),
            ("generation", SubPolicies.__init__, lambda: SubPolicies(None, None, **self.generation)),
            ("labeller", AgreementLabeller.__init__, lambda: AgreementLabeller(None, **self.labeller)),
        ):
            # PEFT calls `lora_alpha` an int and takes any number
            types = {**get_type_hints(annotated), "lora_alpha": float}
            _check_types(getattr(self, section) or {}, types, _NUMBERS, f"{section}.")
            try:
                make()
            except TypeError as error:
                raise ValueError(f"The section `{section}` is {getattr(self, section)!r}: {error}.") from error

    @classmethod
    def from_file(cls, path: str | Path, changes: Sequence[str] = ()) -> "SR2SEConfig":
        """
        Reads a YAML or JSON file.

        Args:
            path (`str` or `Path`):
                The file. JSON in the layout of the authors' `default_config.json` is translated.
            changes (`Sequence[str]`, *optional*):
                Values to replace, such as `"dpo.learning_rate=1e-6"`.
        """
        text = Path(path).read_text(encoding="utf-8")
        values = _floats(json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text))
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected names and values.")
        if "hsr_ee" in values or "sr_dpo" in values:
            values = from_authors_config(values)
        for change in changes:
            name, equals, value = change.partition("=")
            if not equals:
                raise ValueError(f"Got the change {change!r}; expected name=value, such as dpo.learning_rate=1e-6.")
            *sections, name = name.split(".")
            section = values
            for part in sections:
                if section.get(part) is None:
                    section[part] = {}
                section = section[part]
                if not isinstance(section, dict):
                    raise ValueError(f"Got the change {change!r}, but {part!r} is {section!r}; expected a section.")
            section[name] = _floats(yaml.safe_load(value))
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Unknown names in {path}: {unknown}. Expected some of {known}.")
        # A section whose entries are all commented out is empty, not absent
        sections = {f.name for f in fields(cls) if f.default_factory is dict}
        values = {name: {} if value is None and name in sections else value for name, value in values.items()}
        missing = [name for name in ("model", "output_dir", "data") if name not in values]
        if missing:
            raise ValueError(f"{path} lacks {missing}. Add them, or pass them as name=value.")
        return cls(**values)

    def sub_policy_prompts(self) -> SubPolicyPrompts:
        return SubPolicyPrompts.from_dict(self.prompts)

    def refinement_config(self) -> RefinementConfig:
        return RefinementConfig(**{"seed": self.seed, **self.refinement})

    def gate_config(self) -> GateTrainingConfig:
        return GateTrainingConfig(**{"seed": self.seed, **self.gate})

    def lora_config(self) -> LoraConfig | None:
        if self.lora is None:
            return None
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **self.lora})

    def quantization_config(self) -> BitsAndBytesConfig | None:
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.dtype),
        )

    def sft_config(self, folder: Path) -> SFTConfig:
        """One epoch at 5e-5 in batches of 4 x 4 (authors' code), unless the section `sft` says otherwise."""
        defaults = {
            "learning_rate": 5e-5,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "max_length": 2048,
        }
        return SFTConfig(**{**self._training_defaults(folder), **defaults, **self.sft})

    def dpo_config(self, folder: Path) -> SRDPOConfig:
        return SRDPOConfig(**{**self._training_defaults(folder), **self.dpo})

    def model_kwargs(self, all_weights_trained: bool) -> dict:
        dtype = "float32" if all_weights_trained else self.dtype
        return {"dtype": dtype, "attn_implementation": self.attn_implementation}

    def _training_defaults(self, folder: Path) -> dict:
        return {
            "output_dir": str(folder),
            "model_init_kwargs": self.model_kwargs(self.lora is None),
            "bf16": self.dtype == "bfloat16",
            "report_to": "none",
            "seed": self.seed,
        }


_NUMBERS = {bool, int, float, NoneType}
_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a section of names and values",
    NoneType: "null",
}


def _check_types(values: dict, annotated: dict[str, Any], checked: set[type], section: str = "") -> None:
    """
    Raises a `ValueError` for a value of another type than its field is annotated with. Fields that also take types that
    are not in `checked` are left to the class that has them.
    """
    for name, value in values.items():
        hint = annotated.get(name, Any)
        types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not checked.issuperset(types):
            continue
        if isinstance(value, bool):
            fits = bool in types
        else:
            fits = isinstance(value, types) or (float in types and isinstance(value, int))
        if not fits:
            expected = " or ".join(_IN_WORDS[type_] for type_ in types if type_ in _IN_WORDS)
            given = "null" if value is None else f"{value!r} ({type(value).__name__})"
            raise ValueError(
                f"`{section}{name}` is {given}; expected {expected}. Correct it in the recipe or with "
                f"--set {section}{name}=..."
            )


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _floats(value):
    """YAML reads 5e-7 as text; here it is a number."""
    if isinstance(value, dict):
        return {name: _floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if not isinstance(value, str) or not _EXPONENT.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number  # 2e1 epochs are 20


# Names in the authors' default_config.json and ours, by section; a dot leads into a section of ours.
_AUTHORS_NAMES = {
    "model": {
        "model_name_or_path": "model",
    },
    "hsr_ee": {
        "confidence_threshold": "gate.threshold",
        "max_reasoning_steps": "max_steps",
        "length_penalty_lambda": "gate.length_penalty",
        "confidence_head_hidden_dim": "gate.gate_size",
        "adaptive_threshold": "gate.learn_threshold",
        "threshold_lr": "gate.threshold_learning_rate",
    },
    "ipr": {
        "max_refinement_iterations": "refinement.max_refinements",
        "num_samples": "refinement.max_rows",
    },
    "sr_dpo": {
        "beta": "dpo.beta",
        "learning_rate": "dpo.learning_rate",
        "batch_size": "dpo.per_device_train_batch_size",
        "num_epochs": "dpo.num_train_epochs",
        "gradient_accumulation_steps": "dpo.gradient_accumulation_steps",
        "max_seq_length": "dpo.max_length",
        "warmup_ratio": "dpo.warmup_steps",
        "weight_decay": "dpo.weight_decay",
        "max_grad_norm": "dpo.max_grad_norm",
    },
    "sft": {
        "num_epochs": "sft.num_train_epochs",
        "learning_rate": "sft.learning_rate",
        "batch_size": "sft.per_device_train_batch_size",
        "gradient_accumulation_steps": "sft.gradient_accumulation_steps",
        "max_seq_length": "sft.max_length",
    },
}
# Where things are written and on which device follows from `output_dir` and the launcher here.
_AUTHORS_UNUSED = {"device_map", "sft_output_dir", "ipr_data_dir", "hsr_ee_output_dir", "sr_dpo_output_dir"}
_AUTHORS_UNUSED |= {"eval_output_dir", "eval_steps"}


def from_authors_config(authors: dict) -> dict:
    """Translates the layout of the authors' `default_config.json`. A name that is not known raises a `ValueError`."""
    ours: dict = {}
    unused = []

    def put(name: str, value) -> None:
        *sections, name = name.split(".")
        target = ours
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value

    for section, content in authors.items():
        if isinstance(content, dict):
            names = _AUTHORS_NAMES.get(section, {})
            for name, value in content.items():
                if name in names:
                    put(names[name], value)
                elif (section, name) == ("model", "bf16"):
                    put("dtype", "bfloat16" if value else "float32")
                elif (section, name) == ("model", "use_flash_attention"):
                    put("attn_implementation", "flash_attention_2" if value else None)
                elif (section, name) == ("model", "gradient_checkpointing"):
                    put("sft.gradient_checkpointing", value)
                    put("dpo.gradient_checkpointing", value)
                elif (section, name) == ("model", "lora_rank"):
                    if value:
                        put("lora.r", value)
                        put("lora.lora_alpha", content.get("lora_alpha", value))
                elif (section, name) == ("model", "lora_alpha"):
                    pass  # with lora_rank
                elif (section, name) == ("sft", "dataset_name"):
                    if Path(value).exists():
                        put("sft_data", value)
                    else:
                        logger.warning(
                            "sft.dataset_name is %r, which is no file here, and there is no stage sft without one. For it set "
                            "`sft_data` to JSONL with image, question and answer.",
                            value,
                        )
                elif (section, name) == ("ipr", "refinement_prompt_template"):
                    # Their code appends the question.
                    template = value.replace("{perception}", "{description}")
                    put("prompts.refinement", template + "\nQuestion: {question}")
                elif (section, name) == ("ipr", "discard_failed_samples"):
                    if not value:
                        raise ValueError("discard_failed_samples is false, but a sample without a winner has no pair.")
                elif name in _AUTHORS_UNUSED:
                    unused.append(f"{section}.{name}")
                else:
                    raise ValueError(f"Unknown name in the authors' layout: {section}.{name}.")
        elif section in ("logging_steps", "save_steps"):
            put(f"sft.{section}", content)
            put(f"dpo.{section}", content)
        elif section in ("output_dir", "seed", "data"):
            put(section, content)
        elif section in _AUTHORS_UNUSED:
            unused.append(section)
        else:
            raise ValueError(f"Unknown name in the authors' layout: {section}.")
    rate = ours.get("gate", {}).get("threshold_learning_rate")
    if rate is not None and rate <= 1e-3 and ours["gate"].get("learn_threshold", True):
        logger.warning(
            "hsr_ee.threshold_lr is %g, at which tau stays about where it starts. For a tau that is learned set "
            "gate.threshold_learning_rate=%g.",
            rate,
            GateTrainingConfig.threshold_learning_rate,
        )
    if unused:
        logger.warning("Not used here: %s. Everything is written under `output_dir`.", ", ".join(unused))
    return ours


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


def run_pipeline(config: SR2SEConfig, stages: Sequence[str] | None = None) -> dict:
    """
    Runs the stages that are not done yet.

    Args:
        config ([`SR2SEConfig`]):
            The run.
        stages (`Sequence[str]`, *optional*):
            Only these, of `STAGES`, in every round. A stage whose forerunner is not done raises a `FileNotFoundError`.

    Returns:
        `dict`: `model` and `gate`, the paths of the last ones that are there, and each stage's report under
        `round-1/pairs` and the like. It is written to `output_dir/run.json`.
    """
    stages = STAGES if stages is None else stages
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise ValueError(f"Unknown stages {unknown}. Expected some of {list(STAGES)}.")
    if "sft" in stages and stages is not STAGES and config.sft_data is None:
        raise ValueError("The stage sft needs `sft_data`: JSONL with `image`, `question` and `answer`.")
    run = _Run(config)
    if config.lora and "target_modules" in config.lora:
        trusted = config.dpo_config(run.folder).trust_remote_code
        check_target_modules(config.lora_config(), config.model, trusted)
    for number in range(1, config.rounds + 1):
        for stage in STAGES:
            if stage in stages and (stage != "sft" or (number == 1 and config.sft_data is not None)):
                run.do(stage, number)
    return run.summary()


# Where the recipe has what `build_pairs` compares
_IN_RECIPE = {
    "config": "refinement, gate_rows or seed",
    "policies": "generation or prompts",
    "weights": "model, dtype or the stages before",
    "labeller": "labels, labeller or role_prompts",
    "rollout_rows": "gate_rows",
    "rollout_steps": "max_steps",
    "source": "data",
    "source_content": "content of data",
}


class _Run:
    def __init__(self, config: SR2SEConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.state = process_state()
        self.contents = {name: _content_of(getattr(config, name)) for name in ("data", "sft_data")}
        local = Path(config.model).exists()
        self.base = str(Path(config.model).absolute()) if local else config.model

    def do(self, stage: str, number: int) -> None:
        marker = self._marker(stage, number)
        if marker.is_file():
            self._check(stage, number)
            logger.info("Stage %s of round %d is done.", stage, number)
            return
        settings = self._settings(stage, number)
        self.state.print(f"SR2SE, round {number}: {stage}")
        report = getattr(self, f"_{stage}")(number)
        gc.collect()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            marker.parent.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"settings": settings, "report": report})
        self.state.wait_for_everyone()
        self.summary()  # a later stage may fail

    def summary(self) -> dict:
        """What is done, and where its model and gate are. The file names them from the run's folder, which may be moved."""
        done = {}
        last = {"base": self.base, "model": self.base, "gate": None, "no_gate": None}
        for number in range(1, self.config.rounds + 1):
            for stage in STAGES:
                if self._marker(stage, number).is_file():
                    done[f"round-{number}/{stage}"] = _read_json(self._marker(stage, number))["report"]
                    if stage in ("sft", "dpo"):
                        last["model"] = f"round-{number}/{stage}/model"
                    if stage == "dpo":  # the earlier gate read another model's hidden states
                        last |= {"gate": None, "no_gate": None}
                    elif stage in ("gate", "final_gate"):
                        why = (done[f"round-{number}/{stage}"] or {}).get("not_trained")
                        last |= {"gate": None if why else f"round-{number}/{stage}/gate", "no_gate": why}
        how = {
            "generation": self.config.generation,
            **self._model_kwargs(last["model"]),
            "stages": done,
        }
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "run.json", {**last, **how})
        self.state.wait_for_everyone()
        return {**{name: path and _within(self.folder, path) for name, path in last.items()}, **how}

    def _marker(self, stage: str, number: int) -> Path:
        return self.folder / f"round-{number}" / stage / "done.json"

    def _start(self, number: int) -> str:
        """The model that a round starts from: a folder of this run, or the base model."""
        if number > 1:
            return f"round-{number - 1}/dpo/model"
        return "round-1/sft/model" if self.config.sft_data is not None else self.config.model

    def _start_model(self, number: int) -> str:
        for stage, before in self._forerunners("pairs", number):
            self._needed(stage, before)
        return _within(self.folder, self._start(number))

    def _forerunners(self, stage: str, number: int) -> list[tuple[str, int]]:
        """The stages whose outcome a stage builds on directly."""
        if stage in ("gate", "dpo"):
            return [("pairs", number)]
        if stage == "final_gate":
            return [("dpo", number)]
        if stage == "pairs" and number > 1:
            return [("dpo", number - 1)]
        return [("sft", 1)] if stage == "pairs" and self.config.sft_data is not None else []

    def _needed(self, stage: str, number: int) -> Path:
        """The folder of a stage that must be done, with the settings of this run."""
        marker = self._marker(stage, number)
        if not marker.is_file():
            raise FileNotFoundError(
                f"Stage {stage} of round {number} is not done yet: there is no {marker}. Run it first."
            )
        self._check(stage, number)
        return marker.parent

    def _check(self, stage: str, number: int) -> None:
        """Raises a `ValueError` if a stage was done with other settings, or from another outcome of those before it."""
        marker = self._marker(stage, number)
        before, settings = _read_json(marker)["settings"], self._settings(stage, number)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"Stage {stage} of round {number} was done with other settings ({', '.join(changed)}). Remove "
                f"{marker.parent} to do it again, or choose another `output_dir`."
            )

    def _settings(self, stage: str, number: int) -> dict:
        """What the outcome of a stage depends on, with that of the stages before it."""
        config = self.config
        rows = ("data", "image_root", "labels", "max_steps", "gate_rows", "prompts", "refinement")
        names = {
            "sft": ("model", "sft_data", "image_root", "lora", "load_in_4bit", "sft"),
            "pairs": rows,
            "gate": ("gate",),
            "dpo": ("prompts", "lora", "load_in_4bit", "dpo"),
            "final_gate": (*rows, "gate"),
        }[stage]
        if not config.labels and stage in ("pairs", "final_gate"):
            names += ("labeller", "role_prompts")
        settings = {name: getattr(config, name) for name in (*names, "dtype", "seed")}
        for name in ("data", "sft_data", "image_root"):
            if settings.get(name) is not None:
                settings[name] = absolute(settings[name])
        # Training reads images alone, and how many prompts fit into memory is no matter of the outcome
        without = {"batch_size"} if "data" in names else set(config.generation) - {"max_pixels"}
        settings["generation"] = {name: value for name, value in config.generation.items() if name not in without}
        for name in ("data", "sft_data"):
            if name in names:
                settings[f"content of {name}"] = self.contents[name]
        if stage != "sft":
            settings["starts_from"] = self._start(number)
        for name, before in self._forerunners(stage, number):
            marker = self._marker(name, before)
            outcome = hashlib.blake2b(marker.read_bytes(), digest_size=16).hexdigest() if marker.is_file() else None
            settings[f"outcome of {name}"] = outcome
        return json.loads(json.dumps(settings))

    # Stages

    def _sft(self, number: int) -> dict:
        config, folder = self.config, self._marker("sft", number).parent
        args = config.sft_config(folder / "trainer")
        processor = load_processor(config.model)
        dataset, skipped = _sft_dataset(config.sft_data, processor, config.generation, config.image_root)
        vision = vision_modules(config.model, args.trust_remote_code)
        quantization = config.quantization_config()
        model = config.model
        if config.lora is None:
            model = AutoModelForImageTextToText.from_pretrained(config.model, **args.model_init_kwargs)
            for name in vision:
                model.get_submodule(name).requires_grad_(False)
            args.model_init_kwargs = None
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=processor,
            quantization_config=without_vision(quantization, vision) if quantization is not None else None,
            peft_config=None if config.lora is None else without_modules(config.lora_config(), vision),
        )
        if quantization is not None:
            keep_gradients_on_cpu(trainer.model)
        if isinstance(trainer.model, PeftModel):
            check_adapted_modules(trainer.model, vision, freeze_vision_tower=True)
            keep_adapters_precise(trainer.model)
        keep_saved_names(trainer.model)
        self._train(trainer, "sft", number)
        return {"rows": len(dataset), "skipped": skipped, **_last_log(trainer)}

    def _pairs(self, number: int) -> dict:
        folder = self._marker("pairs", number).parent
        policies = self._policies(self._start_model(number))
        return self._build(policies, folder, self.config.refinement_config())

    def _gate(self, number: int) -> dict:
        rollouts = self._needed("pairs", number) / "rollouts"
        return self._fit_gate(rollouts, self._marker("gate", number).parent, self._start_model(number))

    def _dpo(self, number: int) -> dict:
        config, folder = self.config, self._marker("dpo", number).parent
        pairs = self._needed("pairs", number) / "pairs.jsonl"
        processor = load_processor(config.model)
        dataset = load_preferences(
            pairs,
            processor,
            config.sub_policy_prompts(),
            config.generation.get("max_pixels", 1_003_520),
            self._image_paths(),
        )
        args = config.dpo_config(folder / "trainer")
        model, quantization, lora = self._start_model(number), config.quantization_config(), config.lora_config()
        if _is_adapter(model):
            if quantization is not None:
                quantization = without_vision(quantization, vision_modules(config.model, args.trust_remote_code))
            base = AutoModelForImageTextToText.from_pretrained(
                config.model, quantization_config=quantization, **args.model_init_kwargs
            )
            model = PeftModel.from_pretrained(base, model, is_trainable=True)
            args.model_init_kwargs = quantization = lora = None
        trainer = SRDPOTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=processor,
            quantization_config=quantization,
            peft_config=lora,
        )
        self._train(trainer, "dpo", number)
        return {"pairs": len(dataset), **_last_log(trainer)}

    def _final_gate(self, number: int) -> dict:
        folder, model = self._marker("final_gate", number).parent, str(self._needed("dpo", number) / "model")
        # As in use: descriptions are decoded greedily. Nothing is refined.
        config = replace(
            self.config.refinement_config(),
            max_refinements=0,
            temperature=0.0,
            validation_samples=1,
            validation_required=1,
            max_rows=min(self.config.gate_rows, self.config.refinement.get("max_rows") or self.config.gate_rows),
        )
        self._build(self._policies(model), folder, config)
        return self._fit_gate(folder / "rollouts", folder, model)

    # What they share

    def _image_paths(self) -> ImagePaths:
        """Which images pairs may name: those that rows of the data may."""
        data = Path(self.config.data)
        if data.is_dir():
            allow_links_in(data)
            return ImagePaths(self.config.image_root)
        return paths_beside(data, self.config.image_root)

    def _model_kwargs(self, model: str) -> dict:
        """How to load a model of this run, or the base, to answer with."""
        trained = model not in (self.base, self.config.model)
        return self.config.model_kwargs(trained and self.config.lora is None)

    def _policies(self, model: str) -> SubPolicies:
        # A training stage before has told transformers to share out weights by ZeRO-3, until the next one's arguments do.
        # Here every process has the whole model, and generates for as long as its own rows need
        unset_hf_deepspeed_config()
        loaded, processor = _load(self.config.model, model, **self._model_kwargs(model))
        return SubPolicies(
            loaded.to(self.state.device), processor, self.config.sub_policy_prompts(), **self.config.generation
        )

    def _build(self, policies: SubPolicies, folder: Path, config: RefinementConfig) -> dict:
        labeller = None
        if not self.config.labels:
            labeller = AgreementLabeller(
                policies, RolePrompts.from_dict(self.config.role_prompts), **self.config.labeller
            )
        try:
            report = build_pairs(
                policies,
                self.config.data,
                folder / "pairs.jsonl",
                config,
                labeller=labeller,
                reasoner=EarlyExitReasoner(policies, max_steps=self.config.max_steps),
                rollout_folder=folder / "rollouts",
                rollout_rows=self.config.gate_rows,
                image_root=self.config.image_root,
            )
        except OtherSettings as error:
            changed = ", ".join(_IN_RECIPE.get(name, name) for name in error.changed)
            raise ValueError(
                f"Stage {folder.name} of {folder.parent.name.replace('-', ' ')} was begun with other settings ({changed}). "
                f"Go on with the same ones, or remove {folder} to begin anew."
            ) from error
        return {name: value for name, value in report.items() if name != "settings"}

    def _fit_gate(self, rollouts: Path, folder: Path, model: str) -> dict | None:
        if not self.state.is_main_process:
            return None
        files = sorted(rollouts.glob("*.safetensors"))
        if not files:
            return _without_gate(f"There are no rollouts in {rollouts}: no row of the data could be used.")
        rolled_out, config = GateRollouts.cat([GateRollouts.load(file) for file in files]), self.config.gate_config()
        try:
            gate, report = train_gate(rolled_out, config)
        except ValueError as error:  # rollouts that cannot teach it anything
            return _without_gate(str(error))
        prompts = self.config.sub_policy_prompts().to_dict()
        gate.save_pretrained(folder / "gate", max_steps=self.config.max_steps, prompts=prompts)
        return {**report, "model": model}

    def _train(self, trainer, stage: str, number: int) -> None:
        """
        Trains, from the last checkpoint if there is one, and saves the adapter, or else the whole model, under
        `folder/model`.
        """
        folder = self._marker(stage, number).parent
        begun, settings = folder / "begun.json", self._settings(stage, number)
        checkpoint = _last_checkpoint(Path(trainer.args.output_dir))
        if checkpoint is not None:
            before = _read_json(begun)
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise ValueError(
                    f"Stage {stage} of round {number} was begun with other settings ({', '.join(changed)}). Go on with the "
                    f"same ones, or remove {folder} to begin anew."
                )
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(begun, settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        if isinstance(trainer.model, PeftModel) and "ref" in trainer.model.peft_config:
            trainer.model.delete_adapter("ref")  # SR-DPO's reference, where the adapter came from
        trainer.save_model(str(folder / "model"))
        self.state.wait_for_everyone()
        rounded = _saved_dtypes(folder / "model") - {"F32"}
        if rounded and self.state.is_main_process:
            logger.warning(
                "%s is saved in %s, as DeepSpeed does with bf16: what was trained is rounded, and small steps are lost. "
                "Launch with DDP or FSDP2, or set bf16=False in the section %s.",
                folder / "model",
                " and ".join(sorted(rounded)),
                stage,
            )


def _sft_dataset(file: str, processor, generation: dict, image_root: str | None) -> tuple[Dataset, int]:
    """Rows of image, question and answer as prompt and completion."""
    marks = special_tokens(processor.tokenizer)
    rows, skipped = [], 0
    for row in read_rows(file, ("question", "answer"), Path(file).parent, image_root):
        if isinstance(row, Row) and holds_special_token(row.answer, marks):
            row = BadRow(row.index, f"{Path(file).name}:{row.index + 1}", "special token in answer")
        if isinstance(row, BadRow):
            warn_of(row, skipped)
            skipped += 1
            continue
        conversation = user_message(without_marks(row.question, marks), True)
        prompt, completion = chat_texts(processor, conversation, row.answer)
        rows.append({"image": row.image_path, "prompt": prompt, "completion": completion})
    if not rows:
        raise ValueError(f"No row of {file} can be used to fine-tune on; {skipped} were skipped.")
    return decoding_images(Dataset.from_list(rows), generation.get("max_pixels", 1_003_520)), skipped


def _content_of(source: str | None) -> str | None:
    return None if source is None else rows_and_digest(source)[1]


def _saved_dtypes(model: Path) -> set[str]:
    dtypes = set()
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    return dtypes


def _is_adapter(model: str) -> bool:
    return (Path(model) / "adapter_config.json").is_file()


def _load(base: str, model: str, **kwargs):
    """A model of a run to answer with, and its processor. An adapter is not merged: in `dtype` that would round it."""
    return load_solver(base, model, **kwargs) if _is_adapter(model) else load_solver(model, **kwargs)


def _without_gate(why: str) -> dict:
    logger.warning("No gate is trained, and the run goes on without one: %s", why)
    return {"not_trained": why}


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _within(folder: Path, path: str) -> str:
    """A path of a run as one from here; the id or path of another model as it is."""
    return str(folder / path) if re.match(r"round-\d+/", path) else path


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state is written last."""
    found = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            found[_read_json(checkpoint / "trainer_state.json")["global_step"]] = str(checkpoint)
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s is not complete: the run was stopped while it was written. It is not used.", checkpoint)
    return found[max(found)] if found else None


def _last_log(trainer) -> dict:
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"steps": trainer.state.global_step, "last_log": logs[-1] if logs else None}


def load_run(folder: str | Path, batch_size: int | None = None) -> EarlyExitReasoner:
    """
    The model of a finished run and its gate, ready to answer.

    Args:
        folder (`str` or `Path`):
            The run's `output_dir`.
        batch_size (`int`, *optional*):
            Prompts at a time, instead of the run's.
    """
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}: {str(folder)!r} is not the output_dir of a run.")
    run = _read_json(file)
    if run["no_gate"] is not None:
        raise ValueError(
            f"The run {str(folder)!r} has no gate for its last model: none could be trained. {run['no_gate']}"
        )
    if run["gate"] is None:
        raise ValueError(f"The run {str(folder)!r} has no gate for its last model yet. Run its stage final_gate.")
    model_path, gate = (_within(Path(folder), run[name]) for name in ("model", "gate"))
    model, processor = _load(
        run["base"], model_path, dtype=run["dtype"], attn_implementation=run["attn_implementation"]
    )
    generation = {**run["generation"], **({"batch_size": batch_size} if batch_size else {})}
    return EarlyExitReasoner.from_pretrained(gate, model.to(process_state().device), processor, **generation)
