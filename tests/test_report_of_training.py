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

"""What a training run leaves for people: its page, the thumbnails, and pictures in the trackers of `report_to`."""

import importlib.util
import io
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image
from report_runs import record
from test_report import data_of
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, lora
from transformers.integrations import TensorBoardCallback

from evolmm_trl.report import write_report
from evolmm_trl.thumbnails import image_digest
from evolmm_trl.trackers import RolloutPictures


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


def make(base, folder, images=6, **options):
    options = {"max_steps": 6, "report_images": 4, **options}
    return TalkingTrainer(
        model=base, args=config(folder, **options), train_dataset=image_dataset(images), peft_config=lora()
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Steps 3 and 6 are the proposer's."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        trainer = make(
            base,
            folder / "run",
            report_to="tensorboard",
            write_report=True,
            log_completions=True,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(trained):
    return trained.rollout_log.path.parent


def kept(folder):
    return {file.stem for file in (folder / "_report" / "images").iterdir()}


# The page


def test_a_page_is_written_when_training_ends(run, trained):
    data = data_of(run / "_report" / "report.html")
    records = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    (shown,) = data["runs"]
    assert (
        [rollout[0] for rollout in shown["rollouts"]]
        == [record["step"] for record in records]
        == [1, 1, 2, 2, 4, 4, 5, 5]
    )
    assert [rollout[2] for rollout in shown["rollouts"]] == [record["image_id"] for record in records]
    page = (run / "_report" / "report.html").read_text(encoding="utf-8")
    for title in ("Reward", "KL to the base model", "KL weight (beta)", "Gradient norm"):
        assert f"<h3>{title}</h3>" in page
    assert "trainer_state.json" not in page  # nothing is missing
    history = json.loads((run / "_report" / "trainer_state.json").read_text())["log_history"]
    assert history == trained.state.log_history


def test_every_rollout_names_its_image_by_its_pixels(run, trained):
    digests = {image_digest(row["image"]) for row in trained._images}
    logged = {json.loads(line)["image_digest"] for line in (run / "rollouts.jsonl").read_text().splitlines()}
    assert logged <= digests and len(logged) > 1


def test_the_thumbnails_are_a_bounded_sample_of_the_images_seen(run):
    seen = {json.loads(line)["image_digest"] for line in (run / "rollouts.jsonl").read_text().splitlines()}
    assert kept(run) == set(sorted(seen)[:4])
    for file in (run / "_report" / "images").iterdir():
        assert Image.open(file).size == (56, 56)


def test_a_resumed_run_keeps_the_same_thumbnails(base, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for digest in sorted(kept(folder))[:2]:  # as if they had not been there at the checkpoint
        (folder / "_report" / "images" / f"{digest}.webp").unlink()
    trainer = make(base, folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    again = {json.loads(line)["image_digest"] for line in (folder / "rollouts.jsonl").read_text().splitlines()[4:]}
    assert kept(folder) <= kept(run) | again
    assert set(sorted(again)[:1]) <= kept(folder)


def test_a_new_run_in_the_folder_of_another_gets_nothing_of_it(base, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    make(base, folder, max_steps=1).train()  # with the same seed
    page = write_report(folder).read_text(encoding="utf-8")
    assert "No trainer_state.json in the folder is known to be of this log" in page
    assert "KL to the base model" not in page
    earlier = write_report(folder / "rollouts.1.jsonl").read_text(encoding="utf-8")
    assert "KL to the base model" in earlier and "trainer_state.json" not in earlier


def test_a_run_that_was_resumed_keeps_its_history(base, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for left in ("_report", "checkpoint-6"):
        shutil.rmtree(folder / left)
    checkpoint = str(folder / "checkpoint-3")
    make(base, folder, save_strategy="steps", save_steps=3).train(resume_from_checkpoint=checkpoint)
    assert len((folder / "rollouts.jsonl").read_text().splitlines()) == 8
    assert "trainer_state.json" not in write_report(folder).read_text(encoding="utf-8")  # nothing is missing
    shutil.rmtree(folder / "checkpoint-6")
    assert "trainer_state.json is of step 3" in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [OSError("no space left"), KeyError("step"), RuntimeError("what a library raised")])
def test_an_error_of_the_page_is_said_once_and_does_not_fail_the_training(base, tmp_path, monkeypatch, caplog, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("evolmm_trl.records.write_report", fail)
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        result = make(base, tmp_path, max_steps=1, write_report=True).train()
    assert result.global_step == 1
    (said,) = [entry.getMessage() for entry in caplog.records if "report" in entry.getMessage()]
    assert said.startswith(f"The report was not written: {type(error).__name__}")
    assert f"`evolmm report {tmp_path}` tries again" in said


def test_nothing_is_kept_that_is_not_wanted(base, tmp_path):
    make(base, tmp_path, max_steps=1, report_images=0).train()
    assert not (tmp_path / "_report").exists()


# Completion tables


def test_a_step_without_a_rollout_shows_no_completions(run):
    tables = {int(file.stem[-5:]): pd.read_parquet(file) for file in (run / "completions").iterdir()}
    assert sorted(tables) == [1, 2, 4, 5]
    for step, table in tables.items():
        assert list(table["step"]) == [step] * 6


# Trackers


@pytest.fixture(scope="module")
def events(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = (trained.rollout_log.path.parent.parent / "events").iterdir()
    return accumulator.EventAccumulator(str(file), {"images": 0, "tensors": 0}).Reload()


def test_tensorboard_has_pictures_with_what_was_asked_and_answered(events, run):
    records = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for i in range(2):
        assert [event.step for event in events.Images(f"rollouts/{i}")] == [1, 2, 4, 5]
        for event, rollout in zip(events.Images(f"rollouts/{i}"), records[i::2], strict=True):
            assert image_digest(Image.open(io.BytesIO(event.encoded_image_string))) == rollout["image_digest"]
        texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"rollouts/{i}/text_summary")]
        for text, rollout in zip(texts, records[i::2], strict=True):
            assert text.startswith(f"    {rollout['question']}\n    ")
            assert f"agreement {rollout['agreement']:.2f}" in text
    assert not [tag for tag in events.Tags()["images"] if tag > "rollouts/1"]


def test_the_same_scalars_reach_tensorboard(events, trained):
    logged = [row["agreement"] for row in trained.state.log_history if "agreement" in row]
    assert [event.value for event in events.Scalars("train/agreement")] == pytest.approx(logged)


class Writer:
    """Counts what TensorBoard would be given."""

    def __init__(self):
        self.steps, self.texts = [], []

    def add_image(self, tag, image, step, dataformats):
        self.steps.append(step)

    def add_text(self, tag, text, step):
        self.texts.append(text)


class Callbacks:
    def __init__(self):
        self.writer = Writer()
        self.callbacks = [TensorBoardCallback(self.writer)]


def test_a_long_run_logs_no_more_pictures_than_a_short_one():
    callbacks = Callbacks()
    pictures = RolloutPictures(callbacks)
    images = [Image.new("RGB", (900, 500))] * 6
    for step in range(1, 7201):
        if step % 6:
            pictures.log([record(step)] * 6, images, max_steps=7200)
    steps = sorted(set(callbacks.writer.steps))
    assert len(steps) == 40 and len(callbacks.writer.steps) == 160
    assert steps[0] == 1 and steps[-1] > 7000


def test_what_a_model_wrote_is_no_markup_in_a_tracker_and_not_long():
    callbacks = Callbacks()
    rollout = record(1, question="# <b>\n[a](http://x)\u202e" + "x" * 10**6, answers=["*y*\n\n# z"] * 2 + [None])
    RolloutPictures(callbacks).log([rollout], [Image.new("RGB", (9, 9))], max_steps=1)
    (text,) = callbacks.writer.texts
    assert all(line.startswith("    ") for line in text.split("\n"))
    assert "\u202e" not in text and len(text) < 1000


def test_a_caption_says_how_many_answers_it_leaves_out():
    callbacks = Callbacks()
    rollout = record(1, answers=["7", "7", *map(str, range(100, 110))])
    RolloutPictures(callbacks).log([rollout], [Image.new("RGB", (9, 9))], max_steps=1)
    (text,) = callbacks.writer.texts
    assert "    7 (2), 100 (1), " in text and "106 (1), 3 more (3)\n" in text


def test_no_pictures_are_sent_on_request(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make(base, tmp_path, max_steps=1, report_to="tensorboard", log_multimodal=False).train()
    (file,) = (tmp_path / "events").iterdir()
    tags = accumulator.EventAccumulator(str(file)).Reload().Tags()
    assert "train/agreement" in tags["scalars"]
    assert not [tag for tag in [*tags["images"], *tags["tensors"]] if "rollouts" in tag]


_TRAIN = """
import sys
from test_report_of_training import make

make(sys.argv[1], sys.argv[2], max_steps=2, report_to=sys.argv[3:], project="evolmm-test").train()
"""


@pytest.fixture(scope="module")
def tracked(base, tmp_path_factory):
    """A run that reports to wandb, and to trackio if it is installed, in a process of its own, at whose end all is written."""
    trackers = ["wandb", *(["trackio"] if importlib.util.find_spec("trackio") else [])]
    folder = tmp_path_factory.mktemp("tracked")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    command = [sys.executable, "-c", _TRAIN, base, str(folder / "run"), *trackers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_wandb_has_scalars_and_pictures(tracked):
    (log,) = tracked.glob("wandb/offline-run-*/*.wandb")
    assert len(list(log.parent.rglob("media/images/rollouts*.png"))) == 4
    content = log.read_bytes()
    assert b"train/agreement" in content and b"rollouts" in content
    assert b"proposer's reward" in content  # the captions


def test_trackio_has_scalars_and_pictures(tracked):
    pytest.importorskip("trackio", reason="trackio is not installed")
    with sqlite3.connect(tracked / "trackio" / "evolmm-test.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    assert any("train/agreement" in row for row in rows)
    pictures = [row for row in rows if "rollouts/0" in row]
    assert len(pictures) == 2
    assert all("agreement" in row[f"rollouts/{i}"]["caption"] for row in pictures for i in range(2))
