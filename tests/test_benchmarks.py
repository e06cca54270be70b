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

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import bench
import bench_contenders
import bench_gpu
import pytest
import torch
from bench_contenders import CONTENDERS, EvoLMM, Setting
from bench_meter import OTHER, FlopCounter, Meter, _PeakMemory
from bench_models import SIZES, make_config, make_model, proportions
from bench_report import GIB, Point, Result, bars, fitting_cards, tables
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration


ANSWERS, IMAGES, COMPLETION, PERIOD = 3, 2, 3, 2
TOY = Setting("tiny", 84, 84, ANSWERS, IMAGES, COMPLETION, proposer_update_every=PERIOD)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Result]:
    """Every contender, measured once at toy size."""
    point = Point(40, ANSWERS, IMAGES)
    found = bench.measure(point, TOY, list(CONTENDERS), repetitions=2, folder=tmp_path_factory.mktemp("runs"))
    return {result.contender: result for result in found}


# The counters


def test_flops_of_a_product():
    with FlopCounter() as counter:
        torch.randn(3, 4) @ torch.randn(4, 5)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5


def test_flops_of_a_product_added_in_place():
    total = torch.zeros(3, 5)
    with FlopCounter() as counter:
        total.addmm_(torch.randn(3, 4), torch.randn(4, 5))
    assert counter.get_total_flops() == 2 * 3 * 4 * 5


@pytest.mark.parametrize("masked", [False, True])
def test_flops_of_the_attention_of_the_cpu(masked):
    query = torch.randn(2, 3, 7, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 3, 9, 8, requires_grad=True)
    product = 2 * (2 * 3) * 7 * 9 * 8
    with FlopCounter() as counter:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=torch.ones(7, 9, dtype=torch.bool) if masked else None
        )
    assert "_scaled_dot_product_flash_attention_for_cpu" in str(counter.get_flop_counts())
    assert counter.get_total_flops() == 2 * product
    with FlopCounter() as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 5 * product  # the scores again, and two products for each of the forward's


def test_a_product_without_a_formula_is_an_error():
    with FlopCounter(), pytest.raises(RuntimeError, match="No formula counts the FLOPs of aten.mv"):
        torch.mv(torch.randn(3, 4), torch.randn(4))


def test_flops_of_a_known_forward():
    model, size, length = make_model(SIZES["tiny"]), SIZES["tiny"], 11
    with FlopCounter() as counter, torch.no_grad():
        model(input_ids=torch.full((1, length), 9))
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2] + [model.lm_head.weight]
    attention = size.layers * 4 * length * length * size.hidden
    assert counter.get_total_flops() == 2 * length * sum(p.numel() for p in matrices) + attention


def peak_of(work) -> int:
    memory = _PeakMemory("update", "cpu")
    held = work()
    peak = memory.stop()
    del held
    return peak


def test_peak_memory_counts_what_is_held_at_once():
    before = torch.zeros(10_000)  # 40,000 bytes, there before

    def work():
        kept = before + 1
        (before + 2).sum()  # freed again
        (before + 3).sum()
        kept.view(-1)[:5].add_(1)  # no new memory
        return kept

    assert 80_000 <= peak_of(work) < 81_000


def test_peak_memory_counts_what_the_backward_needs():
    weight = torch.randn(10_000, requires_grad=True)

    def work():
        loss = weight.exp().exp().exp().sum()  # each result is kept for the backward
        loss.backward()

    assert 120_000 < peak_of(work) < 210_000


