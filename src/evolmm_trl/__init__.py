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

"""Train vision-language models from images nobody labelled."""

from importlib.metadata import PackageNotFoundError, version

from ._lazy import lazy_names


try:
    __version__ = version("evolmm-trl")
except PackageNotFoundError:
    __version__ = "unknown"

# Each name is imported when it is first used, so that `import evolmm_trl` does not import torch.
__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "answers": ["canonical_answer"],
        "asking": ["Reply", "ask"],
        "config": ["EvoLMMConfig"],
        "data": ["load_images"],
        "health.guard": ["CollapseGuard"],
        "kl": ["AdaptiveKL"],
        "processing": ["load_processor"],
        "prompts": ["RolePrompts"],
        "sr2se.early_exit": ["EarlyExitReasoner"],
        "sr2se.pipeline": ["SR2SEConfig", "run_pipeline"],
        "sr2se.sr_dpo": ["SRDPOConfig", "SRDPOTrainer"],
        "report": ["write_report"],
        "rewards": ["discrete_proposer_reward", "discrete_solver_rewards", "proposer_reward", "solver_rewards"],
        "solver": ["load_prompts", "load_solver", "merge_solver"],
        "trainer": ["EvoLMMTrainer"],
        "voting": ["Vote", "vote"],
    },
)
__all__ += ["__version__"]
