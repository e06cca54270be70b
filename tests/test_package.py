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

import subprocess
import sys
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

import evolmm_trl


def test_importing_the_package_does_not_import_torch():
    code = "import sys, evolmm_trl; assert evolmm_trl.__all__; print('torch' in sys.modules, 'trl' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", [name for name in evolmm_trl.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name):
    assert getattr(evolmm_trl, name).__doc__.strip()
    assert name in dir(evolmm_trl)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="EvoLLMTrainer"):
        _ = evolmm_trl.EvoLLMTrainer


def test_the_installed_version_is_the_packages():
    assert evolmm_trl.__version__ == version("evolmm-trl")


def test_trl_is_pinned_to_one_minor_release_whose_private_methods_are_overridden():
    trl = next(r for r in map(Requirement, requires("evolmm-trl")) if r.name == "trl")
    assert version("trl") in trl.specifier
    assert "1.15.0" not in trl.specifier and "1.17.0" not in trl.specifier


def test_torchvision_is_not_needed():
    names = {Requirement(requirement).name for requirement in requires("evolmm-trl")}
    assert "torchvision" not in names
