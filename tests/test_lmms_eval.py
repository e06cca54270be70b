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

"""Benchmarks run through lmms-eval for real: the demo's charts, asked of base, solver and proposer."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib
import torch


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here; `make test-eval` runs these tests")

from charts import TEST_SEEDS
from evaluate import sample
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from lmms_eval.tasks import TaskManager
from make_task import make_task
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from evolmm_trl import load_processor
from evolmm_trl.cli import main
from evolmm_trl.evaluation.benchmarks import evaluate
from evolmm_trl.evaluation.lmms_eval_model import EvoLMM, _check_pixels, _conversation, _read_prompts
from evolmm_trl.evaluation.logs import read_evaluation
from evolmm_trl.prompts import RolePrompts, read_answer


DEMO = Path(__file__).parents[1] / "examples/demo"
MODEL, PROMPTS = str(DEMO / "models/room"), str(DEMO / "prompts.json")
CHARTS = 12
BENCHMARKS = "chartqa,mathvista_testmini,mathvision_testmini,mathverse_testmini,infovqa_val,ai2d,scienceqa_img,mmmu_val,pope,mmvet"

# Tasks whose score of a sample is not simply there, and questions with two images or none
OTHER_UTILS = """
from lmms_eval.verifiers.openai import OpenAIVerifier
from loguru import logger


def two(doc):
    return image(doc) * 2


def none(doc):
    return []


def parsed(doc, results):
    return {"accuracy": {"answer": doc["answer"], "parsed": results[0].strip()}}


def share(results):
    return sum(result["answer"] == result["parsed"] for result in results) / len(results)


def longest(results):
    return max(len(result["parsed"]) for result in results) / 100


def judge(doc, results):
    logger.error("The judge is out.")
    return {"accuracy": 0.0}


def verifier(doc, results):
    verifier = OpenAIVerifier(api_type="dummy", custom_prompt="{no such field}")
    return {"accuracy": verifier.verify("?", results[0], doc["answer"]).score}
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The task `charts`, and its variations."""
    folder = make_task(tmp_path_factory.mktemp("task"), TEST_SEEDS[:CHARTS])
    yaml, utils = (folder / "charts.yaml").read_text(), (folder / "utils.py").read_text()
    (folder / "other.py").write_text(OTHER_UTILS + utils)
    for name, changes in {
        "parsed": {"utils.score": "other.parsed", "aggregation: mean": "aggregation: !function other.share"},
        "no_mean": {"utils.score": "other.parsed", "aggregation: mean": "aggregation: !function other.longest"},
        "two_images": {"utils.image": "other.two"},
        "no_image": {"utils.image": "other.none"},
        "mmvet_charts": {"utils.score": "other.judge"},
        "judged": {"utils.score": "other.judge"},
        "verified": {"utils.score": "other.verifier"},
    }.items():
        text = yaml.replace("task: charts", f"task: {name}")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (folder / f"{name}.yaml").write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Adapters of both roles, each of which moves the answers in its own way."""
    folder = tmp_path_factory.mktemp("adapter")
    for seed, place in enumerate((folder, folder / "proposer")):
        config = LoraConfig(r=4, target_modules=r"model\.language_model\..*_proj")
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
        model.save_pretrained(place)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tasks):
    """The base model's evaluation."""
    folder = tmp_path_factory.mktemp("eval") / "base"
    scores = evaluate(MODEL, ["charts"], folder, include_path=tasks, prompt=PROMPTS, batch_size=8)
    return folder, scores


