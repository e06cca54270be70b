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

"""Checkpoints: which are complete, and the questions that wait for the proposer's step, in safetensors."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from .rollout.samples import EncodedPrompt, Sample


logger = logging.getLogger(__name__)

STATE_NAME = "evolmm_state.json"


def check_complete(checkpoint: str | Path) -> None:
    """
    Fails if a checkpoint was not written to its end, or is another trainer's.

    Args:
        checkpoint (`str` or `Path`):
            Folder of a checkpoint.

    Raises:
        `ValueError`: if it is missing, half-written or not of this package.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder; expected a checkpoint, such as output_dir/checkpoint-100.")
    if not (checkpoint / STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} lacks {STATE_NAME}: it is not a checkpoint of this trainer.")
    steps = []
    for name, key in ((STATE_NAME, "step"), (TRAINER_STATE_NAME, "global_step")):  # the second is written last
        try:
            steps.append(json.loads((checkpoint / name).read_text())[key])
        except (FileNotFoundError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{checkpoint} is not complete: {name} is missing or cut off. The run was stopped while it was written; "
                "resume from an earlier checkpoint, or with `resume_from_checkpoint=True` from the last complete one."
            ) from error
    if steps[0] != steps[1]:
        raise ValueError(f"{checkpoint} is not complete: its files are of the steps {steps[0]} and {steps[1]}.")


def complete_checkpoints(output_dir: str | Path) -> Iterator[Path]:
    """The checkpoints of a run that were written to their end, from the newest on, with a warning for each other one."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            check_complete(folder)
        except ValueError as error:
            logger.warning("Not resumed from: %s", error)
        else:
            yield folder


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest checkpoint that was written to its end.

    Args:
        output_dir (`str` or `Path`):
            Folder of a run.

    Returns:
        `str` or `None`: its folder; `None` if there is none.
    """
    folder = next(complete_checkpoints(output_dir), None)
    return None if folder is None else str(folder)


def save_samples(samples: Sequence[Sample], file: Path) -> None:
    """
    Writes samples to a safetensors file.

    Args:
        samples (`Sequence[Sample]`):
            Samples, each with its prompt.
        file (`Path`):
            File to write.
    """
    tensors = {"advantages": torch.tensor([sample.advantage for sample in samples], dtype=torch.float64)}
    for i, sample in enumerate(samples):
        tensors[f"{i}.completion_ids"] = sample.completion_ids
        if sample.sampling_logps is not None:
            tensors[f"{i}.sampling_logps"] = sample.sampling_logps
        tensors[f"{i}.input_ids"] = sample.prompt.input_ids
        for name, tensor in sample.prompt.token_inputs.items():
            tensors[f"{i}.token.{name}"] = tensor
        for name, tensor in sample.prompt.image_inputs.items():
            tensors[f"{i}.image.{name}"] = tensor
        for name, tensor in (sample.prompt.features or {}).items():
            tensors[f"{i}.features.{name}"] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)


def load_samples(file: Path) -> list[Sample]:
    """
    Reads samples from a file that [`save_samples`] wrote.

    Args:
        file (`Path`):
            File to read.

    Returns:
        `list[Sample]`
    """
    tensors = load_file(file)
    samples = []
    for i, advantage in enumerate(tensors["advantages"].tolist()):
        prompt = EncodedPrompt(
            input_ids=tensors[f"{i}.input_ids"],
            token_inputs=_under(f"{i}.token.", tensors),
            image_inputs=_under(f"{i}.image.", tensors),
            features=_under(f"{i}.features.", tensors) or None,
        )
        samples.append(Sample(prompt, tensors[f"{i}.completion_ids"], advantage, tensors.get(f"{i}.sampling_logps")))
    return samples


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
