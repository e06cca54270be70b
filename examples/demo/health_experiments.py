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

import inspect
import json
import multiprocessing
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from charts import (
    COLOURS,
    EVOLVE_SEEDS,
    TEST_SEEDS,
    VAL_SEEDS,
    WARM_START_SEEDS,
    chart,
    labelled_questions,
    make_images,
    sample_question,
)
from datasets import Dataset
from demo import HERE, PROMPTS, demo_config, demo_lora, load_model
from evaluate import evaluate_proposer, evaluate_solver
from experiments import DOCS, _start_worker, command_line, in_place
from make_demo_model import BASES, WarmStartData, sample_example
from transformers import PrinterCallback, TrainerCallback

from evolmm_trl import CollapseGuard, EvoLMMTrainer, load_images
from evolmm_trl.health import cluster_shares
from evolmm_trl.health.guard import Alarm
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
    "unreadable",
    "malformed_questions",
    "distinct_questions",
    "novel_questions",
    "question_self_bleu",
    "question_cluster_share",
    "blind_solved",
    "solver/kl",
    "proposer/kl",
    "solver/grad_norm",
    "answer_length_drift",
    "eval_accuracy_greedy",
    "eval_accuracy_greedy_stderr",
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


# 4 images x 5 answers, half of the questions also without the image
_SMALL = {"per_device_train_batch_size": 20, "blind_questions": 2, "max_completion_length": 24}
# The demo's 16 images x 5 answers
_HABIT = {"max_steps": 20, "per_device_train_batch_size": 80, "blind_questions": 8}
# name: what it is, base, trainer, seeds, changes to the demo's settings
ARMS = {
    "collapse_on": (
        "collapse: KL off, learning rate 1e-3, not stopped",
        "room",
        EvoLMMTrainer,
        range(20, 25),
        {"beta": 0.0, "learning_rate": 1e-3, "max_steps": 400},
    ),
    "collapse_agreed": (
        "collapse on base `noisy`, with 500 labelled questions, not stopped",
        "noisy",
        EvoLMMTrainer,
        range(20, 25),
        {
            "beta": 0.0,
            "learning_rate": 1e-3,
            "max_steps": 120,
            "eval_strategy": "steps",
            "eval_steps": 10,
            "per_device_eval_batch_size": 100,
            "num_generations_eval": 2,
        },
    ),
    "healthy": (
        "healthy",
        "room",
        EvoLMMTrainer,
        (*range(5), *range(20, 25)),
        {"learning_rate": 5e-4, "max_steps": 300},
    ),
    "template": ("habit: one template", "room", OneTemplate, range(3), _HABIT),
    "needs_no_image": ("habit: needs no image", "taught", NeedsNoImage, range(3), _HABIT),
    "repeats": ("no penalty", "room", EvoLMMTrainer, range(3), {"max_steps": 120}),
    "repeats_less": (
        "`diversity_weight=1`",
        "room",
        EvoLMMTrainer,
        range(3),
        {"max_steps": 120, "diversity_weight": 1.0},
    ),
    "guesses": ("no penalty", "taught", EvoLMMTrainer, range(3), {"max_steps": 60}),
    "guesses_less": (
        "`blind_weight=1`",
        "taught",
        EvoLMMTrainer,
        range(3),
        {"max_steps": 60, "blind_weight": 1.0, "blind_questions": 0},
    ),
}
GUARDED = ("template", "needs_no_image")
# Those whose runs are to be left alone if they improve
SOUND = ("healthy", "repeats", "repeats_less", "guesses", "guesses_less")
# Steps between two measurements of accuracy, which the guard knows nothing of
MEASURED_EVERY = {"collapse_on": 10, "collapse_agreed": 10, "healthy": 100}
QUESTIONS = {"collapse_on": 500}  # of the others 300
LABELLED = 500  # questions that the guard of `collapse_agreed` is given
# Points of accuracy, a fall by which a collapse is to be seen before
FALL = 3


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
    for _ in range(200):
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

    def __init__(self, processor, every: int | None, questions: int):
        self.processor, self.every = processor, every
        self.rows = labelled_questions(TEST_SEEDS[:questions])
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


