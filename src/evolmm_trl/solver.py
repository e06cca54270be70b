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

"""A trained solver: loaded to answer, or written as one model."""

import json
import logging
import warnings
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.error import NoMatchingPeftModuleError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from .commands import visible
from .processing import HUB_KWARGS, load_processor
from .prompts import PROMPTS_NAME, RolePrompts


logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PLACES = {"solver": ("", "solver"), "proposer": ("proposer",)}  # this package's layout, then the authors'


def load_solver(base: str, adapter: str | None = None, **kwargs):
    """
    Loads a trained solver, ready to answer.

    Of the adapters nothing is read but JSON and safetensors: no pickle, and no code.

    Args:
        base (`str`):
            Id or path of the base model.
        adapter (`str`, *optional*):
            Id or path of the adapters: this package's layout, with the solver in the root, or the authors', with the
            solver in the subfolder `solver`. Without it the base model answers, as before training.
        **kwargs:
            For `from_pretrained` of the base model, such as `dtype` or `device_map`. Those about the Hub go to the
            processor too, and `token`, `cache_dir` and `local_files_only` also to the adapters.

    Returns:
        `tuple[PeftModel or PreTrainedModel, ProcessorMixin]`: the model, in eval mode, and its processor.

    Raises:
        `ValueError`: if there is no adapter, its weights are not safetensors, or it does not fit the base model.

    Example:

    ```python
    >>> model, processor = load_solver("Qwen/Qwen2.5-VL-7B-Instruct", "charts-evolmm", device_map="auto")
    ```
    """
    return load_role(base, adapter, "solver", **kwargs)


def load_role(base: str, adapter: str | None, role: str, **kwargs):
    """As [`load_solver`], for either `role`, `"solver"` or `"proposer"`."""
    folder = None
    if adapter is not None:
        hub = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        folder = _role_folder(adapter, role, **hub)
        trained_on = _check_config(folder)
        if trained_on is not None and Path(trained_on).name != Path(base).name:
            logger.warning("%s was trained on %s and is loaded on %s.", adapter, visible(trained_on), base)

    kwargs = {"trust_remote_code": False, **kwargs}  # unset, transformers asks at the terminal
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, **kwargs)
        processor = load_processor(base, **{name: kwargs[name] for name in HUB_KWARGS if name in kwargs})
    except OSError as error:
        if Path(base).is_dir():
            raise
        raise OSError(  # the Hub's may leave out which model it is about
            f"The model {base!r} is no folder here (the working directory is {str(Path.cwd())!r}), and could not be read "
            f"from the Hub: {error}"
        ) from error
    if folder is not None:
        model = _with_adapter(model, folder, base)
    return model.eval(), processor


def load_prompts(trained: str, **kwargs) -> RolePrompts | None:
    """
    The prompts that a model was trained with, which it is best asked with.

    Args:
        trained (`str`):
            Id or path of what was trained: the adapters, or a model of which all weights were.
        **kwargs:
            About the Hub: `token`, `cache_dir`, `local_files_only`.

    Returns:
        [`RolePrompts`] or `None`: `None` if what was trained does not say, as in the authors' layout. Offline it is also
        `None`, with a warning, if the cache does not tell.

    Raises:
        `ValueError`: if the file holds something else, or there is no such folder or repository.
        `OSError`: if the Hub cannot be asked, or offline if the file is known to be there and is not in the cache.
    """
    path = _prompts_file(str(trained), **kwargs)
    if path is None:
        return None
    try:
        prompts = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Delete it, or pass the prompts yourself.") from error
    return RolePrompts.from_dict(prompts)


def _prompts_file(trained: str, **kwargs) -> Path | None:
    """The file with the prompts, or `None` if there is none."""
    if Path(trained).is_dir():
        path = Path(trained) / PROMPTS_NAME
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(trained, PROMPTS_NAME, **kwargs))
    except RemoteEntryNotFoundError:
        return None
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise _unreadable(trained) from error
    except LocalEntryNotFoundError as error:
        cache_dir = kwargs.get("cache_dir")
        if try_to_load_from_cache(trained, PROMPTS_NAME, cache_dir=cache_dir) is _CACHED_NO_EXIST:
            return None
        try:
            snapshot_download(trained, allow_patterns=[PROMPTS_NAME], cache_dir=cache_dir, local_files_only=True)
        except IncompleteSnapshotError:
            raise OSError(
                f"{trained} has {PROMPTS_NAME}, which is not in the cache: {error} Try again with the Hub in reach, or pass "
                "the prompts yourself."
            ) from error
        except LocalEntryNotFoundError:
            raise _unreadable(trained) from error
        if not (is_offline_mode() or kwargs.get("local_files_only")):
            raise OSError(
                f"Whether {trained} has {PROMPTS_NAME} is not known: {error} Try again with the Hub in reach, pass the "
                "prompts yourself, or set HF_HUB_OFFLINE=1 to do with what is in the cache."
            ) from error
        logger.warning("Whether %s has %s is not known: it is not in the cache.", trained, PROMPTS_NAME)
        return None


