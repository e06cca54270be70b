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

"""`evolmm demo`."""

import argparse
import subprocess
import sys
from pathlib import Path

from . import UsageError


_CLONE = Path(__file__).parents[3]  # if the package is installed from a clone with `pip install -e`


def add_command(commands) -> None:
    """Adds `demo` to the parser of `evolmm`."""
    parser = commands.add_parser(
        "demo",
        help="train a tiny model on a CPU in minutes and measure it",
        description="Trains a tiny Qwen2.5-VL on bar charts that nobody labelled, on a CPU in minutes, and measures it before "
        "and\nafter on labelled ones. It runs from a clone of the repository, where the demo's models are.",
        epilog="example:\n  evolmm demo --output_dir runs/demo",
    )
    parser.add_argument("--output_dir", default="runs/demo", help="where everything goes (runs/demo)")
    parser.add_argument(
        "--base", default="room", choices=("room", "narrow", "noisy"), help="which of three models (room)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training (0)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    places = [root / "examples" / "demo" for root in (Path.cwd(), _CLONE)]
    folder = next((place for place in places if (place / "demo.py").is_file()), None)
    if folder is None:
        raise UsageError(
            "The demo is no part of the package: its models and scripts are in the repository. Run `evolmm demo` in a clone "
            "of it, or `make demo` there, which installs what it needs too."
        )
    options = ("--output_dir", arguments.output_dir, "--seed", str(arguments.seed))
    model = folder / "models" / arguments.base
    done = subprocess.run([sys.executable, str(folder / "demo.py"), "--model", str(model), *options])
    return 1 if done.returncode else 0
