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

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from charts import VAL_SEEDS, chart, labelled_questions
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_qwen2_5_vl
from transformers import AutoModelForImageTextToText

from evolmm_trl import RolePrompts, load_processor, load_prompts, training
from evolmm_trl.commands import UsageError
from evolmm_trl.sr2se import EarlyExitReasoner


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_qwen.py"
RECIPES = sorted((ROOT / "examples" / "configs").glob("qwen*.yaml"))
DEMO_MODEL = ROOT / "examples" / "demo" / "models" / "room"
ACCELERATE = ROOT / "accelerate_configs"
REQUIRED = ["--image_dir", "images", "--output_dir", "out", "--use_cpu"]


@pytest.fixture(scope="module")
def script():
    return training


def parse(script, *args):
    return script.make_parser().parse_args_and_config([*map(str, args), *REQUIRED])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_reaches_the_script(script, recipe):
    values = yaml.safe_load(recipe.read_text())
    parsed = parse(script, "--config", recipe)
    for name, value in values.items():
        holders = [config for config in parsed if hasattr(config, name)]
        assert len(holders) == 1, f"{name} belongs to {len(holders)} of the script's dataclasses"
        value = value[0] if name == "lora_target_modules" and len(value) == 1 else value
        assert getattr(holders[0], name) == value
        assert not isinstance(value, str) or not value[0].isdigit(), f"YAML reads {name} as text"


def test_a_recipe_with_an_unknown_key_is_refused(script, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[0].read_text() + "\nnum_generation: 5\n")
    with pytest.raises(UsageError, match="unknown key 'num_generation'. Did you mean num_generations?"):
        parse(script, "--config", recipe)


def test_the_command_line_has_the_last_word(script):
    _, training_args, model_args = parse(script, "--config", RECIPES[0], "--learning_rate", "3e-6", "--lora_r", "4")
    assert training_args.learning_rate == 3e-6
    assert model_args.lora_r == 4


def test_the_papers_recipe_asks_one_question_per_step_and_sees_6000_images(script):
    from evolmm_trl.schedule import RoleSchedule

    _, args, _ = parse(script, "--config", ROOT / "examples" / "configs" / "qwen2_5_vl_7b_paper.yaml")
    assert args.images_per_process == 1
    assert RoleSchedule(args.proposer_update_every).solver_steps_before(args.max_steps) == 6000


def test_the_24gb_recipe_takes_one_answer_at_a_time(script):
    _, args, _ = parse(script, "--config", ROOT / "examples" / "configs" / "qwen2_5_vl_3b_24gb.yaml")
    assert (args.per_device_train_batch_size, args.images_per_process, args.gradient_checkpointing) == (1, 4, True)


def test_the_vllm_recipe_asks_the_server_that_its_head_starts(script):
    path = ROOT / "examples" / "configs" / "qwen2_5_vl_3b_vllm.yaml"
    _, args, model_args = parse(script, "--config", path)
    assert args.rollout == "vllm"
    head = re.sub(r"\\\n#", "", path.read_text().split("\n\n")[0])
    serve, train = (line.split() for line in head.splitlines() if "CUDA_VISIBLE_DEVICES" in line)
    options = dict(zip(serve, serve[1:], strict=False))
    assert options["examples/serve_vllm.sh"] == model_args.model_name_or_path
    assert args.vllm_server_urls == [f"http://localhost:{options['--port']}"]
    assert int(options["--max-lora-rank"]) >= model_args.lora_r and options["--dtype"] == model_args.dtype
    # The other files give the same two commands
    for other in ("examples/serve_vllm.sh", "accelerate_configs/single_gpu.yaml"):
        text = " ".join(re.sub(r"\\\n#|#", "", (ROOT / other).read_text()).split())
        assert " ".join(train[train.index("accelerate") :]) in text
        assert " ".join(serve[serve.index("bash") :]) in text


@pytest.mark.parametrize(
    ("name", "distributed_type", "stage"),
    [
        ("single_gpu", "NO", None),
        ("multi_gpu", "MULTI_GPU", None),
        ("zero2", "DEEPSPEED", 2),
        ("zero3", "DEEPSPEED", 3),
        ("zero3_offload", "DEEPSPEED", 3),
        ("fsdp2", "FSDP", None),
    ],
)
def test_accelerate_reads_its_configs(name, distributed_type, stage):
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))  # raises on unknown keys
    assert config.distributed_type == distributed_type
    assert config.mixed_precision == "bf16"
    assert config.deepspeed_config.get("zero_stage") == stage
    if name == "single_gpu":
        assert config.num_processes == 1
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


