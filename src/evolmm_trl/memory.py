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
What a run holds in memory, by arithmetic: printed when a trainer is made, and the tables of `docs/scaling.md`.

Everything is bytes per process. Weights, gradients and the optimizer's state are counted exactly; activations and what
generation needs are estimated from the model's sizes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .config import EvoLMMConfig
from .role_adapters import RoleAdapters, last_names, matched_but_left_out
from .schedule import ROLES
from .shared_prefix import base_model


GB = 10**9

# Of TRL's fused LM head: it scores so many positions by so many words at a time (`trl/kernels/chunked_logprob.py`)
_TILE_POSITIONS, _TILE_WORDS = 4096, 32768
# Of the loop that samples: scores, probabilities, their sums and a mask, all in float32 and of the vocabulary's size
_SAMPLING_COPIES = 4
# Of an LLM.int8 or a 4-bit weight, by the name of its parameter's class in bitsandbytes
_QUANTIZED = {"Params4bit": "4-bit", "Int8Params": "8-bit"}


@dataclass(frozen=True)
class Sharding:
    """
    What the processes of a run hold a share of rather than a copy.

    Args:
        name (`str`, *optional*, defaults to `"one process"`):
            For people.
        processes (`int`, *optional*, defaults to `1`):
            Over how many processes.
        optimizer (`bool`), gradients (`bool`), weights (`bool`), *optional*, default to `False`:
            Of what each has a share: the first of ZeRO-1, the first two of ZeRO-2, all three of ZeRO-3
            ([ZeRO](https://huggingface.co/papers/1910.02054), section 3) and of FSDP.
        float32_copies (`bool`, *optional*, defaults to `False`):
            Whether the optimizer holds float32 copies of the trainable weights, whose own precision is then bfloat16:
            DeepSpeed's mixed precision, K = 12 of the ZeRO paper.
        buckets (`bool`, *optional*, defaults to `False`):
            Whether gradients are copied to be exchanged (DDP without `gradient_as_bucket_view`).
        optimizer_on_cpu (`bool`), weights_on_cpu (`bool`), *optional*, default to `False`:
            What is offloaded to main memory.
    """

    name: str = "one process"
    processes: int = 1
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    float32_copies: bool = False
    buckets: bool = False
    optimizer_on_cpu: bool = False
    weights_on_cpu: bool = False

    @classmethod
    def ddp(cls, processes: int) -> "Sharding":
        """Copies of everything."""
        return cls(f"DDP over {processes} processes", processes, buckets=True)

    @classmethod
    def zero(
        cls, stage: int, processes: int, optimizer_on_cpu: bool = False, weights_on_cpu: bool = False
    ) -> "Sharding":
        """DeepSpeed with this stage of ZeRO."""
        return cls(
            f"ZeRO-{stage} over {processes} processes",
            processes,
            optimizer=stage >= 1,
            gradients=stage >= 2,
            weights=stage >= 3,
            float32_copies=True,
            optimizer_on_cpu=optimizer_on_cpu,
            weights_on_cpu=weights_on_cpu,
        )

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Sharding":
        """That of a run."""
        processes, state = accelerator.num_processes, accelerator.state
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            zero = state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
            on_cpu = {
                name: (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
                for name, part in (("optimizer_on_cpu", "optimizer"), ("weights_on_cpu", "param"))
            }
            return cls.zero(state.deepspeed_plugin.zero_stage, processes, **on_cpu)
        if accelerator.distributed_type == DistributedType.FSDP:
            return cls(f"FSDP over {processes} processes", processes, True, True, True)
        return cls.ddp(processes) if processes > 1 else cls()


@dataclass(frozen=True)
class Prompt:
    """
    Sizes of a prompt.

    Args:
        tokens (`int`):
            Tokens of the solver's prompt with the longest question, those of the image included.
        patches (`int`):
            Patches of the image that the vision tower reads.
    """

    tokens: int
    patches: int


@dataclass(frozen=True)
class Memory:
    """
    Bytes of a process. The first four are held throughout, of the others the largest at a time.

    Args:
        weights (`int`), reference (`int`), gradients (`int`):
            Model, the copy of it that is the reference (0 where the base is), gradients.
        optimizer (`int` or `None`):
            The optimizer's state; `None` for an optimizer whose state is not known here.
        vision_tower (`int`), generation (`int`), update (`int`):
            What the frozen tower's forward, generation, and a forward and backward need on top.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int | None
    vision_tower: int
    generation: int
    update: int

    @property
    def held(self) -> int:
        """What is held throughout."""
        return self.weights + self.reference + self.gradients + (self.optimizer or 0)

    @property
    def peak(self) -> int:
        """The most at a time."""
        return self.held + max(self.vision_tower, self.generation, self.update)


# --------------------------------------------------------------------------------------------------------------------
# Weights and the optimizer's state: exact


def elements(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds, however they are stored."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor where its share is not


def precision(parameter: nn.Parameter) -> str:
    """How they are stored."""
    return _QUANTIZED.get(type(parameter).__name__, str(parameter.dtype).removeprefix("torch."))


def weight_bytes(parameter: nn.Parameter) -> int:
    """
    Bytes of a parameter. One of 4 bits has a scale per block of 64, which double quantization stores in 8 bits, with
    scales of its own per block of 256 ([QLoRA](https://huggingface.co/papers/2305.14314), section 3); one of 8 bits has a
    scale per row.
    """
    count = elements(parameter)
    stored = precision(parameter)
    if stored == "4-bit":
        blocks = _ceil(count, parameter.blocksize)
        scales = blocks + 4 * _ceil(blocks, 256) if parameter.compress_statistics else 4 * blocks
        return _ceil(count, 2) + scales
    if stored == "8-bit":
        return count + 4 * parameter.shape[0]
    return count * parameter.element_size()


def optimizer_bytes(
    optim: str, parameters: Iterable[nn.Parameter], embeddings: Iterable[nn.Parameter], float32: bool = False
) -> int | None:
    """
    Bytes of an optimizer's state.

    Args:
        optim (`str`):
            `args.optim`.
        parameters (`Iterable[nn.Parameter]`):
            What it trains.
        embeddings (`Iterable[nn.Parameter]`):
            Weights of embeddings, whose state transformers keeps in 32 bits in an 8-bit optimizer of bitsandbytes.
        float32 (`bool`, *optional*, defaults to `False`):
            Whether it trains float32 copies.

    Returns:
        `int` or `None`: `None` for an optimizer whose state is not known here.
    """
    name = optim.removeprefix("paged_")
    moments = 1 if name.startswith("lion") else 2
    embeddings = {id(parameter) for parameter in embeddings}
    if name == "sgd":
        return 0
    if name in ("adamw_torch", "adamw_torch_fused"):
        # In the parameters' own precision, and a step count in float32
        return sum(moments * elements(p) * (4 if float32 else p.element_size()) + 4 for p in parameters)
    if name in ("adamw_32bit", "lion_32bit"):
        return sum(moments * elements(p) * 4 for p in parameters)
    if name in ("adamw_8bit", "adamw_bnb_8bit", "lion_8bit"):
        # A byte each and a scale per block of 256; small tensors are left in 32 bits
        # ([8-bit optimizers](https://huggingface.co/papers/2110.02861), section 2)
        return sum(
            moments
            * (
                4 * elements(p)
                if elements(p) < 4096 or id(p) in embeddings
                else elements(p) + 4 * _ceil(elements(p), 256)
            )
            for p in parameters
        )
    return None


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


# --------------------------------------------------------------------------------------------------------------------
# Activations: estimated


@dataclass(frozen=True)
class _Layers:
    """
    Sizes of a stack of transformer layers.

    Args:
        count (`int`), hidden (`int`), queries (`int`), keys (`int`), inner (`int`):
            Layers, hidden size, sizes of all queries and of all keys of a token, and the MLP's inner size.
    """

    count: int
    hidden: int
    queries: int
    keys: int
    inner: int

    @classmethod
    def of_text(cls, config) -> "_Layers":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads * head,
            config.num_key_value_heads * head,
            config.intermediate_size,
        )

    @classmethod
    def of_vision(cls, config) -> "_Layers":
        count = config.depth if hasattr(config, "depth") else config.num_hidden_layers
        hidden = config.hidden_size
        return cls(count, hidden, hidden, hidden, config.intermediate_size)

    def inputs(self) -> int:
        """Size of the inputs of a layer's linear layers: of queries, keys, values, gate and up, of output, and of down."""
        return 5 * self.hidden + self.queries + self.inner

    def saved(self, size: int, copies: int, dropout: bool) -> int:
        """
        Bytes per token that a layer saves for its backward, at `size` bytes per number. After
        [Korthikanti et al.](https://huggingface.co/papers/2205.05198), section 4.1, for RMS norms (which compute in
        float32), grouped keys, a gated MLP, attention that saves no scores, and LoRA or trained weights in every linear
        layer: the norms' inputs; queries, keys, values and attention's output, before and after the groups' are joined;
        the MLP's gate before and after its activation, and up; the inputs of the linear layers, which share them, or of
        which each has so many copies, converted for it; and dropout's masks.
        """
        saved = 8 * self.hidden + size * (3 * self.queries + 2 * self.keys + 3 * self.inner)
        own = copies or dropout
        saved += size * (max(copies, 1) * self.inputs() if own else 2 * self.hidden + self.queries + self.inner)
        return saved + (self.inputs() if dropout else 0)

    def working(self, size: int) -> int:
        """Bytes per token within a layer that are soon freed again: of its MLP, the widest."""
        return size * (4 * self.inner + 2 * self.hidden)

    def for_backward(
        self, tokens: int, size: int, residual: int, copies: int, dropout: bool, checkpointing: bool
    ) -> int:
        """
        Bytes of a forward with its backward. With checkpointing the layers' inputs and one layer at a time
        ([Chen et al.](https://huggingface.co/papers/1604.06174)).
        """
        saved = self.saved(size, copies, dropout)
        saved = saved + self.count * self.hidden * residual if checkpointing else self.count * saved
        return tokens * (saved + self.working(size))


def why_not_estimated(model: PreTrainedModel | PeftModel) -> str | None:
    """Why a model's activations cannot be estimated, or `None` if they can."""
    config = base_model(model).config
    text, vision = config.get_text_config(), config.vision_config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    missing = [name for name in names if not isinstance(getattr(text, name, None), int)]
    missing += [
        f"vision_config.{name}"
        for name in ("hidden_size", "intermediate_size")
        if not isinstance(getattr(vision, name, None), int)
    ]
    return f"its configuration has no {', '.join(missing)}" if missing else None


def estimate(
    model: PreTrainedModel | PeftModel,
    tower: nn.Module,
    args: EvoLMMConfig,
    prompt: Prompt,
    sharding: Sharding,
    shared_prefix: bool,
    reference: PreTrainedModel | None = None,
) -> Memory:
    """
    Estimates a run's memory, per process.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model as it is trained. It may be on the meta device.
        tower (`nn.Module`):
            Its vision tower.
        args ([`EvoLMMConfig`]):
            Batch, lengths, precision, checkpointing and optimizer.
        prompt ([`Prompt`]):
            Sizes of a prompt.
        sharding ([`Sharding`]):
            How the run is spread over processes.
        shared_prefix (`bool`):
            Whether the answers to a question share its prompt.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            The copy of the model that is the reference, if there is one.

    Returns:
        [`Memory`]
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    half = args.bf16 or args.fp16
    in_half = half and sharding.float32_copies  # DeepSpeed's mixed precision rounds every weight

    def stored(parameter: nn.Parameter) -> int:
        plain = precision(parameter) not in _QUANTIZED.values()
        return 2 * elements(parameter) if in_half and plain else weight_bytes(parameter)

    def share(size: int, sharded: bool) -> int:
        return _ceil(size, sharding.processes) if sharded else size

    whole = sum(map(stored, parameters))
    gradients = sum(elements(p) * (2 if in_half else p.element_size()) for p in trained)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    state = optimizer_bytes(args.optim, trained, embeddings, float32=in_half)
    if state is not None and in_half:
        state += 4 * sum(map(elements, trained))  # the float32 copies

    base = base_model(model)
    config = base.config
    text, vision = _Layers.of_text(config.get_text_config()), _Layers.of_vision(config.vision_config)
    lowest = min(p.element_size() for p in parameters if p.is_floating_point())
    size = 2 if half or lowest == 2 else 4  # bytes of a number that a layer computes
    residual = 2 if in_half else base.dtype.itemsize  # and of one between layers
    in_tower = {id(parameter) for parameter in tower.parameters()}
    layers = [  # the linear layers' weights
        parameter
        for name, parameter in base.named_parameters()
        if ".layers." in name and ".lora_" not in name and name.endswith("weight") and id(parameter) not in in_tower
    ]
    per_layer = sum(map(stored, layers)) // text.count
    adapters = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    quantized = any(precision(p) in _QUANTIZED.values() for p in layers)
    # Autocast converts float32 inputs for every linear layer, and LoRA makes them float32 unless its layer is quantized
    converted = size == 2 and not in_half and (residual == 4 or (adapters and not quantized))
    copies = max(len(adapters), 1) if converted else 0
    options = (size, residual, copies, any(adapter.lora_dropout for adapter in adapters), args.gradient_checkpointing)

    # The update: `rows` answers at a time, of which those to one question may share its prompt
    rows, answer = args.per_device_train_batch_size, args.max_completion_length
    prompts = _ceil(rows, args.num_generations) if shared_prefix else rows
    tokens = prompts * prompt.tokens + rows * answer
    update = text.for_backward(tokens, *options)
    if any(p.requires_grad for p in tower.parameters()):
        update += vision.for_backward(prompts * prompt.patches, *options)
    head = base.get_output_embeddings().weight
    scored = rows * answer
    update += min(scored, _TILE_POSITIONS) * _TILE_WORDS * size + scored * text.hidden * (4 + 2 * size)
    if head.requires_grad:
        update += 4 * elements(head)  # its gradient is summed in float32
    if half and not in_half:
        # Autocast makes a copy in half precision of every weight that it multiplies with. Those of trained weights are
        # kept until the end of the forward, the others until the backward of their layer
        kept = [p for p in layers if p.dtype == torch.float32 and precision(p) == "float32"]
        copies = sum(2 * elements(p) for p in kept)
        update += (
            copies if any(p.requires_grad for p in kept) or not args.gradient_checkpointing else copies // text.count
        )
    if any(precision(p) == "4-bit" for p in layers):
        update += size * max(map(elements, layers))  # one weight at a time is put back into what it is computed in

    # Generation: all images of the step, one question and then the votes for each
    images, votes = args.images_per_process, args.num_votes
    sampled = images * votes
    encoded = images if shared_prefix else sampled
    cached = encoded * prompt.tokens + sampled * answer
    room = 1.25 if shared_prefix else 1.0  # of the growing cache
    generation = int(room * cached * 2 * text.count * text.keys * size)
    generation += encoded * prompt.tokens * (text.working(size) + text.hidden * residual)
    generation += _SAMPLING_COPIES * 4 * sampled * config.get_text_config().vocab_size

    seen = encoded * prompt.patches * (vision.working(size) + 4 * vision.hidden * size)
    if sharding.weights:
        # A layer, and the next one that is fetched meanwhile
        update += 2 * per_layer
        generation += whole  # all weights are gathered to generate
    return Memory(
        weights=0 if sharding.weights_on_cpu else share(whole, sharding.weights),
        reference=0 if reference is None else share(sum(map(stored, reference.parameters())), sharding.weights),
        gradients=share(gradients, sharding.gradients) * (2 if sharding.buckets else 1),
        optimizer=None if state is None else 0 if sharding.optimizer_on_cpu else share(state, sharding.optimizer),
        vision_tower=seen,
        generation=generation,
        update=update,
    )


# --------------------------------------------------------------------------------------------------------------------
# What is printed


def describe(
    roles: RoleAdapters,
    vision: Sequence[str],
    args: EvoLMMConfig,
    prompt: Prompt,
    sharding: Sharding,
    shared_prefix: bool,
    reference: PreTrainedModel | None = None,
) -> str:
    """
    What a run trains, what is frozen and what memory it needs, for people.

    Args:
        roles ([`RoleAdapters`]):
            The model with its roles.
        vision (`Sequence[str]`):
            Names of the vision tower's modules in the model without PEFT, the tower first.
        args ([`EvoLMMConfig`]), prompt ([`Prompt`]), sharding ([`Sharding`]), shared_prefix (`bool`), reference:
            As in [`estimate`].

    Returns:
        `str`: a table.
    """
    model = roles.model
    base = base_model(model)
    tower = base.get_submodule(vision[0])
    total = sum(map(elements, model.parameters()))
    rows = [
        (role, sum(map(elements, parameters.values())), what_is_trained(parameters))
        for role, parameters in ((role, roles.parameters(role)) for role in ROLES)
    ]
    in_tower = {id(parameter) for name in vision for parameter in base.get_submodule(name).parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for name, parameters in (
        ("vision tower", [p for p in frozen if id(p) in in_tower]),
        ("language model", [p for p in frozen if id(p) not in in_tower]),
    ):
        if parameters:
            rows.append((name, sum(map(elements, parameters)), f"frozen, {_precisions(parameters)}"))
            if name == "vision tower" and any(p.requires_grad and id(p) in in_tower for p in model.parameters()):
                rows[-1] = (*rows[-1][:2], f"{rows[-1][2]}, with adapters in it")
    if args.beta != 0.0:
        of = "the frozen base" if reference is None else f"a copy of the model, {_precisions(reference.parameters())}"
        rows.append(("reference", sum(map(elements, reference.parameters())) if reference is not None else 0, of))
    lines = [f"Parameters: {total:,}"]
    lines += [f"  {name:<15}{count:>16,}  {what}" for name, count, what in rows]
    if not roles.separate:
        lines.append("  Both roles train the same weights.")
    if left_out := matched_but_left_out(model, vision):
        lines.append(
            f"  `target_modules` matches {len(left_out)} modules of {' and '.join(vision)} too, which are left out: "
            f"{last_names(left_out)}. Set freeze_vision_tower=False to train them."
        )

    reason = why_not_estimated(model)
    if reason is not None:
        return "\n".join([*lines, f"Memory is not estimated: {reason}."])
    memory = estimate(model, tower, args, prompt, sharding, shared_prefix, reference)
    answers = args.per_device_train_batch_size
    prompts = _ceil(answers, args.num_generations) if shared_prefix else answers
    images, votes = args.images_per_process, args.num_votes
    encoded = images if shared_prefix else images * votes
    length = args.max_completion_length
    optim = args.optim.value
    state = optim if memory.optimizer is not None else f"not known for {optim}, and not counted"
    layers = "layers recomputed" if args.gradient_checkpointing else "without gradient checkpointing"
    rows = [
        ("weights", memory.weights, "in main memory" if sharding.weights_on_cpu else ""),
        ("reference", memory.reference, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer or 0, "in main memory" if sharding.optimizer_on_cpu else state),
        ("vision tower", memory.vision_tower, f"forward over {encoded} x {prompt.patches:,} patches"),
        (
            "generation",
            memory.generation,
            f"keys and values of {encoded} x {prompt.tokens:,} + {images * votes} x {length} tokens",
        ),
        (
            "update",
            memory.update,
            f"activations of {prompts} x {prompt.tokens:,} + {answers} x {length} tokens, {layers}",
        ),
        ("peak", memory.peak, "the first four, and the largest of the next three"),
    ]
    lines.append(f"Estimated memory per process, in GB, {sharding.name}:")
    lines += [f"  {name:<15}{size / GB:>16.3f}  {what}".rstrip() for name, size, what in rows]
    return "\n".join(lines)


def what_is_trained(parameters: dict[str, nn.Parameter]) -> str:
    """The precision and the modules of a role's parameters, given by name."""
    modules = last_names(name.split(".lora_")[0] for name in parameters if ".lora_" in name)
    where = f"LoRA on {modules}" if modules else "weights"
    return f"trained, {_precisions(parameters.values())}: {where}"


def _precisions(parameters: Iterable[nn.Parameter]) -> str:
    """The precisions of parameters, that of most of them first."""
    counts: dict[str, int] = {}
    for parameter in parameters:
        counts[precision(parameter)] = counts.get(precision(parameter), 0) + elements(parameter)
    return " and ".join(sorted(counts, key=counts.get, reverse=True))
