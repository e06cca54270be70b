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
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from charts import VAL_SEEDS, labelled_questions
from engines import ENGINES, environment
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from test_sr2se_refinement import DEMO, ROOT, write_charts
from transformers import AutoModelForImageTextToText

from evolmm_trl import cli
from evolmm_trl.sr2se import SR2SEConfig, run_pipeline
from evolmm_trl.sr2se.pipeline import _load, _Run, _sft_dataset, load_run
from evolmm_trl.sr2se.refinement import PairMaker, write_json


BASE = str(DEMO / "models" / "sr2se")
RECIPES = sorted((ROOT / "examples" / "configs").glob("sr2se*.yaml"))
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def settings(folder: Path, data: Path, **changes) -> dict:
    values = {
        "model": BASE,
        "output_dir": str(folder / "run"),
        "data": str(data),
        "dtype": "float32",
        "lora": {"r": 4},
        "max_steps": 3,
        "prompts": json.loads((DEMO / "sr2se_prompts.json").read_text()),
        "role_prompts": json.loads((DEMO / "prompts.json").read_text()),
        "generation": {"max_perception_tokens": 24, "max_step_tokens": 20, "max_answer_tokens": 6, "batch_size": 64},
        "labeller": {"max_question_tokens": 16, "max_answer_tokens": 32},
        "refinement": {"batch_size": 64},
        "gate": {"epochs": 2},
        "sft": TRAINING,
        "dpo": TRAINING,
    }
    return {**values, **changes}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_charts(tmp_path_factory.mktemp("charts") / "charts", 48)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run of two rounds with all stages, from a YAML file by the command."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder, data, sft_data=str(data), rounds=2)))
    assert cli.main(["sr2se", "run", str(folder / "run.yaml")]) == 0
    return folder


def weights(model) -> dict[str, torch.Tensor]:
    """The weights that a model, or the one in a folder, computes with, adapters added to those that they adapt."""
    if isinstance(model, (str, Path)):
        model = _load(BASE, str(model), dtype="float32")[0]
    found = {name: p.detach().double() for name, p in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            found[f"{name}.base_layer.weight"] = (
                found[f"{name}.base_layer.weight"] + layer.get_delta_weight("default").detach().double()
            )
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in found.items()}


def done(run) -> dict[str, int]:
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in run.rglob("done.json")}


def test_every_stage_of_every_round_leaves_what_the_next_one_starts_from(run):
    summary = json.loads((run / "run" / "run.json").read_text())
    rounds = [f"round-{n}/{stage}" for n in (1, 2) for stage in ("sft", "pairs", "gate", "dpo", "final_gate")]
    assert list(summary["stages"]) == [name for name in rounds if name != "round-2/sft"]
    assert summary["model"] == "round-2/dpo/model"
    assert summary["gate"] == "round-2/final_gate/gate"
    assert summary["stages"]["round-1/pairs"]["pairs"] == summary["stages"]["round-1/dpo"]["pairs"] > 0
    for stage, starts_from in {
        "round-1/pairs": "round-1/sft/model",
        "round-1/dpo": "round-1/sft/model",
        "round-2/pairs": "round-1/dpo/model",
        "round-2/dpo": "round-1/dpo/model",
        "round-2/final_gate": "round-1/dpo/model",
    }.items():
        marker = json.loads((run / "run" / stage / "done.json").read_text())
        assert marker["settings"]["starts_from"] == starts_from


def test_each_training_stage_changes_the_language_model_alone(run):
    """The authors' SFT stage trains nothing: it writes a configuration and saves the model untouched."""
    models = [BASE, *(run / "run" / name / "model" for name in ("round-1/sft", "round-1/dpo", "round-2/dpo"))]
    for before, after in zip(map(weights, models), map(weights, models[1:]), strict=False):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and not any("visual" in name for name in moved)


def test_the_final_gate_is_fitted_on_the_final_model(run):
    folder = run / "run" / "round-1"
    states = [
        torch.cat([load_file(file)["hidden"] for file in sorted((folder / stage / "rollouts").iterdir())])
        for stage in ("pairs", "final_gate")
    ]
    assert states[0].shape == states[1].shape and not torch.allclose(*states)
    reports = json.loads((run / "run" / "run.json").read_text())["stages"]
    assert reports["round-1/final_gate"]["model"].endswith("round-1/dpo/model")


def test_finished_stages_are_skipped_and_others_refused_with_other_settings(run, capsys):
    before = done(run)
    assert cli.main(["sr2se", "run", str(run / "run.yaml")]) == 0
    assert done(run) == before
    assert cli.main(["sr2se", "run", str(run / "run.yaml"), "--set", "dpo.learning_rate=1e-5"]) == 1
    assert "Stage dpo of round 1 was done with other settings (dpo)" in capsys.readouterr().err


