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
import logging
import math
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from test_sr2se_sub_policies import picture
from tiny_models import tiny_qwen2_5_vl
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from evolmm_trl.processing import load_processor
from evolmm_trl.role_adapters import vision_modules, without_modules
from evolmm_trl.sr2se import SRDPOConfig, SRDPOTrainer, SubPolicies, SubPolicyPrompts, load_preferences


PROMPTS = SubPolicyPrompts(perception="Describe: {question}")
PAIRS = [
    {"question": "How many bars?", "chosen": "red bar", "rejected": "a red bar and a blue bar"},
    {"question": "Which bar is the tallest of all?", "chosen": "the red bar is the tallest", "rejected": "bar"},
    {"question": "What?", "chosen": "value 12", "rejected": "value 7"},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_qwen2_5_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(path):
    return load_processor(path)


@pytest.fixture
def pairs(tmp_path):
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i, pair in enumerate(PAIRS):
            picture(i).save(tmp_path / f"{i}.png")
            record = {"image_path": f"{i}.png", "ground_truth": "1", "iteration": 1, **pair}
            file.write(json.dumps(record) + "\n")
    return tmp_path / "pairs.jsonl"


def config(folder, **changes) -> SRDPOConfig:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return SRDPOConfig(output_dir=str(folder), **{**settings, **changes})


def lora(**changes) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **changes)


def trainer_of(path, processor, pairs, peft_config=None, model=None, **changes) -> SRDPOTrainer:
    return SRDPOTrainer(
        model=model if model is not None else str(path),
        args=config(pairs.parent / "out", **changes),
        train_dataset=load_preferences(pairs, processor, PROMPTS),
        processing_class=processor,
        peft_config=peft_config,
    )


def batch_of(trainer) -> dict:
    return trainer._prepare_inputs(trainer.data_collator([dict(trainer.train_dataset[i]) for i in range(3)]))


def plain_log_probs(model, processor, row, text, image) -> torch.Tensor:
    """Log-probabilities of a completion's tokens, one sequence at a time and without padding."""
    inputs = processor(text=[row["prompt"] + row[text]], images=[[image]], return_tensors="pt")
    n = len(processor.tokenizer(row[text])["input_ids"])
    with torch.no_grad():
        log_probs = model(**inputs).logits.log_softmax(-1)
    ids = inputs["input_ids"][0, -n:]
    return log_probs[0, -n - 1 : -1].gather(1, ids[:, None])[:, 0]


# The data


def test_pairs_are_read_with_the_keys_they_are_written_with(pairs, processor):
    dataset = load_preferences(pairs, processor, PROMPTS)
    assert set(dataset.column_names) == {"image", "prompt", "chosen", "rejected"}
    assert [row["chosen"] for row in dataset] == [pair["chosen"] + "<|im_end|>" for pair in PAIRS]
    assert [row["image"].tobytes() for row in dataset] == [picture(i).tobytes() for i in range(3)]


def test_the_prompt_is_the_one_the_descriptions_were_written_for(pairs, processor, path, monkeypatch):
    dataset, seen = load_preferences(pairs, processor, PROMPTS), []
    model = AutoModelForImageTextToText.from_pretrained(path)
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: seen.append(kwargs["input_ids"]) or original(**kwargs))
    policies = SubPolicies(model, processor, PROMPTS, max_perception_tokens=2)
    for i, row in enumerate(dataset):
        policies.perceive([picture(i)], [PAIRS[i]["question"]])
        inputs = processor(text=[row["prompt"]], images=[[row["image"]]], return_tensors="pt")
        assert torch.equal(inputs["input_ids"], seen[i])


