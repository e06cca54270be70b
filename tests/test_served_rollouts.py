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


"""Rollouts from servers, of which a stand-in takes the place: what the trainer asks, swaps, weighs and keeps."""

import json
import logging
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from engines import largest_difference, movement, run
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from served import ServersStandIn
from tiny_models import tiny_internvl, tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, logged, lora, noise_images, snapshot
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback
from trl import GRPOTrainer

from evolmm_trl import EvoLMMConfig
from evolmm_trl.role_adapters import keep_gradients_on_cpu, load_role_adapters, role_adapter_state, without_vision
from evolmm_trl.rollout import served
from evolmm_trl.rollout.importance import importance_ratio, log_ratio
from evolmm_trl.rollout.vllm_server import VLLMCompletion


FILE = "adapter_model.safetensors"
VLLM = {"rollout": "vllm", "vllm_server_urls": ["http://one:1", "http://two:2"]}
ADAPTERS = {"solver": "default", "proposer": "proposer"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


@pytest.fixture(autouse=True)
def stand_in(base, monkeypatch):
    stand_in = type("StandIn", (ServersStandIn,), {"base": base})
    monkeypatch.setattr(served, "VLLMServers", stand_in)
    return stand_in


class CountingTrainer(TalkingTrainer):
    """Its samples have the seeds that a server gives them."""

    def _seeds(self, role, rows, samples, step=None):
        return [[group[0] + k for k in range(samples)] for group in super()._seeds(role, rows, samples, step)]


def make(base, folder, trainer_class=CountingTrainer, peft_config=None, dataset=None, eval_dataset=None, **options):
    return trainer_class(
        model=base,
        args=config(folder, **{"max_steps": 6, **options}),
        train_dataset=image_dataset(7) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        peft_config=lora() if peft_config is None else peft_config,
    )


def largest(one, other):
    first, second = snapshot(one), snapshot(other)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "rollouts.jsonl").read_text().splitlines()]


def labelled():
    rows = image_dataset(3, seed=5)
    return rows.add_column("question", ["Which?"] * 3).add_column("answer", ["1"] * 3)


# What comes of it


