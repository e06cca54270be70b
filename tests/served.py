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


"""A stand-in for `VLLMServers` that samples in this process, from the adapters' files and the request's image."""

import base64
import functools
import io
import os
import shutil
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.integrations import deepspeed

from evolmm_trl.processing import load_processor
from evolmm_trl.rollout.generation import generate
from evolmm_trl.rollout.samples import EncodedPrompt
from evolmm_trl.rollout.served import processed_logps
from evolmm_trl.rollout.vllm_server import ServedAdapter, VLLMCompletion, VLLMRequest


class ServersStandIn:
    """
    Takes the place of `evolmm_trl.rollout.served.VLLMServers`. As a server does, it knows the base model, the adapters as
    files and the image as a PNG, and nothing of the trainer.

    Args:
        base (`str`):
            Folder of the base model that it serves.
    """

    base: str
    closed = False

    def __init__(self, urls, image_token_id, adapter_dir, *, owner, start_timeout, request_timeout):
        assert Path(owner).is_absolute()  # else two runs may be of one name
        self.urls, self.image_token_id = list(urls), image_token_id
        self.adapter_dir = Path(adapter_dir)
        self.adapters: dict[str, ServedAdapter] = {}
        self.swap_seconds = defaultdict(list)
        self.faults = Counter()
        self.events: list[tuple] = []  # what happened, in order
        # Whole in this process, whatever the trainer's engine makes of models that are loaded
        with (
            mock.patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None),
            mock.patch.dict(os.environ, ACCELERATE_USE_FSDP="false"),
        ):
            self.model = AutoModelForImageTextToText.from_pretrained(self.base, dtype=torch.float32).eval()
        # Under ZeRO-3 transformers has processes wait for each other's longest answer
        self.model.generate = functools.partial(self.model.generate, synced_gpus=False)
        self.processor = load_processor(self.base)
        self._lock = threading.Lock()
        self._in_flight = Counter()
        self._pool = ThreadPoolExecutor(8)

    def start(self, model_id):
        shutil.rmtree(self.adapter_dir, ignore_errors=True)
        self.events.append(("start", model_id))

    def swap(self, role, save):
        if self._in_flight[role]:
            raise RuntimeError(f"{self._in_flight[role]} requests of the {role} are in flight")
        self.swap_seconds[role].append(0.0)
        name = f"{role}-v{len(self.swap_seconds[role])}"
        folder = self.adapter_dir / name
        folder.mkdir(parents=True)
        save(folder)
        self.adapters[role] = ServedAdapter(name, str(folder))
        self.events.append(("swap", role))
        return 0.0

    def submit(self, request: VLLMRequest, url=None):
        assert url is None or url in self.urls
        self.events.append(("submit", request.role, self.adapters[request.role].name))
        self._in_flight[request.role] += 1
        self._load(self.adapters[request.role])
        return self._pool.submit(self._complete, request, self.adapters[request.role].name)

    def _load(self, adapter):
        """On the process that asks, since another may have made the adapter."""
        with self._lock:
            if not isinstance(self.model, PeftModel):
                self.model = PeftModel.from_pretrained(self.model, adapter.folder, adapter_name=adapter.name).eval()
            elif adapter.name not in self.model.peft_config:
                self.model.load_adapter(adapter.folder, adapter_name=adapter.name)

    def _complete(self, request, adapter):
        try:
            with self._lock:
                self.model.set_adapter(adapter)
                prompt = self._encoded(request)
                # As vLLM's, where sample k has the seed and k
                seeds = [None] if request.seed is None else [request.seed + k for k in range(request.samples)]
                pad = self.processor.tokenizer.pad_token_id
                (ids,) = generate(self.model, [prompt], [seeds], request.config)
                return [
                    VLLMCompletion(c, processed_logps(self.model, prompt, c, request.config, pad).tolist())
                    for c in ids
                ]
        finally:
            self._in_flight[request.role] -= 1

    def _encoded(self, request) -> EncodedPrompt:
        image = Image.open(io.BytesIO(base64.b64decode(request.image.partition(",")[2])))
        inputs = self.processor.image_processor(images=[image], return_tensors="pt")
        ids = torch.tensor(list(request.prompt_ids))
        merged = self.processor.image_processor.merge_size**2
        assert (ids == self.image_token_id).sum() == inputs["image_grid_thw"].prod() // merged
        types = {"mm_token_type_ids": (ids == self.image_token_id).long()}
        return EncodedPrompt(ids, types, {name: inputs[name] for name in ("pixel_values", "image_grid_thw")})

    def close(self):
        self.closed = True
        self._pool.shutdown()
