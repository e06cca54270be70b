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

"""Whether one model answers more questions right than another: differences with intervals, from paired scores.

Pure functions of arrays, so that they can be checked against simulations and used on any scores.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.stats
from tqdm import tqdm


ALL_QUESTIONS = "all questions"
MEAN_OF_BENCHMARKS = "mean of benchmarks"
_LEVEL = 0.95
_DRAWN_AT_ONCE = 1_000_000  # images, of several resamples together: what fits a processor's cache best


@dataclass(frozen=True)
class Difference:
    """
    How far B is ahead of A on one benchmark, or on several pooled. Scores are shares from 0 to 1.

    Args:
        name (`str`):
            The benchmark, or how it was pooled.
        questions (`int`), images (`int`):
            How many; questions about one image are drawn together, in all benchmarks that have it.
        a (`float`), b (`float`):
            Mean scores, over questions and runs.
        low (`float`), high (`float`):
            Ends of the 95 % interval of `b - a`.
        only_a (`int` or `None`), only_b (`int` or `None`):
            Questions that only A, and only B, answered right; `None` where scores are not right or wrong, or a side has
            several runs.
        p_value (`float` or `None`):
            McNemar's exact test of `only_a` against `only_b`.
    """

    name: str
    questions: int
    images: int
    a: float
    b: float
    low: float
    high: float
    only_a: int | None
    only_b: int | None
    p_value: float | None

    @property
    def difference(self) -> float:
        """How far B is ahead."""
        return self.b - self.a


def compare(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    images: Mapping[str, Sequence[Hashable] | None] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """
    Compares the scores of B with those of A on the same questions.

    The interval is the percentile interval of a paired bootstrap over images: an image is drawn with all its questions, of
    all benchmarks, and with the scores of both sides, so that what the two have in common cancels out and questions about
    one image do not count as independent. A draw moves a difference by how far the scores of the drawn images' questions
    are from it, summed and divided by the number of questions.

    With several runs of a side, such as training seeds, a question's score is the mean of its runs, and each draw is moved
    by Student's t times the standard error that the runs cause beyond the luck of single questions: a two-way analysis of
    variance without replication, with Welch and Satterthwaite's degrees of freedom. A side with one run is taken as it is:
    whether another seed would have done as well is not in its interval.

    Args:
        a (`Mapping[str, np.ndarray]`), b (`Mapping[str, np.ndarray]`):
            By benchmark, scores from 0 to 1 of shape `(runs, questions)`, or `(questions,)` for one run.
        images (`Mapping[str, Sequence[Hashable] | None]`, *optional*):
            By benchmark, each question's image, of shape `(questions,)`. Equal ones are one image, in different benchmarks
            too. Benchmarks with `None`, or that are not in it, have an image per question.
        resamples (`int`, *optional*, defaults to `10000`):
            Draws of the bootstrap.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.

    Returns:
        `list[Difference]`: one per benchmark, then, of more than one, `ALL_QUESTIONS`, where every question counts the
        same, and `MEAN_OF_BENCHMARKS`, where every benchmark does; those with exactly the same images count as one.

    Raises:
        `ValueError`: if there are no benchmarks, or they, their questions or their images are not those of the other side.
    """
    if not a or list(a) != list(b):
        raise ValueError(f"Expected scores of the same benchmarks in the same order; got {list(a)} and {list(b)}.")
    known: dict[Hashable, int] = {}
    parts = [_Part.of(name, a[name], b[name], (images or {}).get(name), known) for name in a]
    if len({(part.a.shape[0], part.b.shape[0]) for part in parts}) > 1:
        raise ValueError("Expected every run on every benchmark; got different numbers of runs.")
    rng = np.random.default_rng(seed)
    shares = np.stack([part.by_image(part.gain - part.gain.mean(), len(known)) for part in parts])
    draws = _draw(shares, resamples, rng)
    rows = [(part.name, np.eye(len(parts))[index]) for index, part in enumerate(parts)]
    if len(parts) > 1:
        questions = np.array([part.questions for part in parts])
        alike = Counter(part.images for part in parts)
        rows.append((ALL_QUESTIONS, questions / questions.sum()))
        rows.append((MEAN_OF_BENCHMARKS, np.array([1 / len(alike) / alike[part.images] for part in parts])))
    return [_row(name, parts, weights, weights @ draws, len(known), rng) for name, weights in rows]


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """
    McNemar's exact test: of the questions that only one side answered right, is A's share one half?

    Args:
        a (`np.ndarray`), b (`np.ndarray`):
            0 or 1 for each question, of shape `(questions,)`.

    Returns:
        `tuple[int, int, float]`: questions that only A answered right, that only B did, and the two-sided p-value.
    """
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    if only_a + only_b == 0:
        return 0, 0, 1.0
    return only_a, only_b, float(scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


@dataclass(frozen=True)
class _Part:
    """One benchmark: scores of both sides, shape `(runs, questions)`, and each question's image, as an index."""

    name: str
    a: np.ndarray
    b: np.ndarray
    image_of: np.ndarray

    @property
    def questions(self) -> int:
        return self.a.shape[1]

    @cached_property
    def images(self) -> frozenset[int]:
        return frozenset(self.image_of.tolist())

    @property
    def gain(self) -> np.ndarray:
        """How far B is ahead, by question."""
        return self.b.mean(0) - self.a.mean(0)

    @classmethod
    def of(cls, name: str, a, b, images: Sequence[Hashable] | None, known: dict[Hashable, int]) -> "_Part":
        """Checks the scores of one benchmark, and numbers its images after those that are `known`, to which it adds."""
        a, b = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (a, b))
        questions = a.shape[1]
        if b.shape[1] != questions or (images is not None and len(images) != questions):
            counts = [questions, b.shape[1], *([len(images)] if images is not None else [])]
            raise ValueError(f"{name}: expected as many scores of B and images as scores of A; got {counts}.")
        if not all(np.isfinite(scores).all() and (0 <= scores).all() and (scores <= 1).all() for scores in (a, b)):
            raise ValueError(f"{name}: expected scores from 0 to 1.")
        alone = [(name, question) for question in range(questions)]  # an image per question
        labels = alone if images is None else images
        part = cls(name, a, b, np.array([known.setdefault(label, len(known)) for label in labels], dtype=int))
        if len(part.images) < 2:
            raise ValueError(f"{name}: an interval needs questions about at least two images; got {len(part.images)}.")
        return part

    def by_image(self, values: np.ndarray, images: int) -> np.ndarray:
        """What each of all `images` adds to the mean of `values` of shape `(..., questions)`: shape `(..., images)`."""
        sums = [np.bincount(self.image_of, row, images) for row in values.reshape(-1, self.questions)]
        return np.reshape(sums, (*values.shape[:-1], images)) / self.questions


