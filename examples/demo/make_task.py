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

"""Make a benchmark for lmms-eval of the demo's charts, to try `evolmm eval` and `evolmm compare` offline.

    python examples/demo/make_task.py runs/charts-task
    evolmm eval --model examples/demo/models/room --prompt examples/demo/prompts.json \\
        --tasks charts --include_path runs/charts-task --output_dir runs/eval/base

A task of your own looks the same: a YAML file, functions beside it, and data that `datasets` can load.
"""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

from charts import TEST_SEEDS, chart, sample_question
from datasets import Dataset, Features, Image, Value


_YAML = """\
task: charts
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.image
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: 32
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_UTILS = """\
def image(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"accuracy": float(results[0].strip() == doc["answer"])}
"""


def make_task(folder: str | Path, seeds: Iterable[int], per_image: int = 2) -> Path:
    """Writes the task `charts`: `per_image` questions about each chart."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        drawn, rng = chart(seed), random.Random(f"task {seed}")
        questions = [sample_question(drawn, rng) for _ in range(per_image)]
        rows += [{"image": drawn.image(), "question": q.text, "answer": q.answer(drawn)} for q in questions]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    data = folder / "charts.parquet"
    Dataset.from_list(rows, features=features).to_parquet(data)
    (folder / "charts.yaml").write_text(_YAML.format(data=data))
    (folder / "utils.py").write_text(_UTILS)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write it")
    parser.add_argument("--charts", type=int, default=len(TEST_SEEDS), help="how many charts (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"wrote the task `charts` to {make_task(arguments.folder, TEST_SEEDS[: arguments.charts])}")
