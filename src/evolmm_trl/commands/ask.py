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

"""`evolmm ask`."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from . import UsageError, count_rows, output_file, positive, visible


_DESCRIPTION = """\
Asks a model questions about images: one question about an image or about every image of a folder, or a JSONL file with
a question per row. With --samples N it answers N times and gives the majority, and how far the answers agree: how sure
the model is, not how often it is right. Rows and images that cannot be read are skipped, counted and named.
"""
_EXAMPLES = """\
examples:
  evolmm ask --model Qwen/Qwen2.5-VL-7B-Instruct --adapter charts-evolmm --image chart.png "Which bar is the tallest?"
  evolmm ask --model Qwen/Qwen2.5-VL-7B-Instruct --adapter charts-evolmm --samples 10 --image charts/ "What is shown?"
  evolmm ask --model Qwen/Qwen2.5-VL-7B-Instruct --adapter charts-evolmm --input questions.jsonl --output answers.jsonl

  a row of questions.jsonl: {"image": "charts/0001.png", "question": "Which bar is the tallest?"}
"""


def add_command(commands) -> None:
    """Adds `ask` to the parser of `evolmm`."""
    parser = commands.add_parser("ask", help="ask a model about images", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("question", nargs="?", help="the question about --image")
    parser.add_argument("--model", required=True, help="the base model: id on the Hub or folder")
    parser.add_argument(
        "--adapter", help="the trained adapters, id on the Hub or folder; without it the base model answers"
    )
    parser.add_argument("--image", help="an image, or a folder of images")
    parser.add_argument(
        "--input", metavar="FILE", help="JSONL with image (a path from the file's folder) and question"
    )
    parser.add_argument(
        "--image_root", metavar="FOLDER", help="where the images of --input may be (the file's folder, this folder)"
    )
    parser.add_argument("--samples", type=positive, default=1, metavar="N", help="answers per question (1, greedy)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of several samples (1.0)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per question")
    parser.add_argument("--output", metavar="FILE", help="write the JSON objects to a file instead of printing")
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSON or YAML with its prompts (those that were saved with what was trained)"
    )
    parser.add_argument("--max_new_tokens", type=positive, default=128, help="longest answer, in tokens (128)")
    parser.add_argument(
        "--max_pixels", type=positive, default=1_003_520, help="shrink larger images to this area (1003520)"
    )
    parser.add_argument("--batch_size", type=positive, default=8, help="questions at a time (8)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="precision of the weights"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if (arguments.image is None) == (arguments.input is None):
        raise UsageError("Give --image, or --input with a question per row.")
    if (arguments.question is None) != (arguments.image is None):
        raise UsageError("Give a question with --image; the rows of --input hold theirs.")

    import torch
    from tqdm.auto import tqdm

    from ..asking import ask
    from ..solver import load_solver

    rows, total = _rows(arguments)
    options = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    prompts = _given_prompts(arguments.prompts)
    names = ("samples", "temperature", "max_new_tokens", "max_pixels", "batch_size", "seed")
    settings = {name: getattr(arguments, name) for name in names}

    answered = skipped = 0
    file = nullcontext(sys.stdout)
    if arguments.output:
        file = output_file(arguments.output, arguments.input, arguments.image, arguments.prompts)
    # The bar is on standard error, and only if that is a terminal
    with file as out, tqdm(total=total, unit="question", disable=None if total > 1 else True) as bar:
        model, processor = load_solver(arguments.model, arguments.adapter, dtype=arguments.dtype, **options)
        prompts = prompts or _saved_prompts(arguments)
        for batch in _batches(_usable(rows, processor, arguments), arguments.batch_size):
            asked = [entry for entry in batch if not isinstance(entry, str)]
            for reason in (entry for entry in batch if isinstance(entry, str)):
                if total == 1 and arguments.image:
                    raise ValueError(reason)
                skipped += 1
                if skipped <= 20:
                    tqdm.write(f"skipped {reason}", file=sys.stderr)
                elif skipped == 21:
                    tqdm.write("What else is skipped is counted and not named.", file=sys.stderr)
            try:
                replies = ask(
                    model,
                    processor,
                    [image for _, image, _ in asked],
                    [question for _, _, question in asked],
                    prompts=prompts,
                    **settings,
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"Out of memory with {arguments.batch_size} questions at a time and {arguments.samples} answers each. "
                    "Lower --batch_size, --samples, --max_pixels or --max_new_tokens."
                ) from error
            for (row, _, question), reply in zip(asked, replies, strict=True):
                record = _record(row, question, reply)
                as_json = arguments.json or arguments.output
                line = json.dumps(record, ensure_ascii=False) if as_json else _text(record, alone=total == 1)
                tqdm.write(line, file=out)
            answered += len(asked)
            bar.update(len(batch))
        if total != 1:
            tqdm.write(f"{answered} answered, {skipped} skipped", file=sys.stderr)
        if not answered:
            raise ValueError(f"Nothing in {arguments.input or arguments.image} could be answered.")
    return 0


def _rows(arguments: argparse.Namespace) -> tuple[Iterator, int]:
    """The rows to answer, one at a time, and how many they are."""
    from ..data import load_images
    from ..sr2se.rows import Row, read_rows

    if arguments.input is not None:
        rows = read_rows(arguments.input, ("question",), Path(arguments.input).parent, arguments.image_root)
        return rows, count_rows(arguments.input)
    path = Path(arguments.image)
    if path.is_dir():
        images = load_images(path, streaming=False)
        return read_rows(images, (), path), len(images)
    if not path.is_file():
        raise FileNotFoundError(f"There is no image or folder {arguments.image!r}. Check the path.")
    return iter([Row(0, str(path))]), 1


def _usable(rows: Iterator, processor, arguments: argparse.Namespace) -> Iterator:
    """Of each row the row, its image and its question, or why it cannot be used."""
    from ..asking import clean_question
    from ..data import UnreadableImageError, decode_image
    from ..sr2se.rows import BadRow

    for row in rows:
        if isinstance(row, BadRow):
            cure = "; --image_root names another" if row.reason == "path outside the image root" else ""
            yield f"{visible(row.where, 300)}: {visible(row.reason)}{cure}"
            continue
        try:
            question = row.question or arguments.question
            clean_question(question, processor)
            yield row, decode_image(row.image_path, arguments.max_pixels), question
        except UnreadableImageError as error:
            yield f"{visible(row.image_path, 200)}: unreadable image: {visible(str(error))}"
        except ValueError as error:
            where = f"{Path(arguments.input).name}:{row.index + 1}" if arguments.input else row.image_path
            yield f"{visible(where, 200)}: {visible(str(error))}"


def _batches(entries: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(entries, size)):
        yield batch


def _given_prompts(path: str | None):
    import yaml

    from ..prompts import RolePrompts

    if path is None:
        return None
    try:
        prompts = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is neither JSON nor YAML: {error}") from error
    return RolePrompts.from_dict(prompts)


def _saved_prompts(arguments: argparse.Namespace):
    from ..prompts import RolePrompts
    from ..solver import load_prompts

    trained = arguments.adapter or arguments.model
    prompts = load_prompts(trained)
    if prompts is None and arguments.adapter is not None:
        print(
            f"With which prompts {visible(trained)} was trained is not known: it is asked with the default ones. "
            "--prompts names a file with others.",
            file=sys.stderr,
        )
    return prompts or RolePrompts()


def _record(row, question: str, reply) -> dict:
    record = {"row": row.index, "image": row.image_path, "question": question, "answer": reply.answer}
    if len(reply.completions) > 1:
        record |= {"agreement": round(reply.vote.agreement, 4), "votes": reply.vote.counts}
    return record | {"completions": list(reply.completions)}


def _text(record: dict, alone: bool) -> str:
    """An answer for people: on its own, with the other answers, or on a line of its own behind the image."""
    answer = record["answer"]
    shown = "(no readable answer)" if answer is None else visible(answer)
    if not alone:
        shown = f"{visible(record['image'])}\t{shown}"
        return f"{shown}\t{record['agreement']:.2f}" if "votes" in record else shown
    if "votes" not in record:
        return shown if answer is not None else f"{shown}: {visible(record['completions'][0])}"
    total, votes = len(record["completions"]), record["votes"]
    counts = [f"{visible(text, 50)}: {count}" for text, count in votes.items()]
    counts += [f"unreadable: {total - sum(votes.values())}"] * (total > sum(votes.values()))
    return f"{shown}\nagreement {record['agreement']:.2f} of {total} answers ({', '.join(counts)})"
