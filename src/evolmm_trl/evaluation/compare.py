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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from tqdm import tqdm


ALL_QUESTIONS = "all questions"
MEAN_OF_BENCHMARKS = "mean of benchmarks"
_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """
    How far B is ahead of A on one benchmark, or on several pooled. Scores are shares from 0 to 1.

    Args:
        name (`str`):
            The benchmark, or how it was pooled.
        questions (`int`), images (`int`):
            How many; questions about one image are drawn together.
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
    images: Mapping[str, Sequence] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """
    Compares the scores of B with those of A on the same questions.

    The interval is the percentile interval of a paired bootstrap over images: an image is drawn with all its questions and
    with the scores of both sides, so that what the two have in common cancels out and questions about one image do not
    count as independent. Benchmarks are fixed: each is drawn from alone.

    With several runs of a side, such as training seeds, a question's score is the mean of its runs, and each draw is moved
    by Student's t times the standard error that the runs cause beyond the luck of single questions: a two-way analysis of
    variance without replication, with Welch and Satterthwaite's degrees of freedom. A side with one run is taken as it is:
    whether another seed would have done as well is not in its interval.

    Args:
        a (`Mapping[str, np.ndarray]`), b (`Mapping[str, np.ndarray]`):
            By benchmark, scores from 0 to 1 of shape `(runs, questions)`, or `(questions,)` for one run.
        images (`Mapping[str, Sequence]`, *optional*):
            By benchmark, each question's image, as anything that can be compared, of shape `(questions,)`. Benchmarks
            that are not in it have an image per question.
        resamples (`int`, *optional*, defaults to `10000`):
            Draws of the bootstrap.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.

    Returns:
        `list[Difference]`: one per benchmark, then, of more than one, `ALL_QUESTIONS`, where every question counts the
        same, and `MEAN_OF_BENCHMARKS`, where every benchmark does.

    Raises:
        `ValueError`: if there are no benchmarks, or they, their questions or their images are not those of the other side.
    """
    if not a or list(a) != list(b):
        raise ValueError(f"Expected scores of the same benchmarks in the same order; got {list(a)} and {list(b)}.")
    rng = np.random.default_rng(seed)
    parts = [
        _Part.of(name, a[name], b[name], (images or {}).get(name), resamples, rng)
        for name in tqdm(a, unit="benchmark", leave=False, disable=None)  # on a terminal
    ]
    if len({(part.a.shape[0], part.b.shape[0]) for part in parts}) > 1:
        raise ValueError("Expected every run on every benchmark; got different numbers of runs.")
    rows = [_pool(part.name, [part], [1.0], rng) for part in parts]
    if len(parts) > 1:
        total = sum(part.questions for part in parts)
        rows.append(_pool(ALL_QUESTIONS, parts, [part.questions / total for part in parts], rng))
        rows.append(_pool(MEAN_OF_BENCHMARKS, parts, [1 / len(parts)] * len(parts), rng))
    return rows


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
    """One benchmark: scores of both sides, shape `(runs, questions)`, and draws of the difference of their means."""

    name: str
    a: np.ndarray
    b: np.ndarray
    clusters: np.ndarray  # of each question, an index below `images`
    images: int
    draws: np.ndarray

    @property
    def questions(self) -> int:
        return self.a.shape[1]

    @classmethod
    def of(cls, name: str, a, b, images, resamples: int, rng: np.random.Generator) -> "_Part":
        a, b = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (a, b))
        questions = a.shape[1]
        if b.shape[1] != questions or (images is not None and len(images) != questions):
            counts = [questions, b.shape[1], *([len(images)] if images is not None else [])]
            raise ValueError(f"{name}: expected as many scores of B and images as scores of A; got {counts}.")
        if not all(np.isfinite(scores).all() and (0 <= scores).all() and (scores <= 1).all() for scores in (a, b)):
            raise ValueError(f"{name}: expected scores from 0 to 1.")
        if images is None:
            clusters = np.arange(questions)
        else:
            clusters = np.unique(np.asarray(images), return_inverse=True)[1].ravel()
        count = int(clusters.max()) + 1 if questions else 0
        if count < 2:
            raise ValueError(f"{name}: an interval needs questions about at least two images; got {count}.")
        sums = np.bincount(clusters, b.mean(0) - a.mean(0), count)
        sizes = np.bincount(clusters, minlength=count)
        drawn = scipy.stats.bootstrap(
            (sums, sizes),
            lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, 4_000_000 // count),
            method="percentile",
            rng=rng,
        )
        return cls(name, a, b, clusters, count, drawn.bootstrap_distribution)


def _pool(name: str, parts: list[_Part], weights: Sequence[float], rng: np.random.Generator) -> Difference:
    draws = sum(weight * part.draws for weight, part in zip(weights, parts, strict=True))
    means, variance, totals, freedom = [], 0.0, [], []
    for side in ("a", "b"):
        scores = [getattr(part, side) for part in parts]
        of_runs = sum(weight * one.mean(1) for weight, one in zip(weights, scores, strict=True))  # (runs,)
        means.append(float(of_runs.mean()))
        runs = len(of_runs)
        if runs > 1:
            by_question = sum(
                weight**2 * _variance_by_question(one, part)
                for weight, one, part in zip(weights, scores, parts, strict=True)
            )
            variance += (of_runs.var(ddof=1) - by_question) / runs
            totals.append(of_runs.var(ddof=1) / runs)
            freedom.append(runs - 1)
    if variance > 0:
        # Welch and Satterthwaite's degrees of freedom
        degrees = sum(totals) ** 2 / sum(total**2 / n for total, n in zip(totals, freedom, strict=True))
        draws = draws + np.sqrt(variance) * rng.standard_t(degrees, len(draws))
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    a, b = (np.concatenate([getattr(part, side)[0] for part in parts]) for side in ("a", "b"))
    tested = name != MEAN_OF_BENCHMARKS and all(len(part.a) == len(part.b) == 1 for part in parts)
    tested = tested and np.isin(a, [0, 1]).all() and np.isin(b, [0, 1]).all()
    only_a, only_b, p_value = mcnemar(a, b) if tested else (None, None, None)
    questions, images = (sum(getattr(part, field) for part in parts) for field in ("questions", "images"))
    return Difference(name, questions, images, *means, float(low), float(high), only_a, only_b, p_value)


def _variance_by_question(scores: np.ndarray, part: _Part) -> float:
    """How far the means of runs would vary if runs differed in luck with single images alone."""
    runs, questions = scores.shape
    residuals = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    sums = np.stack([np.bincount(part.clusters, row, part.images) for row in residuals])
    return float((sums**2).sum() / (runs - 1) / questions**2 * part.images / (part.images - 1))


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
