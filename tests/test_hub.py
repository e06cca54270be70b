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

"""Pushing to the Hub and loading from it, by `huggingface_hub` over HTTP; what strangers put there runs no code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn
from safetensors.torch import load
from tiny_models import tiny_qwen2_5_vl


TOKEN = "hf_of_alice_0123456789"
ROLES = ("adapter_model.safetensors", "proposer/adapter_model.safetensors")
pytestmark = pytest.mark.xdist_group("hub")  # one process: what is pushed is pushed once
USER = Path(__file__).parent / "hub_user.py"


def run(hub, what, folder, stdin=""):
    environment = hub.environment(folder / f"home-{what}") | {"MY_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(USER), what, str(folder)], env=environment, input=stdin, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / f"{what}.json").read_text()) | {"stdout": done.stdout, "stderr": done.stderr}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tiny_qwen2_5_vl(folder / "base")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubStandIn({TOKEN: "alice", "hf_of_bob_0123456789": "bob"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, folder):
    """What happened while four runs trained and pushed."""
    hub.lfs_size = 200  # so that `rollouts.jsonl` is uploaded as it is once it has grown large
    hub.refuse_commits = {"alice/refused"}
    log = folder / "whole" / "rollouts.jsonl"

    def hold_until_the_log_grows(sizes):
        hub.before_upload = None
        deadline = time.monotonic() + 30
        while log.stat().st_size in sizes.values() and time.monotonic() < deadline:
            time.sleep(0.05)

    hub.before_upload = hold_until_the_log_grows
    return run(hub, "push", folder)


@pytest.fixture(scope="module")
def pulled(hub, folder, pushed):
    """What another machine saw."""
    whole = hub.repos["alice/whole"].files
    hub.add("alice/base", files_of(folder / "base"), private=True)
    hub.add("lab/authors", {f"solver/{name}": whole[name] for name in ("adapter_config.json", ROLES[0])})
    hub.add("evil/pickle", {"adapter_config.json": whole["adapter_config.json"], "adapter_model.bin": b"pickle"})
    config = json.loads(whole["adapter_config.json"])
    config |= {"base_model_name_or_path": "evil/named", "revision": "main"}
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    hub.add("evil/other-base", {"adapter_config.json": json.dumps(config).encode(), ROLES[0]: whole[ROLES[0]]})
    escapes = dict.fromkeys(("../escaped", "solver/../../../escaped", "/escaped"), b"escaped")
    hub.add("evil/paths", {name: whole[name] for name in ("adapter_config.json", ROLES[0])} | escapes)
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass Evil:\n    pass\n".encode()
    classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    auto = json.dumps({"model_type": "evil", "auto_map": dict.fromkeys(classes, "evil.Evil")}).encode()
    configs = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    hub.add("evil/code", {"evil.py": code, **dict.fromkeys(configs, auto)})
    hub.requests.clear()
    return run(hub, "pull", folder, stdin="y\n" * 20)  # whatever is asked at the terminal is granted


def files_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_tensors(one: bytes, other: bytes) -> bool:
    one, other = load(one), load(other)
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def test_the_stand_in_knows_all_that_was_asked_of_it(hub, pulled):
    assert hub.unknown == []


# Pushing


def test_the_repository_is_the_output_folder(hub, folder, pushed):
    repo, local = hub.repos["alice/whole"], files_of(folder / "whole")
    assert pushed["whole"] == "alice/whole" and not repo.private
    for name in (
        *ROLES,
        "adapter_config.json",
        "proposer/adapter_config.json",
        "README.md",
        "evolmm_prompts.json",
        "rollouts.jsonl",
    ):
        assert repo.files[name] == local[name]
    assert not any(name.startswith(("checkpoint-", "_")) for name in repo.files)
    assert any(name.startswith("_report/images/") for name in local)  # which are private
    assert "processor_config.json" in repo.files
    assert 'PeftModel.from_pretrained(base, "alice/whole")' in repo.files["README.md"].decode()


@pytest.mark.parametrize("step", [2, 4])
def test_every_save_pushes_both_roles_of_that_save_with_the_card_and_the_log(hub, folder, pushed, step):
    repo, checkpoint = hub.repos["alice/whole"], folder / "whole" / f"checkpoint-{step}"
    files = repo.commits[repo.messages.index(f"Training in progress, step {step}")]
    for name in (*ROLES, "README.md", "evolmm_prompts.json"):
        assert files[name] == (checkpoint / name).read_bytes()
    log = files["rollouts.jsonl"]
    assert len(log) == json.loads((checkpoint / "evolmm_state.json").read_text())["rollout_log_bytes"]
    assert (folder / "whole" / "rollouts.jsonl").read_bytes().startswith(log)
    assert not any(name.startswith("_") or "optimizer" in name for name in files)


def test_the_log_grew_while_it_was_uploaded(hub, folder, pushed):
    assert hub.before_upload is None
    repo = hub.repos["alice/whole"]
    first = repo.commits[repo.messages.index("Training in progress, step 2")]["rollouts.jsonl"]
    assert hub.lfs_size < len(first) < len(repo.files["rollouts.jsonl"])
    assert not (folder / "whole" / "_push").exists()


def test_checkpoints_are_pushed_beside_the_model(hub, folder, pushed):
    for name, checkpoints in {
        "last": {"last-checkpoint": "checkpoint-2"},
        "all": {"checkpoint-1": "checkpoint-1", "checkpoint-2": "checkpoint-2"},
    }.items():
        files = hub.repos[f"alice/{name}"].files
        assert {path.split("/")[0] for path in files if "checkpoint" in path} == set(checkpoints)
        for there, here in checkpoints.items():
            local = files_of(folder / name / here)
            assert {path.removeprefix(f"{there}/") for path in files if path.startswith(f"{there}/")} == set(local)
            assert all(files[f"{there}/{path}"] == data for path, data in local.items())


def test_a_private_repository_is_made_private(hub, pushed):
    assert {name: repo.private for name, repo in hub.repos.items() if name in ("alice/last", "alice/all")} == {
        "alice/last": True,
        "alice/all": False,
    }


def test_a_push_that_fails_ends_no_run_and_is_said(hub, pushed):
    assert pushed["refused_ended_at"] == 2
    assert pushed["stderr"].count("A checkpoint was not pushed to alice/refused") == 1
    assert hub.repos["alice/refused"].files == {}


def test_the_token_is_in_no_file_and_no_output(hub, folder, pushed, pulled):
    assert TOKEN.encode() in json.dumps(hub.tokens).encode()  # what is searched for can be found
    for result in (pushed, pulled):
        assert TOKEN not in result["stdout"] + result["stderr"]
    assert "<HUB_TOKEN>" in pushed["stdout"]  # the configuration was printed
    files = files_of(folder)
    assert any("tfevents" in name for name in files) and "whole/training_args.bin" in files
    assert [name for name, data in files.items() if TOKEN.encode() in data] == []
    for repo in hub.repos.values():
        assert [name for files in repo.commits for name, data in files.items() if TOKEN.encode() in data] == []


# Loading


@pytest.mark.parametrize("layout", ["ours", "authors"])
def test_load_solver_reads_both_layouts_from_the_hub(pulled, layout):
    assert pulled[layout] == 0
    assert pulled["solver_is_trained"] > 1e-3


def test_the_token_reaches_the_base_model_its_processor_and_the_adapter(pulled):
    assert pulled["private"] > 1e-3  # another checkpoint, and loaded
    assert "Processor" in pulled["processor"]


def test_the_prompts_come_with_what_was_trained(pulled):
    assert pulled["prompts"] is True
    assert pulled["prompts_of_authors"] is None


@pytest.mark.parametrize("way", ["offline", "cut_off"])
def test_without_the_hub_only_prompts_that_are_known_to_be_missing_are_missing(pulled, way):
    seen = {
        adapter: pulled[f"prompts_{way}_{adapter}"] for adapter in ("lab/authors", "alice/whole", "evil/other-base")
    }
    assert seen["lab/authors"] is None
    assert "OSError: alice/whole has evolmm_prompts.json, which is not in the cache" in seen["alice/whole"]
    unknown = "Whether evil/other-base has evolmm_prompts.json is not known: "
    if way == "offline":
        assert seen["evil/other-base"] is None and f"{unknown}it is not in the cache" in pulled["stderr"]
    else:
        assert f"OSError: {unknown}" in seen["evil/other-base"] and "HF_HUB_OFFLINE=1" in seen["evil/other-base"]
    assert "is neither a folder nor a repository" in pulled[f"prompts_{way}_runs/of-nobody"]


def test_a_base_model_that_cannot_be_read_is_named(pulled):
    assert pulled["base_of_nobody"].startswith("OSError: The model 'runs/of-nobody' is no folder here (the working")
    assert "could not be read from the Hub: runs/of-nobody is not a local folder" in pulled["base_of_nobody"]


@pytest.mark.parametrize(
    "name", ["private_without_token", "private_with_another_token", "nowhere", "prompts_of_nobody"]
)
def test_what_cannot_be_read_is_said(pulled, name):
    assert "is neither a folder nor a repository on the Hub that can be read" in pulled[name]


def test_a_merged_model_from_the_hub_is_the_solver(pulled):
    assert pulled["merged"] < 1e-5


@pytest.mark.parametrize("name", ["last", "all"])
def test_a_run_resumed_from_a_checkpoint_on_the_hub_ends_as_one_that_was_not_stopped(hub, folder, pulled, name):
    resumed, whole = files_of(folder / f"{name}-resumed"), hub.repos["alice/whole"].files
    for role in ROLES:
        assert same_tensors(resumed[role], whole[role])
    assert resumed["rollouts.jsonl"] == whole["rollouts.jsonl"]


# Strangers


def asked(hub, name):
    return [path for _, path, _ in hub.requests if name in path]


def test_a_pickled_adapter_is_not_even_downloaded(hub, pulled):
    assert "adapter_model.safetensors missing" in pulled["pickle"] and "are a pickle" in pulled["pickle"]
    assert asked(hub, "evil/pickle") and not asked(hub, "adapter_model.bin")


def test_the_base_model_that_an_adapter_names_is_not_looked_up(hub, pulled):
    assert pulled["other_base"] is None
    assert "evil/other-base was trained on evil/named and is loaded on" in pulled["stderr"]
    assert not asked(hub, "evil/named")


def test_code_beside_a_model_is_neither_run_nor_downloaded_nor_asked_about(hub, folder, pulled):
    for name in ("code_of_model", "code_of_processor"):
        assert "trust_remote_code=True" in pulled[name]
    assert "[y/N]" not in pulled["stdout"]
    assert asked(hub, "evil/code") and not asked(hub, "evil.py")
    assert not (folder / "ran").exists()


def test_no_file_leaves_the_folder_it_is_downloaded_to(folder, pulled):
    assert pulled["paths"] is None
    assert "ValueError" in pulled["paths_of_all"]
    escaped = [path for path in folder.parent.rglob("escaped") if "evil" not in path.parts]
    assert not escaped and not os.path.exists("/escaped")