def _with_adapter(model, folder: Path, base: str) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # Of tensors that it misses PEFT only warns, and the adapter has no effect
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (UserWarning, NoMatchingPeftModuleError) as error:
        raise _misfit(folder, base, str(error)) from error
    except RuntimeError as error:
        mismatches = [line for line in str(error).splitlines() if "size mismatch" in line]
        if not mismatches:
            raise
        raise _misfit(folder, base, mismatches[0].strip()) from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"The adapter in {folder} cannot be loaded: {visible(str(error).rstrip('.'))}. If it is damaged, download it "
            "again, or have it saved again."
        ) from error


def _misfit(folder: Path, base: str, reason: str) -> ValueError:
    return ValueError(
        f"The adapter in {folder} does not fit {base}: {visible(reason.rstrip('.'))}. Use the base model that it was "
        "trained on."
    )


def merge_solver(base: str, adapter: str, output_dir: str, **kwargs) -> None:
    """
    Writes a trained solver as one model, for inference engines that take no adapter: weights, configuration and
    processor, which load as the base model does.

    Each weight is merged in float32 and rounded once, to the base model's precision.

    Args:
        base (`str`):
            Id or path of the base model, not quantized.
        adapter (`str`):
            Id or path of the adapters, as in [`load_solver`].
        output_dir (`str`):
            Folder to write to.
        **kwargs:
            As in [`load_solver`]. `dtype` is the precision to write, by default that of the base model's weights.

    Raises:
        `ValueError`: if the base model is quantized, or `output_dir` holds an adapter, which transformers would apply
        to the merged weights again.

    Example:

    ```python
    >>> merge_solver("Qwen/Qwen2.5-VL-7B-Instruct", "charts-evolmm", "charts-evolmm-merged")
    ```
    """
    if (Path(output_dir) / _ADAPTER_FILES[0]).exists():
        raise ValueError(
            f"{output_dir} holds an adapter, which transformers would apply to the merged weights again. Write to another "
            "folder."
        )
    model, processor = load_solver(base, adapter, **{"dtype": "auto", **kwargs})
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{base} is quantized: merged into its rounded weights the adapter would be rounded too. Pass the model that "
            "it was quantized from."
        )
    if model.config.tie_word_embeddings and isinstance(model.get_input_embeddings(), LoraLayer):
        raise ValueError(
            f"{adapter} adapts the input embeddings, whose weight is the output layer's too in {base}: merged, it would "
            "change both."
        )
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            merged_into = layer.get_base_layer()
            dtype = next(merged_into.parameters()).dtype
            merged_into.float()
            layer.merge(safe_merge=True)
            merged_into.to(dtype)
    model = model.unload()
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def _role_folder(adapter: str, role: str, **kwargs) -> Path:
    """The local folder of a role's adapter. Of a repository nothing but the adapter's two files is downloaded."""
    root, places = Path(adapter), _PLACES[role]
    if not root.is_dir():
        wanted = [f"{place}/{name}".lstrip("/") for place in places for name in _ADAPTER_FILES]
        try:
            root = Path(snapshot_download(adapter, allow_patterns=wanted, **kwargs))
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            raise _unreadable(adapter) from error
    found = (root / place for place in places if (root / place / _ADAPTER_FILES[0]).is_file())
    folder = next(found, root / places[0])
    missing = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{adapter} holds no {role} that can be loaded: {' and '.join(missing)} missing. Expected "
            f"{' and '.join(_ADAPTER_FILES)} in its {' or its '.join(map(_place_name, places))}. Weights in adapter_model.bin are a "
            "pickle, which can run code when it is loaded, and are never loaded: have them saved as safetensors."
        )
    return folder


def _unreadable(trained: str) -> ValueError:
    return ValueError(
        f"{trained} is neither a folder nor a repository on the Hub that can be read. For a private repository, pass "
        "`token` or log in with `hf auth login`."
    )


def _place_name(place: str) -> str:
    return f"subfolder {place!r}" if place else "root"


def _check_config(folder: Path) -> str | None:
    """Refuses adapters that are not plain LoRA; returns the name of the model that the adapter was trained on."""
    path = folder / _ADAPTER_FILES[0]
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}. Download it again, or have the adapter saved again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a JSON object, as PEFT writes it.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"The adapter in {folder} is of the type {visible(str(config.get('peft_type')))}; expected LORA."
        )
    trained_on = config.get("base_model_name_or_path")
    if trained_on is not None and not isinstance(trained_on, str):
        raise ValueError(
            f"`base_model_name_or_path` in {path} is {visible(str(trained_on))}; expected a model's id or path, or null."
        )
    return trained_on
