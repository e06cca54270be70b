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

"""Two LoRA adapters on one PEFT model: one per role, of which exactly one has an effect at any time."""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
)
from transformers.modeling_utils import set_zero3_state

from .engines import whole_tensors
from .schedule import PROPOSER, ROLES, SOLVER


logger = logging.getLogger(__name__)

# Plain PEFT loads a checkpoint's root as the adapter "default", and every other adapter from a folder of its name.
ADAPTER_OF = {SOLVER: "default", PROPOSER: "proposer"}
# Stands beside the vision tower in InternVL3, Gemma 3 and Llama 3.2 Vision; Qwen's projector is in the tower
_PROJECTOR = "multi_modal_projector"


class RoleAdapters:
    """
    Chooses which role's LoRA adapter has an effect.

    Both adapters stay active and trainable for PEFT from beginning to end. A role is chosen by the scale of each LoRA
    layer: its own value for the chosen role, 0 for the other, which then adds exactly 0 to the forward and receives
    exactly zero gradients. No `requires_grad` ever changes, so that DDP, ZeRO and FSDP see the same set of parameters
    at every step. With no role chosen the model is the frozen base, bit for bit.

    With one adapter shared by both roles, choosing either role chooses that adapter. Without PEFT there is nothing to
    choose, and `reference` is not available.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. A `PeftModel` has the adapter "default" (the solver's, or the shared one) and, for separate
            adapters, "proposer".
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model = model
        self.active: str | None = SOLVER
        self.separate = False
        self._layers: list[tuple[LoraLayer, dict[str, float], dict[str, float]]] = []
        if not isinstance(model, PeftModel):
            return
        self.separate = ADAPTER_OF[PROPOSER] in model.peft_config
        names = list(ADAPTER_OF.values()) if self.separate else [ADAPTER_OF[SOLVER]]
        # `PeftModel.set_adapter` takes one name and freezes the others; the tuner underneath takes several
        model.base_model.set_adapter(names)
        model.set_requires_grad(names, requires_grad=True)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                scales = {name: module.scaling[name] for name in names if name in module.scaling}
                dropouts = {name: getattr(module.lora_dropout[name], "p", 0.0) for name in scales}
                self._layers.append((module, scales, dropouts))
        if not self._layers:
            raise ValueError(
                f"The model has no LoRA layers (adapter types: {sorted({str(c.peft_type) for c in model.peft_config.values()})}); "
                "pass a `peft.LoraConfig` as `peft_config`."
            )
        self.activate(SOLVER)

    def activate(self, role: str | None) -> None:
        """Gives this role's adapter its effect and takes the other's away; `None` takes away both."""
        self.active = role
        for layer, scales, dropouts in self._layers:
            for name, scale in scales.items():
                chosen = role is not None and (not self.separate or name == ADAPTER_OF[role])
                layer.scaling[name] = scale if chosen else 0.0
                if isinstance(layer.lora_dropout[name], nn.Dropout):
                    # The idle adapter must not draw a dropout mask, which would shift the random stream
                    layer.lora_dropout[name].p = dropouts[name] if chosen else 0.0

    @contextmanager
    def using(self, role: str | None) -> Iterator[None]:
        """Within the context this role has its effect. Do not leave it between a forward and its backward."""
        before = self.active
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within the context the model is the frozen base."""
        if not self._layers:
            raise RuntimeError("Without LoRA adapters the model has no frozen base; use the reference model.")
        with self.using(None):
            yield

    def role_of(self, parameter_name: str) -> str | None:
        """The role a parameter belongs to, by its name; `None` if it serves both."""
        if not self.separate:
            return None
        for role, adapter in ADAPTER_OF.items():
            if f".{adapter}." in parameter_name or parameter_name.endswith(f".{adapter}"):
                return role
        return None

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trainable parameters that this role's steps change, by name."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and self.role_of(name) in (role, None)
        }

    def check(self) -> None:
        """Raises a `RuntimeError` if some code has frozen an adapter or chosen another since."""
        if not self._layers:
            return
        expected = set(self._layers[0][1])
        layer = self._layers[0][0]
        if set(layer.active_adapters) != expected:
            raise RuntimeError(
                f"The active adapters are {layer.active_adapters}, expected {sorted(expected)}: something called "
                "`set_adapter` or left `disable_adapter()`. The roles are chosen by the trainer alone."
            )
        frozen = [
            name
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name and any(f".{adapter}." in name for adapter in expected) and not parameter.requires_grad
        ]
        if frozen:
            raise RuntimeError(
                f"{len(frozen)} tensors of the roles' adapters are frozen (such as {frozen[0]}) and would never be "
                "trained: something called `set_adapter` or left `disable_adapter()`."
            )


