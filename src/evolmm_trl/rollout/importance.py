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


"""Weights of samples that another program drew: the trainer's probability of a token over the sampler's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator


def log_ratio(logps: torch.Tensor, sampling_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    How much likelier, in nats, the trainer's model makes the tokens than the sampler did.

    Args:
        logps (`torch.Tensor` of shape `(rows, C)`):
            The trainer's log-probs.
        sampling_logps (`torch.Tensor` of shape `(rows, C)`):
            The sampler's, of the policy that drew the tokens; `nan` where it gave none, which then counts as no difference.
        mask (`torch.Tensor` of shape `(rows, C)`):
            1 over the tokens that count.

    Returns:
        `torch.Tensor` of shape `(rows, C)`: 0 where nothing counts.
    """
    difference = torch.nan_to_num(logps.float() - sampling_logps, nan=0.0)
    return difference.masked_fill(~mask.bool(), 0.0)


def importance_ratio(
    log_ratio: torch.Tensor, mode: str, clip_min: float | None, clip_max: float | None
) -> torch.Tensor:
    """
    The weights by which TRL multiplies the policy loss of samples from vLLM.

    Args:
        log_ratio (`torch.Tensor` of shape `(rows, C)`):
            As by [`log_ratio`].
        mode (`str`):
            `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"`: a weight per token or one per
            row; outside the bounds it becomes the bound, or 0.
        clip_min (`float`, *optional*), clip_max (`float`, *optional*):
            The bounds.

    Returns:
        `torch.Tensor`: shape (rows, C), or (rows, 1).
    """
    level, _, how = mode.partition("_")
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    if how == "truncate":
        return ratio.clamp(clip_min, clip_max)
    low = -torch.inf if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@dataclass
class SamplingDifference:
    """
    How far the sampler's log-probs are from the trainer's, over the parts of an optimizer step.

    Args:
        parts (`list[torch.Tensor]`):
            Per part the sum, number and maximum of the differences' sizes, and the sum, number, maximum and minimum of the
            weights.
    """

    parts: list[torch.Tensor] = field(default_factory=list)

    def add(self, log_ratio: torch.Tensor, ratio: torch.Tensor | None, mask: torch.Tensor) -> None:
        """Counts the tokens of a part, and its weights (rows, C) or (rows, 1)."""
        mask = mask.bool()
        size = log_ratio.abs()[mask]
        counted = ratio is not None and size.numel() > 0
        weights = (ratio[mask] if ratio.size(1) == mask.size(1) else ratio[mask.any(1)]) if counted else size[:0]
        self.parts.append(
            torch.stack(
                [
                    size.sum(),
                    size.new_tensor(size.numel()),
                    size.amax() if size.numel() else size.new_zeros(()),
                    weights.sum(),
                    weights.new_tensor(weights.numel()),
                    weights.amax() if weights.numel() else weights.new_tensor(-torch.inf),
                    weights.amin() if weights.numel() else weights.new_tensor(torch.inf),
                ]
            )
        )

    def metrics(self, accelerator: Accelerator) -> Mapping[str, float]:
        """TRL's metrics of the step, over all processes; begins anew. Nothing if no token counted."""
        parts, self.parts = torch.stack(self.parts), []
        totals = accelerator.gather(
            torch.cat([parts[:, :2].sum(0), parts[:, 2:3].amax(0), parts[:, 3:5].sum(0), parts[:, 5].amax(0, True)])
        ).view(-1, 6)
        lowest = accelerator.gather(parts[:, 6].amin(0, True)).min().item()
        difference, tokens, _, weight, weights, _ = totals.sum(0).tolist()
        _, _, largest, _, _, highest = totals.amax(0).tolist()
        if tokens == 0:
            return {}
        found = {"sampling/sampling_logp_difference/mean": difference / tokens}
        found["sampling/sampling_logp_difference/max"] = largest
        if weights:
            found["sampling/importance_sampling_ratio/min"] = lowest
            found["sampling/importance_sampling_ratio/mean"] = weight / weights
            found["sampling/importance_sampling_ratio/max"] = highest
        return found
