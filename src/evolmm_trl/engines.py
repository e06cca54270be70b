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

"""What DeepSpeed and FSDP2 must be told for two roles to train under them as in one process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import OPTIMIZER_NAME
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled


def engine_optimizer(
    optimizer_class: type[torch.optim.Optimizer], accelerator: Accelerator
) -> type[torch.optim.Optimizer]:
    """
    The class of optimizer that an engine steps. With DeepSpeed's optimizer offload, Accelerate would replace the trainer's
    by DeepSpeed's CPU Adam, which steps both roles. Here it is taken beforehand, for AdamW, and Accelerate keeps it.

    Args:
        optimizer_class (`type[torch.optim.Optimizer]`):
            What `args.optim` names.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's; its DeepSpeed configuration is told that the optimizer is final.

    Returns:
        `type[torch.optim.Optimizer]`
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return optimizer_class
    offload = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device", "none") == "none":
        return optimizer_class
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    if optimizer_class is not torch.optim.AdamW:
        return optimizer_class
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class CPUAdamW(DeepSpeedCPUAdam):
        def __init__(self, params, fused: bool | None = None, **kwargs):  # torch's is always fused, and says so
            super().__init__(params, adamw_mode=True, **kwargs)

    return CPUAdamW


def keep_saved_names(model: torch.nn.Module) -> None:
    """
    Has a model that was loaded under ZeRO-3 saved with the names of its family's checkpoints. There transformers takes every
    renaming that it knows of for one that was needed to load, and undoes them all in what it saves: Qwen2.5-VL's
    `model.layers` become `model.model.layers`, which other libraries do not find.

    Args:
        model (`torch.nn.Module`):
            The trainer's model, before it is wrapped.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_deepspeed_zero3_enabled() and hasattr(model, "_weight_conversions"):
        del model._weight_conversions  # the family's own are undone


def load_fsdp2_optimizer(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str | Path
) -> None:
    """
    Loads the optimizer's state as Accelerate does, but for a role that has made no step yet: it has no state, which
    Accelerate takes for an error.

    Args:
        accelerator ([`~accelerate.Accelerator`]), model (`torch.nn.Module`), optimizer (`torch.optim.Optimizer`):
            The trainer's, prepared.
        checkpoint (`str` or `Path`):
            Folder with `optimizer.bin`, as state dicts of the type `FULL_STATE_DICT` are saved.
    """
    file = Path(checkpoint) / f"{OPTIMIZER_NAME}.bin"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} has no {file.name}. Resuming under FSDP2 needs `fsdp_state_dict_type: FULL_STATE_DICT`, as in "
            "accelerate_configs/fsdp2.yaml."
        )
    state = torch.load(file, weights_only=True) if accelerator.is_main_process else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), state, options=options)


def whole_tensors(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Copies of some parameters in main memory, whole on every process. ZeRO-3 and FSDP2 gather these alone; all processes
    call it together.

    Args:
        parameters (`Mapping[str, torch.Tensor]`):
            Parameters by name.

    Returns:
        `dict[str, torch.Tensor]`
    """
    gathered = nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().to("cpu", copy=True)
            for name, p in parameters.items()
        }


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """
    Within the context every process holds all weights of a model that FSDP2 shards, so that processes that generate for
    longer than others do not wait for them. Without FSDP2 nothing is done; for ZeRO-3 TRL does the same.

    Args:
        model (`torch.nn.Module`):
            The trainer's model.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    # The root is to be known as such before a part of it, such as the vision tower, is called on its own
    model._get_fsdp_state()._lazy_init()
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in sharded for group in module._get_fsdp_state()._fsdp_param_groups]
    resharding = [group.post_forward_mesh_info for group in groups]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        for group, mesh_info in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = mesh_info