def role_optimizer(optimizer_class: type[torch.optim.Optimizer], roles: RoleAdapters) -> type[torch.optim.Optimizer]:
    """
    Makes an optimizer that steps only the active role's parameter groups.

    An idle adapter has zero gradients, not none, and would still move through momentum and weight decay.

    Args:
        optimizer_class (`type[torch.optim.Optimizer]`):
            Any torch optimizer class.
        roles ([`RoleAdapters`]):
            Says which role is active.

    Returns:
        `type[torch.optim.Optimizer]`: a subclass whose parameter groups carry the key `role`, `None` for both roles.
    """

    class RoleOptimizer(optimizer_class):
        def step(self, closure=None):
            idle = [
                group
                for group in self.param_groups
                if roles.active is None or group["role"] not in (roles.active, None)
            ]
            parameters = [group["params"] for group in idle]
            for group in idle:
                group["params"] = []
            try:
                return super().step(closure)
            finally:
                for group, params in zip(idle, parameters, strict=True):
                    group["params"] = params

    RoleOptimizer.__name__ = f"Role{optimizer_class.__name__}"
    # By the module of an 8-bit optimizer transformers knows to keep the state of embeddings in 32 bits
    RoleOptimizer.__module__ = optimizer_class.__module__
    RoleOptimizer.__qualname__ = RoleOptimizer.__name__
    return RoleOptimizer


def vision_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """
    Finds the vision tower of a vision-language model: the module built from the `vision_config` of its configuration.

    Args:
        model (`torch.nn.Module`):
            A vision-language model, without PEFT.

    Returns:
        `tuple[str, torch.nn.Module]`: the module's name and the module.

    Raises:
        `ValueError`: if the model has none.
    """
    vision_config = getattr(model.config, "vision_config", None)
    if vision_config is not None:
        for name, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and type(module.config) is type(vision_config):
                return name, module
    raise ValueError(
        f"{type(model).__name__} has no vision tower: `EvoLMMTrainer` trains vision-language models. Pass one, such as a "
        "Qwen2.5-VL or Qwen3-VL checkpoint."
    )


def vision_modules(
    model: "str | PreTrainedModel | PeftModel", trust_remote_code: bool = False, revision: str | None = None
) -> list[str]:
    """
    The names of the model's vision tower and, where it stands beside the tower, its projector.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Vision-language model. One given by id or path is built without weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`), revision (`str`, *optional*):
            Of a model given by id.

    Returns:
        `list[str]`
    """
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
        if getattr(config, "vision_config", None) is None:
            raise ValueError(
                f"{model} is a {config.model_type} model without a vision tower: `EvoLMMTrainer` trains vision-language "
                "models. Pass one, such as a Qwen2.5-VL or Qwen3-VL checkpoint."
            )
        model = _without_weights(config, trust_remote_code)
    elif isinstance(model, PeftModel):
        model = model.get_base_model()
    tower, _ = vision_tower(model)
    parent, _, _ = tower.rpartition(".")
    beside = [name for name, _ in model.get_submodule(parent).named_children() if name == _PROJECTOR]
    return [tower, *(f"{parent}.{name}" if parent else name for name in beside)]


