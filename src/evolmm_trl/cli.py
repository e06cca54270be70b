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
import difflib
import os
import sys
import traceback
from collections.abc import Sequence

from .commands import UsageError, ask, compare, demo, eval, report, sr2se, train, visible


COMMANDS = (train, eval, compare, ask, report, demo, sr2se)  # in the order of `evolmm --help`

_DESCRIPTION = "Train vision-language models from images nobody labelled, and see whether it worked."
_EPILOG = """\
`evolmm COMMAND --help` says what a command does, with an example.
exit status: 0 done, 1 failed, 2 the arguments cannot be used, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name of an option that does not exist."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        self.set_defaults(parser=self)  # of nested parsers, the innermost remains
        self.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from"
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}. `{self.prog} --help` says more.\n")

    def refuse(self, unknown: Sequence[str]):
        """Ends the program because of arguments that are not known."""
        names = [name for action in self._actions for name in action.option_strings]
        near = [near for name in unknown for near in difflib.get_close_matches(name.split("=")[0], names, 1)]
        hint = f" (did you mean {' and '.join(dict.fromkeys(near))}?)" if near else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `evolmm`."""
    parser = _Parser(prog="evolmm", description=_DESCRIPTION, epilog=_EPILOG)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)
    for command in COMMANDS:
        command.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs `evolmm ...`.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The command line. Defaults to that of the process.

    Returns:
        `int`: the exit status, 0 if it is done, 1 if it failed, 2 if the arguments cannot be used.
    """
    parsed, unknown = make_parser().parse_known_args(arguments)
    if getattr(parsed, "takes_more", False):
        parsed.more = unknown
    elif unknown:
        parsed.parser.refuse(unknown)
    try:
        status = parsed.run(parsed) or 0
        sys.stdout.flush()
        _leave_process_group()
        return status
    except (UsageError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # of `evolmm ask ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if getattr(parsed, "traceback", False):
            traceback.print_exc()
        print(f"evolmm: error: {visible(' '.join(str(error).split()), 2000)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("evolmm: interrupted", file=sys.stderr)
        return 130


def _leave_process_group() -> None:
    """Ends the threads that gloo has in one of several processes: left alone, they now and then abort it when all is done."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
