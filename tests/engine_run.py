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

"""A run of the trainer that keeps the weights of every step, under whatever engine it is launched with."""

import argparse
import contextlib
import json
import os
from pathlib import Path

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from served import ServersStandIn
from tiny_trainer import TalkingTrainer, config, image_dataset, lora
from transformers import TrainerCallback

from evolmm_trl.rollout import served
from evolmm_trl.sr2se import ConfidenceGate


def let_fsdp_run_on_the_cpu() -> None:
    """Accelerate knows FSDP on accelerators alone, and would train with DDP here without a word."""
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        known = bool(AcceleratorState._shared_state)
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if not known and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = accelerate.state.AcceleratorState.__init__ = with_fsdp


def whole(trainer) -> dict[str, torch.Tensor]:
    """A copy of every trainable tensor, gathered where it is sharded."""
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    gathered = contextlib.nullcontext()
    if hasattr(named[0][1], "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([p for _, p in named])
    with gathered:
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().float().cpu().clone()
            for name, p in named
        }


class EveryStep(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(whole(self.trainer))


class DyingTrainer(TalkingTrainer):
    """One process fails in the rollout of its third step."""

    def _roll_out(self, rows):
        if self.state.global_step == 2 and self.accelerator.process_index == 1:
            raise MemoryError("process 1 has run out of memory")
        return super()._roll_out(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("folder")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--no_lora", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--die", action="store_true")
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--vote_gate")
    args = parser.parse_args()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_the_cpu()
    if args.served:
        ServersStandIn.base = args.base
        served.VLLMServers = ServersStandIn
        args.options |= {"rollout": "vllm", "vllm_server_urls": ["http://one:1"]}
    watch = EveryStep()
    trainer = (DyingTrainer if args.die else TalkingTrainer)(
        model=args.base,
        # With Adam's usual epsilon, a gradient of nothing but rounding makes as large a step as any other
        args=config(
            args.folder, **{"max_steps": 12, "proposer_update_every": 5, "adam_epsilon": 1e-4, **args.options}
        ),
        train_dataset=image_dataset(12),
        eval_dataset=image_dataset(3).add_column("question", ["Which?"] * 3).add_column("answer", ["1"] * 3),
        peft_config=None if args.no_lora else lora(),
        callbacks=[watch],
        vote_gate=ConfidenceGate.from_pretrained(args.vote_gate) if args.vote_gate else None,
    )
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=args.resume or None)
    if args.save:
        trainer.save_model(str(Path(args.folder) / "model"))
    accelerator = trainer.accelerator
    plugin = accelerator.state.deepspeed_plugin
    optimizer = trainer.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    result = {
        "engine": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "zero": plugin.zero_stage if plugin else None,
        "model": type(trainer.model_wrapped).__name__,
        "optimizer": [c.__name__ for c in type(optimizer).__mro__],
        "sharded": sum(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "baselines": {role: baseline.state_dict() for role, baseline in trainer.baselines.items()},
        "betas": {role: kl.beta for role, kl in trainer.kl.items()},
        "log": trainer.state.log_history,
        "shared": trainer._share_prefix and trainer._sharing_verified,
        "weights": watch.weights,
        "final": whole(trainer),
    }
    if args.served:
        trainer._update_servers()
        result["served"] = {
            role: load_file(Path(adapter.folder) / "adapter_model.safetensors")
            for role, adapter in trainer.servers.adapters.items()
        }
    torch.save(result, Path(args.folder) / f"result-{accelerator.process_index}.pt")
    # A process that aborts when it ends would end the other one, too, before it has saved its result
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
