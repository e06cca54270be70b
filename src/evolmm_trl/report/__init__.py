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

"""A page about a run, or about two side by side: one HTML file that loads nothing."""

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from statistics import fmean

from ..thumbnails import REPORT_FOLDER
from .log import LOG_NAME, Run, read_run, to_json


__all__ = ["PAGE_NAME", "write_report"]

PAGE_NAME = f"{REPORT_FOLDER}/report.html"
# Of all runs of a page: characters of JSON, and bytes of thumbnails, which base64 makes a third longer
_TEXT_BUDGET = 7_000_000
_PICTURE_BUDGET = 8_000_000
_TILES = (
    ("Agreement", "agreement", "share"),
    ("Unanimous", "unanimous", "share"),
    ("Greedy accuracy", "eval_accuracy_greedy", "share"),
    ("Majority accuracy", "eval_accuracy_majority", "share"),
    ("Solver's reward", "solver/reward", "number"),
    ("Proposer's reward", "proposer/reward", "number"),
    ("Entropy, nats", "answer_entropy", "number"),
    ("Unreadable", "unreadable", "share"),
)


def write_report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    history: list[dict] | None = None,
) -> Path:
    """
    Writes a page about a run, or about two side by side, from their rollout logs: curves, the histogram of the answers'
    entropy over time, and a gallery of rollouts. It is one HTML file of less than 20 MB.

    Args:
        runs (`str`, `Path` or a sequence of one or two of them):
            `output_dir` of a run, finished or not, or its `rollouts.jsonl`.
        output (`str` or `Path`, *optional*):
            File to write. By default `_report/report.html` in the folder of the first run, which is not pushed to the
            Hub; of a log with another name, such as `rollouts.1.jsonl`, `_report/rollouts.1.jsonl.html`.
        history (`list[dict]`, *optional*):
            The trainer's `state.log_history`, if there is one run. By default that of the newest `trainer_state.json` in
            its folder that was saved with this log.

    Returns:
        `Path`: the file.

    Raises:
        `FileNotFoundError`: if a run has no rollout log.
        `ValueError`: if a log holds no rollouts, or there are more than two runs.

    Example:

    ```python
    >>> write_report(["runs/continuous", "runs/discrete"], "both.html")
    ```
    """
    # They take a second to import
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from .charts import draw_charts, draw_entropy_histogram

    paths = [Path(path) for path in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if not 1 <= len(paths) <= 2:
        raise ValueError(f"A page is about one run or two, not {len(paths)}.")
    read = [
        read_run(path, name, _TEXT_BUDGET // len(paths), _PICTURE_BUDGET // len(paths), history)
        for path, name in zip(paths, _names(paths), strict=True)
    ]
    most_votes = max(run.votes for run in read)
    charts = draw_charts(read)
    pictures = {digest: picture for run in read for digest, picture in run.pictures.items()}
    data = {
        "charts": [chart["data"] for chart in charts],
        "images": {digest: base64.b64encode(picture).decode() for digest, picture in pictures.items()},
    }
    # The rollouts are JSON already
    galleries = ",".join(
        f'{{"kinds":{to_json(run.kinds.most_common())},"rollouts":[{",".join(run.gallery())}]}}' for run in read
    )
    files = resources.files(__name__)
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8")).render(
        runs=[{"name": run.name, "facts": _facts(run), "sampling": _sampling(run)} for run in read],
        notes=[note for run in read for note in _notes(run, of_several=len(read) > 1)],
        tiles=_tiles(read),
        charts=charts,
        histograms=[draw_entropy_histogram(run, most_votes) for run in read],
        largest_entropy=math.log(most_votes),
        most_votes=most_votes,
        data=Markup(f'{to_json(data)[:-1]},"runs":[{galleries}]}}'),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=_version(),
    )
    output = _page_of(read[0].log) if output is None else Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, output)
    return output


def _version() -> str:
    from .. import __version__

    return __version__


def _page_of(log: Path) -> Path:
    """Where the page of a log goes. Every log of a folder has its own."""
    return log.parent / (PAGE_NAME if log.name == LOG_NAME else f"{REPORT_FOLDER}/{log.name}.html")


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with those of logs that are not called as usual, or with the folders that they are in."""
    files = [path.resolve() if path.is_dir() else path.parent.resolve() / path.name for path in paths]
    files = [file.parent if file.name == LOG_NAME else file for file in files]
    names = [file.name if file.is_dir() else f"{file.parent.name}/{file.name}" for file in files]
    if len(set(names)) == len(names):
        return names
    return ["/".join(file.parts[-2 if file.is_dir() else -3 :]) for file in files]


def _facts(run: Run) -> str:
    steps = run.rollout_steps
    facts = [
        f"{run.rollouts:,} rollouts in the steps {min(steps):,} to {max(steps):,}",
        f"{run.votes} answers to a question" if run.votes > 1 else "one answer to a question",
    ]
    return ", ".join(facts) + "."


def _notes(run: Run, of_several: bool) -> list[str]:
    """What a reader must know first."""
    notes = []
    if run.alarm is not None:
        notes.append(f"CollapseGuard, with its default thresholds, raises its alarm at {run.alarm}.")
    if run.broken:
        lines = "line of the log is" if run.broken == 1 else "lines of the log are"
        notes.append(f"{run.broken:,} {lines} no rollout and left out.")
    if run.cut_off:
        notes.append("The log ends within a line: the run was stopped while it wrote, or is still writing.")
    last = max(run.rollout_steps)
    if run.others_histories:
        notes.append(
            f"No trainer_state.json in the folder is known to be of this log ({run.others_histories:,} found): its "
            "evolmm_state.json tells another log, or none. What only the trainer knows, such as KL and accuracy, is not shown."
        )
    elif not run.trainer_steps:
        notes.append(
            "There is no trainer_state.json, neither in _report nor in a checkpoint: what only the trainer knows, such as KL "
            "and accuracy, is not shown."
        )
    elif run.trainer_steps < last:
        notes.append(
            f"The newest trainer_state.json is of step {run.trainer_steps:,}: KL, beta, gradient norm and accuracy end "
            "there."
        )
    return [f"{run.name}: {note}" for note in notes] if of_several else notes


def _sampling(run: Run) -> str:
    """How the gallery's rollouts were chosen, in words."""

    def part(sample, what: str) -> str:
        which = "all" if sample.stride == 1 else f"one in {sample.stride} of the"
        return f"{which} {sample.added:,} {what}"

    parts = []
    if run.pictured.added:
        parts.append(part(run.pictured, f"with one of the {len(run.pictures):,} pictures that were kept"))
    if run.others.added:
        parts.append(part(run.others, "without a picture" if run.pictured.added else "in the log, without pictures"))
    total = len(run.gallery())
    return f"{total:,} rollouts: {', and '.join(parts)}."


def _tiles(runs: Sequence[Run]) -> list[dict]:
    tiles = []
    for label, metric, form in _TILES:
        values = []
        for i, run in enumerate(runs):
            curve = [value for _, value in run.curves.get(metric, [])]
            if not curve:
                continue
            tenth = max(1, len(curve) // 10)
            first, last = fmean(curve[:tenth]), fmean(curve[-tenth:])
            show = "{:.0%}" if form == "share" else "{:.2f}"
            values.append({"run": i, "first": show.format(first), "last": show.format(last)})
        if values:
            tiles.append({"label": label, "values": values})
    return tiles


def _hash(text: str) -> str:
    """What a security policy calls an inline script or style sheet."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
