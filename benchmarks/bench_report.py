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

"""Results as tables, and the bars they are held against."""

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from bench_contenders import PROPOSE, REFERENCE, SOLVE, UPDATE, Setting
from bench_meter import OTHER


GIB = 2**30
CARDS = (24, 40, 80)  # GiB
_CONTEXT = GIB  # what a process holds on a card beside torch's memory


@dataclass(frozen=True)
class Point:
    """
    Where the contenders are compared.

    Args:
        prompt (`int`):
            Round number of prompt tokens, a name for the image size.
        answers (`int`):
            Answers N per question.
        images (`int`):
            Images per optimizer step.
        model (`str`, *optional*, defaults to `"small"`):
            A name in `SIZES`.
    """

    prompt: int
    answers: int
    images: int
    model: str = "small"


@dataclass
class Result:
    """
    One contender at one point; everything per image.

    Args:
        contender (`str`), point ([`Point`]), setting ([`Setting`]):
            What was measured.
        images (`int`):
            Images per repetition.
        prompt_tokens (`dict[str, int]`):
            Length of the proposer's prompt (`propose`) and the solver's (`solve`).
        seconds (`dict[str, list[float]]`):
            By stage and `whole`, one per repetition.
        flops (`dict[str, float]`), prompt_encoded (`dict[str, float]`), generated (`dict[str, float]`):
            By stage: floating point operations, prompt tokens through the language model, and completion tokens.
        tower_passes (`float`):
            Images through the vision tower.
        update_peak (`dict[str, int]`):
            By stage: peak bytes of an update, above what was allocated before.
        state_bytes (`int`):
            Weights and optimizer state.
        reserved (`int`):
            Peak bytes torch held on the accelerator; 0 on the CPU.
        yardstick (`dict[str, int]`):
            Operations of a plain forward and backward, and a plain forward of the reference, over the tokens P + N*C
            (`solver`), and over the proposer's prompt and its question (`proposer`).
    """

    contender: str
    point: Point
    setting: Setting
    images: int
    prompt_tokens: dict[str, int]
    seconds: dict[str, list[float]]
    flops: dict[str, float]
    prompt_encoded: dict[str, float]
    generated: dict[str, float]
    tower_passes: float
    update_peak: dict[str, int]
    state_bytes: int
    reserved: int = 0
    yardstick: dict[str, int] = field(default_factory=dict)

    def time(self, stage: str = "whole") -> float:
        """Median seconds per image of a stage of both roles."""
        parts = [self.seconds[name] for name in (stage, f"proposer_{stage}") if name in self.seconds]
        return median(map(sum, zip(*parts, strict=True))) if parts else 0.0

    def work(self, stage: str) -> float:
        """Operations per image of a stage of both roles."""
        return self.flops.get(stage, 0) + self.flops.get(f"proposer_{stage}", 0)

    def training_ratio(self, role: str) -> float:
        """Operations of a role's update and reference over those of the yardstick."""
        prefix = "proposer_" if role == "proposer" else ""
        return (self.flops[prefix + UPDATE] + self.flops[prefix + REFERENCE]) / self.yardstick[role]

    def memory(self) -> int:
        """Bytes to train with: what torch held, or weights, optimizer and the largest update."""
        return self.reserved or self.state_bytes + max(self.update_peak.values())


@dataclass(frozen=True)
class Bar:
    """A figure and the bar it is held against; no figure where it was not measured."""

    name: str
    figure: float | None
    limit: float
    kind: str  # "at least", "at most" or "exactly"
    unit: str = ""

    @property
    def passed(self) -> bool | None:
        if self.figure is None:
            return None
        return {
            "at least": self.figure >= self.limit,
            "at most": self.figure <= self.limit,
            "exactly": self.figure == self.limit,
        }[self.kind]

    def __str__(self) -> str:
        return f"{self.name}: {'not measured' if self.figure is None else f'{self.figure:.3g}{self.unit}'}"


def bars(results: list[Result]) -> list[Bar]:
    """
    What the shared prefix is to achieve.

    Args:
        results (`list[Result]`):
            Of all contenders, at any points.

    Returns:
        `list[Bar]`
    """
    found = {(result.contender, result.point): result for result in results}
    ours = [result for result in results if result.contender == "evolmm"]

    def ratio(one: tuple, other: tuple, of: Callable[[Result], float]) -> float | None:
        if one not in found or other not in found:
            return None
        return of(found[one]) / of(found[other])

    few, many, wide = Point(1100, 5, 1), Point(1100, 16, 1), Point(1100, 8, 1)
    growth = [
        Bar(
            f"evolmm's {name} per image from N=5 to N=16 at 1,100 prompt tokens",
            ratio(("evolmm", many), ("evolmm", few), lambda r, stage=stage: r.time(stage)),
            1.5,
            "at most",
            "x",
        )
        for name, stage in (("seconds", "whole"), ("update seconds", UPDATE))
    ]
    return [
        *(
            Bar(
                f"seconds per image of {contender} over evolmm's, model {model}, 300 prompt tokens, N=5, 16 images per step",
                ratio((contender, step), ("evolmm", step), Result.time),
                limit,
                "at least",
                "x",
            )
            for model in ("thin", "small")
            for step in (Point(300, 5, 16, model),)
            for contender, limit in (("sequential", 10.0), ("grpo", 2.5))
        ),
        *(
            Bar(
                f"FLOPs of evolmm's {role} update and reference over those of a plain pass over {tokens} tokens",
                max((result.training_ratio(role) for result in ours), default=None),
                1.05,
                "at most",
            )
            for role, tokens in (("solver", "P + N*C"), ("proposer", "P + C"))
        ),
        Bar(
            "vision-tower passes per image of evolmm",
            max((result.tower_passes for result in ours), key=lambda passes: abs(passes - 1), default=None),
            1,
            "exactly",
        ),
        *growth,
        Bar(
            "peak memory of an update of evolmm over grpo's at 1,100 prompt tokens, N=8",
            ratio(("evolmm", wide), ("grpo", wide), lambda r: max(r.update_peak.values())),
            0.4,
            "at most",
        ),
    ]


