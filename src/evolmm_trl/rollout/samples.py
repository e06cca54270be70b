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

"""Samples as they were drawn, and the padded batches made from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import ProcessorMixin


@dataclass(frozen=True)
class EncodedPrompt:
    """
    One prompt with its image, as the model reads it.

    Args:
        input_ids (`torch.Tensor` of shape `(prompt length,)`):
            Token ids, image placeholders included.
        mm_token_type_ids (`torch.Tensor` of shape `(prompt length,)` or `None`):
            1 at image placeholders, for models that take it.
        image_inputs (`dict[str, torch.Tensor]`):
            This image's tensors, such as `pixel_values` (patches, patch size) and `image_grid_thw` (1, 3); those of
            several images are concatenated along the first dimension.
        features (`dict[str, torch.Tensor]`, *optional*):
            What the frozen vision tower makes of the image: `image` (image tokens, hidden size) and, of models that read
            the tower's inner layers too, `deepstack` (layers, image tokens, hidden size).
    """

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor | None
    image_inputs: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor] | None = None

    def without_pixels(self) -> "EncodedPrompt":
        """The same with the features alone, in main memory: what is kept of an image until the proposer's step."""
        if self.features is None:
            return self
        inputs = {name: tensor for name, tensor in self.image_inputs.items() if name != "pixel_values"}
        return replace(self, image_inputs=inputs, features={k: v.cpu() for k, v in self.features.items()})


@dataclass(frozen=True)
class Sample:
    """
    One completion and what it teaches.

    Args:
        prompt ([`EncodedPrompt`]):
            What it completes; shared by the samples of a group.
        completion_ids (`torch.Tensor` of shape `(completion length,)`):
            Token ids as sampled, end token included.
        advantage (`float`):
            Reward minus baseline.
    """

    prompt: EncodedPrompt
    completion_ids: torch.Tensor
    advantage: float


def encode_prompts(
    processor: ProcessorMixin, conversations: Sequence[list[dict]], images: Sequence, **chat_template_kwargs
) -> list[EncodedPrompt]:
    """
    Encodes one conversation about one image per row.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The model's processor.
        conversations (`Sequence[list[dict]]`):
            Messages with a place for one image each.
        images (`Sequence[PIL.Image.Image]`):
            One image per conversation.

    Returns:
        `list[EncodedPrompt]`

    Raises:
        `ValueError`: if the processor lays out images in a way that cannot be taken apart per row.
    """
    texts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chat_template_kwargs)
        for messages in conversations
    ]
    encoded = processor(
        text=texts, images=[[image] for image in images], padding=True, padding_side="left", return_tensors="pt"
    )
    rows = len(texts)
    mask = encoded.pop("attention_mask").bool()
    input_ids = encoded.pop("input_ids")
    token_types = encoded.pop("mm_token_type_ids", None)
    if "image_grid_thw" in encoded:
        patches = encoded["image_grid_thw"].prod(-1).tolist()
        split = {"pixel_values": encoded.pop("pixel_values").split(patches)}
        split["image_grid_thw"] = encoded.pop("image_grid_thw").split(1)
    else:
        split = {}
    for name, tensor in encoded.items():
        if not isinstance(tensor, torch.Tensor) or tensor.size(0) != rows:
            raise ValueError(
                f"{type(processor).__name__} returns {name!r} in a layout this package does not know, for {rows} images: "
                f"{tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__}. Supported are "
                "Qwen2.5-VL, Qwen3-VL, and processors whose tensors have one row per image."
            )
        split[name] = tensor.split(1)
    return [
        EncodedPrompt(
            input_ids=input_ids[row][mask[row]],
            mm_token_type_ids=token_types[row][mask[row]] if token_types is not None else None,
            image_inputs={name: tensors[row].clone() for name, tensors in split.items()},
        )
        for row in range(rows)
    ]


def encode_about(
    processor: ProcessorMixin,
    conversations: Sequence[list[dict]],
    prompts: Sequence[EncodedPrompt],
    images: Sequence,
    **chat_template_kwargs,
) -> list[EncodedPrompt]:
    """
    Encodes another conversation about each image of prompts already encoded, without preprocessing the image again
    where the processor tells its text from its images.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The model's processor.
        conversations (`Sequence[list[dict]]`):
            Messages with a place for one image each.
        prompts (`Sequence[EncodedPrompt]`):
            The other prompts, whose image inputs and features are taken over.
        images (`Sequence[PIL.Image.Image]`):
            Their images.

    Returns:
        `list[EncodedPrompt]`
    """
    if "image_grid_thw" not in prompts[0].image_inputs:
        return encode_prompts(processor, conversations, images, **chat_template_kwargs)
    encoded = []
    for messages, prompt in zip(conversations, prompts, strict=True):
        text = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **chat_template_kwargs
        )
        text, _ = processor.get_text_with_replacements([text], [processor.replace_image_token(prompt.image_inputs, 0)])
        ids = processor.tokenizer(text)["input_ids"]
        types = torch.tensor(processor.create_mm_token_type_ids(ids)[0])
        encoded.append(EncodedPrompt(torch.tensor(ids[0]), types, prompt.image_inputs, prompt.features))
    return encoded


