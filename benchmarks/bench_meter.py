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

"""Seconds, FLOPs, tokens, vision-tower passes and memory, by the stage of a training step that they are spent in."""

import re
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from evolmm_trl.role_adapters import vision_tower


OTHER = "other"  # data loading, gradient clipping, the optimizer, what the trainer does around its steps

_aten = torch.ops.aten
_MULTIPLIES = re.compile(r"attention|matmul|linear|einsum|(^|_)(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|conv\w*)(_|$)")


def _cpu_attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward_flops(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _addmm_flops(total, left, right, *args, out_shape=None, **kwargs) -> int:
    return mm_flop(left, right)


class FlopCounter(FlopCounterMode):
    """
    torch's counter, which lacks the CPU's attention kernel and products added in place. Like torch's formulas for other
    attention kernels, those added here count all pairs of positions, masked or not. An operation that multiplies and has
    no formula is an error.
    """

    def __init__(self):
        formulas = {
            _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
            _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
            _aten.addmm_: _addmm_flops,  # of TRL's LM head
        }
        super().__init__(display=False, custom_mapping=formulas)

    def _count_flops(self, func_packet, out, args, kwargs):
        if func_packet not in self.flop_registry and _MULTIPLIES.search(func_packet.__name__):
            raise RuntimeError(f"No formula counts the FLOPs of {func_packet}; add one to `FlopCounter`.")
        return super()._count_flops(func_packet, out, args, kwargs)


@dataclass
class Reading:
    """
    What one repetition took, by stage, over all its images.

    Args:
        seconds (`dict[str, float]`):
            Wall time; the stages add up to the whole.
        flops (`dict[str, int]`):
            Floating point operations of matrix products and attention.
        tokens (`dict[str, int]`):
            Tokens through the language model.
        decoded (`dict[str, int]`):
            Those of them that came after a KV cache, which are generated tokens.
        tower_images (`int`):
            Images through the vision tower.
        update_peak (`dict[str, int]`):
            Peak bytes of an update's forward and backward, above what was allocated when it began.
        reserved (`int`):
            Peak bytes that torch held on the accelerator.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    decoded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    tower_images: int = 0
    update_peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    reserved: int = 0


class Meter:
    """
    Books what happens between `start` and `stop` to the innermost stage that is open, `OTHER` if none is.

    Args:
        device (`str`):
            `"cpu"` or `"cuda"`.
    """

    def __init__(self, device: str):
        self.device = device
        self.reading = Reading()
        self._stages: list[str] = []  # the open ones; none before `start` and after `stop`
        self._counter: FlopCounter | None = None
        self._memory: _PeakMemory | None = None

    def start(self) -> None:
        self.reading = Reading()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._mark()
        self._stages = [OTHER]

    def stop(self) -> None:
        self._book()
        self._stages = []
        if self.device == "cuda":
            self.reading.reserved = torch.cuda.max_memory_reserved()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._book()
        self._stages.append(name)
        try:
            yield
        finally:
            self._book()
            self._stages.pop()
            if self._memory is not None and self._memory.stage == name:
                peak = self._memory.stop()
                self.reading.update_peak[name] = max(self.reading.update_peak[name], peak)
                self._memory = None

    def wrap(self, owner: object, method: str, stage: Callable[[], str | None]) -> None:
        """Makes every call of `owner.method` a stage of the name that `stage` returns; `None`: not a stage of its own."""
        original = getattr(owner, method)

        def measured(*args, **kwargs):
            name = stage()
            if name is None:
                return original(*args, **kwargs)
            with self.stage(name):
                return original(*args, **kwargs)

        setattr(owner, method, measured)

    def watch_memory(self) -> None:
        """While counting: takes the peak memory from here to the end of the stage."""
        if self._counter is not None:
            self._memory = _PeakMemory(self._stages[-1], self.device)

    @contextmanager
    def counting(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the context all that is not time is measured too, which slows everything down."""
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what building the model took
        _, tower = vision_tower(model)
        layer = model.get_decoder().layers[0]
        hooks = [
            tower.register_forward_pre_hook(self._count_images, with_kwargs=True),
            layer.register_forward_pre_hook(self._count_tokens, with_kwargs=True),
        ]
        try:
            with FlopCounter() as self._counter:
                yield
        finally:
            self._counter = None
            for hook in hooks:
                hook.remove()

    def _mark(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._time = time.perf_counter()
        self._flops = self._counter.get_total_flops() if self._counter is not None else 0

    def _book(self) -> None:
        if not self._stages:
            raise RuntimeError("Nothing is measured outside `start` and `stop`.")
        time_before, flops_before = self._time, self._flops
        self._mark()
        self.reading.seconds[self._stages[-1]] += self._time - time_before
        self.reading.flops[self._stages[-1]] += self._flops - flops_before

    def _count_images(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._stages:
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]  # (images, 3)
            self.reading.tower_images += grid.size(0)

    def _count_tokens(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # What gradient checkpointing computes again within the backward is no other token
        if self._stages and torch._C._current_graph_task_id() == -1:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # (rows, positions, hidden)
            self.reading.tokens[self._stages[-1]] += hidden.size(0) * hidden.size(1)
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                self.reading.decoded[self._stages[-1]] += hidden.size(0) * hidden.size(1)


class _PeakMemory(TorchDispatchMode):
    """
    Peak of what torch allocates while this mode is on, in bytes. On the CPU, which keeps no statistics, it is that of the
    tensors that operations return, for as long as anything holds them; what an operation needs within itself is left out.
    """

    def __init__(self, stage: str, device: str):
        super().__init__()
        self.stage = stage
        self.device = device
        if device == "cuda":
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._known = WeakIdKeyDictionary()  # storages
            self._now = self._peak = 0
            self.__enter__()

    def stop(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        self.__exit__(None, None, None)
        return self._peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage not in self._known:
                self._known[storage] = True
                self._now += storage.nbytes()
                self._peak = max(self._peak, self._now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self._now -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
