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


# What processors return besides token ids. Of an image: concatenated along the first dimension, it is that of several
_IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask")
# Of each token of a prompt: 0 over a completion, or there what the prompt's last token has
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_TOKEN_MASKS = ("cross_attention_mask",)


@dataclass(frozen=True)
class EncodedPrompt:
    """
    One prompt with its image, as the model reads it.

    Args:
        input_ids (`torch.Tensor` of shape `(prompt length,)`):
            Token ids, image placeholders included.
        token_inputs (`dict[str, torch.Tensor]`):
            What the model takes for each token, of shape (prompt length, ...): `mm_token_type_ids` or `token_type_ids`, 1
            at image placeholders, or `cross_attention_mask` (prompt length, 1, tiles).
        image_inputs (`dict[str, torch.Tensor]`):
            This image's tensors, such as `pixel_values` (patches, patch size) and `image_grid_thw` (1, 3), or
            `pixel_values` (tiles, channels, height, width); those of several images are concatenated along the first
            dimension.
        features (`dict[str, torch.Tensor]`, *optional*):
            What the frozen vision tower makes of the image: `image` (image tokens, hidden size) and, of models that read
            the tower's inner layers too, `deepstack` (layers, image tokens, hidden size).
    """

    input_ids: torch.Tensor
    token_inputs: dict[str, torch.Tensor]
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
        sampling_logps (`torch.Tensor` of shape `(completion length,)`, *optional*):
            Log-probs under which the tokens were drawn, where a server drew them.
    """

    prompt: EncodedPrompt
    completion_ids: torch.Tensor
    advantage: float
    sampling_logps: torch.Tensor | None = None


def encode_prompts(
    processor: ProcessorMixin, conversations: Sequence[list[dict]], images: Sequence | None, **chat_template_kwargs
) -> list[EncodedPrompt]:
    """
    Encodes one conversation per row, about one image or none.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The model's processor.
        conversations (`Sequence[list[dict]]`):
            Messages with a place for one image each, or for none.
        images (`Sequence[PIL.Image.Image]` or `None`):
            One image per conversation; `None` if they are text alone.

    Returns:
        `list[EncodedPrompt]`

    Raises:
        `ValueError`: if the processor returns something that this package does not know how to batch.
    """
    encoded = []
    for messages, image in zip(conversations, images or [None] * len(conversations), strict=True):
        text, options = _as_text(processor, messages, chat_template_kwargs)
        if image is not None:
            options["images"] = [[image]]
        # One by one, since what is returned is then this image's, however many tiles or crops it has
        inputs = processor(text=[text], return_tensors="pt", **options)
        del inputs["attention_mask"]
        input_ids = inputs.pop("input_ids")[0]
        unknown = sorted(set(inputs) - {*_IMAGE_INPUTS, *_TOKEN_TYPES, *_TOKEN_MASKS})
        if unknown:
            raise ValueError(
                f"{type(processor).__name__} returns {unknown}, which this package does not know how to batch. Supported "
                "are Qwen2.5-VL, Qwen3-VL, InternVL3, Gemma 3 and Llama 3.2 Vision, and processors that return "
                f"{', '.join(_IMAGE_INPUTS)}, {', '.join(_TOKEN_TYPES)} or {', '.join(_TOKEN_MASKS)} alone."
            )
        image_inputs = {name: inputs[name] for name in _IMAGE_INPUTS if name in inputs}
        token_inputs = {name: tensor[0] for name, tensor in inputs.items() if name not in image_inputs}
        encoded.append(EncodedPrompt(input_ids, token_inputs, image_inputs))
    return encoded


def _as_text(processor: ProcessorMixin, messages: list[dict], chat_template_kwargs: dict) -> tuple[str, dict]:
    """A conversation as text, and how to tokenize it."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chat_template_kwargs)
    # Gemma's and Llama's templates write the token at the beginning, and their tokenizers would add it again
    bos_token = processor.tokenizer.bos_token
    return text, {"add_special_tokens": False} if bos_token and text.startswith(bos_token) else {}


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
        text, options = _as_text(processor, messages, chat_template_kwargs)
        text, _ = processor.get_text_with_replacements([text], [processor.replace_image_token(prompt.image_inputs, 0)])
        ids = processor.tokenizer(text, **options)["input_ids"]
        types = {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids(ids)[0])}
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
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and the prompts' `token_inputs`, of shape (rows, prompt
        length, ...).
    """
    width = max(prompt.input_ids.numel() for prompt in prompts)
    batch = {
        "input_ids": torch.stack([_left_pad(prompt.input_ids, width, pad_token_id) for prompt in prompts]),
        "attention_mask": torch.stack([_left_pad(torch.ones_like(prompt.input_ids), width, 0) for prompt in prompts]),
    }
    for name in prompts[0].token_inputs:
        batch[name] = torch.stack([_left_pad(prompt.token_inputs[name], width, 0) for prompt in prompts])
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
        `dict[str, torch.Tensor]`: `completion_ids` and `completion_mask` (rows, C), and `advantages` (rows,); of samples from
        a server also `sampling_per_token_logps` (rows, C).
    """
    width = max(sample.completion_ids.numel() for sample in samples)
    drawn = {}
    if any(sample.sampling_logps is not None for sample in samples):
        # Questions that waited in a checkpoint may be from before there was a server
        unknown = [s.completion_ids.new_full(s.completion_ids.shape, torch.nan, dtype=torch.float32) for s in samples]
        logps = [u if s.sampling_logps is None else s.sampling_logps for s, u in zip(samples, unknown, strict=True)]
        drawn["sampling_per_token_logps"] = torch.stack([_right_pad(row, width, 0) for row in logps])
    return {
        **drawn,
        "completion_ids": torch.stack([_right_pad(s.completion_ids, width, pad_token_id) for s in samples]),
        "completion_mask": torch.stack([_right_pad(torch.ones_like(s.completion_ids), width, 0) for s in samples]),
        "advantages": torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
    }


