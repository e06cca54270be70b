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
Does self-evolution work on the demo models, and what of it is due to what?

    python examples/demo/experiments.py run            # trains every arm on every base, skips what is done
    python examples/demo/experiments.py report         # writes the tables from the results

Every run trains on the same unlabelled charts for the same number of rollouts and is scored on the same labelled
questions. Results go to `docs/experiments/results.jsonl`, one line per run with the score of every question.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from charts import EVOLVE_SEEDS, TEST_SEEDS, chart, labelled_questions, make_images
from demo import HERE, PROMPTS, demo_config, demo_lora, load_model
from evaluate import evaluate_proposer, evaluate_solver
from scipy import stats
from transformers import PrinterCallback

from evolmm_trl import EvoLMMTrainer, load_images


DOCS = HERE.parent.parent / "docs" / "experiments"
RESULTS = DOCS / "results.jsonl"
README = HERE.parent.parent / "README.md"
BASES = ("room", "narrow", "noisy")
SEEDS = (0, 1, 2, 3, 4)
TEMPERATURES = (0.3, 0.5, 0.7, 1.0)
PER_QUESTION = ("greedy", "sampled", "maj5", "maj20")
MEANS = ("agreement", "entropy", "answer_tokens", "unreadable")


class RandomReward(EvoLMMTrainer):
    """Control: the continuous rewards of a rollout, dealt out at random."""

    def _rewards(self, questions, answers, votes):
        solver, proposer = super()._rewards(questions, answers, votes)
        generator = random.Random(f"{self.args.seed} {self.state.global_step}")
        flat = [reward for group in solver for reward in group]
        generator.shuffle(flat)
        generator.shuffle(proposer)
        n = self.args.num_generations
        return [flat[i : i + n] for i in range(0, len(flat), n)], proposer


class NoPixels(EvoLMMTrainer):
    """Control: rollouts see the image, the policy gradient and its reference do not."""

    def _collate(self, samples, counts, shared):
        batch = super()._collate(samples, counts, shared=False)
        batch["model_inputs"] = _without_image(batch["model_inputs"])
        return batch

    def _check_first_batch(self, samples, counts):
        pass


class FineTuning(EvoLMMTrainer):
    """Plain fine-tuning on the answers that agree with a majority above 0.6, at equal rollouts."""

    def _rewards(self, questions, answers, votes):
        _, proposer = super()._rewards(questions, answers, votes)
        chosen = [[float(v.agreement > 0.6 and a is not None and a == v.majority) for a in v.answers] for v in votes]
        return chosen, proposer

    def _advantages(self, role, groups, trained):
        return groups

    def _roll_out(self, rows):
        return [sample for sample in super()._roll_out(rows) if sample.advantage]


