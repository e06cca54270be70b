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

import json
import math
import re
import string

import pytest
from report_runs import add_pictures, record, write_history, write_run

from evolmm_trl.cli import main
from evolmm_trl.health.run import RunHealth
from evolmm_trl.monitor import Rollout, rollout_metrics
from evolmm_trl.prompts import Answer, Question
from evolmm_trl.report import write_report
from evolmm_trl.report.log import Thinned, read_run, shown, to_json
from evolmm_trl.voting import vote


LIMIT = 20_000_000  # bytes of a page


def read(folder, **kwargs):
    return read_run(folder, "run", **{"text_budget": 10**6, "picture_budget": 10**6, **kwargs})


def data_of(page):
    """What the page's script reads."""
    (block,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    return json.loads(block)


# Reading the log


def test_curves_are_the_metrics_that_the_trainer_logs(tmp_path):
    def rollout(answers, rewards, question, reward):
        return Rollout(
            image_id="a",
            question_completion="",
            question=question,
            completions=["" for _ in answers],
            answers=[Answer(text, words) for text, words in answers],
            tokens=[1 for _ in answers],
            vote=vote([text for text, _ in answers]),
            solver_rewards=rewards,
            solver_advantages=rewards,
            proposer_reward=reward,
            proposer_advantage=0.0,
            blind_answers=None,
            solver_step=1,
            proposer_step=None,
        )

    steps = {
        1: [
            rollout([("5", 2), ("5", 4), (None, 0)], [1.0, 0.8], Question("How many?", True), 0.3),
            rollout([("1", 0), ("2", 1), ("3", 9)], [0.2, 0.0], Question("How many?", False), 0.9),
        ],
        2: [rollout([("7", 0), ("7", 0), ("7", 0)], [1.0, 1.0], Question("Which?", True), 0.1)],
    }
    records = {step: [each.record(step) for each in rollouts] for step, rollouts in steps.items()}
    run = read(write_run(tmp_path, [line for lines in records.values() for line in lines]))
    health = RunHealth()
    for step, lines in records.items():
        metrics = {**rollout_metrics(lines), **health.observe(lines)}
        for name, curve in run.curves.items():
            assert dict(curve)[step] == pytest.approx(metrics[name]), name
    assert set(run.curves) >= {"solver/reward", "proposer/reward", "agreement", "answer_entropy", "distinct_questions"}
    assert (run.rollouts, run.votes, run.broken, run.cut_off) == (3, 3, 0, False)


BROKEN = [
    b"",
    b"not json",
    b"null",
    b"[]",
    b"{}",
    b'{"step": NaN}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"1" * 10_000,
    json.dumps({**record(1), "step": "<script>"}).encode(),
    json.dumps({**record(1), "step": -1}).encode(),
    json.dumps({**record(1), "step": 10**12}).encode(),
    json.dumps({**record(1), "agreement": math.nan}).encode(),
    json.dumps({**record(1), "agreement": 7}).encode(),
    json.dumps({**record(1), "entropy": math.inf}).encode(),
    json.dumps({**record(1), "answers": []}).encode(),
    json.dumps({**record(1), "answers": "abc"}).encode(),
    json.dumps({**record(1), "question": {"a": 1}}).encode(),
    json.dumps({**record(1), "image_digest": 5}).encode(),
]


def test_lines_that_are_no_rollouts_are_left_out_and_counted(tmp_path):
    folder = write_run(tmp_path, [record(1)], end=b"\n".join([*BROKEN, json.dumps(record(2)).encode(), b""]))
    run = read(folder)
    assert list(run.rollout_steps) == [1, 2]
    assert run.broken == len(BROKEN) - 1  # an empty line is nothing
    assert not run.cut_off
    assert "18 lines of the log are no rollout" in write_report(folder).read_text(encoding="utf-8")


def test_a_log_that_ends_within_a_line_is_said_to(tmp_path):
    folder = write_run(tmp_path, [record(1)], end=json.dumps(record(2)).encode()[:-30])
    run = read(folder)
    assert (run.rollouts, run.broken, run.cut_off) == (1, 0, True)
    assert "ends within a line" in write_report(folder).read_text(encoding="utf-8")


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("evolmm_trl.report.log._LONGEST_LINE", 10_000)
    folder = write_run(tmp_path, [record(1)], end=b"x" * 45_000 + b"\n" + json.dumps(record(2)).encode() + b"\n")
    run = read(folder)
    assert (list(run.rollout_steps), run.broken) == ([1, 2], 1)


def test_what_is_no_run_is_refused_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="rollouts.jsonl does not exist; expected the output_dir"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"rollouts.jsonl holds no rollouts \(1 lines could not be read\)"):
        write_report(write_run(tmp_path, [], end=b"nonsense\n"))
    with pytest.raises(ValueError, match="one run or two, not 3"):
        write_report([tmp_path] * 3)


