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

"""
Measures the same on a GPU, with randomly initialised Qwen2.5-VL-3B and 7B in bfloat16 and gradient checkpointing.

    python benchmarks/bench_gpu.py --output docs/benchmarks/gpu
    python benchmarks/bench_gpu.py --device cpu --model tiny --side 56 --completion 4     # to see that everything runs
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import headline, measure, quiet, write
from bench_contenders import CONTENDERS, Setting
from bench_models import SIZES
from bench_report import Point, Result, as_json, environment, gpu_table, tables


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the tables (.md) and all figures (.json)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["3b", "7b"])
    parser.add_argument("--side", nargs="+", type=int, default=[512, 1024], help="pixels of an image's side")
    parser.add_argument("--answers", nargs="+", type=int, default=[5, 8], help="answers N per question")
    parser.add_argument("--images", type=int, default=4, help="images per optimizer step")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["sequential", "grpo", "evolmm"])
    parser.add_argument("--completion", type=int, default=128, help="tokens of every question and answer")
    parser.add_argument("--proposer_update_every", type=int, default=5, help="solver steps before a proposer step")
    parser.add_argument("--repetitions", type=int, default=2)
    return parser


def main(arguments: list[str] | None = None) -> list[Result]:
    args = make_parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device was found. `--device cpu --model tiny` runs the same at toy size.")
    machine, results, start = environment(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model:
            for side in args.side:
                for answers in args.answers:
                    setting = Setting(
                        model=model,
                        height=side,
                        width=side,
                        answers=answers,
                        images=args.images,
                        completion=args.completion,
                        proposer_update_every=args.proposer_update_every,
                        device=args.device,
                        dtype="bfloat16",
                        checkpointing=True,
                    )
                    point = Point(side, answers, args.images)
                    results += measure(point, setting, args.contenders, args.repetitions, Path(folder))
                    taken = time.perf_counter() - start
                    print(f"{model}, {side} pixels, N={answers}: {taken:.0f} s", file=sys.stderr)
    text = "\n\n".join([headline(args, machine, taken), gpu_table(results), tables(results)])
    document = as_json(results, machine=machine, arguments=vars(args) | {"output": str(args.output)})
    write(args.output, text, document)
    return results


if __name__ == "__main__":
    quiet()
    main()
