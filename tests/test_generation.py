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


import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import SPECIAL_TOKENS, tiny_qwen2_5_vl, tiny_qwen3_vl
from transformers import AutoModelForImageTextToText, GenerationConfig

from evolmm_trl import RolePrompts, load_processor
from evolmm_trl.rollout.generation import SeededSampling, generate, generate_shared, sample_seed
from evolmm_trl.rollout.samples import collate_prompts, encode_prompts
from evolmm_trl.shared_prefix import install_shared_attention


LARGEST_BELOW_1 = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
# The chi-square tests below run at fixed seeds, so that they always pass or always fail. At other seeds, each would fail
# with this probability although nothing is wrong.
FALSE_ALARM_RATE = 1e-4


def chi_square_p_value(counts, probabilities):
    """The probability of counts at least as far from these probabilities, which must leave no cell nearly empty."""
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    assert expected.min() >= 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2).double(), statistic / 2).item()


def draw(scores, seeds, steps=1):
    """The tokens, of shape (rows, steps), sampled from the same scores at every step."""
    sampling = SeededSampling(seeds, steps)
    return torch.stack([sampling(None, scores).argmax(-1) for _ in range(steps)], dim=1)


def sample_at(scores, *uniforms):
    """The token that each uniform number takes."""
    scores = torch.as_tensor(scores).expand(len(uniforms), -1)
    sampling = SeededSampling([0] * len(uniforms), 1)
    sampling.uniforms = torch.tensor(uniforms)[:, None]
    return sampling(None, scores).argmax(-1).tolist()


# The sampler alone


def test_a_uniform_number_takes_the_token_at_which_the_cumulative_probability_passes_it():
    scores = torch.tensor([0.25, 0.5, 0.25]).log()
    assert sample_at(scores, 0.0, 0.24, 0.26, 0.74, 0.76, LARGEST_BELOW_1) == [0, 0, 1, 1, 2, 2]


def test_exactly_one_token_is_left_to_choose():
    scores = SeededSampling([1, 2, 3], 1)(None, torch.randn(3, 50, generator=torch.Generator().manual_seed(0)))
    assert (scores == 0).sum(-1).tolist() == [1, 1, 1]
    assert torch.isneginf(scores).sum(-1).tolist() == [49, 49, 49]


def test_tokens_are_sampled_with_their_softmax_probabilities():
    scores = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    tokens = draw(scores.expand(200, -1), [sample_seed("frequencies", row) for row in range(200)], steps=200)
    counts = torch.bincount(tokens.flatten(), minlength=12)
    assert chi_square_p_value(counts, scores.softmax(-1)) > FALSE_ALARM_RATE
    assert chi_square_p_value(counts, (scores / 1.1).softmax(-1)) < 1e-6  # 40,000 tokens tell temperatures apart


@pytest.mark.parametrize("neighbours", ["steps", "rows"])
def test_neighbouring_tokens_are_independent(neighbours):
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    seeds = [sample_seed("independence", row) for row in range(200)]
    tokens = draw(probabilities.log().expand(200, -1), seeds, steps=200)
    tokens = tokens if neighbours == "steps" else tokens.T
    pairs = torch.bincount((4 * tokens[:, :-1:2] + tokens[:, 1::2]).flatten(), minlength=16)
    assert chi_square_p_value(pairs, torch.outer(probabilities, probabilities).flatten()) > FALSE_ALARM_RATE


def test_a_row_depends_on_its_seed_and_scores_and_on_no_other_row():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    seeds = [3, 1, 4, 159]
    together = draw(scores, seeds, steps=20)
    for row in range(4):
        assert draw(scores[row : row + 1], seeds[row : row + 1], steps=20).equal(together[row : row + 1])
    assert draw(scores.flip(0), seeds[::-1], steps=20).equal(together.flip(0))
    others = torch.cat([scores[:1], torch.zeros(3, 50)])
    assert draw(others, [3, 9, 9, 9], steps=20)[0].equal(together[0])