# The trainer's history


def test_the_trainers_history_adds_what_only_it_knows(tmp_path):
    write_run(tmp_path, [record(step) for step in range(1, 901)])
    write_history(tmp_path / "_report", [{"step": 900, "solver/kl": 7.0}])  # of an earlier, longer run
    folder = write_run(tmp_path, [record(step) for step in (1, 2, 3)])
    rows = [
        {"step": 1, "solver/kl": 0.1, "agreement": 0.99, "eval_accuracy_greedy": 0.5},
        {"step": "2", "solver/kl": 5.0},
        {"step": 2, "solver/kl": math.nan, "solver/beta": "high", "solver/grad_norm": 10**400},
        "nonsense",
        {"step": 3, "solver/kl": 0.3},
    ]
    write_history(folder / "checkpoint-3", rows)
    write_history(folder / "checkpoint-2", rows[:1], step=2)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_hi')
    run = read(folder)
    assert run.curves["solver/kl"] == [(1, 0.1), (3, 0.3)]
    assert run.curves["eval_accuracy_greedy"] == [(1, 0.5)]
    assert run.curves["agreement"][0] == (1, 0.6)  # the log's, which has every step
    assert run.trainer_steps == 3
    assert run.alarm == "step 2: solver/kl was nan at step 2"
    assert "KL to the base model" in write_report(folder).read_text(encoding="utf-8")


def test_the_page_says_where_a_guard_would_have_ended_the_run(tmp_path):
    folder = write_run(tmp_path, [record(step) for step in range(1, 21)])
    rows = [
        {"step": step, "solver/kl": 0.01 if step < 10 else 0.9, "eval_accuracy_greedy": 0.5} for step in range(1, 21)
    ]
    page = write_report(folder, history=[{"step": 1, "solver/kl": "x", "loss": 10**400}, *rows]).read_text()
    (note,) = re.findall(r"CollapseGuard, with its default thresholds, raises its alarm at step (\d+): ([^<]*)", page)
    assert 12 <= int(note[0]) <= 16 and "the median of solver/kl over" in note[1]
    calm = write_report(folder, history=rows[:9]).read_text()
    assert "CollapseGuard" not in calm


def test_a_history_that_is_missing_or_ends_early_is_said_to(tmp_path):
    folder = write_run(tmp_path, [record(step) for step in range(1, 9)])
    assert "There is no trainer_state.json" in write_report(folder).read_text(encoding="utf-8")
    write_history(folder / "checkpoint-4", [{"step": 4, "solver/kl": 0.1}])
    write_run(folder, [record(step) for step in range(1, 13)])  # it has gone on
    assert "trainer_state.json is of step 4" in write_report(folder).read_text(encoding="utf-8")
    assert read(folder, history=[{"step": 8, "solver/kl": 0.2}]).curves["solver/kl"] == [(8, 0.2)]


def test_runs_in_one_folder_keep_their_histories_and_pages_apart(tmp_path):
    folder = write_run(tmp_path / "run", [record(step) for step in range(1, 41)])
    write_history(folder / "checkpoint-40", [{"step": step, "solver/kl": 9.0} for step in range(1, 41)])
    (folder / "rollouts.jsonl").rename(folder / "rollouts.1.jsonl")
    write_run(folder, [*(record(step) for step in range(1, 41)), record(41)][1:])  # as long, and alike
    page = write_report(folder)
    new = page.read_text(encoding="utf-8")
    assert "No trainer_state.json in the folder is known to be of this log (1 found)" in new
    assert "KL to the base model" not in new and "CollapseGuard" not in new
    old = write_report(folder / "rollouts.1.jsonl")
    assert old == folder / "_report" / "rollouts.1.jsonl.html"
    assert "KL to the base model" in old.read_text(encoding="utf-8") and "CollapseGuard" in old.read_text()
    assert "<bdi>run/rollouts.1.jsonl</bdi>" in old.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == new
    two = write_report([folder, folder / "rollouts.1.jsonl"], tmp_path / "two.html").read_text(encoding="utf-8")
    assert "<bdi>run</bdi>" in two and "<bdi>run/rollouts.1.jsonl</bdi>" in two
    write_history(folder / "checkpoint-20", [{"step": 20, "solver/kl": 0.5}])
    assert read(folder).curves["solver/kl"] == [(20, 0.5)]  # the new run's, though it is shorter