def _without_weights(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    # The second says that DeepSpeed's ZeRO-3 has made its preparations, which it would make with weights that are not there
    with torch.device("meta"), set_zero3_state():
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def check_target_modules(config: LoraConfig, model: str, trust_remote_code: bool = False) -> None:
    """
    Raises a `ValueError` if the `target_modules` match no module, as PEFT does once the weights are loaded.

    Args:
        config ([`~peft.LoraConfig`]):
            The adapter's configuration.
        model (`str`):
            Id or path of the model, which is built without weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Of the model.
    """
    targets = config.target_modules
    if targets is None or config.target_parameters or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    built = _without_weights(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), trust_remote_code)
    if not any(check_target_module_exists(config, name) for name, _ in built.named_modules()):
        vision, head = vision_modules(built), built.get_output_embeddings()
        linear = [
            name
            for name, module in built.named_modules()
            if isinstance(module, nn.Linear) and module is not head and not _is_in(name, vision)
        ]
        given = targets if isinstance(targets, str) else sorted(targets)
        raise ValueError(
            f"`target_modules` is {given!r}, which matches no module of {model}. The linear layers of its language "
            f"model are called {last_names(linear)}. Name some of them, or leave `target_modules` unset."
        )


def last_names(modules: Iterable[str]) -> str:
    """The modules' last names, without repetition; a number alone says nothing, so that it follows a name."""
    return ", ".join(sorted({re.search(r"[^.]+(\.\d+)?$", module)[0] for module in modules}))


def _is_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of these or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def matched_but_left_out(model: PreTrainedModel | PeftModel, vision: Sequence[str]) -> list[str]:
    """
    The modules of the vision tower that `target_modules` matches as it does the language model's, and that
    `exclude_modules` keeps without LoRA layers.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, with its adapters.
        vision (`Sequence[str]`):
            Names of the vision tower's modules, as by [`vision_modules`].

    Returns:
        `list[str]`: their names; none without adapters.
    """
    if not isinstance(model, PeftModel):
        return []
    configs = []
    for config in model.peft_config.values():
        config = copy.copy(config)
        config.exclude_modules = None
        configs.append(config)
    return [
        name
        for name, module in model.get_base_model().named_modules()
        if _is_in(name, vision)
        and not isinstance(module, BaseTunerLayer)
        and any(check_target_module_exists(config, name) for config in configs)
    ]


def role_lora_configs(
    peft_config: "LoraConfig | dict[str, LoraConfig]", adapters: str, excluded: Sequence[str]
) -> dict[str, LoraConfig]:
    """
    The LoRA configuration of each adapter to make.

    Args:
        peft_config ([`~peft.LoraConfig`] or `dict[str, LoraConfig]`):
            One for both roles, or one per role under the keys `"solver"` and `"proposer"`.
        adapters (`str`):
            `"separate"` or `"shared"`.
        excluded (`Sequence[str]`):
            Names of modules to keep free of LoRA layers; a configuration with its own `exclude_modules` is left as it is.

    Returns:
        `dict[str, LoraConfig]`: by role; only `"solver"` when shared.
    """
    configs = dict.fromkeys(ROLES, peft_config) if not isinstance(peft_config, dict) else dict(peft_config)
    if set(configs) != set(ROLES):
        raise ValueError(f"`peft_config` has the keys {sorted(configs)}; expected exactly {list(ROLES)}.")
    if adapters == "shared":
        if isinstance(peft_config, dict):
            raise ValueError("`adapters='shared'` needs one `LoraConfig` for both roles, but got one for each.")
        configs = {SOLVER: peft_config}
    for role, config in configs.items():
        if not isinstance(config, LoraConfig):
            raise TypeError(f"The {role}'s `peft_config` is a {type(config).__name__}; expected a `peft.LoraConfig`.")
        if config.modules_to_save:
            raise ValueError(
                f"The {role}'s `peft_config` has modules_to_save={config.modules_to_save}: such modules are copied whole "
                "and have no scale, so both roles' copies would act at once. Remove them."
            )
        if config.bias != "none" or config.use_dora or config.lora_bias:
            raise ValueError(
                f"The {role}'s `peft_config` trains biases or uses DoRA, whose effect a LoRA scale of 0 does not remove. "
                "Set bias='none', use_dora=False and lora_bias=False."
            )
        configs[role] = without_modules(config, excluded)
    return configs


