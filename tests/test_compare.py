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

"""The interval of a difference holds the truth as often as it says, and runs that differ in more than the model are refused."""

import json

import interval_coverage
import numpy as np
import pytest
import reproduction
import scipy.stats
from interval_coverage import coverage

from evolmm_trl.cli import main
from evolmm_trl.evaluation.compare import ALL_QUESTIONS, MEAN_OF_BENCHMARKS, compare, mcnemar, table
from evolmm_trl.evaluation.logs import read_evaluation, read_score


SIMULATIONS = 1_000


@pytest.mark.parametrize(
    "case",
    [
        {"runs": 1},
        {"runs": 1, "per_image": 4},
        {"runs": 3, "of_run": 0.03},
        {"runs": 1, "questions": 200, "tasks": 3, "same_images": True},
    ],
    ids=["one run", "four questions on an image", "three seeds", "three tasks on the same images"],
)
def test_interval_holds_the_true_difference_in_93_to_97_percent_of_1000_simulations(case):
    assert 0.93 <= coverage(SIMULATIONS, **case)[0] <= 0.97


def right(count: int, of: int) -> np.ndarray:
    return np.arange(of) < count


def test_questions_about_one_image_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    a, b = (np.repeat(rng.integers(0, 2, 50), 8) for _ in range(2))
    (together,) = compare({"x": a}, {"x": b}, {"x": np.repeat(np.arange(50), 8)})
    (alone,) = compare({"x": a}, {"x": b})
    assert (together.images, alone.images, together.questions) == (50, 400, 400)
    # Eight copies of one answer: the interval of 50 questions, sqrt(8) times as wide as that of 400
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(8**0.5, rel=0.1)


def test_what_both_sides_share_cancels_out():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 1_000).astype(float)
    b = a.copy()
    b[:10] = 1 - b[:10]
    (row,) = compare({"x": a}, {"x": b})
    # Ten of 1,000 differ; unpaired, the interval would be 8.8 points wide
    assert row.high - row.low < 0.015


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 500)
    alike = np.stack([a, a, a])
    apart = np.stack([a | right(n, 500) for n in (0, 50, 100)])
    (row_alike,) = compare({"x": a}, {"x": alike})
    (row_apart,) = compare({"x": a}, {"x": apart})
    assert row_alike.high - row_alike.low == 0
    (fixed,) = compare({"x": a}, {"x": apart.mean(0)})
    assert row_apart.difference == pytest.approx(fixed.difference)
    assert row_apart.high - row_apart.low > 2 * (fixed.high - fixed.low)


def test_pooled_rows_weigh_questions_or_benchmarks_alike():
    a = {"small": right(5, 10), "large": right(45, 90)}
    b = {"small": right(10, 10), "large": right(45, 90)}
    rows = {row.name: row for row in compare(a, b)}
    assert list(rows) == ["small", "large", ALL_QUESTIONS, MEAN_OF_BENCHMARKS]
    assert rows[ALL_QUESTIONS].difference == pytest.approx(5 / 100)
    assert rows[MEAN_OF_BENCHMARKS].difference == pytest.approx(25 / 100)
    assert (rows[ALL_QUESTIONS].only_a, rows[ALL_QUESTIONS].only_b) == (0, 5)
    assert rows[MEAN_OF_BENCHMARKS].p_value is None


@pytest.mark.parametrize("runs", [1, 3])
def test_a_benchmark_that_is_asked_three_times_is_no_more_evidence_than_asked_once(runs):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2, (runs, 300)) for _ in range(2))
    tasks = ("x", "y", "z")
    rows = compare(*(dict.fromkeys(tasks, side) for side in (a, b)), dict.fromkeys(tasks, range(300)))
    width = rows[0].high - rows[0].low
    for pooled in rows[3:]:
        assert (pooled.questions, pooled.images, pooled.p_value) == (900, 300, None)
        assert pooled.high - pooled.low == pytest.approx(width, rel=0.05)
    if runs == 1:
        apart = compare(*(dict.fromkeys(tasks, side) for side in (a, b)))[3]
        assert apart.high - apart.low < 0.7 * width and apart.p_value is not None