def test_rows_with_different_seeds_differ_and_with_equal_seeds_do_not():
    one, other, same = draw(torch.zeros(3, 50), [1, 2, 1], steps=20)
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_low_precision_are_summed_in_high_precision(dtype):
    scores = torch.zeros(1, 5_000, dtype=dtype)  # in bfloat16 the sum of 1 / 5,000 stops at 0.06
    sampling = SeededSampling([0], 1)
    sampling.uniforms[:] = 0.9
    chosen = sampling(None, scores)
    assert chosen.dtype == dtype
    assert chosen.argmax(-1).item() == pytest.approx(4_500, abs=2)


@pytest.mark.parametrize("uniform", [0.0, LARGEST_BELOW_1])
@pytest.mark.parametrize("possible", [[0], [49], [0, 49], [7], [20, 21], [3, 30]])
def test_a_token_of_probability_zero_is_not_taken_at_either_end_of_the_uniform_numbers(possible, uniform):
    scores = torch.full((50,), -torch.inf)
    scores[possible] = torch.linspace(-3, 3, len(possible))
    assert sample_at(scores, uniform) == [possible[0] if uniform == 0.0 else possible[-1]]


@settings(deadline=None)
@given(
    st.lists(st.just(-torch.inf) | st.floats(-300, 300, width=32), min_size=1, max_size=40).filter(
        lambda scores: max(scores) > -torch.inf
    ),
    st.sampled_from([0.0, LARGEST_BELOW_1]) | st.floats(0, LARGEST_BELOW_1, width=32),
)
def test_a_token_of_probability_zero_is_never_taken(scores, uniform):
    (token,) = sample_at(torch.tensor(scores), uniform)
    assert torch.tensor(scores).softmax(-1)[token] > 0


def test_a_token_of_probability_zero_is_not_taken_by_a_rounding_error_of_the_sum(monkeypatch):
    # What a GPU's parallel sum does by 1e-7 (https://github.com/pytorch/pytorch/issues/21780), here by 1e-3
    cumsum = torch.Tensor.cumsum

    def parallel_cumsum(tensor, dim):
        noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1))
        return cumsum(tensor, dim) + 1e-3 * (noise - 0.5)

    scores = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    scores[torch.rand(1_000, generator=torch.Generator().manual_seed(2)) < 0.5] = -torch.inf
    monkeypatch.setattr(torch.Tensor, "cumsum", parallel_cumsum)
    tokens = sample_at(scores, *torch.linspace(0, LARGEST_BELOW_1, 1_000).tolist())
    assert torch.isfinite(scores[tokens]).all()


# Seeds


def test_a_seed_depends_on_every_part_of_its_key():
    keys = [(0, 1, "solver", "a.png", 0), (1, 1, "solver", "a.png", 0), (0, 2, "solver", "a.png", 0)]
    keys += [(0, 1, "proposer", "a.png", 0), (0, 1, "solver", "b.png", 0), (0, 1, "solver", "a.png", 1)]
    keys += [(0, 11, "solver", "a.png", 0), (0, 1, 1, "solver", "a.png", 0), ("ab", "c"), ("a", "bc"), ("\udc80",)]
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_and_their_random_numbers_are_the_same_in_another_process():
    code = """
import torch
from evolmm_trl.rollout.generation import SeededSampling, sample_seed
torch.manual_seed(7)
seed = sample_seed(42, 3, "solver", "ü.png", 1)
print(seed, SeededSampling([seed], 3).uniforms.tolist())
"""
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    seed = sample_seed(42, 3, "solver", "ü.png", 1)
    assert printed == f"{seed} {SeededSampling([seed], 3).uniforms.tolist()}\n"


# Generating with a model


@pytest.fixture(scope="module", params=[tiny_qwen2_5_vl, tiny_qwen3_vl], ids=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request, tmp_path_factory):
    path = request.param(tmp_path_factory.mktemp("tiny"))
    return AutoModelForImageTextToText.from_pretrained(path).eval(), load_processor(path)


