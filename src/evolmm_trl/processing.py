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

"""Load the processor of a supported vision-language model, with or without torchvision.

The stock Qwen and InternVL processors cannot be built without torchvision, because of the video processor they hold.
Images need none of it: where torchvision is missing, `load_processor` builds the same processor without its video half.
"""

import json
import logging
from functools import lru_cache

from transformers import (
    AutoProcessor,
    InternVLConfig,
    InternVLProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)
from transformers.utils import cached_file, is_torchvision_available


logger = logging.getLogger(__name__)

_PICKLED = "_ImageOnly"
_CACHED_FILE_KWARGS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
# What `from_pretrained` of a model and of its processor are given alike
HUB_KWARGS = (*_CACHED_FILE_KWARGS, "trust_remote_code")


class _ImageOnlyMixin:
    """A processor without its video processor; everything about text and images is inherited."""

    _video_processor_type: str
    _shared_with_video: tuple[str, ...]  # settings of the image processor that are the video processor's too

    # The argument names are what `ProcessorMixin.get_attributes` reads: no `video_processor` among them, so that it takes
    # no notice of the one that the stock class hands it
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        if videos is not None:  # the parent would drop them without a word
            raise ValueError(
                "Got `videos`, but this processor reads images only: torchvision is not installed, and the video "
                "processor needs it. Install torchvision, or pass `images`."
            )
        return super().__call__(images=images, text=text, **kwargs)

    def to_dict(self):
        # The stock class looks for a video processor when it loads these files on a machine that has torchvision.
        saved = super().to_dict()
        shared = {name: saved["image_processor"][name] for name in self._shared_with_video}
        return saved | {"video_processor": {"video_processor_type": self._video_processor_type, **shared}}


class _QwenMixin(_ImageOnlyMixin):
    _shared_with_video = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")


class _InternVLMixin(_ImageOnlyMixin):
    _shared_with_video = ("size", "image_mean", "image_std")

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template, image_seq_length=image_seq_length, **kwargs)


def _image_only(mixin: type, stock: type, video_processor_type: str) -> type:
    # It bears the stock name, since that name is what `save_pretrained` writes as `processor_class`; it is pickled, for
    # workers of a data loader, by the other
    members = {
        "_video_processor_type": video_processor_type,
        "__module__": __name__,
        "__qualname__": f"{_PICKLED}{stock.__name__}",
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (mixin, stock), members)


def __getattr__(name: str) -> type:
    if name.startswith(_PICKLED):
        return _image_only_processors()[name.removeprefix(_PICKLED)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _image_only_processors() -> dict[str, type]:
    """The image-only processor classes by the name of their stock class, registered for `AutoProcessor`."""
    logger.info("torchvision is not installed: the image-only form of the Qwen and InternVL processors is used.")
    classes = {
        Qwen2_5_VLConfig: _image_only(_QwenMixin, Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor"),
        Qwen3VLConfig: _image_only(_QwenMixin, Qwen3VLProcessor, "Qwen3VLVideoProcessor"),
        InternVLConfig: _image_only(_InternVLMixin, InternVLProcessor, "InternVLVideoProcessor"),
    }
    for config, image_only in classes.items():
        AutoProcessor.register(config, image_only, exist_ok=True)
    return {image_only.__name__: image_only for image_only in classes.values()}


def processor_class(stock: type) -> type:
    """
    The class to build a processor with: the stock class, or its image-only form where torchvision is missing.

    Args:
        stock (`type`):
            `Qwen2_5_VLProcessor`, `Qwen3VLProcessor` or `InternVLProcessor`.
    """
    return stock if is_torchvision_available() else _image_only_processors()[stock.__name__]


def _saved_processor_class(name_or_path: str, **kwargs) -> str | None:
    """The `processor_class` that a checkpoint names, looked up in the order of `AutoProcessor`."""
    kwargs = {key: value for key, value in kwargs.items() if key in _CACHED_FILE_KWARGS}
    for filename in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = cached_file(name_or_path, filename, **kwargs, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            with open(path, encoding="utf-8") as file:
                if name := json.load(file).get("processor_class"):
                    return name
    return None


def load_processor(name_or_path: str, **kwargs) -> ProcessorMixin:
    """
    The processor of a checkpoint: `AutoProcessor.from_pretrained`, except that a Qwen2.5-VL, Qwen3-VL or InternVL processor
    is built without its video processor where torchvision is missing. What it saves loads with the stock class elsewhere.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Model id on the Hub or a local folder.
        **kwargs:
            Passed to `from_pretrained`. `trust_remote_code` is `False` unless it is passed.

    Returns:
        [`~transformers.ProcessorMixin`]: for text and images; `videos=` raises where torchvision is missing.
    """
    name_or_path = str(name_or_path)
    kwargs = {"trust_remote_code": False, **kwargs}  # unset, transformers asks at the terminal
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(name_or_path, **kwargs)
    image_only = _image_only_processors()
    auto_class = image_only.get(_saved_processor_class(name_or_path, **kwargs), AutoProcessor)
    return auto_class.from_pretrained(name_or_path, **kwargs)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    The texts that a tokenizer reads as special tokens: those that it has a name for (end of text, image), and those that
    only its vocabulary marks as special, such as Gemma's and Llama's ends of turns.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `list[str]`
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
