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

Set the environment variable VLLM_API_KEY on both sides unless the network is the trainer's alone: who can reach the server
can otherwise give it adapters.
"""

import hmac
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path


_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADDRESS = re.compile(r"/evolmm/adapters(?:/(evolmm-[a-z0-9-]{1,80})(?:/([a-z_.]+))?)?")
_LARGEST = 4 * 1024**3


class AdapterUpload:
    """
    ASGI middleware: `PUT /evolmm/adapters/NAME/FILE` writes a file of an adapter and answers with the adapter's folder on this
    host, `DELETE /evolmm/adapters/NAME` deletes it, `GET /evolmm/adapters` says that both can be done. All else is vLLM's.
    """

    def __init__(self, app):
        if any(argument.startswith("--api-key") for argument in sys.argv):
            raise ValueError("Uploads are not guarded by --api-key. Give the key in the environment, as VLLM_API_KEY.")
        self.app = app
        self.key = os.environ.get("VLLM_API_KEY")
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
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            return 401, {"error": "Unauthorized"}
        match scope["method"], name, file:
            case "GET", None, None:
                return 200, {"folder": self.folder.name}
            case "PUT", str(), str() if file in _FILES:
                return await self.write(receive, Path(self.folder.name, name), file)
            case "DELETE", str(), None:
                shutil.rmtree(Path(self.folder.name, name), ignore_errors=True)
                return 200, {}
        return 404, {"error": f"{scope['method']} {scope['path']} is not known"}

    async def write(self, receive, folder: Path, file: str) -> tuple[int, dict]:
        folder.mkdir(exist_ok=True)
        partial, size, more = folder / f"{file}.partial", 0, True
        with partial.open("wb") as output:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return 400, {"error": "the upload has not come to its end"}
                size += len(message.get("body", b""))
                if size > _LARGEST:
                    return 413, {"error": f"an adapter of more than {_LARGEST} bytes"}
                output.write(message.get("body", b""))
                more = message.get("more_body", False)
        partial.replace(folder / file)
        return 200, {"folder": str(folder)}
