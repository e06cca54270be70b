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

"""`evolmm train`."""

import argparse
import os
from collections.abc import Sequence

from . import UsageError


# For `--help`, which does not wait for the libraries that know the others
_OPTIONS = """\
options that matter first:
  --model_name_or_path MODEL      id on the Hub or folder of a vision-language model
  --image_dir IMAGES              a folder of images, the id of a dataset on the Hub, or webdataset shards
  --output_dir FOLDER             where the adapters, the checkpoints and the log of rollouts go
  --config RECIPE.yaml            options from a file; those on the command line replace them
  --use_peft                      train LoRA adapters, one per role; without it all weights
  --dtype bfloat16                precision of the frozen weights
  --max_steps N                   optimizer steps
  --learning_rate X               step size of AdamW
  --num_generations N             answers per question, the N of the vote
  --per_device_train_batch_size N answers of a process at a time
  --eval_dataset QUESTIONS        labelled questions: without them only agreement is known, not accuracy
  --collapse_guard stop           or rewind: end the run when it collapses
  --report_to tensorboard         or wandb, trackio
  --resume_from_checkpoint true   go on from the newest checkpoint in --output_dir
  --push_to_hub                   upload the result

Every field of `EvoLMMConfig` and of TRL's `ModelConfig` is an option: `evolmm train --help_all`, docs/configuration.md.

several processes:
  Those of all GPUs are started unless `accelerate launch` or `torchrun` has started this one. Options of `accelerate
  launch` may be given too, such as --num_processes 4, and --accelerate_config FILE is its configuration.
"""
_EXAMPLES = """\
examples:
  evolmm train --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16 --use_peft \\
      --image_dir images/train --output_dir charts-evolmm --max_steps 1200
  evolmm train --config recipe.yaml --image_dir images/train --output_dir charts-evolmm
  evolmm train --accelerate_config zero3.yaml --num_processes 4 --config recipe.yaml --output_dir charts-evolmm
"""


def add_command(commands) -> None:
    """Adds `train` to the parser of `evolmm`."""
    train = commands.add_parser(
        "train",
        help="train a model on images without labels",
        usage="evolmm train [--config RECIPE.yaml] [--OPTION VALUE ...]",
        description="Trains a vision-language model on images that nobody labelled. It asks itself questions about them, "
        "answers\neach several times, and learns from how far the answers agree.\n\n" + _OPTIONS,
        epilog=_EXAMPLES,
    )
    train.add_argument("--help_all", action="store_true", help="show every option, which takes some seconds")
    train.set_defaults(run=_run, takes_more=True)


def _run(arguments: argparse.Namespace) -> int:
    from ..training import make_parser, make_trainer, train

    parser = make_parser()
    if arguments.help_all:
        parser.prog = "evolmm train"
        parser.print_help()
        return 0
    own, launch = _split(parser, arguments.more)
    if launch is not None:
        return _launch(launch, own)
    data_args, training_args, model_args = parser.parse_args_and_config(own)
    if model_args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing. Pass one, such as Qwen/Qwen2.5-VL-3B-Instruct.")
    trainer = make_trainer(data_args, training_args, model_args)
    try:
        train(trainer)
    finally:
        if trainer.state.global_step > 0:  # what went wrong after hours is not run again to see where
            arguments.traceback = True
    return 0


def _split(parser: argparse.ArgumentParser, given: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """What is ours, and what `accelerate launch` is given, or `None` if this process is the one that trains."""
    import torch

    from ..training import launch_options, nearest

    names, ours = launch_options(), {"--config", *parser._option_string_actions}
    own, launch, to = [], [], None
    for word in given:
        name = word.split("=")[0]
        if word.startswith("--") and len(word) > 2:
            if name in ours:
                to = own
            elif name == "--accelerate_config" or name in names:
                to = launch
                word = word.replace("--accelerate_config", "--config_file", 1)
            else:
                raise UsageError(f"unknown option {name}.{nearest(name, [*ours, *names])}")
        elif to is None:
            raise UsageError(f"{word!r} stands alone. A recipe is given as --config {word}.")
        to.append(word)
    if launch:
        return own, launch
    launched = "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched or "--use_cpu" in own or torch.accelerator.device_count() < 2:
        return own, None
    return own, []


def _launch(options: list[str], own: list[str]) -> int:
    """Trains in processes that `accelerate launch` starts; each says itself what goes wrong."""
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..training import launch_parser

    for option, file in zip(options, options[1:], strict=False):
        if option == "--config_file" and not os.path.isfile(file):
            raise UsageError(f"There is no file {file!r}, which --accelerate_config names.")
    module = ["--module", "evolmm_trl.cli", "train"]
    launch = launch_parser().parse_args([*options, *module, *own])
    if launch.training_script != module[1]:
        raise UsageError(f"{launch.training_script!r} belongs to no option.")
    try:
        launch_command(launch)
    except (CalledProcessError, ChildFailedError):
        return 1
    return 0