def test_a_stage_alone_needs_its_forerunner(data, tmp_path):
    config = SR2SEConfig(**settings(tmp_path, data))
    with pytest.raises(FileNotFoundError, match="Stage pairs of round 1 is not done"):
        run_pipeline(config, ["dpo"])
    with pytest.raises(ValueError, match="Unknown stages"):
        run_pipeline(config, ["train"])
    assert list(run_pipeline(config, ["pairs"])["stages"]) == ["round-1/pairs"]
    # An empty pair set stops before training, with the reason
    pairs = tmp_path / "run" / "round-1" / "pairs" / "pairs.jsonl"
    pairs.write_text("")
    with pytest.raises(ValueError, match="no preference pairs"):
        run_pipeline(config, ["dpo"])
    assert not (tmp_path / "run" / "round-1" / "dpo" / "model").exists()
    with pytest.raises(ValueError, match="The stage sft needs `sft_data`"):
        run_pipeline(config, ["sft"])


def test_what_was_done_before_a_stage_that_failed_is_on_record(data, tmp_path, monkeypatch):
    def fail(self, number):
        raise ValueError("no preference pairs")

    monkeypatch.setattr(_Run, "_pairs", lambda self, number: {"pairs": 0})
    monkeypatch.setattr(_Run, "_dpo", fail)
    with pytest.raises(ValueError, match="no preference pairs"):
        run_pipeline(SR2SEConfig(**settings(tmp_path, data)), ["pairs", "dpo"])
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["stages"] == {"round-1/pairs": {"pairs": 0}} and summary["model"] == BASE


def pretend(config: SR2SEConfig, stages=("pairs", "gate", "dpo", "final_gate"), report=None) -> None:
    """Writes that stages of the first round are done, as the run would."""
    made = _Run(config)
    for stage in stages:
        marker = made._marker(stage, 1)
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"settings": made._settings(stage, 1), "report": report})


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({}, None, None),
        ({"generation": {"batch_size": 2}}, None, None),
        ({"generation": {"max_pixels": 2500}}, "dpo", r"Stage dpo .* \(generation\)"),
        ({"generation": {"max_step_tokens": 9}}, "dpo", None),
        ({"generation": {"max_step_tokens": 9}}, "final_gate", r"Stage final_gate .* \(generation\)"),
        ({"refinement": {"max_refinements": 1}}, None, r"Stage pairs .* \(refinement\)"),
        # Of a stage alone, too: its forerunners were done for other settings
        ({"refinement": {"max_refinements": 1}}, "gate", r"Stage pairs .* \(refinement\)"),
        ({"refinement": {"max_refinements": 1}}, "dpo", r"Stage pairs .* \(refinement\)"),
        ({"dpo": {"learning_rate": 1.0, "use_cpu": True}}, "final_gate", r"Stage dpo .* \(dpo\)"),
        ({"gate": {"epochs": 3}}, "gate", r"Stage gate .* \(gate\)"),
        ({"labels": False}, None, r"Stage pairs .* \(labels, labeller, role_prompts\)"),
        ({"image_root": "."}, None, r"Stage pairs .* \(image_root\)"),
        ({"model": "elsewhere"}, "dpo", r"Stage pairs .* \(starts_from\)"),
    ],
)
def test_nothing_that_was_done_with_other_settings_is_reused(data, tmp_path, changes, stage, message):
    base = settings(tmp_path, data, generation={"batch_size": 64})
    pretend(SR2SEConfig(**base))
    if stage is not None and message is not None:  # a stage that is not done looks at those before it
        (tmp_path / "run" / "round-1" / stage / "done.json").unlink()
        pretend(SR2SEConfig(**base), [stage] if stage in message else [])
    changed = SR2SEConfig(**{**base, **changes})
    if message is None:
        assert len(run_pipeline(changed, stage and [stage])["stages"]) == 4
    else:
        with pytest.raises(ValueError, match=message):
            run_pipeline(changed, stage and [stage])


def test_stages_are_not_reused_with_another_outcome_of_those_before(data, tmp_path):
    copy = tmp_path / "data.jsonl"
    copy.write_text(data.read_text())
    config = SR2SEConfig(**settings(tmp_path, copy))
    pretend(config)
    # The user was told to remove the pairs and did so; they came out differently
    pretend(config, ["pairs"], report={"pairs": 7})
    for stage in ("gate", "dpo"):
        with pytest.raises(ValueError, match=rf"Stage {stage} .* \(outcome of pairs\)"):
            run_pipeline(config, [stage])
    copy.write_text(data.read_text() + "\n")
    with pytest.raises(ValueError, match=r"Stage pairs .* \(content of data\)"):
        run_pipeline(SR2SEConfig(**settings(tmp_path, copy)), ["pairs"])


