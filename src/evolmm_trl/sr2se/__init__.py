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

"""SR2SE: reasoning that stops when it is sure, perception that corrects itself, and SR-DPO."""

from .._lazy import lazy_names


# Each name is imported when it is first used: `evolmm sr2se --help` does not need torch.
__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "early_exit": ["ConfidenceGate", "EarlyExitReasoner", "GateRollouts", "GateTrainingConfig", "train_gate"],
        "generation": ["Completion", "generate"],
        "pipeline": ["SR2SEConfig", "run_pipeline"],
        "refinement": ["AgreementLabeller", "RefinementConfig", "build_pairs"],
        "sr_dpo": ["SRDPOConfig", "SRDPOTrainer", "load_preferences"],
        "sub_policies": ["SubPolicies", "SubPolicyPrompts"],
    },
)
