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

"""The controller that keeps a role near the frozen base model."""

import math

import torch


def sampled_kl(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    r"""
    The KL of the policy to the reference as TRL estimates it from the sampled tokens alone,

    $$k = e^{\Delta} - \Delta - 1, \quad \Delta = \ln \pi_{ref} - \ln \pi.$$

    Args:
        logps (`torch.Tensor`), reference_logps (`torch.Tensor`):
            Log-probs of the same tokens, of one shape.

    Returns:
        `torch.Tensor`: of that shape, in nats, 0 or more.
    """
    difference = reference_logps - logps
    return torch.exp(difference) - difference - 1


class AdaptiveKL:
    r"""
    Adaptive weight of the KL penalty of one role (EvoLMM, https://huggingface.co/papers/2511.16672):

    $$\beta \leftarrow \mathrm{clip}(\beta \exp(\eta (\overline{KL} - KL^*)/KL^*), \beta_{min}, \beta_{max}).$$

    Args:
        beta (`float`):
            Starting weight.
        target (`float`):
            KL the controller aims at, in nats per completion token.
        rate (`float`):
            Speed eta of the controller. 0 keeps beta fixed.
        min_beta (`float`, *optional*, defaults to `1e-8`):
            Smallest weight. The KL starts at 0, so beta falls to this floor before the policy has moved: a floor far
            below `beta` lets the KL overshoot its target.
        max_beta (`float`, *optional*, defaults to `1e2`):
            Largest weight.
    """

    def __init__(self, beta: float, target: float, rate: float, min_beta: float = 1e-8, max_beta: float = 1e2):
        if not (beta >= 0 and target > 0 and rate >= 0 and 0 <= min_beta <= max_beta):
            raise ValueError(
                f"Got beta={beta}, target={target}, rate={rate}, min_beta={min_beta}, max_beta={max_beta}; expected "
                "beta >= 0, target > 0, rate >= 0 and 0 <= min_beta <= max_beta."
            )
        self.beta = beta
        self.target = target
        self.rate = rate
        self.min_beta = min_beta
        self.max_beta = max_beta

    def update(self, kl: float) -> float:
        """
        Moves beta by one measured KL and returns it.

        Args:
            kl (`float`):
                Mean KL of the role's last step, in nats per completion token.

        Returns:
            `float`: the weight for the role's next step.

        Raises:
            `ValueError`: if `kl` is not a number: the loss was not either, and the weights are lost.
        """
        if math.isnan(kl):
            raise ValueError(
                "The KL to the frozen base is NaN, so the last update was too. Resume from the last checkpoint with a "
                "lower learning_rate or max_grad_norm."
            )
        exponent = min(self.rate * (kl - self.target) / self.target, 700.0)  # exp overflows beyond
        self.beta = min(max(self.beta * math.exp(exponent), self.min_beta), self.max_beta)
        return self.beta

    def state_dict(self) -> dict:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict) -> None:
        self.beta = state["beta"]
