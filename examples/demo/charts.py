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

"""Bar charts to learn from: three coloured bars with distinct values from 1 to 9, drawn with jitter and noise.

    make_images("images", EVOLVE_SEEDS)          # PNG files, and nothing that says what they show
    labelled_questions(TEST_SEEDS)               # rows of image, question and answer, to measure with

A chart is a function of its seed. Everything asked about it can be read back and checked, so that the truth and the
groundedness of a question that a model asks are known exactly.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


# Disjoint, so that no image is seen in two places. One seed, one chart.
WARM_START_SEEDS = range(0, 4_000)  # supervised warm start of the demo models, with labels
VAL_SEEDS = range(10_000, 11_000)  # choosing settings
EVOLVE_SEEDS = range(20_000, 24_000)  # self-evolution, without labels
GATE_SEEDS = range(30_000, 40_000)  # gates for early exit, with labels
TEST_SEEDS = range(50_000, 52_000)  # reported numbers
FRESH_SEEDS = range(60_000, 60_400)  # confirming what was chosen when the reported numbers were known
UNSEEN_SEEDS = range(61_000, 61_400)  # confirming what was chosen when the fresh ones were known, too

SIZE = 84
MAX_VALUE = 9
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 70, 210),
    "yellow": (230, 200, 40),
    "purple": (140, 50, 170),
    "cyan": (60, 200, 210),
}
KINDS = ("value", "sum", "difference", "total", "tallest")


@dataclass(frozen=True)
class Chart:
    """A chart's seed, and its bars from left to right as colour -> value."""

    seed: int
    values: dict[str, int]

    @property
    def tallest(self) -> str:
        return max(self.values, key=self.values.get)

    def image(self) -> Image.Image:
        """The chart as an RGB image of 84x84 pixels; heights are to scale, the rest is jittered and noisy."""
        rng = np.random.default_rng(self.seed)
        pixels = np.full((SIZE, SIZE, 3), rng.integers(225, 256), dtype=np.float64)
        floor = SIZE - 3 - rng.integers(0, 3)
        pixels[floor : floor + 1] = 90
        for slot, (colour, value) in enumerate(self.values.items()):
            width = rng.integers(14, 21)
            left = 28 * slot + rng.integers(2, 27 - width)
            pixels[floor - 8 * value : floor, left : left + width] = COLOURS[colour] + rng.normal(0, 10, 3)
        pixels += rng.normal(0, 8, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def chart(seed: int) -> Chart:
    """The chart that `seed` stands for."""
    rng = random.Random(seed)
    colours = rng.sample(list(COLOURS), 3)
    return Chart(seed, dict(zip(colours, rng.sample(range(1, MAX_VALUE + 1), 3), strict=True)))


@dataclass(frozen=True)
class Question:
    """A question's kind and the colours it names, in their order."""

    kind: str
    colours: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return _TEMPLATES[self.kind].format(*self.colours)

    def is_grounded(self, chart: Chart) -> bool:
        """Whether every bar it names is in the chart, and no bar is named twice."""
        return len(set(self.colours)) == len(self.colours) and all(c in chart.values for c in self.colours)

    def answer(self, chart: Chart) -> str | None:
        """The true answer, or `None` if the question is not grounded in the chart."""
        if not self.is_grounded(chart):
            return None
        if self.kind == "tallest":
            return chart.tallest
        if self.kind == "total":
            return str(sum(chart.values.values()))
        values = [chart.values[colour] for colour in self.colours]
        return str(abs(values[0] - values[1]) if self.kind == "difference" else sum(values))


_TEMPLATES = {
    "value": "What is the value of {}?",
    "sum": "What is {} plus {}?",
    "difference": "What is the difference between {} and {}?",
    "total": "What is the total of all bars?",
    "tallest": "Which bar is the tallest?",
}
_COLOUR = f"({'|'.join(COLOURS)})"
_PATTERNS = {kind: re.compile(re.escape(t).replace(r"\{\}", _COLOUR)) for kind, t in _TEMPLATES.items()}


def sample_question(chart: Chart, rng: random.Random) -> Question:
    """A grounded question, every kind as likely as another."""
    kind = rng.choice(KINDS)
    named = {"value": 1, "sum": 2, "difference": 2}.get(kind, 0)
    return Question(kind, tuple(rng.sample(list(chart.values), named)))


def parse_question(text: str) -> Question | None:
    """The question that `text` asks, or `None` if it is none of the kinds; the inverse of `Question.text`."""
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(text.strip()):
            return Question(kind, match.groups())
    return None


def labelled_questions(seeds: Iterable[int]) -> list[dict]:
    """One question per chart, as rows of `image`, `question` and `answer`."""
    rows = []
    for seed in seeds:
        drawn = chart(seed)
        question = sample_question(drawn, random.Random(f"question {seed}"))
        rows.append({"image": drawn.image(), "question": question.text, "answer": question.answer(drawn)})
    return rows


def make_images(folder: str | Path, seeds: Iterable[int]) -> Path:
    """Write one PNG per seed, numbered in order: the pixels and nothing else."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds):
        chart(seed).image().save(folder / f"{index:05d}.png")
    return folder
