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

"""A checkpoint is used if it was written to its end, and otherwise never."""

import errno
import json
import logging
import shutil

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, lora, snapshot

from evolmm_trl.state import check_complete, last_complete_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


def make(base, folder, **options):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **options}
    return TalkingTrainer(
        model=base, args=config(folder, **options), train_dataset=image_dataset(), peft_config=lora()
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of four steps, with a checkpoint after each."""
    trainer = make(base, tmp_path_factory.mktemp("whole"), save_steps=1, save_total_limit=None)
    trainer.train()
    return trainer


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the run's folder, to be damaged."""
    return shutil.copytree(whole.args.output_dir, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES = {
    "trainer_state.json is missing or cut off": lambda checkpoint: cut(checkpoint / "trainer_state.json"),
    "trainer_state.json is missing": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "evolmm_state.json is missing or cut off": lambda checkpoint: cut(checkpoint / "evolmm_state.json"),
    "lacks evolmm_state.json": lambda checkpoint: (checkpoint / "evolmm_state.json").unlink(),
    "its files are of the steps 4 and 3": lambda checkpoint: shutil.copy(
        checkpoint.parent / "checkpoint-3" / "trainer_state.json", checkpoint / "trainer_state.json"
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_half_written_checkpoint_is_named_and_passed_over(folder, what, caplog):
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    DAMAGES[what](folder / "checkpoint-4")
    with pytest.raises(ValueError, match=what):
        check_complete(folder / "checkpoint-4")
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-3")
    assert "checkpoint-4" in caplog.text and what in caplog.text


def test_the_number_of_a_checkpoint_is_a_number(folder):
    (folder / "checkpoint-3").rename(folder / "checkpoint-10")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10")
    (folder / "checkpoint-11-old").mkdir()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10")
    assert last_complete_checkpoint(folder / "nowhere") is None


def test_a_run_resumes_from_the_last_complete_checkpoint(base, whole, folder):
    cut(folder / "checkpoint-4" / "trainer_state.json")
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    resumed = make(base, folder)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.rollout_log.path.read_bytes() == whole.rollout_log.path.read_bytes()
    after, expected = snapshot(resumed), snapshot(whole)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")


def test_a_run_that_has_come_to_its_end_is_resumed_to_no_further_step(base, whole, folder):
    resumed = make(base, folder)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.rollout_log.path.read_bytes() == whole.rollout_log.path.read_bytes()
    assert {role: b.state_dict() for role, b in resumed.baselines.items()} == {
        role: b.state_dict() for role, b in whole.baselines.items()
    }
    after, expected = snapshot(resumed), snapshot(whole)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_without_a_complete_checkpoint_a_run_starts_from_the_beginning_and_says_so(base, whole, tmp_path, caplog):
    (tmp_path / "checkpoint-1").mkdir()
    resumed = make(base, tmp_path)
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        resumed.train(resume_from_checkpoint=True)
    assert "has no complete checkpoint: training starts from the beginning" in caplog.text
    assert resumed.rollout_log.path.read_bytes() == whole.rollout_log.path.read_bytes()


def test_a_half_written_checkpoint_that_is_asked_for_is_refused(base, folder):
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="resume from an earlier checkpoint, or with `resume_from_checkpoint=True`"):
        make(base, folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(ValueError, match="is not a folder"):
        make(base, folder).train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["weights", "optimizer", "trainer state"])
def test_a_full_disk_ends_the_run_with_the_last_complete_checkpoint_intact(base, tmp_path, monkeypatch, when):
    trainer = make(base, tmp_path)
    target, name = {
        "weights": (PeftModel, "save_pretrained"),
        "optimizer": (trainer, "_save_optimizer_and_scheduler"),
        "trainer state": (type(trainer.state), "save_to_json"),
    }[when]
    save = trainer._save_checkpoint

    def save_until_the_disk_is_full(*args):
        if trainer.state.global_step == 4:
            monkeypatch.setattr(target, name, full_disk)
        save(*args)

    trainer._save_checkpoint = save_until_the_disk_is_full
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_checkpoint_that_is_written_over_is_not_complete_until_it_is_whole(base, folder, monkeypatch):
    resumed = make(base, folder, save_total_limit=None)
    monkeypatch.setattr(resumed, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(OSError, match="No space left"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    # The earlier run's checkpoint-4 has been begun anew
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-3")


def test_the_limit_never_deletes_the_only_good_checkpoint(base, tmp_path):
    trainer = make(base, tmp_path, save_steps=1)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