def test_lines_that_cannot_be_used_are_skipped_counted_and_named(pairs, processor, caplog):
    record = json.loads(pairs.read_text().splitlines()[0])
    lines = [
        "{",
        json.dumps({**record, "image_path": "gone.png"}),
        json.dumps({**record, "rejected": record["chosen"]}),
    ]
    lines += [json.dumps({k: v for k, v in record.items() if k != "chosen"}), "3"]
    with open(pairs, "a") as file:
        file.write("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert len(load_preferences(pairs, processor, PROMPTS)) == 3
    for message in (
        "pairs.jsonl:4: broken JSON",
        "pairs.jsonl:5 ('gone.png'): missing image",
        "pairs.jsonl:7: lacks chosen",
    ):
        assert message in caplog.text


def test_images_are_read_from_their_root_alone(pairs, processor, tmp_path, monkeypatch, caplog):
    secret = tmp_path / "secret"
    secret.mkdir()
    picture(5).save(secret / "s.png")
    folder = tmp_path / "pairs"
    (folder / "sub").mkdir(parents=True)
    for name in ("0.png", "sub/1.png"):
        picture(0).save(folder / name)
    (folder / "link.png").symlink_to(secret / "s.png")
    (folder / "out").symlink_to(secret)
    (folder / "inside.png").symlink_to(folder / "0.png")
    record = json.loads(pairs.read_text().splitlines()[0])
    outside = [
        "../secret/s.png",
        "sub/../../secret/s.png",
        str(secret / "s.png"),
        "link.png",
        "out/s.png",
        "/etc/passwd",
    ]
    inside = ["0.png", "sub/1.png", "sub/../0.png", str(folder / "0.png"), "inside.png"]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({**record, "image_path": name}) + "\n" for name in [*outside, *inside])
    )
    with caplog.at_level(logging.WARNING):
        dataset = load_preferences(folder / "pairs.jsonl", processor, PROMPTS)
    assert len(dataset) == len(inside)
    assert caplog.text.count("path outside the image root; if it should be read, set `image_root`") == len(outside)
    assert "pairs.jsonl:1 ('../secret/s.png')" in caplog.text
    # A root that is given is the only one, and where relative paths start
    (folder / "pairs.jsonl").write_text(json.dumps({**record, "image_path": "s.png"}) + "\n")
    assert len(load_preferences(folder / "pairs.jsonl", processor, PROMPTS, image_root=secret)) == 1
    (folder / "pairs.jsonl").write_text(json.dumps({**record, "image_path": str(folder / "0.png")}) + "\n")
    with pytest.raises(ValueError, match="1 x path outside the image root"):
        load_preferences(folder / "pairs.jsonl", processor, PROMPTS, image_root=secret)
    # Without one, the working directory is another
    (folder / "pairs.jsonl").write_text(json.dumps({**record, "image_path": str(secret / "s.png")}) + "\n")
    monkeypatch.chdir(secret)
    assert len(load_preferences(folder / "pairs.jsonl", processor, PROMPTS)) == 1


def test_a_strangers_special_tokens_reach_no_tokenizer(pairs, processor, caplog):
    record = json.loads(pairs.read_text().splitlines()[0])
    marked = [{**record, "chosen": "a<|image_pad|>"}, {**record, "rejected": "b<|im_end|>c"}]
    with open(pairs, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*marked, {**record, "question": "How<|image_pad|> many?"}])
    dataset = load_preferences(pairs, processor, PROMPTS)
    assert [row["prompt"].count("<|image_pad|>") for row in dataset] == [1] * 4
    assert "pairs.jsonl:4: special token in chosen" in caplog.text
    assert "pairs.jsonl:5: special token in rejected" in caplog.text


def test_lines_that_no_file_should_hold_are_skipped(pairs, processor, caplog):
    record = json.loads(pairs.read_text().splitlines()[0])
    lines = ["[" * 100_000, json.dumps({**record, "chosen": "\ud800"}), json.dumps({**record, "chosen": "\U0001f600"})]
    with open(pairs, "a") as file:
        file.write("\n".join(lines))
    assert len(load_preferences(pairs, processor, PROMPTS)) == 4
    for line in (4, 5):
        assert f"pairs.jsonl:{line}: broken JSON" in caplog.text


def test_an_empty_pair_set_stops_with_the_reason(tmp_path, processor):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(ValueError, match="no preference pairs in .*files are empty"):
        load_preferences(tmp_path / "pairs.jsonl", processor)
    (tmp_path / "pairs.jsonl").write_text('{"winner": "a", "loser": "b"}\n{\n')
    with pytest.raises(ValueError, match="1 x lacks image_path, 1 x broken JSON"):
        load_preferences(tmp_path / "pairs.jsonl", processor)
    with pytest.raises(FileNotFoundError, match="nowhere/pairs.jsonl"):
        load_preferences(tmp_path / "nowhere" / "pairs.jsonl", processor)


