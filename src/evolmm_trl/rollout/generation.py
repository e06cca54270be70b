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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer

from ..shared_prefix import heads_per_key_head, image_arguments, prompt_positions
from .samples import EncodedPrompt, collate_prompts, continued, pad_prompts


# What `generate_shared` reads of a generation config. The others that a config may name change nothing here
_SHARED_SETTINGS = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "suppress_tokens",
    "eos_token_id",
}
_WITHOUT_EFFECT = {"do_sample", "pad_token_id", "bos_token_id", "disable_compile", "transformers_version", "use_cache"}


def sample_seed(*key: str | int) -> int:
    """A 63-bit seed that depends on the key alone (image, step, role, sample), not on the process or the batch."""
    digest = hashlib.blake2b("\0".join(str(part) for part in key).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


class SeededSampling(LogitsProcessor):
    """
    Turns greedy decoding into sampling with one random stream per row: every row draws one uniform number per token and
    takes the token at which its cumulative probability passes it.

    Args:
        seeds (`Sequence[int or None]`):
            One seed per row; a row with `None` decodes greedily.
        max_new_tokens (`int`):
            Tokens to draw numbers for.
    """

    def __init__(self, seeds: Sequence[int | None], max_new_tokens: int):
        # Shape (rows, max_new_tokens), drawn on the CPU so that all devices sample alike
        self.uniforms = torch.stack(
            [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed or 0)) for seed in seeds]
        )
        self.greedy = torch.tensor([seed is None for seed in seeds])
        self.position = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # scores: (rows, vocabulary)
        tokens = self.draw(scores, slice(None), self.position)
        self.position += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def draw(self, scores: torch.FloatTensor, rows: Sequence[int] | slice, position: int) -> torch.LongTensor:
        """The tokens of these rows at this position, of shape (rows,), for their scores (rows, vocabulary)."""
        probabilities = scores.float().softmax(-1)
        # A parallel cumulative sum may rise where nothing is added (https://github.com/pytorch/pytorch/issues/21780):
        # tokens of probability 0 are kept out by their probability, not by their sum
        cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0)
        # The numbers drawn are at most 1 - 2**-24, which rounds below the total: some token is always above the threshold
        thresholds = self.uniforms[rows, position, None].to(scores.device) * cumulative.amax(-1, keepdim=True)
        tokens = (cumulative > thresholds).int().argmax(-1)  # the first one
        return torch.where(self.greedy[rows].to(scores.device), scores.argmax(-1), tokens)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    seeds: Sequence[Sequence[int | None]],
    config: GenerationConfig,
) -> list[list[list[int]]]:
    """
    Generates one completion per seed of each prompt by transformers' `generate`, a row per completion.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped model in eval mode, with the role's adapter active.
        prompts (`Sequence[EncodedPrompt]`):
            Prompts.
        seeds (`Sequence[Sequence[int or None]]`):
            Per prompt, one seed per completion; `None` decodes greedily.
        config ([`~transformers.GenerationConfig`]):
            Length, temperature, top-p, top-k, min-p, repetition penalty, end and padding tokens and suppressed tokens.

    Returns:
        `list[list[list[int]]]`: per prompt and completion the token ids as generated, up to and with the first end token.
    """
    rows = [prompt for prompt, group in zip(prompts, seeds, strict=True) for _ in group]
    batch = collate_prompts(rows, config.pad_token_id)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    # What only sampling reads is applied below, before the draw
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    processors = _warpers(config)
    processors.append(SeededSampling([seed for group in seeds for seed in group], config.max_new_tokens))
    with torch.no_grad():
        output = model.generate(
            **batch,
            generation_config=GenerationConfig.from_dict({**config.to_dict(), **greedy}),
            logits_processor=processors,
        )
    ids = iter(output[:, batch["input_ids"].size(1) :].tolist())
    return [[_until_end(next(ids), _end_tokens(config)) for _ in group] for group in seeds]


def why_not_generated_shared(config: GenerationConfig) -> str | None:
    """Why [`generate_shared`] cannot follow a generation config, or `None` if it can."""
    unknown = set(config.to_diff_dict()) - _SHARED_SETTINGS - _WITHOUT_EFFECT
    return (
        f"the generation settings {sorted(unknown)} are followed by transformers' `generate` alone"
        if unknown
        else None
    )