def test_benchmarks_that_share_some_images_are_drawn_together_where_they_do():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2, 400) for _ in range(2))
    images = {"x": range(400), "y": range(200, 600)}
    # The answers to `y` about the images of `x` are those to `x`
    other_a, other_b = (np.concatenate([side[200:], rng.integers(0, 2, 200)]) for side in (a, b))
    rows = {row.name: row for row in compare({"x": a, "y": other_a}, {"x": b, "y": other_b}, images)}
    (alone,) = compare({"x": a}, {"x": b})
    assert rows["x"].high - rows["x"].low == pytest.approx(alone.high - alone.low, rel=0.05)
    pooled = rows[ALL_QUESTIONS]
    assert (pooled.images, pooled.p_value) == (600, None)
    # A third of the images counts double: 200 * 1 + 200 * 2**2 + 200 * 1 instead of 800
    error = np.std(b - a) * (1_200**0.5) / 800
    assert pooled.high - pooled.low == pytest.approx(2 * 1.96 * error, rel=0.07)


def test_benchmarks_on_the_same_images_count_as_one_in_the_mean():
    a = dict.fromkeys(("x", "y", "z", "other"), right(0, 40))
    b = a | {"other": right(20, 40)}
    images = dict.fromkeys(("x", "y", "z"), range(40)) | {"other": range(100, 140)}
    assert compare(a, b, images)[-1].difference == pytest.approx(0.5 / 2)
    assert compare(a, b, images | {"z": range(1, 41)})[-1].difference == pytest.approx(0.5 / 3)
    assert compare(a, b)[-1].difference == pytest.approx(0.5 / 4)


def test_mcnemar_is_exact():
    a, b = np.array([1] * 9 + [0] * 2 + [1] * 20), np.array([0] * 9 + [1] * 2 + [1] * 20)
    only_a, only_b, p_value = mcnemar(a, b)
    assert (only_a, only_b) == (9, 2)
    # Twice the chance of 2 or fewer heads in 11 throws
    assert p_value == pytest.approx(2 * scipy.stats.binom.cdf(2, 11, 0.5))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_scores_between_right_and_wrong_have_an_interval_and_no_mcnemar():
    (row,) = compare({"x": np.linspace(0, 1, 20)}, {"x": np.linspace(0, 1, 20) ** 2})
    assert row.p_value is None and row.low < row.difference < row.high
    assert "| – | – | – |" in table([row], "a", "b")


@pytest.mark.parametrize(
    ("a", "b", "images", "message"),
    [
        ({"x": [1, 0]}, {"y": [1, 0]}, None, "same benchmarks"),
        ({"x": [1, 0]}, {"x": [1, 0, 1]}, None, r"got \[2, 3\]"),
        ({"x": [1, 0]}, {"x": [1, 0]}, {"x": [1]}, r"got \[2, 2, 1\]"),
        ({"x": [1, 50]}, {"x": [1, 0]}, None, "from 0 to 1"),
        ({"x": [1, float("nan")]}, {"x": [1, 0]}, None, "from 0 to 1"),
        ({"x": [1, 0]}, {"x": [1, 0]}, {"x": ["i", "i"]}, "at least two images"),
        ({"x": [[1, 0], [1, 1]], "y": [1, 0]}, {"x": [1, 0], "y": [1, 0]}, None, "every run on every benchmark"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(a, b, images, message):
    with pytest.raises(ValueError, match=message):
        compare({k: np.array(v) for k, v in a.items()}, {k: np.array(v) for k, v in b.items()}, images)


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.25, 0.25),
        ({"question_id": "7", "score": 0.0, "prediction": "yes"}, 0.0),  # pope
        ({"true_false": True, "answer": "4"}, 1.0),  # mathvista
        ({"scores": [True], "response": ["A"]}, 1.0),  # mathvision
        ({"answer": "A", "parsed_pred": ["A"]}, None),  # mmmu
        (37.5, None),
        ("right", None),
        (None, None),
    ],
)
def test_scores_of_the_benchmarks_are_read(value, score):
    assert read_score(value) == score


# Logs, as lmms-eval writes them


