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

"""A real vLLM server on a CPU, started by the script that users start one by."""

import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path


ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# Compiling is for long runs, and a server that may use all cores is slower on a shared machine
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The distribution is called vllm-cpu, and the command `vllm` looks for one called vllm
    "VLLM_SERVE": f"{PYTHON} -m vllm.entrypoints.openai.api_server --model",
}
_OPTIONS = "--dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 32 --max-num-batched-tokens 2048"


class VLLMProcess:
    """
    A server that can be killed and started again, at the same address.

    Args:
        model (`str` or `Path`):
            Folder of the base model; the size of its attention heads is one that vLLM knows on CPUs.
        log (`Path`):
            File for what the server prints.
        *options (`str`):
            Further options of `vllm serve`.
    """

    def __init__(self, model: str | Path, log: Path, *options: str):
        self.model, self.log = str(model), Path(log)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = [*_OPTIONS.split(), "--host", "127.0.0.1", "--port", str(self.port), *options]
        self.process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> "VLLMProcess":
        """Starts the server, and waits until it is up."""
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT / "examples")}
        command = ["bash", str(ROOT / "examples" / "serve_vllm.sh"), self.model, *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        if wait:
            self.wait()
        return self

    def wait(self, limit: float = 600) -> None:
        """Waits until the server answers."""
        end = time.monotonic() + limit
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"The vLLM server has not started (exit code {self.process.poll()}):\n{tail}")
            time.sleep(0.5)

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """Kills the server and all processes it has started, at once."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def kill_in_rollouts(self, trainer, steps, after: float) -> None:
        """Kills the server, and starts it again, so many seconds after the trainer has sent off the rollouts of these steps."""
        send = trainer._send_rollout

        def restart():
            self.kill()
            self.start(wait=False)

        def send_and_kill(step, rows):
            send(step, rows)
            if step in steps:
                threading.Timer(after, restart).start()

        trainer._send_rollout = send_and_kill

    def kill_engine(self) -> None:
        """Kills the engine alone, as running out of memory does; the server in front of it says so and ends."""
        listing = subprocess.run(
            ["ps", "-o", "pid=,args=", "-g", str(self.process.pid)], capture_output=True, text=True
        )
        engines = [line.split()[0] for line in listing.stdout.splitlines() if "VLLM::EngineCore" in line]
        for pid in engines:
            os.kill(int(pid), signal.SIGKILL)
        assert engines, listing.stdout
        self.process.wait(60)
        self.kill()
