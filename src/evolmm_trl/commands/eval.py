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

"""`evolmm eval`."""

import argparse
import sys

from . import positive


def add_command(commands) -> None:
    """Adds `eval` to the parser of `evolmm`."""
    parser = commands.add_parser(
        "eval",
        help="benchmarks, through lmms-eval",
        description="Evaluates a base model, its solver or its proposer on benchmarks, through lmms-eval, and logs every\n"
        "answer, for `evolmm compare`. Needs `pip install 'evolmm-trl[eval]'`.",
        epilog="examples:\n"
        "  evolmm eval --model Qwen/Qwen2.5-VL-7B-Instruct --tasks chartqa,ai2d --output_dir eval/base\n"
        "  evolmm eval --model Qwen/Qwen2.5-VL-7B-Instruct --adapter charts-evolmm --tasks chartqa,ai2d --output_dir eval/solver\n"
        "on 8 GPUs:\n"
        "  accelerate launch --num_processes 8 -m evolmm_trl.cli eval ...",
    )
    parser.add_argument("--model", required=True, help="the base model: id on the Hub or folder")
    parser.add_argument(
        "--adapter", help="the trained adapters, id on the Hub or folder; without it the base model answers"
    )
    parser.add_argument(
        "--role", choices=("solver", "proposer"), default="solver", help="whose adapter answers (solver)"
    )
    parser.add_argument("--tasks", required=True, help="names of lmms-eval's tasks, joined by commas")
    parser.add_argument("--output_dir", required=True, help="folder for the logs, without an evaluation in it")
    parser.add_argument(
        "--prompt",
        default="task",
        help="task: ask in the task's words; solver: in the solver's prompt, and score what stands between the answer "
        "tags; or a JSON file with other prompts (task)",
    )
    parser.add_argument("--batch_size", type=positive, default=8, help="questions at a time (8)")
    parser.add_argument("--limit", type=positive, help="only the first questions of each task")
    parser.add_argument("--include_path", metavar="FOLDER", help="tasks of your own")
    parser.add_argument("--min_pixels", type=positive, help="enlarge smaller images to this area (the processor's)")
    parser.add_argument("--max_pixels", type=positive, help="shrink larger images to this area (the processor's)")
    parser.add_argument("--max_new_tokens", type=positive, help="longest answer, in tokens (the task's)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="precision of the weights"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..evaluation.benchmarks import evaluate

    options = ("adapter", "role", "prompt", "batch_size", "limit", "include_path", "max_new_tokens", "dtype")
    scores = evaluate(
        arguments.model,
        [task for task in arguments.tasks.split(",") if task],
        arguments.output_dir,
        **{name: getattr(arguments, name) for name in (*options, "min_pixels", "max_pixels")},
    )
    if scores is not None:
        print("| benchmark | questions | score |\n|---|---|---|")
        for task, (questions, score) in scores.items():
            print(f"| {task} | {questions} | {'not a mean' if score is None else f'{100 * score:.2f}'} |")
        print(f"The logs are in {arguments.output_dir}.", file=sys.stderr)
    return 0