def without_modules(config: LoraConfig, names: Sequence[str]) -> LoraConfig:
    """A copy of a LoRA configuration that leaves modules out; one with its own `exclude_modules` keeps those."""
    config = copy.deepcopy(config)
    if names and config.exclude_modules is None:
        config.exclude_modules = rf"(.*\.)?({_pattern(names)})(\..*)?"
    return config


def _pattern(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def check_adapted_modules(model: PeftModel, vision: Sequence[str], freeze_vision_tower: bool) -> None:
    """Raises a `ValueError` if a LoRA layer is where it would not be trained or was not asked for."""
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "A LoRA adapter on `lm_head` would never be trained: the log-probabilities are computed from its weight "
            "directly. Remove 'lm_head' from `target_modules`."
        )
    if freeze_vision_tower:
        inside = [
            name
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, BaseTunerLayer) and _is_in(name, vision)
        ]
        if inside:
            raise ValueError(
                f"`target_modules` puts {len(inside)} LoRA layers into the vision tower (such as {inside[0]}), but "
                f"freeze_vision_tower=True. Add {_pattern(vision)!r} to your `exclude_modules` pattern, leave "
                "`exclude_modules` unset, or set freeze_vision_tower=False."
            )


def keep_adapters_precise(model: PeftModel) -> None:
    """
    Puts the adapters of a quantized model back into float32, as PEFT makes them. TRL rounds them to bfloat16, whose
    neighbouring values are 0.4 to 0.8 % apart: a step of AdamW at a usual learning rate is smaller, and vanishes.
    """
    base = model.get_base_model()
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()


def warn_of_half_precision(trainer: Trainer) -> None:
    """Warns that steps are lost if weights are trained in less than float32 and nothing holds a float32 copy of them."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # which hold float32 copies
        return
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    half = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32, torch.float64})
    if half:
        logger.warning(
            "Weights are trained in %s, which holds 2 or 3 decimal digits: a step at learning_rate=%g changes most of "
            "them by less, and is lost. Load the model in float32, TRL's default, or train LoRA adapters.",
            " and ".join(half),
            trainer.args.learning_rate,
        )


def without_vision(quantization_config: BitsAndBytesConfig, modules: Sequence[str]) -> BitsAndBytesConfig:
    """
    Leaves the vision tower and the LM head out of quantization, unless the configuration says itself what to leave out.

    Args:
        quantization_config ([`~transformers.BitsAndBytesConfig`]):
            Quantization of the model.
        modules (`Sequence[str]`):
            Names of what belongs to the vision tower.

    Returns:
        [`~transformers.BitsAndBytesConfig`]
    """
    if quantization_config.llm_int8_skip_modules is not None:
        return quantization_config
    config = copy.deepcopy(quantization_config)
    # A list replaces transformers' own, which leaves out the LM head
    config.llm_int8_skip_modules = ["lm_head", *map(re.escape, modules)]
    return config


def check_quantized_modules(model: PreTrainedModel | PeftModel) -> None:
    """Raises a `ValueError` if the LM head is quantized."""
    head = model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise ValueError(
            f"The LM head is quantized ({type(head).__name__}), but the log-probabilities are computed from its weight "
            "directly. Add 'lm_head' to `llm_int8_skip_modules`, or leave that unset: the LM head and the vision tower are "
            "then left out."
        )


def keep_gradients_on_cpu(model: nn.Module) -> None:
    """
    Forbids the 4-bit layers of bitsandbytes to repack their weights. On a CPU with bfloat16 instructions they do so in
    place at their first forward in eval mode, and later gradients through them are wrong or missing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_role_adapter(model: PeftModel, config: LoraConfig) -> None:
    """Adds the proposer's adapter beside the solver's, in the same precision and as trainable as it."""
    dtypes = {p.dtype for name, p in model.named_parameters() if f".{ADAPTER_OF[SOLVER]}." in name}
    model.add_adapter(ADAPTER_OF[PROPOSER], config)
    if len(dtypes) == 1:
        for name, parameter in model.named_parameters():
            if f".{ADAPTER_OF[PROPOSER]}." in name:
                parameter.data = parameter.data.to(next(iter(dtypes)))