def run_one(arm: str, seed: int, images: Path, taught: Path) -> dict:
    _, base, trainer_class, _, changes = ARMS[arm]
    model, processor = load_model(taught if base == "taught" else HERE / "models" / base)
    folder = Path(tempfile.mkdtemp(prefix="evolmm-health-"))
    guard = CollapseGuard()
    accuracy = Accuracy(processor, MEASURED_EVERY.get(arm), QUESTIONS.get(arm, 300))
    labelled = None
    if arm == "collapse_agreed":
        labelled = Dataset.from_list(labelled_questions(VAL_SEEDS[:LABELLED]))
    trainer = trainer_class(
        model=model,
        args=demo_config(folder, seed=seed, **{**_SMALL, **changes}),
        train_dataset=load_images(images, streaming=False),
        eval_dataset=labelled,
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
    steps = sorted({record["step"] for record in records})
    return {
        "arm": arm,
        "seed": seed,
        "steps": trainer.state.global_step,
        "alarm": None if alarm is None else {"condition": alarm.condition, "step": alarm.step, "reason": alarm.reason},
        "accuracy": accuracy.scores,
        "questions": questions,
        "clusters": [_mean_cluster([r["question"] for r in records if r["step"] == step]) for step in steps],
        "guessed": [round(fmean(r["question"] == GUESS for r in records if r["step"] == step), 3) for step in steps],
        "log": [
            {"step": row["step"], **{name: round(row[name], 4) for name in LOGGED if name in row}}
            for row in trainer.state.log_history
            if "loss" in row or "eval_accuracy_greedy" in row
        ],
        "seconds": round(seconds, 1),
    }


def _mean_cluster(questions: list[str]) -> float:
    return round(fmean(cluster_shares(questions)), 3)


def _run(job: tuple) -> dict:
    return run_one(*job)


def run(processes: int, only: str | None) -> None:
    done = {(row["arm"], row["seed"]) for row in read_results() if is_whole(row)}
    jobs = [(arm, seed) for arm, (_, _, _, seeds, _) in ARMS.items() for seed in seeds]
    jobs = [job for job in jobs if job not in done and (only is None or re.fullmatch(only, f"{job[0]}/{job[1]}"))]
    DOCS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evolmm-health-") as folder:
        torch.set_num_threads(1)
        images, taught = make_images(Path(folder) / "images", EVOLVE_SEEDS[:1000]), Path(folder) / "taught"
        if any(ARMS[arm][1] == "taught" for arm, _ in jobs):
            teach(taught)
        # Forked, which spares every process the imports; one thread each
        context = multiprocessing.get_context("fork")
        with context.Pool(processes, initializer=_start_worker) as pool, open(RESULTS, "a") as file:
            for i, result in enumerate(pool.imap_unordered(_run, [(*job, images, taught) for job in jobs])):
                file.write(json.dumps(result) + "\n")
                file.flush()
                alarm = result["alarm"]
                print(
                    f"{i + 1}/{len(jobs)} {result['arm']} {result['seed']}: {result['steps']} steps, "
                    f"{alarm['condition'] if alarm else 'no alarm'}, accuracy {result['accuracy'][-1][1]:.3f} "
                    f"({result['seconds']} s)",
                    flush=True,
                )


def is_whole(result: dict) -> bool:
    """Whether a run was ended by the guard or came to its last step. One that was interrupted is run again."""
    return result["alarm"] is not None or result["steps"] == ARMS[result["arm"]][-1]["max_steps"]


def read_results() -> list[dict]:
    """The last result of each run."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return list({(row["arm"], row["seed"]): row for row in rows}.values())


# ----------------------------------------------------------------------------------------------------------------
# The page


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _last(result: dict, name: str, rows: int = 20) -> float:
    """Mean of a metric over the run's last rows that have it."""
    return fmean([row[name] for row in result["log"] if name in row][-rows:])


def first_alarm(result: dict) -> Alarm | None:
    """Where the guard with its default thresholds ends a run, by its log."""
    return CollapseGuard().first_alarm(result["log"])


def _of(results: list[dict], arm: str) -> list[dict]:
    return sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"])


def _improved(results: list[dict]) -> list[dict]:
    """The runs of the arms that are to be left alone and that gained accuracy."""
    runs = [result for arm in SOUND for result in _of(results, arm)]
    return [r for r in runs if r["accuracy"][-1][1] > r["accuracy"][0][1]]


def _name(arm: str) -> str:
    what, base = ARMS[arm][:2]
    if arm not in SOUND or arm == "healthy":
        return what
    return f"{'base `room`' if base == 'room' else 'taught base'}, {what}"


def _listed(values) -> str:
    return ", ".join(map(str, values)) or "-"


def _conditions(alarms: list[Alarm]) -> str:
    return _listed(f"{name} ({count})" for name, count in sorted(Counter(a.condition for a in alarms).items()))


@dataclass(frozen=True)
class _Collapse:
    """Accuracy of a run that went on, beside the guard's first alarm on its log."""

    alarm: Alarm | None
    start: float
    best: float  # measured up to the alarm
    then: float  # the last measured up to the alarm
    end: float

    @property
    def fallen(self) -> float:
        """Points below the best at the alarm. What is measured is a multiple of 0.2 points."""
        return round(100 * (self.best - self.then), 1)

    @property
    def in_time(self) -> bool:
        return self.alarm is not None and self.fallen < FALL


def _collapse(result: dict) -> _Collapse:
    alarm, scores = first_alarm(result), result["accuracy"]
    before = [score for step, score in scores if alarm is None or step <= alarm.step]
    return _Collapse(alarm, scores[0][1], max(before), before[-1], scores[-1][1])


def _collapse_rows(results: list[dict]) -> list[str]:
    rows = [
        "| base | seed | first alarm at step | condition | accuracy at the start | best up to the alarm | at the alarm | alarm minus "
        "best, points | at the end of the run, which went on | end minus best, points |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in (*_of(results, "collapse_on"), *_of(results, "collapse_agreed")):
        run = _collapse(result)
        step, condition = (run.alarm.step, run.alarm.condition) if run.alarm else ("-", "none")
        rows.append(
            f"| `{ARMS[result['arm']][1]}` | {result['seed']} | {step} | {condition} | {run.start:.3f} | {run.best:.3f} | "
            f"{run.then:.3f} | {_points(run.then - run.best)} | {run.end:.3f} | {_points(run.end - run.best)} |"
        )
    return rows


def _guard_rows(results: list[dict]) -> list[str]:
    rows = [
        "| run | seed | steps | first alarm at step | condition | accuracy at the start | best | at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in (*SOUND, "template", "needs_no_image"):
        for result in _of(results, arm):
            scores, alarm = [score for _, score in result["accuracy"]], first_alarm(result)
            step, condition = (alarm.step, alarm.condition) if alarm else ("-", "none")
            rows.append(
                f"| {_name(arm)} | {result['seed']} | {result['steps']} | {step} | {condition} | {scores[0]:.3f} | "
                f"{max(scores):.3f} | {scores[-1]:.3f} |"
            )
    return rows


def _collapse_lines(what: str, runs: list[_Collapse]) -> list[str]:
    alarms = [run.alarm for run in runs if run.alarm]
    ruined = [run for run in runs if run.best - run.end >= FALL / 100]
    worst = max((run.fallen for run in runs if run.alarm), default=0.0)
    below = sum(run.alarm is not None and run.then < run.start for run in runs)
    return [
        f"- **{what}**: an alarm in {len(alarms)} of {len(runs)} runs, at step {_listed(a.step for a in alarms)}, by "
        f"{_conditions(alarms)}. It comes before accuracy is {FALL} points below the best measured up to it in "
        f"{sum(run.in_time for run in runs)} of {len(runs)} runs, at most {worst:.1f} points below it, and below the start's in "
        f"{below}. The runs go on, and {len(ruined)} of {len(runs)} end {FALL} points or more below that best: by "
        f"{_listed(_points(run.end - run.best) for run in runs)} points.",
    ]


def _guard_summary(results: list[dict]) -> list[str]:
    lines = []
    for arm, what in (
        ("collapse_on", "Collapse on base `room`, without a labelled question"),
        ("collapse_agreed", f"Collapse on base `noisy`, with {LABELLED} labelled questions"),
    ):
        runs = [_collapse(result) for result in _of(results, arm)]
        if runs:
            lines += _collapse_lines(what, runs)
    improved = _improved(results)
    ended = [(result, alarm) for result in improved if (alarm := first_alarm(result))]
    if improved:
        what = _listed(f"{_name(r['arm'])}, seed {r['seed']}: {a.condition} at step {a.step}" for r, a in ended)
        lines.append(
            f"- **Runs that gain accuracy**: the guard ends {len(ended)} of {len(improved)}{f' ({what})' if ended else ''}."
        )
    runs = _of(results, "healthy")
    if runs:
        lines.append(f"- healthy: the guard ends {sum(first_alarm(r) is not None for r in runs)} of {len(runs)} runs.")
    for arm in ("template", "needs_no_image"):
        runs = _of(results, arm)
        if runs:
            alarms = [alarm for r in runs if (alarm := first_alarm(r))]
            lines.append(
                f"- {ARMS[arm][0]}: flagged in {len(alarms)} of {len(runs)} runs, at step {_listed(a.step for a in alarms)}, by "
                f"{_listed(sorted({a.condition for a in alarms}))}."
            )
    return lines


def _extremes(results: list[dict], name: str, window: int) -> tuple[float, float]:
    """Smallest and largest median over a window, of all runs: what the guard judges."""
    medians = []
    for result in results:
        values = [row[name] for row in result["log"] if name in row]
        medians += [median(values[i : i + window]) for i in range(len(values) - window + 1)]
    return min(medians), max(medians)


def _extreme_rows(results: list[dict]) -> list[str]:
    options = {
        "answer_entropy": "min_entropy",
        "distinct_questions": "min_distinct_questions",
        "blind_solved": "max_blind_solved",
        "solver/kl": "max_kl",
        "proposer/kl": "max_kl",
    }
    defaults = {name: p.default for name, p in inspect.signature(CollapseGuard).parameters.items()}
    rows = [f"| metric, median of {defaults['window']} values | smallest | largest | threshold |", "|---|---|---|---|"]
    passed = []
    for name, option in options.items():
        low, high = _extremes(results, name, defaults["window"])
        rows.append(f"| `{name}` | {low:.3f} | {high:.3f} | `{option}={defaults[option]:g}` |")
        if high > defaults[option] if option.startswith("max") else low < defaults[option]:
            passed.append(f"`{name}`")
    return [
        *rows,
        "",
        f"Single medians of these runs are beyond the threshold of {len(passed)} of {len(options)} metrics: {_listed(passed)}. An alarm "
        f"takes {defaults['patience']} in a row.",
    ]


def _ablation_rows(results: list[dict]) -> list[str]:
    rows = [
        "| run | seeds | distinct questions | Self-BLEU | questions of the cluster | blind solved | `Pick a number.` | accuracy, points gained | grounded questions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ("repeats", "repeats_less", "guesses", "guesses_less"):
        runs = _of(results, arm)
        if not runs:
            continue

        def over(values: list[float], digits: int = 2) -> str:
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{fmean(values):.{digits}f}{spread}"

        clusters = [fmean(r["clusters"][-20:]) for r in runs]
        gained = [100 * (r["accuracy"][-1][1] - r["accuracy"][0][1]) for r in runs]
        rows.append(
            f"| {_name(arm)} | {len(runs)} | {over([_last(r, 'distinct_questions') for r in runs])} | "
            f"{over([_last(r, 'question_self_bleu') for r in runs])} | {over(clusters)} | "
            f"{over([_last(r, 'blind_solved') for r in runs])} | {over([fmean(r['guessed'][-20:]) for r in runs])} | "
            f"{over(gained, 1)} | {over([r['questions']['grounded'] for r in runs])} |"
        )
    return rows


def report() -> None:
    """Writes the tables of `docs/experiments/health.md`."""
    results = read_results()
    page = PAGE.read_text()
    page = in_place(page, "summary", _guard_summary(results))
    page = in_place(page, "collapse", _collapse_rows(results))
    page = in_place(page, "guard", _guard_rows(results))
    if improved := _improved(results):
        page = in_place(page, "extremes", _extreme_rows(improved))
    page = in_place(page, "ablation", _ablation_rows(results))
    PAGE.write_text(page)


if __name__ == "__main__":
    command_line(__doc__, "arm/seed", run, report)