def test_peak_memory_agrees_with_the_profiler():
    model = make_model(SIZES["tiny"])
    ids = torch.full((2, 50), 9)

    def work():
        model.zero_grad()
        model(input_ids=ids).logits.log_softmax(-1).mean().backward()

    work()
    counted = peak_of(work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert counted == pytest.approx(peak, rel=0.02)


def test_time_is_booked_to_the_innermost_stage_and_adds_up(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter("cpu")
    meter.start()
    with meter.stage("update"):
        now += 1
        with meter.stage("reference"):
            now += 5
        now += 0.5
    now += 2
    meter.stop()
    assert meter.reading.seconds == {"update": 1.5, "reference": 5, OTHER: 2}


def test_flops_are_booked_to_the_innermost_stage():
    meter, model = Meter("cpu"), make_model(SIZES["tiny"])
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    with meter.counting(model):
        meter.start()
        with meter.stage("update"):
            left @ right
            with meter.stage("reference"):
                left @ right
                left @ right
        meter.stop()
    assert {stage: flops for stage, flops in meter.reading.flops.items() if flops} == {"update": 120, "reference": 240}


def test_stages_are_measured_between_start_and_stop_only():
    meter = Meter("cpu")
    with pytest.raises(RuntimeError, match="outside `start` and `stop`"), meter.stage("update"):
        pass


def test_recomputed_tokens_are_counted_once():
    meter, model = Meter("cpu"), make_model(SIZES["tiny"])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with meter.counting(model):
        meter.start()
        model(input_ids=torch.full((2, 11), 9), use_cache=False).logits.mean().backward()
        meter.stop()
    assert meter.reading.tokens[OTHER] == 22


# The models


@pytest.mark.parametrize(("name", "parameters"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_configurations_are_those_of_qwen(name, parameters):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(make_config(SIZES[name]))
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("name", ["thin", "small", "medium"])
def test_small_models_have_the_proportions_of_3b(name):
    assert proportions(SIZES[name]) == pytest.approx(proportions(SIZES["3b"]), rel=0.02)


def test_contenders_train_the_same_model():
    one, other = make_model(SIZES["tiny"]), make_model(SIZES["tiny"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# The contenders


def test_all_see_prompts_of_the_same_length(results):
    assert len({tuple(result.prompt_tokens.items()) for result in results.values()}) == 1


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("sequential", 1 + 3 * ANSWERS),  # the question, then each answer's generation, reference and update
        ("grpo", 3 * ANSWERS),
        ("evolmm", 1),
        ("evolmm_plain", 1 + 3 * ANSWERS + 2),
    ],
)
def test_tower_passes(results, name, passes):
    assert results[name].tower_passes == passes


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_completion_has_all_its_tokens(results, name):
    generated = results[name].generated
    # The last token of a completion is drawn, and not read again by the generation
    assert generated["solve"] == ANSWERS * (COMPLETION - 1)
    assert generated["update"] == generated["reference"] == ANSWERS * COMPLETION
    assert generated.get("propose") == (None if name == "grpo" else COMPLETION - 1)
    assert ("proposer_update" in generated) == name.startswith("evolmm")


@pytest.mark.parametrize("name", ["sequential", "grpo", "evolmm_plain"])
def test_without_sharing_the_prompt_is_encoded_once_per_answer(results, name):
    result = results[name]
    for stage in ("solve", "reference", "update"):
        assert result.prompt_encoded[stage] == ANSWERS * result.prompt_tokens["solve"]


def test_with_sharing_the_prompt_is_encoded_once(results):
    result = results["evolmm"]
    prompt = result.prompt_tokens["solve"]
    assert result.prompt_encoded["solve"] == prompt
    # The last prompt token is read once per answer, and the last token of each answer not at all
    assert result.prompt_encoded["reference"] == result.prompt_encoded["update"] == prompt - 1


def test_sharing_takes_less_of_everything(results):
    shared, plain = results["evolmm"], results["evolmm_plain"]
    for stage in ("solve", "reference", "update"):
        assert shared.work(stage) < plain.work(stage)
    assert shared.update_peak["update"] < plain.update_peak["update"]
    assert shared.training_ratio("solver") < 1.05 < plain.training_ratio("solver")


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_stage_is_measured(results, name):
    result = results[name]
    stages = CONTENDERS[name].stages
    assert set(result.seconds) == {*stages, OTHER, "whole"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result.seconds.values())
    for i, whole in enumerate(result.seconds["whole"]):
        assert whole == pytest.approx(sum(result.seconds[stage][i] for stage in (*stages, OTHER)))
    assert all(result.flops[stage] > 0 for stage in stages)
    # A forward and backward takes more than a forward
    assert result.flops["update"] > 1.3 * result.flops["reference"]
    assert set(result.update_peak) == {stage for stage in stages if stage.endswith("update")}
    assert result.state_bytes > 4 * 50_000


def test_images_of_a_repetition(results):
    assert {name: result.images for name, result in results.items()} == {
        "sequential": 1,
        "grpo": IMAGES,
        "evolmm": IMAGES * PERIOD,
        "evolmm_plain": IMAGES * PERIOD,
    }


def test_a_trainer_that_no_longer_tells_its_stages_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delattr(bench_contenders._MeteredTrainer, "_timed")
    contender = EvoLMM(replace(TOY, images=1), tmp_path)
    with pytest.raises(RuntimeError, match=r"spent no time in \['propose', 'solve', 'reference', 'update'"):
        contender.read()


def test_work_of_a_first_step_is_not_counted(tmp_path):
    contender = EvoLMM(replace(TOY, images=1), tmp_path)
    with pytest.raises(RuntimeError, match="some check of a first step is still running"):
        contender.read(counting=True)


# The report


def made_up(contender: str, point: Point, **kwargs) -> Result:
    evolmm = contender == "evolmm"
    values = {
        "images": 1,
        "prompt_tokens": {"propose": 340, "solve": 290},
        "seconds": {"update": [0.5, 0.4, 0.6], "other": [0.0, 0.0, 0.0], "whole": [1.0, 0.9, 1.2]},
        "flops": {"update": 70.0, "reference": 30.0, "proposer_update": 7.0, "proposer_reference": 3.0},
        "prompt_encoded": {},
        "generated": {},
        "tower_passes": 1.0,
        "update_peak": {"update": 100, "proposer_update": 50},
        "state_bytes": 1000,
        "yardstick": {"solver": 100, "proposer": 10} if evolmm else {},
    }
    return Result(contender, point, TOY, **{**values, **kwargs})


THIN, STEP = Point(300, 5, 16, "thin"), Point(300, 5, 16)
FEW, WIDE, MANY = Point(1100, 5, 1), Point(1100, 8, 1), Point(1100, 16, 1)


def good() -> dict[str, Result]:
    slow = {"update": [5.0] * 3, "other": [0.0] * 3}
    return {
        "thin": made_up("evolmm", THIN),
        "thin sequential": made_up("sequential", THIN, seconds={**slow, "whole": [10.0, 10.0, 10.0]}),
        "thin grpo": made_up("grpo", THIN, seconds={**slow, "whole": [2.5, 2.5, 2.5]}),
        "ours": made_up("evolmm", STEP),
        "sequential": made_up("sequential", STEP, seconds={**slow, "whole": [8.0, 10.0, 90.0]}),
        "grpo": made_up("grpo", STEP, seconds={**slow, "whole": [2.5, 2.4, 2.6]}),
        "few": made_up("evolmm", FEW),
        "many": made_up("evolmm", MANY, seconds={"update": [0.75], "other": [0.0], "whole": [1.5]}),
        "wide": made_up("evolmm", WIDE),
        "grpo wide": made_up("grpo", WIDE, update_peak={"update": 250}),
    }


def test_bars_that_are_just_reached():
    assert [(bar.figure, bar.passed) for bar in bars(list(good().values()))] == [
        (pytest.approx(10), True),
        (pytest.approx(2.5), True),
        (pytest.approx(10), True),
        (pytest.approx(2.5), True),
        (pytest.approx(1.0), True),
        (pytest.approx(1.0), True),
        (1.0, True),
        (pytest.approx(1.5), True),
        (pytest.approx(1.5), True),
        (pytest.approx(0.4), True),
    ]


@pytest.mark.parametrize(
    ("bar", "name", "change"),
    [
        (0, "thin sequential", {"seconds": {"whole": [9.9]}}),
        (1, "thin grpo", {"seconds": {"whole": [2.4]}}),
        (2, "sequential", {"seconds": {"whole": [9.9]}}),
        (3, "grpo", {"seconds": {"whole": [2.4]}}),
        (4, "few", {"yardstick": {"solver": 95, "proposer": 10}}),
        (5, "few", {"yardstick": {"solver": 100, "proposer": 9}}),
        (6, "wide", {"tower_passes": 2.0}),
        (6, "wide", {"tower_passes": 0.0}),
        (7, "many", {"seconds": {"update": [0.75], "whole": [1.51]}}),
        (8, "many", {"seconds": {"update": [0.5], "proposer_update": [0.26], "whole": [1.5]}}),
        (9, "wide", {"update_peak": {"update": 100, "proposer_update": 101}}),
    ],
)
def test_a_bar_that_is_missed(bar, name, change):
    results = good()
    results[name] = replace(results[name], **change)
    assert [i for i, b in enumerate(bars(list(results.values()))) if not b.passed] == [bar]


def test_bars_that_were_not_measured():
    held = bars([good()["ours"]])
    assert [bar.passed for bar in held] == [None] * 4 + [True] * 3 + [None] * 3
    assert re.fullmatch("seconds per image of sequential over evolmm's.*: not measured", str(held[0]))
    assert str(held[6]) == "vision-tower passes per image of evolmm: 1"
    assert all(bar.passed is None for bar in bars([]))


def test_the_tables_show_both_roles_together(results):
    text = tables([results["evolmm"]])
    seconds = results["evolmm"].seconds
    update = sum(map(sum, zip(seconds["update"], seconds["proposer_update"], strict=True))) / 2
    assert f"| {update:.3f} |" in text


def test_cards_that_hold_a_model():
    assert fitting_cards(23 * GIB) == "24.0 GiB: cards of 24, 40, 80 GB"
    assert fitting_cards(23 * GIB + GIB // 2) == "24.5 GiB: cards of 40, 80 GB"
    assert fitting_cards(80 * GIB) == "81.0 GiB: none of (24, 40, 80) GB"


# The commands


def test_the_benchmark_writes_tables_and_figures(tmp_path, capsys):
    output = tmp_path / "here" / "cpu"
    bench.main(["--quick", "--points", "100,2,1", "--contenders", "grpo", "evolmm", "--output", str(output)])
    text = output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert len(re.findall(r"^- .*evolmm.*: (not measured|[\d.]+)$", text, re.MULTILINE)) == 10
    document = json.loads(output.with_suffix(".json").read_text())
    assert {"commit", "cpu", "cores", "threads", "load", "torch"} <= document["machine"].keys()
    assert document["arguments"]["completion"] == 4
    assert [result["contender"] for result in document["results"]] == ["grpo", "evolmm"]
    assert len(document["bars"]) == 10


def test_the_benchmark_of_the_gpu_runs_at_toy_size(tmp_path):
    output = tmp_path / "gpu"
    arguments = "--device cpu --model tiny --side 56 --answers 2 --images 1 --completion 3 --repetitions 1 --contenders sequential evolmm"
    found = bench_gpu.main([*arguments.split(), "--proposer_update_every", "2", "--output", str(output)])
    text = output.with_suffix(".md").read_text()
    assert re.findall(r"^- tiny, 56x56, N=2, (\w+): 1\.0 GiB: cards of 24, 40, 80 GB$", text, re.MULTILINE) == [
        "sequential",
        "evolmm",
    ]
    assert all(result.setting.dtype == "bfloat16" and result.setting.checkpointing for result in found)


def test_the_benchmark_of_the_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="No CUDA device was found"):
        bench_gpu.main([])


def test_make_runs_the_benchmarks():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target, script in (("bench", "bench.py"), ("bench-gpu", "bench_gpu.py")):
        recipe = re.search(rf"^{target}: venv\n\t(.*)$", makefile, re.MULTILINE)[1]
        assert f"benchmarks/{script} --output docs/benchmarks/" in recipe
