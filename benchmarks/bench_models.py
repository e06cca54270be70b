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

"""Randomly initialised Qwen2.5-VL models of several sizes, and what they need: a processor, images, LoRA."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, Image
from peft import LoraConfig
from PIL import Image as PILImage
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from evolmm_trl.processing import processor_class


@dataclass(frozen=True)
class Size:
    """
    Sizes of a Qwen2.5-VL.

    Args:
        hidden (`int`), layers (`int`), heads (`int`), kv_heads (`int`), intermediate (`int`), vocab (`int`):
            Language model.
        vision_hidden (`int`), vision_layers (`int`), vision_heads (`int`), vision_intermediate (`int`):
            Vision tower.
        tied (`bool`, *optional*, defaults to `True`):
            Whether the LM head is the embedding.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    tied: bool = True


# 3b and 7b are the configurations of Qwen2.5-VL-3B-Instruct and -7B-Instruct. Thin, small and medium keep the proportions
# of 3b: `proportions` gives 0.91 to 0.93 for the vision tower and 0.11 for the LM head. On a CPU they differ in what bounds
# their decoding: small and medium compute, thin mostly waits, as larger models do on a GPU. Tiny is for tests.
SIZES = {
    "tiny": Size(32, 2, 2, 1, 64, 300, 16, 2, 2, 32),
    "small": Size(192, 4, 3, 1, 768, 1260, 80, 4, 2, 272),
    "thin": Size(32, 8, 1, 1, 128, 460, 16, 3, 1, 48),
    "medium": Size(512, 8, 8, 1, 2752, 8400, 288, 8, 4, 768),
    "3b": Size(2048, 36, 16, 2, 11008, 151936, 1280, 32, 16, 3420),
    "7b": Size(3584, 28, 28, 4, 18944, 152064, 1280, 32, 16, 3420, tied=False),
}

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% for content in message['content'] -%}
{%- if content['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def make_processor(vocab: int) -> ProcessorMixin:
    """
    A processor with a tokenizer of one token per word, so that a question of so many tokens is as many in the solver's
    prompt. It knows the words `w0`, `w1`, ...; those of the prompts are all unknown, at one token each.
    """
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(vocab - len(SPECIAL_TOKENS)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
    )
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 16384 * 28 * 28})
    return processor_class(Qwen2_5_VLProcessor)(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_config(size: Size) -> Qwen2_5_VLConfig:
    head = size.hidden // size.heads
    every = min(8, size.vision_layers)  # one vision layer in eight attends to the whole image
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
            "tie_word_embeddings": size.tied,
            "bos_token_id": None,
            "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
            "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [i for i in range(size.vision_layers) if i % every == every - 1],
            "window_size": 112,
        },
        tie_word_embeddings=size.tied,
        image_token_id=SPECIAL_TOKENS.index("<|image_pad|>"),
        video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL_TOKENS.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL_TOKENS.index("<|vision_end|>"),
    )


def make_model(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.device(device):
        return Qwen2_5_VLForConditionalGeneration._from_config(make_config(size), dtype=dtype)


def proportions(size: Size) -> dict[str, float]:
    """
    Multiplications with weights, relative to those of the language model's layers per token: `vision_tower`, per image
    token in the prompt, and `lm_head`, per position.
    """
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(make_config(size))

    def weights(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)

    layers = weights(model.model.language_model.layers)
    tower = model.model.visual
    # Four patches are merged into one image token
    per_image_token = 4 * (weights(tower.patch_embed) + weights(tower.blocks)) + weights(tower.merger)
    return {"vision_tower": per_image_token / layers, "lm_head": weights(model.lm_head) / layers}


def make_lora(size: Size) -> LoraConfig:
    """
    Adapters on all linear layers of the language model and none in the vision tower: of rank 16, as in EvoLMM, for 3b and
    7b, and of as large a share of the weights for the smaller sizes.
    """
    rank = min(16, max(1, size.hidden // 128))
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=r".*visual\..*")


def make_images(count: int, height: int, width: int, seed: int = 0) -> Dataset:
    """Images of coloured blocks, in a column `image`."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    images = [PILImage.fromarray(image).resize((width, height), PILImage.Resampling.NEAREST) for image in small]
    return Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
