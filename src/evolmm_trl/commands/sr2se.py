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

"""`evolmm sr2se run` and `evolmm sr2se answer`."""

import argparse
import json
from collections.abc import Iterable
from typing import TextIO

from . import UsageError, count_rows, output_file, positive


def add_command(commands) -> None:
    """Adds `sr2se` and its two commands to the parser of `evolmm`."""
    sr2se = commands.add_parser(
        "sr2se",
        help="early exit, perception refinement and SR-DPO",
        description="SR2SE: the model reasons in steps, stops as soon as it knows, and learns from its own refinements.",
    )
    of_sr2se = sr2se.add_subparsers(required=True, metavar="command")

    run = of_sr2se.add_parser(
        "run",
        help="run the pipeline, or some of its stages",
        description="Runs SR2SE's pipeline, or some of its stages. What is finished is not done again.",
        epilog="example:\n  evolmm sr2se run recipe.yaml --set data=train.jsonl --set output_dir=charts-sr2se",
    )
    run.add_argument("config", help="YAML, or JSON in the same or the authors' layout")
    run.add_argument("--stage", action="append", help="only this stage; may be repeated")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="such as dpo.learning_rate=1e-6")
    run.set_defaults(run=_run)

    answer = of_sr2se.add_parser(
        "answer",
        help="answer questions with early exit",
        description="Answers one question, or every row of a JSONL file, with the model and the gate of a run.",
        epilog="examples:\n"
        "  evolmm sr2se answer charts-sr2se --image chart.png --question 'Which bar is the tallest?'\n"
        "  evolmm sr2se answer charts-sr2se --input questions.jsonl --output answers.jsonl",
    )
    answer.add_argument("folder", help="the output_dir of a run")
    answer.add_argument("--image", help="one image")
    answer.add_argument("--question", help="the question about it")
    answer.add_argument("--input", help="JSONL with image and question, and answer to be compared with")
    answer.add_argument("--output", help="JSONL to write")
    answer.add_argument("--image_root", help="folder that image paths in --input start from and may not leave")
    answer.add_argument("--batch_size", type=positive, help="prompts at a time")
    answer.set_defaults(run=_answer)


def _run(arguments: argparse.Namespace) -> int:
    from ..sr2se.generation import process_state
    from ..sr2se.pipeline import SR2SEConfig, run_pipeline

    summary = run_pipeline(SR2SEConfig.from_file(arguments.config, arguments.set), arguments.stage)
    process_state().print(json.dumps(summary, indent=2))
    return 0


def _answer(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from ..sr2se.pipeline import load_run
    from ..sr2se.rows import read_rows

    single, many = (arguments.image, arguments.question), (arguments.input, arguments.output)
    if (None in single) == (None in many) or any(single) == any(many):
        raise UsageError("Give --image and --question, or --input and --output.")
    if arguments.image is not None:
        reasoner = load_run(arguments.folder, arguments.batch_size)
        print(json.dumps(asdict(reasoner.generate(arguments.image, arguments.question)), indent=2))
        return 0
    rows = read_rows(arguments.input, ("question",), Path(arguments.input).parent, arguments.image_root)
    with output_file(arguments.output, arguments.input) as file:
        summary = answer_rows(
            load_run(arguments.folder, arguments.batch_size), rows, file, count_rows(arguments.input)
        )
        if not summary["answered"]:
            raise ValueError(
                f"Nothing in {arguments.input} could be answered: {summary['skipped']} rows were skipped, for the reasons "
                f"above. {arguments.output} is left as it was."
            )
    print(json.dumps(summary, indent=2))
    return 0


def answer_rows(reasoner, rows: Iterable, file: TextIO, total: int | None = None) -> dict:
    """
    Answers every row; what cannot be used is skipped, counted and named.

    Args:
        reasoner ([`~evolmm_trl.sr2se.EarlyExitReasoner`]):
            Answers.
        rows (`Iterable[Row or BadRow]`):
            What [`~evolmm_trl.sr2se.rows.read_rows`] gives, each with a question.
        file (`TextIO`):
            Gets JSONL with `image_path`, `question`, `answer`, `description`, `steps`, `scores`, `tokens`.
        total (`int`, *optional*):
            Rows, for the progress bar.

    Returns:
        `dict`: rows answered and skipped, mean steps and tokens, and the accuracy on rows with an answer.
    """
    from tqdm.auto import tqdm

    from ..data import UnreadableImageError
    from ..sr2se.early_exit import is_right
    from ..sr2se.rows import BadRow, Row, warn_of

    group, right, totals = [], [], {"answered": 0, "skipped": 0, "steps": 0, "tokens": 0}

    def flush() -> None:
        if not group:
            return
        rows, images = zip(*group, strict=True)
        for row, result in zip(rows, reasoner.generate(images, [row.question for row in rows]), strict=True):
            record = {
                "image_path": row.image_path,
                "question": row.question,
                "answer": result.answer,
                "description": result.description,
                "steps": result.steps,
                "scores": [round(score, 4) for score in result.scores],
                "tokens": result.tokens,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            totals["answered"] += 1
            totals["steps"] += len(result.steps)
            totals["tokens"] += result.tokens
            if row.answer is not None:
                right.append(is_right(result.answer, row.answer))
        bar.update(len(group))
        group.clear()

    bar = tqdm(desc="answers", unit="row", total=total, disable=None)
    for row in rows:
        if isinstance(row, Row):
            try:
                group.append((row, reasoner.policies.image(row.image_path)))
            except UnreadableImageError as error:
                row = BadRow(row.index, row.image_path, f"unreadable image: {error.reason}")
        if isinstance(row, BadRow):
            warn_of(row, totals["skipped"])
            totals["skipped"] += 1
            bar.update()
        if len(group) == 4 * reasoner.policies.batch_size:
            flush()
    flush()
    bar.close()
    answered = max(totals["answered"], 1)
    return {
        "answered": totals["answered"],
        "skipped": totals["skipped"],
        "mean_steps": totals["steps"] / answered,
        "mean_tokens": totals["tokens"] / answered,
        "accuracy": sum(right) / len(right) if right else None,
    }
