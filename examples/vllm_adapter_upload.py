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

"""
Lets a trainer upload its adapters to a vLLM server with which it shares no disk. Copy this file, which needs nothing but
vLLM, to the server's host and start the server with it:

    PYTHONPATH=FOLDER_OF_THIS_FILE bash serve_vllm.sh MODEL --middleware vllm_adapter_upload.AdapterUpload

Give the server a key (`--api-key`, or VLLM_API_KEY in its environment), and the trainer the same as VLLM_API_KEY, unless the
network is the trainer's alone: who can reach the server can otherwise give it adapters.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path


_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADDRESS = re.compile(r"/evolmm/adapters(?:/(evolmm-[a-z0-9-]{1,80})(?:/([a-z_.]+))?)?")
_LARGEST = 4 * 1024**3


class AdapterUpload:
    """
    ASGI middleware: `PUT /evolmm/adapters/NAME/FILE` writes a file of an adapter and answers with the adapter's folder on this
    host, `DELETE /evolmm/adapters/NAME` deletes it, `GET /evolmm/adapters` says that both can be done. They are for those whom
    vLLM lets see its models. All else is vLLM's.
    """

    def __init__(self, app):
        self.app = app
        self.folder = tempfile.TemporaryDirectory(prefix="evolmm-adapters-")  # deleted with this object

    async def __call__(self, scope, receive, send):
        address = _ADDRESS.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if address is None:
            return await self.app(scope, receive, send)
        status, answer = await self.answer(scope, receive, *address.groups())
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def answer(self, scope, receive, name: str | None, file: str | None) -> tuple[int, dict]:
        status = await self.status_of_models(scope)
        if status != 200:
            return status, {"error": f"vLLM answers {status} to a request for its models with this key"}
        match scope["method"], name, file:
            case "GET", None, None:
                return 200, {"folder": self.folder.name}
            case "PUT", str(), str() if file in _FILES:
                return await self.write(receive, Path(self.folder.name, name), file)
            case "DELETE", str(), None:
                shutil.rmtree(Path(self.folder.name, name), ignore_errors=True)
                return 200, {}
        return 404, {"error": f"{scope['method']} {scope['path']} is not known"}

    async def status_of_models(self, scope) -> int:
        """What vLLM, wherever it has its keys from, answers to the same caller who asks for its models."""
        asked = {**scope, "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models", "query_string": b""}
        statuses = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await self.app(asked, receive, send)
        return statuses[0]

    async def write(self, receive, folder: Path, file: str) -> tuple[int, dict]:
        folder.mkdir(exist_ok=True)
        # Under a name of its own: two processes may upload it at the same time
        handle, partial = tempfile.mkstemp(dir=folder)
        size, more = 0, True
        try:
            with open(handle, "wb") as output:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, {"error": "the upload has not come to its end"}
                    size += len(message.get("body", b""))
                    if size > _LARGEST:
                        return 413, {"error": f"an adapter of more than {_LARGEST} bytes"}
                    output.write(message.get("body", b""))
                    more = message.get("more_body", False)
            os.replace(partial, folder / file)
        finally:
            Path(partial).unlink(missing_ok=True)
        return 200, {"folder": str(folder)}