def samples(folder, task="charts") -> list[dict]:
    (path,) = Path(folder).rglob(f"*_samples_{task}.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def completions(folder, task="charts") -> list[str]:
    return [sample["evolmm"]["completion"] for sample in samples(folder, task)]


def greedy(tasks, model) -> list[str]:
    """What the demo's own decoder gives for the same questions."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{tasks}/charts.parquet", split="train")
    prompt = json.loads(Path(PROMPTS).read_text())["solver"]
    processor = load_processor(MODEL)
    ids = sample(
        model,
        processor,
        [row["image"] for row in rows],
        [prompt.replace("{question}", row["question"]) for row in rows],
        samples=0,
        greedy=True,
    )
    return processor.batch_decode([row for (row,) in ids], skip_special_tokens=True)


def test_base_answers_as_a_plain_decoder_and_what_is_between_the_tags_is_scored(base, tasks):
    folder, scores = base
    expected = greedy(tasks, AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval())
    assert completions(folder) == expected
    logged = samples(folder)
    assert [one["filtered_resps"] for one in logged] == [read_answer(text).text or "" for text in expected]
    right = [float(one["filtered_resps"] == one["target"]) for one in logged]
    assert [one["evolmm"]["score"] for one in logged] == right == [one["accuracy"] for one in logged]
    assert scores == {"charts": (2 * CHARTS, sum(right) / len(right))}
    assert 0.3 < scores["charts"][1] < 1


def test_questions_about_one_image_are_known_as_such(base):
    images = read_evaluation(base[0])["charts"].images
    assert len(images) == 2 * CHARTS and len(set(images)) == CHARTS
    assert images[::2] == images[1::2]


def test_commands_evaluate_and_compare_the_roles(base, tasks, adapter, tmp_path, capsys):
    from peft import PeftModel

    for role in ("solver", "proposer"):
        options = {"--model": MODEL, "--adapter": adapter, "--role": role, "--tasks": "charts", "--batch_size": "5"}
        options |= {"--include_path": tasks, "--prompt": PROMPTS, "--output_dir": str(tmp_path / role)}
        assert main(["eval", *(word for option in options.items() for word in option)]) == 0
        assert f"| charts | {2 * CHARTS} | " in capsys.readouterr().out
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
        place = adapter if role == "solver" else f"{adapter}/proposer"
        expected = greedy(tasks, PeftModel.from_pretrained(model, place).merge_and_unload().eval())
        assert completions(tmp_path / role) == expected
    assert len({tuple(completions(folder)) for folder in (base[0], tmp_path / "solver", tmp_path / "proposer")}) == 3

    assert main(["compare", f"base={base[0]}", f"solver={tmp_path / 'solver'}"]) == 0
    assert f"| charts | {2 * CHARTS} | {100 * base[1]['charts'][1]:.2f} |" in capsys.readouterr().out


def test_two_processes_share_the_questions_and_give_the_same_answers(base, tasks, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "evolmm_trl.cli", "eval"]
    command += ["--model", MODEL, "--tasks", "charts", "--include_path", tasks, "--prompt", PROMPTS, "--limit", "23"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "two")], capture_output=True, text=True, env=os.environ, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| charts | 23 |") == 1
    (results,) = (tmp_path / "two").rglob("*_results.json")
    assert json.loads(results.read_text())["evolmm"]["processes"] == 2
    assert completions(tmp_path / "two") == completions(base[0])[:23]
    images = [[one["evolmm"]["images"] for one in samples(folder)] for folder in (tmp_path / "two", base[0])]
    assert images[0] == images[1][:23]


def test_tasks_of_other_shapes(base, tasks, tmp_path, caplog):
    names = ["parsed", "no_mean", "two_images", "no_image"]
    scores = evaluate(MODEL, names, tmp_path / "out", include_path=tasks, prompt=PROMPTS, batch_size=8, limit=8)
    # A sample's score is found by the task's own aggregation, as of MMMU
    assert [one["evolmm"]["score"] for one in samples(tmp_path / "out", "parsed")] == [
        one["evolmm"]["score"] for one in samples(base[0])
    ][:8]
    # What is no mean of the samples' scores has no interval
    assert scores["no_mean"] == (8, None) and "no_mean" in caplog.text
    assert main(["compare", f"a={tmp_path / 'out'}", f"b={tmp_path / 'out'}"]) == 1
    assert [len(one["evolmm"]["images"]) for one in samples(tmp_path / "out", "two_images")] == [2] * 8
    assert [len(one["evolmm"]["images"]) for one in samples(tmp_path / "out", "no_image")] == [0] * 8


def test_a_judge_without_its_key_is_not_asked(tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="mmvet_charts: answers are judged .* OPENAI_API_KEY is not set"):
        evaluate(MODEL, ["mmvet_charts"], tmp_path / "out", include_path=tasks)


# lmms-eval's tasks log by loguru, its verifiers by `logging`
@pytest.mark.parametrize(("task", "error"), [("judged", "The judge is out"), ("verified", "OpenAI judge failed")])
def test_a_judge_that_fails_is_not_taken_for_wrong_answers_whatever_the_task(tasks, tmp_path, capsys, task, error):
    with pytest.raises(ValueError, match=f"2 errors, the first: .{error}"):
        evaluate(MODEL, [task], tmp_path / "out", include_path=tasks, limit=2)
    assert main(["compare", f"a={tmp_path / 'out'}", f"b={tmp_path / 'out'}"]) == 1
    assert "lmms-eval logged 2 errors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"role": "voter"}, "'voter'; expected 'solver' or 'proposer'"),
        ({"role": "proposer"}, "The proposer is an adapter: pass `adapter`"),
        ({"prompt": "nowhere.json"}, "expected 'task', 'solver' or a JSON file"),
    ],
)
def test_models_that_cannot_be_asked_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EvoLMM(MODEL, **kwargs)


@pytest.mark.parametrize(
    ("tasks_", "message"), [(["chartq"], "no task chartq. Did you mean .*chartqa"), ([], "No tasks")]
)
def test_tasks_that_do_not_exist_are_refused(tmp_path, tasks_, message):
    with pytest.raises(ValueError, match=message):
        evaluate(MODEL, tasks_, tmp_path / "out")


def test_a_folder_with_an_evaluation_is_not_written_to(base):
    with pytest.raises(ValueError, match="holds an evaluation already"):
        evaluate(MODEL, ["charts"], base[0])


def test_limits_of_pixels_reach_the_processor():
    lm = EvoLMM(MODEL, min_pixels=3_136, max_pixels=12_544)
    assert lm.settings["image_size"] == {"shortest_edge": 3_136, "longest_edge": 12_544}
    lm.processor.image_processor.size = {"height": 1, "width": 1}
    with pytest.raises(ValueError, match="has no `max_pixels`"):
        _check_pixels(lm.processor, None, 12_544)


def test_a_checkpoint_that_scales_images_otherwise_is_not_compared(base, tasks, tmp_path, capsys):
    merged = tmp_path / "merged"
    shutil.copytree(MODEL, merged)
    saved = json.loads((merged / "processor_config.json").read_text())
    saved["image_processor"]["size"]["longest_edge"] = 12_544
    (merged / "processor_config.json").write_text(json.dumps(saved))
    evaluate(str(merged), ["charts"], tmp_path / "out", include_path=tasks, prompt=PROMPTS, batch_size=8)
    assert main(["compare", str(base[0]), str(tmp_path / "out")]) == 1
    assert "`evolmm.image_size.longest_edge`: 7056 in" in capsys.readouterr().err


def test_the_task_asks_in_its_own_words_unless_the_solvers_prompt_is_wanted(tmp_path):
    image = Image.new("RGB", (8, 8))
    parts = [{"type": "text", "text": "In"}, {"type": "image", "url": image}, {"type": "text", "text": "how many?"}]
    task = [{"role": "user", "content": parts}]
    placed = [{"type": "text", "text": "In"}, {"type": "image"}, {"type": "text", "text": "how many?"}]
    assert _conversation(task, None) == ([{"role": "user", "content": placed}], [image])
    prompts = RolePrompts(solver="Answer {question} in tags.", system="Be brief.")
    system, user = _conversation(task, prompts)[0]
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part.get("text") for part in user["content"]] == ["Answer In", None, "how many? in tags."]
    assert _read_prompts("task", MODEL) is None and _read_prompts("solver", MODEL) == RolePrompts()
    (tmp_path / "evolmm_prompts.json").write_text(json.dumps({"solver": "{question}?"}))
    assert _read_prompts("solver", str(tmp_path)).solver == "{question}?"


def test_completions_have_room_for_the_tags_and_end_where_the_task_says():
    lm = EvoLMM(MODEL)
    assert lm._longest({"max_new_tokens": 16}) == 16
    assert lm._read("4</s> 5", {"until": ["</s>", "\n\n"]}) == "4"
    assert lm._read("4\n\n5", {"until": ["\n\n"]}) == "4\n\n5"
    lm = EvoLMM(MODEL, prompt="solver")
    assert lm._longest({"max_new_tokens": 16}) == 512
    assert (lm._read("It is <answer> 4 </answer>", {}), lm._read("It is 4", {})) == ("4", "")


def test_lmms_eval_knows_the_model_and_the_ten_benchmarks():
    project = tomllib.loads((DEMO.parents[1] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    MODEL_REGISTRY_V2.register_manifest(EntryPoint(name, value, "lmms_eval.models").load())
    assert get_model("evolmm") is EvoLMM
    assert set(BENCHMARKS.split(",")) <= set(TaskManager("ERROR").all_tasks)
