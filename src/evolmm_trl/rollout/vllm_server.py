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

import base64
import hashlib
import http.client
import io
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from transformers import BaseImageProcessor, GenerationConfig

from .generation import _end_tokens, why_not_generated_shared


logger = logging.getLogger(__name__)

_GENERATE = "/inference/v1/generate"
# A request that one server after another dies of is given up
_MOST_DEATHS = 3
# Seconds between two looks at a server that is down, and between two progress lines
_POLL, _PROGRESS = 0.5, 10.0
# Seconds after an error in which a server whose engine has died comes to say so
_DYING = 1.0
# Seconds in which a host takes a connection, if it is there
_CONNECT = 10.0
# Answers to anything but a generation are short
_SHORT_ANSWER = 4 * 1024 * 1024
_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Where `examples/vllm_adapter_upload.py` takes adapters
_UPLOADS = "/evolmm/adapters"
# Put into every adapter folder, with the run it belongs to; only folders that hold it are deleted
_MARK = ".evolmm_trl_adapter"
_IMAGES_REMEMBERED = 100_000
# What a proxy says whose server is gone, and what a server says that may be busy, or gone
_UNAVAILABLE, _BUSY = (502, 504), (429, 503)


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
    dies is waited for and gets the adapters again; its requests go to another server, or are sent again when it is back. May
    be used from several threads.

    On several processes the main one calls [`~VLLMServers.start`] and [`~VLLMServers.swap`], and the others take over its
    `adapters`.

    Args:
        urls (`Sequence[str]`):
            Addresses, such as `"http://localhost:8000"`. A `VLLM_API_KEY` in the environment, as the servers have it, is
            sent to them.
        image_token_id (`int`):
            The token that stands for the image in a prompt, as often as it has patches.
        adapter_dir (`str` or `Path`):
            Folder for the adapters. Servers read it under the same path, unless they take uploads.
        owner (`str`, *optional*):
            The run that the adapters belong to: what a killed run of this name has left in `adapter_dir` is removed at the
            start. With `None` all clients of `adapter_dir` are one run.
        start_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for a server that is starting, has died, or is busy.
        request_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that one request may take before it is sent again, to another server if there is one.
        max_in_flight (`int`, *optional*, defaults to `64`):
            Requests per server at a time; the others wait here.

    Attributes:
        urls (`list[str]`):
            The addresses.
        adapters (`dict[str, ServedAdapter]`):
            The current adapter of each role.
        swap_seconds (`dict[str, list[float]]`):
            How long the swaps of each role took, saving included.
        faults (`Counter`):
            How often a server has died (`"deaths"`), and requests were sent again for that (`"repeated"`) or for being too
            slow (`"slow"`).

    Raises:
        `ValueError`: if an address is not one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        image_token_id: int,
        adapter_dir: str | Path,
        *,
        owner: str | None = None,
        start_timeout: float = 240.0,
        request_timeout: float = 600.0,
        max_in_flight: int = 64,
    ):
        if isinstance(urls, str) or not urls or len(set(urls)) != len(urls):
            raise ValueError(
                f"`urls` is {urls!r}; expected a list of different addresses, such as 'http://localhost:8000'."
            )
        self.urls = list(urls)
        self._servers = [_Server(url) for url in urls]
        self.image_token_id = image_token_id
        self.adapter_dir = Path(adapter_dir).absolute()
        self._owner = os.fsencode(owner or self.adapter_dir)
        self.start_timeout = start_timeout
        self.request_timeout = request_timeout
        self.adapters: dict[str, ServedAdapter] = {}
        self.swap_seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.faults: Counter[str] = Counter()
        self._model_id: str | None = None  # known where `start` was called
        self._run = uuid.uuid4().hex[:8]  # two runs may share a server
        self._versions: Counter[str] = Counter()
        self._made: list[ServedAdapter] = []  # by this client, and not yet deleted
        self._in_flight: Counter[str] = Counter()
        self._places: OrderedDict[bytes, _Server] = OrderedDict()
        self._changed = threading.Condition()  # guards what is above and the servers' states
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(max_in_flight * len(self._servers), thread_name_prefix="vllm")

    def __enter__(self) -> "VLLMServers":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------
    # Starting

    def start(self, model_id: str) -> None:
        """
        Waits until all servers are up and checks that they can be used: token ids in and out, adapters loaded at run time.
        Unloads and deletes what this run has left in `adapter_dir` when it was killed. Whether a server takes adapters, and of
        this rank, is said by the first [`~VLLMServers.swap`], which also warns of another base model.

        Args:
            model_id (`str`):
                Id or path of the base model.

        Raises:
            `VLLMError`: if a server is not up within `start_timeout`, or lacks something.
        """
        self._model_id = model_id
        for server in self._servers:
            reason = self._why_not_healthy(server)
            if reason is not None:
                self._set_down(server, reason)
        with self._changed:
            self._changed.wait_for(lambda: all(server.up for server in self._servers), self.start_timeout)
            missing = [f"{server.url} ({server.reason})" for server in self._servers if not server.up]
        if missing:
            raise VLLMError(
                f"No vLLM server answers at {', '.join(missing)} after {self.start_timeout:.0f} s. Start it with `vllm serve`, "
                "see docs/vllm.md, or raise the time to wait for it."
            )
        for server in self._servers:
            try:
                self._check(server)
            except _Gone as error:
                raise VLLMError(f"The vLLM server at {server.url} was up and is gone: {error}.") from error
        self._remove_leftovers()

    def _check(self, server: "_Server") -> None:
        """Raises a `VLLMError` if a server does not offer what is needed."""
        status, text = self._ask(server, "POST", "/v1/unload_lora_adapter", {"lora_name": f"{self._run}-none"})
        if status == 404 and not _is_of_vllm(text):
            raise VLLMError(
                f"The vLLM server at {server.url} loads no adapters at run time ({_shown(text)}). Start it with "
                "--enable-lora and the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
            )
        if status == 401:
            raise VLLMError(
                f"The vLLM server at {server.url} asks for a key ({_shown(text)}). Set VLLM_API_KEY in the environment of "
                "the training to the server's."
            )
        body = {"model": f"{self._run}-none", "token_ids": [0], "sampling_params": {"max_tokens": 1}}
        status, text = self._ask(server, "POST", _GENERATE, body)
        if status in (403, 404, 405) and not (status == 404 and _is_of_vllm(text)):
            raise VLLMError(
                f"The vLLM server at {server.url} takes no token ids ({_shown(text)}). Start it with --enable-scale-out, of "
                "vLLM 0.32 or newer."
            )

    def _remove_leftovers(self) -> None:
        """Unloads and deletes the adapters that this run has left when it was killed."""
        if not self.adapter_dir.is_dir():
            return
        current = {adapter.folder for adapter in self.adapters.values()}
        folders = [folder for folder in sorted(self.adapter_dir.iterdir()) if str(folder) not in current]
        self._remove(*(ServedAdapter(folder.name, str(folder)) for folder in folders if self._is_ours(folder)))

    def _is_ours(self, folder: Path) -> bool:
        try:
            return not folder.is_symlink() and (folder / _MARK).read_bytes() == self._owner
        except OSError:  # no adapter, or another run's: gone by now, or not for us to read
            return False

    # ------------------------------------------------------------------------------------------------------------
    # Adapters

    def swap(self, role: str, save: Callable[[Path], None]) -> float:
        """
        Makes every server answer this role's later requests with a new version of its adapter; the version before is
        unloaded and deleted. No request of this role may be in flight, on any process.

        Args:
            role (`str`):
                Whose adapter it is.
            save (`Callable[[Path], None]`):
                Writes `adapter_config.json` and `adapter_model.safetensors` into an empty folder.

        Returns:
            `float`: seconds it took.

        Raises:
            `VLLMError`: if a server refuses the adapter, as of a rank above its `--max-lora-rank`.
        """
        begin = time.perf_counter()
        with self._changed:
            if self._in_flight[role]:
                raise RuntimeError(
                    f"{self._in_flight[role]} requests of the {role} are in flight, and its adapter cannot be swapped "
                    "under them. Wait for their results first."
                )
            self._versions[role] += 1
            # Always a new name and a new folder: under the old ones a server answers from blocks of its prefix cache that
            # the old weights have filled, and with `load_inplace` it reads the folder at every step ever after
            name = f"evolmm-{role}-{self._run}-v{self._versions[role]}"
        adapter = ServedAdapter(name, str(self.adapter_dir / name))
        folder = Path(adapter.folder)
        folder.mkdir(parents=True)
        (folder / _MARK).write_bytes(self._owner)
        self._made.append(adapter)
        save(folder)
        missing = [file for file in _FILES if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"`save` has not written {' and '.join(missing)} into the folder it was given.")
        self._on_all(lambda server: self._load(server, adapter))
        with self._changed:
            before = self.adapters.get(role)
            self.adapters[role] = adapter
        if before is not None:
            self._remove(before)
        seconds = time.perf_counter() - begin
        self.swap_seconds[role].append(seconds)
        return seconds

    def _on_all(self, action: Callable[["_Server"], None]) -> None:
        """Does something to every server that is up; one that is down gets its adapters when it is back."""
        for _ in range(_MOST_DEATHS):
            self._wait_for_any(self._servers)
            with self._changed:
                up = [server for server in self._servers if server.up]
            for server in up:
                try:
                    action(server)
                except _Gone as error:
                    self.faults["deaths"] += 1
                    self._set_down(server, str(error))
                    up = [other for other in up if other is not server]
            if up:
                return
        reasons = "; ".join(f"{server.url}: {server.reason}" for server in self._servers)
        raise VLLMError(
            f"A swap was tried {_MOST_DEATHS} times, and each time all vLLM servers were gone or broke down. {reasons}."
        )

    def _load(self, server: "_Server", adapter: ServedAdapter) -> None:
        """Loads an adapter into a server that does not have it, and looks once whether its log-probs are what is sampled."""
        with server.loading:
            if adapter.name in server.loaded:
                return
            # What another process has made, it has loaded, perhaps from a disk that is not here
            if adapter in self._made or not self._has(server, adapter):
                body = {"lora_name": adapter.name, "lora_path": self._place(server, adapter)}
                status, text = self._ask(server, "POST", "/v1/load_lora_adapter", body, self.start_timeout)
                # A server that was only out of reach has it still, and another process may have been faster
                if status != 200 and not self._has(server, adapter):
                    raise VLLMError(
                        f"The vLLM server at {server.url} does not load the adapter {adapter.folder}: {_shown(text)}. It "
                        "must be started with --enable-lora, with a --max-lora-rank of at least the adapter's rank, and be "
                        "able to read this folder under this path, or take uploads (docs/vllm.md)."
                    )
            if not server.checked:
                self._check_model(server)
                self._check_logps(server, adapter)
                server.checked = True
            server.loaded.add(adapter.name)

    def _has(self, server: "_Server", adapter: ServedAdapter) -> bool:
        return adapter.name in {card.get("id") for card in self._models(server)}

    def _takes_uploads(self, server: "_Server") -> bool:
        if server.takes_uploads is None:
            status, _ = self._ask(server, "GET", _UPLOADS)
            server.takes_uploads = status == 200
        return server.takes_uploads

    def _place(self, server: "_Server", adapter: ServedAdapter) -> str:
        """The folder in which a server finds an adapter: this one, or where it puts what is uploaded."""
        folder = adapter.folder
        if self._takes_uploads(server):
            for file in _FILES:
                try:
                    content = Path(adapter.folder, file).read_bytes()
                except OSError as error:
                    raise VLLMError(
                        f"The vLLM server at {server.url} has no adapter {adapter.name}, and this process cannot upload it "
                        f"({type(error).__name__}: {error}). Training on several hosts needs `vllm_adapter_dir` on a disk "
                        "that all of them share, so that each can give it to a server that was started anew."
                    ) from error
                path = f"{_UPLOADS}/{adapter.name}/{file}"
                status, text = self._ask(server, "PUT", path, content, self.start_timeout)
                if status != 200:
                    raise VLLMError(f"The vLLM server at {server.url} does not take {file}: {_shown(text)}.")
                folder = _json(server, text).get("folder")
        return folder

    def _check_model(self, server: "_Server") -> None:
        """Warns of a server of another base model, by its name."""
        cards = [card for card in self._models(server) if not card.get("parent")]
        names = {str(card.get(key)) for card in cards for key in ("id", "root")}
        model = self._model_id
        if model and model not in names and os.path.realpath(model) not in map(os.path.realpath, names):
            logger.warning(
                "The vLLM server at %s serves %s, and the trained model is %s. If these are not the same weights, the "
                "log-probs will differ.",
                server.url,
                " or ".join(sorted(names)),
                model,
            )

    def _check_logps(self, server: "_Server", adapter: ServedAdapter) -> None:
        """Raises a `VLLMError` unless the only token that is allowed has the log-prob 0."""
        sampling = {"max_tokens": 1, "temperature": 1.0, "allowed_token_ids": [0], "logprobs": 0, "ignore_eos": True}
        body = {"model": adapter.name, "token_ids": [0], "sampling_params": sampling}
        (completion,) = _completions(server, self._generate(server, body, self.start_timeout), 1)
        if abs(completion.logps[0]) > 1e-3:
            raise VLLMError(
                f"The vLLM server at {server.url} gives the log-prob {completion.logps[0]:.3f} to a token without "
                "alternative: it returns log-probs from before temperature and suppressed tokens. Start it with "
                "--logprobs-mode processed_logprobs."
            )

    def _remove(self, *adapters: ServedAdapter) -> None:
        """Unloads adapters on all servers, then deletes their folders: a server that still knows one may read it again."""
        for server in self._servers:
            # One that is gone comes back without adapters, or with one that nobody asks for
            if server.up:
                with suppress(_Gone):
                    for adapter in adapters:
                        self._unload(server, adapter)
        self._made = [made for made in self._made if made not in adapters]
        for folder in (Path(adapter.folder) for adapter in adapters):
            if folder.parent == self.adapter_dir and self._is_ours(folder):
                shutil.rmtree(folder)

    def _unload(self, server: "_Server", adapter: ServedAdapter) -> None:
        server.loaded.discard(adapter.name)
        status, text = self._ask(server, "POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})
        if status not in (200, 404):
            raise VLLMError(f"The vLLM server at {server.url} does not unload {adapter.name}: {_shown(text)}.")
        if self._takes_uploads(server):
            self._ask(server, "DELETE", f"{_UPLOADS}/{adapter.name}")

    # ------------------------------------------------------------------------------------------------------------
    # Requests

    def submit(self, request: VLLMRequest, url: str | None = None) -> "Future[list[VLLMCompletion]]":
        """
        Sends a request, to be answered by the role's current adapter.

        Args:
            request ([`VLLMRequest`]):
                The request.
            url (`str`, *optional*):
                The server to ask, one of `urls`. `None`: any.

        Returns:
            `Future[list[VLLMCompletion]]`: one completion per sample. It raises a [`VLLMError`] if the server refuses the
            request, or reads the prompt otherwise than the processor does.
        """
        body = self._body(request)
        only = None if url is None else self._servers[self.urls.index(url)]
        with self._changed:
            adapter = self.adapters.get(request.role)
            if adapter is None:
                raise ValueError(f"The {request.role} has no adapter on the servers; call `swap` first.")
            self._in_flight[request.role] += 1
        try:
            text = json.dumps({**body, "model": adapter.name})
            future = self._pool.submit(self._complete, request, adapter, text, only)
        except RuntimeError:  # closed
            self._has_landed(request.role)
            raise
        # One that is sent has landed before its result is handed on, so that who has all results may swap
        future.add_done_callback(lambda done: self._has_landed(request.role) if done.cancelled() else None)
        return future

    def generate(self, requests: Sequence[VLLMRequest]) -> list[list[VLLMCompletion]]:
        """The completions of several requests, in their order; all of them are in flight together."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def _has_landed(self, role: str) -> None:
        with self._changed:
            self._in_flight[role] -= 1

    def _body(self, request: VLLMRequest) -> dict:
        """A request in the server's terms, without its adapter."""
        config = request.config
        reason = why_not_generated_shared(config)
        if reason is not None:
            raise ValueError(f"A vLLM server cannot be asked for this: {reason}.")
        if self.image_token_id not in request.prompt_ids:
            raise ValueError(f"The prompt has no image token ({self.image_token_id}).")
        if request.samples < 1 or (request.seed is None and request.samples > 1):
            raise ValueError(f"samples={request.samples}; expected 1 or more, and 1 for greedy decoding (seed=None).")
        sampling = {
            "n": request.samples,
            "max_tokens": config.max_new_tokens,
            "temperature": 0.0 if request.seed is None else 1.0 if config.temperature is None else config.temperature,
            "top_p": 1.0 if config.top_p is None else config.top_p,
            "top_k": config.top_k or 0,
            "min_p": config.min_p or 0.0,
            "repetition_penalty": 1.0 if config.repetition_penalty is None else config.repetition_penalty,
            "logit_bias": {str(token): -100.0 for token in config.suppress_tokens or ()},
            # These alone, whatever the server's generation config says
            "stop_token_ids": sorted(_end_tokens(config) - {None}),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        }
        if request.seed is not None:
            sampling["seed"] = request.seed % 2**62  # the server adds the sample's number, in 64 bits
        return {
            "token_ids": one_image_token(request.prompt_ids, self.image_token_id),
            "content_parts": [{"type": "image_url", "url": request.image}],
            "return_token_ids": True,
            "sampling_params": sampling,
        }

    def _complete(
        self, request: VLLMRequest, adapter: ServedAdapter, body: str, only: "_Server | None"
    ) -> list[VLLMCompletion]:
        """Sends a request until it is answered or refused."""
        try:
            image = hashlib.blake2b(request.image.encode(), digest_size=16).digest()
            slow: list[_Server] = []
            deaths = 0
            while True:
                server = self._choose(image, slow, only)
                try:
                    self._load(server, adapter)
                    return self._send(server, request, adapter, body)
                except _Gone as error:
                    with self._changed:
                        self.faults["deaths"] += server.up
                        self.faults["repeated"] += 1
                    self._set_down(server, str(error))
                    deaths += 1
                    if deaths == _MOST_DEATHS:
                        raise VLLMError(
                            f"A request was sent {deaths} times, and each time the vLLM server was gone or broke down, last "
                            f"{server.url}: {error}."
                        ) from error
                except TimeoutError:
                    slow.append(server)
                    with self._changed:
                        self.faults["slow"] += 1
                    if len(slow) > (1 if only else len(self._servers)):
                        raise VLLMError(
                            f"A request for {request.samples} completions of at most {request.config.max_new_tokens} tokens "
                            f"took more than {self.request_timeout:.0f} s, {len(slow)} times, last on {server.url}. Raise "
                            "the time-out, or add servers."
                        ) from None
                    logger.warning(
                        "The vLLM server at %s has not answered in %.0f s; the request is sent again.",
                        server.url,
                        self.request_timeout,
                    )
                finally:
                    with self._changed:
                        server.in_flight -= 1
        finally:
            self._has_landed(request.role)

    def _choose(self, image: bytes, slow: Sequence["_Server"], only: "_Server | None") -> "_Server":
        """
        The server of this image; for an image not seen before the one with the fewest requests, and among equals the one that
        is the image's by lot: processes know of their own requests alone.
        """
        candidates = self._servers if only is None else [only]
        while True:
            if self._closing.is_set():
                raise VLLMError("The client of the vLLM servers was closed.")
            with self._changed:
                up = [server for server in candidates if server.up]
                up = [server for server in up if server not in slow] or up
                if up:
                    server = self._places.get(image)
                    if server not in up:
                        server = min(up, key=lambda s: (s.in_flight, hashlib.blake2b(image + s.url.encode()).digest()))
                    self._places[image] = server
                    self._places.move_to_end(image)
                    if len(self._places) > _IMAGES_REMEMBERED:
                        self._places.popitem(last=False)
                    server.in_flight += 1
                    return server
            self._wait_for_any(candidates)

    def _send(
        self, server: "_Server", request: VLLMRequest, adapter: ServedAdapter, body: str
    ) -> list[VLLMCompletion]:
        tokens = len(request.prompt_ids) + request.samples * request.config.max_new_tokens
        limit = _SHORT_ANSWER + 512 * tokens
        text = self._generate(server, body, self.request_timeout, limit, raise_slow=True)
        answer = _json(server, text)
        self._check_prompt(server, request, answer.get("prompt_token_ids"))
        completions = _completions(server, text, request.samples)
        ends, suppressed = _end_tokens(request.config), set(request.config.suppress_tokens or ())
        for completion in completions:
            length, longest = len(completion.ids), request.config.max_new_tokens
            if length > longest or (length < longest and completion.ids[-1] not in ends):
                raise VLLMError(
                    f"The vLLM server at {server.url} ends a completion of at most {longest} tokens after {length}, without "
                    f"an end token. Its --max-model-len must hold a prompt, here of {len(request.prompt_ids)} tokens, and "
                    "a completion."
                )
            if not suppressed.isdisjoint(completion.ids):
                token = next(token for token in completion.ids if token in suppressed)
                raise VLLMError(
                    f"The vLLM server at {server.url} has sampled the token {token}, which the request suppresses: it does not "
                    "follow `logit_bias`. Use vLLM 0.32 or a newer one that is tested."
                )
        return completions

    def _generate(
        self,
        server: "_Server",
        body: dict | str,
        timeout: float,
        limit: int = _SHORT_ANSWER,
        raise_slow: bool = False,
    ) -> str:
        """The text of the answer to a request for completions by an adapter that was loaded."""
        status, text = self._ask(server, "POST", _GENERATE, body, timeout, limit, raise_slow)
        if status == 404:
            # It was started anew since, and may have been given the adapter again by now
            raise _Gone(f"status 404, {_shown(text)}")
        if status != 200:
            raise VLLMError(f"The vLLM server at {server.url} answers {status} to a request: {_shown(text)}.")
        return text

    def _check_prompt(self, server: "_Server", request: VLLMRequest, read: list[int] | None) -> None:
        expected = list(request.prompt_ids)
        if read != expected:
            read = read or []
            own, other = (ids.count(self.image_token_id) for ids in (expected, read))
            raise VLLMError(
                f"The vLLM server at {server.url} reads a prompt as {len(read)} tokens, {other} of them of the image, and "
                f"the processor here as {len(expected)} tokens, {own} of them of the image. Serve the same checkpoint, with "
                "the processor's own limits of image size (`--mm-processor-kwargs`)."
            )

    # ------------------------------------------------------------------------------------------------------------
    # Servers that come and go

    def _set_down(self, server: "_Server", reason: str) -> None:
        """Sends no more requests to a server until it is healthy again."""
        with self._changed:
            server.reason = reason
            if not server.up or self._closing.is_set():
                return
            server.up = False
            server.down_since = time.monotonic()
            server.loaded.clear()
            server.checked = False
            server.takes_uploads = None
        threading.Thread(target=self._watch, args=(server,), daemon=True, name=f"watch {server.url}").start()

    def _watch(self, server: "_Server") -> None:
        """Looks at a server that is down until it is up."""
        next_line = server.down_since
        while not self._closing.wait(_POLL):
            reason = self._why_not_healthy(server)
            if reason is None:
                break
            seconds = time.monotonic() - server.down_since
            if time.monotonic() >= next_line:
                logger.warning(
                    "Waiting for the vLLM server at %s: %.0f of %.0f s (%s)",
                    server.url,
                    seconds,
                    self.start_timeout,
                    server.reason,
                )
                next_line += _PROGRESS
        else:
            return
        with self._changed:
            server.up = True
            self._changed.notify_all()
        logger.warning("The vLLM server at %s is up.", server.url)

    def _wait_for_any(self, servers: Sequence["_Server"]) -> None:
        """Waits until one of these is up."""
        with self._changed:
            since = max(server.down_since for server in servers)
            remaining = since + self.start_timeout - time.monotonic()
            some_up = self._changed.wait_for(
                lambda: self._closing.is_set() or any(server.up for server in servers), max(remaining, 0)
            )
            reasons = "; ".join(f"{server.url}: {server.reason}" for server in servers)
        if not some_up:
            raise VLLMError(f"No vLLM server has come back in {self.start_timeout:.0f} s. {reasons}.")

    def _why_not_healthy(self, server: "_Server") -> str | None:
        try:
            status, text = self._call(server, "GET", "/health", timeout=5.0)
        except (_Gone, VLLMError) as error:
            return str(error)
        return None if status == 200 else f"status {status} of /health, {_shown(text)}"

    def _models(self, server: "_Server") -> list[dict]:
        """The cards of the base model and of the adapters."""
        status, text = self._ask(server, "GET", "/v1/models")
        cards = _json(server, text).get("data") if status == 200 else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise VLLMError(f"The server at {server.url} is no vLLM server: it answers {_shown(text)} to /v1/models.")
        return cards

    def _ask(self, server: "_Server", method: str, path: str, *args, **kwargs) -> tuple[int, str]:
        """As [`VLLMServers._call`], of an answer that is about the request: waits for a busy server, and [`_Gone`] if it dies."""
        begin, pause = time.monotonic(), _POLL
        while True:
            status, text = self._call(server, method, path, *args, **kwargs)
            is_busy = status in _BUSY
            if status < 500 and not is_busy:
                return status, text
            if not is_busy:
                self._closing.wait(_DYING)
            if status in _UNAVAILABLE or self._why_not_healthy(server) is not None:
                raise _Gone(f"status {status}, {_shown(text)}")
            if not is_busy:
                return status, text
            seconds = time.monotonic() - begin
            if seconds > self.start_timeout:
                raise VLLMError(
                    f"The vLLM server at {server.url} is up, and too busy to answer {path} in {seconds:.0f} s (status {status}, "
                    f"{_shown(text)}). Add servers, or raise the time to wait for them."
                )
            with self._changed:
                is_news = time.monotonic() >= server.next_busy_line
                if is_news:
                    server.next_busy_line = time.monotonic() + _PROGRESS
            if is_news:
                logger.warning(
                    "The vLLM server at %s is busy: waiting for %.0f of %.0f s (status %d, %s)",
                    server.url,
                    seconds,
                    self.start_timeout,
                    status,
                    _shown(text),
                )
            if self._closing.wait(pause):
                raise _Gone("closed")
            pause = min(2 * pause, _PROGRESS)

    def _call(
        self,
        server: "_Server",
        method: str,
        path: str,
        body: dict | str | bytes | None = None,
        timeout: float = 60.0,
        limit: int = _SHORT_ANSWER,
        raise_slow: bool = False,
    ) -> tuple[int, str]:
        """Status and text of an answer. Without one it raises [`_Gone`], or with `raise_slow` a `TimeoutError` if it is late."""
        end = time.monotonic() + timeout
        connection = server.connection(min(timeout, _CONNECT))
        connected = False
        with self._changed:
            server.connections.add(connection)
        try:
            connection.connect()
            connected = True
            connection.sock.settimeout(timeout)
            if self._closing.is_set() and path == _GENERATE:
                raise _Gone("closed")
            connection.request(method, server.path + path, body=_encoded(body), headers=server.headers)
            answer = connection.getresponse()
            chunks, size = [], 0
            while chunk := answer.read1(2**16):
                chunks.append(chunk)
                size += len(chunk)
                if size > limit:
                    raise VLLMError(f"The server at {server.url} answers {path} with more than {limit} bytes.")
                if time.monotonic() > end:
                    raise TimeoutError
            return answer.status, b"".join(chunks).decode("utf-8", "replace")
        except TimeoutError:
            if not connected:
                raise _Gone(f"no connection in {min(timeout, _CONNECT):.0f} s") from None
            if raise_slow:
                raise
            raise _Gone(f"no answer to {path} in {timeout:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Gone(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
            with self._changed:
                server.connections.discard(connection)

    @property
    def closed(self) -> bool:
        """Whether [`~VLLMServers.close`] was called: nothing can be asked any more."""
        return self._closing.is_set()

    def close(self) -> None:
        """Gives up what is in flight, unloads this client's adapters and deletes their folders."""
        if self._closing.is_set():
            return
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
            sockets = [c.sock for server in self._servers for c in server.connections if c.sock is not None]
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._pool.shutdown(wait=True, cancel_futures=True)
        try:
            self._remove(*self._made)
        except VLLMError as error:
            logger.warning("The adapters in %s stay where they are: %s", self.adapter_dir, error)


class _Gone(Exception):
    """A server gives no answer, or none that is about the request."""


class _Server:
    """One server, and what is known of it."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise ValueError(f"{url!r} is not the address of a server; expected one such as 'http://localhost:8000'.")
        self.url = url
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connection = lambda timeout: kind(parts.hostname, parts.port, timeout=timeout)
        self.headers = {"Content-Type": "application/json"}
        if os.environ.get("VLLM_API_KEY"):
            self.headers["Authorization"] = f"Bearer {os.environ['VLLM_API_KEY']}"
        self.up = True  # until a request fails
        self.reason = ""
        self.down_since = 0.0
        self.in_flight = 0
        self.connections: set[http.client.HTTPConnection] = set()
        self.loading = threading.RLock()
        self.loaded: set[str] = set()
        self.checked = False
        self.takes_uploads: bool | None = None
        self.next_busy_line = 0.0


def image_url(image: Image.Image) -> str:
    """
    An image as a request holds it, without loss. Made once per image, it serves the requests of both roles.

    Args:
        image (`PIL.Image.Image`):
            The image as the processor is given it.

    Returns:
        `str`: a PNG as a `data:` URL.
    """
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def seen_image(image_inputs: dict[str, torch.Tensor], image_processor: BaseImageProcessor) -> Image.Image:
    """
    The image as the model sees it: the pixels that the processor has made of it, to 8 bits as they were. A server that is sent
    these resizes nothing; it would by another library, which moves log-probs (docs/vllm.md).

    Args:
        image_inputs (`dict[str, torch.Tensor]`):
            `pixel_values` (patches, patch size) and `image_grid_thw` (1, 3) of one image, of a Qwen processor.
        image_processor ([`~transformers.BaseImageProcessor`]):
            What has made them.

    Returns:
        `PIL.Image.Image`

    Raises:
        `ValueError`: if they are not those of a Qwen model.
    """
    if "image_grid_thw" not in image_inputs or len(image_inputs["image_grid_thw"]) != 1:
        raise ValueError(
            f"An image with the inputs {sorted(image_inputs)} cannot be sent to a vLLM server; expected one image of "
            "Qwen2.5-VL or Qwen3-VL, with `pixel_values` and `image_grid_thw`."
        )
    _, height, width = image_inputs["image_grid_thw"][0].tolist()
    merge, patch, times = image_processor.merge_size, image_processor.patch_size, image_processor.temporal_patch_size
    patches = image_inputs["pixel_values"].float().cpu()
    # Patches that are merged follow each other; a still image fills all of a patch's times
    patches = patches.view(height // merge, width // merge, merge, merge, -1, times, patch, patch)[:, :, :, :, :, 0]
    pixels = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, -1)
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).numpy())


def one_image_token(prompt_ids: Sequence[int], image_token_id: int) -> list[int]:
    """
    A prompt with one token per image, which the server repeats as often as the image needs; it would repeat each of several.

    Args:
        prompt_ids (`Sequence[int]`):
            Token ids, of shape (prompt length,).
        image_token_id (`int`):
            The token that stands for an image.

    Returns:
        `list[int]`
    """
    return [
        int(token)
        for i, token in enumerate(prompt_ids)
        if token != image_token_id or i == 0 or prompt_ids[i - 1] != image_token_id
    ]


def _encoded(body: dict | str | bytes | None) -> bytes | None:
    if body is None or isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def _shown(text: str) -> str:
    """The message of an error of vLLM's, or the beginning of whatever it is, on one line."""
    try:
        answer = json.loads(text)
        message = answer["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = text
    message = " ".join(str(message).split())
    return repr(message if len(message) <= 1000 else message[:1000] + "...")


def _is_of_vllm(text: str) -> bool:
    """Whether an error comes from a handler of vLLM, not from the web framework, which knows no such address."""
    try:
        return isinstance(json.loads(text)["error"]["message"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _json(server: _Server, text: str) -> dict:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise VLLMError(f"The server at {server.url} is no vLLM server: it answers {_shown(text)}.")
    return answer


def _completions(server: _Server, text: str, samples: int) -> list[VLLMCompletion]:
    """The completions in an answer, in the order of their seeds."""
    try:
        choices = sorted(_json(server, text)["choices"], key=lambda choice: choice["index"])
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise _Gone("it has aborted the request")
        completions = []
        for choice in choices:
            ids = [int(token) for token in choice["token_ids"]]
            content = choice["logprobs"]["content"]
            if not ids or [entry["token_id"] for entry in content] != ids:
                raise ValueError("token ids and log-probs do not go together")
            completions.append(VLLMCompletion(ids, [float(entry["logprob"]) for entry in content]))
        if [choice["index"] for choice in choices] != list(range(samples)):
            raise ValueError(f"{len(choices)} completions for {samples} samples")
        if any(not math.isfinite(logp) or logp > 1e-3 for c in completions for logp in c.logps):
            raise ValueError("a log-prob that is none")
    except (KeyError, TypeError, ValueError) as error:
        raise VLLMError(
            f"The vLLM server at {server.url} answers in a form that is not known here ({type(error).__name__}: {error}): "
            f"{_shown(text)}. Use vLLM 0.32 or a newer one that is tested."
        ) from error
    return completions
