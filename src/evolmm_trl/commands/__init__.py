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


class UsageError(Exception):
    """The arguments cannot be used as they were given: exit status 2."""


def visible(text: str, limit: int = 1000) -> str:
    """A stranger's text for a terminal: on one line, without what would steer it, and not endless."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}... ({len(text):,} characters)"


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
