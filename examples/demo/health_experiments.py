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
Does the guard end runs that collapse, and leave the others alone? What do the proposer's penalties change?

    python examples/demo/health_experiments.py run       # runs what the results do not hold yet, and writes the page
    python examples/demo/health_experiments.py report    # writes the page from the results

Results go to `docs/experiments/health_results.jsonl`, one line per run with what was logged.
"""

import argparse
import json
import multiprocessing
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from statistics import fmean

import torch
from charts import (
    COLOURS,
    EVOLVE_SEEDS,
    TEST_SEEDS,
    WARM_START_SEEDS,
    chart,
    labelled_questions,
    make_images,
    sample_question,
)
from demo import HERE, PROMPTS, demo_config, demo_lora, load_model
from evaluate import evaluate_proposer, evaluate_solver
from experiments import DOCS, _start_worker
from make_demo_model import BASES, WarmStartData, sample_example
from transformers import PrinterCallback, TrainerCallback

from evolmm_trl import CollapseGuard, EvoLMMTrainer, load_images
from evolmm_trl.prompts import Question


RESULTS = DOCS / "health_results.jsonl"
PAGE = DOCS / "health.md"
# Questions whose answer is known without an image, and one that is answered by a guess: its answers differ as those of a
# hard question do, which is what the proposer is paid for
_NUMBERS = ("one", "two", "three", "four", "five")
FACTS = {f"What is {a} plus {b}?": str(i + j + 2) for i, a in enumerate(_NUMBERS) for j, b in enumerate(_NUMBERS)}
GUESS, GUESSES = "Pick a number.", ("1", "1", "1", "2", "3")
LOGGED = (
    "agreement",
    "answer_entropy",
    "unanimous",
    "distinct_questions",
    "novel_questions",
    "question_self_bleu",
    "question_cluster_share",
    "blind_solved",
    "solver/kl",
    "proposer/kl",
    "answer_length_drift",
    "eval_accuracy_greedy",
    "eval_agreement",
)


class OneTemplate(EvoLMMTrainer):
    """A proposer that always asks for the value of some colour."""

    def _propose(self, model, rows, prompts):
        rng = random.Random(f"{self.args.seed} {self.state.global_step}")
        return _asked(self, [f"What is the value of {rng.choice(list(COLOURS))}?" for _ in rows])


class NeedsNoImage(EvoLMMTrainer):
    """A proposer that asks what needs no image, in many ways."""

    def _propose(self, model, rows, prompts):
        rng = random.Random(f"{self.args.seed} {self.state.global_step}")
        return _asked(self, rng.choices(list(FACTS), k=len(rows)))


def _asked(trainer, questions: list[str]):
    """Questions as the proposer would have written them: token ids, texts, and what is read of them."""
    texts = [f"<question>{question}</question>" for question in questions]
    end = trainer._tokenizer.eos_token_id
    ids = [trainer._tokenizer(text)["input_ids"] + [end] for text in texts]
    return ids, texts, [Question(question, True) for question in questions]


_SMALL = {"per_device_train_batch_size": 40, "blind_questions": 4}  # 8 images x 5 answers
# name: what it is, base, trainer, seeds, changes to the demo's settings
ARMS = {
    "collapse": (
        "collapse: KL off, learning rate 1e-3",
        "room",
        EvoLMMTrainer,
        range(5),
        {"beta": 0.0, "learning_rate": 1e-3, "max_steps": 300},
    ),
    "healthy": ("healthy", "room", EvoLMMTrainer, range(5), {"learning_rate": 5e-4, "max_steps": 300}),
    "template": ("habit: one template", "taught", OneTemplate, range(3), {"max_steps": 20}),
    "needs_no_image": ("habit: needs no image", "taught", NeedsNoImage, range(3), {"max_steps": 20}),
    "repeats": ("no penalty", "room", EvoLMMTrainer, range(3), {"max_steps": 120}),
    "repeats_less": (
        "`diversity_weight=1`",
        "room",
        EvoLMMTrainer,
        range(3),
        {"max_steps": 120, "diversity_weight": 1.0},
    ),
    "guesses": ("no penalty", "taught", EvoLMMTrainer, range(3), {"max_steps": 60, "blind_questions": 8}),
    "guesses_less": ("`blind_weight=1`", "taught", EvoLMMTrainer, range(3), {"max_steps": 60, "blind_weight": 1.0}),
}
GUARDED = ("collapse", "healthy", "template", "needs_no_image")
# Steps between two measurements of accuracy, which the guard knows nothing of
MEASURED_EVERY = {"collapse": 10, "healthy": 50}
QUESTIONS = 1000


class Lessons(WarmStartData):
    """The warm start's examples, and among them the facts and the guess, with an image and without."""

    def __init__(self, processor):
        self.processor, self.base, self.prompts = processor, BASES["room"], {}
        self.rng = random.Random(0)
        self.charts = [chart(seed) for seed in WARM_START_SEEDS[:500]]
        self.pixels = [processor.image_processor(c.image(), return_tensors="pt")["pixel_values"] for c in self.charts]

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        rng, examples, pixels = self.rng, [], []
        for _ in range(size):
            index = rng.randrange(len(self.charts))
            prompt, target = sample_example(self.charts[index], self.base, rng)
            with_image, kind = True, rng.random()
            if kind < 0.2:
                asked = GUESS if rng.random() < 0.3 else sample_question(self.charts[index], rng).text
                prompt, target = PROMPTS["proposer"], f"<question>{asked}</question>"
            elif kind < 0.6:
                with_image = kind < 0.4
                asked, answer = rng.choice(list(FACTS.items())) if rng.random() < 0.7 else (GUESS, rng.choice(GUESSES))
                prompt, target = PROMPTS["solver"].format(question=asked), f"<answer>{answer}</answer>"
            ids = self.prompt_ids(prompt) if with_image else self.blind_prompt_ids(prompt)
            examples.append((ids, target))
            if with_image:
                pixels.append(self.pixels[index])
        return self.collated(examples, pixels)

    def blind_prompt_ids(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor.tokenizer(text)["input_ids"]


def teach(output: Path) -> None:
    """The base `room` that has also learned the facts and the guess."""
    model, processor = load_model(HERE / "models" / "room")
    data = Lessons(processor)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    model.train()
    for _ in range(300):
        loss = model(**data.batch(32), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"taught: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(output)
    processor.save_pretrained(output)


class Accuracy(TrainerCallback):
    """Greedy accuracy of the solver now and then, and after the last step."""

    def __init__(self, processor, every: int | None):
        self.processor, self.every = processor, every
        self.rows = labelled_questions(TEST_SEEDS[:QUESTIONS])
        self.scores = []

    def measure(self, step: int) -> None:
        with self.trainer.roles.using("solver"):
            score = evaluate_solver(self.trainer.model, self.processor, self.rows, PROMPTS, samples=1)
        self.scores.append((step, round(score["greedy"], 4)))

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0:
            self.measure(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.scores[-1][0] != state.global_step:
            self.measure(state.global_step)


def run_one(arm: str, seed: int, taught: str) -> dict:
    _, base, trainer_class, _, changes = ARMS[arm]
    model, processor = load_model(taught if base == "taught" else HERE / "models" / base)
    folder = Path(tempfile.mkdtemp(prefix="evolmm-health-"))
    guard = CollapseGuard()
    accuracy = Accuracy(processor, MEASURED_EVERY.get(arm))
    trainer = trainer_class(
        model=model,
        args=demo_config(folder, seed=seed, **{**_SMALL, **changes}),
        train_dataset=load_images(make_images(folder / "images", EVOLVE_SEEDS[:1000]), streaming=False),
        processing_class=processor,
        peft_config=demo_lora(),
        callbacks=[accuracy, *([guard] if arm in GUARDED else [])],
    )
    accuracy.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    with trainer.roles.using("proposer"):
        questions = evaluate_proposer(trainer.model, processor, [chart(s) for s in TEST_SEEDS[:200]], PROMPTS)
    shutil.rmtree(folder)
    alarm = guard.alarm
    return {
        "arm": arm,
        "seed": seed,
        "steps": trainer.state.global_step,
        "alarm": None if alarm is None else {"condition": alarm.condition, "step": alarm.step, "reason": alarm.reason},
        "accuracy": accuracy.scores,
        "questions": questions,
        "guessed": [
            round(fmean(r["question"] == GUESS for r in records if r["step"] == step), 3)
            for step in sorted({r["step"] for r in records})
        ],
        "log": [
            {"step": row["step"], **{name: round(row[name], 4) for name in LOGGED if name in row}}
            for row in trainer.state.log_history
            if "loss" in row or "eval_accuracy_greedy" in row
        ],
        "seconds": round(seconds, 1),
    }


def _run(job: tuple) -> dict:
    return run_one(*job)


def run(processes: int, only: str | None) -> None:
    done = {(row["arm"], row["seed"]) for row in read_results()}
    jobs = [(arm, seed) for arm, (_, _, _, seeds, _) in ARMS.items() for seed in seeds]
    jobs = [job for job in jobs if job not in done and (only is None or re.fullmatch(only, f"{job[0]}/{job[1]}"))]
    DOCS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evolmm-taught-") as taught:
        if any(ARMS[arm][1] == "taught" for arm, _ in jobs):
            torch.set_num_threads(1)
            teach(Path(taught))
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, initializer=_start_worker) as pool, open(RESULTS, "a") as file:
            for i, result in enumerate(pool.imap_unordered(_run, [(*job, taught) for job in jobs])):
                file.write(json.dumps(result) + "\n")
                file.flush()
                alarm = result["alarm"]
                print(
                    f"{i + 1}/{len(jobs)} {result['arm']} {result['seed']}: {result['steps']} steps, "
                    f"{alarm['condition'] if alarm else 'no alarm'}, accuracy {result['accuracy'][-1][1]:.3f} "
                    f"({result['seconds']} s)",
                    flush=True,
                )


def read_results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", help="regular expression for arm/seed")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.processes, arguments.only)


if __name__ == "__main__":
    main()
