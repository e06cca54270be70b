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
Trains the demo model with rollouts from a real vLLM server on this machine's CPU, beside runs in process, and writes the
tables of docs/vllm.md.

    python benchmarks/bench_vllm.py --output docs/benchmarks/vllm.json --document docs/vllm.md
    python benchmarks/bench_vllm.py --output docs/benchmarks/vllm.json --parts speed
"""

import argparse
import json
import sys
import tempfile
import time
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from bench_report import environment, in_place, table
from scipy.stats import t
from transformers import PrinterCallback, TrainerCallback


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "demo")]

from charts import EVOLVE_SEEDS, TEST_SEEDS, labelled_questions, make_images  # noqa: E402
from demo import PROMPTS, demo_config, demo_lora, load_model  # noqa: E402
from evaluate import sample  # noqa: E402
from vllm_process import VLLMProcess  # noqa: E402
from widen import widen  # noqa: E402

from evolmm_trl import EvoLMMTrainer, canonical_answer, load_images  # noqa: E402
from evolmm_trl.prompts import read_answer  # noqa: E402
from evolmm_trl.schedule import SOLVER  # noqa: E402


SEEDS = (0, 1, 2)
STEPS = 40  # of both roles: 34 rollouts of 16 images
KILLS = (7, 19, 31)  # steps in whose rollout the server is killed
WAYS = {
    "in process": {},
    "server": {"rollout": "vllm"},
    "server, asynchronous": {"rollout": "vllm", "async_rollouts": True},
}
SPEED_STEPS, SPEED_REPEATS = 8, 2
# How long answers are: those of the demo are short, and of long ones generation has the larger part
LONG = 128
LENGTHS = {"as the model ends them": None, f"of {LONG} tokens": LONG}
_DIFFERENCE = "sampling/sampling_logp_difference/mean"


class Clock(TrainerCallback):
    """Seconds of each of the solver's steps."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.role == SOLVER:
            self.seconds.append(time.perf_counter() - self.start)


