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

"""`evolmm report`."""

import argparse

from . import UsageError


def add_command(commands) -> None:
    """Adds `report` to the parser of `evolmm`."""
    report = commands.add_parser(
        "report",
        help="a page about a run, or about two side by side",
        description="Writes a page about a run: curves, the entropy of the answers over time, and a gallery of what was asked\n"
        "and answered. It is one HTML file that opens from disk. The run may still be going on.",
        epilog="examples:\n"
        "  evolmm report charts-evolmm\n"
        "  evolmm report runs/continuous runs/discrete --output both.html",
    )
    report.add_argument(
        "folders", metavar="RUN", nargs="+", help="output_dir of a run, or its rollouts.jsonl; one or two"
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        help="page to write (default: _report/report.html in the first RUN, or _report/LOG.html for a log of another name)",
    )
    report.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if len(arguments.folders) > 2:
        raise UsageError(f"A page is about one run or two, not {len(arguments.folders)}.")
    from ..report import write_report

    print(write_report(arguments.folders, arguments.output))
