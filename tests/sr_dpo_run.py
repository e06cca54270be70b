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

"""A run of SR-DPO that keeps the weights of every step, under whatever engine it is launched with."""

import argparse
import json
import os
from pathlib import Path

import torch
from engine_run import EveryStep, let_fsdp_run_on_the_cpu, whole
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText

from evolmm_trl.processing import load_processor
from evolmm_trl.sr2se import SRDPOConfig, SRDPOTrainer, load_preferences


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("folder")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--pairs")
    parser.add_argument("--resume", action="store_true")
    trained = parser.add_mutually_exclusive_group(required=True)
    trained.add_argument("--lora", action="store_true")
    trained.add_argument("--weights", action="store_true")
    trained.add_argument("--adapter")
    args = parser.parse_args()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_the_cpu()
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        # With Adam's usual epsilon, a gradient of nothing but rounding makes as large a step as any other
        "adam_epsilon": 1e-4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **args.options,
    }
    settings = SRDPOConfig(args.folder, **settings)  # before a model is loaded, which ZeRO-3 shards as it comes
    model = args.base
    if args.adapter:
        base = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)
    watch = EveryStep()
    processor = load_processor(args.base)
    trainer = SRDPOTrainer(
        model=model,
        args=settings,
        train_dataset=load_preferences(args.pairs, processor),
        processing_class=processor,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if args.lora else None,
        callbacks=[watch],
    )
    watch.trainer = trainer
    before = whole(trainer)
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(str(Path(args.folder) / "model"))
    plugin = trainer.accelerator.state.deepspeed_plugin
    result = {
        "engine": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "zero": plugin.zero_stage if plugin else None,
        "model": type(trainer.model_wrapped).__name__,
        "sharded": sum(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "log": trainer.state.log_history,
        "before": before,
        "weights": watch.weights,
    }
    torch.save(result, Path(args.folder) / f"result-{trainer.accelerator.process_index}.pt")
    # A process that aborts when it ends would end the other one, too, before it has saved its result
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
