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

"""The command `evolmm`."""

import argparse
from collections.abc import Sequence

from .sr2se.commands import add_commands as add_sr2se


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `evolmm ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="evolmm", description=__doc__)
    add_sr2se(parser.add_subparsers(required=True, metavar="command"))
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed) or 0


if __name__ == "__main__":
    raise SystemExit(main())
