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
Kills a run with SIGKILL at random moments, resumes it each time, and compares it with the run that was never killed.

    python tests/kills.py BASE FOLDER --kills 20 --seed 0
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from engines import command, environment, largest_difference, run
from tiny_trainer import TalkingTrainer, config, image_dataset, lora
from transformers import TrainerCallback
from transformers.utils import logging


class ReportingTrainer(TalkingTrainer):
    """Writes a letter to a pipe when it enters a stage."""

    pipe: int

    def _say(self, stage: str) -> None:
        os.write(self.pipe, (("first " if self.state.global_step == 0 else "") + stage + "\n").encode())

    def _roll_out(self, rows):
        self._say("rollout")
        return super()._roll_out(rows)

    def training_step(self, *args, **kwargs):
        self._say("backward")
        return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self._say("save")
        return super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, *args, **kwargs):
        self._say("end of save")
        return super()._save_rng_state(*args, **kwargs)


class SayWhenStepping(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._say("optimizer")


def train(base: str, folder: Path, steps: int, pipe: int) -> None:
    callback = SayWhenStepping()
    trainer = ReportingTrainer(
        model=base,
        args=config(folder, max_steps=steps, save_strategy="steps", save_steps=1, save_total_limit=2),
        train_dataset=image_dataset(7),
        peft_config=lora(lora_dropout=0.1),  # which draws from the random stream
        callbacks=[callback],
    )
    callback.trainer, trainer.pipe = trainer, pipe
    trainer.train(resume_from_checkpoint=True)


def attempt(base: str, folder: Path, steps: int, kill: tuple[int, float] | None) -> str | None:
    """
    Runs a forked process, up to its end or to a kill: so many stages after its begin, and so many seconds after that.

    Returns:
        `str` or `None`: the stage it was killed in; `None` if it came to its end.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            train(base, folder, steps, write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    stages = []
    with os.fdopen(read) as pipe:
        for line in pipe:
            stages.append(line.strip())
            if kill is not None and len(stages) == kill[0]:
                time.sleep(kill[1])
                os.kill(pid, signal.SIGKILL)
                break
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return stages[-1]
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"The run failed after {stages[-3:]}.")
    return None


def _values(state):
    """The same with the bytes of its tensors and arrays."""
    if isinstance(state, torch.Tensor):
        state = state.numpy()
    if isinstance(state, np.ndarray):
        return str(state.dtype), state.shape, state.tobytes()
    if isinstance(state, dict):
        return {key: _values(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_values(value) for value in state]
    return state


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for what a clock wrote."""
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found: dict[str, Any] = {"rollouts": (folder / "rollouts.jsonl").read_bytes(), "last": checkpoint.name}
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in (".pt", ".pth"):
            # Its bytes also depend on which objects were the same one
            found[str(path.relative_to(checkpoint))] = _values(torch.load(path, weights_only=False))
        elif path.suffix == ".safetensors" or path.name in ("evolmm_state.json", "adapter_config.json"):
            found[str(path.relative_to(checkpoint))] = path.read_bytes()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found["log"] = [{k: v for k, v in row.items() if "time" not in k} for row in state["log_history"]]
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What two runs left behind that is not the same bit for bit."""
    first, second = contents(one), contents(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def one_process(base: str, folder: Path, kills: int, seed: int, steps: int) -> dict:
    """Kills in one process."""
    rng = random.Random(seed)
    attempt(base, folder / "whole", steps, None)
    stages: Counter[str] = Counter()
    finished = False
    # Five stages make a step: on average a run comes no further than a step before it is killed
    while not finished and stages.total() < kills:
        stage = attempt(base, folder / "killed", steps, (rng.randint(1, 8), rng.uniform(0, 0.05)))
        finished = stage is None
        stages.update([stage] if stage else [])
    if not finished:
        attempt(base, folder / "killed", steps, None)
    return {
        "kills": stages.total(),
        "stages": dict(stages),
        "differences": differences(folder / "whole", folder / "killed"),
    }


def kill_tree(process: subprocess.Popen) -> None:
    """Kills a launcher and all that it launched."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in tree:
        one.kill()
    psutil.wait_procs(tree)
    process.wait()


def two_processes(engine: str, base: str, folder: Path, kills: int, seed: int, steps: int) -> dict:
    """Kills of a whole job of two processes, and the largest difference between its weights and those of one not killed."""
    rng = random.Random(seed)
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    arguments = ("--resume",)
    counted, ended = 0, {}
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
        for after in sorted(rng.sample(range(1, steps), kills)) if name == "killed" else []:
            with open(folder / "output.txt", "wb") as output:
                job = subprocess.Popen(
                    command(engine, base, folder / name, *arguments, **options),
                    env=environment(),
                    stdout=output,
                    stderr=output,
                )
                while job.poll() is None and not list((folder / name).glob(f"checkpoint-{after}*")):
                    time.sleep(0.01)
                if job.poll() is None:
                    time.sleep(rng.uniform(0, 0.5))
                    kill_tree(job)
                    counted += 1
        ended[name] = run(engine, base, folder / name, *arguments, **options)[0]
    whole, killed = ended["whole"], ended["killed"]
    return {
        "kills": counted,
        "difference": largest_difference([whole["final"]], [killed["final"]]),
        "same_rollouts": (folder / "whole/rollouts.jsonl").read_bytes()
        == (folder / "killed/rollouts.jsonl").read_bytes(),
        "same_state": whole["baselines"] == killed["baselines"] and whole["betas"] == killed["betas"],
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    shutil.rmtree(args.folder, ignore_errors=True)
    result = one_process(args.base, args.folder, args.kills, args.seed, args.steps)
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the forks, which inherit no other threads
    main(sys.argv[1:])
