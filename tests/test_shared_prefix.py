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

"""What a group shares is computed once, and gives what the plain path gives."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_models import tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, logged, lora, noise_images, snapshot
from transformers import AutoModelForImageTextToText, GenerationConfig
from trl.trainer.utils import add_fused_lm_head

import evolmm_trl.shared_prefix
import evolmm_trl.trainer
from evolmm_trl import RolePrompts, load_processor
from evolmm_trl.role_adapters import RoleAdapters, add_role_adapter
from evolmm_trl.rollout.generation import generate, generate_shared, why_not_generated_shared
from evolmm_trl.rollout.samples import Sample, collate_samples, encode_prompts, split_evenly
from evolmm_trl.shared_prefix import (
    install_shared_attention,
    pack_groups,
    packed_logps,
    why_not_shared,
    with_features,
)


FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SIDES = (28, 32, 56, 64, 84)


class Setting:
    """A model with both adapters, TRL's LM head and the shared attention, and prompts about random images."""

    def __init__(self, folder, attention="sdpa"):
        self.folder = folder
        self.processor = load_processor(folder)
        base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        add_fused_lm_head(base, temperature=0.8, outputs=("log_probs", "entropy"))
        torch.manual_seed(0)
        options = {"target_modules": r"model\.language_model\..*_proj", "init_lora_weights": False}
        self.model = get_peft_model(base, lora(**options))
        add_role_adapter(self.model, lora(**options))
        self.roles = RoleAdapters(self.model)
        install_shared_attention(self.model)
        self.model.eval()

    def prompts(self, shapes):
        """One per image of this height and width, with texts of different lengths."""
        images = [noise_images(1, side=84, seed=i)[0].crop((0, 0, w, h)) for i, (h, w) in enumerate(shapes)]
        questions = ["What? " * (1 + 3 * i % 7) for i in range(len(images))]
        conversations = [RolePrompts().solver_messages(question) for question in questions]
        return encode_prompts(self.processor, conversations, images)

    def plain_logps(self, samples, counts):
        """TRL's way: a padded row per sample."""
        batch = collate_samples(samples, pad_token_id=0)
        width = batch["completion_ids"].size(1)
        batch["completion_mask"] *= torch.tensor(counts)[:, None]
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-width] = -100
        inputs = batch["model_inputs"]
        outputs = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **inputs)
        return outputs.log_probs[:, -width:], outputs.entropy[:, -width:]

    def gradients(self, role, logps, entropies):
        """Of a loss that weighs every token differently."""
        self.model.zero_grad()
        weights = torch.linspace(-1.0, 2.0, logps.numel()).view_as(logps)
        (weights * logps.exp() + 0.1 * weights * entropies).sum().backward()
        adapter = {"solver": ".default.", "proposer": ".proposer."}[role]
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None and adapter in n}


@pytest.fixture(scope="module")
def settings_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    makers = {"qwen2_5_vl": tiny_qwen2_5_vl, "qwen3_vl": tiny_qwen3_vl}
    return {family: Setting(str(make(folder / family))) for family, make in makers.items()}


