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

"""The page's charts: drawn by matplotlib as SVG that takes its colours from the page."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from .log import Run


# Drawn in these, which the page's style sheet replaces, so that one drawing serves light and dark
_COLOURS = {
    "solver": "#0a0b01",
    "proposer": "#0a0b02",
    "third": "#0a0b03",
    "ink": "#0a0b04",
    "rule": "#0a0b05",
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
# Size in points and the axes' place in it
_WIDTH, _HEIGHT = 330.0, 175.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 36.0, 322.0, 9.0, 150.0
_MOST_POINTS = 300
_HEAT_COLUMNS, _HEAT_ROWS = 48, 12


@dataclass(frozen=True)
class Chart:
    """
    What one chart shows.

    Args:
        title (`str`), about (`str`):
            What is shown, and how to read it.
        lines (`tuple[tuple[str, str, str], ...]`):
            Label, metric and colour of each line.
        share (`bool`):
            Whether the values are shares, from 0 to 1.
    """

    title: str
    about: str
    lines: tuple[tuple[str, str, str], ...]
    share: bool = False


CHARTS = (
    Chart(
        "Reward",
        "What each role earned, on average. The solver earns for agreeing with its other answers, the proposer for "
        "questions that are neither too easy nor too hard.",
        (("solver", "solver/reward", "solver"), ("proposer", "proposer/reward", "proposer")),
    ),
    Chart(
        "Agreement",
        "Share of the answers that are the majority's, and share of the questions on which all agree. It rises with "
        "training whether or not the answers get better.",
        (("agreement", "agreement", "solver"), ("unanimous questions", "unanimous", "third")),
        share=True,
    ),
    Chart(
        "Accuracy on labelled questions",
        "The only curve that says whether the model got better. Where the majority is not ahead of greedy, the vote has "
        "nothing to teach.",
        (
            ("greedy", "eval_accuracy_greedy", "solver"),
            ("majority", "eval_accuracy_majority", "proposer"),
            ("sampled", "eval_accuracy_sampled", "third"),
        ),
        share=True,
    ),
    Chart(
        "Answer entropy",
        "How much the answers to a question differ, in nats. Near 0 there is nothing left to learn from.",
        (("entropy", "answer_entropy", "solver"),),
    ),
    Chart(
        "KL to the base model",
        "How far each role has moved, in nats per token. A sudden rise is a policy that runs away.",
        (("solver", "solver/kl", "solver"), ("proposer", "proposer/kl", "proposer")),
    ),
    Chart(
        "KL weight (beta)",
        "How hard each role is held to the base. It follows the KL.",
        (("solver", "solver/beta", "solver"), ("proposer", "proposer/beta", "proposer")),
    ),
    Chart(
        "New questions",
        "Different ones among the last 64, and those that were never asked before in the run. A proposer that repeats "
        "itself takes both to 0.",
        (("different", "distinct_questions", "proposer"), ("never asked before", "novel_questions", "third")),
        share=True,
    ),
    Chart(
        "Likeness of the questions",
        "Self-BLEU: 1 if each question is made of pieces of others, as from one template.",
        (("self-BLEU", "question_self_bleu", "proposer"),),
        share=True,
    ),
    Chart(
        "Solved without the image",
        "Share of the questions whose majority answer is the same when the image is not shown.",
        (("solved blind", "blind_solved", "proposer"),),
        share=True,
    ),
    Chart(
        "Lost form",
        "Answers that cannot be read, which agree with nobody, and questions that do not follow the form asked for.",
        (("unreadable answers", "unreadable", "solver"), ("malformed questions", "malformed_questions", "proposer")),
        share=True,
    ),
    Chart(
        "Length of the answers",
        "Tokens, and words before the answer.",
        (("tokens", "answer_tokens", "solver"), ("words before the answer", "words_before_answer", "third")),
    ),
    Chart(
        "Gradient norm",
        "Before clipping. Spikes come before divergence.",
        (("solver", "solver/grad_norm", "solver"), ("proposer", "proposer/grad_norm", "proposer")),
    ),
)


def draw_charts(runs: Sequence[Run]) -> list[dict]:
    """
    The charts for which there is data.

    Args:
        runs (`Sequence[Run]`):
            One run or two, which share the charts.

    Returns:
        `list[dict]`: for each chart `title`, `about`, `svg`, `legend` (dicts of `label`, `run`, `colour`, `dashed` and
        `last`), and `data`, from which the page's script tells the values at a step.
    """
    return [drawn for chart in CHARTS if (drawn := _draw(chart, runs)) is not None]


def _draw(chart: Chart, runs: Sequence[Run]) -> dict | None:
    lines = []
    for i, run in enumerate(runs):
        for label, metric, colour in chart.lines:
            steps, values = _thinned(run.curves.get(metric, []))
            if len(steps):
                lines.append((i, label, colour, steps, values))
    if not lines:
        return None
    figure, axes = _axes()
    first = min(steps[0] for *_, steps, _ in lines)
    last = max(steps[-1] for *_, steps, _ in lines)
    pad = max(0.02 * (last - first), 0.5)
    first, last = float(first - pad), float(last + pad)
    for run, _, colour, steps, values in lines:
        few = len(steps) <= 24
        window = 1 if few else max(3, len(steps) // 12)
        style = {"color": _COLOURS[colour], "linestyle": (0, (5, 2.5)) if run else "-", "linewidth": 1.8}
        if window > 1:
            axes.plot(steps, values, **{**style, "linewidth": 0.8, "alpha": 0.35, "linestyle": "-"})
        axes.plot(steps, _smooth(values, window), marker="o" if few else None, markersize=3, **style)
    axes.set_xlim(first, last)
    if chart.share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0) if low > 0 and low < 0.5 * high else low, high)
    return {
        "title": chart.title,
        "about": chart.about,
        "svg": _svg(figure, chart.title),
        "legend": [
            {"label": label, "run": run, "colour": colour, "dashed": bool(run), "last": f"{values[-1]:.3g}"}
            for run, label, colour, _, values in lines
        ],
        "data": {
            "range": [first, last],
            "lines": [
                [[int(step) for step in steps], [float(f"{value:.4g}") for value in values]]
                for *_, steps, values in lines
            ],
        },
    }


def draw_entropy_histogram(run: Run, most_votes: int) -> Markup:
    """
    The histogram of the answers' entropy over time.

    Args:
        run (`Run`):
            The run.
        most_votes (`int`):
            Most answers to a question, whose logarithm is the largest entropy.

    Returns:
        `Markup`: an SVG.
    """
    figure, axes = _axes()
    steps, entropies = np.asarray(run.rollout_steps), np.asarray(run.entropies)
    largest = max(math.log(most_votes), 1e-3)
    first, last = int(steps.min()), int(steps.max())
    columns = min(_HEAT_COLUMNS, len(np.unique(steps)))
    counts, x, y = np.histogram2d(
        steps,
        np.clip(entropies, 0, largest),
        bins=(columns, _HEAT_ROWS),
        range=((first - 0.5, last + 0.5), (0, largest)),
    )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for i in range(columns):
        for j in range(_HEAT_ROWS):
            if shares[i, j]:
                corner = (x[i], y[j])
                axes.add_patch(_cell(corner, x[i + 1] - x[i], y[j + 1] - y[j], shares[i, j]))
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, largest)
    axes.grid(False)
    return _svg(figure, run.name)


def _cell(corner, width: float, height: float, share: float) -> Rectangle:
    # The root makes small shares visible
    return Rectangle(corner, width, height, facecolor=_COLOURS["solver"], alpha=0.08 + 0.92 * share**0.5, linewidth=0)


def _axes():
    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
    axes = figure.add_axes(
        (_LEFT / _WIDTH, 1 - _BOTTOM / _HEIGHT, (_RIGHT - _LEFT) / _WIDTH, (_BOTTOM - _TOP) / _HEIGHT)
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["rule"])
    axes.tick_params(colors=_COLOURS["ink"], labelsize=10, length=0, pad=5)
    axes.grid(axis="y", color=_COLOURS["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=6, integer=True)
    return figure, axes


def _thinned(points: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points as can be seen, each the mean of as many steps."""
    if not points:
        return np.array([]), np.array([])
    steps, values = np.array(points, dtype=float).T
    size = math.ceil(len(steps) / _MOST_POINTS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return np.round(np.add.reduceat(steps, starts) / counts), np.add.reduceat(values, starts) / counts


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centred moving average."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _svg(figure: Figure, name: str) -> Markup:
    """A figure as an element of the page: without style attributes, which its security policy forbids, and without ids of its own."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify_threshold": 0.5}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}g":
            element.attrib.pop("id", None)
        for rule in filter(None, element.attrib.pop("style", "").split(";")):
            name, _, value = (part.strip() for part in rule.partition(":"))
            if name == "font":
                name, value = "font-size", next(word for word in value.split() if word.endswith("px"))
            if name != "font-family":  # the page's
                element.set(name, value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name)
    root.set("aria-hidden", "true")
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)
