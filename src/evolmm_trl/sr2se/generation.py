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

"""Completions of a vision-language model for many prompts at once, with or without images."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import PartialState
from PIL import Image
from transformers import GenerationConfig

from ..rollout.generation import last_states


@dataclass(frozen=True)
class Completion:
    """
    One completion.

    Args:
        text (`str`):
            Decoded, without special tokens.
        tokens (`int`):
            Tokens generated, the end token included.
        hidden (`torch.Tensor` or `None`):
            Shape `(hidden_size,)`, float32, on the CPU: the state of the last layer, after its norm, from which the
            completion's last token was predicted. That token is the end token unless the completion was cut off.
        cut_off (`bool`):
            Whether it came to `max_new_tokens` without an end token.
    """

    text: str
    tokens: int
    hidden: torch.Tensor | None = None
    cut_off: bool = False


def process_state() -> PartialState:
    """The processes of this run, launched or not, and this one's device; without an accelerator they talk over gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def chat_texts(processor, conversation: list[dict], reply: str) -> tuple[str, str]:
    """
    A conversation and the reply to it as the chat template writes them, to train on: the texts of the prompt that
    [`generate`] would complete, and of the reply with its end token and nothing behind it.
    """
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    answered = [*conversation, {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
    whole = processor.apply_chat_template(answered)
    if not whole.startswith(prompt):
        raise ValueError(
            "The chat template writes a conversation differently once it is answered, so that a prompt in training would "
            "not be the prompt in use. Use a chat template whose prompt is a prefix of the whole conversation."
        )
    return prompt, whole[len(prompt) :].rstrip()


def generate(
    model,
    processor,
    conversations: Sequence[list[dict]],
    images: "Sequence[Image.Image | Sequence[Image.Image]] | None" = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int | None = None,
    batch_size: int = 8,
    with_hidden: bool = False,
) -> list[list[Completion]]:
    """
    Completes every conversation.

    The model's own generation settings are not used, but for its end tokens: sampling is from the whole distribution.
    Image and video placeholders are never sampled, since the next forward could not read them.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Put into eval mode while it generates.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        conversations (`Sequence[list[dict]]`):
            As [`~evolmm_trl.prompts.user_message`] makes them.
        images (`Sequence[PIL.Image.Image]` or `Sequence[Sequence[PIL.Image.Image]]`, *optional*):
            One per conversation, or a list for each, as many as it has places for; without it the conversations have no
            place for an image.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 decodes greedily.
        samples (`int`, *optional*, defaults to `1`):
            Completions per conversation.
        seed (`int`, *optional*):
            Makes sampling a function of the arguments, and leaves the global generators as they were.
        batch_size (`int`, *optional*, defaults to `8`):
            Conversations at a time.
        with_hidden (`bool`, *optional*, defaults to `False`):
            Whether to keep the last hidden states. They cost no further forward.

    Returns:
        `list[list[Completion]]`: `samples` completions per conversation, in order.
    """
    if images is not None and len(images) != len(conversations):
        raise ValueError(
            f"Got {len(conversations)} conversations and {len(images)} images; expected one entry for each."
        )
    if temperature == 0 and samples > 1:
        raise ValueError(
            f"`samples` is {samples} at temperature 0, where all are the same. Pass a `temperature` above 0."
        )
    tokenizer = processor.tokenizer
    ends = model.generation_config.eos_token_id
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])})
    placeholders = [getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video")]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        num_return_sequences=samples,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted({i for i in placeholders if i is not None}) or None,
    )
    was_training = model.training
    model.eval()
    completions = []
    with torch.random.fork_rng() if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(conversations), batch_size):
            rows = slice(start, start + batch_size)
            texts = processor.apply_chat_template(conversations[rows], add_generation_prompt=True)
            inputs = processor(
                text=texts,
                images=None if images is None else [[i] if isinstance(i, Image.Image) else i for i in images[rows]],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            with torch.inference_mode(), last_states(model) if with_hidden else nullcontext([]) as states:
                output = model.generate(**inputs, generation_config=config)
            flat = _read(output[:, inputs["input_ids"].shape[1] :], states, ends, processor)
            completions += [flat[i : i + samples] for i in range(0, len(flat), samples)]
    model.train(was_training)
    return completions


def _read(ids: torch.Tensor, states: list[torch.Tensor], ends: list[int], processor) -> list[Completion]:
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device))
    width = ids.shape[1]
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, width).tolist()
    texts = processor.batch_decode(
        [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)], skip_special_tokens=True
    )
    hidden = [None] * len(lengths)
    if states:
        # The forward that predicts token t is the t-th one, the prefill the first.
        hidden = [states[length - 1][row].float().cpu().clone() for row, length in enumerate(lengths)]
    return [Completion(*parts) for parts in zip(texts, lengths, hidden, (~ended).tolist(), strict=True)]
