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

"""Self-rewarding direct preference optimization (SR-DPO): DPO on the pairs of perception refinement, with the image."""

import copy
import logging
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from ..data import ImagePaths, decode_named_image
from ..engines import keep_saved_names
from ..processing import load_processor, special_tokens
from ..prompts import RolePrompts, without_marks
from ..role_adapters import (
    check_adapted_modules,
    check_quantized_modules,
    keep_adapters_precise,
    keep_gradients_on_cpu,
    vision_modules,
    warn_of_half_precision,
    without_modules,
    without_vision,
)
from .generation import chat_texts
from .rows import BadRow, find_image, json_lines, paths_beside, warn_of
from .sub_policies import SubPolicyPrompts, perception_conversation


logger = logging.getLogger(__name__)

_FIELDS = ("image_path", "question", "chosen", "rejected")


def load_preferences(
    files: "str | Path | Sequence[str | Path]",
    processor: ProcessorMixin,
    prompts: SubPolicyPrompts | RolePrompts | None = None,
    max_pixels: int | None = 1_003_520,
    image_root: str | Path | ImagePaths | None = None,
) -> Dataset:
    """
    Preference pairs as [`SRDPOTrainer`] takes them. The prompt is the one that the pairs were written for, token by token:
    the perception prompt, or the solver's for what [`EvoLMMTrainer`] collects. A line that is broken, lacks a field, names
    a missing image or one outside `image_root`, or holds a special token of the tokenizer is skipped, counted and named in
    the log.

    Args:
        files (`str`, `Path` or a sequence of them):
            JSONL as [`build_pairs`] writes it: `image_path`, `question`, `chosen` and `rejected`. Other fields are not
            looked at.
        processor ([`~transformers.ProcessorMixin`]):
            The model's processor, for its chat template.
        prompts ([`SubPolicyPrompts`] or [`RolePrompts`], *optional*):
            The prompts that the pairs were made with. [`RolePrompts`] for `preferences.jsonl` of [`EvoLMMTrainer`].
        max_pixels (`int` or `None`, *optional*, defaults to `1003520`):
            Images with more pixels are made smaller, as for the sub-policies.
        image_root (`str`, `Path` or [`~evolmm_trl.data.ImagePaths`], *optional*):
            Folder that image paths start from and may not leave. Without it they start from the file's folder and may lead
            into it or the working directory.

    Returns:
        [`~datasets.Dataset`] with the columns `image` (a path; an image when a row is read), `prompt`, `chosen` and
        `rejected`.

    Raises:
        `FileNotFoundError`: if one of the files is not there.
        `ValueError`: if no pair is left, with what was skipped and why.
    """
    prompts = prompts or SubPolicyPrompts()
    files = [files] if isinstance(files, (str, Path)) else list(files)
    marks = special_tokens(processor.tokenizer)
    rows, skipped = [], Counter()
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {str(file)!r}: expected JSONL with preference pairs.")
        paths = paths_beside(file, image_root)
        for line in json_lines(file):
            pair = line if isinstance(line, BadRow) else _read_pair(*line, paths, marks)
            if isinstance(pair, BadRow):
                warn_of(pair, skipped.total())
                skipped[pair.reason] += 1
                continue
            conversation = _conversation(prompts, pair["question"], processor)
            prompt, chosen = chat_texts(processor, conversation, pair["chosen"])
            _, rejected = chat_texts(processor, conversation, pair["rejected"])
            rows.append({"image": pair["image"], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not rows:
        why = ", ".join(f"{count} x {reason}" for reason, count in skipped.items()) or "the files are empty"
        raise ValueError(
            f"There are no preference pairs in {[str(file) for file in files]} ({why}), so there is nothing for SR-DPO to "
            "learn from. See the report beside the pairs: the first description may always have been right, or no "
            "refinement ever. For images outside the image root set `image_root`."
        )
    return decoding_images(Dataset.from_list(rows), max_pixels)


def _conversation(prompts: SubPolicyPrompts | RolePrompts, question: str, processor: ProcessorMixin) -> list[dict]:
    if isinstance(prompts, RolePrompts):
        return prompts.solver_messages(without_marks(question, special_tokens(processor.tokenizer)))
    return perception_conversation(prompts, question, processor)


def _read_pair(index: int, where: str, record: dict, paths: ImagePaths, marks: list[str]) -> dict | BadRow:
    for name in _FIELDS:
        if not isinstance(record.get(name), str) or not record[name].strip():
            return BadRow(index, where, f"lacks {name}")
    image = find_image(record["image_path"], paths, index, where)
    if isinstance(image, BadRow):
        return image
    if record["chosen"] == record["rejected"]:
        return BadRow(index, where, "chosen and rejected are the same")
    for name in ("chosen", "rejected"):
        if holds_special_token(record[name], marks):
            return BadRow(index, where, f"special token in {name}")
    return {**record, "image": image}


def holds_special_token(text: str, marks: Sequence[str]) -> bool:
    """Whether a tokenizer would read a part of a stranger's text as an end of turn, an image or the like."""
    return any(mark in text for mark in marks if mark)


def decoding_images(dataset: Dataset, max_pixels: int | None) -> Dataset:
    """A dataset whose column `image` holds paths, with images in their place whenever rows are read."""
    return dataset.with_transform(_DecodeImages(max_pixels))


class _DecodeImages:
    def __init__(self, max_pixels: int | None):
        self.max_pixels = max_pixels

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        if "image" not in rows:
            return rows
        return {**rows, "image": [decode_named_image(path, self.max_pixels) for path in rows["image"]]}


@dataclass
class SRDPOConfig(DPOConfig):
    r"""
    Configuration of [`SRDPOTrainer`]: a [`~trl.DPOConfig`] with the paper's values as defaults. The effective batch is
    64 pairs on one process (paper; the authors' code accumulates to 256).

    Args:
        length_normalization (`bool`, *optional*, defaults to `False`):
            Whether log-ratios are averaged over each description's tokens instead of summed, TRL's `"sigmoid_norm"`.
            It takes away the reward for length where winners are longer than losers. Averages are smaller than sums: use
            a `beta` larger by about the number of tokens.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether the vision tower stays as it is, under LoRA and full training alike.
    """

    length_normalization: bool = field(
        default=False,
        metadata={"help": "Average log-ratios over tokens instead of summing them (TRL's 'sigmoid_norm')."},
    )
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Whether the vision tower stays as it is, under LoRA and full training alike."}
    )

    # Defaults that differ from DPOConfig's
    learning_rate: float = field(default=5e-7, metadata={"help": "Learning rate of AdamW (paper)."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs per process and micro-batch."})
    gradient_accumulation_steps: int = field(
        default=16, metadata={"help": "Micro-batches per step; 4 x 16 makes the paper's 64 on one process."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate (code)."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up, below 1 as a share of all steps (code)."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay (code)."})
    max_length: int | None = field(
        default=2048, metadata={"help": "Longest prompt with image and description, in tokens (code)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.length_normalization:
            if self.loss_type != ["sigmoid"]:
                raise ValueError(
                    f"`length_normalization` replaces the loss 'sigmoid', but `loss_type` is {self.loss_type}. Leave one "
                    "of them unset."
                )
            self.loss_type = ["sigmoid_norm"]

    @property
    def effective_batch_size(self) -> int:
        """Pairs per optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


class SRDPOTrainer(DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`] on preference pairs of descriptions (Eq. 27 to 29 of SR2SE). Beside it, it checks that the
    image reaches policy and reference, takes the model as given for the reference, keeps LoRA out of the vision tower and
    adapters of a quantized base in float32. All else is inherited.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to train, the SFT checkpoint. As given it is the reference, too. Of a `PeftModel` the adapter
            `"default"` is trained on. Weights that are trained themselves must be in float32: in bfloat16 steps of the
            paper's learning rate are lost.
        args ([`SRDPOConfig`], *optional*):
            The settings.
        train_dataset ([`~datasets.Dataset`]):
            As [`load_preferences`] makes it, or any vision dataset in TRL's preference format.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            In the same format.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            The model's processor.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            As in [`~trl.DPOTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            With `peft_config` for QLoRA; the model must be given by id. The vision tower and the LM head stay as they are,
            unless its `llm_int8_skip_modules` says what to leave out.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Without it all weights are trained.

    Example:

    ```python
    >>> trainer = SRDPOTrainer(
    ...     model="charts-sft",
    ...     args=SRDPOConfig(output_dir="charts-sr-dpo"),
    ...     train_dataset=load_preferences("pairs.jsonl", processor),
    ...     peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sr-dpo", "evolmm-trl"]
    _name = "SR-DPO"
    _paper = {
        "title": "From Self-Rewarding to Self-Evolving: A Unified Framework for Adaptive Multimodal Reasoning",
        "citation": textwrap.dedent("""\
            @misc{cheng2026selfevolving,
                title        = {{From Self-Rewarding to Self-Evolving: A Unified Framework for Vision-Language Models via Hierarchical Reasoning and Preference Optimization}},
                author       = {Changbin Cheng and Jisheng Dang and Hong Peng and Yulan Guo and Bin Hu and Tat-Seng Chua},
                year         = 2026,
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: SRDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: LoraConfig | None = None,
    ):
        model_id = model if isinstance(model, str) else model.config._name_or_path
        if args is None:
            args = SRDPOConfig(f"{Path(model_id).name}-SR-DPO")
        if not isinstance(args, SRDPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; expected an `SRDPOConfig`.")
        if train_dataset is None or not {"image", "images"} & set(train_dataset.column_names or ()):
            raise ValueError(
                "`train_dataset` has no column `image`: SR-DPO prefers one description of an image to another, and must "
                "see it. Pass what `load_preferences` returns."
            )
        revision = (args.model_init_kwargs or {}).get("revision")
        vision = vision_modules(model, args.trust_remote_code, revision)
        if processing_class is None:
            processing_class = load_processor(model_id, revision=revision, trust_remote_code=args.trust_remote_code)
        if quantization_config is not None:
            quantization_config = without_vision(quantization_config, vision)
        if peft_config is not None and args.freeze_vision_tower:
            peft_config = without_modules(peft_config, vision)
        # TRL would load the reference anew from where the model once came from, whatever has become of it since.
        reference = None
        if peft_config is None and isinstance(model, PreTrainedModel):
            reference = copy.deepcopy(model)

        # TRL rounds what is trained on a quantized base to bfloat16
        given = {}
        if isinstance(model, PeftModel) and _is_quantized(model.get_base_model()):
            given = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

        super().__init__(
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

        if isinstance(self.model, PeftModel):
            check_adapted_modules(self.model, vision, args.freeze_vision_tower)
            if _is_quantized(self.model.get_base_model()):
                check_quantized_modules(self.model)
                keep_gradients_on_cpu(self.model)
            keep_adapters_precise(self.model)
            for name, values in given.items():
                for adapter in ("default", "ref"):
                    self.model.get_parameter(name.replace(".default.", f".{adapter}.")).data.copy_(values)
        elif args.freeze_vision_tower:
            for name in vision:
                self.model.get_submodule(name).requires_grad_(False)
        keep_saved_names(self.model)
        warn_of_half_precision(self)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.accelerator.print(
            f"SR-DPO trains {trained:,} parameters on {len(train_dataset):,} pairs, {args.effective_batch_size} per step."
        )
        self._image_checked = False

    def _compute_loss(self, model, inputs, return_outputs):
        if not inputs["completion_mask"].any(1).all():
            raise ValueError(
                f"`max_length` is {self.args.max_length}, which leaves nothing of a description behind its prompt and image. "
                "Make it larger, or images smaller by `max_pixels`."
            )
        if not self._image_checked:
            self._check_image_reaches_log_probs("policy", model, inputs)
            if self.ref_model is not None:
                self._check_image_reaches_log_probs("reference", self.ref_model, inputs)
            elif isinstance(self.model, PeftModel):
                adapted = self.accelerator.unwrap_model(self.model)
                with use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
                    self._check_image_reaches_log_probs("reference", self.model, inputs)
            self._image_checked = True
        return super()._compute_loss(model, inputs, return_outputs)

    def _check_image_reaches_log_probs(self, role: str, model, inputs) -> None:
        """Raises a `ValueError` unless other pixels give other log-probabilities."""
        if "pixel_values" not in inputs:
            raise ValueError(
                f"The batch has no `pixel_values`, only {sorted(inputs)}: the model would not see the image."
            )
        other = {**inputs, "pixel_values": 1.0 - inputs["pixel_values"]}
        # Without dropout, which would make any two forwards differ and shift the random stream of a resumed run
        training = model.training
        model.eval()
        with torch.no_grad():
            seen, changed = (self._log_probs(model, batch) for batch in (inputs, other))
        model.train(training)
        if torch.equal(seen, changed):
            raise ValueError(
                f"Other pixels give the same log-probabilities of the {role}: the image does not reach the loss. Check the "
                "model's processor and chat template."
            )

    def _log_probs(self, model, inputs) -> torch.Tensor:
        model_inputs = {k: v for k, v in inputs.items() if k != "completion_mask"}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**model_inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs


def _is_quantized(model: PreTrainedModel) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
