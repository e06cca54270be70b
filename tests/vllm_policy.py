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

"""The trainer's side of a comparison with a vLLM server: two adapters on the base model, and their log-probs."""

import json

import numpy as np
import torch
from demo import load_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from evolmm_trl.prompts import RolePrompts
from evolmm_trl.role_adapters import ADAPTER_OF, RoleAdapters
from evolmm_trl.rollout.samples import Sample, collate_samples, encode_prompts
from evolmm_trl.rollout.served import random_adapter
from evolmm_trl.rollout.vllm_server import VLLMRequest, VLLMServers, image_url, seen_image
from evolmm_trl.schedule import PROPOSER, ROLES, SOLVER


# What a server's log-probs may differ from transformers' and PEFT's by, in float32
TOLERANCE = 1e-4


class Policy:
    """The trainer's side: the base model with both roles' adapters, of random weights, and prompts about some images."""

    def __init__(self, folder: str, rank: int = 8, dtype: torch.dtype = torch.float32):
        base, self.processor = load_model(folder)
        base = base.to(dtype)  # the adapters stay in float32
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=r".*visual.*")
        self.model = get_peft_model(base, lora)
        self.model.add_adapter(ADAPTER_OF[PROPOSER], lora)
        self.model.eval()
        self.roles = RoleAdapters(self.model)
        self.image_token_id = base.config.image_token_id
        tokenizer = self.processor.tokenizer
        placeholders = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        self.suppressed = sorted(tokenizer.convert_tokens_to_ids(placeholders))
        self.ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        rng = np.random.default_rng(0)
        # The second and the third are resized by the processor
        sizes = ((84, 84), (60, 100), (91, 90), (84, 56))
        self.images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        prompts = RolePrompts.from_dict(json.load(open("examples/demo/prompts.json")))
        messages = {PROPOSER: prompts.proposer_messages(), SOLVER: prompts.solver_messages("Which is tallest?")}
        self.prompts = {role: encode_prompts(self.processor, [messages[role]] * 4, self.images) for role in ROLES}
        for seed, role in enumerate(ROLES):
            self.move(role, seed)

    def move(self, role: str, seed: int) -> None:
        """What a step does to an adapter, and more."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if f".{ADAPTER_OF[role]}." in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)

    def randomise(self, role: str, size: float) -> None:
        """The random weights by which the trainer compares log-probs at the start."""
        marker = f".{ADAPTER_OF[role]}."
        held = {name.replace(marker, "."): p for name, p in self.model.named_parameters() if marker in name}
        for name, tensor in random_adapter(held, size, ROLES.index(role)).items():
            held[name].data = tensor

    def save(self, role: str):
        def write(folder):
            self.model.save_pretrained(folder, selected_adapters=[ADAPTER_OF[role]])
            if role == PROPOSER:  # which PEFT puts into a folder of its own
                for file in (folder / "proposer").iterdir():
                    file.rename(folder / file.name)

        return write

    def config(self, **settings) -> GenerationConfig:
        defaults = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "do_sample": True}
        defaults |= {"eos_token_id": self.ends, "suppress_tokens": self.suppressed}
        return GenerationConfig(**{**defaults, "pad_token_id": self.ends[-1], **settings})

    def request(self, role: str, i: int, samples: int = 5, seed: int | None = 11, **settings) -> VLLMRequest:
        prompt = self.prompts[role][i]
        url = image_url(seen_image(prompt.image_inputs, self.processor.image_processor))
        return VLLMRequest(role, prompt.input_ids.tolist(), url, samples, seed, self.config(**settings))

    def requests(self, **settings) -> list[VLLMRequest]:
        """Both roles about all images."""
        return [self.request(role, i, **settings) for role in ROLES for i in range(len(self.images))]

    @torch.no_grad()
    def logps(
        self,
        role: str,
        i: int,
        ids: list[int],
        temperature: float = 1.0,
        suppressed=None,
        repetition_penalty: float = 1.0,
        adapter: str | None = "own",
    ) -> torch.Tensor:
        """
        The log-probs of a completion of the role's prompt about an image, of shape (completion length,); by the role's adapter,
        another role's or none.
        """
        prompt = self.prompts[role][i]
        batch = collate_samples([Sample(prompt, torch.tensor(ids), 0.0)], self.ends[-1])
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        with self.roles.using(role if adapter == "own" else adapter):
            logits = self.model(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **batch["model_inputs"]
            ).logits
        logits = logits[0, len(prompt.input_ids) - 1 : -1].float()
        penalty = RepetitionPenaltyLogitsProcessor(repetition_penalty)
        before = [input_ids[:, : len(prompt.input_ids) + k] for k in range(len(ids))]
        logits = torch.cat([penalty(seen, row[None]) for seen, row in zip(before, logits, strict=True)])
        logits[:, self.suppressed if suppressed is None else suppressed] = -torch.inf
        return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    def difference(self, role: str, i: int, completions, **settings) -> float:
        """The largest difference between a server's log-probs and the policy's."""
        return max(
            (self.logps(role, i, completion.ids, **settings) - torch.tensor(completion.logps)).abs().max().item()
            for completion in completions
        )

    def largest_difference(self, servers: VLLMServers, **settings) -> float:
        """The same over both roles and all images."""
        answers = iter(servers.generate(self.requests(**settings)))
        return max(self.difference(role, i, next(answers)) for role in ROLES for i in range(len(self.images)))
