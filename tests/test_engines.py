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

"""The trainer on several processes, launched as users launch it."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from engines import ENGINES, command, environment, idle_movement, largest_difference, movement, run
from safetensors.torch import load_file
from tiny_models import tiny_qwen2_5_vl
from transformers import AutoModelForImageTextToText


pytest.importorskip("deepspeed", reason="the tests of the engines need deepspeed: pip install evolmm-trl[deepspeed]")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_qwen2_5_vl(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run(None, base, folder)[0], rollouts(folder)


def rollouts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def without(log: list[dict]) -> list[dict]:
    """Without what is measured on a clock, and of the whole run."""
    clocks = ("time/", "train_", "total_flos", "_runtime", "_per_second", "step_time")
    return [{k: v for k, v in row.items() if not any(clock in k for clock in clocks)} for row in log]


@pytest.mark.parametrize("engine", ["ddp", "multi_gpu", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_an_engine_trains_as_one_process_does(engine, base, one_process, tmp_path):
    one, records = one_process
    first, second = run(engine, base, tmp_path)
    expected = ENGINES[engine]
    assert (first["engine"], first["processes"], first["zero"]) == (expected.kind, 2, expected.zero)
    assert first["model"] == expected.model
    assert (first["sharded"] > 0) == (engine in ("zero3", "zero3_offload", "fsdp2"))
    assert ("DeepSpeedCPUAdam" in first["optimizer"]) == (engine == "zero3_offload")
    assert first["shared"] and second["shared"]

    assert largest_difference(first["weights"], one["weights"]) < 1e-4
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert idle_movement(first["weights"]) == idle_movement(one["weights"]) == 0.0
    assert min(movement(first["weights"], role) for role in ("default", "proposer")) > 1e-3

    assert first["baselines"] == second["baselines"]
    for role, baseline in one["baselines"].items():
        assert first["baselines"][role] == pytest.approx(baseline)
    assert first["betas"] == second["betas"] == pytest.approx(one["betas"], rel=1e-4)
    # One log per run, with each rollout once and in the order of the images
    assert [(r["step"], r["image_id"], r["question"]) for r in rollouts(tmp_path)] == [
        (r["step"], r["image_id"], r["question"]) for r in records
    ]
    for mine, theirs in zip(without(first["log"]), without(one["log"]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_deepspeed_moves_nothing_in_a_step_without_a_question_within_the_band(base, tmp_path):
    # It makes its step within the backward
    options = {"agreement_band": [0.6, 0.7], "weight_decay": 0.1, "max_steps": 6}
    (one,) = run(None, base, tmp_path / "one", **options)
    first, second = run("zero2", base, tmp_path / "zero2", **options)
    trained = {r["step"] for r in rollouts(tmp_path / "zero2") if r["trained_on"]["solver"]}
    skipped = {2, 3, 4, 5} - trained
    assert 1 in trained and skipped  # so that there is momentum
    for step in skipped:
        assert largest_difference([first["weights"][step - 1]], [first["weights"][step - 2]]) == 0.0
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert largest_difference(first["weights"], one["weights"]) < 1e-4
    assert movement(first["weights"], "default") > 1e-3


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_all_weights_of_a_sharded_model_are_saved_with_the_names_of_the_base(engine, base, tmp_path):
    first, _ = run(engine, base, tmp_path, "--no_lora", "--save", max_steps=2, learning_rate=1e-3)
    names = [set(load_file(Path(folder) / "model.safetensors")) for folder in (base, tmp_path / "model")]
    assert names[1] - {"lm_head.weight"} == names[0]  # it is the embeddings', which one of the two engines saves twice
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    for name, weight in first["final"].items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=0)
    assert movement(first["weights"], "layers") > 0


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_sharded_run_resumes_where_it_was(engine, base, tmp_path):
    # The checkpoint is of before the proposer's first step, whose adapter has no optimizer state yet
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = run(engine, base, tmp_path, **options)[0]
    records = (tmp_path / "rollouts.jsonl").read_bytes()
    for result in tmp_path.glob("result-*.pt"):
        result.unlink()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = run(engine, base, tmp_path, "--resume", **options)[0]
    assert len(resumed["weights"]) == 3 and resumed["sharded"] > 0
    assert largest_difference(resumed["weights"], whole["weights"][3:]) == 0.0
    assert resumed["betas"] == whole["betas"] and resumed["baselines"] == whole["baselines"]
    assert (tmp_path / "rollouts.jsonl").read_bytes() == records


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_all_processes_rewind_to_the_same_checkpoint(engine, base, tmp_path):
    """Their logs differ in what is measured on a clock, and one of them is in the checkpoint."""
    guard = {"action": "rewind", "window": 1, "patience": 2, "max_kl": 1e-9, "min_distinct_questions": None}
    first, second = run(engine, base, tmp_path, save_strategy="steps", save_steps=1, collapse_guard=guard)
    assert first["log"] != second["log"] and len(first["weights"]) < 12
    for result in (first, second):
        # The KL is above 0 from step 2 on
        assert largest_difference([result["final"]], [first["weights"][0]]) == 0.0


def test_a_process_that_dies_ends_the_job_with_its_error(base, tmp_path):
    start = time.monotonic()
    done = subprocess.run(
        command("ddp", base, tmp_path, "--die"), env=environment(), timeout=300, capture_output=True, text=True
    )
    assert done.returncode != 0 and "MemoryError: process 1 has run out of memory" in done.stderr
    assert time.monotonic() - start < 150
    assert not list(tmp_path.glob("result-*.pt"))