class ProposerCollator:
    """
    Gives every row its `prompt`: the proposer's, with the image preprocessed. For the data loader, in whose workers it
    runs.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The model's processor.
        messages (`list[dict]`):
            The proposer's conversation, with a place for one image.
        **chat_template_kwargs:
            Passed to the chat template.
    """

    def __init__(self, processor: ProcessorMixin, messages: list[dict], **chat_template_kwargs):
        self.processor = processor
        self.messages = messages
        self.chat_template_kwargs = chat_template_kwargs

    def __call__(self, rows: list[dict]) -> list[dict]:
        if not rows:
            return []
        images = [row["image"] for row in rows]
        prompts = encode_prompts(self.processor, [self.messages] * len(rows), images, **self.chat_template_kwargs)
        return [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


def pad_prompts(prompts: Sequence[EncodedPrompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Left-pads the text of prompts.

    Args:
        prompts (`Sequence[EncodedPrompt]`):
            One per row.
        pad_token_id (`int`):
            Padding token.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and, where the model takes it, `mm_token_type_ids`, of
        shape (rows, prompt length).
    """
    width = max(prompt.input_ids.numel() for prompt in prompts)
    batch = {
        "input_ids": torch.stack([_left_pad(prompt.input_ids, width, pad_token_id) for prompt in prompts]),
        "attention_mask": torch.stack([_left_pad(torch.ones_like(prompt.input_ids), width, 0) for prompt in prompts]),
    }
    if prompts[0].mm_token_type_ids is not None:
        batch["mm_token_type_ids"] = torch.stack([_left_pad(prompt.mm_token_type_ids, width, 0) for prompt in prompts])
    return batch


def collate_prompts(prompts: Sequence[EncodedPrompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Left-pads prompts into a batch to generate from.

    Args:
        prompts (`Sequence[EncodedPrompt]`):
            One per row.
        pad_token_id (`int`):
            Padding token.

    Returns:
        `dict[str, torch.Tensor]`: what [`pad_prompts`] returns, and the image tensors.
    """
    batch = pad_prompts(prompts, pad_token_id)
    for name in prompts[0].image_inputs:
        batch[name] = torch.cat([prompt.image_inputs[name] for prompt in prompts])
    return batch


def collate_completions(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Right-pads the completions of samples.

    Args:
        samples (`Sequence[Sample]`):
            One per row.
        pad_token_id (`int`):
            Padding token.

    Returns:
        `dict[str, torch.Tensor]`: `completion_ids` and `completion_mask` (rows, C), and `advantages` (rows,).
    """
    width = max(sample.completion_ids.numel() for sample in samples)
    return {
        "completion_ids": torch.stack([_right_pad(s.completion_ids, width, pad_token_id) for s in samples]),
        "completion_mask": torch.stack([_right_pad(torch.ones_like(s.completion_ids), width, 0) for s in samples]),
        "advantages": torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
    }


def collate_samples(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor | list[int]]:
    """
    Pads samples into the batch that TRL's loss reads, a row per sample.

    Args:
        samples (`Sequence[Sample]`):
            One per row.
        pad_token_id (`int`):
            Padding token.

    Returns:
        `dict`: what [`collate_completions`] returns; `prompt_ids` and `prompt_mask` (rows, P), left-padded;
        `num_images`, one per row; the image tensors; and `mm_token_type_ids` (rows, P + C), 0 over the completions.
    """
    batch = collate_prompts([sample.prompt for sample in samples], pad_token_id)
    batch["prompt_ids"] = batch.pop("input_ids")
    batch["prompt_mask"] = batch.pop("attention_mask")
    batch |= collate_completions(samples, pad_token_id)
    batch["num_images"] = [1] * len(samples)
    if "mm_token_type_ids" in batch:
        width = batch["completion_ids"].size(1)
        batch["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, width))
    return batch


def split_evenly(samples: Sequence, parts: int, group_size: int = 1) -> list[list]:
    """
    Splits samples, in order, into this many parts of about equal size. Groups stay whole, unless there are fewer groups
    than parts.
    """
    if len(samples) < parts * group_size:
        group_size = 1
    groups = len(samples) // group_size
    bounds = [groups * part // parts * group_size for part in range(parts + 1)]
    return [list(samples[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def _left_pad(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (width - row.numel(), 0), value=value)


def _right_pad(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, width - row.numel()), value=value)
