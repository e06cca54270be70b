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
Sampling from vLLM servers that hold the frozen base model and the roles' LoRA adapters beside it.

    with VLLMServers(["http://localhost:8000"], image_token_id, adapter_dir) as servers:
        servers.start(model_id)
        servers.swap("solver", save)  # after every step of the solver
        futures = [servers.submit(request) for request in requests]
        completions = [future.result() for future in futures]

Plain HTTP: vLLM is in an environment of its own. `docs/vllm.md` says how to start a server.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import GenerationConfig


logger = logging.getLogger(__name__)

_GENERATE = "/inference/v1/generate"
# A request that one server after another dies of is given up
_MOST_DEATHS = 3
# Seconds between two looks at a server that is down, and between two progress lines
_POLL, _PROGRESS = 0.5, 10.0
# Answers to anything but a generation are short
_SHORT_ANSWER = 4 * 1024 * 1024
# Put into every adapter folder; only folders that hold it are deleted
_MARK = ".evolmm_trl_adapter"
_IMAGES_REMEMBERED = 100_000
# For a while these say nothing about the request
_UNAVAILABLE = {429, 502, 503, 504}


@dataclass(frozen=True)
class VLLMRequest:
    """
    One prompt about one image, to be completed several times by one role.

    Args:
        role (`str`):
            Whose adapter answers, as named in [`VLLMServers.swap`].
        prompt_ids (`Sequence[int]`):
            Token ids as the processor makes them, of shape (prompt length,): an image token for every patch group.
        image (`str`):
            The image as [`image_url`] makes it.
        samples (`int`):
            Completions to draw, N.
        seed (`int`, *optional*):
            The samples' random streams: sample k has `seed + k`. With `None` decoding is greedy.
        config ([`~transformers.GenerationConfig`]):
            `max_new_tokens`, temperature, top-p, top-k, min-p, repetition penalty, end tokens and suppressed tokens.
    """

    role: str
    prompt_ids: Sequence[int]
    image: str
    samples: int
    seed: int | None
    config: GenerationConfig


@dataclass(frozen=True)
class VLLMCompletion:
    """
    One completion.

    Args:
        ids (`list[int]`):
            Token ids as sampled, end token included, of shape (completion length,).
        logps (`list[float]`):
            Log-probability of each of them, in nats, under the distribution it was drawn from: after temperature,
            suppressed tokens and top-p, top-k and min-p.
    """

    ids: list[int]
    logps: list[float]


@dataclass(frozen=True)
class ServedAdapter:
    """
    One version of a role's adapter on the servers.

    Args:
        name (`str`):
            What requests call it; never used for another version.
        folder (`str`):
            Where its files are.
    """

    name: str
    folder: str


class VLLMError(RuntimeError):
    """A vLLM server refused something, or did not come back. The message holds the server's own text."""


class VLLMServers:
    """
    One or several vLLM servers with the same base model.

    An image's requests go to one server, so that they share its caches; images are spread over the servers. A server that
    dies is waited for and gets the adapters again, its requests are sent again, or go to another server meanwhile. May be
    used from several threads.

    On several processes the main one calls [`~VLLMServers.start`] and [`~VLLMServers.swap`], and the others take over its
    [`~VLLMServers.adapters`].

    Args:
        urls (`Sequence[str]`):
            Addresses, such as `"http://localhost:8000"`. With `VLLM_API_KEY` in the environment, as of the servers, it is
            sent to them.
        image_token_id (`int`):
            The token that stands for image patches in a prompt.
        adapter_dir (`str` or `Path`):
            Folder for the adapters, which the servers must be able to read under the same path.
        start_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for a server that is starting, or has died.
        request_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that one request may take before it is sent again, to another server if there is one.
        max_in_flight (`int`, *optional*, defaults to `64`):
            Requests per server at a time; the others wait here.

    Attributes:
        adapters (`dict[str, ServedAdapter]`):
            The current adapter of each role.
        swap_seconds (`dict[str, list[float]]`):
            How long the swaps of each role took, saving included.

    Raises:
        `ValueError`: if an address is not one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        image_token_id: int,
        adapter_dir: str | Path,
        *,
        start_timeout: float = 240.0,
        request_timeout: float = 600.0,
        max_in_flight: int = 64,
    ):
        raise NotImplementedError

    def start(self, model_id: str) -> None:
        """
        Waits until all servers are up and checks that they can be used: token ids in and out, adapters loaded at run time,
        the expected base model. Removes what a run that was killed has left in `adapter_dir`. Whether adapters are enabled
        and of what rank is said by the first [`~VLLMServers.swap`].

        Args:
            model_id (`str`):
                Id or path of the base model.

        Raises:
            `VLLMError`: if a server is not up in `start_timeout`, or lacks something.
        """
        raise NotImplementedError

    def swap(self, role: str, save: Callable[[Path], None], retire: bool = True) -> float:
        """
        Makes every server answer this role's later requests with a new version of its adapter. Requests in flight are
        completed by the version they were submitted under.

        Args:
            role (`str`):
                Whose adapter it is.
            save (`Callable[[Path], None]`):
                Writes `adapter_config.json` and `adapter_model.safetensors` into an empty folder.
            retire (`bool`, *optional*, defaults to `True`):
                Whether to unload and delete the version before as soon as no request of this process needs it. With
                `False` it stays until [`~VLLMServers.retire`], for requests of other processes.

        Returns:
            `float`: seconds it took.

        Raises:
            `VLLMError`: if a server refuses the adapter, as of a rank above its `--max-lora-rank`.
        """
        raise NotImplementedError

    def retire(self) -> None:
        """Unloads and deletes all versions but the current ones, as soon as no request of this process needs them."""
        raise NotImplementedError

    def submit(self, request: VLLMRequest) -> "Future[list[VLLMCompletion]]":
        """
        Sends a request, under the role's current adapter.

        Args:
            request ([`VLLMRequest`]):
                The request.

        Returns:
            `Future[list[VLLMCompletion]]`: one completion per sample. It raises a [`VLLMError`] if the server refuses the
            request, or reads the prompt otherwise than the processor does.
        """
        raise NotImplementedError

    def generate(self, requests: Sequence[VLLMRequest]) -> list[list[VLLMCompletion]]:
        """The completions of several requests, in their order; all of them are in flight together."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives up what is in flight, unloads this run's adapters and deletes their folders."""
        raise NotImplementedError


def image_url(image: Image.Image) -> str:
    """
    An image as a request holds it, without loss. Made once per image, it serves the requests of both roles.

    Args:
        image (`PIL.Image.Image`):
            The image as the processor is given it.

    Returns:
        `str`: a PNG as a `data:` URL.
    """
    raise NotImplementedError
