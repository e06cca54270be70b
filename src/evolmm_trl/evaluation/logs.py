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

"""Per-sample logs of lmms-eval, read, and refused where two of them cannot be compared."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in a task's configuration
# Of lmms-eval's `config`, what changes what is asked or how it is decoded
_SETTINGS = ("gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_FIELDS = ("doc_id", "input", "target")  # of every sample


@dataclass(frozen=True)
class TaskLog:
    """
    One task of one evaluation.

    Args:
        path (`Path`):
            The log.
        questions (`tuple[dict, ...]`):
            In order of their index in the data: `doc_id`, `question`, `target` and, where they are logged, `images`.
        scores (`np.ndarray`):
            From 0 to 1, of shape `(questions,)`.
        settings (`dict`):
            Everything else that must be equal in two runs.
    """

    path: Path
    questions: tuple[dict, ...]
    scores: np.ndarray
    settings: dict

    @property
    def images(self) -> list[str] | None:
        """What the questions were about, digests of images, or `None` if the log does not say."""
        if any("images" not in question for question in self.questions):
            return None
        # A question without an image is alone
        return [" ".join(question["images"]) or f"{self.path}, {question['doc_id']}" for question in self.questions]


def read_evaluation(path: str | Path) -> dict[str, TaskLog]:
    """
    Reads what `evolmm eval`, or `lmms-eval --log_samples`, wrote.

    Args:
        path (`str` or `Path`):
            The output folder, in which each task was evaluated once, or a `..._results.json` in it.

    Returns:
        `dict[str, TaskLog]`: by task.

    Raises:
        `FileNotFoundError`: if there is no evaluation.
        `ValueError`: if a task was evaluated twice, a log is incomplete, or its scores cannot be read.
    """
    path = Path(path)
    files = sorted(path.rglob("*results.json")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(
            f"There is no evaluation in {str(path)!r}: expected a folder with ..._results.json, as `evolmm eval` writes, or "
            "such a file."
        )
    found: dict[str, TaskLog] = {}
    for file in files:
        results = _read_json(file)
        for task, config in results["configs"].items():
            if task in found:
                raise ValueError(
                    f"{task} was evaluated twice in {str(path)!r}: {found[task].path.name} and one beside {file.name}. Pass "
                    "the folder or the ..._results.json of one of them."
                )
            found[task] = _read_task(file, results, task, config)
    return found


def _read_json(file: Path) -> dict:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Was the evaluation cut off? Run it again.") from error
    if not isinstance(results, dict) or not isinstance(results.get("configs"), dict):
        raise ValueError(f"{file} is not lmms-eval's: it has no `configs`.")
    return results


def check_written(folder: Path) -> None:
    """Raises as [`read_evaluation`] does if a log in `folder` is missing or incomplete."""
    files = list(folder.rglob("*results.json"))
    if not files:
        raise FileNotFoundError(f"The evaluation was not written to {folder}. Is the disk full?")
    for file in files:
        results = _read_json(file)
        for task in results["configs"]:
            _read_samples(file, results, task)


def _read_samples(file: Path, results: dict, task: str) -> tuple[Path, list[dict]]:
    path = file.with_name(f"{file.name.removesuffix('results.json')}samples_{task}.jsonl")
    if not path.is_file():
        raise FileNotFoundError(
            f"{file} has no log of the samples of {task} beside it. Evaluate with `evolmm eval`, or with `--log_samples`."
        )
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            sample = json.loads(line)
        except ValueError:
            sample = None
        if not isinstance(sample, dict) or any(field not in sample for field in _FIELDS):
            raise ValueError(f"{path}, line {number}: expected a JSON object with {', '.join(_FIELDS)}.")
        samples.append(sample)
    samples.sort(key=lambda sample: sample["doc_id"])
    expected = results.get("n-samples", {}).get(task, {}).get("effective")
    if not samples or len({sample["doc_id"] for sample in samples}) != len(samples) or expected != len(samples):
        raise ValueError(
            f"{path} has {len(samples)} samples; expected {expected} different ones. Was the evaluation cut off? Run it again."
        )
    return path, samples


def _read_task(file: Path, results: dict, task: str, config: dict) -> TaskLog:
    path, samples = _read_samples(file, results, task)
    own = results.get("evolmm", {})
    if own.get("errors"):
        raise ValueError(
            f"{file} says that lmms-eval logged {own['errors']} errors, and an answer that a task cannot score counts as "
            "wrong. Run the evaluation again."
        )
    metric = main_metric(config)
    settings = {
        # Not lmms-eval's own `lmms_eval_version`, which is the commit of the folder that it was started in
        "lmms-eval": own.get("versions", {}).get("lmms-eval"),
        "task": json.loads(_ADDRESS.sub("", json.dumps(config))),
        "config": {name: results.get("config", {}).get(name) for name in _SETTINGS},
        "evolmm": own.get("settings"),
    }
    return TaskLog(
        path=path,
        questions=tuple(_question(sample) for sample in samples),
        scores=np.array([_sample_score(sample, metric, path) for sample in samples]),
        settings=settings,
    )


def _question(sample: dict) -> dict:
    question = {"doc_id": sample["doc_id"], "question": sample["input"], "target": sample["target"]}
    images = sample.get("evolmm", {}).get("images")
    return question if images is None else question | {"images": images}


def main_metric(config: Mapping) -> str:
    """The first metric of a task's configuration, which is the one that papers report."""
    metrics = config.get("metric_list")
    if not metrics:
        raise ValueError(
            f"The task {config.get('task')} names no metric in its configuration: give it a `metric_list`."
        )
    return metrics[0]["metric"]


