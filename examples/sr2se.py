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
SR2SE stage by stage on labelled questions: pairs and a gate, SR-DPO, the gate again, and an answer.

    python examples/sr2se.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --output_dir charts-sr2se

`evolmm sr2se run` does the same from a file, resumes, and repeats it in rounds. This script is to be copied and changed.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

from evolmm_trl import load_processor
from evolmm_trl.sr2se import (
    EarlyExitReasoner,
    GateRollouts,
    RefinementConfig,
    SRDPOConfig,
    SRDPOTrainer,
    SubPolicies,
    SubPolicyPrompts,
    build_pairs,
    load_preferences,
    train_gate,
)


def fit_gate(policies: SubPolicies, rollouts: Path) -> EarlyExitReasoner:
    """A gate from the rollouts that `build_pairs` wrote."""
    parts = [GateRollouts.load(file) for file in sorted(rollouts.iterdir())]
    gate, report = train_gate(GateRollouts.cat(parts))
    print(f"gate: accuracy {report['held_out_accuracy']:.3f}, calibration error {report['held_out_ece']:.3f}")
    return EarlyExitReasoner(policies, gate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with image, question and answer")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="JSON with prompts to replace, by name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    arguments = parser.parse_args()
    out, device = arguments.output_dir, "cuda" if torch.cuda.is_available() else "cpu"
    prompts = SubPolicyPrompts.from_dict(json.loads(arguments.prompts.read_text()) if arguments.prompts else None)

    # Images are beside the data or below; paths that lead elsewhere are skipped
    images = arguments.data.parent

    # Pairs, and the gate's rollouts from the same descriptions
    processor = load_processor(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype).to(device)
    policies = SubPolicies(model, processor, prompts)
    report = build_pairs(
        policies,
        arguments.data,
        out / "pairs.jsonl",
        reasoner=EarlyExitReasoner(policies),
        rollout_folder=out / "rollouts",
    )
    print(f"{report['pairs']} pairs from {report['considered']} questions")
    fit_gate(policies, out / "rollouts").save_pretrained(out / "gate")

    # SR-DPO. The reference is the same model without its adapter
    trainer = SRDPOTrainer(
        model=model,
        args=SRDPOConfig(
            output_dir=str(out / "trainer"),
            learning_rate=arguments.learning_rate,
            bf16=arguments.dtype == "bfloat16",
            report_to="none",
        ),
        train_dataset=load_preferences(out / "pairs.jsonl", processor, prompts, image_root=images),
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))

    # The model has changed, and its hidden states with it: the gate is fitted again, on greedy descriptions as in use
    policies = SubPolicies(trainer.model, processor, prompts)
    build_pairs(
        policies,
        arguments.data,
        out / "final.jsonl",
        RefinementConfig(max_refinements=0, temperature=0.0),
        reasoner=EarlyExitReasoner(policies),
        rollout_folder=out / "final_rollouts",
    )
    reasoner = fit_gate(policies, out / "final_rollouts")
    reasoner.save_pretrained(out / "final_gate")

    with open(out / "pairs.jsonl") as file:
        pair = json.loads(file.readline())
    result = reasoner.generate(pair["image_path"], pair["question"])
    print(f"{result.answer!r} after {len(result.steps)} steps and {result.tokens} tokens")


if __name__ == "__main__":
    main()
