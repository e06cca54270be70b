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

"""Whether a run gets better or collapses: what its questions and answers say, and a guard that stops it."""

from .._lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "guard": ["CollapseGuard"],
        "questions": ["QUESTION_KINDS", "cluster_shares", "question_kind", "self_bleu"],
        "run": ["RunHealth"],
    },
)
