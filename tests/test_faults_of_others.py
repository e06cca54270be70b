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

"""The faults that the authors' released trainer has, one section each: none of them is here."""

import json
import re
from pathlib import Path

import pytest
import torch
from charts import EVOLVE_SEEDS, chart
from datasets import Dataset
from tiny_models import tiny_qwen2_5_vl, tiny_qwen3_vl
from tiny_trainer import TalkingTrainer, Watch, config, image_dataset, logged, lora, snapshot
from transformers import AutoModelForImageTextToText, TrainerCallback

from evolmm_trl import EvoLMMTrainer, canonical_answer, checks
from evolmm_trl.rollout.samples import EncodedPrompt
from evolmm_trl.shared_prefix import PackedGroups


DEMO = Path(__file__).parents[1] / "examples" / "demo"
ADAPTER = {"solver": ".default.", "proposer": ".proposer."}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "qwen2_5_vl": str(tiny_qwen2_5_vl(folder / "qwen2_5_vl")),
        "qwen3_vl": str(tiny_qwen3_vl(folder / "qwen3_vl")),
        "room": str(DEMO / "models" / "room"),
    }


# 1. Its update forwards get no pixels: the policy gradient never sees the image


class DictatedTrainer(TalkingTrainer):
    """Both roles write what they are told, whatever they see."""

    def _generate_role(self, model, role, prompts, seeds):
        end = self.processing_class.tokenizer.eos_token_id
        return [[[20 + seed % 7, 30 + seed % 5, 40 + seed % 3, end] for seed in group] for group in seeds]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_pixels_give_other_gradients_to_both_roles_for_the_same_words(bases, family, tmp_path):
    gradients, words, images = [], [], []
    for i, seed in enumerate((0, 0, 1)):
        watch = Watch()
        trainer = DictatedTrainer(
            model=bases[family],
            args=config(tmp_path / str(i), max_steps=2, proposer_update_every=1, shuffle_dataset=False),
            train_dataset=image_dataset(seed=seed),
            peft_config=lora(),
            callbacks=[watch],
        )
        trainer.train()
        gradients.append(watch.gradients)
        records = [json.loads(line) for line in trainer.rollout_log.path.read_text().splitlines()]
        pixels = [record.pop("image_digest") for record in records]
        words.append(records)
        images.append(pixels)
    assert words[0] == words[1] == words[2]
    assert images[0] == images[1] != images[2]
    for step, role in enumerate(ADAPTER):
        names = [name for name in gradients[0][step] if ADAPTER[role] in name and "lora_B" in name]
        assert names and all(torch.equal(gradients[0][step][name], gradients[1][step][name]) for name in names)
        for name in names:
            one, other = gradients[0][step][name], gradients[2][step][name]
            assert (one - other).norm() > 0.01 * one.norm()


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("blind_role", ["solver", "proposer"])
def test_an_update_that_does_not_see_the_image_is_refused(bases, blind_role, shared_prefix, tmp_path):
    class BlindTrainer(TalkingTrainer):
        def _collate(self, *args, **kwargs):
            batch = super()._collate(*args, **kwargs)
            if self.role == blind_role:
                inputs = batch["model_inputs"]
                images = inputs.images if isinstance(inputs, PackedGroups) else inputs
                for name in ("pixel_values", "image_grid_thw", "mm_encoder_outputs"):
                    images.pop(name, None)
            return batch

    trainer = BlindTrainer(
        model=bases["qwen2_5_vl"],
        args=config(tmp_path, proposer_update_every=1, shared_prefix=shared_prefix),
        train_dataset=image_dataset(),
        peft_config=lora(),
    )
    with pytest.raises(RuntimeError, match=f"The {blind_role}'s log-probs do not change with the image"):
        trainer.train()


def test_whether_the_image_is_seen_is_asked_and_judged_on_all_processes(bases, tmp_path, monkeypatch):
    forwards = []

    class FirstTrainer(TalkingTrainer):
        def _completion_logps(self, model, batch):
            forwards.append(batch)
            return super()._completion_logps(model, batch)

        def _check_first_batch(self, samples, counts):
            for counted in ([True] * len(samples), [False] * len(samples)):
                self._sharing_verified = False
                forwards.clear()
                super()._check_first_batch(samples, counted)
                made.append(len(forwards))
            # As if another process, whose forward this one's belongs to, had found its image without effect
            monkeypatch.setattr(checks, "gather_object", lambda verdicts: [*verdicts, True])
            super()._check_first_batch(samples, counts)

    made = []
    trainer = FirstTrainer(
        model=bases["qwen2_5_vl"], args=config(tmp_path), train_dataset=image_dataset(), peft_config=lora()
    )
    with pytest.raises(RuntimeError, match="The solver's log-probs do not change with the image"):
        trainer.train()
    assert made == [4, 4]


