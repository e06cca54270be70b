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
Does SR2SE work on the demo model, and what of it?

    python examples/demo/sr2se_experiments.py run       # what is not done yet
    python examples/demo/sr2se_experiments.py report    # writes docs/experiments/sr2se.md's tables and the figure

Results go to `docs/experiments/sr2se_results.jsonl`, one line per job. Each seed has charts of its own to learn from: the
same ones for pairs and gates. All are measured on the same questions, about other charts.
"""

import argparse

from sr2se_jobs import run
from sr2se_tables import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--only", help="regular expression for job/seed")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.only)
    report()


if __name__ == "__main__":
    main()
