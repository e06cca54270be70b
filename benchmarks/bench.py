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
Measures a training step of EvoLMMTrainer beside the authors' procedure and TRL's GRPOTrainer, on the CPU.

    python benchmarks/bench.py --output docs/benchmarks/cpu --document docs/performance.md      # about 15 minutes on two cores
    python benchmarks/bench.py --quick                           # seconds, and without meaning
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
import trl
from bench_contenders import (
    CONTENDERS,
    PROPOSE,
    PROPOSER_REFERENCE,
    PROPOSER_UPDATE,
    REFERENCE,
    SOLVE,
    UPDATE,
    Contender,
    EvoLMM,
    Setting,
)
from bench_meter import OTHER, FlopCounter, Reading
from bench_models import SIZES, make_lora, make_model, proportions
from bench_report import Point, Result, as_json, bars, environment, in_place, seconds_table, tables
from peft import get_peft_model

from evolmm_trl.schedule import PROPOSER, SOLVER
from evolmm_trl.shared_prefix import base_model


# By their round number of prompt tokens: height and width, for 36, 224 and 1,024 image tokens
IMAGES = {100: (168, 168), 300: (392, 448), 1100: (896, 896)}

# One thing at a time around the first, and 1,100 tokens at one image per step, which would take an hour at four
POINTS = [
    Point(300, 5, 16, "thin"),
    Point(300, 5, 4, "thin"),
    Point(300, 5, 1, "thin"),
    Point(300, 5, 16),
    Point(300, 5, 4),
    Point(300, 5, 1),
    Point(100, 5, 4),
    Point(300, 8, 4),
    Point(300, 16, 4),
    Point(1100, 5, 1),
    Point(1100, 8, 1),
    Point(1100, 16, 1),
]
# Images in a period of the schedule; with more per step, the proposer's step comes sooner. The work per image is the same
LONGEST_PERIOD = 20
LARGEST_MICRO_BATCH = 4  # images, of both trainers
QUICK_POINTS = [Point(100, 2, 1, "tiny"), Point(100, 3, 2, "tiny")]


def decoding_in_prompt_tokens(name: str) -> float:
    """
    What bounds decoding on this machine: how many prompt tokens a model reads, in a batch of four prompts of 286, in the
    time of one decoding step of one sequence.
    """
    size = SIZES[name]
    model = get_peft_model(make_model(size), make_lora(size), autocast_adapter_dtype=False).eval()
    prompts = torch.full((4, 286), size.vocab - 1)

    def seconds(ids: torch.Tensor, **kwargs) -> float:
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **kwargs)
        return time.perf_counter() - start

    with torch.no_grad():
        cache = model(input_ids=prompts[:1], use_cache=True).past_key_values
        step = median(seconds(prompts[:1, :1], past_key_values=cache) for _ in range(20))
        reading = median(seconds(prompts) for _ in range(20))
    return step / (reading / prompts.numel())


def plain_flops(contender: EvoLMM, positions: int, scored: int, role: str) -> int:
    """
    The yardstick of a role's update and reference: operations of a forward and backward, and of a forward of the
    reference, over one plain sequence of text of so many positions, by the contender's model and LM head.
    """
    trainer = contender.trainer
    ids = torch.full((1, positions), contender.suppressed[-1] + 1, device=contender.setting.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "shift_labels": ids[:, -scored:]}

    def scored_alone(backbone, args, output):
        output.last_hidden_state = output.last_hidden_state[:, -scored:]

    hook = base_model(trainer.model).model.register_forward_hook(scored_alone)
    with FlopCounter() as counter, trainer.accelerator.autocast():
        with torch.no_grad(), trainer.roles.reference():
            trainer.model(**batch, fused_lm_head=True)
        with trainer.roles.using(role):
            trainer.model(**batch, fused_lm_head=True).log_probs.sum().backward()
    hook.remove()
    trainer.model.zero_grad()
    return counter.get_total_flops()


def result_of(name: str, contender: Contender, point: Point, counted: Reading, timed: list[Reading]) -> Result:
    """Everything per image."""
    setting, images = contender.setting, contender.images
    stages = (*contender.stages, OTHER)
    seconds = {stage: [r.seconds[stage] / images for r in timed] for stage in stages}
    seconds["whole"] = [sum(reading.seconds.values()) / images for reading in timed]
    generated = {stage: counted.decoded[stage] / images for stage in (PROPOSE, SOLVE) if stage in contender.stages}
    # What an update and its reference read beside the prompts are the completions they train on
    for stage, completions in (
        (REFERENCE, setting.answers),
        (UPDATE, setting.answers),
        (PROPOSER_REFERENCE, 1),
        (PROPOSER_UPDATE, 1),
    ):
        if stage in contender.stages:
            generated[stage] = completions * setting.completion
    lengths = contender.prompt_lengths()
    yardstick = {}
    if isinstance(contender, EvoLMM):
        answers = setting.answers * setting.completion
        yardstick = {
            SOLVER: plain_flops(contender, lengths[SOLVE] + answers, answers, SOLVER),
            PROPOSER: plain_flops(contender, lengths[PROPOSE] + setting.completion, setting.completion, PROPOSER),
        }
    return Result(
        contender=name,
        point=point,
        setting=setting,
        images=images,
        prompt_tokens=lengths,
        seconds=seconds,
        flops={stage: counted.flops[stage] / images for stage in stages},
        prompt_encoded={stage: counted.tokens[stage] / images - generated[stage] for stage in generated},
        generated=generated,
        tower_passes=counted.tower_images / images,
        update_peak=dict(counted.update_peak),
        state_bytes=contender.state_bytes(),
        reserved=max(reading.reserved for reading in timed),
        yardstick=yardstick,
    )


