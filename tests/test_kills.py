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

"""A run that is killed and resumed ends as one that was not. `make reliability` kills more often."""

import json
import subprocess
import sys
from pathlib import Path

import kills
import pytest
from engines import environment
from tiny_models import tiny_qwen2_5_vl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(base, tmp_path):
    # In a process of its own, since it forks
    done = subprocess.run(
        [sys.executable, kills.__file__, base, str(tmp_path / "runs"), "--kills", "8", "--steps", "10"],
        env=environment(),
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert result["kills"] >= 6 and len(result["stages"]) >= 3
    assert result["differences"] == []
    compared = kills.contents(Path(tmp_path / "runs" / "killed"))
    assert compared["last"] == "checkpoint-10"
    assert {"adapter_model.safetensors", "proposer/adapter_model.safetensors", "optimizer.pt"} <= compared.keys()


def test_what_is_compared_shows_a_difference(base, tmp_path):
    for name, seed in (("one", 0), ("other", 0), ("else", 1)):
        trainer = kills.TalkingTrainer(
            model=base,
            args=kills.config(tmp_path / name, max_steps=2, save_strategy="steps", save_steps=1, seed=seed),
            train_dataset=kills.image_dataset(7),
            peft_config=kills.lora(),
        )
        trainer.train()
    assert kills.differences(tmp_path / "one", tmp_path / "other") == []
    assert {"adapter_model.safetensors", "optimizer.pt", "rollouts"} <= set(
        kills.differences(tmp_path / "one", tmp_path / "else")
    )


def test_two_processes_that_are_killed_end_as_two_that_were_not(base, tmp_path):
    result = kills.two_processes("ddp", base, tmp_path, kills=1, seed=0, steps=4)
    assert result["kills"] == 1
    assert result["difference"] <= 1e-6 and result["same_rollouts"] and result["same_state"]
