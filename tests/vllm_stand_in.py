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
The part of a vLLM server that the client talks to, in this process, for the faults that a real one cannot be made to have.
What it answers is what a real one (0.32) answered.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


IMAGE_TOKEN, END_TOKEN = 7, 9


def error(status: int, message: str) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "", "param": None, "code": status}}


class VLLMStandIn:
    """
    A server that can die, come back and misbehave.

    Args:
        image_tokens (`int`):
            What it repeats a prompt's image token to.

    Attributes:
        adapters (`dict[str, str]`):
            The loaded adapters' folders by name.
        asked (`list[dict]`):
            The bodies of all generations, in the order they came.
        faults (`list[Callable]`):
            What the next generations meet instead of an answer, each for one of them: a function of the server and the body
            that returns status and body, or `None` for no answer at all.
        routes (`dict[str, tuple]`):
            Answers that replace those of whole addresses.
        uploads (`dict[str, dict]` or `None`):
            The files that were uploaded, by adapter and name, if it takes uploads.
        paths (`list[str]`):
            Method and address of all that was asked.
    """

    def __init__(self, image_tokens: int = 4):
        self.image_tokens = image_tokens
        self.adapters: dict[str, str] = {}
        self.asked: list[dict] = []
        self.answered = 0
        self.loads: list[str] = []
        self.headers: list[dict] = []
        self.faults: list[Callable] = []
        self.routes: dict[str, tuple[int, dict | str]] = {}
        self.uploads: dict[str, dict[str, bytes]] | None = None
        self.paths: list[str] = []
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Comes up, without adapters."""
        self.adapters.clear()
        if self.uploads is not None:
            self.uploads.clear()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def do_PUT(self):
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def do_DELETE(self):
                self.answer(None)

            def answer(self, body):
                stand_in.headers.append(dict(self.headers))
                stand_in.paths.append(f"{self.command} {self.path}")
                answer = stand_in.routes.get(self.path) or stand_in.respond(self.path, body)
                if answer is None:
                    return self.connection.close()
                status, content = answer
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """Is gone: nothing listens at its address."""
        self.server.shutdown()
        self.server.server_close()

    def respond(self, path: str, body: dict | bytes | None) -> tuple[int, dict | str] | None:
        match path:
            case "/health":
                return 200, ""
            case "/v1/models":
                base = {"id": "base", "root": "/models/base", "parent": None}
                cards = [{"id": n, "root": f, "parent": "base"} for n, f in self.adapters.items()]
                return 200, {"object": "list", "data": [base, *cards]}
            case "/v1/load_lora_adapter":
                name = body["lora_name"]
                if name in self.adapters:
                    return error(400, f"The lora adapter '{name}' has already been loaded.")
                self.adapters[name] = body["lora_path"]
                self.loads.append(name)
                return 200, f"Success: LoRA adapter '{name}' added successfully."
            case "/v1/unload_lora_adapter":
                if self.adapters.pop(body["lora_name"], None) is None:
                    return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
                return 200, "Success"
            case "/inference/v1/generate":
                return self.generate(body)
        if self.uploads is not None and path.startswith("/evolmm/adapters"):
            match path.split("/")[3:]:
                case [name, file]:
                    self.uploads.setdefault(name, {})[file] = body
                    return 200, {"folder": f"/uploads/{name}"}
                case [name]:
                    self.uploads.pop(name, None)
            return 200, {}
        return 404, {"detail": "Not Found"}

    def generate(self, body: dict) -> tuple[int, dict] | None:
        if "content_parts" in body:
            with self.lock:
                self.asked.append(body)
                fault = self.faults.pop(0) if self.faults else None
            if fault is not None:
                return fault(self, body)
        if body["model"] not in self.adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        self.answered += "content_parts" in body
        return 200, self.completed(body)

    def completed(self, body: dict) -> dict:
        """Samples that depend on the adapter and on their seed alone."""
        sampling = body["sampling_params"]
        prompt = [
            t for token in body["token_ids"] for t in [token] * (self.image_tokens if token == IMAGE_TOKEN else 1)
        ]
        choices = []
        for index in range(sampling.get("n", 1)):
            if "allowed_token_ids" in sampling:
                ids, logp = sampling["allowed_token_ids"], 0.0
            else:
                ids, logp = [100 + (sampling["seed"] + index) % 50, END_TOKEN], -1.5
            content = [{"token_id": token, "logprob": logp, "rank": 1, "top_logprobs": []} for token in ids]
            choices.append(
                {"index": index, "finish_reason": "stop", "token_ids": ids, "logprobs": {"content": content}}
            )
        return {"model": body["model"], "choices": choices[::-1], "prompt_token_ids": prompt}
