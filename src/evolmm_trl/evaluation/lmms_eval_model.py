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

"""A base model, its solver or its proposer as lmms-eval asks them: many questions about images, decoded greedily."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from ..processing import load_processor
from ..prompts import RolePrompts, read_answer
from ..solver import load_prompts, load_role
from ..sr2se.generation import generate
from ..thumbnails import image_digest


logger = logging.getLogger(__name__)

TASK_PROMPT, SOLVER_PROMPT = "task", "solver"
_TASK_TOKENS = 1_024  # where a task says nothing
_SOLVER_TOKENS = 512  # to think and to answer, where a task leaves room for the bare answer


class EvoLMM(lmms):
    """
    A model for lmms-eval. Questions are decoded greedily, so that a second run gives the same answers.

    Args:
        pretrained (`str`):
            Id or path of the base model.
        adapter (`str`, *optional*):
            Id or path of the adapters, as in [`load_solver`]; without it the base model answers.
        role (`str`, *optional*, defaults to `"solver"`):
            Whose adapter answers, `"solver"` or `"proposer"`.
        prompt (`str`, *optional*, defaults to `"task"`):
            `"task"` asks what the task asks, in its words. `"solver"` puts that into the solver's prompt, the one that was
            saved with what was trained or else the default one, and hands on what the model writes between the answer tags;
            a JSON file with fields of [`RolePrompts`] does so with these.
        min_pixels (`int`, *optional*), max_pixels (`int`, *optional*):
            Limits of the image processor. By default its own.
        max_new_tokens (`int`, *optional*):
            Longest completion. By default the task's, and at least 512 with the solver's prompt.
        batch_size (`int`, *optional*, defaults to `1`):
            Questions at a time, on each process.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights.

    Raises:
        `ValueError`: if an argument cannot be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        role: str = "solver",
        prompt: str = TASK_PROMPT,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
    ):
        super().__init__()
        if role not in ("solver", "proposer"):
            raise ValueError(
                f"`role` is {role!r}; expected 'solver' or 'proposer'. Without `adapter` the base answers."
            )
        if role == "proposer" and adapter is None:
            raise ValueError("The proposer is an adapter: pass `adapter`.")
        self.prompts = _read_prompts(prompt, adapter or pretrained)
        self.max_new_tokens = max_new_tokens
        self.batch_size = int(batch_size)
        self.records: dict[tuple[str, int], dict] = {}

        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.processor = load_processor(pretrained, **{name: n for name, n in pixels.items() if n is not None})
        _check_pixels(self.processor, min_pixels, max_pixels)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        kwargs = {"dtype": dtype}
        if self.accelerator.device.type != "cpu":
            # One process spreads a large model over all devices; of several, each holds the whole
            kwargs["device_map"] = "auto" if self._world_size == 1 else {"": self.accelerator.device}
        self._model, _ = load_role(pretrained, adapter, role, **kwargs)
        self.settings = {
            "prompt": None if self.prompts is None else self.prompts.solver,
            "system": None if self.prompts is None else self.prompts.system,
            "max_new_tokens": max_new_tokens,
            "image_size": _image_size(self.processor),
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }
        self._warned = False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def loglikelihood(self, requests: list[Instance]):
        raise ValueError("This task scores given answers by their likelihood; `evolmm eval` runs tasks that generate.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise ValueError("This task talks in several rounds; `evolmm eval` runs tasks with one question at a time.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers every request; what was written, and digests of what was seen, stay in `records`."""
        results: list[GenerationResult | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=self._rank != 0, desc="answers") as progress:
            for batch in self._batches(requests):
                for place, result in zip(batch, self._answer([requests[place] for place in batch]), strict=True):
                    results[place] = result
                progress.update(len(batch))
        return results

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Places of requests that are decoded alike, in order."""
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
        for places in alike.values():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _answer(self, requests: list[Instance]) -> list[GenerationResult]:
        settings = requests[0].args[2]
        self._warn_of_sampling(settings)
        asked = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            asked.append(_conversation(doc_to_messages(self.task_dict[task][split][doc_id]), self.prompts))
        completions = [None] * len(requests)
        # The processor takes images for all of a batch or for none
        for with_images in (True, False):
            places = [place for place, (_, images) in enumerate(asked) if bool(images) == with_images]
            if not places:
                continue
            answers = generate(
                self._model,
                self.processor,
                [asked[place][0] for place in places],
                [asked[place][1] for place in places] if with_images else None,
                max_new_tokens=self._longest(settings),
                batch_size=len(places),
            )
            for place, (completion,) in zip(places, answers, strict=True):
                completions[place] = completion
        results = []
        for request, (_, images), completion in zip(requests, asked, completions, strict=True):
            _, _, _, doc_id, task, _ = request.args
            self.records[task, doc_id] = {
                "completion": completion.text,
                "images": [image_digest(image) for image in images],
            }
            results.append(
                GenerationResult(self._read(completion.text, settings), TokenCounts(None, completion.tokens))
            )
        return results

    def _longest(self, settings: dict) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        tokens = settings.get("max_new_tokens", _TASK_TOKENS)
        return tokens if self.prompts is None else max(tokens, _SOLVER_TOKENS)

    def _read(self, completion: str, settings: dict) -> str:
        """What the task scores."""
        if self.prompts is not None:
            return (read_answer(completion).text or "").strip()
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            if stop and stop != "\n\n":  # lmms-eval's own default, which no task asked for
                completion = completion.split(stop)[0]
        return completion

    def _warn_of_sampling(self, settings: dict):
        if settings.get("do_sample") and not self._warned:
            logger.warning(
                "A task asks for sampling. All answers are decoded greedily, so that they can be had again."
            )
            self._warned = True


def _read_prompts(prompt: str, trained: str) -> RolePrompts | None:
    if prompt == TASK_PROMPT:
        return None
    if prompt == SOLVER_PROMPT:
        return load_prompts(trained) or RolePrompts()
    if not Path(prompt).is_file():
        raise ValueError(f"`prompt` is {prompt!r}; expected 'task', 'solver' or a JSON file with the run's prompts.")
    return RolePrompts.from_dict(json.loads(Path(prompt).read_text(encoding="utf-8")))


def _image_size(processor) -> dict[str, int]:
    """What images are scaled to, whether the checkpoint or an argument says so."""
    return dict(getattr(processor.image_processor, "size", None) or {})


def _check_pixels(processor, min_pixels: int | None, max_pixels: int | None):
    size = _image_size(processor)
    for name, edge, wanted in (
        ("min_pixels", "shortest_edge", min_pixels),
        ("max_pixels", "longest_edge", max_pixels),
    ):
        if wanted is not None and size.get(edge) != wanted:
            raise ValueError(
                f"{type(processor.image_processor).__name__} has no `{name}`: its images have the size {size}. Leave "
                f"`{name}` out."
            )


def _conversation(messages: list[dict], prompts: RolePrompts | None) -> tuple[list[dict], list[Image.Image]]:
    """A task's messages as a chat template takes them, in the solver's prompt if there is one, and their images."""
    chat = ChatMessages(messages=messages)
    images, videos, sounds = chat.extract_media()
    if videos or sounds:
        raise ValueError("This task has videos or sounds; `evolmm eval` runs tasks about images.")
    conversation = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
                for part in message.content
            ],
        }
        for message in chat.messages
    ]
    if prompts is not None:
        texts = [part for part in conversation[-1]["content"] if part["type"] == "text"]
        before, after = prompts.solver.split("{question}", 1)
        texts[0]["text"] = before + texts[0]["text"]
        texts[-1]["text"] += after
        if prompts.system is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": [{"type": "text", "text": prompts.system}]})
    return conversation, [_load(image) for image in images]


def _load(image: Image.Image | str) -> Image.Image:
    return (Image.open(image) if isinstance(image, str) else image).convert("RGB")