def test_every_accelerate_config_is_known_to_the_tests():
    assert len(list(ACCELERATE.glob("*.yaml"))) == 6


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_launch_accepts_the_config(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(["--config_file", str(path), str(SCRIPT)])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == (1 if path.stem == "single_gpu" else 8)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Unlabelled charts in a folder `images`, and two labelled ones in `labelled`."""
    folder = tmp_path_factory.mktemp("examples")
    labelled = folder / "labelled" / "test"
    (folder / "images" / "bars").mkdir(parents=True)
    labelled.mkdir(parents=True)
    for seed in range(5):
        chart(seed).image().save(folder / "images" / "bars" / f"{seed}.png")
    rows = labelled_questions(range(2))
    for i, row in enumerate(rows):
        row.pop("image").save(labelled / f"{i}.png")
        row["file_name"] = f"{i}.png"
    (labelled / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(workplace, *command) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "cache")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def load_role(base, output, role: str) -> dict[str, torch.Tensor]:
    """A role's LoRA tensors, loaded as anyone would who knows only PEFT."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    model = PeftModel.from_pretrained(model, output, subfolder="proposer" if role == "proposer" else None)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}


def adapted_modules(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors}


def has_moved(tensors: dict[str, torch.Tensor]) -> bool:
    return any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)  # B starts at 0


def test_the_script_trains_a_random_model_under_accelerate_launch(workplace):
    model = tiny_qwen2_5_vl(workplace / "model")
    run(
        workplace,
        *("-m", "accelerate.commands.launch", "--config_file", ACCELERATE / "single_gpu.yaml", SCRIPT),
        *("--model_name_or_path", "model", "--image_dir", "images", "--output_dir", "launched", "--use_cpu"),
        *("--use_peft", "--max_steps", "2", "--proposer_update_every", "1", "--max_question_length", "8"),
        *("--max_completion_length", "8", "--gradient_accumulation_steps", "1"),
    )
    solver, proposer = (load_role(model, workplace / "launched", role) for role in ("solver", "proposer"))
    everything_linear = {*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")}
    assert adapted_modules(solver) == adapted_modules(proposer) == everything_linear
    assert not any("visual" in name for name in solver)
    assert len((workplace / "launched" / "rollouts.jsonl").read_text().splitlines()) == 1


def test_the_script_takes_a_recipe_evaluates_trains_both_roles_and_resumes(workplace):
    recipe = {
        "model_name_or_path": str(DEMO_MODEL),
        "prompts": json.loads((DEMO_MODEL.parent.parent / "prompts.json").read_text()),
        "image_dir": "images",
        "image_include": ["bars"],
        "image_streaming": False,
        "eval_dataset": "labelled",
        "output_dir": "recipe",
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "use_cpu": True,
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "proposer_update_every": 1,
        "max_completion_length": 32,
        "max_question_length": 16,
        "learning_rate": 1e-3,
    }
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(workplace, "-m", "evolmm_trl.cli", "train", "--config", "recipe.yaml")
    finished = {role: load_role(DEMO_MODEL, workplace / "recipe", role) for role in ("solver", "proposer")}
    assert load_prompts(str(workplace / "recipe")) == RolePrompts(**recipe["prompts"])
    for tensors in finished.values():
        assert adapted_modules(tensors) == {"q_proj", "v_proj"}
        assert has_moved(tensors)
    history = json.loads((workplace / "recipe" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_accuracy_greedy" in row for row in history)

    # A run that stopped after its first step, resumed, ends with the same weights
    shutil.rmtree(workplace / "recipe" / "checkpoint-2")
    for file in ("adapter_model.safetensors", "proposer/adapter_model.safetensors"):
        (workplace / "recipe" / file).unlink()
    run(workplace, "-m", "evolmm_trl.cli", "train", "--config", "recipe.yaml", "--resume_from_checkpoint", "true")
    for role, tensors in finished.items():
        resumed = load_role(DEMO_MODEL, workplace / "recipe", role)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())


def test_the_sr2se_script_goes_from_questions_to_an_answer(workplace):
    model, prompts = DEMO_MODEL.parent / "sr2se", DEMO_MODEL.parent.parent / "sr2se_prompts.json"
    (workplace / "questions").mkdir()
    rows = labelled_questions(VAL_SEEDS[:40])
    with open(workplace / "questions" / "train.jsonl", "w") as file:
        for i, row in enumerate(rows):
            row["image"].save(workplace / "questions" / f"{i}.png")
            file.write(json.dumps({**row, "image": f"{i}.png"}) + "\n")
    printed = run(
        workplace,
        *(SCRIPT.with_name("sr2se.py"), "--model", model, "--data", "questions/train.jsonl", "--output_dir", "sr2se"),
        *("--prompts", prompts, "--dtype", "float32", "--learning_rate", "1e-3"),
    )
    out = workplace / "sr2se"
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 1 and f"{len(pairs)} pairs from 40 questions" in printed
    base = AutoModelForImageTextToText.from_pretrained(model)
    trained = PeftModel.from_pretrained(base, out / "adapter")
    assert has_moved({name: p for name, p in trained.named_parameters() if ".lora_" in name})
    # The gate that was fitted last, on the model that was trained, gives the answer that was printed
    reasoner = EarlyExitReasoner.from_pretrained(out / "final_gate", trained, load_processor(model))
    result = reasoner.generate(pairs[0]["image_path"], pairs[0]["question"])
    assert f"{result.answer!r} after {len(result.steps)} steps and {result.tokens} tokens" in printed
    states = [load_file(sorted((out / name).iterdir())[0])["hidden"] for name in ("rollouts", "final_rollouts")]
    assert states[0].shape == states[1].shape and not torch.allclose(*states)
