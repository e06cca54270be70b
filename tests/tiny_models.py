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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
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

# The other families' templates, in the layout of their checkpoints.
INTERNVL_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' -%}
<IMG_CONTEXT>
{% elif content['type'] == 'video' -%}
<video>
{% elif content['type'] == 'text' -%}
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
# A system message goes before the first user's
GEMMA3_TEMPLATE = """\
{{- bos_token -}}
{%- set system = messages[0]['content'][0]['text'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ system if loop.first }}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' -%}
<start_of_image>
{%- elif content['type'] == 'text' -%}
{{ content['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}
<start_of_turn>model
{% endif -%}
"""
# No system message beside an image
MLLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ raise_exception('Prompting with images is incompatible with system messages.') }}
{%- endif -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' -%}
<|image|>
{%- elif content['type'] == 'text' -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""

_TEXTS = (
    "system user assistant You are a helpful assistant.",
    "Ask one question about this image whose answer is short. Answer the question. Think step by step.",
    "What is the value of the red bar? How many bars are there? Which bar is the tallest? The answer is 12.",
    "Look at the image and put your question between the question tags and the final answer between the answer tags.",
)


def tiny_tokenizer(
    special_tokens=SPECIAL_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, **named_tokens
) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer of about 400 tokens, by default with Qwen's special tokens. As Gemma's and Llama's, it puts a
    `bos_token` before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    if bos_token is not None:
        bos = (bos_token, tokenizer.token_to_id(bos_token))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos_token} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=pad_token,
        bos_token=bos_token,
        padding_side="left",
        extra_special_tokens=named_tokens,
    )


def _save(path, model, processor, *end_tokens: str) -> Path:
    tokenizer = processor.tokenizer
    end_tokens = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(end_tokens or [tokenizer.pad_token])]
    model.generation_config = GenerationConfig(eos_token_id=end_tokens, pad_token_id=tokenizer.pad_token_id)
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def _text_config(tokenizer, hidden: int, layers: int, **kwargs) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # about 1 / sqrt(hidden): pixels and prompts move the logits visibly
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **kwargs,
    }


def _rope(**kwargs) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **kwargs}}


def _m_rope(hidden: int, **kwargs) -> dict:
    head_dim = hidden // 4
    return _rope(mrope_section=[head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6], **kwargs)


def _vision_config(**kwargs) -> dict:
    return {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2, **kwargs}


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
        text_config=_text_config(tokenizer, hidden, layers, **_m_rope(hidden)),
        vision_config=_vision_config(
            depth=2, num_heads=2, out_hidden_size=hidden, fullatt_block_indexes=[1], window_size=56
        ),
        tie_word_embeddings=True,
        **_special_ids(tokenizer),
    )
    return _save(path, Qwen2_5_VLForConditionalGeneration(config), processor)


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
        text_config=_text_config(
            tokenizer, hidden, layers, head_dim=hidden // 4, **_m_rope(hidden, mrope_interleaved=True)
        ),
        vision_config=_vision_config(
            depth=2, num_heads=2, out_hidden_size=hidden, num_position_embeddings=36, deepstack_visual_indexes=[0]
        ),
        tie_word_embeddings=True,
        **_special_ids(tokenizer),
    )
    return _save(path, Qwen3VLForConditionalGeneration(config), processor)


def tiny_internvl(path, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny InternVL3 (tiles of 28x28 pixels and 4 image tokens, at most 4 tiles and a thumbnail) to `path`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    image_processor = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    processor = processor_class(InternVLProcessor)(
        image_processor, tokenizer, image_seq_length=4, chat_template=INTERNVL_TEMPLATE
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text_config(tokenizer, hidden, layers, **_rope())},
        vision_config=_vision_config(num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return _save(path, InternVLForConditionalGeneration(config), processor)


def tiny_gemma3(path, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny Gemma 3 (images of 28x28 pixels and 4 image tokens; a sliding window of 16 tokens) to `path`."""
    torch.manual_seed(seed)
    image_tokens = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = tiny_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *image_tokens.values()),
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        **image_tokens,
    )
    image_processor = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=GEMMA3_TEMPLATE)
    config = Gemma3Config(
        text_config=_text_config(
            tokenizer,
            hidden,
            layers,
            head_dim=hidden // 4,
            query_pre_attn_scalar=hidden // 4,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        ),
        vision_config=_vision_config(
            num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, vision_use_head=False
        ),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    # Zero in a new model, which would not see the image
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return _save(path, model, processor, "<end_of_turn>")


def tiny_mllama(path, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Save a tiny Llama 3.2 Vision (at most 4 tiles of 28x28 pixels; every second layer looks at them) to `path`."""
    torch.manual_seed(seed)
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    tokenizer = tiny_tokenizer(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *headers),
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        bos_token="<|begin_of_text|>",
    )
    # The image token has an embedding, beyond the vocabulary, and no logit
    tokenizer.add_tokens("<|image|>", special_tokens=True)
    image_processor = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = MllamaProcessor(image_processor, tokenizer, chat_template=MLLAMA_TEMPLATE)
    config = MllamaConfig(
        text_config=_text_config(
            tokenizer,
            hidden,
            layers,
            vocab_size=processor.image_token_id,
            cross_attention_layers=list(range(1, layers, 2)),
            tie_word_embeddings=False,
            **_rope(),
        ),
        vision_config=_vision_config(
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=28,
            patch_size=14,
            intermediate_layers_indices=[0],
            vision_output_dim=64,
        ),
        image_token_index=processor.image_token_id,
    )
    model = MllamaForConditionalGeneration(config)
    # Zero in a new model, which would not see the image
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.ones_(parameter)
    return _save(path, model, processor, "<|end_of_text|>", "<|eom_id|>")