def measure(point: Point, setting: Setting, names: list[str], repetitions: int, folder: Path) -> list[Result]:
    """
    All contenders at one point. On the CPU they take turns; on an accelerator, whose memory the largest models need for
    themselves, they come one after the other.
    """
    results = []
    # TRL scores tiles of 32,768 words. The rest of a smaller vocabulary's tile would be memory that is only walked over
    tile = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(tile, SIZES[setting.model].vocab)
    for group in [names] if setting.device == "cpu" else [[name] for name in names]:
        contenders = {name: CONTENDERS[name](setting, folder) for name in group}
        counted = {}
        for name, contender in contenders.items():
            if contender.checks_first_steps:
                contender.read()
            counted[name] = contender.read(counting=True)
        timed = {name: [] for name in group}
        for _ in range(repetitions):
            for name, contender in contenders.items():
                timed[name].append(contender.read())
        results += [result_of(name, contenders[name], point, counted[name], timed[name]) for name in group]
        contenders.clear()
        del contender
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
    return results


def write(output: Path | None, text: str, document: dict) -> None:
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(text + "\n")
        output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def headline(args: argparse.Namespace, machine: dict, seconds: float) -> str:
    return "\n".join(
        [
            "# The benchmark in full",
            "",
            "Command: `" + " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]) + "`",
            "",
            *(f"- {name}: {value}" for name, value in machine.items() if value is not None),
            f"- repetitions: {args.repetitions}",
            f"- minutes: {seconds / 60:.1f}",
        ]
    )


def quiet() -> None:
    """Leaves the tables to the reader, and the imports out of the garbage collection that a trainer begins with."""
    gc.collect()
    gc.freeze()
    warnings.simplefilter("ignore", FutureWarning)
    logging.disable(logging.WARNING)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the tables (.md) and all figures (.json)")
    parser.add_argument("--document", type=Path, help="Markdown file whose measured part is replaced")
    parser.add_argument("--model", choices=SIZES, help="instead of each point's own; for `--points` it is small")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["sequential", "grpo", "evolmm"])
    parser.add_argument(
        "--points", nargs="+", metavar="P,N,M", help="prompt tokens (100, 300, 1100), N, images per step"
    )
    parser.add_argument("--completion", type=int, default=32, help="tokens of every question and answer")
    parser.add_argument(
        "--proposer_update_every", type=int, default=5, help="solver steps before a proposer step, up to 20 images"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    return parser


def main(arguments: list[str] | None = None) -> list[Result]:
    args = make_parser().parse_args(arguments)
    points = POINTS
    if args.quick:
        args.completion, args.proposer_update_every, args.repetitions = 4, 2, 1
        points = QUICK_POINTS
    if args.points:
        points = [Point(*map(int, point.split(","))) for point in args.points]
    if args.model:
        points = [replace(point, model=args.model) for point in points]
    machine, results, start = environment(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for point in points:
            height, width = IMAGES[point.prompt]
            setting = Setting(
                model=point.model,
                height=height,
                width=width,
                answers=point.answers,
                images=point.images,
                groups=min(point.images, LARGEST_MICRO_BATCH),
                completion=args.completion,
                proposer_update_every=max(1, min(args.proposer_update_every, LONGEST_PERIOD // point.images)),
            )
            results += measure(point, setting, args.contenders, args.repetitions, Path(folder))
            taken = time.perf_counter() - start
            print(
                f"{point.model}, {point.prompt} tokens, N={point.answers}, {point.images} images: {taken:.0f} s",
                file=sys.stderr,
            )
    held = bars(results)
    models = {}
    for name in dict.fromkeys(point.model for point in points):
        models[name] = asdict(SIZES[name]) | proportions(SIZES[name]) | {"decode": decoding_in_prompt_tokens(name)}
    text = "\n\n".join(
        [
            headline(args, machine, taken),
            *(
                f"Model `{name}`: {asdict(SIZES[name])}. Per token the vision tower costs {model['vision_tower']:.2f} and the "
                f"LM head {model['lm_head']:.2f} of the language model's layers. A decoding step of one sequence takes as long "
                f"as {model['decode']:.0f} prompt tokens in a batch of prompts."
                for name, model in models.items()
            ),
            f"Questions and answers of {args.completion} tokens. A proposer step after {args.proposer_update_every} solver "
            f"steps, or {LONGEST_PERIOD} images. Micro-batches of up to {LARGEST_MICRO_BATCH} images.",
            tables(results),
            "\n".join(f"- {bar}" for bar in held),
        ]
    )
    document = as_json(
        results,
        machine=machine,
        arguments=vars(args) | {"output": str(args.output), "document": str(args.document)},
        models=models,
        bars=[asdict(bar) | {"passed": bar.passed} for bar in held],
    )
    write(args.output, text, document)
    if args.document is not None:
        summary = [
            f"Commit {machine['commit']}, {machine['cpu']}, {machine['cores']} cores, {args.repetitions} repetitions.",
            seconds_table(results),
            "\n".join(f"- {bar}" for bar in held),
        ]
        page = args.document.read_text()
        args.document.write_text(in_place(page, "measured", "\n\n".join(summary)))
    return results


if __name__ == "__main__":
    quiet()
    main()