def group_sizes():
    # Completion lengths of each group's answers
    return st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("role", ["solver", "proposer"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_log_probs_entropies_and_gradients_are_those_of_the_plain_forward(settings_of, family, role, data):
    setting = settings_of[family]
    lengths = data.draw(group_sizes(), label="completion lengths")
    shapes = data.draw(
        st.lists(st.tuples(*[st.sampled_from(SIDES)] * 2), min_size=len(lengths), max_size=len(lengths))
    )
    frozen = data.draw(st.booleans(), label="features of the frozen tower")
    checkpointing = data.draw(st.booleans(), label="gradient checkpointing")
    counts = data.draw(st.lists(st.booleans(), min_size=sum(map(len, lengths)), max_size=sum(map(len, lengths))))
    counts[0] = True
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    prompts = setting.prompts(shapes)
    if frozen:
        prompts = with_features(setting.model, prompts)
    samples = [
        Sample(prompt, torch.randint(20, 300, (length,), generator=generator), 0.0)
        for prompt, group in zip(prompts, lengths, strict=True)
        for length in group
    ]
    setting.roles.activate(role)
    setting.model.train()
    if checkpointing:
        setting.model.gradient_checkpointing_enable({"use_reentrant": False})
        setting.model.enable_input_require_grads()
    try:
        packed = pack_groups(setting.model, samples, counts)
        tokens = sum(prompt.input_ids.numel() - 1 for prompt in prompts) + sum(map(sum, lengths))
        if all(counts):
            assert packed.input_ids.size(1) == tokens  # no padding
        shared = packed_logps(setting.model, packed, entropy=True)
        shared_gradients = setting.gradients(role, *shared)
        plain = setting.plain_logps(samples, counts)
        gradients = setting.gradients(role, *plain)
    finally:
        setting.model.gradient_checkpointing_disable()
        setting.model.eval()
    assert (shared[0] - plain[0]).abs().max() < 1e-5 and (shared[1] - plain[1]).abs().max() < 1e-5
    assert plain[0].abs().max() > 1
    assert len(gradients) == 28 and shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (shared_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_see_the_other_answers_nor_other_groups(settings_of, family):
    setting = settings_of[family]
    prompts = with_features(setting.model, setting.prompts([(56, 56), (28, 84)]))
    ids = torch.randint(20, 300, (4, 6), generator=torch.Generator().manual_seed(0))
    samples = [Sample(prompts[i // 2], ids[i], 0.0) for i in range(4)]
    others = [samples[0], *(replace(sample, completion_ids=sample.completion_ids + 50) for sample in samples[1:])]
    with torch.no_grad():
        one, other = (
            packed_logps(setting.model, pack_groups(setting.model, s, [True] * 4))[0] for s in (samples, others)
        )
    assert torch.equal(one[0], other[0]) and not torch.isclose(one[1:], other[1:]).any()


def test_a_group_of_which_nothing_counts_still_runs_and_gives_zeros(settings_of):
    setting = settings_of["qwen3_vl"]
    (prompt,) = setting.prompts([(56, 56)])
    samples = [Sample(prompt, torch.arange(20, 25), 0.0)] * 2
    setting.model.zero_grad()
    setting.model.train()
    logps, entropies = packed_logps(setting.model, pack_groups(setting.model, samples, [False, False]), entropy=True)
    (logps.sum() + entropies.sum()).backward()
    setting.model.eval()
    assert logps.shape == (2, 5) and not logps.any() and not entropies.any()
    assert all(not p.grad.any() for p in setting.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_the_model_was_loaded_with_gives_way_to_packed_groups_and_is_otherwise_kept(
    settings_of, attention, tmp_path
):
    folder = settings_of["qwen2_5_vl"].folder
    setting = Setting(folder, attention)
    prompts = setting.prompts([(56, 56), (28, 84)])
    samples = [Sample(prompts[i // 2], torch.arange(20 + i, 24 + i), 0.0) for i in range(4)]
    untouched = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    types = prompts[0].token_inputs["mm_token_type_ids"]
    batch = {"input_ids": prompts[0].input_ids[None], "mm_token_type_ids": types[None]}
    with torch.no_grad(), setting.model.disable_adapter():
        seen = setting.model(**batch, **prompts[0].image_inputs).logits
        assert torch.equal(seen, untouched(**batch, **prompts[0].image_inputs).logits)
    with torch.no_grad():
        shared = packed_logps(setting.model, pack_groups(setting.model, samples, [True] * 4))[0]
        assert (shared - setting.plain_logps(samples, [True] * 4)[0]).abs().max() < 1e-5
    setting.model.get_base_model().save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


def test_a_model_that_cannot_share_says_why(settings_of, monkeypatch):
    setting = settings_of["qwen2_5_vl"]
    assert why_not_shared(setting.model) is None
    monkeypatch.setattr(setting.model.get_base_model().config.get_text_config(), "layer_types", ["sliding_attention"])
    assert why_not_shared(setting.model) == "its layers are ['sliding_attention'], not full attention alone"
    monkeypatch.setattr(evolmm_trl.shared_prefix, "FAMILIES", ("qwen3_vl",))
    assert "verified for qwen3_vl, and this model is a qwen2_5_vl" in why_not_shared(setting.model)


# Generation


def generation_config(setting, **options):
    pad = setting.processor.tokenizer.pad_token_id
    defaults = {
        "max_new_tokens": 10,
        "do_sample": True,
        "temperature": 1.0,
        "eos_token_id": [pad],
        "pad_token_id": pad,
    }
    return GenerationConfig(**{**defaults, **options})


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_tokens_are_those_of_generate(settings_of, family, data):
    """Greedy ones and, since every sample has its own random stream, sampled ones too."""
    setting = settings_of[family]
    seeds = data.draw(
        st.lists(st.lists(st.none() | st.integers(0, 2**63 - 1), min_size=1, max_size=5), min_size=1, max_size=4)
    )
    shapes = data.draw(st.lists(st.tuples(*[st.sampled_from(SIDES)] * 2), min_size=len(seeds), max_size=len(seeds)))
    prompts = setting.prompts(shapes)
    ends = data.draw(st.integers(0, 60), label="how many tokens end an answer")
    config = generation_config(
        setting,
        eos_token_id=list(range(20, 21 + ends)),
        temperature=data.draw(st.sampled_from([1.0, 0.7, 1.3])),
        top_k=data.draw(st.sampled_from([0, 20])),
        top_p=data.draw(st.sampled_from([1.0, 0.9])),
        min_p=data.draw(st.sampled_from([None, 0.02])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        suppress_tokens=[3, 4, 5],
    )
    seen = with_features(setting.model, prompts) if data.draw(st.booleans()) else prompts
    expected = generate(setting.model, prompts, seeds, config)
    assert generate_shared(setting.model, seen, seeds, config) == expected
    assert all(len(group) == len(s) for group, s in zip(expected, seeds, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_next_token_frequencies_are_those_of_generate(settings_of, family):
    """
    Two-sample chi-square tests at the second token, over 3,000 samples from each path with different seeds. At other
    seeds, one in 1,000 would fail although nothing is wrong.
    """
    setting = settings_of[family]
    prompts = setting.prompts([(56, 56)])
    config = generation_config(setting, max_new_tokens=2, temperature=0.5, top_k=6)
    shared = generate_shared(setting.model, prompts, [range(3_000)], config)[0]
    plain = generate(setting.model, prompts, [range(3_000, 6_000)], config)[0]
    counts = torch.zeros(2, 400, 400)
    for path, ids in enumerate((shared, plain)):
        for first, second in ids:
            counts[path, first, second] += 1
    table = counts.flatten(1)
    table = torch.cat([table[:, table.sum(0) >= 20], table[:, table.sum(0) < 20].sum(1, keepdim=True)], dim=1)
    table = table[:, table.sum(0) > 0].double()
    expected = table.sum(0) / 2
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = torch.tensor(table.size(1) - 1.0).double()
    assert freedom >= 8
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3
    table[0] = table[0].roll(1)  # the test tells distributions apart
    assert torch.special.gammaincc(freedom / 2, ((table - expected) ** 2 / expected).sum() / 2) < 1e-6


class TokenCount:
    """Positions that pass the first layer of the language model."""

    def __init__(self, model):
        layer = model.get_base_model().model.language_model.layers[0]
        self.calls = []
        self.hook = layer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        self.calls.append(tuple(states.shape[:2]))


def test_a_prompt_is_encoded_once_and_finished_samples_stop_costing(settings_of):
    setting = settings_of["qwen2_5_vl"]
    prompts = setting.prompts([(56, 56), (56, 56)])
    prompts[1] = prompts[0]
    width = prompts[0].input_ids.numel()
    config = generation_config(setting, max_new_tokens=30, eos_token_id=list(range(20, 60)))
    count = TokenCount(setting.model)
    ids = generate_shared(setting.model, prompts, [range(5), range(5, 10)], config)
    count.hook.remove()
    lengths = [[len(completion) for completion in group] for group in ids]
    assert count.calls[0] == (2, width)
    # At step t: as many rows as groups with a sample that goes on, as many slots as such samples in the fullest
    expected = []
    for t in range(1, max(map(max, lengths))):
        live = [sum(length > t for length in group) for group in lengths]
        expected.append((sum(n > 0 for n in live), max(live)))
    assert count.calls[1:] == expected
    assert len(set(expected)) > 4 and expected[-1][0] * expected[-1][1] < 10


def test_generation_settings_that_only_generate_follows_are_named():
    assert why_not_generated_shared(GenerationConfig(max_new_tokens=3, temperature=0.5, do_sample=True)) is None
    config = GenerationConfig(max_new_tokens=3, no_repeat_ngram_size=2, num_beams=2)
    assert "['no_repeat_ngram_size', 'num_beams']" in why_not_generated_shared(config)


# Training


def train(settings_of, folder, family="qwen2_5_vl", trainer_class=TalkingTrainer, peft_config=None, **options):
    trainer = trainer_class(
        model=settings_of[family].folder,
        args=config(folder, **{"adam_epsilon": 1e-4, **options}),
        train_dataset=image_dataset(),
        peft_config=lora() if peft_config is None else peft_config or None,
    )
    trainer.train()
    return trainer


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "loss_type": "dapo"},
        {"peft_config": False, "learning_rate": 1e-3},
        {"freeze_vision_tower": False},
        {"agreement_band": [0.0, 0.7]},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3, "proposer_update_every": 1},
        {"extra_votes": 2, "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_end_in_the_same_weights_with_everything_on_and_off(settings_of, family, options, tmp_path):
    on, off = (
        train(settings_of, tmp_path / str(shared), family, shared_prefix=shared, **options) for shared in (True, False)
    )
    assert on._share_prefix and on._share_prefill and on._sharing_verified
    assert on._share_features == options.get("freeze_vision_tower", True)
    assert not (off._share_prefix or off._share_prefill or off._share_features)
    assert on.rollout_log.path.read_text() == off.rollout_log.path.read_text()
    assert largest_difference(snapshot(on), snapshot(off)) < 1e-5
    assert logged(on, "solver/entropy") == pytest.approx(logged(off, "solver/entropy"), abs=1e-5)


class CountingTrainer(TalkingTrainer):
    """Counts the images that pass the vision tower and the processor, and the forwards of the language model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.processed, self.forwards = 0, 0, []
        tower = self.model.get_base_model().model.visual
        tower.register_forward_pre_hook(self._see, with_kwargs=True)
        self.tokens = TokenCount(self.model)
        processor = type(self.processing_class.image_processor)
        self.processing_class.image_processor.__class__ = type(
            processor.__name__, (processor,), {"__call__": self._processing(processor)}
        )

    def _see(self, module, args, kwargs):
        self.seen += len(kwargs["grid_thw"])

    def _processing(self, processor):
        def process(image_processor, images, *args, **kwargs):
            self.processed += len(images)
            return processor.__call__(image_processor, images, *args, **kwargs)

        return process


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_passes_the_processor_and_the_frozen_tower_once(settings_of, family, tmp_path):
    trainer = train(settings_of, tmp_path / "run", family, CountingTrainer, max_steps=6)
    rollouts = [json.loads(line) for line in trainer.rollout_log.path.read_text().splitlines()]
    assert len(rollouts) == 8 and trainer.state.max_steps == 6
    # The first batch of the run is compared with the plain forward, a row per answer, and that of each role with its
    # image's negative
    assert trainer.seen == 8 + 3 + 2
    assert trainer.processed == 8
    assert all(sample.prompt.features is None for sample in trainer._pending_questions)


def test_images_are_preprocessed_in_the_data_loader_s_workers(settings_of, tmp_path):
    trainer = train(settings_of, tmp_path, trainer_class=CountingTrainer, dataloader_num_workers=1)
    assert trainer.processed == 0 and len(trainer.rollout_log.path.read_text().splitlines()) == 4


def test_questions_that_wait_keep_features_and_no_pixels(settings_of, tmp_path):
    trainer = train(
        settings_of, tmp_path, max_steps=5, proposer_update_every=3
    )  # stops before the second proposer step
    assert trainer._sharing_verified and len(trainer._pending_questions) == 2
    for sample in trainer._pending_questions:
        assert "pixel_values" not in sample.prompt.image_inputs and sample.prompt.features["image"].dim() == 2


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_a_step_runs_no_forward_for_nothing(settings_of, beta, tmp_path):
    """One for the policy, one for the reference if there is a KL penalty; none for log-probs of the sampler."""
    trainer = train(settings_of, tmp_path, trainer_class=CountingTrainer, beta=beta, max_steps=2)
    trainer.tokens.calls.clear()
    trainer.state.max_steps += 1
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.args.max_completion_length = trainer.args.max_question_length = 1  # a single forward generates
    trainer.role = "solver"
    trainer._set_step_samples(trainer._roll_out(rows))
    generation = len(trainer.tokens.calls)
    assert generation == 2
    for i in range(trainer.args.gradient_accumulation_steps):
        trainer.compute_loss(trainer.model, trainer._micro_batches[i])
    parts = trainer.args.gradient_accumulation_steps
    # Without a penalty the KL is measured on the first part alone
    assert len(trainer.tokens.calls) - generation == parts + (parts if beta else 1)


def test_a_shared_forward_that_is_wrong_is_found_at_the_first_batch_and_the_plain_path_taken(
    settings_of, tmp_path, monkeypatch, caplog
):
    plain = train(settings_of, tmp_path / "plain", shared_prefix=False)
    pack = evolmm_trl.trainer.pack_groups

    def pack_wrongly(*args):
        packed = pack(*args)
        positions = packed.position_ids.clone()
        positions[..., packed.read] += 1
        return replace(packed, position_ids=positions)

    monkeypatch.setattr(evolmm_trl.trainer, "pack_groups", pack_wrongly)
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        wrong = train(settings_of, tmp_path / "wrong")
    warnings = [r.getMessage() for r in caplog.records if "does not give the plain forward's" in r.getMessage()]
    assert len(warnings) == 1 and "The plain path is taken from here on" in warnings[0]
    assert not wrong._share_prefix
    assert largest_difference(snapshot(wrong), snapshot(plain)) < 1e-5


def test_a_family_that_is_not_verified_takes_the_plain_path_and_says_so_once(
    settings_of, tmp_path, monkeypatch, caplog
):
    plain = train(settings_of, tmp_path / "plain", shared_prefix=False)
    assert not [r for r in caplog.records if "once per answer" in r.getMessage()]
    monkeypatch.setattr(evolmm_trl.shared_prefix, "FAMILIES", ("qwen3_vl",))
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        other = train(settings_of, tmp_path / "other")
    warnings = [
        r.getMessage() for r in caplog.records if "once per answer rather than once per question" in r.getMessage()
    ]
    assert len(warnings) == 1 and "this model is a qwen2_5_vl" in warnings[0]
    assert largest_difference(snapshot(other), snapshot(plain)) == 0.0


def test_generation_settings_of_the_user_s_own_take_transformers_generate(settings_of, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        trainer = train(settings_of, tmp_path, generation_kwargs={"no_repeat_ngram_size": 2}, max_completion_length=12)
    assert trainer._share_prefix and not trainer._share_prefill
    assert [r for r in caplog.records if "['no_repeat_ngram_size'] are followed by transformers" in r.getMessage()]


class PartsTrainer(TalkingTrainer):
    def _batch(self, part):
        batch = super()._batch(part)
        self.parts = [*getattr(self, "parts", []), (self.role, len(part.samples), len(batch["model_inputs"].groups))]
        return batch


def test_the_proposer_s_step_holds_as_many_prompts_at_a_time_as_the_solver_s(settings_of, tmp_path):
    trainer = train(
        settings_of,
        tmp_path,
        trainer_class=PartsTrainer,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
        proposer_update_every=2,
    )
    assert trainer.parts == [("solver", 6, 2)] * 2 + [("proposer", 2, 2)] * 2


def test_groups_stay_whole_unless_there_are_fewer_than_micro_batches():
    assert split_evenly(range(12), 3, 3) == [[0, 1, 2], [3, 4, 5], [*range(6, 12)]]
    assert split_evenly(range(6), 3, 3) == [[], [0, 1, 2], [3, 4, 5]]
    assert split_evenly(range(7), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert split_evenly([], 2, 3) == [[], []]
