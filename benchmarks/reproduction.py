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

"""Writes the tables of `docs/reproduce.md`: what differences are to be expected, how large a difference must be to be seen,
and how long it all takes. Everything is calculated and nothing is measured.

    .venv/bin/python benchmarks/reproduction.py
"""

import math
from dataclasses import dataclass
from pathlib import Path

from bench_report import in_place, table


PAGE = Path(__file__).parent.parent / "docs" / "reproduce.md"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its task in lmms-eval, questions, longest answer there, and accuracies in percent from two papers."""

    name: str
    task: str
    questions: int
    answer_tokens: int
    base: float | None = None
    evolmm: float | None = None
    other_gain: float | None = None

    @property
    def gain(self) -> float | None:
        return None if self.base is None else self.evolmm - self.base


_LONG = 400  # tokens of a worked answer, where the task allows 16,384: assumed
BENCHMARKS = (
    Benchmark("ChartQA", "chartqa", 2_500, 16, 84.00, 86.70, 1.7),
    Benchmark("MathVista", "mathvista_testmini", 1_000, _LONG, 68.46, 70.52, 1.3),
    Benchmark("MathVision", "mathvision_testmini", 304, _LONG, 23.91, 24.81),
    Benchmark("MathVerse", "mathverse_testmini", 3_940, _LONG, 43.78, 44.88, 0.8),
    Benchmark("InfoVQA", "infovqa_val", 2_801, 32, 80.44, 81.06),
    Benchmark("AI2D", "ai2d", 3_088, 16, 82.61, 83.41, 0.8),
    Benchmark("ScienceQA", "scienceqa_img", 2_017, 16, 88.30, 89.50, 0.3),
    Benchmark("MMMU", "mmmu_val", 900, 128, 51.11, 52.01, 0.7),
    Benchmark("POPE", "pope", 9_000, 128),
    Benchmark("MM-Vet", "mmvet", 218, _LONG),
)
CHANGED = (0.05, 0.10)  # share of the questions that only one of the two models answers right
_QUANTILE = 1.96

# Qwen2.5-VL-7B
LANGUAGE_MODEL, VISION_TOWER = 7_615_616_512, 676_550_144  # parameters
PATCHES_PER_TOKEN = 4
TEXT_TOKENS = 128
# An H100 of 80 GB by its data sheet, and how much of it is assumed to be used
FLOPS, BANDWIDTH = 989e12, 3.35e12  # in bfloat16, per second; bytes per second
FLOPS_USED, BANDWIDTH_USED = 0.4, 0.3


def noise_floor(questions: int, changed: float) -> float:
    """Half the width of the 95 % interval of a difference, in points, if it is small."""
    return 100 * _QUANTILE * math.sqrt(changed / questions)


def questions_needed(gain: float, changed: float) -> int:
    """Questions of which a noise floor is no larger than a gain in points."""
    return math.ceil(changed * (100 * _QUANTILE / gain) ** 2)


def differences() -> str:
    rows = []
    for benchmark in BENCHMARKS:
        floors = [noise_floor(benchmark.questions, changed) for changed in CHANGED]
        if benchmark.gain is None:
            published = ["–"] * 4
        else:
            low, high = floors
            seen = "yes" if benchmark.gain > high else "no" if benchmark.gain < low else "perhaps"
            other = "–" if benchmark.other_gain is None else f"+{benchmark.other_gain:.1f}"
            published = [f"{benchmark.base:.2f}", f"+{benchmark.gain:.2f}", other, seen]
        *numbers, seen = published
        needed = "–" if benchmark.gain is None else f"{questions_needed(benchmark.gain, CHANGED[1]):,}"
        name = f"{benchmark.name} (`{benchmark.task}`)"
        rows.append([name, f"{benchmark.questions:,}", *numbers, *(f"±{floor:.2f}" for floor in floors), seen, needed])
    header = ["benchmark", "questions", "base", "gain, paper", "gain, DUEL"]
    header += [f"noise floor, {100 * changed:.0f} % changed" for changed in CHANGED]
    return table([*header, "seen by one run?", "questions needed"], rows)


def seconds(flops: float, bytes_read: float) -> float:
    return flops / (FLOPS_USED * FLOPS) + bytes_read / (BANDWIDTH_USED * BANDWIDTH)


def _forward(tokens: float) -> float:
    return 2 * LANGUAGE_MODEL * tokens


def _tower(image_tokens: float) -> float:
    return 2 * VISION_TOWER * image_tokens * PATCHES_PER_TOKEN


def _reads(tokens: int) -> float:
    """Bytes of weights read while so many tokens are decoded, however many at a time."""
    return 2 * LANGUAGE_MODEL * tokens


def training_hours(steps: int = 6_000, image_tokens: int = 1_280, answers: int = 5, tokens: int = 128, every: int = 5):
    """
    Hours on one GPU. A solver's step: the tower once, two prompts and `answers + 1` completions to generate, and of the
    prompt with its answers the reference's forward, the policy's forward twice, with checkpointing, and its backward, which
    counts double. Every `every` such steps the proposer learns from as many questions.
    """
    prompt = image_tokens + TEXT_TOKENS
    generated = _tower(image_tokens) + _forward(2 * prompt + (answers + 1) * tokens)
    solver = seconds(generated + 5 * _forward(prompt + answers * tokens), _reads(2 * tokens))
    proposer = seconds(every * (_tower(image_tokens) + 5 * _forward(prompt + tokens)), 0)
    return steps * (solver + proposer / every) / 3_600


def evaluation_hours(benchmark: Benchmark, image_tokens: int = 2_048, batch_size: int = 8) -> float:
    """Hours on one GPU, if every image has as many tokens as may be and every answer is as long."""
    prompts = 3 if benchmark.name == "MathVista" else 1  # a group of three tasks
    encoded = _tower(image_tokens) + _forward(image_tokens + TEXT_TOKENS + benchmark.answer_tokens)
    per_question = seconds(encoded, _reads(benchmark.answer_tokens) / batch_size)
    return prompts * benchmark.questions * per_question / 3_600


def hours() -> str:
    rows = [[f"evaluation: {one.name}", f"{one.questions:,}", f"{evaluation_hours(one):.1f}"] for one in BENCHMARKS]
    evaluation = sum(map(evaluation_hours, BENCHMARKS))
    rows.append(
        ["evaluation: all ten, one model", f"{sum(one.questions for one in BENCHMARKS):,}", f"{evaluation:.1f}"]
    )
    rows.append(["training: one seed", "6,000 images", f"{training_hours():.1f}"])
    total = 3 * training_hours() + 4 * evaluation
    rows.append(["**three seeds, and four evaluations**", "", f"**{total:.0f}**"])
    return table(["what", "size", "hours on one H100, estimated"], rows)


def written(page: str) -> str:
    """The page with what is calculated in it."""
    return in_place(in_place(page, "differences", differences()), "hours", hours())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
