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

import ast
import importlib
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import fmean

import pytest
from trl import GRPOConfig

import evolmm_trl
from evolmm_trl import EvoLMMConfig, cli, proposer_reward, solver_rewards, sr2se, vote
from evolmm_trl.training import TrainArguments, launch_options, make_parser


ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    return re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


# Configuration


def documented_fields() -> dict[str, str]:
    """Name and default of every row of the tables with five columns."""
    rows = (cells(line) for line in CONFIGURATION.splitlines() if line.startswith("| `"))
    return {row[0].strip("`"): row[2].strip("`") for row in rows if len(row) == 5}


def own_fields() -> dict:
    """The fields that `EvoLMMConfig` adds or states itself, and their defaults."""
    return {field.name: field.default for field in fields(EvoLMMConfig) if field.name in EvoLMMConfig.__annotations__}


def test_every_field_is_documented_with_its_default():
    documented = {name: ast.literal_eval(default) for name, default in documented_fields().items()}
    assert documented == own_fields()


def test_the_configs_docstring_names_every_new_field():
    inherited = {field.name for field in fields(GRPOConfig)}
    missing = [name for name in own_fields() if name not in inherited and f"{name} (`" not in EvoLMMConfig.__doc__]
    assert not missing


def refused_fields() -> list[tuple[str, object]]:
    rows = [cells(line) for line in section(CONFIGURATION, "Refused").splitlines() if line.startswith("| `")]
    return [(row[0].strip("`"), ast.literal_eval(row[1].strip("`"))) for row in rows]


@pytest.mark.parametrize(("name", "value"), refused_fields())
def test_fields_documented_as_refused_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        EvoLMMConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_inherited_fields_that_are_named_exist():
    rows = [cells(line)[0] for line in section(CONFIGURATION, "Inherited fields of use").splitlines()]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named
    assert named <= {field.name for field in fields(EvoLMMConfig)}


# How it works


def test_the_table_of_rewards_is_what_the_functions_give():
    text = (ROOT / "docs" / "how_it_works.md").read_text()
    rows = [cells(line) for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 7
    for counts, entropy, proposer, by_answer, mean in rows:
        answers = [str(i) for i, count in enumerate(counts.split(",")) for _ in range(int(count))]
        voted = vote(answers)
        rewards = solver_rewards(voted, [0] * len(answers))
        assert f"{voted.entropy:.4f}" == entropy
        assert f"{proposer_reward(voted.entropy):.4f}" == proposer
        assert ", ".join(f"{reward:.3f}" for reward in dict.fromkeys(rewards)) == by_answer
        assert f"{fmean(rewards):.3f}" == mean


# Troubleshooting


def test_the_messages_explained_are_those_of_the_code():
    source = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?[\'"]', "", source).replace("`", "")
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    text = text.replace(section(text, "Installation"), "")
    messages = re.findall(r"\*\*`([^`]+)`\*\*", text)
    assert len(messages) > 15
    parts = [part.strip(" ,") for message in messages for part in message.split("...")]
    assert [part for part in parts if part not in source] == []


# The command line


def test_the_options_of_train_itself_are_documented_with_their_defaults():
    rows = (cells(line) for line in section((ROOT / "docs" / "command_line.md").read_text(), "Train").splitlines())
    documented = {row[0].strip("`")[2:]: row[1].strip("`") for row in rows if row[0].startswith("`--")}
    defaults = {
        field.name: "" if field.default in (MISSING, None) else str(field.default) for field in fields(TrainArguments)
    }
    assert documented == defaults


# Every page


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile_and_import_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("evolmm_trl"):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_keyword_arguments_of_the_config_exist(page):
    known = {field.name for field in fields(EvoLMMConfig)}
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "EvoLMMConfig":
                assert {keyword.arg for keyword in node.keywords} <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_that_are_named_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    code = [*re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
    assert {name for part in code for name in re.findall(r"\bmake ([a-z][\w-]*)", part)} <= targets


@pytest.fixture(scope="module")
def train_options() -> set[str]:
    return {"--config", "--accelerate_config", *make_parser()._option_string_actions, *launch_options()}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_name_files_and_options_that_exist(page, train_options):
    for block in blocks(page, "bash"):
        for command in block.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            script = "examples/train_qwen.py"
            training = script in words or words[:2] == ["evolmm", "train"]
            if not training and words[:1] != ["evolmm"]:
                continue
            ours = words[words.index(script) :] if script in words else words[1:]
            if training:
                assert {word for word in ours if word.startswith("--")} <= train_options
                files = [word for word in words if word.endswith((".py", ".yaml"))]
                assert [file for file in files if "/" in file and not (ROOT / file).is_file()] == []
            elif "--help" not in words:
                _, unknown = cli.make_parser().parse_known_args(ours)  # exits if something is missing
                assert unknown == []


def test_the_readme_has_the_place_of_the_experiments():
    text = section((ROOT / "README.md").read_text(), "Experiments")
    assert text.index("<!-- experiments:begin -->") < text.index("<!-- experiments:end -->")


# The site


def test_every_public_name_has_its_place_in_the_api():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^\w+$", pages, re.MULTILINE))
    assert set(evolmm_trl.__all__) | set(sr2se.__all__) <= documented | {"__version__"}


def test_docstrings_become_markdown(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    markdown = importlib.import_module("docstrings").markdown
    doc = """Counts, as [`vote`] does ([EvoLMM](https://example.org)).

Args:
    a (`int`), b (`dict[str, int]`, *optional*, defaults to `{}`):
        What is
        counted.
    **kwargs:
        For [`~transformers.GenerationConfig`].

Returns:
    [`~evolmm_trl.voting.Vote`]: the vote.

Raises:
    `ValueError`: if it is
    empty.
    `OSError`: never.

Example:

```python
>>> vote([])  # [`vote`]
```

The end."""
    assert (
        markdown(doc)
        == """Counts, as {py:obj}`vote <.vote>` does ([EvoLMM](https://example.org)).

**Parameters**

**`a`** (`int`), **`b`** (`dict[str, int]`, *optional*, defaults to `{}`)
: What is
  counted.

**`**kwargs`**
: For `GenerationConfig`.

**Returns**

{py:obj}`Vote <evolmm_trl.voting.Vote>`: the vote.

**Raises**

- `ValueError`: if it is
empty.
- `OSError`: never.

**Example**

```pycon
>>> vote([])  # [`vote`]
```

The end."""
    )