def collate_samples(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    """
    Pads samples into the batch that TRL's loss reads, a row per sample.

    Args:
        samples (`Sequence[Sample]`):
            One per row.
        pad_token_id (`int`):
            Padding token.

    Returns:
        `dict`: what [`collate_completions`] returns; `prompt_ids` and `prompt_mask` (rows, P), left-padded; and
        `model_inputs`, the model's other arguments: the image tensors and, of shape (rows, P + C, ...), the
        `token_inputs`.
    """
    inputs = collate_prompts([sample.prompt for sample in samples], pad_token_id)
    batch = {"prompt_ids": inputs.pop("input_ids"), "prompt_mask": inputs.pop("attention_mask")}
    batch |= collate_completions(samples, pad_token_id)
    width = batch["completion_ids"].size(1)
    for name in samples[0].prompt.token_inputs:
        rows, _, *sizes = inputs[name].shape
        last = inputs[name][:, -1:] if name in _TOKEN_MASKS else inputs[name].new_zeros(rows, 1, *sizes)
        inputs[name] = torch.cat([inputs[name], last.expand(-1, width, *sizes)], dim=1)
    return {**batch, "model_inputs": inputs}


def continued(prompt: EncodedPrompt, ids: Sequence[int]) -> EncodedPrompt:
    """A prompt with tokens of a completion behind it."""
    token_inputs = {}
    for name, tensor in prompt.token_inputs.items():
        last = tensor[-1:] if name in _TOKEN_MASKS else tensor.new_zeros(1, *tensor.shape[1:])
        token_inputs[name] = torch.cat([tensor, last.expand(len(ids), *tensor.shape[1:])])
    input_ids = torch.cat([prompt.input_ids, torch.tensor(ids, dtype=prompt.input_ids.dtype)])
    return replace(prompt, input_ids=input_ids, token_inputs=token_inputs)


def split_evenly(samples: Sequence, parts: int, group_size: int = 1) -> list[list]:
    """
    Splits samples, in order, into this many parts of about equal size. Groups stay whole: where there are fewer of them
    than parts, some parts are empty.
    """
    groups = len(samples) // group_size
    bounds = [groups * part // parts * group_size for part in range(parts + 1)]
    return [list(samples[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def _left_pad(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.cat([row.new_full((width - len(row), *row.shape[1:]), value), row])


def _right_pad(row: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, width - row.numel()), value=value)