def test_the_same_data_by_another_spelling_of_its_path_is_the_same(data, tmp_path, monkeypatch):
    shutil.copytree(data.parent, tmp_path / "charts")
    monkeypatch.chdir(tmp_path)
    changes = {"sft_data": "charts/data.jsonl", "image_root": "charts"}
    pretend(SR2SEConfig(**settings(tmp_path, "charts/data.jsonl", **changes)), ["sft", "pairs", "gate"])
    for spelled in (tmp_path / "charts" / "data.jsonl", "./charts/../charts/data.jsonl"):
        changes = {"sft_data": str(spelled), "image_root": str(Path(spelled).parent)}
        same = SR2SEConfig(**settings(tmp_path, spelled, **changes))
        assert len(run_pipeline(same, ["sft", "pairs", "gate"])["stages"]) == 3
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy("charts/data.jsonl", "elsewhere")  # its image paths lead to other files
    with pytest.raises(ValueError, match=r"Stage pairs .* \(data\)"):
        run_pipeline(SR2SEConfig(**settings(tmp_path, moved, **changes)), ["pairs"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": 2}, "max_steps"),
        ({"gate_rows": 9}, "gate_rows"),
        ({"seed": 1}, "refinement, gate_rows or seed"),
        ({"generation": {"max_step_tokens": 9}}, "generation or prompts"),
    ],
)
def test_pairs_that_were_stopped_name_the_recipes_settings_and_what_to_remove(
    data, tmp_path, monkeypatch, changes, said
):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(PairMaker, "__call__", stop)
    base = settings(tmp_path, data)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(SR2SEConfig(**base), ["pairs"])
    folder = tmp_path / "run" / "round-1" / "pairs"
    other = SR2SEConfig(**{**base, **changes})
    with pytest.raises(ValueError) as error:
        run_pipeline(other, ["pairs"])
    assert str(error.value) == (
        f"Stage pairs of round 1 was begun with other settings ({said}). Go on with the same ones, or remove {folder} to "
        "begin anew."
    )
    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(other, ["pairs"])


class StandInTrainer:
    """A trainer that writes down what it is told to go on from."""

    def __init__(self, folder):
        self.args, self.model, self.resumed = SimpleNamespace(output_dir=str(folder)), None, "not trained"

    def train(self, resume_from_checkpoint):
        self.resumed = resume_from_checkpoint

    def save_model(self, folder):
        pass


def test_training_goes_on_from_the_last_whole_checkpoint_of_the_same_settings(data, tmp_path, caplog):
    config = SR2SEConfig(**settings(tmp_path, data))
    pretend(config, ["pairs"])
    folder = tmp_path / "run" / "round-1" / "dpo" / "trainer"
    trainer = StandInTrainer(folder)
    _Run(config)._train(trainer, "dpo", 1)
    assert trainer.resumed is None
    for step in (9, 10, 100):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "checkpoint-100" / "trainer_state.json").write_text('{"global_')  # killed while it wrote
    (folder / "checkpoint-200").mkdir()
    _Run(config)._train(trainer, "dpo", 1)
    assert trainer.resumed == str(folder / "checkpoint-10")
    assert "checkpoint-100 is not complete" in caplog.text and "checkpoint-200 is not complete" in caplog.text
    other = SR2SEConfig(**settings(tmp_path, data, dpo={**TRAINING, "learning_rate": 1.0}))
    with pytest.raises(ValueError, match=r"Stage dpo of round 1 was begun with other settings \(dpo\)"):
        _Run(other)._train(trainer, "dpo", 1)
    shutil.rmtree(folder)  # nothing to go on from
    _Run(other)._train(trainer, "dpo", 1)
    assert trainer.resumed is None


