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

"""The client against a real vLLM server (`make vllm-cpu`, `make test-vllm`)."""

import re
import time
from pathlib import Path

import pytest
from vllm_policy import TOLERANCE, Policy

from evolmm_trl.rollout.vllm_server import VLLMError, VLLMRequest, VLLMServers
from evolmm_trl.schedule import ROLES, SOLVER


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def policy(vllm_server):
    return Policy(vllm_server.model)


@pytest.fixture
def servers(vllm_server, policy, tmp_path):
    with client(vllm_server, policy, tmp_path) as servers:
        servers.start(vllm_server.model)
        for role in ROLES:
            servers.swap(role, policy.save(role))
        yield servers


def client(vllm_server, policy, folder, uploads: bool | None = False, **kwargs) -> VLLMServers:
    """A client whose adapters the server reads where they are; with `uploads=None` they are uploaded, since it takes them."""
    settings = {"start_timeout": 600, "request_timeout": 120, **kwargs}
    servers = VLLMServers([vllm_server.url], policy.image_token_id, folder / "adapters", **settings)
    servers._servers[0].takes_uploads = uploads
    return servers


def served(servers: VLLMServers) -> set[str]:
    """The names of the adapters that the server knows."""
    return {card["id"] for card in servers._models(servers._servers[0]) if card["parent"]}


def test_log_probs_are_the_trainers_before_and_after_twenty_swaps(servers, policy):
    assert policy.largest_difference(servers) <= TOLERANCE
    for swap in range(20):
        role = ROLES[swap % 2]
        policy.move(role, 100 + swap)
        # The adapter before this one is far off, so that an answer from it would be seen
        (stale,) = servers.generate([policy.request(role, 0)])
        assert policy.difference(role, 0, stale) > 0.1
        servers.swap(role, policy.save(role))
        (fresh,) = servers.generate([policy.request(role, 0)])
        assert policy.difference(role, 0, fresh) <= TOLERANCE
    assert policy.largest_difference(servers) <= TOLERANCE
    assert [len(servers.swap_seconds[role]) for role in ROLES] == [11, 11]


def test_old_adapters_are_unloaded_and_deleted(servers, policy, tmp_path):
    names = {servers.adapters[role].name for role in ROLES}
    assert served(servers) == names
    assert {folder.name for folder in (tmp_path / "adapters").iterdir()} == names
    servers.swap(SOLVER, policy.save(SOLVER))
    assert served(servers) == {servers.adapters[role].name for role in ROLES} != names
    servers.close()
    assert not list((tmp_path / "adapters").iterdir())


def test_adapters_are_uploaded_to_a_server_that_takes_them(vllm_server, policy, tmp_path):
    with client(vllm_server, policy, tmp_path, uploads=None) as servers:
        servers.start(vllm_server.model)
        for role in (*ROLES, SOLVER):
            servers.swap(role, policy.save(role))
        roots = {card["root"] for card in servers._models(servers._servers[0]) if card["parent"]}
        assert len(roots) == 2 and not any(root.startswith(str(tmp_path)) for root in roots)
        # Off the trainer's disk
        (tmp_path / "adapters").rename(tmp_path / "elsewhere")
        assert policy.largest_difference(servers) <= TOLERANCE
        (tmp_path / "elsewhere").rename(tmp_path / "adapters")
        uploaded = Path(roots.pop()).parent
        assert len(list(uploaded.iterdir())) == 2
    assert not list(uploaded.iterdir())


def test_samples_differ_and_are_the_same_again(servers, policy):
    first, again = ([[c.ids for c in group] for group in servers.generate(policy.requests())] for _ in range(2))
    assert first == again
    assert all(len(set(map(tuple, group))) == 5 for group in first)
    (shifted,) = servers.generate([policy.request(ROLES[0], 0, samples=4, seed=12)])
    assert [c.ids for c in shifted] == first[0][1:]
    (large,) = servers.generate([policy.request(SOLVER, 0, seed=2**63 - 1)])
    assert len(large) == 5
    (greedy,), *likeliest = servers.generate(
        [policy.request(SOLVER, 0, samples=1, seed=None), policy.request(SOLVER, 0, top_k=1)]
    )
    assert {tuple(completion.ids) for completion in likeliest[0]} == {tuple(greedy.ids)}


def test_log_probs_are_those_of_what_is_sampled_from(servers, policy):
    suppressed = [*policy.suppressed, *range(0, 200)]
    (completions,) = servers.generate([policy.request(SOLVER, 0, temperature=0.7, suppress_tokens=suppressed)])
    assert not {token for completion in completions for token in completion.ids} & set(suppressed)
    assert policy.difference(SOLVER, 0, completions, temperature=0.7, suppressed=suppressed) <= TOLERANCE
    (completions,) = servers.generate([policy.request(SOLVER, 0, repetition_penalty=1.5)])
    assert policy.difference(SOLVER, 0, completions, repetition_penalty=1.5) <= TOLERANCE
    assert policy.difference(SOLVER, 0, completions) > 0.1
    (completions,) = servers.generate([policy.request(SOLVER, 0, top_k=1)])
    assert {logp for completion in completions for logp in completion.logps} == {0.0}


def test_a_completion_ends_with_the_trainers_end_tokens_alone(servers, policy):
    (free,) = servers.generate([policy.request(SOLVER, 0, eos_token_id=[])])
    assert {len(completion.ids) for completion in free} == {16}
    token = free[0].ids[3]
    (ended,) = servers.generate([policy.request(SOLVER, 0, eos_token_id=[token])])
    assert ended[0].ids == free[0].ids[: free[0].ids.index(token) + 1]


def test_a_prompt_that_the_server_reads_otherwise_is_an_error(servers, policy):
    request = policy.request(SOLVER, 0)
    other = VLLMRequest(SOLVER, request.prompt_ids, policy.request(SOLVER, 3).image, 1, 0, request.config)
    with pytest.raises(VLLMError, match=r"reads a prompt as \d+ tokens, 6 of them of the image, .* 9 of them"):
        servers.generate([other])


def test_a_rank_above_the_servers_is_said_before_anything_is_asked(vllm_server, policy, tmp_path):
    large = Policy(vllm_server.model, rank=16)
    with client(vllm_server, policy, tmp_path) as servers:
        servers.start(vllm_server.model)
        with pytest.raises(VLLMError, match="LoRA rank 16 is greater than max_lora_rank 8"):
            servers.swap(SOLVER, large.save(SOLVER))
        # and the server goes on
        servers.swap(SOLVER, policy.save(SOLVER))
        assert servers.generate([policy.request(SOLVER, 0)])


def test_another_base_model_is_warned_of(vllm_server, policy, tmp_path, caplog):
    for model in (vllm_server.model, "Qwen/Qwen2.5-VL-3B-Instruct"):
        assert "serves" not in caplog.text
        with client(vllm_server, policy, tmp_path) as servers:
            servers.start(model)
            servers.swap(SOLVER, policy.save(SOLVER))
    assert re.search(r"serves /\S+, and the trained model is Qwen/Qwen2.5-VL-3B-Instruct", caplog.text)


def test_what_a_killed_run_has_left_is_removed_and_no_more(vllm_server, policy, tmp_path):
    killed = client(vllm_server, policy, tmp_path)
    killed.start(vllm_server.model)
    killed.swap(SOLVER, policy.save(SOLVER))
    strangers = tmp_path / "adapters" / "mine"
    strangers.mkdir()
    with client(vllm_server, policy, tmp_path / "other") as other, client(vllm_server, policy, tmp_path) as next_run:
        other.swap(SOLVER, policy.save(SOLVER))
        next_run.start(vllm_server.model)
        assert served(next_run) == {other.adapters[SOLVER].name}
        assert list((tmp_path / "adapters").iterdir()) == [strangers]


def test_a_server_that_dies_in_a_rollout_and_comes_back_loses_and_doubles_nothing(vllm_server, servers, policy):
    requests = policy.requests(max_new_tokens=300, eos_token_id=[])
    expected = [[c.ids for c in group] for group in servers.generate(requests)]
    futures = [servers.submit(request) for request in requests]
    time.sleep(0.3)
    assert not all(future.done() for future in futures)
    vllm_server.kill_engine()
    vllm_server.start(wait=False)
    assert [[c.ids for c in future.result()] for future in futures] == expected
    assert servers.faults["deaths"] == 1 and servers.faults["repeated"] >= 1
    assert policy.largest_difference(servers) <= TOLERANCE


def test_a_server_that_knows_the_adapters_no_more_gets_the_current_ones(servers, policy):
    policy.move(SOLVER, 7)
    servers.swap(SOLVER, policy.save(SOLVER))
    for name in served(servers):  # as if it had been started anew between two requests
        servers._call(servers._servers[0], "POST", "/v1/unload_lora_adapter", {"lora_name": name})
    assert not served(servers)
    assert policy.largest_difference(servers) <= TOLERANCE
