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
Lets PyPI's torchvision, a CUDA build, be imported beside a torch for CPUs. Its compiled part cannot be loaded there, and its
Python part then fails on operators that nobody has declared. Here they are declared, without an implementation: resizing
and the image processors, which do not use them, then work.

`make vllm-cpu` puts this file and a `.pth` file that imports it into vLLM's environment, since vLLM imports torchvision in
several processes.
"""

import importlib.abc
import sys


class DeclareOps(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision describes them, and finds nothing."""

    def find_spec(self, name, path, target=None):
        if name != "torchvision._meta_registrations":
            return
        sys.meta_path.remove(self)
        import torch
        from torchvision.extension import _has_ops

        if not _has_ops():
            self.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].declared = self  # declarations last as long as their library


sys.meta_path.insert(0, DeclareOps())
