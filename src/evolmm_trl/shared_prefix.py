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
One row per group: the prompt once, its answers after it.

N answers to one prompt share their prompt, and in a decoder nothing that follows a prompt changes what is computed for it. So a
group is laid out as `prompt[:-1]`, then `prompt[-1] + completion[:-1]` for every answer. An answer attends to the prompt
and to itself, and its positions continue from the prompt's. The last prompt token is repeated because every answer
needs a first prediction of its own. Log-probs and gradients are those of the plain forward over N padded rows.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .rollout.samples import EncodedPrompt, Sample


FAMILIES = ("qwen2_5_vl", "qwen3_vl")

_PREFIX = "shared_prefix_"  # of the names under which the attention functions are registered


@dataclass(frozen=True)
class PrefixGroup:
    """
    Where a group lies in a packed row, and who sees whom among its answers.

    Args:
        start (`int`), prefix_end (`int`), end (`int`):
            The prompt's positions are `start` to `prefix_end - 1`, the answers' `prefix_end` to `end - 1`.
        mask (`torch.Tensor` of shape `(heads per key head * answer positions, group positions)`):
            Whether an answer's position attends to a position of the group; the same rows for each query head.
    """

    start: int
    prefix_end: int
    end: int
    mask: torch.Tensor


@dataclass(frozen=True)
class PackedGroups:
    """
    Groups in one row of length L.

    Args:
        input_ids (`torch.Tensor` of shape `(1, L)`):
            Token ids.
        position_ids (`torch.Tensor` of shape `(3, 1, L)`):
            M-RoPE positions.
        read (`torch.Tensor` of shape `(R,)`):
            The positions that predict a completion's token, the only ones that the LM head reads.
        labels (`torch.Tensor` of shape `(1, R)`):
            The tokens they predict.
        columns (`torch.Tensor` of shape `(rows, C)`):
            Which of `read` predicts each completion token; 0 at padding and in rows left out.
        counted (`torch.Tensor` of shape `(rows, C)`):
            Which of `columns` are meant.
        groups (`list[PrefixGroup]`):
            The layout.
        images (`dict[str, Any]`):
            The model's arguments for the groups' images.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    read: torch.Tensor
    labels: torch.Tensor
    columns: torch.Tensor
    counted: torch.Tensor
    groups: list[PrefixGroup]
    images: dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------
# The model


def why_not_shared(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Why a model's groups cannot share their prompt, or `None` if they can.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Vision-language model.

    Returns:
        `str` or `None`
    """
    config = base_model(model).config
    if config.model_type not in FAMILIES:
        return f"it is verified for {' and '.join(FAMILIES)}, and this model is a {config.model_type}"
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        return f"its layers are {sorted(layer_types)}, not full attention alone"
    return None


