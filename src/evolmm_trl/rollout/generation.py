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

"""Sampling with transformers, each sample from a random stream of its own."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def sample_seed(*key: str | int) -> int:
    """A 63-bit seed that depends on the key alone (image, step, role, sample), not on the process or the batch."""
    digest = hashlib.blake2b("\0".join(str(part) for part in key).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


class SeededSampling(LogitsProcessor):
    """
    Turns greedy decoding into sampling with one random stream per row: every row draws one uniform number per token and
    takes the token at which its cumulative probability passes it.

    Args:
        seeds (`Sequence[int]`):
            One seed per row.
        max_new_tokens (`int`):
            Tokens to draw numbers for.
    """

    def __init__(self, seeds: Sequence[int], max_new_tokens: int):
        # Shape (rows, max_new_tokens), drawn on the CPU so that all devices sample alike
        self.uniforms = torch.stack(
            [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        self.position = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # scores: (rows, vocabulary)
        probabilities = scores.float().softmax(-1)
        # A parallel cumulative sum may rise where nothing is added (https://github.com/pytorch/pytorch/issues/21780):
        # tokens of probability 0 are kept out by their probability, not by their sum
        cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0)
        # The numbers drawn are at most 1 - 2**-24, which rounds below the total: some token is always above the threshold
        thresholds = self.uniforms[:, self.position, None].to(scores.device) * cumulative.amax(-1, keepdim=True)
        self.position += 1
        tokens = (cumulative > thresholds).int().argmax(-1, keepdim=True)  # the first one
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def generate(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    generation_config: GenerationConfig,
    seeds: Sequence[int] | None,
) -> list[list[int]]:
    """
    Generates one completion per row.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped model in eval mode, with the role's adapter active.
        inputs (`dict[str, torch.Tensor]`):
            Left-padded prompts, `input_ids` and `attention_mask` of shape (rows, prompt length), and the model's image
            inputs.
        generation_config ([`~transformers.GenerationConfig`]):
            Length, temperature, top-p, top-k, min-p, repetition penalty, end tokens and suppressed tokens.
        seeds (`Sequence[int]` or `None`):
            One seed per row; `None` decodes greedily.

    Returns:
        `list[list[int]]`: per row the token ids as generated, up to and with the first end token.
    """
    # What only sampling reads is applied below, before the draw
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    config = GenerationConfig.from_dict({**generation_config.to_dict(), **greedy})
    processors = LogitsProcessorList()
    if seeds is not None:
        if generation_config.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(generation_config.temperature))
        if generation_config.top_k:
            processors.append(TopKLogitsWarper(generation_config.top_k))
        if generation_config.top_p is not None and generation_config.top_p < 1.0:
            processors.append(TopPLogitsWarper(generation_config.top_p))
        if generation_config.min_p is not None:
            processors.append(MinPLogitsWarper(generation_config.min_p))
        processors.append(SeededSampling(seeds, config.max_new_tokens))
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    end_tokens = set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    return [_until_end(row, end_tokens) for row in output[:, inputs["input_ids"].size(1) :].tolist()]


def _until_end(tokens: list[int], end_tokens: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens
