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

"""The model `evolmm` of lmms-eval: `lmms-eval --model evolmm --model_args pretrained=...,adapter=...`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package.
"""

from lmms_eval.models.registry_v2 import ModelManifest


# A class path and no class: lmms-eval reads every plugin's manifest, whichever model it is asked for
MANIFEST = ModelManifest(model_id="evolmm", chat_class_path="evolmm_trl.evaluation.lmms_eval_model.EvoLMM")
