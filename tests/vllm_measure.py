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
Measures a vLLM server with hot adapters on this machine's CPU, and writes the table of docs/vllm.md.

    python tests/vllm_measure.py --document docs/vllm.md
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "demo")]

from bench_report import environment, in_place, table  # noqa: E402
from vllm_policy import TOLERANCE, Policy  # noqa: E402
from vllm_process import VLLMProcess  # noqa: E402
from widen import widen  # noqa: E402

from evolmm_trl.rollout.vllm_server import VLLMServers, image_url  # noqa: E402
from evolmm_trl.schedule import ROLES  # noqa: E402


def measure(server: VLLMProcess, folder: Path, swaps: int) -> list[list]:
    """The rows of the table, of this many swaps, one role after the other."""
    policy = Policy(server.model)
    with VLLMServers([server.url], policy.image_token_id, folder / "adapters", request_timeout=120) as servers:
        servers.start(server.model)
        for role in ROLES:
            servers.swap(role, policy.save(role))
        before = policy.largest_difference(servers)
        fresh, stale, size = [], [], 0
        for swap in range(swaps):
            role, image = ROLES[swap % 2], swap // 2 % len(policy.images)
            policy.move(role, 100 + swap)
            # What the server answers now is what it would answer from a stale cache
            (old,) = servers.generate([policy.request(role, image)])
            stale.append(policy.difference(role, image, old))
            servers.swap(role, policy.save(role))
            (new,) = servers.generate([policy.request(role, image)])
            fresh.append(policy.difference(role, image, new))
            if swap == 19:
                after = policy.largest_difference(servers)
        resized = [policy.request(role, i) for role in ROLES for i in (1, 2)]
        resized = [replace(request, image=image_url(policy.images[1 + k % 2])) for k, request in enumerate(resized)]
        by_server = [
            policy.difference(ROLES[k // 2], 1 + k % 2, answer) for k, answer in enumerate(servers.generate(resized))
        ]
        size = sum(file.stat().st_size for file in Path(servers.adapters[role].folder).iterdir())
        local = {role: servers.swap_seconds[role][1:] for role in ROLES}
        servers._servers[0].takes_uploads = None
        for swap in range(20):
            servers.swap(ROLES[swap % 2], policy.save(ROLES[swap % 2]))
        uploaded = [seconds for role in ROLES for seconds in servers.swap_seconds[role][-10:]]
    wrong = sum(difference > TOLERANCE for difference in fresh)
    rows = [
        ["largest difference of log-probs, both roles, before the first swap", f"{before:.1e}"],
        ["the same after 20 swaps", f"{after:.1e}"],
        [f"stale answers in {swaps} swaps (difference above {TOLERANCE:g})", str(wrong)],
        ["largest difference right after a swap", f"{max(fresh):.1e}"],
        ["smallest difference of an answer from the adapter before it", f"{min(stale):.2f}"],
        ["largest difference on images that the server has resized itself", f"{max(by_server):.1e}"],
        ["size of an adapter", f"{size / 1000:.0f} kB"],
    ]
    for role, seconds in local.items():
        rows.append([f"a swap of the {role}, on a shared disk: median, worst", _milliseconds(seconds)])
    rows.append(["a swap by upload: median, worst", _milliseconds(uploaded)])
    return rows


def _milliseconds(seconds: list[float]) -> str:
    return f"{1000 * median(seconds):.0f} ms, {1000 * max(seconds):.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--document", help="Page to write the table into.")
    parser.add_argument("--swaps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = widen(ROOT / "examples/demo/models/room", Path(folder, "model"))
        options = ["--max-lora-rank", "8", "--middleware", "vllm_adapter_upload.AdapterUpload"]
        server = VLLMProcess(model, Path(folder, "server.log"), *options).start()
        try:
            rows = measure(server, Path(folder), arguments.swaps)
        finally:
            server.kill()
    where = environment()
    text = (
        f"{table(['', 'measured'], rows)}\n\nCommit {where['commit']}, {where['cpu']}, {where['cores']} cores on which "
        f"{where['load']:.0f} processes were running, float32, one thread."
    )
    print(text)
    if arguments.document:
        page = Path(arguments.document)
        page.write_text(in_place(page.read_text(), "server", text))


if __name__ == "__main__":
    main()
