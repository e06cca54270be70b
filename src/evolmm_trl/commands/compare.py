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

"""`evolmm compare`."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from . import UsageError


def add_command(commands) -> None:
    """Adds `compare` to the parser of `evolmm`."""
    parser = commands.add_parser(
        "compare",
        help="whether one model is better than another",
        description="Compares evaluations of the same questions: differences with paired 95 % intervals and McNemar's\n"
        "test, per benchmark and pooled. Refuses runs on different questions, prompts or settings.",
        epilog="examples:\n"
        "  evolmm compare eval/base eval/solver\n"
        "  evolmm compare base=eval/base solver=eval/seed0,eval/seed1,eval/seed2 --output eval/comparison",
    )
    parser.add_argument(
        "a", help="the side that the others are compared with: [NAME=]FOLDER[,FOLDER...], one per seed"
    )
    parser.add_argument("b", nargs="+", help="the other sides, likewise")
    parser.add_argument("--output", help="folder to write comparison.md and comparison.png to")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.output is not None and find_spec("matplotlib") is None:
        raise UsageError("--output writes a figure, which needs matplotlib: `pip install 'evolmm-trl[eval]'`.")

    from ..evaluation.compare import compare, plot, table
    from ..evaluation.logs import check_comparable, read_evaluation, stack

    sides = dict(_side(text) for text in (arguments.a, *arguments.b))
    if len(sides) != 1 + len(arguments.b):
        raise UsageError("Two sides have the same name. Name them: `evolmm compare base=FOLDER solver=FOLDER`.")
    runs = {path: read_evaluation(path) for paths in sides.values() for path in paths}
    check_comparable(runs)
    tasks = sorted(next(iter(runs.values())))
    logs = {task: [run[task] for run in runs.values()] for task in tasks}
    images = {task: next((log.images for log in logs[task] if log.images), None) for task in tasks}
    if unknown := [task for task, of_task in images.items() if of_task is None]:
        print(
            f"evolmm: the logs of {', '.join(unknown)} do not say which images were seen. Where questions share an image "
            "their intervals, and the pooled ones, are too narrow.",
            file=sys.stderr,
        )
    scores = {name: stack([runs[path] for path in paths], tasks) for name, paths in sides.items()}
    (name_a, a), *others = scores.items()
    comparisons = {name: compare(a, b, images) for name, b in others}
    text = "\n\n".join(table(rows, name_a, name) for name, rows in comparisons.items())
    print(text)
    if arguments.output is not None:
        output = Path(arguments.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "comparison.md").write_text(f"{text}\n", encoding="utf-8")
        plot(comparisons, name_a, output / "comparison.png")
    return 0


def _side(text: str) -> tuple[str, list[str]]:
    name, equals, paths = text.partition("=")
    if not equals or all(Path(path).exists() for path in text.split(",")):  # folders such as eval/lr=1e-3
        name = paths = text
    runs = [path for path in paths.split(",") if path]
    if not runs or len(set(runs)) != len(runs):
        raise UsageError(f"{text!r} names no evaluation, or one twice; expected [NAME=]FOLDER[,FOLDER...].")
    return name, runs
