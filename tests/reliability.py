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
What `docs/reliability.md` says, measured: engines, kills, bad inputs and memory.

    python tests/reliability.py --document docs/reliability.md      # about 30 minutes on two cores
    python tests/reliability.py --parts inputs                      # one part, printed
"""

import argparse
import io
import json
import re
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import fmean

import kills
import numpy as np
import psutil
import torch
from datasets import Dataset, Features, Image
from engines import ROOT, idle_movement, largest_difference, run
from PIL import Image as PILImage
from scipy.stats import linregress, t
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, lora, noise_images
from transformers import PrinterCallback, TrainerCallback


sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "demo")]
from bench_report import environment, in_place, table  # noqa: E402


MODES = {
    "two adapters": ((), {}),
    "one shared adapter": ((), {"adapters": "shared"}),
    "all weights": (("--no_lora",), {"learning_rate": 1e-3}),
}
RUNS = {
    "two adapters": ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"],
    "one shared adapter": ["ddp", "zero2", "zero3", "fsdp2"],
    "all weights": ["ddp", "zero2", "zero3", "fsdp2"],
}


def engines(folder: Path) -> tuple[str, dict]:
    base = str(tiny_qwen2_5_vl(folder / "base"))
    rows, figures = [], {}
    for mode, (arguments, options) in MODES.items():
        one = run(None, base, folder / mode / "one", *arguments, **options)[0]
        for engine in RUNS[mode]:
            first, second = run(engine, base, folder / mode / engine, *arguments, **options)
            figures[f"{mode}, {engine}"] = found = {
                "difference": largest_difference(first["weights"], one["weights"]),
                "between_processes": largest_difference(first["weights"], second["weights"]),
                "idle": idle_movement(first["weights"]) if mode == "two adapters" else None,
                "processes": first["processes"],
                "engine": first["engine"],
            }
            idle = "" if found["idle"] is None else f"{found['idle']:g}"
            rows.append([mode, engine, f"{found['difference']:.1e}", f"{found['between_processes']:g}", idle])
    text = table(
        ["trained", "engine", "from one process", "between the processes", "idle adapter moved by"],
        rows,
    )
    return f"Largest differences between weights, over twelve steps, in float32.\n\n{text}", figures


def survived(folder: Path) -> tuple[str, dict]:
    base = str(tiny_qwen2_5_vl(folder / "base"))
    one = kills.one_process(base, folder / "one", kills=20, seed=0, steps=24)
    figures = {"one process": one}
    same = "nothing" if not one["differences"] else ", ".join(one["differences"])
    rows = [["one process", f"{one['kills']} of {one['kills']}", f"{same} differs, bit for bit"]]
    for engine in ("ddp", "zero2"):
        figures[engine] = two = kills.two_processes(engine, base, folder / engine, kills=4, seed=0, steps=8)
        log = "the same rollout log" if two["same_rollouts"] else "ANOTHER rollout log"
        rows.append(
            [
                f"two processes, {engine}",
                f"{two['kills']} of {two['kills']}",
                f"weights {two['difference']:.1e}, {log}",
            ]
        )
    stages = ", ".join(f"{count} in {stage}" for stage, count in sorted(one["stages"].items()))
    return (
        "Kills with SIGKILL that a run survived: it was resumed and came to its end.\n\n"
        + table(["run", "survived", "what differs from the run that was never killed"], rows)
        + f"\n\nThe kills in one process were: {stages}."
    ), figures


def _png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def _saved(image: PILImage.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bad_images() -> dict[str, dict]:
    """Of each kind, what a row's `image` holds."""
    good = noise_images(1, side=84)[0]
    grey = PILImage.fromarray(np.arange(84 * 84, dtype=np.uint16).reshape(84, 84))
    contents = {
        "a PNG cut in half": _saved(good, "PNG")[:5000],
        "a JPEG cut in half": _saved(good, "JPEG")[:1500],
        "no bytes": b"",
        "text": b"this is no image",
        "HTML in place of a download": b"<!DOCTYPE html><html><body>404</body></html>",
        "a PNG of 60,000 x 60,000 pixels": _png(60_000, 60_000),
        "1 x 1 pixel": _saved(good.resize((1, 1)), "PNG"),
        "2,000 x 4 pixels": _saved(good.resize((2000, 4)), "PNG"),
        "16 bits of grey": _saved(grey, "PNG"),
        "a palette with transparency": _saved(good.convert("P"), "PNG", transparency=3),
        "CMYK": _saved(good.convert("CMYK"), "JPEG"),
        "an animation": _saved(good, "GIF", save_all=True, append_images=[good.rotate(90)]),
    }
    rows = {name: {"bytes": data, "path": None} for name, data in contents.items()}
    rows["a file that does not exist"] = {"bytes": None, "path": "/nowhere/image.png"}
    rows["a folder"] = {"bytes": None, "path": "/"}
    return rows