@pytest.fixture(scope="module")
def in_process(base, tmp_path_factory):
    trainer = make(
        base, tmp_path_factory.mktemp("in_process"), eval_dataset=labelled(), eval_steps=3, eval_strategy="steps"
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("adapters", ["separate", "shared"])
def test_a_run_by_server_is_the_run_in_process(adapters, base, in_process, tmp_path):
    options = {"eval_steps": 3, "eval_strategy": "steps", "adapters": adapters}
    if adapters == "shared":
        in_process = make(base, tmp_path / "in_process", eval_dataset=labelled(), **options)
        in_process.train()
    # Without the weights, which are 1 but for the few tokens that are never drawn
    trainer = make(
        base,
        tmp_path / "served",
        eval_dataset=labelled(),
        vllm_importance_sampling_correction=False,
        **VLLM,
        **options,
    )
    trainer.train()
    assert largest(trainer, in_process) < 1e-4
    mine, theirs = records(tmp_path / "served"), records(in_process.args.output_dir)
    assert [(r["image_id"], r["question_completion"]) for r in mine] == [
        (r["image_id"], r["question_completion"]) for r in theirs
    ]
    assert [r["answers"] for r in mine] == [r["answers"] for r in theirs]
    # Whose samples have seeds of their own
    assert logged(trainer, "eval_accuracy_greedy") == logged(in_process, "eval_accuracy_greedy")
    assert len(logged(trainer, "eval_accuracy_sampled")) == 3


def test_only_the_role_that_moved_is_swapped_and_before_it_is_asked_again(base, tmp_path):
    trainer = make(base, tmp_path, **VLLM)
    trainer.train()  # solver, solver, proposer, solver, solver, proposer
    events = [event for event in trainer.servers.events if event[0] == "swap"]
    # Each role's own, random weights, and its own again, to compare log-probs; then what has moved
    start = ["solver", "solver", "proposer", "proposer", "solver", "proposer"]
    assert [role for _, role in events] == [*start, "solver", "solver", "proposer", "solver"]
    answered = [name for event, *name in trainer.servers.events if event == "submit" and name[0] == "solver"]
    versions = list(dict.fromkeys(name for _, name in answered))
    assert versions == [f"solver-v{version}" for version in range(1, 7)]
    folders = [Path(adapter.folder) for adapter in trainer.servers.adapters.values()]
    assert all(folder.parent == tmp_path / "vllm_adapters" for folder in folders)


def test_a_step_without_samples_swaps_nothing(base, tmp_path):
    trainer = make(base, tmp_path, agreement_band=[0.999, 1.0], num_generations=4, max_steps=2, **VLLM)
    trainer.train()
    steps = [row["trained_on"]["solver"] for row in records(tmp_path)]
    expected = 6 + any(steps[:2])
    assert len([event for event in trainer.servers.events if event[0] == "swap"]) == expected


def test_a_question_is_answered_before_the_others_are_asked(base, tmp_path, stand_in):
    answered, late = threading.Event(), []

    class Slow(stand_in):
        def _complete(self, request, adapter):
            if request.role == "proposer" and request.samples == 1 and self.asked_late(request):
                late.append(answered.wait(60))
            completions = super()._complete(request, adapter)
            if request.role == "solver" and not self.checking:
                answered.set()
            return completions

        def asked_late(self, request):
            first, self.held = not getattr(self, "held", False) and not self.checking, True
            return first

        checking = True

    served.VLLMServers = Slow
    trainer = make(base, tmp_path, max_steps=1, **VLLM)
    send = trainer._send_rollout

    def start(*args):
        trainer.servers.checking = trainer.servers.held = False
        send(*args)

    trainer._send_rollout = start
    trainer.train()
    assert late == [True]  # the first question came only when the second had been answered


def test_a_server_is_sent_the_image_in_the_size_that_the_processor_makes_it(base, tmp_path):
    images = [Image.new("RGB", (70, 61), colour) for colour in ("red", "blue")]
    images += noise_images(2, side=61)
    trainer = make(base, tmp_path, dataset=Dataset.from_dict({"image": images}), max_steps=2, **VLLM)
    trainer.train()  # the stand-in's processor gives as many image tokens, and the start compares log-probs
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 0.1


# Weights


def test_the_weights_are_those_of_trl():
    difference = torch.tensor([[0.0, 1.5, -2.0], [0.1, -0.2, 0.0]])

    def ratio(mode, low=None, high=None):
        return importance_ratio(difference, mode, low, high)

    e = torch.exp
    torch.testing.assert_close(ratio("token_truncate", 0.2, 3.0), e(difference).clamp(0.2, 3.0))
    torch.testing.assert_close(ratio("token_truncate", None, 3.0)[0, 2], e(torch.tensor(-2.0)))
    torch.testing.assert_close(ratio("token_mask", 0.2, 3.0), e(difference) * torch.tensor([[1, 0, 0], [1, 1, 1.0]]))
    torch.testing.assert_close(ratio("sequence_truncate", 0.7, 3.0), torch.tensor([[0.7], [e(torch.tensor(-0.1))]]))
    torch.testing.assert_close(ratio("sequence_mask", None, 0.8), torch.tensor([[e(torch.tensor(-0.5))], [0.0]]))


def test_a_log_prob_that_is_not_known_counts_as_no_difference():
    logps, sampled = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, torch.nan, 0.0]])
    assert log_ratio(logps, sampled, torch.tensor([[1, 1, 0]])).tolist() == [[0.5, 0.0, 0.0]]