def train(
    base: Path, images, folder: Path, way: str, seed: int, steps: int, server: VLLMProcess, kills=(), length=None
) -> tuple:
    """A run; at each of `kills` the server is killed while it answers, and started again. Of a `length`, no answer ends."""
    options = dict(WAYS[way])
    if options:
        options |= {"vllm_server_urls": [server.url], "vllm_server_timeout": 1200.0}
    model, processor = load_model(base)
    if length is not None:
        ends = [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]
        options |= {"max_completion_length": length, "generation_kwargs": {"suppress_tokens": ends}}
    clock = Clock()
    trainer = EvoLMMTrainer(
        model=model,
        args=demo_config(folder, max_steps=steps, seed=seed, **options),
        train_dataset=images,
        processing_class=processor,
        peft_config=demo_lora(),
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if kills:
        server.kill_in_rollouts(trainer, kills, after=0.3)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    faults = dict(trainer.servers.faults) if trainer.servers is not None else {}
    if trainer.servers is not None:
        trainer.servers.close()
    return trainer, clock.seconds, seconds, faults


def accuracy(model, processor, rows: list[dict]) -> list[int]:
    """Whether the greedy answer is right, per labelled question."""
    was_training = model.training
    model.eval()
    prompts = [PROMPTS["solver"].format(question=row["question"]) for row in rows]
    completions = sample(model, processor, [row["image"] for row in rows], prompts, samples=0, greedy=True)
    model.train(was_training)
    texts = processor.batch_decode([greedy for (greedy,) in completions], skip_special_tokens=True)
    return [
        int(canonical_answer(read_answer(text).text) == canonical_answer(row["answer"]))
        for text, row in zip(texts, rows, strict=True)
    ]


def images_of(log: Path) -> list[list]:
    """Step, image and number of answers of every rollout."""
    records = map(json.loads, log.read_text().splitlines())
    return [[record["step"], record["image_id"], len(record["answers"])] for record in records]


def training(base: Path, images, folder: Path, server: VLLMProcess, found: dict, save) -> None:
    """Runs of the same seeds in process and by server; the last of the latter with kills."""
    rows = labelled_questions(TEST_SEEDS)
    runs = found.setdefault("training", {"runs": []})["runs"]
    if "before" not in found["training"]:
        found["training"]["before"] = fmean(accuracy(*load_model(base), rows))
        save()
    done = {(run["way"], run["seed"]) for run in runs}
    for seed in SEEDS:
        for way in ("in process", "server"):
            if (way, seed) in done:
                continue
            kills = KILLS if way == "server" and seed == SEEDS[-1] else ()
            output = folder / f"{way}-{seed}".replace(" ", "_")
            trainer, _, seconds, faults = train(base, images, output, way, seed, STEPS, server, kills)
            trainer.roles.activate(SOLVER)
            differences = [row[_DIFFERENCE] for row in trainer.state.log_history if _DIFFERENCE in row]
            run = {
                "way": way,
                "seed": seed,
                "kills": len(kills),
                "faults": faults,
                "seconds": seconds,
                "after": fmean(accuracy(trainer.model, trainer.processing_class, rows)),
                # Of the seed at which the server is killed
                "images": images_of(output / "rollouts.jsonl") if seed == SEEDS[-1] else None,
                "difference": max(differences) if differences else None,
            }
            runs.append(run)
            print(way, seed, {name: value for name, value in run.items() if name != "images"}, flush=True)
            save()


def speed(base: Path, images, folder: Path, server: VLLMProcess, found: dict, save) -> None:
    """Seconds per image of a solver's step, the ways one after the other and again."""
    found["speed"] = {}
    for name, length in LENGTHS.items():
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        waits: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(SPEED_REPEATS):
            for way in WAYS:
                output = folder / f"speed-{length}-{repeat}-{way}".replace(" ", "_")
                trainer, steps, _, _ = train(base, images, output, way, repeat, SPEED_STEPS, server, length=length)
                per_image = [value / trainer.args.images_per_step for value in steps]
                seconds[way] += per_image[2:]  # the first ones compare log-probs and warm up
                history = trainer.state.log_history
                waits[way] += [
                    row["time/rollout"] / trainer.args.images_per_step for row in history if "time/rollout" in row
                ][2:]
                print(name, way, repeat, per_image, flush=True)
        found["speed"][name] = {"seconds": seconds, "waits": waits}
        save()


def tables(found: dict) -> str:
    parts = []
    if "training" in found:
        before, runs = found["training"]["before"], found["training"]["runs"]
        rows = [
            [
                run["seed"],
                run["way"] + (f", {run['kills']} kills" if run["kills"] else ""),
                f"{before:.3f}",
                f"{run['after']:.3f}",
                f"{100 * (run['after'] - before):+.1f}",
                "" if run["difference"] is None else f"{run['difference']:.1e}",
            ]
            for run in runs
        ]
        header = [
            "seed",
            "rollouts",
            "accuracy before",
            "after",
            "points",
            "largest mean difference of log-probs in a step",
        ]
        parts.append(table(header, rows))
        gains = {
            way: [100 * (r["after"] - before) for r in runs if r["way"] == way] for way in ("in process", "server")
        }
        own, servers = gains["in process"], gains["server"]
        if min(len(own), len(servers)) > 1:
            n = len(own)
            half = t.ppf(0.975, n - 1) * stdev(own) * sqrt(1 + 1 / len(servers))
            inside = abs(fmean(servers) - fmean(own)) <= half
            parts.append(
                f"{STEPS} steps; greedy accuracy on {len(TEST_SEEDS):,} held-out charts. In process the gain is "
                f"{fmean(own):+.1f} points (seeds {min(own):+.1f} to {max(own):+.1f}), by server {fmean(servers):+.1f} "
                f"({min(servers):+.1f} to {max(servers):+.1f}). The server's mean is "
                f"{'within' if inside else 'OUTSIDE'} the {fmean(own):+.1f} ± {half:.1f} points that the spread of the seeds in "
                f"process predicts for it (95 %, {n} seeds)."
            )
        orders = {run["seed"]: run["images"] for run in runs if run["way"] == "in process"}
        for run in runs:
            if run["kills"] and run["seed"] in orders:
                complete = run["images"] == orders[run["seed"]]
                counted = ", with as many answers," if len(run["images"][0]) > 2 else ""  # step, image and answers
                parts.append(
                    f"In the run with {run['kills']} kills the server was killed while it answered and started again; the "
                    f"client counted {run['faults'].get('deaths', 0)} deaths and sent {run['faults'].get('repeated', 0)} "
                    f"requests again. The rollout log holds {len(run['images'])} rollouts, "
                    f"{f'the same images at the same steps{counted} as' if complete else 'NOT those of'} the "
                    "run in process."
                )
    if "speed" in found:
        rows, ratios = [], []
        for name, measured in found["speed"].items():
            seconds = {way: median(values) for way, values in measured["seconds"].items()}
            waits = measured["waits"]
            rows += [
                [
                    name,
                    way,
                    f"{value:.3f}",
                    f"{value / seconds['in process']:.2f}",
                    f"{median(waits[way]):.3f}" if waits[way] else "",
                ]
                for way, value in seconds.items()
            ]
            ratios.append(
                f"{seconds['server'] / seconds['server, asynchronous']:.2f} times as fast with answers {name}"
            )
        header = [
            "answers",
            "rollouts",
            "seconds per image of a solver's step, median",
            "times in process",
            "of them waiting for the server",
        ]
        parts.append(table(header, rows))
        parts.append(f"Asynchronous rollouts make a step by server {', and '.join(ratios)}.")
    for part, machine in found.get("machine", {}).items():
        parts.append(
            f"{part.capitalize()}: commit {machine['commit']}, {machine['cpu']}, {machine['cores']} cores, one thread each for the "
            f"trainer and the server, load of the machine {machine['load']:.0f}."
        )
    return "\n\n".join(parts)


PARTS = {"training": training, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; runs that it holds are not made again")
    parser.add_argument("--document", type=Path, help="page to write the tables into")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}

    def save() -> None:
        arguments.output.write_text(json.dumps(found) + "\n")

    if arguments.parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = widen(ROOT / "examples" / "demo" / "models" / "room", folder / "base")
            images = load_images(make_images(folder / "images", EVOLVE_SEEDS[:1000]), streaming=False)
            server = VLLMProcess(base, folder / "server.log", "--max-lora-rank", "8").start(wait=False)
            try:
                server.wait(1200)
                for part in arguments.parts:
                    PARTS[part](base, images, folder, server, found, save)
                    found.setdefault("machine", {})[part] = environment()
                    save()
            finally:
                server.kill()
    text = tables(found)
    print(text)
    if arguments.document:
        arguments.document.write_text(in_place(arguments.document.read_text(), "training", text))


if __name__ == "__main__":
    main()
