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

"""What `evolmm train` does: its arguments, from the command line and a recipe, and what is made of them."""

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .commands import UsageError
from .config import EvoLMMConfig
from .data import load_images
from .trainer import EvoLMMTrainer


@dataclass
class TrainArguments:
    """
    What is trained on.

    Args:
        image_dir (`str`):
            Images: a folder (searched recursively), the id of a dataset on the Hub, or webdataset shards such as
            `"shards/{0000..0015}.tar"`.
        image_split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub.
        image_include (`list[str]`, *optional*):
            First-level subfolders of a folder to keep.
        image_streaming (`bool`, *optional*, defaults to `True`):
            Whether to stream the images. A stream's length is not known: `max_steps` says how long to train.
        eval_dataset (`str`, *optional*):
            Labelled questions with the columns `image`, `question` and `answer`: the id of a dataset on the Hub, or a
            folder that `datasets.load_dataset` reads, such as images with a `metadata.jsonl`. Never trained on.
        eval_split (`str`, *optional*, defaults to `"test"`):
            Its split. A slice works too, as in `"test[:500]"`.
    """

    image_dir: str = field(
        metadata={
            "help": "Images: a folder, the id of a dataset on the Hub, or webdataset shards ('a/{0000..0015}.tar')."
        }
    )
    image_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    image_include: list[str] | None = field(
        default=None, metadata={"help": "First-level subfolders of a folder to keep."}
    )
    image_streaming: bool = field(
        default=True, metadata={"help": "Whether to stream the images; `max_steps` then says how long to train."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Labelled questions, with the columns image, question and answer: a folder or the id of a dataset "
            "on the Hub. Never trained on."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "Split of `eval_dataset`, such as 'test[:500]'."})


class RecipeParser(TrlParser):
    """
    TRL's parser of the command line and a recipe (YAML, `--config`), which says in one line what is wrong, with the nearest
    name of what does not exist.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        _refuse(message)

    def parse_args_and_config(self, args: Sequence[str], **kwargs) -> tuple:
        """
        The arguments as dataclasses.

        Args:
            args (`Sequence[str]`):
                The command line.
            **kwargs:
                As in TRL.

        Raises:
            [`UsageError`]: if an option or a key does not exist, or a value cannot be used.
        """
        args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if "--config" in args:
            self._check_recipe(args)
        try:
            return super().parse_args_and_config(args, **kwargs)
        except ValueError as error:  # of a configuration that contradicts itself
            raise UsageError(str(error)) from error

    def _check_recipe(self, args: list[str]) -> None:
        path = dict(zip(args, [*args[1:], None], strict=True))["--config"]
        if path is None:
            raise UsageError("--config was given no file. Pass a YAML file, such as --config recipe.yaml.")
        if not Path(path).is_file():
            raise UsageError(f"There is no file {path!r}, which --config names.")
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise UsageError(f"{path} holds {type(recipe).__name__}, expected lines such as `learning_rate: 1.0e-6`.")
        known = {action.dest for action in self._actions} - {"help"} | {"env"}
        for key in recipe:
            if key in known:
                continue
            if f"--{key}" in launch_options():
                raise UsageError(
                    f"{path}: {key!r} is an option of `accelerate launch`. Pass it on the command line, as --{key}."
                )
            raise UsageError(f"{path}: unknown key {key!r}.{nearest(str(key), known)}")

    def set_defaults_with_config(self, **config) -> list[str]:
        # argparse checks text against an option's type, and takes anything else as it is
        checked = {
            name: str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
            for name, value in config.items()
        }
        return super().set_defaults_with_config(**checked)


def make_parser() -> RecipeParser:
    """The parser of `evolmm train`: [`TrainArguments`], [`EvoLMMConfig`] and TRL's `ModelConfig`."""
    return RecipeParser((TrainArguments, EvoLMMConfig, ModelConfig))


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`, which says in one line what is wrong."""
    parser = launch_command_parser()
    parser.error = _refuse
    return parser


def launch_options() -> dict[str, argparse.Action]:
    """The options of `accelerate launch`."""
    return launch_command_parser()._option_string_actions


def _refuse(message: str):
    raise UsageError(f"{message}. `evolmm train --help` says more.")


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the most similar known name, or nothing."""
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {near[0]}?" if near else ""


def make_trainer(data_args: TrainArguments, training_args: EvoLMMConfig, model_args: ModelConfig) -> EvoLMMTrainer:
    """The trainer of a run from its arguments, as [`make_parser`] reads them."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if model_args.use_peft and model_args.lora_target_modules is None and not model_args.lora_target_parameters:
        model_args.lora_target_modules = "all-linear"  # of the language model: the vision tower is left out

    images = load_images(
        data_args.image_dir,
        split=data_args.image_split,
        streaming=data_args.image_streaming,
        include=data_args.image_include,
    )
    questions = None
    if data_args.eval_dataset is not None:
        questions = _load_questions(data_args.eval_dataset, data_args.eval_split)

    return EvoLMMTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=images,
        eval_dataset=questions,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def _load_questions(source: str, split: str) -> Dataset:
    try:
        return load_dataset(source, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        if os.path.exists(source):
            raise
        raise type(error)(
            f"`eval_dataset` is {source!r}: there is no such folder or file here (the working directory is "
            f"{os.getcwd()!r}), and as a dataset on the Hub it could not be loaded: {error}"
        ) from error


def train(trainer: EvoLMMTrainer) -> None:
    """Trains, saves and, if the arguments say so, resumes and pushes."""
    args = trainer.args
    # "true" resumes from the newest checkpoint in `output_dir`, anything else is a checkpoint's folder
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume is not None and resume.lower() == "true" else resume)

    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()
