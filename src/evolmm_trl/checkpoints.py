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

"""Checkpoints of the trainer, on disk and on the Hub: both roles, and all that a resumed run goes on from."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy

from .engines import load_fsdp2_optimizer
from .model_card import write_model_card
from .prompts import PROMPTS_NAME
from .role_adapters import ADAPTER_OF, load_role_adapters
from .schedule import PROPOSER, ROLES
from .state import STATE_NAME, load_samples, save_samples


logger = logging.getLogger(__name__)


class RoleCheckpoints:
    """How [`EvoLMMTrainer`] saves, loads and pushes, around what its parent does."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_model_card(self, folder)
            (folder / PROMPTS_NAME).write_text(json.dumps(asdict(self.prompts), indent=2) + "\n")

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **kwargs) -> None:
        """Writes this trainer's model card to `args.output_dir`."""
        if self.is_world_process_zero():
            write_model_card(self, Path(self.args.output_dir), model_name, dataset_name, tags)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        # The trainer's state is written last, by transformers, and makes a checkpoint complete: that of an earlier run in
        # this place must not make a half-written one look so
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        save_samples(
            self._pending_questions, folder / f"pending_questions_{self.accelerator.process_index}.safetensors"
        )
        rollout = self._rollout_state()
        if rollout is not None:
            (folder / self._rollout_file()).write_text(json.dumps(rollout))
        if self.args.should_save:
            state = {
                "rollout_in_flight": rollout is not None,
                "step": self.state.global_step,
                "kl": {role: self.kl[role].state_dict() for role in ROLES},
                "baselines": {role: self.baselines[role].state_dict() for role in ROLES},
                "health": self.health.state_dict(),
                "rollout_log_bytes": len(self.rollout_log),
                "rollout_log_digest": self.rollout_log.digest,
                "preference_log_bytes": len(self.preference_log),
                "processes": self.accelerator.num_processes,
                "images": self._image_order.state_dict(self.state.global_step),
            }
            (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")
        super()._save_checkpoint(model, trial)

    def _rollout_file(self) -> str:
        return f"rollout_in_flight_{self.accelerator.process_index}.json"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Pushes a checkpoint from a thread as the parent does, but from a folder of its own. The parent pushes the output
        folder, where `rollouts.jsonl` grows meanwhile, and which lacks the checkpoint's proposer and card.
        """
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done() and not args.hub_always_push:
                return
            self._finish_current_push()  # it reads the folder that is now written anew
        output_dir, folder = args.output_dir, Path(args.output_dir) / "_push"
        folder.mkdir(exist_ok=True)
        for name in ("README.md", PROMPTS_NAME):
            shutil.copy(Path(checkpoint_folder) / name, folder)
        if self.roles.separate:
            proposer = ADAPTER_OF[PROPOSER]
            shutil.copytree(Path(checkpoint_folder) / proposer, folder / proposer, dirs_exist_ok=True)
        if self.rollout_log.path.exists():
            shutil.copy(self.rollout_log.path, folder)
        args.output_dir = str(folder)
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            args.output_dir = output_dir

    def _finish_current_push(self) -> None:
        """Waits as the parent does, and says which pushes failed, of which the parent says nothing."""
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        self.push_in_progress = None
        for job in push.jobs:
            if job.exception() is not None:
                logger.warning("A checkpoint was not pushed to %s: %s", self.hub_model_id, job.exception())
        shutil.rmtree(Path(self.args.output_dir) / "_push", ignore_errors=True)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # before the trainer's state, which says that all have written

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._set_moved(*ROLES)
        if isinstance(self.model, PeftModel):
            # The parent loads one adapter and freezes the other
            load_role_adapters(self.model, resume_from_checkpoint)
            self.roles.check()
        elif self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            if (Path(resume_from_checkpoint) / "adapter_config.json").exists():
                # `from_pretrained` would load the model that it names
                raise ValueError(
                    f"{resume_from_checkpoint} holds adapters, but all weights are trained: pass `peft_config`."
                )
            # The parent skips, with a warning, every tensor whose name in memory is not the one that is saved, which in
            # Qwen2.5-VL are all of them
            saved = type(self.model).from_pretrained(
                resume_from_checkpoint, dtype=self.model.dtype, use_safetensors=True, local_files_only=True
            )
            self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._set_moved(*ROLES)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            # The parent loads one adapter: the best solver beside the last proposer
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.is_fsdp2:
            load_fsdp2_optimizer(self.accelerator, self.model, self.optimizer, checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = json.loads((Path(checkpoint) / STATE_NAME).read_text())
        if state["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was saved by {state['processes']} processes and cannot be resumed on "
                f"{self.accelerator.num_processes}: the questions that wait for the proposer's step are kept per process."
            )
        for role in ROLES:
            self.kl[role].load_state_dict(state["kl"][role])
            self.baselines[role].load_state_dict(state["baselines"][role])
        self.health.load_state_dict(state["health"])
        self._image_order.load_state_dict(state["images"])
        self._pending_questions = load_samples(
            Path(checkpoint) / f"pending_questions_{self.accelerator.process_index}.safetensors"
        )
        if not self._share_prefix and any(sample.prompt.features is not None for sample in self._pending_questions):
            raise ValueError(
                f"{checkpoint} keeps the images of the questions that wait for the proposer's step as the vision tower's "
                "features, which the plain path cannot read: resume with shared_prefix=True, as it was saved, or from a "
                "checkpoint where none wait, right after a proposer's step."
            )
        if state.get("rollout_in_flight") and self.args.async_rollouts:
            self._load_rollout_state(json.loads((Path(checkpoint) / self._rollout_file()).read_text()))
        if self.accelerator.is_main_process:
            self.rollout_log.resume(state["rollout_log_bytes"], state.get("rollout_log_digest"))
            if self.args.collect_preferences:
                self.preference_log.resume(state["preference_log_bytes"])
