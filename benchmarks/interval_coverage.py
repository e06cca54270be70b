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

"""How often the intervals of `evolmm compare` hold the true difference, on simulated answers whose truth is known.

python benchmarks/interval_coverage.py       # writes docs/benchmarks/coverage.json and .png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from bench_report import in_place, table
from scipy.special import ndtr
from tqdm import tqdm

from evolmm_trl.evaluation.compare import compare


PAGE = Path(__file__).parents[1] / "docs/evaluation.md"
RECORD = Path(__file__).parents[1] / "docs/benchmarks/coverage.json"

# A probit model: an answer is right if its model's ability, the ease of its question, how well the model read the image,
# and luck are together above 0. Both models meet the same questions. Standard deviations:
ABILITY = {"a": 0.45, "b": 0.55}
OF_QUESTION, OF_READING, OF_LUCK = 1.0, 0.7, 0.5

CASES = {
    "one run each, an image per question": {"runs": 1},
    "one run each, 100 questions": {"runs": 1, "questions": 100},
    "one run each, four questions on an image": {"runs": 1, "per_image": 4},
    "the same, taken as independent": {"runs": 1, "per_image": 4, "use_images": False},
    "three seeds, equally good": {"runs": 3},
    "three seeds, 0.8 points apart": {"runs": 3, "of_run": 0.03},
    "three seeds, 2.6 points apart": {"runs": 3, "of_run": 0.1},
    "five seeds, 0.8 points apart": {"runs": 5, "of_run": 0.03},
    "five seeds, 2.6 points apart": {"runs": 5, "of_run": 0.1},
    "one of three seeds, 2.6 points apart": {"runs": 3, "of_run": 0.1, "use_runs": 1},
    "pooled: three benchmarks": {"runs": 1, "tasks": 3},
    "pooled: three tasks on the same images": {"runs": 1, "tasks": 3, "same_images": True},
    "pooled: the same, taken as independent": {"runs": 1, "tasks": 3, "same_images": True, "use_images": False},
    "pooled: three tasks on the same images, three seeds": {
        "runs": 3,
        "of_run": 0.03,
        "tasks": 3,
        "same_images": True,
    },
}


def simulate(
    rng: np.random.Generator,
    runs: int,
    questions: int = 400,
    per_image: int = 1,
    of_run: float = 0.0,
    tasks: int = 1,
    same_images: bool = False,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], float]:
    """
    Answers of two models to the same questions, in one or several tasks.

    Args:
        rng (`np.random.Generator`):
            Draws everything.
        runs (`int`):
            Training seeds of each model.
        questions (`int`, *optional*, defaults to `400`):
            How many in each task.
        per_image (`int`, *optional*, defaults to `1`):
            A task's questions on an image.
        of_run (`float`, *optional*, defaults to `0.0`):
            Standard deviation of the ability of a model's runs.
        tasks (`int`, *optional*, defaults to `1`):
            How many.
        same_images (`bool`, *optional*, defaults to `False`):
            Whether all tasks ask the same questions about the same images, each with a prompt of its own.

    Returns:
        `tuple`: by model and task, right (1) or wrong (0), shape `(runs, questions)`; by task, the question's image, shape
        `(questions,)`; and the difference that a model's mean over all questions and runs would show.
    """
    asked = np.arange(tasks * questions)
    if same_images:
        asked %= questions
    images = asked // per_image
    of_reading = OF_READING if per_image > 1 or same_images else 0.0  # of one question on an image, it is luck
    ease = rng.normal(0, OF_QUESTION, len(asked))[asked]
    answers = {}
    for model, ability in ABILITY.items():
        reading = rng.normal(0, of_reading, len(asked))[images]
        luck = rng.normal(0, OF_LUCK, (runs, len(asked))) + rng.normal(0, of_run, (runs, 1))
        answers[model] = _by_task(ability + ease + reading + luck > 0, tasks)
    spread = np.sqrt(OF_QUESTION**2 + of_reading**2 + OF_LUCK**2 + of_run**2)
    return answers, _by_task(images, tasks), float(ndtr(ABILITY["b"] / spread) - ndtr(ABILITY["a"] / spread))


def _by_task(values: np.ndarray, tasks: int) -> dict[str, np.ndarray]:
    return {f"task {index}": part for index, part in enumerate(np.split(values, tasks, axis=-1))}


def coverage(
    simulations: int, *, resamples: int = 1_000, use_images: bool = True, use_runs: int | None = None, **case
) -> tuple[float, float]:
    """
    The share of simulations whose interval holds the true difference, and the mean width of the intervals. Of several
    tasks, it is that of their mean.

    Args:
        simulations (`int`):
            How many.
        resamples (`int`, *optional*, defaults to `1000`):
            Of the bootstrap.
        use_images (`bool`, *optional*, defaults to `True`), use_runs (`int`, *optional*):
            Whether the comparison knows the images, and how many runs it is given; by default all.
        **case:
            For [`simulate`].
    """
    rng = np.random.default_rng(0)
    held, width = 0, 0.0
    for seed in range(simulations):
        answers, images, truth = simulate(rng, **case)
        a, b = ({task: scores[:use_runs] for task, scores in answers[model].items()} for model in "ab")
        row = compare(a, b, images if use_images else None, resamples=resamples, seed=seed)[-1]
        held += row.low <= truth <= row.high
        width += row.high - row.low
    return held / simulations, width / simulations


def plot(results: dict[str, dict], simulations: int, path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(93, 97, color="C2", alpha=0.2, label="93 to 97 %")
    axes.axvline(95, color="0.4", linewidth=1)
    shares = np.array([result["coverage"] for result in results.values()])
    errors = 196 * np.sqrt(shares * (1 - shares) / simulations)
    places = np.arange(len(results))
    axes.errorbar(100 * shares, places, xerr=errors, fmt="o", capsize=3)
    axes.set_yticks(places, [f"{name} ({100 * results[name]['width']:.1f} points wide)" for name in results])
    axes.invert_yaxis()
    axes.set_xlabel(f"% of {simulations:,} intervals that hold the true difference")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def written(page: str, record: dict) -> str:
    """The page with what was measured in it."""
    rows = [
        [name, f"{100 * result['coverage']:.1f} %", f"{100 * result['width']:.1f} points"]
        for name, result in record["cases"].items()
    ]
    return in_place(page, "coverage", table(["runs and questions", "hold the true difference", "mean width"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1_000)
    arguments = parser.parse_args()
    results = {}
    for name, case in tqdm(CASES.items()):
        share, width = coverage(arguments.simulations, **case)
        results[name] = {"coverage": share, "width": width, **case}
    record = {"simulations": arguments.simulations, "cases": results}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(results, arguments.simulations, RECORD.with_suffix(".png"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
