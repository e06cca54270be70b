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
The commands of `evolmm`, a module each.

A module has one function, `add_command(commands)`. It adds a parser to `commands`, argparse's subparsers, with `help` (a
few words), `description` (what it does) and `epilog` (an example), and sets `run` to a function of the parsed arguments
that returns the exit status or `None`. Nothing heavy is imported at a module's top level: `evolmm --help` is there at once.

What a user did wrong is raised as [`UsageError`], `ValueError` or `OSError` with a message that names the cure. It is shown
as one line, without a traceback.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class UsageError(Exception):
    """The arguments cannot be used as they were given: exit status 2."""


def visible(text: str, limit: int = 1000) -> str:
    """A stranger's text for a terminal: on one line, without what would steer it, and not endless."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}... ({len(text):,} characters)"


@contextmanager
def output_file(path: str, *sources: str | None) -> Iterator[TextIO]:
    """
    A file to write, which takes the place of what is at `path` once it is whole. Until then it is `path` with `.part`.

    Args:
        path (`str`):
            The file.
        *sources (`str` or `None`):
            What is read from.

    Yields:
        `TextIO`

    Raises:
        [`UsageError`]: if `path` is one of `sources`, or cannot be a file.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise UsageError(
            f"There is no folder {str(target.parent)!r} to write {target.name!r} to. Make it, or check the path."
        )
    if target.exists() and not target.is_file():
        raise UsageError(f"{path!r} is there and is no file. Give another path to write to.")
    if target.exists() and any(
        os.path.samefile(target, source) for source in sources if source and os.path.exists(source)
    ):
        raise UsageError(f"{path!r} is read from and would be overwritten. Give another path to write to.")
    part = target.with_name(f"{target.name}.part")
    file = open(part, "w", encoding="utf-8")
    try:
        with file:
            yield file
    except BaseException:
        if part.stat().st_size:
            print(f"What was written until then is in {part}.", file=sys.stderr)
        else:
            part.unlink()
        raise
    os.replace(part, target)


def count_rows(file: str) -> int:
    """The rows of a JSONL file, for the length of a progress bar."""
    with open(file, "rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
