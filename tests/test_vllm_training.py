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


"""Training by a real vLLM server (`make vllm-cpu`, `make test-vllm`)."""

import json

import pytest
import torch
from charts import EVOLVE_SEEDS, VAL_SEEDS, chart, labelled_questions
from datasets import Dataset
from demo import demo_config, demo_lora, load_model
from tiny_trainer import Watch, logged, snapshot
from vllm_process import VLLMProcess

from evolmm_trl import EvoLMMTrainer


pytestmark = pytest.mark.vllm

SERVED = {"rollout": "vllm", "vllm_server_timeout": 600.0}


def make(server, folder, trainer_class=EvoLMMTrainer, **options):
    model, processor = load_model(server.model)
    if options.get("rollout"):
        options["vllm_server_urls"] = [server.url]
    questions = Dataset.from_list(labelled_questions(VAL_SEEDS[:4]))
    return trainer_class(
        model=model,
        args=demo_config(
            folder, **{"max_steps": 5, "per_device_train_batch_size": 20, "proposer_update_every": 2, **options}
        ),
        train_dataset=Dataset.from_list([{"image": chart(seed).image()} for seed in EVOLVE_SEEDS[:40]]),
        eval_dataset=questions if options.get("eval_strategy") else None,
        processing_class=processor,
        peft_config=demo_lora(),
    )


class Replaying(EvoLMMTrainer):
    """Is given what a server wrote, and generates nothing."""

    def _generate_role(self, model, role, prompts, seeds):
        return [[next(self.written[role]) for _ in group] for group in seeds]


@pytest.fixture(scope="module")
def served(vllm_server, tmp_path_factory):
    """A run by server, the gradients of its steps and what was written, by role."""
    trainer = make(vllm_server, tmp_path_factory.mktemp("served"), **SERVED, eval_strategy="steps", eval_steps=4)
    trainer.add_callback(watch := Watch())
    written, take = {"solver": [], "proposer": []}, trainer._served_rollout

    def keep(rows):
        images = take(rows)
        written["proposer"] += [image.question.ids for image in images]
        written["solver"] += [answer.ids for image in images for answer in image.answers]
        return images

    trainer._served_rollout = keep
    trainer.train()
    trainer.servers.close()
    return trainer, watch.gradients, written


def records(trainer):
    return [json.loads(line) for line in trainer.rollout_log.path.read_text().splitlines()]


def test_both_roles_first_gradients_are_those_of_a_run_in_process_that_drew_the_same(vllm_server, served, tmp_path):
    trainer, gradients, written = served
    replay = make(vllm_server, tmp_path, Replaying, max_steps=3)
    replay.add_callback(watch := Watch())
    replay.written = {role: iter(ids) for role, ids in written.items()}
    replay.train()
    for step, adapter in ((0, "default"), (2, "proposer")):
        names = [name for name in watch.gradients[step] if f"lora_B.{adapter}" in name]
        mine, theirs = (torch.cat([g[step][name].flatten() for name in names]) for g in (gradients, watch.gradients))
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 0.01 * theirs.norm()
    asked = len(records(replay))
    assert [r["answers"] for r in records(trainer)[:asked]] == [r["answers"] for r in records(replay)]


def test_the_servers_log_probs_follow_the_weights(served):
    trainer = served[0]
    means = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(means) == 5 and max(means) < 1e-3
    assert logged(trainer, "eval_accuracy_greedy")[0] > 0.2


def test_a_run_in_bfloat16_by_a_server_in_bfloat16(vllm_server, tmp_path):
    options = ("--max-lora-rank", "8", "--dtype", "bfloat16")
    server = VLLMProcess(vllm_server.model, tmp_path / "server.log", *options).start()
    try:
        # As `--dtype bfloat16` on the command line
        trainer = EvoLMMTrainer(
            model=server.model,
            args=demo_config(
                tmp_path / "run",
                max_steps=3,
                proposer_update_every=2,
                per_device_train_batch_size=20,
                bf16=True,
                model_init_kwargs={"dtype": "bfloat16"},
                vllm_server_urls=[server.url],
                **SERVED,
            ),
            train_dataset=Dataset.from_list([{"image": chart(seed).image()} for seed in EVOLVE_SEEDS[:20]]),
            peft_config=demo_lora(),
        )
        trainer.train()  # which compares log-probs at the start
        trainer.servers.close()
    finally:
        server.kill()
    means = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(means) == 3 and 1e-4 < max(means) < 0.05


def test_an_asynchronous_run_survives_the_deaths_of_its_server(vllm_server, served, tmp_path):
    trainer = make(vllm_server, tmp_path, **SERVED, max_steps=8, async_rollouts=True)
    vllm_server.kill_in_rollouts(trainer, (1, 6), after=0.05)
    trainer.train()
    deaths = trainer.servers.faults["deaths"]
    trainer.servers.close()
    assert deaths == 2
    expected = make(vllm_server, tmp_path / "whole", max_steps=8)
    expected.train()
    assert [(r["step"], r["image_id"]) for r in records(trainer)] == [
        (r["step"], r["image_id"]) for r in records(expected)
    ]
    assert all(len(r["answers"]) == 5 for r in records(trainer))
    differences = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert differences[0] < 1e-3
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in snapshot(trainer).values()])).all()