def inputs(folder: Path) -> tuple[str, dict]:
    base = str(tiny_qwen2_5_vl(folder / "base"))
    rows, figures = [], {}
    good = [{"bytes": _saved(image, "PNG"), "path": None} for image in noise_images(3, side=84)]
    for name, image in bad_images().items():
        dataset = Dataset.from_dict(
            {"image": [good[0], image, *good[1:]]}, features=Features({"image": Image(decode=False)})
        )
        dataset = dataset.cast_column("image", Image())
        output = folder / re.sub(r"\W+", "_", name)
        trainer = TalkingTrainer(
            model=base,
            args=config(output, max_steps=4, proposer_update_every=3, shuffle_dataset=False),
            train_dataset=dataset,
            peft_config=lora(),
        )
        trainer.train()
        skipped = dict(trainer._images.skipped)
        seen = [json.loads(line)["image_id"] for line in (output / "rollouts.jsonl").read_text().splitlines()]
        read = "1" in seen
        if read == bool(skipped) or seen[0] != "0" or not {"2", "3"} <= set(seen):
            raise RuntimeError(
                f"{name}: skipped {skipped}, trained on the rows {seen}; expected the others, in place."
            )
        outcome = "trained on" if read else f"left out: {next(iter(skipped))}"
        figures[name] = {"outcome": outcome, "rows": seen}
        rows.append([name, outcome])
    text = "One row of four holds it; the run goes on, and the other rows keep their places.\n\n"
    return text + table(["image", "outcome"], rows), figures


class Memory(TrainerCallback):
    """Resident memory after every tenth step."""

    def __init__(self):
        self.process = psutil.Process()
        self.bytes: list[tuple[int, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            self.bytes.append((state.global_step, self.process.memory_info().rss))


def slope(samples: list[tuple[int, int]], blocks: int = 20) -> tuple[float, float]:
    """
    Bytes per step, and half the width of the 95 % interval: a line through the means of blocks, whose errors depend on each
    other less than those of neighbouring samples do.
    """
    means = [np.mean(block, axis=0) for block in np.array_split(np.array(samples, dtype=float), blocks)]
    fit = linregress(*zip(*means, strict=True))
    return fit.slope, t.ppf(0.975, blocks - 2) * fit.stderr


def memory(folder: Path, steps: int = 2000) -> tuple[str, dict]:
    from charts import EVOLVE_SEEDS, make_images
    from demo import HERE, demo_config, demo_lora, load_model

    from evolmm_trl import EvoLMMTrainer, load_images

    torch.set_num_threads(2)
    model, processor = load_model(HERE / "models" / "room")
    watch = Memory()
    trainer = EvoLMMTrainer(
        model=model,
        args=demo_config(
            folder / "run",
            max_steps=steps,
            per_device_train_batch_size=10,
            save_strategy="steps",
            save_steps=100,
            save_total_limit=1,
        ),
        train_dataset=load_images(make_images(folder / "images", EVOLVE_SEEDS[:200]), streaming=False),
        processing_class=processor,
        peft_config=demo_lora(),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    trainer.train()
    second_half = watch.bytes[len(watch.bytes) // 2 :]
    per_step, half_width = slope(second_half)
    figures = {
        "steps": steps,
        "seconds": time.monotonic() - start,
        "slope_bytes_per_step": per_step,
        "half_width": half_width,
        "mean_bytes": fmean(size for _, size in second_half),
        "samples": watch.bytes,
    }
    return (
        f"{steps:,} steps of the demo model, with a checkpoint every 100: over the second half resident memory, "
        f"{figures['mean_bytes'] / 2**20:,.0f} MiB, grows by {per_step:,.0f} bytes per step (95 % interval "
        f"{per_step - half_width:,.0f} to {per_step + half_width:,.0f})."
    ), figures


PARTS = {
    "engines": ("Engines", engines),
    "kills": ("Kills", survived),
    "inputs": ("Bad inputs", inputs),
    "memory": ("Memory", memory),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--document", type=Path, help="Markdown file for the tables; figures go beside it")
    args = parser.parse_args(arguments)
    machine = environment()
    record = args.document.with_suffix(".json") if args.document else None
    measured = json.loads(record.read_text()) if record and record.exists() else {}
    for part in args.parts:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            text, figures = PARTS[part][1](Path(folder))
        minutes = (time.monotonic() - start) / 60
        text += f"\n\nCommit {machine['commit']}, {machine['cpu']}, {machine['cores']} cores, {minutes:.0f} minutes."
        print(text, flush=True)
        measured[part] = {"text": text, "figures": figures, "machine": machine}
        if record is not None:  # after every part, so that one can be measured again alone
            record.write_text(json.dumps(measured, indent=1) + "\n")
            texts = [
                f"## {title}\n\n{measured[name]['text']}" for name, (title, _) in PARTS.items() if name in measured
            ]
            page = args.document.read_text()
            args.document.write_text(in_place(page, "measured", "\n\n".join(texts)))


if __name__ == "__main__":
    main()
