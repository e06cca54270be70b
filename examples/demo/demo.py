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
Trains the demo model on charts nobody labelled, and says whether it got better at reading them.

    python examples/demo/demo.py --output_dir runs/demo

The demo model is a real Qwen2.5-VL of 0.6 million parameters that reads bar charts. It knows two ways to answer: the
bare answer, which greedy decoding takes and which is often wrong, and writing the steps out. Its own vote knows better
than its greedy answer, and that is what training teaches it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import torch
from charts import EVOLVE_SEEDS, TEST_SEEDS, chart, labelled_questions, make_images
from evaluate import evaluate_proposer, evaluate_solver
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, PrinterCallback, TrainerCallback

from evolmm_trl import EvoLMMConfig, EvoLMMTrainer, load_images, load_processor, load_solver


HERE = Path(__file__).parent
PROMPTS = json.loads((HERE / "prompts.json").read_text())


def demo_config(output_dir: str | Path, **changes) -> EvoLMMConfig:
    """The demo's settings; what differs from the defaults for real models is that everything here is a thousand times smaller."""
    settings = {
        "max_steps": 48,  # 40 rollouts of 16 images, and 8 steps of the proposer
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 80,  # 16 images x 5 answers
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3,
        "weight_decay": 0.0,
        "beta": 0.05,
        "kl_target": 0.1,
        "loss_type": "dapo",  # averages over tokens: a mean per completion would over-weight the short bare answers
        "max_completion_length": 32,
        "max_question_length": 16,
        "prompts": PROMPTS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return EvoLMMConfig(output_dir=str(output_dir), **{**settings, **changes})


def demo_lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def load_model(folder: str | Path):
    """A demo model in float32 and its processor."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), load_processor(str(folder))


class Progress(TrainerCallback):
    """A line now and then instead of every metric of every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "agreement" in logs and state.global_step % 6 == 1:
            shown = {name: logs[name] for name in ("agreement", "solver/reward", "proposer/reward", "solver/kl")}
            values = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"  step {state.global_step} of {state.max_steps}  {values}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--output_dir", default="runs/demo")
    parser.add_argument("--model", default=str(HERE / "models" / "room"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.time()
    output = Path(arguments.output_dir)
    torch.set_num_threads(2)

    model, processor = load_model(arguments.model)
    test_rows = labelled_questions(TEST_SEEDS)
    print(f"Before training, on {len(test_rows):,} held-out questions:", flush=True)
    before = _show(evaluate_solver(model, processor, test_rows, PROMPTS))

    images = load_images(make_images(output / "images", EVOLVE_SEEDS[:1000]), streaming=False)
    print(f"Training on {len(images):,} charts without labels.", flush=True)
    trainer = EvoLMMTrainer(
        model=model,
        args=demo_config(output, seed=arguments.seed),
        train_dataset=images,
        processing_class=processor,
        peft_config=demo_lora(),
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()

    # What was saved, loaded as a user would load it
    solver, processor = load_solver(arguments.model, str(output), dtype=torch.float32)
    print("After training:", flush=True)
    after = _show(evaluate_solver(solver, processor, test_rows, PROMPTS))
    solver.load_adapter(str(output), adapter_name="proposer", subfolder="proposer")
    solver.set_adapter("proposer")
    questions = evaluate_proposer(solver, processor, [chart(seed) for seed in TEST_SEEDS[:200]], PROMPTS)
    print(f"  of its questions {questions['grounded']:.3f} are about bars that the chart has")
    gains = [b - a for a, b in zip(before["per_question"]["greedy"], after["per_question"]["greedy"], strict=True)]
    gain, error = fmean(gains), stdev(gains) / len(gains) ** 0.5
    print(
        f"Greedy accuracy {before['greedy']:.3f} -> {after['greedy']:.3f}: {100 * gain:+.1f} points, standard error {100 * error:.1f}."
    )
    _draw(trainer.state.log_history, output / "curves.png")
    summary = {
        "seconds": round(time.time() - started, 1),
        "questions": len(test_rows),
        "before": {name: round(value, 4) for name, value in before.items() if name != "per_question"},
        "after": {name: round(value, 4) for name, value in after.items() if name != "per_question"},
        "greedy_gain": round(gain, 4),
        "greedy_gain_standard_error": round(error, 4),
        "proposer": questions,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{output}: adapters, rollouts.jsonl, summary.json, curves.png ({summary['seconds']:.0f} s)")


def _show(scores: dict) -> dict:
    print(
        f"  greedy {scores['greedy']:.3f}  sampled {scores['sampled']:.3f}  majority of 5 {scores['maj5']:.3f}  "
        f"of 20 {scores['maj20']:.3f}  agreement {scores['agreement']:.3f}",
        flush=True,
    )
    return scores


def _draw(history: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = (
        ("Agreement", ("agreement", "unanimous")),
        ("Answer entropy (nats)", ("answer_entropy",)),
        ("Reward", ("solver/reward", "proposer/reward")),
        ("KL to the base (nats per token)", ("solver/kl", "proposer/kl")),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (title, names) in zip(axes.flat, curves, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="optimizer step")
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
