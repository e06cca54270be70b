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

    python tests/vllm_measure.py --output docs/benchmarks/vllm_server.json --document docs/vllm.md
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "demo")]

from bench_report import environment, in_place, table  # noqa: E402
from vllm_policy import TOLERANCE, Policy  # noqa: E402
from vllm_process import VLLMProcess  # noqa: E402
from widen import widen  # noqa: E402

from evolmm_trl.rollout.served import _PROBE_CHANGE, _TOLERANCE  # noqa: E402
from evolmm_trl.rollout.vllm_server import VLLMServers, image_url  # noqa: E402
from evolmm_trl.schedule import PROPOSER, ROLES, SOLVER  # noqa: E402


SWAPS = 200
OPTIONS = ("--max-lora-rank", "8", "--middleware", "vllm_adapter_upload.AdapterUpload")
PRECISIONS = ("float32", "bfloat16")
# What the trainer may have otherwise than a server
OTHERS = {
    "nothing": "the same",
    "image": "another image",
    "prompt": "another prompt",
    "checkpoint": "another checkpoint",
    "none": "no adapter",
    "twice": "the adapter scaled twice as much",
    "bound": "*the run ends above*",
}


def measure(server: VLLMProcess, folder: Path, swaps: int = SWAPS) -> dict:
    """Differences of log-probs and seconds, of this many swaps, one role after the other."""
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
    return {
        "swaps": swaps,
        "tolerance": TOLERANCE,
        "before": before,
        "after": after,
        "fresh": fresh,
        "stale": stale,
        "resized by the server": by_server,
        "bytes": size,
        "seconds": {**local, "upload": uploaded},
    }


def sharpness(server: VLLMProcess, other: Path, folder: Path, dtype: str) -> dict[str, float]:
    """
    Mean difference of log-probs, in nats per token, from what the trainer would have if something were not the server's; under
    adapters of random weights as the trainer compares both at the start.
    """
    policies = [Policy(model, dtype=getattr(torch, dtype)) for model in (server.model, other)]
    policy, of_other = policies
    places = [(role, i) for role in ROLES for i in range(len(policy.images))]
    with VLLMServers([server.url], policy.image_token_id, folder / "adapters", request_timeout=120) as servers:
        servers.start(server.model)
        for role in ROLES:
            policy.randomise(role, 0.0)  # as a new adapter, of no effect
            servers.swap(role, policy.save(role))
        written = servers.generate(policy.requests())

        def logps(source: Policy, answers, shown=lambda role, i: (role, i), **settings) -> torch.Tensor:
            parts = []
            for (role, i), completions in zip(places, answers, strict=True):
                prompt, image = shown(role, i)
                for completion in completions:
                    adapter = settings.get("adapter", role)
                    parts.append(source.logps(prompt, image, completion.ids, adapter=adapter))
            return torch.cat(parts)

        without = logps(policy, written, adapter=None)
        for exponent in range(-12, 13):
            for source in policies:
                for role in ROLES:
                    source.randomise(role, 2.0**exponent)
            if (logps(policy, written) - without).abs().mean() >= _PROBE_CHANGE:
                break
        for role in ROLES:
            servers.swap(role, policy.save(role))
        written = servers.generate(policy.requests())
    theirs = torch.tensor([logp for completions in written for c in completions for logp in c.logps])
    found = {
        "nothing": logps(policy, written),
        "image": logps(policy, written, lambda role, i: (role, (i + 1) % len(policy.images))),
        "prompt": logps(policy, written, lambda role, i: (SOLVER if role == PROPOSER else PROPOSER, i)),
        "checkpoint": logps(of_other, written),
        "none": logps(policy, written, adapter=None),
    }
    for role in ROLES:
        policy.randomise(role, 2.0 ** (exponent + 1))  # `lora_B` alone is of this size
    found["twice"] = logps(policy, written)
    differences = {name: (own - theirs).abs().mean().item() for name, own in found.items()}
    absolute, relative = _TOLERANCE["full" if dtype == "float32" else "half"]
    return {**differences, "bound": absolute + relative * (found["nothing"] - found["none"]).abs().mean().item()}


def tables(found: dict) -> str:
    """The block of docs/vllm.md."""
    server, wrong = (
        found["server"],
        sum(difference > found["server"]["tolerance"] for difference in found["server"]["fresh"]),
    )
    rows = [
        ["largest difference of log-probs, both roles, before the first swap", f"{server['before']:.1e}"],
        ["the same after 20 swaps", f"{server['after']:.1e}"],
        [f"stale answers in {server['swaps']} swaps (difference above {server['tolerance']:g})", str(wrong)],
        ["largest difference right after a swap", f"{max(server['fresh']):.1e}"],
        ["smallest difference of an answer from the adapter before it", f"{min(server['stale']):.2f}"],
        [
            "largest difference on images that the server has resized itself",
            f"{max(server['resized by the server']):.1e}",
        ],
        ["size of an adapter", f"{server['bytes'] / 1000:.0f} kB"],
    ]
    for way, seconds in server["seconds"].items():
        what = "a swap by upload" if way == "upload" else f"a swap of the {way}, on a shared disk"
        rows.append([f"{what}: median, worst", _milliseconds(seconds)])
    sharp = [
        [OTHERS[name], *(f"{found['sharpness'][dtype][name]:.1e}" for dtype in found["sharpness"])] for name in OTHERS
    ]
    where = found["machine"]
    return "\n\n".join(
        [
            table(["", "measured"], rows),
            "The comparison at the start: mean difference of log-probs, in nats per token, under adapters of random weights, by "
            "what the trainer has and the server has not.",
            table(["the trainer has", *found["sharpness"]], sharp),
            f"Commit {where['commit']}, {where['cpu']}, {where['cores']} cores on which {where['load']:.0f} processes were "
            "running, one thread.",
        ]
    )


def _milliseconds(seconds: list[float]) -> str:
    return f"{1000 * median(seconds):.0f} ms, {1000 * max(seconds):.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--document", type=Path, help="page to write the tables into")
    arguments = parser.parse_args()
    found: dict = {"sharpness": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, other = (widen(ROOT / f"examples/demo/models/{base}", folder / base) for base in ("room", "noisy"))
        for dtype in PRECISIONS:
            server = VLLMProcess(model, folder / "server.log", *OPTIONS, "--dtype", dtype).start()
            try:
                if dtype == "float32":
                    found["server"] = measure(server, folder)
                found["sharpness"][dtype] = sharpness(server, other, folder, dtype)
            finally:
                server.kill()
            print(dtype, found["sharpness"][dtype], flush=True)
    found["machine"] = environment()
    arguments.output.write_text(json.dumps(found) + "\n")
    text = tables(found)
    print(text)
    if arguments.document:
        arguments.document.write_text(in_place(arguments.document.read_text(), "server", text))


if __name__ == "__main__":
    main()