# The loss


def test_the_image_is_in_policy_and_reference(path, processor, pairs, monkeypatch):
    """The authors' trainer is given the question alone."""
    trainer = trainer_of(path, processor, pairs)
    batch = batch_of(trainer)
    assert (batch["input_ids"] == processor.image_token_id).any(1).all()
    given = {"policy": [], "reference": []}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        original = model.forward
        monkeypatch.setattr(
            model,
            "forward",
            lambda *args, name=name, original=original, **kwargs: (
                given[name].append(kwargs) or original(*args, **kwargs)
            ),
        )
    trainer.train()
    # Before it, both have seen the batch and its negative, to check that pixels matter
    policy, reference = given["policy"][-1], given["reference"][-1]
    assert len(given["policy"]) == 3 and len(given["reference"]) == 3
    assert len(policy["pixel_values"]) == len(batch["pixel_values"])
    for name in ("pixel_values", "input_ids"):
        assert torch.equal(policy[name], reference[name])
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer._compute_loss(trainer.model, inputs, False).item() for inputs in (batch, other)]
    assert abs(losses[0] - losses[1]) > 1e-4


def make_blind(monkeypatch, model, blind=lambda: True) -> None:
    """From now on a model sees no pixels where it is to be blind."""
    original = model.forward

    def forward(*args, **kwargs):
        pixels = torch.zeros_like(kwargs["pixel_values"]) if blind() else kwargs["pixel_values"]
        return original(*args, **{**kwargs, "pixel_values": pixels})

    monkeypatch.setattr(model, "forward", forward)


def test_a_batch_whose_pixels_do_not_matter_is_refused(path, processor, pairs, monkeypatch):
    trainer = trainer_of(path, processor, pairs)
    batch = batch_of(trainer)
    with pytest.raises(ValueError, match="no `pixel_values`"):
        trainer._compute_loss(trainer.model, {k: v for k, v in batch.items() if k != "pixel_values"}, False)
    for role, model in (("reference", trainer.ref_model), ("policy", trainer.model)):
        make_blind(monkeypatch, model)
        with pytest.raises(ValueError, match=f"of the {role}: the image does not reach the loss"):
            trainer._compute_loss(trainer.model, batch, False)


@pytest.mark.parametrize("given", [False, True])
def test_a_reference_of_adapters_whose_pixels_do_not_matter_is_refused(path, processor, pairs, monkeypatch, given):
    if given:
        trainer = trainer_of(path, processor, pairs, model=with_adapter(path))
    else:
        trainer = trainer_of(path, processor, pairs, lora(init_lora_weights=False))
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    make_blind(monkeypatch, trainer.model, lambda: layer.disable_adapters or layer.active_adapters == ["ref"])
    with pytest.raises(ValueError, match="of the reference: the image does not reach the loss"):
        trainer._compute_loss(trainer.model, batch_of(trainer), False)


def test_dropout_does_not_hide_that_pixels_do_not_matter(path, processor, pairs, monkeypatch):
    trainer = trainer_of(
        path, processor, pairs, lora(lora_dropout=0.5, init_lora_weights=False), disable_dropout=False
    )
    make_blind(monkeypatch, trainer.model)
    trainer.model.train()
    with pytest.raises(ValueError, match="does not reach the loss"):
        trainer._compute_loss(trainer.model, batch_of(trainer), False)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_loss_is_that_of_the_paper_over_completion_tokens_alone(path, processor, pairs, normalized):
    """Eq. 27 to 29, from one unpadded sequence at a time; the authors score padding and prompt as well."""
    model = AutoModelForImageTextToText.from_pretrained(path)
    trainer = trainer_of(path, processor, pairs, model=model, length_normalization=normalized, beta=0.3)
    with torch.no_grad():  # the policy moves away from the reference
        generator = torch.Generator().manual_seed(0)
        for name, p in trainer.model.named_parameters():
            if "language_model" in name:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    reference = AutoModelForImageTextToText.from_pretrained(path).eval()
    policy = AutoModelForImageTextToText.from_pretrained(path).eval()
    policy.load_state_dict(trainer.model.state_dict())
    losses = []
    for i, row in enumerate(trainer.train_dataset):
        ratios = []
        for text in ("chosen", "rejected"):
            difference = plain_log_probs(policy, processor, row, text, picture(i))
            difference = difference - plain_log_probs(reference, processor, row, text, picture(i))
            ratios.append(difference.mean() if normalized else difference.sum())
        losses.append(-F.logsigmoid(0.3 * (ratios[0] - ratios[1])).item())
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, batch_of(trainer), False).item()
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-3)
    assert abs(loss - math.log(2)) > 0.01