def install_shared_attention(model: PreTrainedModel | PeftModel) -> None:
    """
    Lets the language model's attention read packed groups. Without them it does as before, in the implementation that
    the model was loaded with.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model of which [`why_not_shared`] says `None`.
    """
    config = base_model(model).model.language_model.config
    original = config._attn_implementation
    if original.startswith(_PREFIX):
        return
    name = f"{_PREFIX}{original}"
    AttentionInterface.register(name, partial(_attention, original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    config._attn_implementation = name
    base_model(model).model.register_forward_hook(_read_positions, with_kwargs=True)


def _read_positions(backbone: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Leaves of a packed row what the LM head is to read. Without Triton, TRL's projects every position it is given."""
    if kwargs.get("read") is not None:
        output.last_hidden_state = output.last_hidden_state[:, kwargs["read"]]
    return output


def _attention(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix_groups: list[PrefixGroup] | None = None,
    folded: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention over packed groups (`prefix_groups`), or with a mask for folded heads (`folded`), or the original.

    Query (batch, heads, positions, head size), key and value (batch, key heads, positions, head size); the result is
    (batch, positions, heads, head size).
    """
    if folded:
        return _folded(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None
    if prefix_groups is None:
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_attention(module))
        return attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    options = {"dropout_p": dropout, "scale": scaling, "is_causal": True, "enable_gqa": True}
    parts = []
    for group in prefix_groups:
        prefix = slice(group.start, group.prefix_end)
        if group.prefix_end > group.start:
            parts.append(
                scaled_dot_product_attention(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], **options)
            )
        whole = slice(group.start, group.end)
        answers = query[:, :, group.prefix_end : group.end]
        parts.append(_folded(answers, key[:, :, whole], value[:, :, whole], group.mask, dropout, scaling))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _folded(query, key, value, mask, dropout, scaling) -> torch.Tensor:
    """Attention with a mask, in which the query heads of a key head become positions: no key is copied."""
    batch, heads, positions, size = query.shape
    query = query.reshape(batch, key.size(1), -1, size)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, heads, positions, size)


def _eager_attention(module: torch.nn.Module) -> Callable:
    return sys.modules[type(module).__module__].eager_attention_forward


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def heads_per_key_head(model: PreTrainedModel | PeftModel) -> int:
    """How many query heads share a key head."""
    config = base_model(model).config.get_text_config()
    return config.num_attention_heads // config.num_key_value_heads


def prompt_positions(model: PreTrainedModel | PeftModel, prompt: EncodedPrompt) -> torch.Tensor:
    """
    M-RoPE positions of a prompt.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, whose own rule is used.
        prompt ([`EncodedPrompt`]):
            Prompt with one image, or none.

    Returns:
        `torch.Tensor` of shape `(3, prompt length)`
    """
    grid = prompt.image_inputs.get("image_grid_thw")
    positions, _ = base_model(model).model.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=prompt.token_inputs["mm_token_type_ids"][None],
        image_grid_thw=None if grid is None else grid.cpu(),
    )
    return positions[:, 0]


# --------------------------------------------------------------------------------------------------------------------
# The frozen vision tower, once per image


@torch.no_grad()
def with_features(model: PreTrainedModel | PeftModel, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """
    One pass through the vision tower for all images.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model with a frozen vision tower.
        prompts (`Sequence[EncodedPrompt]`):
            Prompts with pixels, one image each.

    Returns:
        `list[EncodedPrompt]`: the same prompts with features, on the model's device.
    """
    base = base_model(model)
    images = {
        name: torch.cat([prompt.image_inputs[name] for prompt in prompts]).to(base.device)
        for name in ("pixel_values", "image_grid_thw")
    }
    output = base.get_image_features(**images)
    deepstack = getattr(output, "deepstack_features", None)
    seen = []
    for i, prompt in enumerate(prompts):
        features = {"image": output.pooler_output[i]}
        if deepstack is not None:
            features["deepstack"] = torch.stack([layer[i] for layer in deepstack])
        seen.append(replace(prompt, features=features))
    return seen


def image_arguments(prompts: Sequence[EncodedPrompt], device: torch.device) -> dict[str, Any]:
    """
    The model's arguments for the images of prompts: the vision tower's output, or the pixels.

    Args:
        prompts (`Sequence[EncodedPrompt]`):
            One per image, in the order of the rows.
        device (`torch.device`):
            The model's device.

    Returns:
        `dict[str, Any]`
    """
    if prompts[0].features is None:
        names = prompts[0].image_inputs
        return {name: torch.cat([prompt.image_inputs[name] for prompt in prompts]).to(device) for name in names}
    features = [{name: tensor.to(device) for name, tensor in prompt.features.items()} for prompt in prompts]
    output = SimpleNamespace(pooler_output=tuple(image["image"] for image in features))
    if "deepstack" in features[0]:
        layers = zip(*(image["deepstack"] for image in features), strict=True)
        output.deepstack_features = [tuple(layer) for layer in layers]
    return {"mm_encoder_outputs": {"image": output}}


# --------------------------------------------------------------------------------------------------------------------
# Packing


def pack_groups(model: PreTrainedModel | PeftModel, samples: Sequence[Sample], counts: Sequence[bool]) -> PackedGroups:
    """
    Packs samples into one row, consecutive samples of the same prompt as one group.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that is to read them.
        samples (`Sequence[Sample]`):
            Samples; those of a group one after the other.
        counts (`Sequence[bool]`):
            Which samples are scored; the others are left out, and read as zeros.

    Returns:
        [`PackedGroups`], on the model's device.
    """
    members: list[list[int]] = []  # of each group, the samples' numbers
    for i, sample in enumerate(samples):
        if not counts[i]:
            continue
        if members and samples[members[-1][0]].prompt is sample.prompt:
            members[-1].append(i)
        else:
            members.append([i])
    if not members:
        members = [[0]]  # every process must run a forward, and a backward through it

    device = base_model(model).device
    ids, positions, read, labels, groups = [], [], [], [], []
    width = max(sample.completion_ids.numel() for sample in samples)
    columns = torch.zeros(len(samples), width, dtype=torch.long)
    counted = torch.zeros(len(samples), width, dtype=torch.bool)
    repeats = heads_per_key_head(model)
    length = scored = 0
    for group in members:
        prompt = samples[group[0]].prompt
        prompt_ids = prompt.input_ids
        prefix = prompt_positions(model, prompt)
        start, prefix_end = length, length + prompt_ids.numel() - 1
        ids.append(prompt_ids[:-1])
        positions.append(prefix[:, :-1])
        length = prefix_end
        owners = [torch.full((prefix_end - start,), -1)]
        for i in group:
            completion = samples[i].completion_ids
            size = completion.numel()
            ids.append(torch.cat([prompt_ids[-1:], completion[:-1]]))
            positions.append(prefix[:, -1:] + torch.arange(size))
            read.append(torch.arange(length, length + size))
            labels.append(completion)
            owners.append(torch.full((size,), i))
            columns[i, :size] = torch.arange(scored, scored + size)
            counted[i, :size] = counts[i]
            length += size
            scored += size
        owner = torch.cat(owners)
        answers = owner[prefix_end - start :, None]
        place = torch.arange(length - start)
        own = (owner == answers) & (place <= place[prefix_end - start :, None])
        mask = ((owner == -1) | own).repeat(repeats, 1)
        groups.append(PrefixGroup(start, prefix_end, length, mask.to(device)))
    return PackedGroups(
        input_ids=torch.cat(ids)[None].to(device),
        position_ids=torch.cat(positions, dim=1)[:, None].to(device),
        read=torch.cat(read).to(device),
        labels=torch.cat(labels)[None].to(device),
        columns=columns.to(device),
        counted=counted.to(device),
        groups=groups,
        images=image_arguments([samples[group[0]].prompt for group in members], device),
    )


def packed_logps(
    model: torch.nn.Module, packed: PackedGroups, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Log-probs of the completions, by TRL's fused LM head.

    Args:
        model (`torch.nn.Module`):
            Model with [`install_shared_attention`] and TRL's fused LM head, wrapped or not.
        packed ([`PackedGroups`]):
            Groups, on the model's device.
        entropy (`bool`, *optional*, defaults to `False`):
            Whether entropies are asked for.

    Returns:
        `tuple[torch.Tensor, torch.Tensor or None]`: log-probs and entropies, of shape (rows, C), 0 where nothing counts.
    """
    outputs = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        shift_labels=packed.labels,
        fused_lm_head=True,
        prefix_groups=packed.groups,
        read=packed.read,
        **packed.images,
    )

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values[0][packed.columns].masked_fill(~packed.counted, 0.0)

    return rows(outputs.log_probs), rows(outputs.entropy) if entropy else None