def _without_image(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")}


# name: what it is, trainer, changes to the demo's settings
ARMS = {
    "continuous": ("continuous reward (the demo's settings)", EvoLMMTrainer, {}),
    "discrete": ("discrete reward", EvoLMMTrainer, {"reward": "discrete"}),
    "frozen": ("continuous, proposer frozen", EvoLMMTrainer, {"train_proposer": False}),
    "fine_tuning": (
        "fine-tuning on confident majorities",
        FineTuning,
        {"train_proposer": False, "beta": 0.0, "proposer_beta": None},
    ),
    "random": ("random reward (control)", RandomReward, {}),
    "no_pixels": ("no pixels in the update (control)", NoPixels, {}),
}
CONTROLS = ("random", "no_pixels")
# Settings compared with the demo's, on fewer seeds
SETTINGS = {
    "group": ("baseline per group", EvoLMMTrainer, {"baseline": "group"}),
    "sequence_mean": ("log-prob meaned per completion (loss_type grpo)", EvoLMMTrainer, {"loss_type": "grpo"}),
    "low_floor": ("beta may fall to 1e-8", EvoLMMTrainer, {"beta_min": 1e-8}),
    "tight_kl": ("KL target 0.02, beta floor 0.1", EvoLMMTrainer, {"kl_target": 0.02, "beta": 0.1}),
    "more_votes": ("16 votes, 5 trained on", EvoLMMTrainer, {"extra_votes": 11}),
    "band": ("only groups with agreement 0.3 to 0.8", EvoLMMTrainer, {"agreement_band": (0.3, 0.8)}),
    "shared": ("one adapter for both roles", EvoLMMTrainer, {"adapters": "shared"}),
    "no_kl": ("no KL penalty", EvoLMMTrainer, {"beta": 0.0}),
    "cool": ("rollouts at temperature 0.5", EvoLMMTrainer, {"temperature": 0.5}),
    "no_length": ("no penalty on words before the answer", EvoLMMTrainer, {"length_weight": 0.0}),
}
SETTINGS_ON = {
    "narrow": ("more_votes", "cool", "group", "no_length"),
    "noisy": ("cool", "more_votes"),
    "room": tuple(SETTINGS),
}
SETTINGS_SEEDS = (0, 1, 2)


def run_base(base: str) -> dict:
    """The untrained base: at several temperatures, and when it may not open with the bare answer."""
    model, processor = load_model(HERE / "models" / base)
    rows = labelled_questions(TEST_SEEDS)
    scores = {str(t): evaluate_solver(model, processor, rows, PROMPTS, temperature=t) for t in TEMPERATURES}
    scores["forced"] = evaluate_solver(model, processor, rows, PROMPTS, forbid_first="<answer>")
    questions = evaluate_proposer(model, processor, [chart(seed) for seed in TEST_SEEDS], PROMPTS)
    return {"base": base, "arm": "base", "seed": None, "scores": _compact(scores), "questions": questions}


def run_arm(base: str, arm: str, seed: int) -> dict:
    """One training run and its scores."""
    _, trainer_class, changes = {**ARMS, **SETTINGS}[arm]
    model, processor = load_model(HERE / "models" / base)
    folder = Path(tempfile.mkdtemp(prefix="evolmm-experiment-"))
    if not changes.get("train_proposer", True):
        changes = {**changes, "max_steps": 40}  # the rollouts that 48 steps of both roles make
    images = load_images(make_images(folder / "images", EVOLVE_SEEDS[:1000]), streaming=False)
    trainer = trainer_class(
        model=model,
        args=demo_config(folder, seed=seed, write_report=False, report_images=0, **changes),
        train_dataset=images,
        processing_class=processor,
        peft_config=demo_lora(),
    )
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    with trainer.roles.using("solver"):
        scores = {"1.0": evaluate_solver(trainer.model, processor, labelled_questions(TEST_SEEDS), PROMPTS)}
    with trainer.roles.using("proposer"):
        questions = evaluate_proposer(trainer.model, processor, [chart(seed) for seed in TEST_SEEDS], PROMPTS)
    shutil.rmtree(folder)
    steps = [row for row in trainer.state.log_history if "agreement" in row]
    curves = {
        name: [round(row[name], 4) for row in steps[::5] if name in row]
        for name in ("agreement", "answer_entropy", "solver/reward", "proposer/reward", "solver/kl", "solver/beta")
    }
    return {
        "base": base,
        "arm": arm,
        "seed": seed,
        "scores": _compact(scores),
        "questions": questions,
        "train_seconds": round(seconds, 1),
        "curves": curves,
    }


def _compact(scores: dict[str, dict]) -> dict[str, dict]:
    """Scores with those of every question as one letter each: a = 0, b = 1 right sample, ..., u = 20."""
    compact = {}
    for name, score in scores.items():
        letters = {
            key: "".join(
                chr(ord("a") + round(v * (20 if key == "sampled" else 1))) for v in score["per_question"][key]
            )
            for key in PER_QUESTION
        }
        compact[name] = {**{key: round(score[key], 4) for key in (*PER_QUESTION, *MEANS)}, "per_question": letters}
    return compact


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.environ["CI"] = "1"  # no telemetry
    os.environ["HF_HUB_OFFLINE"] = "1"


def _run(job: tuple) -> dict:
    base, arm, seed = job
    return run_base(base) if arm == "base" else run_arm(base, arm, seed)


def run(processes: int, only: str | None) -> None:
    done = {(row["base"], row["arm"], row["seed"]) for row in read_results()}
    jobs = [(base, "base", None) for base in BASES]
    jobs += [(base, arm, seed) for seed in SEEDS for base in BASES for arm in ARMS]
    jobs += [(base, setting, seed) for seed in SETTINGS_SEEDS for base in SETTINGS_ON for setting in SETTINGS_ON[base]]
    jobs = [
        job for job in jobs if job not in done and (only is None or re.fullmatch(only, f"{job[0]}/{job[1]}/{job[2]}"))
    ]
    DOCS.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=_start_worker) as pool, open(RESULTS, "a") as file:
        for i, result in enumerate(pool.imap_unordered(_run, jobs)):
            file.write(json.dumps(result) + "\n")
            file.flush()
            score = result["scores"]["1.0"]
            print(
                f"{i + 1}/{len(jobs)} {result['base']} {result['arm']} {result['seed']}: greedy {score['greedy']:.3f} "
                f"sampled {score['sampled']:.3f} majority of 20 {score['maj20']:.3f} ({result.get('train_seconds')} s)",
                flush=True,
            )


