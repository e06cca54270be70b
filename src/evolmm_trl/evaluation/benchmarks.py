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

"""Benchmarks through lmms-eval: one model, many tasks, a log of every sample."""

import copy
import difflib
import inspect
import io
import logging
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from textwrap import shorten

from .logs import check_written, main_metric, read_score


logger = logging.getLogger(__name__)

# Well-known tasks that ask a model behind an API whether an answer is right; the beginnings of their names
_JUDGED = ("mathvista", "mathvision_reason", "mathverse", "mmvet")
_JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}
_JUDGE_THREADS = 8


def evaluate(
    model: str,
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    limit: int | None = None,
    include_path: str | None = None,
    **kwargs,
) -> dict[str, tuple[int, float | None]] | None:
    """
    Evaluates a model on tasks of lmms-eval and writes lmms-eval's logs, with each sample's score, its whole completion and
    digests of its images.

    Several processes, launched by `accelerate launch` or `torchrun`, share the questions.

    Args:
        model (`str`):
            Id or path of the base model.
        tasks (`Sequence[str]`):
            Names of tasks or groups of lmms-eval.
        output_dir (`str` or `Path`):
            Folder to write to, without an evaluation in it.
        limit (`int`, *optional*):
            Only the first questions of each task.
        include_path (`str`, *optional*):
            A folder with tasks of your own.
        **kwargs:
            Of `evolmm_trl.evaluation.lmms_eval_model.EvoLMM`: `adapter`, `role`, `prompt`, `min_pixels`, `max_pixels`,
            `max_new_tokens`, `batch_size` and `dtype`.

    Returns:
        `dict[str, tuple[int, float | None]]` or `None`: by task, the number of questions and the mean score, `None` for a
        task whose score is no mean; on the main process.

    Raises:
        `ValueError`: if lmms-eval, a task or a judge is missing, `output_dir` holds an evaluation, or an error was logged,
            which is how lmms-eval's tasks tell that they could not score an answer and count it as wrong.
    """
    output_dir = Path(output_dir)
    _check(tasks, output_dir)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=include_path, model_name="evolmm")
    _check_names(tasks, manager.all_tasks)

    from accelerate.utils import gather_object

    from .lmms_eval_model import EvoLMM

    lm, arguments = EvoLMM(model, **kwargs), {"pretrained": model, **kwargs}
    judged = any(task.startswith(_JUDGED) for task in tasks)
    with _logged_errors() as errors:
        # Tasks print while they aggregate
        with redirect_stdout(sys.stderr):
            results = simple_evaluate(
                model=lm,
                model_args=",".join(f"{name}={value}" for name, value in arguments.items() if value is not None),
                tasks=list(tasks),
                batch_size=lm.batch_size,
                limit=limit,
                task_manager=manager,
                verbosity="WARNING",
                # Some tasks draw an answer where they can read none: in one thread, the same for the same answers
                process_docs_parallel=_JUDGE_THREADS if judged else 1,
                cli_args=Namespace(output_path=str(output_dir), process_with_media=False),
            )
    records = dict(gather_object(list(lm.records.items())))
    errors = gather_object(errors)
    if results is None:
        return None
    results["evolmm"] = {
        "model": model,
        "adapter": kwargs.get("adapter"),
        "role": kwargs.get("role", "solver") if kwargs.get("adapter") else None,
        "settings": lm.settings,
        "processes": lm.world_size,
        "versions": {name: version(name) for name in ("evolmm-trl", "lmms-eval", "torch", "transformers", "peft")},
        "errors": len(errors),
    }
    scores = _write(results, records, output_dir, model)
    if errors:
        raise ValueError(
            f"lmms-eval logged {len(errors)} errors, the first: {shorten(errors[0], 500)!r}. An answer that a task cannot "
            "score counts as wrong, so these scores are not to be used. Remove the cause and run these tasks again."
        )
    return scores


def _check(tasks: Sequence[str], output_dir: Path) -> None:
    if find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed: `pip install 'evolmm-trl[eval]'`.")
    if not tasks:
        raise ValueError("No tasks were given.")
    if output_dir.exists() and any(output_dir.rglob("*results.json")):
        raise ValueError(f"{output_dir} holds an evaluation already. Choose another folder, or remove it.")
    judged = [task for task in tasks if task.startswith(_JUDGED)]
    api = os.environ.get("API_TYPE", "openai")
    key = _JUDGE_KEYS.get(api)
    if judged and key is not None and not os.environ.get(key):
        raise ValueError(
            f"{', '.join(judged)}: answers are judged by a model behind an API, and {key} is not set. Set it, and "
            "OPENAI_API_URL and MODEL_VERSION for a server of your own, or leave these tasks out."
        )


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = {name for task in unknown for name in difflib.get_close_matches(task, known, 3)}
        hint = f" Did you mean {' or '.join(sorted(near))}?" if near else ""
        raise ValueError(f"lmms-eval has no task {', '.join(unknown)}.{hint} `lmms-eval --tasks list` lists them.")


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collects what is logged as an error, by loguru as most of lmms-eval does, or by `logging` as its verifiers do."""
    from loguru import logger as lmms_eval_logger

    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    sink = lmms_eval_logger.add(lambda message: errors.append(str(message)), level="ERROR", format="{message}")
    logging.getLogger().addHandler(handler)
    try:
        yield errors
    finally:
        logging.getLogger().removeHandler(handler)
        lmms_eval_logger.remove(sink)


def _write(
    results: dict, records: dict[tuple[str, int], dict], output_dir: Path, model: str
) -> dict[str, tuple[int, float | None]]:
    """Adds what this package knows of each sample, leaves the files to lmms-eval, and returns the mean scores."""
    from lmms_eval.loggers import EvaluationTracker

    samples, means = results.pop("samples"), {}
    for task, of_task in samples.items():
        config = results["configs"][task]
        scores = [_score(sample.get(main_metric(config)), config) for sample in of_task]
        if not _is_mean(scores, results["results"][task], main_metric(config)):
            logger.warning(
                "The score of %s is not the mean of its samples' scores: it is reported and cannot be compared.", task
            )
            scores = [None] * len(scores)
        means[task] = (len(scores), None if None in scores else fmean(scores))
        for sample, score in zip(of_task, scores, strict=True):
            sample["evolmm"] = records[task, sample["doc_id"]] | {"score": score}
    tracker = EvaluationTracker(output_path=str(output_dir))
    tracker.general_config_tracker.log_experiment_args("evolmm", f"pretrained={model}", None, None, False)
    tracker.save_results_aggregated(results, samples, results["date"])
    for task, of_task in samples.items():
        tracker.save_results_samples(task, of_task)
    check_written(output_dir)  # the tracker only logs what it could not write
    return means


def _score(value, config: dict) -> float | None:
    """The score of one sample, by the task's own aggregation where the sample holds what is yet to be judged."""
    score = read_score(value)
    aggregate = config["metric_list"][0]["aggregation"]
    if score is not None or not callable(aggregate):
        return score
    arguments = {"args": None} if "args" in inspect.signature(aggregate).parameters else {}
    with redirect_stdout(io.StringIO()):
        return read_score(aggregate([copy.deepcopy(value)], **arguments))


def _is_mean(scores: Sequence[float | None], reported: dict, metric: str) -> bool:
    if None in scores:
        return False
    # Some tasks report percent, rounded, and one reports `None` for 0
    value = next((value for name, value in reported.items() if name.startswith(f"{metric},")), None) or 0.0
    return any(math.isclose(scale * fmean(scores), value, abs_tol=1e-4 * scale) for scale in (1, 100))
