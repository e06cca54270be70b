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

"""SR-DPO on several processes, launched as users launch it."""

import json
from pathlib import Path

import pytest
import torch
from engines import ENGINES, ROOT, largest_difference, run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_sr2se_sub_policies import picture
from tiny_models import tiny_qwen2_5_vl
from transformers import AutoModelForImageTextToText

from evolmm_trl.role_adapters import vision_modules, without_modules


pytest.importorskip("deepspeed", reason="the tests of the engines need deepspeed: pip install evolmm-trl[deepspeed]")

SCRIPT = ROOT / "tests" / "sr_dpo_run.py"
TRAINED = ["--lora", "--weights", "--adapter"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    words = ["red bar", "a red bar and a blue bar", "the tallest bar", "value 12", "value 7", "no bar", "bar", "12"]
    with open(folder / "pairs.jsonl", "w") as file:
        for i, word in enumerate(words):
            picture(i).save(folder / f"{i}.png")
            record = {"image_path": f"{i}.png", "question": f"How many? {i}", "chosen": word, "rejected": words[i - 3]}
            file.write(json.dumps(record) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """One that has been trained before, such as EvoLMM's solver."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, without_modules(lora, vision_modules(base, False, None)))
    assert isinstance(model, PeftModel)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(base, pairs, adapter, tmp_path_factory):
    def train(engine: str | None, trained: str) -> tuple[list[dict], dict]:
        arguments = [trained, *([str(adapter)] if trained == "--adapter" else []), "--pairs", str(pairs)]
        folder = tmp_path_factory.mktemp("run")
        results = run(engine, base, folder, *arguments, script=SCRIPT, gradient_accumulation_steps=1)
        if trained == "--weights":
            names = [set(load_file(Path(place) / "model.safetensors")) for place in (base, folder / "model")]
            assert names[1] - {"lm_head.weight"} == names[0]  # it is the embeddings', which some engines save twice
            saved = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).state_dict()
        else:
            saved = load_file(folder / "model" / "adapter_model.safetensors")
        return results, saved

    return train


@pytest.fixture(scope="module")
def one_process(train):
    results = {trained: train(None, trained) for trained in TRAINED}
    return {trained: (result, saved) for trained, ((result,), saved) in results.items()}


@pytest.mark.parametrize(("engine", "trained"), [("zero3", "--lora"), ("fsdp2", "--weights")])
def test_a_sharded_run_resumes_where_it_was(engine, trained, base, pairs, tmp_path):
    arguments = (engine, base, tmp_path, trained, "--pairs", str(pairs))
    options = {"script": SCRIPT, "save_strategy": "steps", "save_steps": 2}
    whole = run(*arguments, **options)[0]
    for result in tmp_path.glob("result-*.pt"):
        result.unlink()
    resumed = run(*arguments, "--resume", **options)[0]
    assert len(resumed["weights"]) == 1 and resumed["sharded"] > 0
    assert largest_difference(resumed["weights"], whole["weights"][2:]) == 0.0


@pytest.mark.parametrize(
    ("engine", "trained"),
    [
        ("ddp", "--lora"),
        ("zero2", "--weights"),
        *(("zero3", trained) for trained in TRAINED),
        *(("fsdp2", trained) for trained in ("--lora", "--weights")),
    ],
)
def test_an_engine_trains_as_one_process_does(engine, trained, train, one_process):
    one, one_saved = one_process[trained]
    (first, second), saved = train(engine, trained)
    expected = ENGINES[engine]
    assert (first["engine"], first["processes"], first["zero"]) == (expected.kind, 2, expected.zero)
    assert (first["sharded"] > 0) == (engine in ("zero3", "fsdp2"))
    assert largest_difference([first["before"]], [one["before"]]) == 0.0
    assert largest_difference(first["weights"], one["weights"]) < 1e-4
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert largest_difference([first["weights"][-1]], [first["before"]]) > 1e-3
    rows = [[row for row in result["log"] if "rewards/margins" in row] for result in (first, one)]
    assert len(rows[0]) == len(rows[1]) == 3
    for mine, theirs in zip(*rows, strict=True):
        for name in ("loss", "rewards/margins", "rewards/chosen", "logps/rejected", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    # What is saved is whole, and what was trained
    assert largest_difference([saved], [one_saved]) < 1e-4