def read_results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


# ----------------------------------------------------------------------------------------------------------------
# Tables


def _questions(result: dict, name: str, temperature: str = "1.0") -> np.ndarray:
    """Scores of every question, in [0, 1]."""
    letters = result["scores"][temperature]["per_question"][name]
    return (np.frombuffer(letters.encode(), dtype=np.uint8) - ord("a")) / (20 if name == "sampled" else 1)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """
    Mean of paired differences, of shape (seeds, questions), and the half width of its 95 % interval over both: a two-way
    analysis of variance without replication. The seeds' means vary with the seeds and with the luck of single answers,
    which takes Student's t; the questions' means vary with the questions beside that, which are many. Seeds and questions
    are independent, so that the two half widths add up in squares.
    """
    seeds, questions = differences.shape
    mean = differences.mean()
    if seeds < 2:
        return float(mean), float("nan")  # one seed says nothing of the others
    by_seed, by_question = differences.mean(1), differences.mean(0)
    luck = differences - by_seed[:, None] - by_question + mean
    of_luck = (luck**2).sum() / ((seeds - 1) * (questions - 1)) / differences.size
    of_questions = max(by_question.var(ddof=1) / questions - of_luck, 0)
    of_seeds = by_seed.var(ddof=1) / seeds
    half = (stats.t.ppf(0.975, seeds - 1) ** 2 * of_seeds + stats.norm.ppf(0.975) ** 2 * of_questions) ** 0.5
    return float(mean), float(half)


def _points(mean: float, half: float) -> str:
    return f"{100 * mean:+.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")


def _runs(results: list[dict], base: str, arm: str) -> list[dict]:
    return sorted((r for r in results if r["base"] == base and r["arm"] == arm), key=lambda r: r["seed"] or 0)


def _arm_rows(results: list[dict], base: str, arms: dict) -> list[str]:
    untrained = _runs(results, base, "base")[0]
    rows = []
    for arm, (title, _, _) in arms.items():
        runs = _runs(results, base, arm)
        if not runs:
            continue
        cells = [title, str(len(runs))]
        for name in PER_QUESTION:
            gains = np.stack([_questions(r, name) - _questions(untrained, name) for r in runs])
            cells.append(f"{np.mean([_questions(r, name).mean() for r in runs]):.3f} ({_points(*interval(gains))})")
        for name in ("agreement", "entropy", "answer_tokens"):
            cells.append(f"{np.mean([r['scores']['1.0'][name] for r in runs]):.2f}")
        cells.append(f"{np.mean([r['questions']['grounded'] for r in runs]):.2f}")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