def test_a_folder_of_images_is_enough(data, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(data.parent, images, ignore=shutil.ignore_patterns("*.jsonl"))
    config = settings(tmp_path, images, labels=False, refinement={"batch_size": 64, "min_agreement": 0.6})
    summary = run_pipeline(SR2SEConfig(**config), ["pairs", "dpo", "final_gate"])
    assert summary["stages"]["round-1/pairs"]["asked"] == 48
    assert summary["stages"]["round-1/dpo"]["pairs"] > 0 and summary["gate"]


def with_pairs(run: Path, **changes) -> SR2SEConfig:
    """A run that has the pairs of another one."""
    config = SR2SEConfig(**changes)
    pretend(config, ["pairs"])
    shutil.copy(run / "run" / "round-1" / "pairs" / "pairs.jsonl", Path(config.output_dir) / "round-1" / "pairs")
    return config


def movement(model, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far the weights of the language model are from the base's, one after the other."""
    now = weights(model)
    return torch.cat([(now[name] - base[name]).flatten() for name in base if "visual" not in name])


# What the paper trains with; the last two make each of few steps as large as the first
PAPERS = {**TRAINING, "learning_rate": 5e-7, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_steps": 3}


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["lora", "full"])
def test_what_is_trained_in_bfloat16_at_the_papers_learning_rate_is_what_answers(
    run, data, tmp_path, monkeypatch, lora
):
    """In bfloat16 a step at 5e-7 is smaller than half the distance to the next number."""
    trainers, used = [], []
    train, build = _Run._train, _Run._build
    monkeypatch.setattr(_Run, "_train", lambda self, trainer, *a: trainers.append(trainer) or train(self, trainer, *a))
    monkeypatch.setattr(_Run, "_build", lambda self, *a: used.append(a[0].model) or build(self, *a))
    changes = {"lora": lora, "dpo": PAPERS, "gate_rows": 16}
    config = with_pairs(run, **settings(tmp_path, data, dtype="bfloat16", **changes))
    summary = run_pipeline(config, ["dpo", "final_gate"])
    base = weights(AutoModelForImageTextToText.from_pretrained(BASE, dtype="float32" if lora is None else "bfloat16"))
    trained = movement(trainers[0].model, base)
    used.append(load_run(tmp_path / "run").policies.model)
    for model in used:
        assert (movement(model, base) - trained).norm() < 1e-6 * trained.norm()
    assert summary["dtype"] == ("float32" if lora is None else "bfloat16")
    if lora is None:
        exact = with_pairs(run, **settings(tmp_path / "exact", data, **changes))
        run_pipeline(exact, ["dpo"])
        moved = [(steps != 0).double().mean().item() for steps in (trained, movement(trainers[1].model, base))]
        assert moved[0] == pytest.approx(moved[1], rel=0.02) and moved[1] > 0.5
        # The next round starts from it, too
        again = SR2SEConfig(**settings(tmp_path, data, dtype="bfloat16", rounds=2, **changes))
        monkeypatch.setattr(_Run, "_forerunners", lambda *args: [])
        assert torch.equal(movement(_Run(again)._policies(_Run(again)._start_model(2)).model, base), trained)


def test_full_weights_can_be_trained(run, data, tmp_path):
    config = with_pairs(run, **settings(tmp_path, data, lora=None, sft_data=str(data)))
    shutil.rmtree(tmp_path / "run")
    run_pipeline(config, ["sft"])
    with_pairs(run, **vars(config))
    run_pipeline(config, ["dpo"])
    folder = tmp_path / "run" / "round-1"
    before, after = weights(folder / "sft" / "model"), weights(folder / "dpo" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved)


def test_weights_that_an_engine_saves_rounded_are_warned_of(data, tmp_path, caplog):
    config = SR2SEConfig(**settings(tmp_path, data, lora=None))
    trainer = StandInTrainer(tmp_path / "run" / "round-1" / "sft" / "trainer")
    for dtype in (torch.float32, torch.bfloat16):
        assert "is rounded" not in caplog.text
        trainer.save_model = lambda folder, dtype=dtype: _save(Path(folder), torch.ones(2, dtype=dtype))
        _Run(config)._train(trainer, "sft", 1)
    assert "is saved in BF16" in caplog.text


def _save(folder: Path, weight: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight}, folder / "model.safetensors")


def test_a_base_in_4_bits_is_trained_from_stage_to_stage(run, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = SR2SEConfig(**settings(tmp_path, data, sft_data=str(data), load_in_4bit=True))
    run_pipeline(config, ["sft"])
    with_pairs(run, **vars(config))
    report = run_pipeline(config, ["dpo"])["stages"]["round-1/dpo"]
    assert report["steps"] == 2
    base = weights(BASE)
    sft, dpo = (movement(tmp_path / "run" / "round-1" / stage / "model", base) for stage in ("sft", "dpo"))
    # SR-DPO trains on the adapter that was fine-tuned: it moves less far from there than that is from the base
    assert 0 < (dpo - sft).norm() < sft.norm()


def test_fine_tuning_sees_the_image_and_scores_the_answer_alone(data, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(_Run, "_train", lambda self, trainer, *args: trainers.append(trainer))
    sft = {**TRAINING, "logging_steps": 1}
    _Run(SR2SEConfig(**settings(tmp_path, data, sft_data=str(data), sft=sft)))._sft(1)
    trainer = trainers[0]
    batch = next(iter(trainer.get_train_dataloader()))
    answers = {json.loads(line)["answer"] + "<|im_end|>" for line in data.read_text().splitlines()}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert trainer.processing_class.decode(ids[labels != -100]) in answers
    trainer.model.eval()
    with torch.no_grad():
        losses = [
            trainer.compute_loss(trainer.model, {**batch, "pixel_values": pixels}).item()
            for pixels in (batch["pixel_values"], 1 - batch["pixel_values"])
        ]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_without_rollouts_that_teach_a_gate_the_run_goes_on_and_says_why(run, data, tmp_path, caplog, capsys):
    config = with_pairs(run, **settings(tmp_path, data, gate={"held_out": 0.001}))
    rollouts = tmp_path / "run" / "round-1" / "pairs" / "rollouts"
    shutil.copytree(run / "run" / "round-1" / "pairs" / "rollouts", rollouts)
    summary = run_pipeline(config, ["gate", "dpo", "final_gate"])
    reports = summary["stages"]
    assert reports["round-1/dpo"]["steps"] == 2
    for stage in ("gate", "final_gate"):
        assert "too few to hold out" in reports[f"round-1/{stage}"]["not_trained"]
    assert summary["gate"] is None and "too few to hold out" in summary["no_gate"]
    assert caplog.text.count("No gate is trained, and the run goes on without one: ") == 2
    command = ["sr2se", "answer", str(tmp_path / "run"), "--image", str(data.parent / "000.png"), "--question", "q"]
    assert cli.main(command) == 1
    assert "none could be trained. There are rollouts of 48 questions" in capsys.readouterr().err
    # A gate that is trained later, such as on more rows, counts
    (tmp_path / "run" / "round-1" / "final_gate" / "done.json").unlink()
    shutil.rmtree(tmp_path / "run" / "round-1" / "final_gate")
    assert run_pipeline(config, ["pairs"])["no_gate"] is None


def test_no_rollouts_are_no_gate(data, tmp_path):
    made = _Run(SR2SEConfig(**settings(tmp_path, data)))
    assert "no row of the data" in made._fit_gate(tmp_path / "nowhere", tmp_path, BASE)["not_trained"]


def in_small_steps(folder: Path, data: Path, processes: int) -> dict:
    """Two pairs per step, over all processes."""
    # With Adam's usual epsilon, a gradient of nothing but rounding is as large a step as any
    steps = {"per_device_train_batch_size": 2 // processes, "learning_rate": 1e-2, "adam_epsilon": 1e-4}
    training = {**TRAINING, **steps, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    refinement = {"batch_size": 16, "answer_leak": "declared"}
    changes = {"sft_data": str(data), "refinement": refinement, "max_steps": 2, "sft": training, "dpo": training}
    return settings(folder, data, **changes)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_pipeline(SR2SEConfig(**in_small_steps(folder, data, 1)))
    return folder / "run"


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_processes_come_to_the_same_outcome(engine, data, one_process, tmp_path):
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="needs deepspeed: pip install evolmm-trl[deepspeed]")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(in_small_steps(tmp_path, data, 2)))
    command = [*ENGINES[engine].launcher, "--module", "evolmm_trl.cli", "sr2se", "run", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment(), timeout=1200, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert '"round-1/dpo"' in done.stdout
    assert done.stdout.count("2 per step") == 1
    one, two = one_process / "round-1", tmp_path / "run" / "round-1"
    pairs = "pairs/pairs.jsonl"
    assert (one / pairs).read_text() == (two / pairs).read_text() != ""
    models = [f"{stage}/model/adapter_model.safetensors" for stage in ("sft", "dpo")]
    for file in (*models, *(f"{stage}/gate/gate.safetensors" for stage in ("gate", "final_gate"))):
        outcomes = load_file(one / file), load_file(two / file)
        assert outcomes[0].keys() == outcomes[1].keys()
        for name, value in outcomes[0].items():
            torch.testing.assert_close(outcomes[1][name], value, rtol=1e-3, atol=1e-4)
    trained = [load_file(two / model) for model in models]
    assert all(p.abs().max() > 1e-2 for name, p in trained[0].items() if "lora_B" in name)
    assert all((trained[1][name] - p).abs().max() > 1e-2 for name, p in trained[0].items())


# Answering


def test_one_image_is_answered_from_a_shell(run, data, capsys):
    row = labelled_questions(VAL_SEEDS[:1])[0]
    command = ["sr2se", "answer", str(run / "run"), "--image", str(data.parent / "000.png")]
    assert cli.main([*command, "--question", row["question"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["question"] == row["question"] and result["description"] and 1 <= len(result["steps"]) <= 3
    assert len(result["scores"]) == len(result["steps"])


def test_a_file_is_answered_from_a_shell_and_what_is_broken_is_skipped(run, data, tmp_path, capsys):
    source = data.with_name("questions.jsonl")
    source.write_text(data.read_text() + '{"image": "gone.png", "question": "What?"}\n{\n')
    output = tmp_path / "answers.jsonl"
    command = ["sr2se", "answer", str(run / "run"), "--input", str(source), "--output", str(output)]
    assert cli.main([*command, "--batch_size", "16"]) == 0
    summary = json.loads(capsys.readouterr().out)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert summary["answered"] == len(answers) == 48 and summary["skipped"] == 2
    assert summary["mean_tokens"] == sum(answer["tokens"] for answer in answers) / 48
    assert 0.2 < summary["accuracy"] < 1
    reasoner = load_run(run / "run", batch_size=16)
    alone = reasoner.generate(answers[5]["image_path"], answers[5]["question"])
    assert [alone.answer, list(alone.steps)] == [answers[5]["answer"], answers[5]["steps"]]


def test_a_run_may_be_moved_and_is_read_from_anywhere(run, data, tmp_path, monkeypatch):
    shutil.copytree(run / "run", tmp_path / "moved", ignore=shutil.ignore_patterns("trainer", "round-1", "rollouts"))
    monkeypatch.chdir(tmp_path)
    row = labelled_questions(VAL_SEEDS[:1])[0]
    moved = load_run("moved").generate(row["image"], row["question"])
    assert moved == load_run(run / "run").generate(row["image"], row["question"])


def test_images_outside_the_root_are_not_answered_about(run, data, tmp_path, capsys):
    source = tmp_path / "questions.jsonl"
    source.write_text(json.dumps({"image": str(data.parent / "000.png"), "question": "What?"}) + "\n")
    command = [
        "sr2se",
        "answer",
        str(run / "run"),
        "--input",
        str(source),
        "--output",
        str(tmp_path / "answers.jsonl"),
    ]
    (tmp_path / "answers.jsonl").write_text("old")
    assert cli.main(command) == 1
    assert "could be answered: 1 rows were skipped" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_text() == "old"
    assert cli.main([*command, "--image_root", str(data.parent)]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 1


def test_questions_are_not_overwritten_by_their_answers(tmp_path, capsys):
    source = tmp_path / "questions.jsonl"
    source.write_text('{"image": "a.png", "question": "What?"}\n')
    command = ["sr2se", "answer", str(tmp_path / "no-run"), "--input", str(source), "--output"]
    assert cli.main([*command, str(source)]) == 2
    assert "is read from and would be overwritten" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "gone" / "answers.jsonl")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    (tmp_path / "answers.jsonl").write_text("old")
    assert cli.main([*command, str(tmp_path / "answers.jsonl")]) == 1  # there is no such run
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "questions.jsonl": source.read_text(),
        "answers.jsonl": "old",
    }


def test_half_a_command_is_refused(run, capsys):
    assert cli.main(["sr2se", "answer", str(run / "run"), "--image", "a.png"]) == 2
    assert "--image and --question" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sr2se", "answer", str(run / "run"), "--input", "a", "--output", "b", "--batch_size", "0"])
    assert "no whole number from 1 on" in capsys.readouterr().err
    assert cli.main(["sr2se", "answer", str(run / "run"), "--image", "gone.png", "--question", "q"]) == 1
    assert "missing file (gone.png)" in capsys.readouterr().err
    assert cli.main(["sr2se", "answer", str(run), "--image", "a.png", "--question", "q"]) == 1
    assert "run.json" in capsys.readouterr().err


def test_help_needs_no_torch(capsys, monkeypatch):
    code = "import sys; from evolmm_trl import cli\ntry: cli.main(['sr2se', 'run', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--stage" in result.stdout and result.stdout.rstrip().endswith("False")


# Settings


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("dpo", {"betta": 1}),
        ("gate", {"epoch": 1}),
        ("refinement", {"n_max": 1}),
        ("generation", {"batch": 1}),
        ("lora", {"rank": 8}),
        ("prompts", {"percept": "x"}),
        ("labeller", {"n": 1}),
        ("sft", {"lr": 1}),
    ],
)
def test_an_unknown_name_in_a_section_is_said_before_the_first_stage(data, tmp_path, section, value):
    with pytest.raises(ValueError, match=section):
        SR2SEConfig(**settings(tmp_path, data, **{section: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "dpo.learning_rate=abc",
            r"`dpo.learning_rate` is 'abc' \(str\); expected a number\. Correct it in the recipe",
        ),
        ("dpo.learning_rate=null", "`dpo.learning_rate` is null; expected a number"),
        ("dpo.gradient_checkpointing=fals", "`dpo.gradient_checkpointing` is 'fals' .* expected true or false"),
        ("sft.max_length=1k", "`sft.max_length` is '1k' .* expected a whole number or null"),
        ("gate.epochs=2.5", "`gate.epochs` is 2.5 .* expected a whole number"),
        ("gate.epochs=true", "`gate.epochs` is True .* expected a whole number"),
        ("refinement.max_rows=all", "`refinement.max_rows` is 'all' .* expected a whole number or null"),
        ("generation.batch_size=many", "`generation.batch_size` is 'many' .* expected a whole number"),
        ("labeller.num_answers=five", "`labeller.num_answers` is 'five' .* expected a whole number"),
        ("lora.r=big", "`lora.r` is 'big' .* expected a whole number"),
        ("lora=true", "`lora` is True .* expected a section of names and values or null"),
        ("dtype.x=1", "Got the change 'dtype.x=1', but 'dtype' is 'float32'; expected a section"),
        ("gate=5", "`gate` is 5 .* expected a section of names and values"),
        ("rounds=two", "`rounds` is 'two' .* expected a whole number"),
        ("labels=fals", "`labels` is 'fals' .* expected true or false"),
        ("output_dir=2026", "`output_dir` is 2026 .* expected text"),
        ("dtype=bf16", "`dtype` is 'bf16'; expected one of bfloat16, float16, float32, auto"),
    ],
)
def test_a_wrong_value_is_said_before_the_first_stage(data, tmp_path, capsys, change, message):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings(tmp_path, data)))
    with pytest.raises(ValueError, match=message):
        SR2SEConfig.from_file(tmp_path / "a.yaml", [change])
    assert cli.main(["sr2se", "run", str(tmp_path / "a.yaml"), "--set", change]) == 1
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("targets", [["q_prj"], "q_prj"])
def test_target_modules_that_match_nothing_are_said_before_the_first_stage(data, tmp_path, targets):
    config = SR2SEConfig(**settings(tmp_path, data, lora={"target_modules": targets}))
    with pytest.raises(
        ValueError, match=r"'q_prj'.*, which matches no module of .*\. The linear layers .* o_proj, q_proj, "
    ):
        run_pipeline(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("targets", [["q_proj", "absent"], r".*\.q_proj", "all-linear", "ALL-LINEAR"])
def test_target_modules_that_match_are_let_through(data, tmp_path, targets):
    config = SR2SEConfig(**settings(tmp_path, data, lora={"target_modules": targets}))
    pretend(config)
    assert len(run_pipeline(config)["stages"]) == 4


def test_values_of_every_type_that_a_field_takes_are_read(data, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings(tmp_path, data)))
    changes = [
        "gate.epochs=2e1",
        "gate.dropout=0",
        "dpo.warmup_steps=0.1",
        "dpo.num_train_epochs=2",
        "dpo.loss_type=sigmoid",
        "dpo.max_length=null",
        "dpo.run_name=5",
        "dpo.gradient_checkpointing_kwargs={use_reentrant: false}",
        "lora.lora_alpha=8.5",
        "lora.target_modules=[q_proj]",
        "refinement.max_rows=null",
        "generation.max_pixels=null",
        "dtype=auto",
    ]
    config = SR2SEConfig.from_file(tmp_path / "a.yaml", changes)
    epochs = config.gate_config().epochs
    assert epochs == 20 and isinstance(epochs, int)
    assert config.dpo_config(tmp_path).loss_type == ["sigmoid"]
    with pytest.raises(ValueError, match="`dtype` is 'auto'; expected one of bfloat16, float16, float32"):
        SR2SEConfig.from_file(tmp_path / "a.yaml", [*changes, "load_in_4bit=true"])
    assert SR2SEConfig(**settings(tmp_path, data, output_dir=tmp_path / "run")).rounds == 1


def test_settings_that_cannot_work_are_refused(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="`data` is 'nowhere'"):
        SR2SEConfig(**settings(tmp_path, "nowhere"))
    with pytest.raises(ValueError, match="load_in_4bit"):
        SR2SEConfig(**settings(tmp_path, data, lora=None, load_in_4bit=True))
    (tmp_path / "a.yaml").write_text("model: a\noutput_dir: b\nbatch: 3\n")
    with pytest.raises(ValueError, match="batch"):
        SR2SEConfig.from_file(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="lacks .*data"):
        SR2SEConfig.from_file(_without(tmp_path / "a.yaml", "batch: 3\n"))


def _without(file: Path, text: str) -> Path:
    file.write_text(file.read_text().replace(text, ""))
    return file


def test_a_section_without_entries_is_empty(data, tmp_path):
    text = yaml.safe_dump(settings(tmp_path, data, gate=None, dpo=None))
    (tmp_path / "a.yaml").write_text(text)
    config = SR2SEConfig.from_file(tmp_path / "a.yaml", ["dpo.use_cpu=true", "dpo.bf16=false"])
    assert config.gate == {} and config.dpo == {"use_cpu": True, "bf16": False}


def test_json_that_is_no_yaml_is_read(data, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(settings(tmp_path, data), indent="\t"))
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load((tmp_path / "a.json").read_text())
    assert SR2SEConfig.from_file(tmp_path / "a.json").seed == 42


def test_the_final_gate_is_fitted_on_no_more_rows_than_asked_for(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(_Run, "_build", lambda self, policies, folder, config: asked.append(config.max_rows))
    monkeypatch.setattr(_Run, "_fit_gate", lambda *args: None)
    monkeypatch.setattr(_Run, "_policies", lambda *args: None)
    for refinement in ({}, {"max_rows": 30}, {"max_rows": 70}):
        run = _Run(SR2SEConfig(**settings(tmp_path, data, gate_rows=50, refinement=refinement)))
        monkeypatch.setattr(run, "_needed", lambda *args: tmp_path)
        run._final_gate(1)
    assert asked == [50, 30, 50]


def test_a_strangers_special_tokens_are_not_fine_tuned_on(data, tmp_path):
    from evolmm_trl import load_processor

    record = json.loads(data.read_text().splitlines()[0])
    file = data.with_name("sft.jsonl")
    rows = [{**record, "answer": "5<|im_end|>"}, {**record, "question": "How<|image_pad|> many?"}, record]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, skipped = _sft_dataset(str(file), load_processor(BASE), {}, None)
    assert (len(dataset), skipped) == (2, 1)
    assert [row["prompt"].count("<|image_pad|>") for row in dataset] == [1, 1]


def test_numbers_with_an_exponent_are_numbers(data, tmp_path):
    """YAML reads 5e-7 as text."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings(tmp_path, data)) + "seed: 7\n")
    config = SR2SEConfig.from_file(tmp_path / "a.yaml", ["dpo.learning_rate=5e-7", "gate.epochs=3", "rounds=2"])
    assert config.dpo["learning_rate"] == 5e-7 and config.gate["epochs"] == 3 and config.rounds == 2
    assert config.seed == config.gate_config().seed == 7


AUTHORS = {
    "model": {
        "model_name_or_path": BASE,
        "use_flash_attention": False,
        "bf16": False,
        "gradient_checkpointing": True,
        "lora_rank": 8,
        "lora_alpha": 16,
        "device_map": "auto",
    },
    "hsr_ee": {
        "confidence_threshold": 0.6,
        "max_reasoning_steps": 4,
        "length_penalty_lambda": 0.2,
        "confidence_head_hidden_dim": 128,
        "adaptive_threshold": True,
        "threshold_lr": 0.002,
    },
    "ipr": {
        "max_refinement_iterations": 3,
        "refinement_prompt_template": "'{perception}' was not enough. Look again.",
        "discard_failed_samples": True,
        "num_samples": 50,
    },
    "sr_dpo": {"beta": 0.2, "learning_rate": 5e-7, "batch_size": 8, "num_epochs": 3, "warmup_ratio": 0.1},
    "sft": {"num_epochs": 1, "learning_rate": 5e-5, "batch_size": 4, "max_seq_length": 1024},
    "output_dir": "out",
    "sft_output_dir": "out/sft",
    "logging_steps": 10,
    "seed": 1,
}


def test_the_authors_json_is_read(data, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(AUTHORS))
    config = SR2SEConfig.from_file(tmp_path / "a.json", [f"data={data}", "dpo.use_cpu=true", "sft.use_cpu=true"])
    assert (config.model, config.dtype, config.attn_implementation) == (BASE, "float32", None)
    assert (config.lora_config().r, config.lora_config().lora_alpha, config.max_steps) == (8, 16, 4)
    gate, refinement = config.gate_config(), config.refinement_config()
    assert (gate.threshold, gate.gate_size, gate.length_penalty, gate.threshold_learning_rate) == (
        0.6,
        128,
        0.2,
        0.002,
    )
    assert (refinement.max_refinements, refinement.max_rows) == (3, 50)
    filled = config.sub_policy_prompts().fill("refinement", description="a bar", question="How many?")
    assert filled == "'a bar' was not enough. Look again.\nQuestion: How many?"
    dpo, sft = config.dpo_config(tmp_path), config.sft_config(tmp_path)
    assert (dpo.beta, dpo.learning_rate, dpo.per_device_train_batch_size, dpo.warmup_steps) == (0.2, 5e-7, 8, 0.1)
    assert (sft.learning_rate, sft.max_length, sft.logging_steps, dpo.logging_steps) == (5e-5, 1024, 10, 10)
    assert config.seed == 1


# The names and values of the authors' configs/default_config.json; the prompt is worded anew
DEFAULTS = {
    "model": {
        "model_name_or_path": "Qwen/Qwen-VL-Chat",
        "use_flash_attention": True,
        "bf16": True,
        "gradient_checkpointing": True,
        "lora_rank": 0,
        "lora_alpha": 16,
        "device_map": "auto",
    },
    "hsr_ee": {
        "confidence_threshold": 0.7,
        "max_reasoning_steps": 5,
        "length_penalty_lambda": 0.1,
        "confidence_head_hidden_dim": 256,
        "adaptive_threshold": True,
        "threshold_lr": 0.001,
    },
    "ipr": {
        "max_refinement_iterations": 2,
        "refinement_prompt_template": "'{perception}' was not enough. Look again.",
        "discard_failed_samples": True,
        "num_samples": 50000,
    },
    "sr_dpo": {
        "beta": 0.1,
        "learning_rate": 5e-7,
        "batch_size": 64,
        "num_epochs": 3,
        "gradient_accumulation_steps": 4,
        "max_seq_length": 2048,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    },
    "sft": {
        "num_epochs": 1,
        "learning_rate": 5e-5,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "dataset_name": "llava_instruct_150k",
        "max_seq_length": 2048,
    },
    "output_dir": "./output",
    "sft_output_dir": "./output/sft_ckpt",
    "ipr_data_dir": "./output/ipr_data",
    "hsr_ee_output_dir": "./output/hsr_ee_ckpt",
    "sr_dpo_output_dir": "./output/sr_dpo_ckpt",
    "eval_output_dir": "./output/eval_results",
    "logging_steps": 10,
    "save_steps": 500,
    "eval_steps": 500,
    "seed": 42,
}


def test_the_authors_defaults_are_read_and_what_they_lead_to_is_said(data, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default_config.json").write_text(json.dumps(DEFAULTS))
    changes = [f"data={data}", "sft.use_cpu=true", "dpo.use_cpu=true"]
    config = SR2SEConfig.from_file("default_config.json", changes)
    assert (config.model, config.dtype, config.sft_data, config.lora) == ("Qwen/Qwen-VL-Chat", "bfloat16", None, None)
    assert config.gate_config().threshold_learning_rate == 0.001
    assert config.dpo_config(tmp_path).effective_batch_size == 256
    assert caplog.text.count("sft.dataset_name is 'llava_instruct_150k', which is no file here") == 1
    assert caplog.text.count("hsr_ee.threshold_lr is 0.001, at which tau stays about where it starts") == 1
    assert "set gate.threshold_learning_rate=0.02" in caplog.text
    shutil.copy(data, tmp_path / "llava_instruct_150k")
    caplog.clear()
    assert SR2SEConfig.from_file("default_config.json", changes).sft_data == "llava_instruct_150k"
    assert "dataset_name" not in caplog.text


def test_an_unknown_name_in_the_authors_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**AUTHORS, "ipr": {"iterations": 2}}))
    with pytest.raises(ValueError, match=r"ipr\.iterations"):
        SR2SEConfig.from_file(tmp_path / "a.json")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete(recipe, data, monkeypatch):
    config = SR2SEConfig.from_file(
        recipe,
        [f"data={data}", f"model={BASE}", "output_dir=out", "dtype=float32", "dpo.use_cpu=true", "sft.use_cpu=true"],
    )
    assert config.dpo_config(Path("out")).effective_batch_size == 64
