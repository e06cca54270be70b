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

"""Launches `engine_run.py`, or another script, under the engines that users launch with, and compares what comes out."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "engine_run.py"


@dataclass(frozen=True)
class Engine:
    """
    How a run is launched, and what it must say of itself afterwards.

    Args:
        launcher (`tuple[str, ...]`):
            What is launched with, `{config}` standing for the folder of the shipped configurations.
        kind (`str`), model (`str`), zero (`int`, *optional*):
            The distributed type, the class of the wrapped model, and the stage of ZeRO.
    """

    launcher: tuple[str, ...]
    kind: str
    model: str
    zero: int | None = None


def _accelerate(name: str, *more: str) -> tuple[str, ...]:
    options = ("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0")
    return ("accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/{name}.yaml", *options, *more)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENGINES = {
    "ddp": Engine(TORCHRUN, "MULTI_CPU", "DistributedDataParallel"),
    "multi_gpu": Engine(_accelerate("multi_gpu"), "MULTI_CPU", "DistributedDataParallel"),
    "zero1": Engine(_accelerate("zero2", "--zero_stage", "1"), "DEEPSPEED", "DeepSpeedEngine", 1),
    "zero2": Engine(_accelerate("zero2"), "DEEPSPEED", "DeepSpeedEngine", 2),
    "zero3": Engine(_accelerate("zero3"), "DEEPSPEED", "DeepSpeedEngine", 3),
    "zero3_offload": Engine(_accelerate("zero3_offload"), "DEEPSPEED", "DeepSpeedEngine", 3),
    "fsdp2": Engine(_accelerate("fsdp2"), "FSDP", "FSDPPeftModel"),
}


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
    }


def command(
    engine: str | None, base: str, folder: Path, *arguments: str, script: Path = SCRIPT, **options
) -> list[str]:
    """The command line of a run; `None` stands for one process without a launcher."""
    launcher = () if engine is None else ENGINES[engine].launcher
    start = [sys.executable, "-m", *launcher] if launcher else [sys.executable]
    return [*start, str(script), base, str(folder), "--options", json.dumps(options), *arguments]


def run(engine: str | None, base: str, folder: Path, *arguments: str, script: Path = SCRIPT, **options) -> list[dict]:
    """
    Runs to the end.

    Returns:
        `list[dict]`: what each process kept.
    """
    if engine is None:
        # As many images per step as two processes have, one after the other
        options["gradient_accumulation_steps"] = 2 * options.get("gradient_accumulation_steps", 2)
    done = subprocess.run(
        command(engine, base, folder, *arguments, script=script, **options),
        env=environment(),
        timeout=1200,
        capture_output=True,
        text=True,
    )
    results = sorted(Path(folder).glob("result-*.pt"))
    # DeepSpeed on the CPU now and then aborts at exit, after everything is written
    if len(results) != (1 if engine is None else 2):
        raise RuntimeError(
            f"{engine} failed with code {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        )
    return [torch.load(result, weights_only=True) for result in results]


def largest_difference(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> float:
    """The largest difference between the weights of two runs, over all steps."""
    assert [step.keys() for step in one] == [step.keys() for step in other]
    return max((a[name] - b[name]).abs().max().item() for a, b in zip(one, other, strict=True) for name in a)


def idle_movement(weights: list[dict[str, torch.Tensor]], proposer_update_every: int = 5) -> float:
    """The largest movement of an adapter in a step of the other role."""
    largest = 0.0
    for step in range(1, len(weights)):
        idle = ".default." if step % (proposer_update_every + 1) == proposer_update_every else ".proposer."
        names = [name for name in weights[step] if idle in name]
        assert names
        largest = max(largest, *((weights[step][n] - weights[step - 1][n]).abs().max().item() for n in names))
    return largest


def movement(weights: list[dict[str, torch.Tensor]], role: str) -> float:
    """How far a role's adapter came from the first step to the last."""
    return max((weights[-1][n] - weights[0][n]).abs().max().item() for n in weights[0] if f".{role}." in n)
