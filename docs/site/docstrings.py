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

"""Docstrings in the form of Hugging Face's libraries, as MyST Markdown."""

import re
from textwrap import dedent, indent


OUR = "evolmm_trl"
_OTHERS = {"transformers", "peft", "datasets", "trl", "accelerate", "torch"}
_SECTION = re.compile(r"^(Args|Parameters|Returns|Yields|Raises|Examples?):$", re.MULTILINE)
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")
_TITLES = {"Args": "Parameters", "Examples": "Example"}


def markdown(doc: str) -> str:
    """A docstring in the form of Hugging Face's libraries as MyST Markdown."""
    before, *parts = _SECTION.split(doc)
    text = [before]
    for title, part in zip(parts[::2], parts[1::2], strict=True):
        # What is not indented does not belong to the section; an example is not indented at all
        inside, _, after = (part, "", "") if title.startswith("Example") else _at_dedent(part)
        shown = _TITLES.get(title, title)
        text += [f"**{shown}**", _entries(shown, dedent(inside).strip("\n")), after]
    joined = "\n\n".join(part.strip("\n") for part in text if part.strip())
    return _outside_code(joined)


def _at_dedent(part: str) -> tuple[str, str, str]:
    found = re.search(r"^(?=\S)", part, re.MULTILINE)
    return (part, "", "") if found is None else (part[: found.start()], "", part[found.start() :])


def _entries(title: str, text: str) -> str:
    if title == "Raises":
        return re.sub(r"^(?=\[?`[~\w.]+`\]?[:,]| ?- )", "- ", text, flags=re.MULTILINE)
    if title != "Parameters":
        return text
    entries = []
    for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if entry.strip():
            head, _, body = entry.partition("\n")
            body = indent(dedent(body).strip("\n"), "  ")[2:] or "See above."
            entries.append(f"{_head(head.rstrip(':'))}\n: {body}")
    return "\n\n".join(entries)


def _head(head: str) -> str:
    """`a (`int`), b (`str`)` with the names in bold. Commas in parentheses belong to a type."""
    parts, depth = [""], 0
    for character in head:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return ",".join(re.sub(r"^(\s*)(\*{0,2}\w+)(?= \(|$)", r"\1**`\2`**", part) for part in parts)


def _outside_code(text: str) -> str:
    """References as roles and doctests as such, outside of blocks of code."""
    pieces = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    pieces[::2] = [_REFERENCE.sub(_reference, piece) for piece in pieces[::2]]
    pieces[1::2] = [re.sub(r"^( *```)python\n(?= *>>>)", r"\1pycon\n", piece) for piece in pieces[1::2]]
    return "".join(pieces)


def _reference(match: re.Match) -> str:
    short, path = match.groups()
    ours = not short or path.split(".")[0] not in _OTHERS
    name = path.rsplit(".", 1)[-1] if short else path
    target = path if path.startswith(f"{OUR}.") else f".{name}"
    return f"{{py:obj}}`{name} <{target}>`" if ours else f"`{name}`"
