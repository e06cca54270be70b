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
The directive `api`: functions and classes with their docstrings, which are Markdown in the form of Hugging Face's libraries.

    ```{api} evolmm_trl
    ask
    Reply
    ```
"""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module

from docstrings import OUR, markdown
from sphinx.util.docutils import SphinxDirective


class Api(SphinxDirective):
    """Documents the named objects of a module."""

    required_arguments = 1
    has_content = True

    def run(self) -> list:
        module = self.arguments[0]
        text = [document(module, name) for name in (line.strip() for line in self.content) if name]
        return self.parse_text_to_nodes("\n\n".join(text))


def document(module: str, name: str) -> str:
    """The Markdown of one function or class."""
    thing = getattr(import_module(module), name)
    doc = inspect.getdoc(thing)
    if not doc:
        raise ValueError(f"{module}.{name} has no docstring.")
    if not inspect.isclass(thing):
        return _directive("function", f"{module}.{name}{_signature(thing)}", markdown(doc))
    body = [markdown(doc)]
    for member, value in vars(thing).items():
        if member.startswith("_") or not (doc := inspect.getdoc(value)) or not _is_ours(value):
            continue
        if isinstance(value, property):
            body.append(_directive("property", member, markdown(doc), 6))
        else:
            kind = "staticmethod" if isinstance(value, staticmethod) else "method"
            call = getattr(thing, member)
            signature = re.sub(r"^\(self(, )?", "(", _signature(call))
            body.append(_directive(kind, f"{member}{signature}", markdown(doc), 6))
    return _directive("class", f"{module}.{name}{_class_signature(thing)}", "\n\n".join(body))


def _is_ours(value) -> bool:
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inspect.isfunction(function) and function.__module__.startswith(OUR) and bool(function.__doc__)


def _directive(kind: str, head: str, body: str, ticks: int = 9) -> str:
    fence = "`" * ticks
    return f"{fence}{{py:{kind}}} {head}\n\n{body}\n{fence}"


def _signature(function) -> str:
    """Without types, which the docstring has in words."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    plain = [p if p.default is inspect.Parameter.empty else p.replace(default=_Shown(p.default)) for p in plain]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _class_signature(thing: type) -> str:
    if issubclass(thing, Exception):
        return ""
    if not is_dataclass(thing):
        signature = _signature(thing.__init__) if "__init__" in vars(thing) else "()"
        return re.sub(r"^\(self(, )?", "(", signature)
    own = [field for field in fields(thing) if field.init and field.name in thing.__annotations__]
    shown = []
    for field in own:
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown.append(field.name if default is MISSING else f"{field.name}={_Shown(default)!r}")
    inherited = ["**kwargs"] if len(own) < sum(field.init for field in fields(thing)) else []
    return f"({', '.join([*shown, *inherited])})"


class _Shown:
    """A default as it is shown."""

    def __init__(self, value):
        self.text = value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else repr(value)
        if len(self.text) > 60 or "<" in self.text:
            self.text = "..."

    def __repr__(self) -> str:
        return self.text


def setup(app) -> dict:
    app.add_directive("api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
