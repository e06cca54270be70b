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

"""Tiny random-weight vision-language models, saved as complete checkpoint folders: model, tokenizer, processor.

    tiny_qwen2_5_vl("/tmp/tiny")      # then load it as any other checkpoint, its processor by `load_processor`

The classes are the real ones; only sizes differ. Weights depend on `seed` alone.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from evolmm_trl.processing import processor_class


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<question>", "</question>", "<answer>", "</answer>")

# Qwen's template for text, images and videos, without a default system prompt.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif content['type'] == 'video' or 'video' in content -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

_TEXTS = (
    "system user assistant You are a helpful assistant.",
    "Ask one question about this image whose answer is short. Answer the question. Think step by step.",
    "What is the value of the red bar? How many bars are there? Which bar is the tallest? The answer is 12.",
    "Look at the image and put your question between the question tags and the final answer between the answer tags.",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def _save(path, model_class: type, config, processor) -> Path:
    tokenizer = processor.tokenizer
    model = model_class(config).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def _text_config(tokenizer, hidden: int, layers: int, **rope) -> dict:
    heads, head_dim = 4, hidden // 4
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # about 1 / sqrt(hidden): pixels and prompts move the logits visibly
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
            **rope,
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _special_ids(tokenizer) -> dict:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def tiny_qwen2_5_vl(path, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny Qwen2.5-VL (patch 14, images of 28x28 to 84x84 pixels: 1 to 9 image tokens) to `path`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84})
    processor = processor_class(Qwen2_5_VLProcessor)(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    config = Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, hidden, layers),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": 0.2,
        },
        tie_word_embeddings=True,
        **_special_ids(tokenizer),
    )
    return _save(path, Qwen2_5_VLForConditionalGeneration, config, processor)


def tiny_qwen3_vl(path, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny Qwen3-VL (patch 16, images of 32x32 to 96x96 pixels: 1 to 9 image tokens) to `path`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
        patch_size=16,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor = processor_class(Qwen3VLProcessor)(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    config = Qwen3VLConfig(
        text_config=_text_config(tokenizer, hidden, layers, mrope_interleaved=True) | {"head_dim": hidden // 4},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        },
        tie_word_embeddings=True,
        **_special_ids(tokenizer),
    )
    return _save(path, Qwen3VLForConditionalGeneration, config, processor)