class Shifted(ServersStandIn):
    """Says of every answered token that it was this much likelier, in turn, than it was."""

    shifts = (0.0,)
    honest = 16  # completions of the comparison at the start

    def _complete(self, request, adapter):
        completions = super()._complete(request, adapter)
        if request.role == "solver" and request.samples == 3:
            completions = [
                VLLMCompletion(c.ids, [logp + self.shifts[i % len(self.shifts)] for i, logp in enumerate(c.logps)])
                for c in completions
            ]
        return completions


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_loss_and_the_metrics_are_weighed(mode, base, tmp_path, monkeypatch, caplog):
    options = {
        "max_steps": 1,
        "beta": 0.0,
        "vllm_importance_sampling_clip_max": 2.0,
        "vllm_importance_sampling_mode": mode,
    }
    trainers = {}
    for name, shifts in (("plain", (0.0,)), ("half", (0.5,)), ("capped", (-3.0,))):
        stand_in = type("StandIn", (Shifted,), {"base": base, "shifts": shifts})
        monkeypatch.setattr(served, "VLLMServers", stand_in)
        trainers[name] = make(base, tmp_path / name, max_grad_norm=0.0, optim="sgd", **options, **VLLM)
        trainers[name].train()
    moved = {name: _movement(trainer) for name, trainer in trainers.items()}
    # Trained by SGD for one step, a constant weight scales what moves
    ratios = {name: (moved[name] @ moved["plain"] / moved["plain"].square().sum()).item() for name in moved}
    largest_ratio = logged(trainers["capped"], "sampling/importance_sampling_ratio/max")[0]
    if mode == "token_truncate":
        assert ratios["half"] == pytest.approx(torch.exp(torch.tensor(-0.5)).item(), rel=1e-3)
        assert ratios["capped"] == pytest.approx(2.0, rel=0.02) and largest_ratio == pytest.approx(2.0)
    else:
        assert 0 < ratios["half"] < 0.5
        assert ratios["capped"] == 0.0 == largest_ratio  # six tokens of e^3 each: left out
        assert "All 6 samples of step 1 are left out" in caplog.text
    for name, shift in (("plain", 0.0), ("half", 0.5), ("capped", 3.0)):
        assert logged(trainers[name], "sampling/sampling_logp_difference/mean")[0] == pytest.approx(shift, abs=0.02)
        assert logged(trainers[name], "sampling/sampling_logp_difference/max")[0] == pytest.approx(shift, abs=0.1)


def _movement(trainer) -> torch.Tensor:
    named = trainer.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora_B.default" in name])


# The comparison at the start


@pytest.mark.parametrize("fault", ["other weights", "other image", "nan"])
def test_a_server_whose_log_probs_differ_is_found_at_the_start(fault, base, tmp_path, stand_in, monkeypatch):
    class Wrong(stand_in):
        def _encoded(self, request):
            prompt = super()._encoded(request)
            if fault == "other image":
                inputs = {**prompt.image_inputs, "pixel_values": 1 - prompt.image_inputs["pixel_values"]}
                prompt = replace(prompt, image_inputs=inputs)
            return prompt

        def _complete(self, request, adapter):
            completions = super()._complete(request, adapter)
            if fault == "nan":
                completions = [VLLMCompletion(c.ids, [float("nan")] * len(c.ids)) for c in completions]
            return completions

    if fault == "other weights":
        Wrong.base = str(tiny_qwen2_5_vl(tmp_path / "other", seed=1))
    monkeypatch.setattr(served, "VLLMServers", Wrong)
    trainer = make(base, tmp_path / "run", **VLLM)
    with pytest.raises(
        ValueError, match="log-probs of the vLLM server at http://one:1 are not the trainer's"
    ) as error:
        trainer.train()
    assert "for the solver's prompt" in str(error.value) and "at most 0.001 on average" in str(error.value)
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