def write_log(folder, scores, task="charts", name="20260101_000000_", settings=None, own=None, **fields):
    """One evaluation: two questions on each image."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "task": task,
        "doc_to_text": "<function question at 0x7f1031356de0>",
        "metric_list": [{"metric": "accuracy", "aggregation": "mean"}],
        "generation_kwargs": {"max_new_tokens": 16},
    }
    results = {
        "configs": {task: config | (settings or {})},
        "config": {"gen_kwargs": None, "model_args": str(folder)},
        "n-samples": {task: {"original": 1_000, "effective": len(scores)}},
    }
    own = {"settings": {"prompt": None, "dtype": "bfloat16"}} if own is None else own
    (folder / f"{name}results.json").write_text(json.dumps(results | ({"evolmm": own} if own else {})))
    lines = []
    for index, score in enumerate(scores):
        sample = {"doc_id": index, "input": f"Question {index}?", "target": "4", "accuracy": float(score)}
        if own:
            sample["evolmm"] = {"score": float(score), "images": [f"image {index // 2}"], "completion": "4"}
        if index == 1:
            sample |= fields
        lines.append(json.dumps(sample))
    # Several processes write their samples one after the other
    (folder / f"{name}samples_{task}.jsonl").write_text("\n".join(lines[::2] + lines[1::2]) + "\n")
    return folder


def run(*arguments) -> int:
    return main(["compare", *map(str, arguments)])


@pytest.fixture
def base(tmp_path):
    return write_log(tmp_path / "base", right(20, 40))


def test_command_prints_and_writes_a_table_and_a_figure(base, tmp_path, capsys):
    seeds = [write_log(tmp_path / f"seed{n}", right(28 + n, 40)) for n in range(3)]
    assert run(f"base={base}", f"solver={','.join(map(str, seeds))}", "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "| charts | 40 | 50.00 | 72.50 | +22.50 (" in printed
    assert (tmp_path / "out/comparison.md").read_text() == printed
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_several_sides_are_each_compared_with_the_first(base, tmp_path, capsys):
    one, two = write_log(tmp_path / "one", right(20, 40)), write_log(tmp_path / "two", right(30, 40))
    assert run(base, one, two) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert f"only {one} right" in first and "| 0 | 0 | 1.000 |" in first
    assert f"only {two} right" in second and "| 0 | 10 | 0.002 |" in second


def test_tasks_evaluated_apart_are_one_evaluation(tmp_path):
    write_log(tmp_path / "run/plain", right(3, 4))
    write_log(tmp_path / "run/judged", right(1, 4), task="mmvet")
    assert sorted(read_evaluation(tmp_path / "run")) == ["charts", "mmvet"]


def test_logs_of_lmms_eval_alone_are_read(tmp_path, capsys):
    folders = [write_log(tmp_path / name, right(n, 40), own={}) for name, n in (("a", 10), ("b", 20))]
    assert run(*folders) == 0
    assert "| charts | 40 | 25.00 | 50.00 | +25.00" in capsys.readouterr().out


def test_logs_that_do_not_say_which_images_were_seen_are_named(base, tmp_path, capsys):
    assert run(base, write_log(tmp_path / "other", right(30, 40))) == 0
    assert capsys.readouterr().err == ""
    folders = [write_log(tmp_path / name, right(n, 40), own={}) for name, n in (("a", 10), ("b", 20))]
    assert run(*folders) == 0
    assert "the logs of charts do not say which images were seen" in capsys.readouterr().err


def test_images_are_known_in_all_tasks_and_questions_without_one_are_alone(tmp_path):
    for task in ("charts", "plots"):
        write_log(tmp_path / task, right(3, 6), task=task, evolmm={"score": 1.0, "images": []})
    charts, plots = (log.images for _, log in sorted(read_evaluation(tmp_path).items()))
    assert [one == other for one, other in zip(charts, plots, strict=True)] == [True, False, True, True, True, True]


def test_a_folder_with_an_equals_sign_in_its_name_is_a_folder(base, tmp_path, monkeypatch, capsys):
    for rate in ("1e-3", "1e-4"):
        write_log(tmp_path / f"eval/lr={rate}", right(30, 40))
    monkeypatch.chdir(tmp_path)
    assert run("base", "eval/lr=1e-3", "eval/lr=1e-3,eval/lr=1e-4", "solver=eval/lr=1e-3") == 0
    printed = capsys.readouterr().out
    for name in ("eval/lr=1e-3", "eval/lr=1e-3,eval/lr=1e-4", "solver"):
        assert f"| base | {name} | difference" in printed
    assert run("base", "eval/lr=1e-5") == 1
    assert "There is no evaluation in '1e-5'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "Another question?"}, "charts, sample 1: the runs differ in `question`: 'Question 1?' in"),
        ({"target": "5"}, "charts, sample 1: the runs differ in `target`: '4' in"),
        ({"evolmm": {"score": 1.0, "images": ["x"]}}, "charts, sample 1: the runs differ in `images`: ['image 0'] in"),
        (
            {"settings": {"generation_kwargs": {"max_new_tokens": 99}}},
            "`task.generation_kwargs.max_new_tokens`: 16 in",
        ),
        ({"own": {"settings": {"prompt": "{question}", "dtype": "bfloat16"}}}, "`evolmm.prompt`: None in"),
        ({"own": {"settings": {"prompt": None, "dtype": "float16"}}}, "`evolmm.dtype`: 'bfloat16' in"),
        ({"task": "ai2d"}, "different benchmarks"),
        (
            {"own": {"settings": {"prompt": None, "dtype": "bfloat16", "image_size": {"longest_edge": 9}}}},
            "`evolmm.image_size`: None in",
        ),
        ({"own": {"errors": 3}}, "lmms-eval logged 3 errors"),
        ({"evolmm": {"score": None, "images": ["image 0"]}}, "`accuracy` of sample 1 holds no score"),
    ],
)
def test_runs_that_differ_in_more_than_the_model_are_refused(base, tmp_path, capsys, changes, message):
    other = write_log(tmp_path / "other", right(30, 40), **changes)
    assert run(base, other) == 1
    assert message in capsys.readouterr().err


def test_runs_on_different_numbers_of_questions_are_refused(base, tmp_path, capsys):
    assert run(base, write_log(tmp_path / "other", right(30, 38))) == 1
    assert "has 40 questions and" in capsys.readouterr().err


def test_functions_at_other_addresses_are_no_difference(base, tmp_path):
    other = write_log(tmp_path / "other", right(30, 40), settings={"doc_to_text": "<function question at 0x7f99>"})
    assert run(base, other) == 0


def test_incomplete_logs_are_refused(base, tmp_path, capsys):
    (log,) = base.glob("*.jsonl")
    whole = log.read_text()
    for broken, message in [
        (whole[: len(whole) // 2 + 9], "expected a JSON object with doc_id, input, target"),
        (whole[: whole.index("\n") + 1], "has 1 samples; expected 40"),
        (whole + whole.splitlines()[0] + "\n", "has 41 samples; expected 40"),
    ]:
        log.write_text(broken)
        assert run(base, base) == 2  # the same name twice
        assert run(f"a={base}", f"b={base}") == 1
        assert message in capsys.readouterr().err


def test_a_task_evaluated_twice_is_refused(base, capsys):
    write_log(base, right(30, 40), name="20260102_000000_")
    assert run(f"a={base}", f"b={base / '20260102_000000_results.json'}") == 1
    assert "charts was evaluated twice" in capsys.readouterr().err
    assert run(*(f"{day}={base / f'2026010{day}_000000_results.json'}" for day in (1, 2))) == 0


def test_what_is_no_evaluation_is_refused(base, tmp_path, capsys):
    assert run(f"a={base}", f"b={tmp_path / 'nowhere'}") == 1
    assert "There is no evaluation in" in capsys.readouterr().err
    (tmp_path / "x_results.json").write_text("[]")
    assert run(f"a={base}", f"b={tmp_path / 'x_results.json'}") == 1
    assert "is not lmms-eval's" in capsys.readouterr().err
    assert run(f"a={base}", "b=") == 2


# The pages


def test_the_tables_of_the_pages_are_those_of_the_scripts():
    page = interval_coverage.PAGE.read_text()
    record = json.loads(interval_coverage.RECORD.read_text())
    assert page == interval_coverage.written(page, record)
    assert {name: set(case) <= set(record["cases"][name]) for name, case in interval_coverage.CASES.items()}
    assert (record["simulations"], list(record["cases"])) == (1_000, list(interval_coverage.CASES))
    page = reproduction.PAGE.read_text()
    assert page == reproduction.written(page)


def test_the_noise_floor_is_half_the_interval_that_compare_gives():
    a, b = np.zeros(2_500), np.zeros(2_500)
    a[:125], b[125:250] = 1, 1  # a tenth of the questions, half of them each
    (row,) = compare({"x": a}, {"x": b})
    assert 50 * (row.high - row.low) == pytest.approx(reproduction.noise_floor(2_500, 0.1), rel=0.05)
    assert reproduction.noise_floor(reproduction.questions_needed(0.8, 0.1), 0.1) == pytest.approx(0.8, abs=1e-3)
