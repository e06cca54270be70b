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

"""What can silently go wrong in training, looked for where it would first show."""

import logging
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from peft import PeftModel

from .rollout.samples import Sample, collate_completions
from .schedule import ROLES
from .shared_prefix import with_features


logger = logging.getLogger(__name__)

# Largest mean difference, in nats per token, between the log-probs of the shared-prefix forward and of the plain one.
# In float32 it is about 1e-6, in bfloat16 about 1e-2; a wrong mask or position makes it 0.1 and more
_SHARED_PREFIX_TOLERANCE = {"full": 1e-3, "half": 5e-2}


class StartChecks:
    """
    How [`EvoLMMTrainer`] checks that both roles are in the optimizer, that the image reaches the log-probs that the loss is
    made of, and that gradients reach both roles. Each raises an error, at the latest in the role's first step.
    """

    @staticmethod
    def _check_optimizer_argument(optimizer, model, peft_config, args) -> None:
        separate = args.adapters == "separate" and (peft_config is not None or isinstance(model, PeftModel))
        if optimizer is not None and separate:
            raise ValueError(
                "`optimizers` holds an optimizer, but it was made before the proposer's adapter and would move the idle "
                "role's adapter by momentum and weight decay. Choose the optimizer with `args.optim`; a scheduler alone "
                "can be passed as `optimizers=(None, scheduler)`."
            )

    def _check_optimizer(self) -> None:
        self.roles.check()
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for role in ROLES:
            parameters = self.roles.parameters(role)
            missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
            if missing or not parameters:
                raise RuntimeError(
                    f"{len(missing)} of the {role}'s {len(parameters)} trainable tensors are not in the optimizer"
                    f"{f', such as {missing[0]}' if missing else ''}; they would silently never train. Let the trainer make "
                    "the optimizer, and change no `requires_grad` in between."
                )

    @torch.no_grad()
    def _check_first_batch(self, samples: list[Sample], counts: list[bool]) -> None:
        """
        Fails if the log-probs that the loss is made of do not depend on the image. Falls back to the plain forward, with
        a warning, if the shared prefix does not give the plain forward's.
        """
        # Without dropout, which would make any two forwards differ and shift the random stream of a resumed run
        self.model.eval()
        mask = self._to_device(collate_completions(samples, self._tokenizer.pad_token_id))["completion_mask"].bool()
        mask &= torch.tensor(counts, device=mask.device)[:, None]
        has_pixels = all("pixel_values" in sample.prompt.image_inputs for sample in samples)
        has_pixels = all(gather_object([has_pixels]))  # what follows is done on all processes or on none

        def logps(samples: list[Sample], shared: bool) -> torch.Tensor:
            return self._completion_logps(self.model, self._collate(samples, counts, shared))[mask]

        if self._share_prefix and not self._sharing_verified and has_pixels:
            difference = (logps(samples, True) - logps(samples, False)).abs().sum() / mask.sum().clamp(min=1)
            difference = self.accelerator.gather(difference).max().item()
            half = self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32
            self._sharing_verified = difference <= _SHARED_PREFIX_TOLERANCE["half" if half else "full"]
            if not self._sharing_verified:
                logger.warning(
                    "The shared-prefix forward does not give the plain forward's log-probs: their mean difference is %.2g "
                    "per token. The plain path is taken from here on, for this run.",
                    difference,
                )
                self._share_prefix = self._share_features = self._share_prefill = False
        shared = self._share_prefix
        if not shared and not has_pixels:
            raise RuntimeError(
                f"The batch of the {self.role}'s first step holds no `pixel_values` but "
                f"{sorted(samples[0].prompt.image_inputs)}: the policy gradient would not see the image. If these are "
                "questions of a checkpoint, which are kept as the vision tower's features, resume with shared_prefix=True."
            )
        with self._sampling() as model:
            others = self._with_other_images(model, samples)
        # Both on every process, since sharded weights are gathered for them, and the verdict is that of all
        own, other = logps(samples, shared), logps(others, shared)
        blind = mask.any() and torch.equal(own, other)
        if any(gather_object([bool(blind)])):
            raise RuntimeError(
                f"The {self.role}'s log-probs do not change with the image: the policy gradient would not see it. Check "
                "that the chat template places the image and the processor returns it."
            )
        self.model.train()

    def _with_other_images(self, model, samples: list[Sample]) -> list[Sample]:
        """The samples with the negatives of their images, one prompt per group as before."""
        prompts = {id(sample.prompt): sample.prompt for sample in samples}
        others = []
        for prompt in prompts.values():
            inputs = {k: 1.0 - v if k == "pixel_values" else v for k, v in prompt.image_inputs.items()}
            features = None if prompt.features is None else {k: 1.0 - v for k, v in prompt.features.items()}
            others.append(replace(prompt, image_inputs=inputs, features=features))
        if all(prompt.features is not None and "pixel_values" in prompt.image_inputs for prompt in others):
            others = with_features(model, others)
        others = dict(zip(prompts, others, strict=True))
        return [replace(sample, prompt=others[id(sample.prompt)]) for sample in samples]

    def _check_first_gradient(self, norm: float) -> None:
        if norm == 0.0:
            raise RuntimeError(
                f"No gradient reached the {self.role}'s {len(self.roles.parameters(self.role))} trainable tensors although "
                "its samples have advantages: it would silently never train. Check that nothing froze or detached them."
            )