@pytest.mark.parametrize(
    "state",
    [
        None,
        "{",
        "[]",
        '{"step": 4}',
        '{"rollout_log_bytes": 0, "rollout_log_digest": "cae66941d9efbd404e4d88758ea67670"}',
        '{"rollout_log_bytes": 1e99, "rollout_log_digest": ""}',
        '{"rollout_log_bytes": 10.0, "rollout_log_digest": ""}',
    ],
)
def test_a_history_that_does_not_say_of_which_log_it_is_is_left_out(state, tmp_path):
    folder = write_run(tmp_path, [record(step) for step in range(1, 5)])
    write_history(folder / "checkpoint-4", [{"step": 4, "solver/kl": 0.1}])
    assert read(folder).trainer_steps == 4
    (folder / "checkpoint-4" / "evolmm_state.json").unlink()
    if state is not None:
        (folder / "checkpoint-4" / "evolmm_state.json").write_text(state)
    assert (read(folder).trainer_steps, read(folder).others_histories) == (0, 1)


# What strangers wrote


def test_what_is_invisible_is_shown_and_what_is_long_is_cut():
    assert shown("a\u202eb\u200bc\x00\x1b[31m\u2066\ud800\U000e0041", 100) == (
        "a\u27e8U+202E\u27e9b\u27e8U+200B\u27e9c\u27e8U+0000\u27e9\u27e8U+001B\u27e9[31m\u27e8U+2066\u27e9\u27e8U+D800"
        "\u27e9\u27e8U+E0041\u27e9"
    )
    blank = "\u034f\u115f\u1160\u17b4\u2800\u3164\ufe00\uffa0\ufff0\U0001d173\U000e0100"
    assert shown(blank, 100) == "".join(f"\u27e8U+{ord(character):04X}\u27e9" for character in blank)
    assert shown("x" * 1_000_000, 10) == f"{'x' * 10} \u2026 [999,990 more characters]"
    for text in (
        "a\nb\tc",
        "Größe 7 €",
        "שלום",
        "中文　字",
        "👩\u200d🔬",
        "❤\ufe0f",
        "می\u200cخواهم",
        string.printable[:95],
    ):
        assert shown(text, 100) == text


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "]]>", "\u2028", "&lt;"])
def test_json_in_a_page_ends_no_block_and_reads_back_as_it_was(text):
    encoded = to_json({text: [text]})
    assert not set(encoded) & set("<>&\u2028")
    assert json.loads(encoded) == {text: [text]}


# What the page holds


def test_a_sample_is_every_2_to_the_kth_and_stays_within_its_budget():
    sample = Thinned(1000)
    for i in range(10_000):
        sample.add(i, lambda: "x" * 10)
        assert sum(len(text) for _, text in sample.items) <= 1000
    assert sample.stride == 128
    assert [place for place, _ in sample.items] == list(range(0, 10_000, 128))
    one = Thinned(10)
    one.add(0, lambda: "x" * 50)
    assert len(one.items) == 1


def test_small_runs_are_shown_whole_with_all_their_answers(tmp_path):
    digest, *_ = add_pictures(tmp_path, 1)
    records = [
        record(1, image_digest=digest, answers=["4", "4", None]),
        record(1, question="Which?", question_well_formed=False, question_completion="Well <b>"),
        record(3, image_digest="f" * 32),
    ]
    records[2]["blind_answers"] = ["4", "7", "7", None]
    records[0]["answers"][1].update(completion="<answer>4</answer>", reward=None)
    data = data_of(write_report(write_run(tmp_path, records)))
    (run,) = data["runs"]
    assert list(data["images"]) == [digest]
    first, second, third = run["rollouts"]
    share = round((2 / 3) ** 0.7, 3)
    assert first[:10] == [1, digest, "chart.png", "How many bars are there?", None, "counting", 0.667, 0.637, 0.5, "4"]
    assert first[10] == [
        ["4", "I count. <answer>4</answer>", share, 1],
        ["4", "<answer>4</answer>", None, 1],
        [None, "none", 0.0, 1],
    ]
    assert second[3:6] == ["Which?", "Well <b>", "what"]
    assert (first[11:13], third[1], third[11:13]) == ([3, None], None, [5, ["7", 2, 4]])
    assert first[13:] == [[["4", 2, share, share], [None, 1, 0.0, 0.0]], 0]
    assert run["kinds"] == [["counting", 2], ["what", 1]]