@pytest.fixture
def model(checkpoint):
    return checkpoint[0]


@pytest.fixture(params=["generate", "generate_shared"])
def sample(request, model):
    """One completion per prompt and seed, greedy without seeds, by either path."""
    if request.param == "generate_shared":
        install_shared_attention(model)
    path = {"generate": generate, "generate_shared": generate_shared}[request.param]

    def sample(prompts, config, seeds=None):
        seeds = [None] * len(prompts) if seeds is None else seeds
        return [group[0] for group in path(model, prompts, [[seed] for seed in seeds], config)]

    return sample


@pytest.fixture
def prompts(checkpoint):
    """Three prompts of different lengths about images of different sizes."""
    questions = ["How many?", "How many red bars are there in the image?", "Which bar?"]
    images = [Image.new("RGB", size, (200, 30 * i, 0)) for i, size in enumerate([(60, 60), (90, 60), (30, 60)])]
    return encode_prompts(
        checkpoint[1], [RolePrompts(solver="{question}").solver_messages(q) for q in questions], images
    )


def config(**kwargs):
    """A configuration as TRL makes it, without an end token."""
    defaults = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
    defaults |= {"repetition_penalty": 1.0, "eos_token_id": [-1], "pad_token_id": 0, "disable_compile": True}
    return GenerationConfig(**{**defaults, **kwargs})


def logits_after(model, prompt):
    with torch.no_grad():
        return model(**collate_prompts([prompt], 0)).logits[0, -1]


def first_tokens(sample, prompt, rows=300, **kwargs):
    """What many seeds sample as the first token after one prompt."""
    seeds = [sample_seed("t", row) for row in range(rows)]
    return torch.tensor(sample([prompt] * rows, config(max_new_tokens=1, **kwargs), seeds)).flatten()


def test_without_seeds_decoding_is_greedy(model, prompts, sample):
    inputs = collate_prompts(prompts, 0)
    expected = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False))
    generated = sample(prompts, config(temperature=0.7, top_k=2, top_p=0.5, min_p=0.5))
    assert generated == expected[:, inputs["input_ids"].size(1) :].tolist()


def test_the_same_seeds_sample_the_same_tokens_and_others_do_not(prompts, sample):
    sampled = sample(prompts, config(), [1, 2, 3])
    torch.rand(5)  # the global random state has no part in it
    assert sample(prompts, config(), [1, 2, 3]) == sampled
    assert sample(prompts, config(), [4, 2, 3])[0] != sampled[0]
    assert sample(prompts, config(), [4, 2, 3])[1:] == sampled[1:]


def test_greedy_and_sampled_rows_go_together(prompts, sample):
    assert sample(prompts, config(), [None, 2, None]) == [
        *sample(prompts[:1], config()),
        *sample(prompts[1:2], config(), [2]),
        *sample(prompts[2:], config()),
    ]


def test_a_rows_tokens_do_not_depend_on_the_batch_it_is_in(prompts, sample):
    together = sample(prompts, config(), [1, 2, 3])
    assert [sample([p], config(), [seed])[0] for seed, p in enumerate(prompts, start=1)] == together
    assert sample(prompts[::-1], config(), [3, 2, 1]) == together[::-1]


@pytest.mark.parametrize("seeds", [None, [1, 2, 3]], ids=["greedy", "sampled"])
def test_the_end_token_is_kept_and_nothing_after_it(prompts, seeds, sample):
    endless = sample(prompts, config(), seeds)
    assert [len(row) for row in endless] == [8, 8, 8]
    ends = [endless[0][2], endless[1][4]]
    expected = [row[: min([row.index(end) for end in ends if end in row], default=7) + 1] for row in endless]
    assert sample(prompts, config(eos_token_id=ends), seeds) == expected
    assert len({len(row) for row in expected}) > 1
    one_end = [row[: (row.index(ends[0]) if ends[0] in row else 7) + 1] for row in endless]
    assert sample(prompts, config(eos_token_id=ends[0]), seeds) == one_end


