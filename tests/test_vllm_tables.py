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

"""The tables of docs/vllm.md are made from the numbers beside them."""

import json
from pathlib import Path

import bench_vllm
import pytest
import vllm_measure
from bench_report import in_place


DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("block", "file", "script"), [("server", "vllm_server", vllm_measure), ("training", "vllm", bench_vllm)]
)
def test_the_documents_tables_are_those_of_the_numbers(block, file, script):
    page = (DOCS / "vllm.md").read_text()
    found = json.loads((DOCS / "benchmarks" / f"{file}.json").read_text())
    assert in_place(page, block, script.tables(found)) == page
