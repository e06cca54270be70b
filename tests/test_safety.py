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

"""What strangers write runs no code here, and what is secret is not written."""

import ast
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_solver import Marker
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, config, image_dataset, lora
from torch.distributed.fsdp import StateDictType
from trl import GRPOTrainer

from evolmm_trl import EvoLMMConfig


ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("src", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe_code(source: str) -> list[str]:
    """The lines that load pickles, run text as code, or trust remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            imported = [node.module]
        unsafe = any(name.split(".")[0] in PICKLING for name in imported)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            last = name.split(".")[-1]
            unsafe |= name in ("torch.load", "torch.jit.load") and options.get("weights_only") != "True"
            unsafe |= options.get("allow_pickle", "False") != "False" or last == "read_pickle"
            unsafe |= options.get("weights_only", "True") != "True" or options.get("trust_remote_code") == "True"
            unsafe |= name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load") or name in ("eval", "exec")
        if isinstance(node, ast.arguments):
            defaults = zip(reversed([*node.posonlyargs, *node.args]), reversed(node.defaults), strict=False)
            for argument, default in (*defaults, *zip(node.kwonlyargs, node.kw_defaults, strict=True)):
                unsafe |= argument.arg == "trust_remote_code" and ast.unparse(default or ast.Constant(0)) == "True"
        if isinstance(node, ast.Dict):
            named = {ast.unparse(key) for key in node.keys if key}
            values = {
                ast.unparse(key): ast.unparse(value) for key, value in zip(node.keys, node.values, strict=True) if key
            }
            unsafe |= "'trust_remote_code'" in named and values["'trust_remote_code'"] == "True"
        if unsafe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_loads_a_pickle_or_trusts_remote_code(path):
    assert unsafe_code(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "pd.read_pickle(path)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def load(name, trust_remote_code=True): pass",
        "kwargs = {'trust_remote_code': True, **kwargs}",
    ],
)
def test_the_search_for_unsafe_code_finds_it(source):
    assert unsafe_code(source)


def test_the_search_for_unsafe_code_lets_safe_code_pass():
    assert unsafe_code("torch.load(p, weights_only=True); np.load(p); yaml.safe_load(t); f(trust_remote_code=x)") == []


# Checkpoints of strangers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "qwen2_5_vl"))


def make(base, folder, peft_config, **options):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **options}
    return TalkingTrainer(
        model=base, args=config(folder, **options), train_dataset=image_dataset(), peft_config=peft_config
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Folders of a run with adapters and of one that trains all weights."""
    folders = {}
    for name, peft_config in (("adapters", lora()), ("weights", None)):
        folders[name] = tmp_path_factory.mktemp(name)
        make(base, folders[name], peft_config, max_steps=1).train()
    return folders


@pytest.fixture
def adapters(trained, tmp_path):
    return shutil.copytree(trained["adapters"], tmp_path / "adapters") / "checkpoint-1"


@pytest.fixture
def weights(trained, tmp_path):
    return shutil.copytree(trained["weights"], tmp_path / "weights") / "checkpoint-1"


def write_pickle(path, marker, how):
    if how == "pickle":
        path.write_bytes(pickle.dumps(Marker(marker)))
    else:
        torch.save(Marker(marker), path)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_malicious_pickle_in_a_checkpoint_does_not_run(base, adapters, tmp_path, name, how):
    assert (adapters / name).is_file()
    write_pickle(adapters / name, tmp_path / "ran", how)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make(base, adapters.parent, lora()).train(resume_from_checkpoint=str(adapters))
    assert not (tmp_path / "ran").exists()
    with suppress(RuntimeError):  # of a file without tensors, when it has been executed
        torch.load(adapters / name, weights_only=False)
    assert (tmp_path / "ran").exists()  # it is malicious


def test_other_pickles_in_a_checkpoint_are_not_read(base, adapters, tmp_path):
    for name in ("training_args.bin", "adapter_model.bin", "proposer/adapter_model.bin", "pytorch_model.bin"):
        write_pickle(adapters / name, tmp_path / "ran", "pickle")
    trainer = make(base, adapters.parent, lora())
    trainer.train(resume_from_checkpoint=str(adapters))
    assert trainer.state.global_step == 2
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused_when_resuming(base, weights, tmp_path):
    (weights / "model.safetensors").unlink()
    write_pickle(weights / "pytorch_model.bin", tmp_path / "ran", "pickle")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        make(base, weights.parent, None).train(resume_from_checkpoint=str(weights))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_all_weights_leads_to_no_other_model(base, adapters, weights):
    shutil.copy(adapters / "adapter_config.json", weights)
    with pytest.raises(ValueError, match="holds adapters, but all weights are trained"):
        make(base, weights.parent, None).train(resume_from_checkpoint=str(weights))


def test_resuming_where_an_engine_reads_pickles_is_warned_of(base, adapters, monkeypatch, caplog):
    trainer = make(base, adapters.parent, lora())
    monkeypatch.setattr(GRPOTrainer, "train", lambda *args, **kwargs: None)  # the engines are not there

    def warned() -> bool:
        caplog.clear()
        trainer.train(resume_from_checkpoint=str(adapters))
        return "are read as pickles, which can run code" in caplog.text

    assert not warned()
    trainer.is_deepspeed_enabled = True
    assert warned()
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = False, True
    for state_dict_type in StateDictType:
        plugin = SimpleNamespace(state_dict_type=state_dict_type)
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
        assert warned() == (state_dict_type.name == "SHARDED_STATE_DICT")


# Secrets


def test_the_configuration_keeps_its_token_to_itself(tmp_path):
    args = config(tmp_path, hub_token="hf_secret_0123456789")
    assert args.hub_token == "hf_secret_0123456789"
    torch.save(args, tmp_path / "training_args.bin")
    assert b"learning_rate" in (tmp_path / "training_args.bin").read_bytes()
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_secret" not in text and "learning_rate" in text


def test_a_token_for_the_model_is_refused_where_it_would_be_written(tmp_path):
    with pytest.raises(ValueError, match="holds a token, which would be written to logs"):
        config(tmp_path, model_init_kwargs={"token": "hf_secret_0123456789"})


def test_remote_code_is_not_trusted_by_default(tmp_path):
    assert EvoLMMConfig(output_dir=str(tmp_path), use_cpu=True).trust_remote_code is False
