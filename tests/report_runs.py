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

"""Rollout logs and runs for the tests of the page, with whatever a model could write."""

import json
from pathlib import Path

from PIL import Image

from evolmm_trl.monitor import hash_start
from evolmm_trl.thumbnails import Thumbnails, image_digest
from evolmm_trl.voting import vote


def record(step: int, **changes) -> dict:
    """A line of the rollout log. `answers` are canonical ones, `None` for an unreadable one."""
    answers = changes.pop("answers", ["4", "4", "4", "5", None])
    votes = vote(answers)
    return {
        "step": step,
        "image_id": "chart.png",
        "image_digest": None,
        "question": "How many bars are there?",
        "question_completion": "<question>How many bars are there?</question>",
        "question_well_formed": True,
        "answers": [
            {
                "completion": "none" if answer is None else f"I count. <answer>{answer}</answer>",
                "answer": answer,
                "canonical": answer,
                "words_before_answer": 2,
                "reward": round(share**0.7, 4),
                "advantage": 0.1,
            }
            for answer, share in zip(answers, votes.shares, strict=True)
        ],
        "votes": votes.counts,
        "majority": votes.majority,
        "agreement": votes.agreement,
        "entropy": votes.entropy,
        "proposer_reward": 0.5,
        "proposer_advantage": 0.0,
        "trained_on": {"solver": step, "proposer": None},
        **changes,
    }


def write_run(folder: Path, records: list[dict], end: bytes = b"") -> Path:
    """A run's folder with these rollouts in its log."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in records)
    (folder / "rollouts.jsonl").write_bytes(lines + end)
    return folder


def write_history(place: Path, rows: list[dict], step: int | None = None) -> None:
    """The trainer's state in a folder of a run, with these rows of its history, saved with the log that the run has now."""
    place.mkdir(parents=True, exist_ok=True)
    state = {"global_step": rows[-1]["step"] if step is None else step, "log_history": rows}
    (place / "trainer_state.json").write_text(json.dumps(state))
    log = place.parent / "rollouts.jsonl"
    length = log.stat().st_size
    of_log = {"rollout_log_bytes": length, "rollout_log_digest": hash_start(log, length).hexdigest()}
    (place / "evolmm_state.json").write_text(json.dumps(of_log))


def add_pictures(folder: Path, count: int, limit: int = 300) -> list[str]:
    """Thumbnails of one-coloured images; returns the digests."""
    images = [Image.new("RGB", (64, 48), (i % 256, 40, 200 - i % 200)) for i in range(count)]
    digests = [image_digest(image) for image in images]
    thumbnails = Thumbnails(folder, limit)
    thumbnails.keep(thumbnails.candidates(digests, images), write=True)
    return digests