def _draw(shares: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Sums of `shares` of shape `(benchmarks, images)` over images drawn with replacement: `(benchmarks, resamples)`."""
    images = shares.shape[1]
    at_once = max(1, _DRAWN_AT_ONCE // images)
    sums = []
    for start in tqdm(range(0, resamples, at_once), unit="draws", leave=False, disable=None):  # on a terminal
        count = min(at_once, resamples - start)
        drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
        sums.append(shares @ times.T.astype(float))
    return np.concatenate(sums, axis=1)


def _row(
    name: str, parts: list[_Part], weights: np.ndarray, moves: np.ndarray, images: int, rng: np.random.Generator
) -> Difference:
    """The mean of benchmarks by `weights`; `moves` are how far the draws are from its difference."""
    parts, weights = zip(*((part, weight) for part, weight in zip(parts, weights, strict=True) if weight), strict=True)
    means, variance, totals, freedom = [], 0.0, [], []
    for side in ("a", "b"):
        scores = [getattr(part, side) for part in parts]
        of_runs = sum(weight * one.mean(1) for weight, one in zip(weights, scores, strict=True))  # (runs,)
        means.append(float(of_runs.mean()))
        runs = len(of_runs)
        if runs > 1:
            variance += (of_runs.var(ddof=1) - _variance_by_image(scores, parts, weights, images)) / runs
            totals.append(of_runs.var(ddof=1) / runs)
            freedom.append(runs - 1)
    draws = means[1] - means[0] + moves
    if variance > 0:
        # Welch and Satterthwaite's degrees of freedom
        degrees = sum(totals) ** 2 / sum(total**2 / n for total, n in zip(totals, freedom, strict=True))
        draws = draws + np.sqrt(variance) * rng.standard_t(degrees, len(draws))
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    a, b = (np.concatenate([getattr(part, side)[0] for part in parts]) for side in ("a", "b"))
    different = frozenset().union(*(part.images for part in parts))
    tested = name != MEAN_OF_BENCHMARKS and all(len(part.a) == len(part.b) == 1 for part in parts)
    # Answers to two benchmarks about one image are no independent evidence
    tested = tested and len(different) == sum(len(part.images) for part in parts)
    tested = tested and np.isin(a, [0, 1]).all() and np.isin(b, [0, 1]).all()
    only_a, only_b, p_value = mcnemar(a, b) if tested else (None, None, None)
    questions = sum(part.questions for part in parts)
    return Difference(name, questions, len(different), *means, float(low), float(high), only_a, only_b, p_value)


def _variance_by_image(
    scores: Sequence[np.ndarray], parts: Sequence[_Part], weights: Sequence[float], images: int
) -> float:
    """How far the means of runs would vary if runs differed in luck with single images alone."""
    shares = 0.0
    for one, part, weight in zip(scores, parts, weights, strict=True):
        residuals = one - one.mean(1, keepdims=True) - one.mean(0) + one.mean()
        correction = len(part.images) / (len(part.images) - 1)
        shares = shares + weight * np.sqrt(correction) * part.by_image(residuals, images)
    return float((shares**2).sum() / (len(scores[0]) - 1))


def table(rows: Sequence[Difference], name_a: str, name_b: str) -> str:
    """
    A comparison in Markdown. Scores are in percent, differences in points.

    Args:
        rows (`Sequence[Difference]`):
            From [`compare`].
        name_a (`str`), name_b (`str`):
            Names of the two sides.
    """
    a, b = (name.replace("|", "\\|") for name in (name_a, name_b))
    lines = [
        f"| benchmark | questions | {a} | {b} | difference (95 % interval) | only {a} right | only {b} right | McNemar's p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval = f"{100 * row.difference:+.2f} ({100 * row.low:+.2f} to {100 * row.high:+.2f})"
        test = ["–"] * 3 if row.p_value is None else [str(row.only_a), str(row.only_b), _p_value(row.p_value)]
        cells = [row.name, str(row.questions), f"{100 * row.a:.2f}", f"{100 * row.b:.2f}", interval, *test]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def plot(comparisons: Mapping[str, Sequence[Difference]], name_a: str, path: str) -> None:
    """
    Draws differences and their intervals, a line for each benchmark.

    Args:
        comparisons (`Mapping[str, Sequence[Difference]]`):
            By the name of the other side, what [`compare`] gave for the same benchmarks.
        name_a (`str`):
            Name of the side that all are compared with.
        path (`str`):
            Image file to write; its suffix says in which format.
    """
    from matplotlib.figure import Figure

    names = [row.name for row in next(iter(comparisons.values()))]
    figure = Figure(figsize=(7, 1.2 + 0.22 * len(names) * (len(comparisons) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.4", linewidth=1)
    for index, (other, rows) in enumerate(comparisons.items()):
        places = [place + (index + 1) / (len(comparisons) + 1) for place in range(len(names))]
        middles = np.array([100 * row.difference for row in rows])
        ends = np.array([[100 * row.low, 100 * row.high] for row in rows]).T
        axes.hlines(places, *ends, color=f"C{index}", linewidth=2)
        axes.plot(middles, places, "o", color=f"C{index}", markersize=5, label=other)
    axes.set_yticks([place + 0.5 for place in range(len(names))], names)
    axes.set_ylim(len(names), 0)
    axes.set_xlabel(f"points ahead of {name_a}, with 95 % interval".replace("$", r"\$"))
    axes.grid(axis="x", alpha=0.3)
    if len(comparisons) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)