def read_score(value) -> float | None:
    """
    The score in what a task of lmms-eval says of one answer.

    Args:
        value (`Any`):
            The metric's value.

    Returns:
        `float` or `None`: from 0 to 1; `None` if the value holds none.
    """
    if isinstance(value, dict):
        value = next((value[name] for name in ("score", "true_false", "scores") if name in value), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
        return float(value)
    return None


def _sample_score(sample: dict, metric: str, path: Path) -> float:
    score = sample["evolmm"]["score"] if "evolmm" in sample else read_score(sample.get(metric))
    if score is None:
        raise ValueError(
            f"{path}: `{metric}` of sample {sample['doc_id']} holds no score from 0 to 1. Evaluate with `evolmm eval`, which "
            "writes each sample's."
        )
    return float(score)


def check_comparable(runs: Mapping[str, Mapping[str, TaskLog]]) -> None:
    """
    Refuses runs that differ in anything but the model.

    Args:
        runs (`Mapping[str, Mapping[str, TaskLog]]`):
            By name, what [`read_evaluation`] read.

    Raises:
        `ValueError`: naming the first difference.
    """
    (first, one), *others = runs.items()
    for name, other in others:
        if set(one) != set(other):
            only = {
                a: sorted(set(x) - set(y)) for a, x, y in ((first, one, other), (name, other, one)) if set(x) - set(y)
            }
            told = " and ".join(f"only {run} has {', '.join(tasks)}" for run, tasks in only.items())
            raise ValueError(f"The runs have different benchmarks: {told}. Evaluate both on the same.")
        for task, log in one.items():
            _check_task(task, first, log, name, other[task])


def _check_task(task: str, first: str, one: TaskLog, name: str, other: TaskLog) -> None:
    if len(one.questions) != len(other.questions):
        raise ValueError(
            f"{task}: {first} has {len(one.questions)} questions and {name} has {len(other.questions)}. Evaluate both with "
            "the same `--limit`."
        )
    for mine, theirs in zip(one.questions, other.questions, strict=True):
        for field in ("doc_id", "question", "target", "images"):
            # Logs of lmms-eval's own models do not say which images
            if field in mine and field in theirs and mine[field] != theirs[field]:
                raise ValueError(
                    f"{task}, sample {mine['doc_id']}: the runs differ in `{field}`: {_short(mine[field])} in {first} and "
                    f"{_short(theirs[field])} in {name}. Only runs on the same questions with the same prompts can be compared."
                )
    difference = _first_difference(one.settings, other.settings)
    if difference:
        setting, mine, theirs = difference
        raise ValueError(
            f"{task}: the runs differ in the setting `{setting}`: {_short(mine)} in {first} and {_short(theirs)} in {name}. "
            "Evaluate both alike."
        )


def _first_difference(a, b, name: str = "") -> tuple | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(set(a) | set(b)):
            if difference := _first_difference(a.get(key), b.get(key), f"{name}.{key}".lstrip(".")):
                return difference
        return None
    return None if a == b else (name, a, b)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def stack(runs: Sequence[Mapping[str, TaskLog]], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """By task, the scores of several runs, of shape `(runs, questions)`."""
    return {task: np.stack([run[task].scores for run in runs]) for task in tasks}
