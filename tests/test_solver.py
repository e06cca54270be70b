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

"""A trained solver is loaded as what it was trained to be or not at all, and merged without losing precision."""

import json
import logging
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import lora, noise_images
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from evolmm_trl import RolePrompts, load_processor, load_solver, merge_solver


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In bfloat16, as the models of the Hub are."""
    path = tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl", hidden=64)
    AutoModelForImageTextToText.from_pretrained(path).bfloat16().save_pretrained(path)
    return str(path)


def adapter_of(base, path, config: LoraConfig):
    """An adapter that moves the logits, as if it had been trained."""
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return adapter_of(base, tmp_path_factory.mktemp("adapter") / "solver", lora(exclude_modules=r"model\.visual\..*"))


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy, to be changed."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model, processor):
    messages = RolePrompts().solver_messages("How many bars are there?")
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    with torch.no_grad():
        return model(**processor(text=[text], images=noise_images(1), return_tensors="pt")).logits


# Merging


@pytest.fixture(scope="module")
def merged(base, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_solver(base, str(trained), str(folder))
    return folder


def test_a_merged_model_answers_as_base_and_adapter_together(base, trained, merged, tmp_path):
    merge_solver(base, str(trained), str(tmp_path / "exact"), dtype=torch.float32)
    solver, processor = load_solver(base, str(trained), dtype=torch.float32)
    expected = logits(solver, processor)
    untrained = logits(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), processor)
    assert (expected - untrained).abs().max() > 0.1

    exact = AutoModelForImageTextToText.from_pretrained(tmp_path / "exact", dtype="auto")
    assert exact.dtype == torch.float32 and not exact.training
    assert torch.allclose(logits(exact, load_processor(tmp_path / "exact")), expected, atol=1e-4)
    rounded = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    error, effect = logits(rounded, load_processor(merged)) - expected, expected - untrained
    assert error.abs().mean() < 0.05 * effect.abs().mean()


def test_each_merged_weight_is_rounded_once(base, trained, merged):
    before, after = load_file(f"{base}/model.safetensors"), load_file(merged / "model.safetensors")
    adapter = load_file(trained / WEIGHTS)
    assert before.keys() == after.keys()
    changed = set()
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        prefix = "base_model.model." + name.removesuffix(".weight").replace(
            "model.layers", "model.language_model.layers"
        )
        if f"{prefix}.lora_A.weight" in adapter:
            delta = 2.0 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
            weight = (weight.float() + delta).bfloat16()
            changed.add(name)
        assert torch.equal(after[name], weight), name
    assert len(changed) == len(adapter) // 2 > 0


def test_a_merged_folder_is_a_model_and_no_adapter(merged):
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert not any(name.startswith("adapter") or name.endswith((".bin", ".pt")) for name in names)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_beside_merged_weights_is_refused(base, trained, adapter):
    with pytest.raises(ValueError, match="would apply to the merged weights again"):
        merge_solver(base, str(trained), str(adapter))


def test_merging_into_a_quantized_model_is_refused(base, trained, tmp_path):
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="is quantized"):
        merge_solver(base, str(trained), str(tmp_path / "out"), quantization_config=quantized)
    assert not (tmp_path / "out").exists()


def test_merging_into_an_embedding_that_is_the_output_layer_too_is_refused(base, tmp_path):
    tied = adapter_of(base, tmp_path / "tied", LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="it would change both"):
        merge_solver(base, str(tied), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Loading what others wrote


class Marker:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickled_adapter_is_refused(base, adapter, tmp_path):
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(ValueError, match="adapter_model.safetensors missing.*are a pickle.*never loaded"):
        load_solver(base, str(adapter))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_left_alone(base, adapter, tmp_path):
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (adapter / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    load_solver(base, str(adapter))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="holds no solver that can be loaded: adapter_config.json and adapter_model"):
        load_solver(base, str(tmp_path))


def test_a_base_model_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    with pytest.raises(
        OSError, match=r"The model 'nosuch' is no folder here \(.*could not be read from the Hub: We could"
    ):
        load_solver("nosuch")


def test_a_base_model_that_is_a_folder_is_not_said_to_be_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(OSError, match="no file named model.safetensors.*found in directory") as caught:
        load_solver(str(tmp_path))
    assert "is no folder" not in str(caught.value)


def test_a_config_that_makes_peft_import_a_module_is_refused(base, adapter, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    change_config(adapter, megatron_config={"hidden_size": 1}, megatron_core="evil")
    with pytest.raises(ValueError, match="potential security risk"):
        load_solver(base, str(adapter))
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_not_lora_is_refused(base, adapter):
    change_config(adapter, peft_type="XLORA")
    with pytest.raises(ValueError, match="is of the type XLORA; expected LORA"):
        load_solver(base, str(adapter))


def test_an_adapter_with_tensors_of_other_names_is_refused_rather_than_without_effect(base, adapter):
    tensors = load_file(adapter / WEIGHTS)
    save_file({name.replace("language_model.", ""): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit.*Found missing adapter keys.*Use the base model"):
        load_solver(base, str(adapter))


def test_an_adapter_of_another_size_is_refused_in_one_line(base, adapter):
    change_config(adapter, r=16)
    with pytest.raises(ValueError, match="does not fit.*size mismatch for .*Use the base model") as caught:
        load_solver(base, str(adapter))
    message = str(caught.value)
    assert message.count("size mismatch") == 1 and "\n" not in message and "\t" not in message
    assert str(adapter) in message and base in message


def test_an_adapter_of_layers_that_the_base_lacks_is_refused(base, adapter):
    change_config(adapter, target_modules=["query_key_value"])
    with pytest.raises(ValueError, match="does not fit.*No modules were targeted.*Use the base model"):
        load_solver(base, str(adapter))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"r": -1}, "should be a positive integer"),
        ({"r": "a"}, "not supported between"),
        ({"init_lora_weights": "\x1b[31m"}, r"init_lora_weights='\\x1b\[31m'"),
        ({"target_modules": ["layers"]}, r"Target module ModuleList\("),
    ],
)
def test_a_config_that_peft_cannot_use_is_refused_in_one_line(base, adapter, values, reason):
    change_config(adapter, **values)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{reason}.*have it saved again") as caught:
        load_solver(base, str(adapter))
    message = str(caught.value)
    assert str(adapter) in message and message.isprintable() and len(message) < 2000


def test_weights_that_were_cut_off_are_refused_with_their_name(base, adapter):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:100])
    with pytest.raises(
        ValueError, match="cannot be loaded: .*invalid header length. If it is damaged, download it again"
    ) as caught:
        load_solver(base, str(adapter))
    assert str(adapter) in str(caught.value)


def test_another_base_model_than_the_adapter_was_trained_on_is_warned_of(base, trained, adapter, caplog):
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        load_solver(base, str(trained))
        assert caplog.text == ""
        change_config(adapter, base_model_name_or_path="somebody/other")
        load_solver(base, str(adapter))
    assert f"was trained on somebody/other and is loaded on {base}" in caplog.text


def test_what_an_adapter_says_of_its_base_does_not_steer_the_terminal(base, adapter, caplog):
    change_config(adapter, base_model_name_or_path="a\x1b]0;b\x07\n\u202ec")
    with caplog.at_level(logging.WARNING, logger="evolmm_trl"):
        load_solver(base, str(adapter))
    assert "was trained on a\\x1b]0;b\\x07\\n\\u202ec and is loaded on" in caplog.text
    change_config(adapter, peft_type="\x1b[31m")
    with pytest.raises(ValueError, match=r"of the type \\x1b\[31m; expected LORA"):
        load_solver(base, str(adapter))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff\xff\xff\xff\xff", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"[]", "holds a list; expected a JSON object"),
        (b'{"peft_type": "LORA", "base_model_name_or_path": 7}', "is 7; expected a model's id or path, or null"),
        (b'{"peft_type": ["LORA"]}', r"of the type \['LORA'\]"),
    ],
)
def test_a_config_that_is_none_is_refused_with_its_name(base, adapter, content, message):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_solver(base, str(adapter))
    assert str(adapter) in str(caught.value)