@pytest.mark.parametrize("fault", ["ignored", "of the other role", "never swapped again", "scaled twice"])
def test_an_adapter_that_a_server_does_not_apply_as_it_should_is_found_at_the_start(
    fault, base, tmp_path, stand_in, monkeypatch
):
    class Wrong(stand_in):
        def swap(self, role, save):
            def scaled_save(folder):
                save(folder)
                if fault == "scaled twice":
                    file = folder / "adapter_config.json"
                    settings = json.loads(file.read_text())
                    file.write_text(json.dumps({**settings, "lora_alpha": 2 * settings["lora_alpha"]}))

            return super().swap(role, scaled_save)

        def _complete(self, request, adapter):
            role, _, version = adapter.partition("-")
            match fault:
                case "ignored":
                    adapter = f"{role}-v1"  # new, and so without effect
                case "of the other role":
                    adapter = "solver-v2" if adapter == "proposer-v2" else adapter
                case "never swapped again":
                    adapter = f"{role}-{min(version, 'v2')}"
            return super()._complete(request, adapter)

    monkeypatch.setattr(served, "VLLMServers", Wrong)
    trainer = make(base, tmp_path, learning_rate=1e-6, **VLLM)
    role = "proposer" if fault == "of the other role" else "solver"
    weights = "its adapter" if fault == "never swapped again" else "an adapter of random weights"
    with pytest.raises(ValueError, match=f"for the {role}'s prompt and the first image, under {weights},") as error:
        trainer.train()
    difference, without = re.search(
        r"differ by (\S+) nats .* any adapter they differ by (\S+)\.", str(error.value)
    ).groups()
    assert float(difference) > 0.1
    if fault == "ignored":
        assert float(without) < 1e-4
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("adapters", ["separate", "shared"])
def test_the_comparison_leaves_the_trainers_weights_as_they_were(adapters, base, tmp_path):
    trainer = make(base, tmp_path, adapters=adapters, **VLLM)
    before = snapshot(trainer)
    trainer._update_servers()
    after = snapshot(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for role, adapter in trainer.servers.adapters.items():
        tensors = load_file(Path(adapter.folder) / FILE)
        assert all(torch.equal(tensors[n], t) for n, t in role_adapter_state(trainer.model, role).items())
    # What is random moves log-probs by far more than the bound
    random = [name for event, *name in trainer.servers.events if event == "submit" and name[1].endswith("v2")]
    assert len(random) == 4  # two roles, two servers


def test_lora_layers_without_effect_are_found_at_the_start(base, tmp_path):
    trainer = make(base, tmp_path, peft_config=lora(lora_alpha=0), **VLLM)
    with pytest.raises(RuntimeError, match="Its LoRA layers have no effect: check `lora_alpha`"):
        trainer.train()


def test_every_server_is_compared(base, tmp_path):
    trainer = make(base, tmp_path, max_steps=1, **VLLM)
    asked, submit = [], trainer.servers.submit
    trainer.servers.submit = lambda request, url=None: asked.append((request.role, url)) or submit(request, url)
    trainer.train()
    assert [pair for pair in asked if pair[1]] == [
        (role, url)
        # Both adapters of each role, and the first again
        for role in ("solver", "solver", "proposer", "proposer", "solver", "proposer")
        for url in VLLM["vllm_server_urls"]
    ]


# Asynchronous rollouts


def test_a_rollout_is_sent_one_update_ahead_and_never_more(base, tmp_path):
    options = {"async_rollouts": True, "max_steps": 12, "proposer_update_every": 3, "num_train_epochs": 5}
    trainer = make(base, tmp_path, **options, **VLLM)
    sent, updated = {}, [0]
    send, set_moved = trainer._send_rollout, trainer._set_moved

    def keep(step, rows):
        sent[step] = (trainer.state.global_step, updated[0], [row["image_id"] for row in rows])
        send(step, rows)

    def count(*roles):
        updated[0] += roles == ("solver",)
        set_moved(*roles)

    trainer._send_rollout, trainer._set_moved = keep, count
    trainer.train()
    in_process = make(base, tmp_path / "other", **{**options, "async_rollouts": False})
    in_process.train()
    images = [r["image_id"] for r in records(tmp_path)]
    assert images == [r["image_id"] for r in records(tmp_path / "other")] and len(images) == 18
    steps_of_solver = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert list(sent) == steps_of_solver
    ahead = [step - at for step, (at, _, _) in sent.items()]
    # Each is sent as the step before begins; the first of the run, and the first of a pass over the images, at its own step
    assert set(ahead) == {0, 1} and ahead[0] == 0 and sum(ahead) >= 5
    for number, step in enumerate(steps_of_solver):
        assert number - sent[step][1] in (0, 1)  # steps of the solver between sampling and training
    assert images == [str(i) for step in sent for i in sent[step][2]]


@pytest.mark.parametrize(
    ("asynchronous", "streamed", "steps"),
    # The next steps are the solver's, the proposer's, and the solver's after it
    [(False, False, [1]), (True, False, [1, 2, 3]), (True, True, [1])],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(asynchronous, streamed, steps, base, tmp_path):
    dataset = image_dataset(7)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "async_rollouts": asynchronous}

    def trainer(folder):
        data = dataset.to_iterable_dataset() if streamed else dataset
        return make(base, folder, dataset=data, max_steps=4, **options, **VLLM)

    whole = trainer(tmp_path / "whole")
    whole.train()
    for step in steps:
        folder = tmp_path / f"from_{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "rollouts.jsonl", folder)
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=True)
        assert largest(resumed, whole) == 0.0
        assert (folder / "rollouts.jsonl").read_bytes() == (tmp_path / "whole" / "rollouts.jsonl").read_bytes()
    in_flight = {path.parent.name for path in (tmp_path / "whole").rglob("rollout_in_flight_0.json")}
    # None before the proposer's step, and none behind the last
    assert in_flight == ({"checkpoint-1", "checkpoint-3"} if asynchronous else set())