def test_votes_are_of_all_answers_however_many_are_shown(tmp_path):
    answers = ["7"] * 40 + [str(100 + i) for i in range(20)] + [None] * 4
    rollout = record(1, answers=answers)
    for i, answer in enumerate(rollout["answers"]):
        answer["completion"] = f"in words of its own {i}"
    (shown_rollout,) = data_of(write_report(write_run(tmp_path, [rollout])))["runs"][0]["rollouts"]
    assert len(shown_rollout[10]) == 32
    votes, others = shown_rollout[13:]
    assert [vote[:2] for vote in votes] == [["7", 40], *([str(100 + i), 1] for i in range(7)), [None, 4]]
    assert others == 13


def long_record(step, digest):
    question = f"What is the value of bar {step} among all those that are shown in this chart? " + "so " * 40
    answers = [f"{i % 3} and some more words" for i in range(5)]
    rollout = record(step, question=question, answers=answers, image_digest=digest)
    for i, answer in enumerate(rollout["answers"]):
        answer["completion"] = f"{step} {i} <&> \u4e2d " + "I look at the bar and compare. " * 14
    return rollout


def test_a_page_of_10_000_rollouts_is_small_and_says_how_they_were_chosen(tmp_path):
    digests = add_pictures(tmp_path, 400)
    for file in (tmp_path / "_report" / "images").iterdir():  # as large as thumbnails get
        file.write_bytes(file.read_bytes().ljust(24_000, b"\0"))
    folder = write_run(tmp_path, [long_record(1 + i // 8, digests[i % 400]) for i in range(10_000)])
    page = write_report(folder)
    assert page == tmp_path / "_report" / "report.html"
    assert 8_000_000 < page.stat().st_size < LIMIT
    text = page.read_text(encoding="utf-8")
    assert "10,000 rollouts in the steps 1 to 1,250" in text
    found = re.search(
        r"(\d[\d,]*) rollouts: one in (\d+) of the 7,500 with one of the 300 pictures that were kept", text
    )
    (run,) = data_of(page)["runs"]
    assert int(found[1].replace(",", "")) == len(run["rollouts"])
    assert sum(rollout[1] is not None for rollout in run["rollouts"]) == math.ceil(7_500 / int(found[2]))
    steps = [rollout[0] for rollout in run["rollouts"]]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-1] > 1_200
    two = write_report([folder, folder / "rollouts.jsonl"], tmp_path / "two.html")
    assert two.stat().st_size < LIMIT


def test_a_page_names_no_address_and_forbids_what_is_not_its_own(tmp_path):
    page = write_report(write_run(tmp_path, [record(1)])).read_text(encoding="utf-8")
    names = set(re.findall(r"https?://[^\s\"']+", page)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not names
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"\sstyle=|\son\w+=", re.sub(r"(?s)<script.*?</script>", "", page))


def test_folders_names_are_told_apart_and_escaped(tmp_path):
    first = write_run(tmp_path / "a" / "run <b>\u202e", [record(1)])
    second = write_run(tmp_path / "b" / "run <b>\u202e", [record(1)])
    page = write_report([first, second], tmp_path / "two.html").read_text(encoding="utf-8")
    assert "<bdi>a/run &lt;b&gt;\u27e8U+202E\u27e9</bdi>" in page
    assert "<bdi>b/run &lt;b&gt;\u27e8U+202E\u27e9</bdi>" in page
    assert "run <b>" not in page


def test_a_page_that_is_there_is_replaced_as_a_whole(tmp_path):
    folder = write_run(tmp_path, [record(1)])
    page = write_report(folder)
    page.write_text("old")
    assert write_report(folder).read_text(encoding="utf-8") != "old"
    assert [file.name for file in page.parent.iterdir()] == ["report.html"]


# The command


def test_the_command_writes_a_page_and_prints_where(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [record(1)])
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").is_file()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "expected the output_dir of a training run" in capsys.readouterr().err
    assert main(["report", *[str(folder)] * 3]) == 2