def test_padding_and_prompt_are_never_scored(path, processor, pairs):
    batch = batch_of(trainer_of(path, processor, pairs))
    assert (batch["attention_mask"] == 0).any(), "the test needs padding"
    for i, text in enumerate(["chosen"] * 3 + ["rejected"] * 3):
        scored = batch["input_ids"][i][batch["completion_mask"][i] == 1]
        assert processor.decode(scored) == PAIRS[i % 3][text] + "<|im_end|>"


def test_a_description_that_is_cut_off_is_refused(path, processor, pairs):
    """Nothing would be scored, and the loss would stay at log 2 without a word."""
    prompt = batch_of(trainer_of(path, processor, pairs))["completion_mask"].int().argmax(1).min().item()
    trainer = trainer_of(path, processor, pairs, max_length=prompt)
    inputs = batch_of(trainer)
    with pytest.raises(ValueError, match=f"`max_length` is {prompt}, which leaves nothing"):
        trainer._compute_loss(trainer.model, inputs, False)


def test_the_winner_becomes_more_likely_than_the_loser(path, processor, pairs):
    trainer = trainer_of(path, processor, pairs, lora(), max_steps=8)
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.1


# What is trained


def test_the_reference_is_the_model_as_given(path, processor, pairs):
    model = AutoModelForImageTextToText.from_pretrained(path)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.5)  # not what stands on the disk
    trainer = trainer_of(path, processor, pairs, model=model)
    given = {name: p.clone() for name, p in model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(p, given[name]) for name, p in trainer.ref_model.state_dict().items())
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def with_adapter(path, **kwargs) -> PeftModel:
    """A model with an adapter that has been trained."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    excluded = without_modules(lora(init_lora_weights=False), vision_modules(str(path)))
    return get_peft_model(model, excluded)


def adapters(model, name) -> dict[str, torch.Tensor]:
    return {n.replace(f".{name}.", "."): p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}


def test_an_adapter_that_is_given_is_trained_on_and_its_start_is_the_reference(path, processor, pairs):
    model = with_adapter(path)
    given = adapters(model, "default")
    trainer = trainer_of(path, processor, pairs, model=model, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    kept, trained = adapters(trainer.model, "ref"), adapters(trainer.model, "default")
    assert all(torch.equal(kept[name], given[name]) for name in given)
    assert any(not torch.equal(trained[name], given[name]) for name in given)
    # Resumed it is the same run
    resumed = trainer_of(path, processor, pairs, model=with_adapter(path), max_steps=2)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert all(torch.equal(p, kept[name]) for name, p in adapters(resumed.model, "ref").items())
    for name, p in adapters(resumed.model, "default").items():
        torch.testing.assert_close(p, trained[name])


def test_an_adapter_of_a_quantized_base_is_not_rounded(tmp_path, processor, pairs):
    pytest.importorskip("bitsandbytes")
    path = tiny_qwen2_5_vl(tmp_path / "tiny", hidden=64)
    skipped = ["lm_head", *map(re.escape, vision_modules(str(path)))]
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    model = with_adapter(path, quantization_config=quantization)
    given = adapters(model, "default")
    assert any(not torch.equal(p, p.bfloat16().float()) for p in given.values())
    trainer = trainer_of(path, processor, pairs, model=model)
    for name in ("default", "ref"):
        assert all(torch.equal(p, given[n]) for n, p in adapters(trainer.model, name).items())
    trainer.train()
    assert any(not torch.equal(p, given[name]) for name, p in adapters(trainer.model, "default").items())


def test_weights_that_are_trained_in_half_precision_are_warned_of(path, processor, pairs, caplog):
    for dtype, lora_config in (("float32", None), ("bfloat16", lora()), ("bfloat16", None)):
        assert "Weights are trained in" not in caplog.text
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        trainer_of(path, processor, pairs, lora_config, model, learning_rate=5e-7)
    assert "Weights are trained in bfloat16" in caplog.text and "learning_rate=5e-07" in caplog.text


def test_full_training_leaves_the_vision_tower_unless_asked(path, processor, pairs):
    for frozen in (True, False):
        trainer = trainer_of(path, processor, pairs, freeze_vision_tower=frozen)
        before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
        trainer.train()
        moved = {name for name, p in trainer.model.state_dict().items() if not torch.equal(p, before[name])}
        assert any("language_model" in name for name in moved)
        assert any("visual" in name for name in moved) != frozen


def test_lora_stays_out_of_the_vision_tower_unless_asked(path, processor, pairs):
    for frozen in (True, False):
        trainer = trainer_of(path, processor, pairs, lora(), freeze_vision_tower=frozen)
        adapted = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert any("language_model" in name for name in adapted)
        assert any("visual" in name for name in adapted) != frozen
        trainer.train()
        with trainer.model.disable_adapter():
            base = AutoModelForImageTextToText.from_pretrained(path).state_dict()
            plain = {n.replace(".base_layer", ""): p for n, p in trainer.model.get_base_model().state_dict().items()}
            assert all(torch.equal(plain[name], p) for name, p in base.items())


def test_adapters_in_the_vision_tower_that_were_not_asked_for_are_refused(path, processor, pairs):
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["nothing"])
    with pytest.raises(ValueError, match="LoRA layers into the vision tower"):
        trainer_of(path, processor, pairs, config)


def test_a_quantized_base_is_trained_by_adapters_in_float32(tmp_path, processor, pairs):
    pytest.importorskip("bitsandbytes")
    path = tiny_qwen2_5_vl(tmp_path / "tiny", hidden=64)
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    trainer = SRDPOTrainer(
        model=str(path),
        args=config(tmp_path / "out"),
        train_dataset=load_preferences(pairs, processor, PROMPTS),
        processing_class=processor,
        quantization_config=quantization,
        peft_config=lora(),
    )
    assert isinstance(trainer.model, PeftModel) and trainer.model.get_base_model().is_loaded_in_4bit
    stored = {name: p.dtype for name, p in trainer.model.get_base_model().named_parameters()}
    assert {dtype for name, dtype in stored.items() if name.endswith("proj.base_layer.weight")} == {torch.uint8}
    assert all(dtype.is_floating_point for name, dtype in stored.items() if "visual" in name or "lm_head" in name)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())


# Settings


def test_the_defaults_are_the_papers():
    args = SRDPOConfig(output_dir="out", use_cpu=True, bf16=False)
    assert (args.beta, args.learning_rate, args.num_train_epochs) == (0.1, 5e-7, 3)
    assert args.effective_batch_size == 64
    assert (args.warmup_steps, args.weight_decay, args.max_grad_norm, args.max_length) == (0.1, 0.01, 1.0, 2048)
    assert args.lr_scheduler_type == "cosine" and args.loss_type == ["sigmoid"]
    assert SRDPOConfig(output_dir="out", use_cpu=True, bf16=False, length_normalization=True).loss_type == [
        "sigmoid_norm"
    ]


def test_settings_that_do_not_fit_are_refused(path, processor, pairs):
    with pytest.raises(ValueError, match="length_normalization"):
        SRDPOConfig(output_dir="out", use_cpu=True, bf16=False, length_normalization=True, loss_type="hinge")
    dataset = load_preferences(pairs, processor, PROMPTS).remove_columns("image")
    with pytest.raises(ValueError, match="no column `image`"):
        SRDPOTrainer(model=str(path), args=config("out"), train_dataset=dataset, processing_class=processor)


def test_a_damaged_image_is_named(pairs, processor):
    dataset = load_preferences(pairs, processor, PROMPTS)
    (pairs.parent / "1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="1.png"):
        dataset[1]
