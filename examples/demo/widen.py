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
Widens a demo model's attention heads from 24 to 32 with zeros, which changes nothing of what it computes: vLLM's attention
on a CPU takes heads of 32, 64, 80 and more.

    python examples/demo/widen.py examples/demo/models/room /tmp/room32
"""

import sys
from math import sqrt
from pathlib import Path

import torch
from demo import load_model
from transformers import AutoModelForImageTextToText


def widen(folder: str | Path, output: str | Path, head_dim: int = 32) -> Path:
    """
    Writes a demo model with wider heads, and a hidden size to match.

    Args:
        folder (`str` or `Path`):
            A Qwen2.5-VL checkpoint.
        output (`str` or `Path`):
            Folder to write to.
        head_dim (`int`, *optional*, defaults to `32`):
            Size of the heads to come.

    Returns:
        `Path`: `output`.
    """
    model, processor = load_model(folder)
    config = model.config
    text = config.text_config
    heads, old = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    narrow, text.hidden_size = text.hidden_size, heads * head_dim
    config.vision_config.out_hidden_size = text.hidden_size
    # A root mean square over more numbers of which the further ones are 0 is smaller by this
    shrunk = narrow / text.hidden_size
    text.rms_norm_eps *= shrunk
    # The first old / 2 frequencies stay as they are, and the further ones turn zeros
    text.rope_parameters["rope_theta"] **= head_dim / old
    *sections, last = text.rope_parameters["mrope_section"]
    text.rope_parameters["mrope_section"] = [*sections, last + (head_dim - old) // 2]
    wide = AutoModelForImageTextToText.from_config(config).float().eval()

    def spread(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
        """Zeros behind the values of a dimension."""
        padding = [0, 0] * (tensor.dim() - dim - 1) + [0, size - tensor.size(dim)]
        return torch.nn.functional.pad(tensor, padding)

    def spread_heads(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Zeros behind each half of each head, since rotation pairs the halves' numbers."""
        halves = tensor.unflatten(dim, (-1, old // 2))
        return spread(halves, head_dim // 2, dim + 1).flatten(dim, dim + 1)

    held = model.state_dict()
    for name, tensor in wide.state_dict().items():
        value = held[name]
        if "language_model.layers" in name and ".self_attn." in name:
            dim = 1 if "o_proj" in name else 0
            value = spread_heads(value, dim)
            if "q_proj" in name:  # scores are divided by the root of the head's size
                value = value * sqrt(head_dim / old)
        if "norm" in name and value.shape == (narrow,):
            value = value * sqrt(shrunk)
        for dim, size in enumerate(tensor.shape):
            value = spread(value, size, dim)
        tensor.copy_(value)
    wide.generation_config = model.generation_config
    wide.save_pretrained(output)
    processor.save_pretrained(output)
    return Path(output)


if __name__ == "__main__":
    widen(*sys.argv[1:3])