_HEADER = (
    "| run | seeds | greedy | sampled, T=1 | majority of 5 | majority of 20 | agreement | entropy | answer tokens | grounded questions |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def _base_rows(results: list[dict], base: str) -> list[str]:
    untrained = _runs(results, base, "base")[0]
    rows = []
    for temperature, score in untrained["scores"].items():
        title = "forced to write its steps, T=1" if temperature == "forced" else f"untrained, T={temperature}"
        numbers = [f"{score[name]:.3f}" for name in PER_QUESTION]
        numbers += [f"{score[name]:.2f}" for name in ("agreement", "entropy", "answer_tokens")]
        rows.append(f"| {title} | - | {' | '.join(numbers)} | {untrained['questions']['grounded']:.2f} |")
    return rows


def _comparisons(results: list[dict], base: str, arms: dict) -> list[str]:
    """Continuous against the other arms, paired by seed and question."""
    rows = [
        "Continuous minus the other, in points, paired by seed and question:",
        "",
        "| other | greedy | sampled, T=1 | majority of 20 |",
        "|---|---|---|---|",
    ]
    reference = {r["seed"]: r for r in _runs(results, base, "continuous")}
    for arm, (title, _, _) in arms.items():
        runs = [r for r in _runs(results, base, arm) if r["seed"] in reference]
        if arm == "continuous" or not runs:
            continue
        cells = [title]
        for name in ("greedy", "sampled", "maj20"):
            pairs = np.stack([_questions(reference[r["seed"]], name) - _questions(r, name) for r in runs])
            cells.append(_points(*interval(pairs)))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _sampled_against_best_temperature(results: list[dict], base: str) -> str:
    untrained = _runs(results, base, "base")[0]
    best = max((str(t) for t in TEMPERATURES), key=lambda t: untrained["scores"][t]["sampled"])
    gains = np.stack(
        [_questions(r, "sampled") - _questions(untrained, "sampled", best) for r in _runs(results, base, "continuous")]
    )
    return (
        f"{_points(*interval(gains))} points (the base's best is T={best}, {untrained['scores'][best]['sampled']:.3f})"
    )


def _room_closed(results: list[dict], base: str) -> str:
    untrained = _runs(results, base, "base")[0]
    room = (_questions(untrained, "maj20") - _questions(untrained, "greedy")).mean()
    gain = np.mean([_questions(r, "greedy").mean() for r in _runs(results, base, "continuous")])
    gain -= _questions(untrained, "greedy").mean()
    share = f", training moved greedy by {100 * gain:+.1f}" + (
        f", {100 * gain / room:.0f} % of it" if room > 0 else ""
    )
    return f"{100 * room:+.1f} points between greedy and the majority of 20 before training{share}"


def report() -> None:
    """Writes `docs/experiments/tables.md` and the README's table."""
    results = read_results()
    lines = [
        "<!-- Written by `python examples/demo/experiments.py report`; do not edit. -->",
        "# Tables",
        "",
        f"{len(TEST_SEEDS):,} held-out questions, one per chart; every run is scored on the same ones. A number in "
        "brackets is the change from the untrained base in points, paired by question, with the half width of its 95 % "
        "interval over seeds and questions.",
    ]
    for base in BASES:
        if not _runs(results, base, "base"):
            continue
        lines += ["", f"## Base `{base}`", "", _HEADER, *_base_rows(results, base), *_arm_rows(results, base, ARMS)]
        if not _runs(results, base, "continuous"):
            continue
        lines += ["", f"Room: {_room_closed(results, base)}.", ""]
        lines += [
            f"Sampled accuracy of the continuous runs against the untrained base at its best temperature: "
            f"{_sampled_against_best_temperature(results, base)}.",
            "",
            *_comparisons(results, base, ARMS),
        ]
    for base in BASES:
        settings = _arm_rows(results, base, SETTINGS)
        if settings:
            demo = _arm_rows(results, base, {"continuous": ARMS["continuous"]})
            lines += ["", f"## Settings, on base `{base}`", "", _HEADER, *demo, *settings]
            lines += ["", *_comparisons(results, base, SETTINGS)]
    (DOCS / "tables.md").write_text("\n".join(lines) + "\n")
    _write_readme(results)


def _write_readme(results: list[dict]) -> None:
    rows = ["| greedy accuracy, 2,000 questions | " + " | ".join(f"base `{base}`" for base in BASES) + " |"]
    rows.append("|---" * (len(BASES) + 1) + "|")
    cells = [_runs(results, base, "base")[0]["scores"]["1.0"] for base in BASES]
    rows.append("| untrained | " + " | ".join(f"{score['greedy']:.3f}" for score in cells) + " |")
    rows.append("| its own majority of 20 | " + " | ".join(f"{score['maj20']:.3f}" for score in cells) + " |")
    forced = [_runs(results, base, "base")[0]["scores"]["forced"]["greedy"] for base in BASES]
    rows.append("| told to write its steps | " + " | ".join(f"{score:.3f}" for score in forced) + " |")
    for arm, (title, _, _) in ARMS.items():
        cells = []
        for base in BASES:
            untrained = _runs(results, base, "base")[0]
            runs = _runs(results, base, arm)
            gains = [_questions(r, "greedy") - _questions(untrained, "greedy") for r in runs]
            cells.append(_points(*interval(np.stack(gains))) if runs else "")
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    README.write_text(in_place(README.read_text(), "experiments", rows))


def in_place(page: str, name: str, lines: list[str]) -> str:
    """A Markdown page with these lines between the comments of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin)
    return before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]


def command_line(doc: str, each: str, run, report) -> None:
    """The commands `run` and `report` of a script of experiments, whose `--only` matches names such as `each`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[1])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", help=f"regular expression for {each}")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.processes, arguments.only)
    report()


if __name__ == "__main__":
    command_line(__doc__, "base/arm/seed", run, report)