def test_the_update_runs_while_the_next_rollout_is_generated(base, tmp_path, stand_in, monkeypatch):
    updated = threading.Event()
    waited = []

    class AfterTheUpdate(stand_in):
        held = False

        def _complete(self, request, adapter):
            if self.held:
                waited.append(updated.wait(30))
            return super()._complete(request, adapter)

    class Updating(CountingTrainer):
        def _send_rollout(self, step, rows):
            self.servers.held = step == 1
            super()._send_rollout(step, rows)

        def training_step(self, *args):
            loss = super().training_step(*args)
            updated.set()  # the backward of a part of step 0 is behind
            return loss

    monkeypatch.setattr(served, "VLLMServers", AfterTheUpdate)
    trainer = make(base, tmp_path, Updating, async_rollouts=True, max_steps=2, **VLLM)
    trainer.train()
    assert waited and all(waited)


@pytest.mark.parametrize(("change", "reason"), [("images", "it is about other images"), ("votes", "it has 3 answers")])
def test_a_rollout_in_flight_of_other_images_or_votes_is_asked_for_again(change, reason, base, tmp_path, caplog):
    options = {"async_rollouts": True, "max_steps": 2, **VLLM}
    make(base, tmp_path, save_strategy="steps", save_steps=1, **options).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    changed = {"dataset": image_dataset(7, seed=1)} if change == "images" else {"extra_votes": 2}
    resumed = make(base, tmp_path, **changed, **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    lines = [r.getMessage() for r in caplog.records if "The rollout that the checkpoint holds" in r.getMessage()]
    assert len(lines) == 1 and f"for step 2 is not trained on: {reason}" in lines[0]
    # as a run that held nothing in flight would have gone on
    (tmp_path / "checkpoint-1" / "rollout_in_flight_0.json").unlink()
    state = tmp_path / "checkpoint-1" / "evolmm_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "rollout_in_flight": False}))
    mine = records(tmp_path)
    assert [r["step"] for r in mine] == [1, 1, 2, 2]
    assert all(len(r["answers"]) == (3 if change == "images" else 5) for r in mine[2:])
    other = make(base, tmp_path, **changed, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert records(tmp_path) == mine
    assert largest(resumed, other) == 0.0


def test_measuring_in_between_changes_nothing_of_an_asynchronous_run(base, tmp_path):
    trainers = []
    for name, options in (("plain", {}), ("measured", {"eval_dataset": labelled(), "eval_strategy": "steps"})):
        trainers.append(make(base, tmp_path / name, async_rollouts=True, eval_steps=1, **options, **VLLM))
        trainers[-1].train()
    assert largest(*trainers) == 0.0
    assert len(logged(trainers[1], "eval_agreement")) == 7


def test_an_error_of_a_server_stops_the_run_with_its_text(base, tmp_path, stand_in, monkeypatch):
    class Failing(stand_in):
        def _complete(self, request, adapter):
            if adapter == "solver-v5":
                raise served.VLLMError("the server says: out of memory")
            return super()._complete(request, adapter)

    monkeypatch.setattr(served, "VLLMServers", Failing)
    trainer = make(base, tmp_path, save_strategy="steps", save_steps=1, **VLLM)
    with pytest.raises(served.VLLMError, match="out of memory"):
        trainer.train()
    assert trainer.servers.closed  # or requests that wait for a server would hold up the end of the program
    monkeypatch.setattr(served, "VLLMServers", stand_in)
    resumed = make(base, tmp_path, save_strategy="steps", save_steps=1, **VLLM)
    resumed.train(resume_from_checkpoint=True)
    whole = make(base, tmp_path / "whole", **VLLM)
    whole.train()
    assert largest(resumed, whole) == 0.0
    assert records(tmp_path) == records(tmp_path / "whole")

    trainer.train(resume_from_checkpoint=True)  # connects anew
    assert not trainer.servers.closed and trainer.servers.events[0][0] == "start"
    assert largest(trainer, whole) == 0.0


def test_measuring_after_a_run_that_failed_connects_anew(base, tmp_path, stand_in, monkeypatch):
    class Failing(stand_in):
        failing = True

        def _complete(self, request, adapter):
            if self.failing and adapter == "solver-v4":
                raise served.VLLMError("the server says: out of memory")
            return super()._complete(request, adapter)

    monkeypatch.setattr(served, "VLLMServers", Failing)
    trainer = make(base, tmp_path, eval_dataset=labelled(), async_rollouts=True, **VLLM)
    trainer.args.eval_on_start = False
    with pytest.raises(served.VLLMError, match="out of memory"):
        trainer.train()
    left = trainer.servers
    Failing.failing = False
    metrics = trainer.evaluate()
    assert left.closed and not trainer.servers.closed and trainer.servers is not left
    in_process = make(base, tmp_path / "in_process", eval_dataset=labelled())
    in_process.model.load_state_dict(trainer.model.state_dict())
    assert metrics["eval_accuracy_greedy"] == in_process.evaluate()["eval_accuracy_greedy"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left"), ValueError("?")]
)
def test_what_fails_on_the_main_process_fails_on_all(error, base, tmp_path, monkeypatch):
    trainer = make(base, tmp_path, **VLLM)
    said = []

    def send(objects):
        said.append(objects[0])

    monkeypatch.setattr(served, "broadcast_object_list", send)
    monkeypatch.setattr(served, "save_role_adapter", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        trainer._update_servers()
    assert raised.value is error and said == [f"{type(error).__name__}: {error}"]

    # Another process, which is told
    def take(objects):
        objects[0] = said[0]

    monkeypatch.setattr(served, "broadcast_object_list", take)
    monkeypatch.setattr(type(trainer.accelerator), "is_main_process", False)
    with pytest.raises(served.VLLMError, match=f"The main process, .*, has failed with {re.escape(said[0])}"):
        trainer._update_servers()


# Weights that a checkpoint brings


class Rewinding(TrainerCallback):
    """As the guard against collapse does: at the end of the third step, back to the first checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            args.load_best_model_at_end = True
            state.best_model_checkpoint = f"{args.output_dir}/checkpoint-1"


@pytest.mark.parametrize("by_engine", [False, True])
def test_what_is_measured_after_a_rewind_is_what_it_went_back_to(by_engine, base, tmp_path, monkeypatch):
    # The servers are up to date after each step, since it is measured
    options = {"eval_dataset": labelled(), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(base, tmp_path, save_strategy="steps", save_steps=1, max_steps=3, **options, **VLLM)
    if not by_engine:
        trainer.add_callback(Rewinding())
    trainer.train()
    if by_engine:  # which loads by its own means
        first = str(tmp_path / "checkpoint-1")
        monkeypatch.setattr(GRPOTrainer, "_load_best_model", lambda self: load_role_adapters(self.model, first))
        trainer.is_fsdp_enabled = True
        trainer._load_best_model()
        trainer.is_fsdp_enabled = False
    trainer.evaluate()
    for role, adapter in trainer.servers.adapters.items():
        expected = load_file(tmp_path / "checkpoint-1" / ("proposer" if role == "proposer" else "") / FILE)
        found = load_file(Path(adapter.folder) / FILE)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert trainer.servers.events[-1][-1] == trainer.servers.adapters["solver"].name


# Engines and models


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_sharded_adapter_reaches_the_servers_whole(engine, base, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install evolmm-trl[deepspeed]")
    results = run(engine, base, tmp_path, "--served", max_steps=4, proposer_update_every=2)
    assert results[0]["sharded"] > 0
    for result in results:
        assert set(result["served"]) == set(ADAPTERS)
        for role, tensors in result["served"].items():
            names = [name for name in result["final"] if f".{ADAPTERS[role]}." in name]
            assert len(names) == len(tensors) > 0
            for name in names:
                assert torch.equal(tensors[name.replace(f".{ADAPTERS[role]}.", ".")], result["final"][name])


def test_asynchronous_rollouts_of_sharded_processes_train_as_those_of_one_do(base, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install evolmm-trl[deepspeed]")
    options = {"async_rollouts": True, "max_steps": 6, "proposer_update_every": 2}
    (one,) = run(None, base, tmp_path / "one", "--served", **options)
    first, second = run("zero3", base, tmp_path / "zero3", "--served", **options)
    assert first["sharded"] > 0
    assert largest_difference(first["weights"], one["weights"]) < 1e-5
    assert largest_difference(first["weights"], second["weights"]) == 0.0
    assert min(movement(one["weights"], role) for role in ("default", "proposer")) > 1e-3


def test_adapters_of_a_quantized_base_are_served(base, tmp_path, stand_in, monkeypatch):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    path = str(tiny_qwen2_5_vl(tmp_path / "base", hidden=64))

    def make_quantized(folder):
        return CountingTrainer(
            model=path,
            args=config(folder, max_steps=3, **VLLM),
            train_dataset=image_dataset(7),
            peft_config=lora(),
            quantization_config=quantization,
        )

    monkeypatch.setattr(stand_in, "base", path)
    with pytest.raises(ValueError, match="quantization"):  # the server's base is not quantized
        make_quantized(tmp_path / "other").train()

    class Quantized(stand_in):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model = AutoModelForImageTextToText.from_pretrained(
                path, quantization_config=without_vision(quantization, ["model.visual"])
            )
            keep_gradients_on_cpu(self.model.eval())

    monkeypatch.setattr(served, "VLLMServers", Quantized)
    trainer = make_quantized(tmp_path / "run")
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/mean")) < 0.05


def test_a_run_of_qwen3_vl_by_server(tmp_path, stand_in, monkeypatch):
    path = str(tiny_qwen3_vl(tmp_path / "base"))
    monkeypatch.setattr(stand_in, "base", path)
    images = Dataset.from_dict({"image": noise_images(6, side=64)})
    trainer = make(path, tmp_path / "run", dataset=images, max_steps=3, **VLLM)
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/mean")) < 0.05


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": "sglang"}, "rollout='sglang'"),
        ({"rollout": "vllm"}, "vllm_server_urls=None"),
        ({"rollout": "vllm", "vllm_server_urls": "http://one:1"}, "expected a list of addresses"),
        ({"vllm_server_urls": ["http://one:1"]}, "no server would be asked"),
        ({"async_rollouts": True}, "no server would be asked"),
        ({"vllm_adapter_dir": "adapters"}, "vllm_adapter_dir='adapters'.* no server would be asked"),
        ({**VLLM, "vllm_request_timeout": 0.0}, "vllm_request_timeout=0.0; expected seconds above 0"),
        ({**VLLM, "vllm_request_timeout": -5.0}, "vllm_request_timeout=-5.0; expected seconds above 0"),
        ({**VLLM, "vllm_server_timeout": -1.0}, "vllm_server_timeout=-1.0; expected seconds above 0"),
        ({**VLLM, "vllm_server_timeout": float("nan")}, "vllm_server_timeout=nan; expected seconds above 0"),
        ({**VLLM, "freeze_vision_tower": False}, "freeze_vision_tower=False is not supported"),
        ({**VLLM, "early_votes": True, "extra_votes": 2}, "early_votes=True is not supported"),
        ({**VLLM, "vllm_importance_sampling_mode": "token"}, "expected one of"),
        ({**VLLM, "async_rollouts": True, "vllm_importance_sampling_correction": False}, "nothing would correct it"),
        ({**VLLM, "loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"}, "loss_type='vespo'"),
        ({"use_vllm": True}, "Set rollout='vllm'"),
    ],
)
def test_settings_that_servers_cannot_follow_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EvoLMMConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("peft_config", "options", "message"),
    [
        (None, {}, "all weights are trained"),
        (lora(rank_pattern={"q_proj": 2}), {}, "rank_pattern"),
        (lora(alpha_pattern={"q_proj": 2}), {}, "alpha_pattern"),
        (lora(target_modules=["q_proj", "embed_tokens"]), {}, "adapter of the embeddings"),
        (lora(), {"generation_kwargs": {"typical_p": 0.9}}, "typical_p"),
    ],
)
def test_what_servers_cannot_serve_is_refused(peft_config: LoraConfig | None, options, message, base, tmp_path):
    with pytest.raises(ValueError, match=f"rollout='vllm' is not possible here.*{message}"):
        TalkingTrainer(
            model=base,
            args=config(tmp_path, **options, **VLLM),
            train_dataset=image_dataset(),
            peft_config=peft_config,
        )


def test_a_family_that_is_not_verified_is_refused(tmp_path):
    path = str(tiny_internvl(tmp_path / "base"))
    with pytest.raises(ValueError, match="this model is a internvl"):
        make(path, tmp_path / "run", shared_prefix=False, **VLLM)


def test_questions_that_waited_since_before_there_was_a_server_are_trained_on(base, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make(base, tmp_path, **options).train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    trainer = make(base, tmp_path, **options, **VLLM)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3 and logged(trainer, "proposer/grad_norm")[-1] > 0
