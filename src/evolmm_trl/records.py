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

"""What the trainer writes down of its rollouts, for people: logs, metrics, pictures, preference pairs and the report."""

import json
import logging
import os
from pathlib import Path

from accelerate.utils import gather_object
from jinja2 import TemplateError
from transformers.trainer import TRAINER_STATE_NAME

from .health.run import RunHealth
from .monitor import Rollout, RolloutLog, rollout_metrics
from .report import write_report
from .state import STATE_NAME
from .thumbnails import REPORT_FOLDER, Thumbnails
from .trackers import RolloutPictures


logger = logging.getLogger(__name__)

# What a full disk, a log that was edited, a template and the libraries that draw can raise
_REPORT_ERRORS = (OSError, ValueError, LookupError, ArithmeticError, RuntimeError, TemplateError)


class RolloutRecords:
    """How [`EvoLMMTrainer`] records its rollouts."""

    def _set_up_records(self) -> None:
        folder = Path(self.args.output_dir)
        self.rollout_log = RolloutLog(folder / "rollouts.jsonl")
        self.preference_log = RolloutLog(folder / "preferences.jsonl")
        self.health = RunHealth()
        self.thumbnails = Thumbnails(folder, self.args.report_images)
        self._pictures = RolloutPictures(self.callback_handler)

    def _record(self, rollouts: list[Rollout], rows: list[dict]) -> None:
        """Logs the rollouts of all processes, to the rollout log, the metrics and TRL's completion tables."""
        records = gather_object([rollout.record(self.state.global_step + 1) for rollout in rollouts])
        with self._timed("health"):
            metrics = {**rollout_metrics(records), **self.health.observe(records)}
        for name, value in metrics.items():
            self._log_train(name, value)
        if self.args.early_votes:
            self._log_train("votes", sum(len(record["answers"]) for record in records) / len(records))
        images = [row["image"] for row in rows]
        if self.args.report_images:
            candidates = self.thumbnails.candidates([rollout.image_digest for rollout in rollouts], images)
            candidates = {digest: file for found in gather_object([candidates]) for digest, file in found.items()}
            self.thumbnails.keep(candidates, write=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.rollout_log.write(records)
            if self.log_multimodal:
                self._pictures.log(records[: len(images)], images, self.state.max_steps)
        if self.args.collect_preferences:
            self._collect_preferences(rollouts, rows)
        if not self.log_completions:
            return
        n = self.args.num_generations
        images = gather_object([[image] for image in images]) if self.log_multimodal else [None] * len(records)
        for image, record in zip(images, records, strict=True):
            prompt = [{"role": "user", "content": self.prompts.solver.replace("{question}", record["question"])}]
            for answer in record["answers"][:n]:
                self._logs["prompt"].append(prompt)
                self._logs["completion"].append([{"role": "assistant", "content": answer["completion"]}])
                self._logs["rewards"]["reward"].append(answer["reward"])
                self._logs["advantages"].append(answer["advantage"])
                if self.log_multimodal:
                    self._logs["images"].append(image)

    def _collect_preferences(self, rollouts: list[Rollout], rows: list[dict]) -> None:
        """Writes the disagreements of all processes, and their images, under names that their pixels give."""
        folder = self.preference_log.path.parent
        pairs = []
        for rollout, row in zip(rollouts, rows, strict=True):
            pair = rollout.preference(self.args.preference_agreement)
            if pair is None:
                continue
            image = row["image"]
            file = folder / "_preference_images" / f"{rollout.image_digest}.png"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(f".{self.accelerator.process_index}.tmp")
                image.save(temporary, "PNG")
                os.replace(temporary, file)
            pairs.append({"image_path": file.relative_to(folder).as_posix(), **pair})
        pairs = gather_object(pairs)
        self._log_train("preference_pairs", len(pairs))
        if self.accelerator.is_main_process:
            self.preference_log.write(pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent, which shows completions again where there are none since, and with the scores of evaluation."""
        wanted = self.log_completions
        self.log_completions = wanted and self.model.training and bool(self._logs["completion"])
        super().log(logs, start_time)
        if self.log_completions:
            for column in ("prompt", "completion", "rewards", "advantages", "images"):
                self._logs[column].clear()
        self.log_completions = wanted

    def _write_report(self) -> None:
        folder = Path(self.args.output_dir)
        try:
            (folder / REPORT_FOLDER).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(folder / REPORT_FOLDER / TRAINER_STATE_NAME))
            of_log = {"rollout_log_bytes": len(self.rollout_log), "rollout_log_digest": self.rollout_log.digest}
            (folder / REPORT_FOLDER / STATE_NAME).write_text(json.dumps(of_log, indent=2) + "\n")
            page = write_report(folder, history=self.state.log_history)
        except _REPORT_ERRORS as error:  # the training is done, and its page can be written later
            logger.warning(
                "The report was not written: %s: %s. The training is done; `evolmm report %s` tries again.",
                type(error).__name__,
                error,
                folder,
            )
        else:
            print(f"Report: {page}")