def role_adapter_state(model: PeftModel, role: str) -> dict[str, torch.Tensor]:
    """
    The weights of one role's adapter, alone and whole, by the names that a saved adapter has. All processes call it
    together.

    Args:
        model ([`~peft.PeftModel`]):
            Model with the adapters.
        role (`str`):
            Role.

    Returns:
        `dict[str, torch.Tensor]`: in main memory.
    """
    adapter = ADAPTER_OF[role]
    named = {name: parameter for name, parameter in model.named_parameters() if f".{adapter}." in name}
    return get_peft_model_state_dict(model, whole_tensors(named), adapter_name=adapter, save_embedding_layers=False)


def save_role_adapter(model: PeftModel, role: str, state: dict[str, torch.Tensor], folder: str | Path) -> None:
    """
    Writes one role's adapter as `PeftModel.save_pretrained` does.

    Args:
        model ([`~peft.PeftModel`]):
            Model with the adapters.
        role (`str`):
            Role.
        state (`dict[str, torch.Tensor]`):
            What [`role_adapter_state`] gave.
        folder (`str` or `Path`):
            Folder that exists.
    """
    save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[ADAPTER_OF[role]])
    config.inference_mode = True
    config.save_pretrained(folder)


def check_adapter_folder(folder: str | Path, separate: bool) -> None:
    """Raises a `ValueError` if a checkpoint lacks the adapter of a role."""
    folder = Path(folder)
    needed = {SOLVER: folder}
    if separate:
        needed[PROPOSER] = folder / ADAPTER_OF[PROPOSER]
    for role, place in needed.items():
        missing = [
            name for name in ("adapter_config.json", "adapter_model.safetensors") if not (place / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder} holds no adapter for the {role}: {place} lacks {' and '.join(missing)}. Expected the solver's "
                "adapter in the folder itself and the proposer's in its subfolder 'proposer'."
            )


def load_role_adapters(model: PeftModel, folder: str | Path) -> None:
    """
    Loads both roles' weights from a checkpoint into the adapters of `model`.

    Args:
        model ([`~peft.PeftModel`]):
            Model with the adapters to fill.
        folder (`str` or `Path`):
            Checkpoint folder: the solver's adapter in its root, the proposer's in `proposer/`.

    Raises:
        `ValueError`: if the folder lacks a role or holds tensors of other names or shapes.
    """
    separate = ADAPTER_OF[PROPOSER] in model.peft_config
    check_adapter_folder(folder, separate)
    for role in ROLES if separate else (SOLVER,):
        adapter = ADAPTER_OF[role]
        place = Path(folder) / (adapter if role == PROPOSER else "")
        state = _as_held(model, adapter, load_file(place / "adapter_model.safetensors"))
        result = set_peft_model_state_dict(model, state, adapter_name=adapter)
        missing = [name for name in result.missing_keys if f".{adapter}." in name]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"The {role}'s adapter in {place} does not fit this model: {len(missing)} tensors are missing and "
                f"{len(result.unexpected_keys)} are unknown (such as {(missing + list(result.unexpected_keys))[0]}). Use "
                "the base model and the `peft_config` it was trained with."
            )


def _as_held(model: PeftModel, adapter: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file, sharded as the adapter's parameters are."""
    parameters = dict(model.named_parameters())
    held = {}
    for name, tensor in state.items():
        stem, dot, suffix = name.partition(".weight")
        parameter = parameters.get(f"{stem}.{adapter}{dot}{suffix}")
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        held[name] = tensor
    return held