def test_a_vision_tower_that_does_not_see_the_image_is_refused(bases, tmp_path, monkeypatch):
    trainer = TalkingTrainer(
        model=bases["qwen2_5_vl"], args=config(tmp_path), train_dataset=image_dataset(), peft_config=lora()
    )
    tower = trainer.model.get_base_model().model.visual
    look = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels, **kwargs: look(torch.zeros_like(pixels), **kwargs))
    with pytest.raises(RuntimeError, match="The solver's log-probs do not change with the image"):
        trainer.train()


# 2. Its reference is taken with `model.disable_adapter()` without `with`: the KL is that of the model with itself


class SampleKeeper(TalkingTrainer):
    """Keeps the samples of every step."""

    def _set_step_samples(self, samples):
        self.trained_on = [*getattr(self, "trained_on", []), (self.role, samples)]
        super()._set_step_samples(samples)


def log_probs(model, sample):
    """Of a sample's completion tokens, by a plain forward without padding."""
    ids = torch.cat([sample.prompt.input_ids, sample.completion_ids])[None]
    types = torch.nn.functional.pad(sample.prompt.token_inputs["mm_token_type_ids"], (0, len(sample.completion_ids)))[
        None
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=types, **sample.prompt.image_inputs).logits[0]
    logits = logits[len(sample.prompt.input_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, sample.completion_ids[:, None])[:, 0]


def merged(base, tensors, adapter, scale):
    """The base with an adapter added to its weights by hand."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    weights = dict(model.named_parameters())
    for name, a in tensors.items():
        if f"lora_A{adapter}" in name:
            target = name.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
            weights[target].data += scale * tensors[name.replace("lora_A", "lora_B")] @ a
    return model


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_kl_is_zero_at_first_then_grows_and_is_that_to_the_base(bases, family, tmp_path, monkeypatch):
    monkeypatch.setattr(EncodedPrompt, "without_pixels", lambda prompt: prompt)  # to look at the images again below
    watch = Watch()
    trainer = SampleKeeper(
        model=bases[family],
        args=config(tmp_path, max_steps=9),
        train_dataset=image_dataset(),
        peft_config=lora(),
        callbacks=[watch],
    )
    trainer.train()
    base = AutoModelForImageTextToText.from_pretrained(bases[family], dtype=torch.float32).eval()
    for role, last_step in (("solver", 7), ("proposer", 8)):
        kl = logged(trainer, f"{role}/kl")
        assert kl[0] == 0.0 and kl[-1] > 1e-3
        trained_role, samples = trainer.trained_on[last_step]
        assert trained_role == role
        policy = merged(bases[family], watch.before[last_step], ADAPTER[role], scale=2.0)
        ratios = torch.cat([log_probs(base, sample) - log_probs(policy, sample) for sample in samples])
        assert kl[-1] == pytest.approx((ratios.exp() - ratios - 1).mean().item(), abs=1e-5)


# 3. Its proposer's gradients are dropped: the adapter is switched back before backward


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_step_changes_its_role_s_adapter_and_no_other_tensor_bit_for_bit(bases, optim, tmp_path):
    watch = Watch()
    trainer = TalkingTrainer(
        model=bases["qwen2_5_vl"],
        args=config(tmp_path, max_steps=9, weight_decay=0.1, optim=optim),
        train_dataset=image_dataset(),
        peft_config=lora(),
        callbacks=[watch],
    )
    trainer.train()
    for step, (before, after) in enumerate(zip(watch.before, watch.after, strict=True)):
        role = "proposer" if step % 3 == 2 else "solver"
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        # An adapter's A has no gradient while its B is 0; weight decay alone moves it
        own = {name for name in before if ADAPTER[role] in name and (step > 2 or "lora_B" in name)}
        assert own <= moved and all(ADAPTER[role] in name for name in moved), f"step {step}, of the {role}"


def test_a_role_whose_gradients_are_dropped_is_refused(bases, tmp_path):
    class ForgetfulTrainer(TalkingTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss.detach() + 0 * sum(p.sum() for p in self.roles.parameters("solver").values())

    trainer = ForgetfulTrainer(
        model=bases["qwen2_5_vl"], args=config(tmp_path), train_dataset=image_dataset(), peft_config=lora()
    )
    with pytest.raises(RuntimeError, match="No gradient reached the solver's 28 trainable tensors"):
        trainer.train()


# 4. It re-tokenises decoded text without the end token: stopping is never trained


def watch_tokens(trainer):
    """Wraps a trainer so that it keeps the ids it samples and the ids its loss reads, by role."""
    sampled = {"solver": [], "proposer": []}
    trained = {"solver": [], "proposer": []}
    generate, collate = trainer._generate_role, trainer._batch

    def generate_role(model, role, prompts, seeds):
        ids = generate(model, role, prompts, seeds)
        sampled[role] += [completion for group in ids for completion in group]
        return ids

    def keep_batch(part):
        batch = collate(part)
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True):
            assert mask[: mask.sum()].all()
            trained[trainer.role].append(ids[mask].tolist())
        packed = batch["model_inputs"]
        if isinstance(packed, PackedGroups):  # the tokens that are scored, in the rows of the answers
            assert packed.labels[0][packed.columns[packed.counted]].tolist() == sum(
                trained[trainer.role][-len(part.samples) :], []
            )
        return batch

    trainer._generate_role, trainer._batch = generate_role, keep_batch
    return sampled, trained


def test_the_sampled_tokens_are_trained_on_with_their_end_token(bases, tmp_path):
    trainer = EvoLMMTrainer(
        model=bases["room"],
        args=config(
            tmp_path,
            max_completion_length=16,
            max_question_length=16,
            prompts=json.loads((DEMO / "prompts.json").read_text()),
        ),
        train_dataset=Dataset.from_dict({"image": [chart(seed).image() for seed in EVOLVE_SEEDS[:4]]}),
        peft_config=lora(),
    )
    sampled, trained = watch_tokens(trainer)
    trainer.train()
    end = trainer.processing_class.tokenizer.eos_token_id
    for role in ADAPTER:
        assert trained[role] == sampled[role]
        ended = [ids for ids in trained[role] if ids[-1] == end]
        assert len(ended) >= len(trained[role]) / 2
        assert all(end not in ids[:-1] for ids in trained[role])


def test_tokens_that_their_text_would_not_give_again_are_trained_on(bases, tmp_path):
    trainer = TalkingTrainer(
        model=bases["qwen2_5_vl"], args=config(tmp_path), train_dataset=image_dataset(), peft_config=lora()
    )
    sampled, trained = watch_tokens(trainer)
    trainer.train()
    assert trained == sampled
    tokenizer = trainer.processing_class.tokenizer
    again = [tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"] for ids in trained["solver"]]
    assert sum(one != other for one, other in zip(again, trained["solver"], strict=True)) > len(again) / 2


# 5. Five optimizer steps per image with a moving baseline


def test_one_optimizer_step_takes_all_samples_of_all_images(bases, tmp_path, monkeypatch):
    trainer = SampleKeeper(
        model=bases["qwen2_5_vl"],
        args=config(tmp_path, max_steps=6, gradient_accumulation_steps=4),
        train_dataset=image_dataset(),
        peft_config=lora(),
    )
    _, trained = watch_tokens(trainer)
    seen = []
    step = torch.optim.AdamW.step

    def count_and_step(*args, **kwargs):
        seen.append({role: len(ids) for role, ids in trained.items()})
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", count_and_step)
    trainer.train()
    # 4 images of 3 answers to a solver step; the questions of two rollouts to a proposer step
    assert [entry["solver"] for entry in seen] == [12, 24, 24, 36, 48, 48]
    assert [entry["proposer"] for entry in seen] == [0, 0, 8, 8, 8, 16]


def records_by_step(trainer):
    records = [json.loads(line) for line in trainer.rollout_log.path.read_text().splitlines()]
    return [[r for r in records if r["step"] == step] for step in sorted({r["step"] for r in records})]


def test_the_baseline_is_fixed_within_a_rollout_and_moves_once_after_it(bases, tmp_path):
    trainer = TalkingTrainer(
        model=bases["qwen2_5_vl"],
        args=config(tmp_path, max_steps=6, gradient_accumulation_steps=4),
        train_dataset=image_dataset(),
        peft_config=lora(),
    )
    trainer.train()
    rollouts = records_by_step(trainer)
    assert [len(rollout) for rollout in rollouts] == [4, 4, 4, 4]
    for role in ADAPTER:
        average = None
        for rollout in rollouts:
            if role == "solver":
                pairs = [(a["reward"], a["advantage"]) for record in rollout for a in record["answers"]]
            else:
                pairs = [(record["proposer_reward"], record["proposer_advantage"]) for record in rollout]
            mean = sum(reward for reward, _ in pairs) / len(pairs)
            average = mean if average is None else average
            assert [reward - advantage for reward, advantage in pairs] == pytest.approx(
                [average] * len(pairs), abs=1e-6
            )
            average = 0.9 * average + 0.1 * mean


def test_the_order_of_the_samples_does_not_matter(bases, tmp_path):
    class ReversedTrainer(TalkingTrainer):
        def _set_step_samples(self, samples):
            super()._set_step_samples(samples[::-1])

    weights = []
    for trainer_class in (TalkingTrainer, ReversedTrainer):
        trainer = trainer_class(
            model=bases["qwen2_5_vl"],
            args=config(tmp_path / trainer_class.__name__, max_steps=6, adam_epsilon=1e-4),
            train_dataset=image_dataset(),
            peft_config=lora(),
        )
        before = snapshot(trainer)
        trainer.train()
        weights.append(snapshot(trainer))
    assert max((weights[0][name] - before[name]).abs().max() for name in before) > 1e-2
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in before) < 1e-5


# 6. `vision` never matches Qwen's `visual`: its LoRA lands in the vision tower


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_vision_tower_is_frozen_and_what_is_trained_is_listed(bases, family, tmp_path, capsys):
    trainer = TalkingTrainer(
        model=bases[family], args=config(tmp_path), train_dataset=image_dataset(), peft_config=lora()
    )
    listed = capsys.readouterr().out
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 56 and all(".language_model." in name for name in trainable)
    assert not any("lora" in name for name, _ in trainer.model.named_modules() if ".visual." in name)
    for role in ADAPTER:
        count = sum(p.numel() for name, p in trainer.model.named_parameters() if ADAPTER[role] in name)
        where = "trained, float32: LoRA on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
        assert re.search(rf"  {role} +{count:,}  {where}\n", listed)
    assert re.search(r"  vision tower +[\d,]+  frozen, float32\n", listed)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_vision_tower_is_trained_when_asked_for(bases, family, tmp_path, capsys):
    trainer = TalkingTrainer(
        model=bases[family],
        args=config(tmp_path, freeze_vision_tower=False),
        train_dataset=image_dataset(),
        peft_config=lora(),
    )
    assert "  frozen, float32, with adapters in it\n" in capsys.readouterr().out
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    for adapter in ADAPTER.values():
        inside = [name for name in after if ".visual." in name and f"lora_B{adapter}" in name]
        assert inside and any(not torch.equal(after[name], before[name]) for name in inside)


def test_the_vision_tower_is_frozen_without_adapters_too(bases, tmp_path, capsys):
    trainer = TalkingTrainer(model=bases["qwen3_vl"], args=config(tmp_path), train_dataset=image_dataset())
    printed = capsys.readouterr().out
    assert re.search(r"  vision tower +[\d,]+  frozen, float32\n", printed)
    assert "Both roles train the same weights." in printed
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and not any(".visual." in name for name in moved)


# 7. Its normaliser merges answers that differ


@pytest.mark.parametrize(("one", "other"), [("-5", "5"), (".5", "5"), ("50%", "50"), ("1,2", "12"), ("-5", "-.5")])
def test_different_answers_stay_different(one, other):
    assert canonical_answer(one) != canonical_answer(other)


# 8. Resume takes the second-newest checkpoint and deletes the others


class Killed(BaseException):
    pass


class KilledTrainer(TalkingTrainer):
    """Is killed in its 11th step, after the rollout was logged, while another line is written."""

    def _set_step_samples(self, samples):
        if self.state.global_step == 10:
            with open(self.rollout_log.path, "a") as file:
                file.write('{"step": 11, "ima')
            raise Killed
        super()._set_step_samples(samples)


RESUMED = {
    "adapters": {},
    "adapters with dropout": {"lora_dropout": 0.3},
    "a stream": {"streaming": True},
    "all weights": {"peft": False, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_and_resumed_run_ends_as_the_run_that_was_never_killed(bases, case, tmp_path):
    options = dict(RESUMED[case])
    peft_config = lora(lora_dropout=options.pop("lora_dropout", 0.0)) if options.pop("peft", True) else None
    dataset = image_dataset()
    if options.pop("streaming", False):
        dataset = dataset.to_iterable_dataset()

    def make(trainer_class, folder):
        args = config(tmp_path / folder, max_steps=12, save_strategy="steps", save_steps=2, **options)
        return trainer_class(
            model=bases["qwen2_5_vl"], args=args, train_dataset=dataset, peft_config=peft_config, callbacks=[Start()]
        )

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started_at.append(state.global_step)

    started_at = []
    whole = make(TalkingTrainer, "whole")
    whole.train()
    killed = make(KilledTrainer, "killed")
    with pytest.raises(Killed):
        killed.train()
    checkpoints = sorted((tmp_path / "killed").glob("checkpoint-*"))
    files = {file: file.read_bytes() for folder in checkpoints for file in folder.rglob("*") if file.is_file()}
    resumed = make(TalkingTrainer, "killed")
    resumed.train(resume_from_checkpoint=True)

    assert started_at == [0, 0, 10]  # the newest, by number and not by name
    assert len(checkpoints) == 5 and all(file.read_bytes() == content for file, content in files.items())
    expected, weights = snapshot(whole), snapshot(resumed)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for file in ("rollouts.jsonl", "checkpoint-12/evolmm_state.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for metric in ("solver/kl", "solver/beta", "solver/baseline", "proposer/kl", "proposer/beta", "proposer/baseline"):
        assert logged(resumed, metric) == logged(whole, metric)
