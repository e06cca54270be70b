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

"""The command line: fast to start, and what a user does wrong is one line that names the cure."""

import argparse
import importlib
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import yaml

from evolmm_trl import cli
from evolmm_trl.commands import ask, demo, train, visible


ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}
COMMANDS = [command.__name__.rsplit(".", 1)[1] for command in cli.COMMANDS]
REQUIRED = ["--image_dir", "images", "--output_dir", "out", "--use_cpu"]


def run(*arguments) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def error_of(capsys) -> str:
    """What was said on standard error, which is one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("evolmm", "Traceback"))]
    assert len(lines) == 1, lines
    assert re.match(r"evolmm( \w+)*: error: ", lines[0])
    return lines[0]


def parser_of(name: str) -> argparse.ArgumentParser:
    (of_commands,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return of_commands.choices[name]


# Start-up and help


def test_help_is_there_at_once():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "evolmm_trl.cli", "--help"]
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5  # of a processor, whatever else the machine does


def test_no_help_waits_for_the_libraries():
    code = f"""
import sys
from evolmm_trl import cli
for name in {["", *COMMANDS]}:
    try:
        cli.main([*name.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
print([name for name in ("torch", "transformers", "trl", "datasets", "numpy", "PIL", "yaml") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_says_what_it_does_with_an_example(name, capsys):
    parser = parser_of(name)
    assert len(parser.description) > 50
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers = action.choices.values()
    for leaf in parsers:
        assert all(action.help for action in leaf._actions), leaf.prog
        examples = re.findall(r"^  (evolmm (?:.*\\\n)*.*)", leaf.epilog, re.MULTILINE)
        assert examples, leaf.prog
        for example in examples:
            words = shlex.split(example.replace("\\\n", " "))[1:]
            _, unknown = cli.make_parser().parse_known_args(words)
            assert unknown == [] or name == "train"


def test_the_options_that_the_help_of_train_names_exist():
    from evolmm_trl.training import launch_options, make_parser

    known = {"--config", "--accelerate_config", "--help_all", *make_parser()._option_string_actions, *launch_options()}
    text = train._OPTIONS + train._EXAMPLES
    named = set(re.findall(r"--\w+", text))
    assert len(named) > 15 and named <= known


def test_help_all_lists_the_fields(capsys):
    assert run("train", "--help_all") == 0
    assert "--proposer_update_every" in capsys.readouterr().out


# Errors


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("", 2, "required: command"),
        ("trian", 2, "invalid choice: 'trian'"),
        ("ask --modle x", 2, "required: --model"),
        ("ask --model m --imgae x", 2, r"unrecognized arguments: --imgae \(did you mean --image\?\)"),
        ("ask --model m", 2, "Give --image, or --input"),
        ("ask --model m --image x", 2, "Give a question"),
        ("ask --model m --input x why", 2, "Give a question"),
        ("ask --model m --image x why --samples 0", 2, "'0' is no whole number from 1 on"),
        ("ask --model m --image nothing.png why", 1, "There is no image or folder 'nothing.png'"),
        ("ask --model m --input nothing.jsonl", 1, "There is no file or folder 'nothing.jsonl'"),
        ("ask --model m --image {image} why --prompts nothing.json", 1, "nothing.json"),
        ("ask --model m --image {image} why --prompts {image}", 1, "codec can't decode"),
        ("ask --model no/model --image {image} why", 1, "connect|no/model"),
        ("sr2se run nothing.yaml", 1, "nothing.yaml"),
        ("train recipe.yaml", 2, "A recipe is given as --config recipe.yaml"),
        ("train --config", 2, "--config was given no file"),
        ("train --config nothing.yaml", 2, "There is no file 'nothing.yaml'"),
        ("train --learning_rte 1", 2, "unknown option --learning_rte. Did you mean --learning_rate?"),
        ("train --num_processs 2", 2, "Did you mean --num_processes?"),
        ("train --max_steps ten {required}", 2, "invalid int value: 'ten'"),
        ("train --output_dir out --use_cpu", 2, "required: --image_dir"),
        ("train {required}", 2, "--model_name_or_path is missing"),
        ("train {required} --model_name_or_path m --num_generations 1", 2, "at least 2 generations"),
        ("train {required} --model_name_or_path m --max_steps 1", 1, "There are no images|no such folder"),
        (
            "train --accelerate_config nothing.yaml {required}",
            2,
            "There is no file 'nothing.yaml', which --accelerate",
        ),
        ("train --num_processes two {required}", 2, "invalid int value: .two."),
        ("train --multi_gpu recipe.yaml {required}", 2, "'recipe.yaml' belongs to no option"),
    ],
)
def test_what_a_user_does_wrong_is_one_line(line, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert run(*line.format(required=" ".join(REQUIRED), image="image.png").split()) == status
    assert re.search(message, error_of(capsys))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("num_generation: 5", "unknown key 'num_generation'. Did you mean num_generations?"),
        ("xyzzy: 5", "unknown key 'xyzzy'.$"),
        ("5: 5", "unknown key 5"),
        ("num_processes: 2", "is an option of `accelerate launch`. Pass it on the command line, as --num_processes"),
        ("max_steps: 1.5", "--max_steps/--max-steps: invalid int value: '1.5'"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("- learning_rate", "holds list, expected lines such as"),
        ("", "holds NoneType"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_line(recipe, message, capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    for option in (["--config", path], [f"--config={path}"]):
        assert run("train", *option, *REQUIRED) == 2
        assert re.search(message, error_of(capsys))


def test_the_command_line_replaces_what_the_recipe_says(tmp_path):
    from evolmm_trl.training import make_parser

    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"learning_rate": 1e-3, "max_steps": 7, "use_peft": True, "image_include": ["a", "b"]})
    )
    data, args, model = make_parser().parse_args_and_config([f"--config={path}", "--max_steps", "9", *REQUIRED])
    assert (args.learning_rate, args.max_steps, model.use_peft, data.image_include) == (1e-3, 9, True, ["a", "b"])


def test_where_an_error_comes_from_is_shown_on_request(capsys, tmp_path):
    assert run("ask", "--model", "m", "--image", tmp_path / "no.png", "why", "--traceback") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch):
    def broken(arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(ask, "_run", broken)
    with pytest.raises(KeyError, match="a bug"):
        run("ask", "--model", "m")


def test_an_interrupt_has_the_shells_status(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "_run", interrupted)
    assert run("ask", "--model", "m") == 130
    assert capsys.readouterr().err == "evolmm: interrupted\n"


def test_what_a_stranger_wrote_does_not_steer_the_terminal():
    assert visible("\x1b[31mred\n\u202eevil\ud800\x00") == "\\x1b[31mred\\n\\u202eevil\\ud800\\x00"
    assert visible("ünï 日本") == "ünï 日本"
    assert len(visible("x" * 10**6)) < 1100


# evolmm train


@pytest.fixture
def devices(monkeypatch):
    import torch

    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return lambda number: monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("number", "environment", "given", "launch"),
    [
        (0, {}, [], None),
        (1, {}, [], None),
        (4, {}, [], []),
        (4, {}, ["--use_cpu"], None),
        (4, {"WORLD_SIZE": "4"}, [], None),
        (4, {"ACCELERATE_MIXED_PRECISION": "no"}, [], None),
        (1, {}, ["--num_processes", "2"], ["--num_processes", "2"]),
        (1, {}, ["--accelerate_config", "a.yaml", "--multi_gpu"], ["--config_file", "a.yaml", "--multi_gpu"]),
    ],
)
def test_train_launches_what_is_not_launched(number, environment, given, launch, devices, monkeypatch):
    from evolmm_trl.training import make_parser

    devices(number)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours = ["--config", "r.yaml", "--max_steps", "-1"]
    kept = [word for word in given if word == "--use_cpu"]
    assert train._split(make_parser(), [*ours[:2], *given, *ours[2:]]) == ([*ours[:2], *kept, *ours[2:]], launch)


def test_train_hands_its_options_to_the_launcher_and_fails_with_it(monkeypatch, capsys):
    launched = []
    launch = importlib.import_module("accelerate.commands.launch")
    monkeypatch.setattr(launch, "launch_command", launched.append)
    assert run("train", "--num_processes", "2", "--max_steps", "3", "--image_dir", "images") == 0
    (given,) = launched
    assert (given.num_processes, given.module, given.training_script) == (2, True, "evolmm_trl.cli")
    assert given.training_script_args == ["train", "--max_steps", "3", "--image_dir", "images"]

    def fails(given):
        raise CalledProcessError(1, "python")

    monkeypatch.setattr(launch, "launch_command", fails)
    assert run("train", "--num_processes", "2", "--max_steps", "3") == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "shown"), [(0, False), (1, True)])