def table(header: list[str], rows: list[list]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _place(result: Result) -> list:
    return [
        result.setting.model,
        result.prompt_tokens[SOLVE],
        result.point.answers,
        result.point.images,
        result.contender,
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


_STAGES = (PROPOSE, SOLVE, REFERENCE, UPDATE)
_UPDATES = (UPDATE, f"proposer_{UPDATE}")
_PLACE = ["model", "prompt tokens", "N", "images per step", "contender"]


def seconds_table(results: list[Result]) -> str:
    """The table of seconds, in Markdown."""
    rows = []
    for result in results:
        whole = result.seconds["whole"]
        rows.append(
            [
                *_place(result),
                *(f"{result.time(stage):.3f}" for stage in (*_STAGES, OTHER)),
                f"**{result.time():.3f}**",
                f"{min(whole):.3f} to {max(whole):.3f}",
            ]
        )
    return "Seconds per image: medians, and the range of the whole\n\n" + table(
        [*_PLACE, *_STAGES, OTHER, "whole", "range"], rows
    )


def tables(results: list[Result]) -> str:
    """The tables of seconds, of work and of memory, in Markdown."""
    work, memory = [], []
    for result in results:
        ratios = [f"{result.training_ratio(role):.3f}" for role in result.yardstick] or ["", ""]
        work.append(
            [
                *_place(result),
                *(f"{result.work(stage) / 1e9:,.3g}" for stage in _STAGES),
                f"**{sum(result.flops.values()) / 1e9:,.3g}**",
                f"{sum(result.prompt_encoded.values()):,.0f}",
                f"{sum(result.generated.values()):,.0f}",
                f"{result.tower_passes:g}",
                *ratios,
            ]
        )
        peaks = [_mib(result.update_peak[stage]) if stage in result.update_peak else "" for stage in _UPDATES]
        memory.append([*_place(result), *peaks, _mib(result.state_bytes), _mib(result.memory())])
    return "\n\n".join(
        [
            seconds_table(results),
            "Work per image: GFLOPs by stage, tokens through the language model over all stages, passes of an image through "
            "the vision tower, and the FLOPs of update and reference over those of a plain pass over P + N*C tokens "
            "(solver) and P + C tokens (proposer)",
            table(
                [*_PLACE, *_STAGES, "whole", "prompt tokens encoded", "completion tokens", "tower passes"]
                + ["solver / plain", "proposer / plain"],
                work,
            ),
            "Memory in MiB: peak of an update's forward and backward above what was allocated before; weights and "
            "optimizer state; both",
            table([*_PLACE, "solver's update", "proposer's update", "weights and optimizer", "sum"], memory),
        ]
    )


def fitting_cards(size: int) -> str:
    """Which cards hold so many bytes of torch's memory."""
    needed = size + _CONTEXT
    cards = [str(card) for card in CARDS if needed <= card * GIB]
    return f"{needed / GIB:.1f} GiB: " + (f"cards of {', '.join(cards)} GB" if cards else f"none of {CARDS} GB")


def gpu_table(results: list[Result]) -> str:
    """Seconds, throughput and memory, and the cards that hold each, in Markdown."""
    rows, cards = [], []
    for result in results:
        setting = result.setting
        asked = 1 if PROPOSE in result.generated else 0
        completions = (setting.answers + asked) * setting.completion
        place = [f"{setting.height}x{setting.width}", *_place(result)]
        rows.append(
            [
                *place,
                *(f"{result.time(stage):.3f}" for stage in (*_STAGES, OTHER)),
                f"**{result.time():.3f}**",
                f"{completions / result.time():,.0f}",
                _mib(max(result.update_peak.values())),
                _mib(result.memory()),
            ]
        )
        cards.append(
            f"- {setting.model}, {place[0]}, N={setting.answers}, {result.contender}: {fitting_cards(result.memory())}"
        )
    header = ["image", *_PLACE, *_STAGES, OTHER, "whole", "completion tokens per second"]
    header += ["peak of an update, MiB", "memory, MiB"]
    return "\n\n".join([table(header, rows), "\n".join(cards)])


def environment() -> dict:
    """The commit and the machine that a run was made on."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        # Documents are what measurements write
        "commit": git("rev-parse", "HEAD")
        + (" with changes" if git("status", "--porcelain", "--", ":(top)", ":(top,exclude)docs") else ""),
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": os.environ.get("GLIBC_TUNABLES"),
        "load": os.getloadavg()[0],  # processes that were running on the machine, of the last minute
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def in_place(page: str, name: str, text: str) -> str:
    """A Markdown page with this text between the comments of this name."""
    before, begin, rest = page.partition(f"<!-- {name}:begin -->")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not (begin and end):
        raise ValueError(f"The page has no place for {name!r}, between <!-- {name}:begin --> and <!-- {name}:end -->.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def as_json(results: list[Result], **others) -> dict:
    return {**others, "results": [asdict(result) for result in results]}