def test_no_more_than_max_new_tokens_are_generated(prompts, sample):
    assert [len(row) for row in sample(prompts, config(max_new_tokens=5), [1, 2, 3])] == [5, 5, 5]


def test_suppressed_placeholders_are_never_sampled(checkpoint, prompts, sample):
    placeholders = checkpoint[1].tokenizer.convert_tokens_to_ids(
        [t for t in SPECIAL_TOKENS if "image" in t or "video" in t]
    )
    options = {"max_new_tokens": 16, "temperature": 3.0}
    seeds = [sample_seed("p", row) for row in range(100)]
    kept = config(**options, suppress_tokens=placeholders)
    free, suppressed = (sample(prompts[:1] * 100, c, seeds) for c in (config(**options), kept))
    assert {token for row in free for token in row} & set(placeholders)  # or this test would show nothing
    assert not {token for row in suppressed for token in row} & set(placeholders)


def test_the_models_probabilities_at_a_temperature_are_those_sampled(model, prompts, sample):
    tokens = first_tokens(sample, prompts[0], rows=3_000, temperature=0.5)
    probabilities = (logits_after(model, prompts[0]) / 0.5).softmax(-1)
    likely = probabilities.topk(4).indices
    counts = torch.stack([(tokens == token).sum() for token in likely] + [(~torch.isin(tokens, likely)).sum()])
    grouped = torch.cat([probabilities[likely], 1 - probabilities[likely].sum(0, keepdim=True)])
    assert chi_square_p_value(counts, grouped) > FALSE_ALARM_RATE


def test_top_k_leaves_the_k_likeliest_tokens(model, prompts, sample):
    tokens = first_tokens(sample, prompts[0], top_k=3)
    assert set(tokens.tolist()) == set(logits_after(model, prompts[0]).topk(3).indices.tolist())


def test_top_p_leaves_the_fewest_tokens_that_hold_p(model, prompts, sample):
    tokens = first_tokens(sample, prompts[0], temperature=0.3, top_p=0.6)
    probabilities, order = (logits_after(model, prompts[0]) / 0.3).softmax(-1).sort(descending=True)
    number = int((probabilities.cumsum(0) < 0.6).sum()) + 1
    assert 1 < number < 20
    assert set(tokens.tolist()) == set(order[:number].tolist())


def test_min_p_leaves_the_tokens_at_least_that_likely_beside_the_likeliest(model, prompts, sample):
    tokens = first_tokens(sample, prompts[0], temperature=0.5, min_p=0.3)
    probabilities = (logits_after(model, prompts[0]) / 0.5).softmax(-1)
    (left,) = torch.where(probabilities >= 0.3 * probabilities.max())
    assert 1 < len(left) < 20
    assert set(tokens.tolist()) == set(left.tolist())


def test_a_repetition_penalty_is_respected(model, prompts, sample):
    # One far below 1 is a reward: it makes the tokens with positive logits that were there before win over all others
    ids = prompts[0].input_ids
    assert logits_after(model, prompts[0])[ids].max() > 0
    sampled = sample(prompts[:1] * 20, config(max_new_tokens=4, repetition_penalty=1e-6), range(20))
    assert {token for row in sampled for token in row} <= set(ids.tolist())


def test_the_checkpoints_own_sampling_settings_have_no_part(model, prompts, monkeypatch, sample):
    expected = sample(prompts, config(), [1, 2, 3])
    own = GenerationConfig(do_sample=True, temperature=1e-6, top_k=1, top_p=0.001, repetition_penalty=1.05)
    monkeypatch.setattr(model, "generation_config", own)  # as Qwen2.5-VL's
    assert sample(prompts, config(), [1, 2, 3]) == expected