def test_the_traceback_of_what_cannot_be_repeated_cheaply_is_shown(steps, shown, monkeypatch, capsys):
    from types import SimpleNamespace

    from evolmm_trl import training

    def fails(trainer):
        raise ValueError("after hours")

    monkeypatch.setattr(training, "make_trainer", lambda *_: SimpleNamespace(state=SimpleNamespace(global_step=steps)))
    monkeypatch.setattr(training, "train", fails)
    assert run("train", *REQUIRED, "--model_name_or_path", "m") == 1
    error = capsys.readouterr().err
    assert error.endswith("evolmm: error: after hours\n")
    assert ("Traceback" in error) is shown


@pytest.mark.parametrize("name", ["noev", "./no/ev"])
def test_an_eval_dataset_that_is_nowhere_is_named_with_its_option(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    images = str(ROOT / "docs" / "benchmarks")
    options = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--use_cpu", "--max_steps", "1"]
    assert run("train", "--image_dir", images, "--eval_dataset", name, *options) == 1
    assert f"`eval_dataset` is {name!r}: there is no such folder or file here (the w" in capsys.readouterr().err


# evolmm demo


def test_the_demo_runs_in_a_clone_and_says_so_elsewhere(tmp_path, monkeypatch, capsys):
    ran = []

    def record(command):
        ran.append(command)
        return argparse.Namespace(returncode=3)

    monkeypatch.setattr(demo.subprocess, "run", record)
    assert run("demo", "--base", "noisy", "--output_dir", tmp_path) == 1
    (command,) = ran
    script, model = Path(command[1]), Path(command[command.index("--model") + 1])
    assert script.name == "demo.py" and script.is_file() and (model / "config.json").is_file()
    known = importlib.import_module("demo")
    assert {word for word in command if word.startswith("--")} <= set(
        re.findall(r'"(--\w+)"', Path(known.__file__).read_text())
    )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_CLONE", tmp_path)
    assert run("demo") == 2
    assert "in a clone of it" in error_of(capsys)


def test_a_command_ends_the_threads_of_its_process_group(capsys):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert cli.main(["train", "--help_all"]) == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