@torch.no_grad()
def generate_shared(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    seeds: Sequence[Sequence[int | None]],
    config: GenerationConfig,
) -> list[list[list[int]]]:
    """
    The same as [`generate`], with every prompt encoded once: a row per prompt, whose samples append their keys to those
    of the prompt and see, of the answers, only their own. A sample that has ended is no longer computed.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped model in eval mode, with the role's adapter active and [`install_shared_attention`].
        prompts (`Sequence[EncodedPrompt]`), seeds (`Sequence[Sequence[int or None]]`), config ([`~transformers.GenerationConfig`]):
            As in [`generate`].

    Returns:
        `list[list[list[int]]]`
    """
    device = model.device
    end_tokens = _end_tokens(config)
    sampler = SeededSampling([seed for group in seeds for seed in group], config.max_new_tokens)
    processors = LogitsProcessorList()
    if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=str(device)))
    processors += _warpers(config)

    batch = pad_prompts(prompts, config.pad_token_id)
    width = batch["input_ids"].size(1)
    positions = [prompt_positions(model, prompt) for prompt in prompts]
    padded = [torch.nn.functional.pad(p, (width - p.size(1), 0)) for p in positions]
    output = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        position_ids=torch.stack(padded, dim=1).to(device),
        past_key_values=Cache(layer_class_to_replicate=_RoomyLayer),
        use_cache=True,
        logits_to_keep=1,
        **image_arguments(prompts, device),
    )
    cache = output.past_key_values
    # Whose key a position of the cache is: -1 the prompt's, a sample's number, -2 nobody's
    owner = (batch["attention_mask"] - 2).to(device)
    next_position = torch.stack([p[0, -1] + 1 for p in positions]).to(device)
    samples = iter(range(sum(map(len, seeds))))
    live = [[next(samples) for _ in group] for group in seeds]  # per row of the cache, the samples that go on
    completions: list[list[int]] = [[] for group in seeds for _ in group]
    # A view of the last logits per live sample
    scores = output.logits[:, -1].repeat_interleave(torch.tensor([len(group) for group in live], device=device), dim=0)
    prompt_of = [i for i, group in enumerate(seeds) for _ in group]
    repeats = heads_per_key_head(model)

    for step in range(config.max_new_tokens):
        rows = [sample for group in live for sample in group]
        history = None
        if any(isinstance(processor, RepetitionPenaltyLogitsProcessor) for processor in processors):
            drawn = torch.tensor([completions[row] for row in rows], dtype=torch.long)
            history = torch.cat([batch["input_ids"][[prompt_of[row] for row in rows]], drawn], dim=1).to(device)
        tokens = sampler.draw(processors(history, scores.float()), rows, step)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            completions[row].append(token)
        live = [[row for row in group if completions[row][-1] not in end_tokens] for group in live]
        kept = [i for i, group in enumerate(live) if group]
        if not kept or step + 1 == config.max_new_tokens:
            break
        if len(kept) < len(live):
            indices = torch.tensor(kept, device=device)
            cache.batch_select_indices(indices)
            owner, next_position, live = owner[indices], next_position[indices], [live[i] for i in kept]
        # One slot per live sample, as many in each row as in the fullest; an empty slot sees the prompt and is not read
        slots = max(map(len, live))
        slot_owner = torch.tensor([[*group, *[-3] * (slots - len(group))] for group in live])
        last = [
            [*[completions[row][-1] for row in group], *[config.pad_token_id] * (slots - len(group))] for group in live
        ]
        read = (slot_owner >= 0).to(device)
        slot_owner = slot_owner.to(device)
        owner = torch.cat([owner, slot_owner], dim=1)
        mask = (owner[:, None] == -1) | (owner[:, None] == slot_owner[:, :, None])
        output = model(
            input_ids=torch.tensor(last, device=device),
            attention_mask=mask.repeat(1, repeats, 1)[:, None],
            position_ids=(next_position + step)[None, :, None].expand(3, -1, slots),
            past_key_values=cache,
            use_cache=True,
            folded=True,
        )
        scores = output.logits[read]
    ids = iter(completions)
    return [[next(ids) for _ in group] for group in seeds]


@contextmanager
def last_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """
    Collects what the LM head is given at the newest position, once per forward: the last layer's states after its norm,
    of shape (rows, hidden size).
    """
    states = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: states.append(args[0][:, -1].detach()))
    try:
        yield states
    finally:
        hook.remove()


@torch.no_grad()
def end_states(
    model: PreTrainedModel, prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[int]], pad_token_id: int
) -> torch.Tensor:
    """
    The states from which the last tokens of completions were predicted, what a gate reads.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Unwrapped model in eval mode, with the role's adapter active.
        prompts (`Sequence[EncodedPrompt]`), completions (`Sequence[Sequence[int]]`):
            Prompts with their pixels, and the token ids of one completion of each.
        pad_token_id (`int`):
            Padding token.

    Returns:
        `torch.Tensor`: shape (rows, hidden size), float32, on the CPU.
    """
    rows = [continued(prompt, ids[:-1]) for prompt, ids in zip(prompts, completions, strict=True)]
    batch = {name: tensor.to(model.device) for name, tensor in collate_prompts(rows, pad_token_id).items()}
    with last_states(model) as states:
        model(**batch, use_cache=False, logits_to_keep=1)
    return states[0].float().cpu()


class _RoomyLayer(DynamicLayer):
    """
    Keys and values of a layer with room for more. The parent copies all of them for every further token.

    Keys and values (batch, key heads, positions, head size).
    """

    _keys = _values = None  # with the room; `keys` and `values` are their first positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            super().update(key_states, value_states)
            return self.keys, self.values
        start = self.keys.size(-2)
        end = start + key_states.size(-2)
        if self._keys is None or self._keys.size(-2) < end:
            self._keys, self._values = self._with_room(self.keys, end), self._with_room(self.values, end)
        self._keys[..., start:end, :] = key_states
        self._values[..., start:end, :] = value_states
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self.keys, self.values

    @staticmethod
    def _with_room(states: torch.Tensor, end: int) -> torch.Tensor:
        *sizes, positions, head_size = states.shape
        room = states.new_empty(*sizes, end + end // 4, head_size)
        room[..., :positions, :] = states
        return room

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._keys = self._values = None


def _warpers(config: GenerationConfig) -> LogitsProcessorList:
    """What shapes the distribution that is sampled from."""
    warpers = LogitsProcessorList()
    if config.temperature is not None and config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers


def _end_tokens(config: GenerationConfig) -> set[int]:
    return set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])


def _until_end(tokens: list[int], end_tokens: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens
