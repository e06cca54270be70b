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

"""The client of vLLM servers against stand-ins: what goes wrong, and what is checked."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_gemma3, tiny_qwen2_5_vl, tiny_qwen3_vl
from transformers import GenerationConfig
from vllm_stand_in import END_TOKEN, IMAGE_TOKEN, VLLMStandIn, error

from evolmm_trl.processing import load_processor
from evolmm_trl.rollout import vllm_server
from evolmm_trl.rollout.samples import encode_prompts
from evolmm_trl.rollout.vllm_server import (
    ServedAdapter,
    VLLMError,
    VLLMRequest,
    VLLMServers,
    image_url,
    one_image_token,
    seen_image,
)


PROMPT = [1, 2, *[IMAGE_TOKEN] * 4, 3]
# As long as the stand-ins' completions
CONFIG = GenerationConfig(
    max_new_tokens=4, eos_token_id=[END_TOKEN], suppress_tokens=[IMAGE_TOKEN], top_k=0, do_sample=True
)


def request(
    image: str = "data:a", role: str = "solver", seed: int | None = 0, samples: int = 3, **settings
) -> VLLMRequest:
    config = GenerationConfig.from_dict({**CONFIG.to_dict(), **settings})
    return VLLMRequest(role, PROMPT, image, samples, seed, config)


def save(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")


def watch(stand_in, see) -> None:
    """Has `see` called with every address that the server is asked for, before it answers."""
    respond = stand_in.respond
    stand_in.respond = lambda path, body: (see(path), respond(path, body))[1]


def ids(completions) -> list[list[int]]:
    return [completion.ids for completion in completions]


EXPECTED = [[100, END_TOKEN], [101, END_TOKEN], [102, END_TOKEN]]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm_server, "_POLL", 0.02)
    monkeypatch.setattr(vllm_server, "_DYING", 0.05)


@pytest.fixture
def stand_ins():
    servers = [VLLMStandIn(), VLLMStandIn()]
    yield servers
    for server in servers:
        server.die()


@pytest.fixture
def connect(tmp_path):
    """Clients of stand-ins, with the roles' adapters loaded."""
    clients = []

    def connect(*stand_ins, start=True, **kwargs) -> VLLMServers:
        settings = {"start_timeout": 20, "request_timeout": 20, **kwargs}
        urls = [stand_in.url for stand_in in stand_ins]
        clients.append(VLLMServers(urls, IMAGE_TOKEN, tmp_path / "adapters", **settings))
        if start:
            clients[-1].start("base")
            for role in ("solver", "proposer"):
                clients[-1].swap(role, save)
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


# ----------------------------------------------------------------------------------------------------------------
# Requests


def test_a_request_holds_one_image_token_and_every_setting_of_the_config(stand_ins, connect):
    servers = connect(stand_ins[0])
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    (completions,) = servers.generate([request(seed=5, **settings)])
    assert ids(completions) == [[105 + k, END_TOKEN] for k in range(3)]
    assert {logp for completion in completions for logp in completion.logps} == {-1.5}
    (body,) = stand_ins[0].asked
    assert body["token_ids"] == [1, 2, IMAGE_TOKEN, 3]
    assert body["content_parts"] == [{"type": "image_url", "url": "data:a"}]
    assert body["model"] == servers.adapters["solver"].name
    expected = {"n": 3, "seed": 5, "max_tokens": 4, "stop_token_ids": [END_TOKEN], "ignore_eos": True, "logprobs": 0}
    expected |= {"logit_bias": {str(IMAGE_TOKEN): -100.0}, "detokenize": False}
    assert body["sampling_params"] == {**settings, **expected}


def test_what_a_server_cannot_do_is_refused(stand_ins, connect):
    servers = connect(stand_ins[0])
    with pytest.raises(ValueError, match="cannot be asked for this: .*num_beams"):
        servers.submit(request(num_beams=2))
    with pytest.raises(ValueError, match="no image token"):
        servers.submit(VLLMRequest("solver", [1, 2], "data:a", 1, 0, CONFIG))
    with pytest.raises(ValueError, match="samples=2; expected 1 or more, and 1 for greedy"):
        servers.submit(request(seed=None, samples=2))
    with pytest.raises(ValueError, match="The judge has no adapter"):
        servers.submit(request(role="judge"))


def test_an_images_requests_go_to_one_server_and_images_are_spread(stand_ins, connect):
    servers = connect(*stand_ins)
    barrier = threading.Barrier(8)  # all are in flight at once, or this times out

    def together(server, body):
        barrier.wait(20)
        return 200, server.completed(body)

    for stand_in in stand_ins:
        stand_in.faults = [together] * 4
    images = [f"data:{i}" for i in range(8)]
    servers.generate([request(image) for image in images])
    assert [len(stand_in.asked) for stand_in in stand_ins] == [4, 4]
    servers.generate([request(image, role="proposer") for image in images for _ in range(2)])
    places = [{body["content_parts"][0]["url"] for body in stand_in.asked} for stand_in in stand_ins]
    assert not places[0] & places[1]


def test_images_that_come_one_by_one_are_spread_too(stand_ins, connect):
    servers = connect(*stand_ins)
    images = [f"data:{i}" for i in range(40)]
    for image in images:
        servers.generate([request(image)])
    asked = [[body["content_parts"][0]["url"] for body in stand_in.asked] for stand_in in stand_ins]
    assert min(map(len, asked)) > 5
    # Another process sends an image to the server that has it already
    other = connect(*stand_ins, start=False)
    other.adapters = dict(servers.adapters)
    for image in images:
        other.generate([request(image, role="proposer")])
    assert all(
        {body["content_parts"][0]["url"] for body in s.asked} == set(a) for s, a in zip(stand_ins, asked, strict=True)
    )


def test_one_server_can_be_asked(stand_ins, connect):
    servers = connect(*stand_ins)
    for url, stand_in in zip(servers.urls, stand_ins, strict=True):
        servers.submit(request(), url).result()
        assert len(stand_in.asked) == 1


def test_the_servers_key_is_sent(stand_ins, connect, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    connect(stand_ins[0])
    assert {headers.get("Authorization") for headers in stand_ins[0].headers} == {"Bearer secret"}


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://user:word@host", "http://h/?a=1", ""])
def test_an_address_that_is_none_is_an_error(url):
    with pytest.raises(ValueError, match="is not the address of a server"):
        VLLMServers([url], IMAGE_TOKEN, "adapters")


def test_addresses_are_a_list_without_repetition():
    for urls in ("http://a", [], ["http://a", "http://a"]):
        with pytest.raises(ValueError, match="expected a list of different addresses"):
            VLLMServers(urls, IMAGE_TOKEN, "adapters")


# ----------------------------------------------------------------------------------------------------------------
# Adapters


def test_only_the_role_that_moved_is_swapped_and_its_old_folder_goes_after_the_unloading(stand_ins, connect, tmp_path):
    servers = connect(*stand_ins)
    before = dict(servers.adapters)
    seen = []
    for stand_in in stand_ins:
        watch(stand_in, lambda path: seen.append((path, os.listdir(tmp_path / "adapters"))))
    seconds = servers.swap("solver", save)
    after = servers.adapters
    assert after["proposer"] == before["proposer"] and after["solver"].name != before["solver"].name
    assert [path for path, _ in seen] == ["/v1/load_lora_adapter"] * 2 + ["/v1/unload_lora_adapter"] * 2
    assert all(before["solver"].name in folders for _, folders in seen)
    assert sorted(os.listdir(tmp_path / "adapters")) == sorted(adapter.name for adapter in after.values())
    for stand_in in stand_ins:
        assert stand_in.adapters == {adapter.name: adapter.folder for adapter in after.values()}
    assert servers.swap_seconds["solver"][-1] == seconds and len(servers.swap_seconds["proposer"]) == 1
    # A request holds the adapter of its role
    servers.generate([request(), request(role="proposer")])
    asked = {body["model"] for stand_in in stand_ins for body in stand_in.asked}
    assert asked == {adapter.name for adapter in after.values()}


def test_no_adapter_is_swapped_under_a_request(stand_ins, connect):
    servers = connect(stand_ins[0])
    go = threading.Event()
    stand_ins[0].faults = [lambda server, body: (go.wait(20), (200, server.completed(body)))[1]]
    future = servers.submit(request())
    with pytest.raises(RuntimeError, match="1 requests of the solver are in flight"):
        servers.swap("solver", save)
    servers.swap("proposer", save)
    go.set()
    future.result()
    servers.swap("solver", save)


def test_an_adapter_that_is_not_written_is_an_error(stand_ins, connect):
    servers = connect(stand_ins[0])
    with pytest.raises(ValueError, match="has not written adapter_config.json and adapter_model.safetensors"):
        servers.swap("solver", lambda folder: None)


def test_only_folders_of_this_client_are_deleted(stand_ins, connect, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / vllm_server._MARK).touch()
    adapters = tmp_path / "adapters"
    (adapters / "mine").mkdir(parents=True)
    (adapters / "link").symlink_to(precious, target_is_directory=True)
    servers = connect(stand_ins[0])
    # as if another process, or a wrong checkpoint, had said so
    servers.adapters["solver"] = ServedAdapter("precious", str(precious))
    servers.swap("solver", save)
    servers.close()
    assert precious.is_dir() and {path.name for path in adapters.iterdir()} >= {"mine", "link"}


def test_another_process_takes_over_the_adapters(stand_ins, connect):
    main = connect(stand_ins[0])
    other = connect(stand_ins[0], start=False)
    other.adapters = dict(main.adapters)
    assert ids(other.generate([request()])[0]) == EXPECTED
    assert len(stand_ins[0].loads) == 2  # the server has said that it holds them, which is no error
    stand_ins[0].die()
    stand_ins[0].start()
    assert ids(other.generate([request()])[0]) == EXPECTED
    other.close()
    assert Path(main.adapters["solver"].folder).is_dir()
    assert ids(main.generate([request()])[0]) == EXPECTED


def test_what_a_killed_run_has_left_is_removed_by_the_same_run_and_not_by_another(stand_ins, connect, tmp_path):
    stand_ins[0].uploads = {}
    first = connect(stand_ins[0], owner="/runs/first")
    second = connect(stand_ins[0], owner="/runs/second")
    assert ids(first.generate([request()])[0]) == ids(second.generate([request()])[0]) == EXPECTED
    assert len(stand_ins[0].loads) == 4
    again = connect(stand_ins[0], owner="/runs/first")
    names = {adapter.name for servers in (second, again) for adapter in servers.adapters.values()}
    assert set(os.listdir(tmp_path / "adapters")) == set(stand_ins[0].adapters) == set(stand_ins[0].uploads) == names


# ----------------------------------------------------------------------------------------------------------------
# Starting


def test_a_server_that_is_not_up_yet_is_waited_for(stand_ins, connect, caplog):
    stand_ins[0].die()
    threading.Timer(0.4, stand_ins[0].start).start()
    servers = connect(*stand_ins)
    assert f"Waiting for the vLLM server at {stand_ins[0].url}: 0 of 20 s (ConnectionRefusedError" in caplog.text
    assert ids(servers.generate([request()])[0]) == EXPECTED
    assert not servers.faults


def test_the_wait_has_a_limit(stand_ins, connect, caplog):
    stand_ins[1].die()
    started = time.monotonic()
    with pytest.raises(
        VLLMError, match=rf"No vLLM server answers at {stand_ins[1].url} \(ConnectionRefused.*after 0 s"
    ):
        connect(*stand_ins, start_timeout=0.3)
    assert time.monotonic() - started < 10
    stand_ins[1].start()


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/unload_lora_adapter", (404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ("/v1/unload_lora_adapter", (401, {"error": "Unauthorized"}), "Set VLLM_API_KEY"),
        ("/inference/v1/generate", error(403, "Scale-out endpoints are disabled."), "disabled.*--enable-scale-out"),
        ("/inference/v1/generate", (404, {"detail": "Not Found"}), "--enable-scale-out, of vLLM 0.32 or newer"),
        ("/v1/models", (200, "<html>"), "is no vLLM server: it answers '<html>'"),
        ("/v1/models", (200, "[" * 100_000), "is no vLLM server"),
        ("/v1/models", (200, "x" * 5_000_000), "with more than 4194304 bytes"),
        ("/v1/load_lora_adapter", error(500, "LoRA is not enabled."), "LoRA is not enabled.*--enable-lora"),
        ("/v1/load_lora_adapter", error(404, "No adapter found for /a"), "No adapter found.* read this folder"),
    ],
)
def test_a_server_that_lacks_something_is_an_error_before_training(stand_ins, connect, path, answer, message):
    stand_ins[0].routes[path] = answer
    with pytest.raises(VLLMError, match=message):
        connect(stand_ins[0])


def test_log_probs_from_before_the_settings_are_an_error_before_training(stand_ins, connect):
    right = stand_ins[0].completed

    def raw(body):
        answer = right(body)
        answer["choices"][0]["logprobs"]["content"][0]["logprob"] = -6.1
        return answer

    stand_ins[0].completed = raw
    with pytest.raises(VLLMError, match="log-prob -6.100 to a token without alternative.*processed_logprobs"):
        connect(stand_ins[0])


# ----------------------------------------------------------------------------------------------------------------
# Faults


def is_in_trouble(stand_in, path: str, status: int, seconds: float) -> None:
    """For some time it answers an address with this status, and is not healthy."""
    stand_in.routes = {path: error(status, "EngineCore has died"), "/health": (503, "")}
    threading.Timer(seconds, stand_in.routes.clear).start()


def vanish(server, body):
    """The server dies over a request, and comes back without adapters."""
    server.die()
    threading.Timer(0.2, server.start).start()


def test_a_server_that_dies_and_comes_back_gets_the_adapters_and_the_requests_again(stand_ins, connect):
    servers = connect(stand_ins[0])
    stand_ins[0].faults = [vanish]
    requests = [request(f"data:{i}", role, seed=i) for i in range(6) for role in ("solver", "proposer")]
    answers = servers.generate(requests)
    assert [ids(answer) for answer in answers] == [[[100 + r.seed + k, END_TOKEN] for k in range(3)] for r in requests]
    assert stand_ins[0].adapters == {adapter.name: adapter.folder for adapter in servers.adapters.values()}
    assert servers.faults["deaths"] >= 1 and servers.faults["repeated"] >= 1
    servers.swap("solver", save)  # nothing is taken to be in flight


def test_requests_of_a_dead_server_go_to_another_and_swaps_reach_it_when_it_is_back(stand_ins, connect):
    servers = connect(*stand_ins)
    stand_ins[0].faults = stand_ins[1].faults = [
        lambda server, body: server.die()
    ]  # one list: the first one asked dies
    answers = servers.generate([request(f"data:{i}") for i in range(4)])
    assert [ids(answer) for answer in answers] == [EXPECTED] * 4
    dead = next(server for server in stand_ins if not servers._servers[stand_ins.index(server)].up)
    servers.swap("solver", save)
    dead.start()
    deadline = time.monotonic() + 20
    while not all(server.up for server in servers._servers) and time.monotonic() < deadline:
        time.sleep(0.02)
    servers.submit(request(), dead.url).result()
    assert dead.adapters == {servers.adapters["solver"].name: servers.adapters["solver"].folder}


def test_a_swap_waits_for_a_server_that_is_gone(stand_ins, connect):
    servers = connect(stand_ins[0])
    stand_ins[0].die()
    threading.Timer(0.3, stand_ins[0].start).start()
    servers.swap("solver", save)
    assert list(stand_ins[0].adapters) == [servers.adapters["solver"].name]


@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_a_swap_waits_for_a_server_in_trouble_or_goes_on_with_the_others(stand_ins, connect, path, status):
    servers = connect(*stand_ins)
    is_in_trouble(stand_ins[0], path, status, 0.4)
    servers.swap("solver", save)
    assert servers.adapters["solver"].name in stand_ins[1].adapters and len(stand_ins[1].adapters) == 2
    for url in servers.urls:
        assert ids(servers.submit(request(), url).result()) == EXPECTED
    alone = connect(stand_ins[0])
    is_in_trouble(stand_ins[0], path, status, 0.4)
    alone.swap("solver", save)
    assert ids(alone.generate([request()])[0]) == EXPECTED


def test_a_server_in_trouble_when_it_is_looked_at_anew_is_waited_for(stand_ins, connect):
    servers = connect(stand_ins[0])
    stand_ins[0].die()
    stand_ins[0].start()
    loads = []

    def see(path):
        if path == "/v1/load_lora_adapter":
            loads.append(path)
            if len(loads) == 1:
                is_in_trouble(stand_ins[0], "/inference/v1/generate", 500, 0.3)

    watch(stand_ins[0], see)
    assert ids(servers.generate([request()])[0]) == EXPECTED
    assert len(loads) == 2


def test_a_swap_that_every_server_dies_of_is_given_up(stand_ins, connect):
    servers = connect(stand_ins[0])
    loads = []

    def die(path):
        if path == "/v1/load_lora_adapter":
            loads.append(path)
            stand_ins[0].die()
            threading.Timer(0.1, stand_ins[0].start).start()
            raise ConnectionError

    watch(stand_ins[0], die)
    with pytest.raises(VLLMError, match="A swap was tried 3 times, and each time all vLLM servers were gone.*http"):
        servers.swap("solver", save)
    assert len(loads) == 3


def test_a_server_that_does_not_come_back_is_an_error_with_its_last_words(stand_ins, connect):
    servers = connect(stand_ins[0])
    servers.start_timeout = 1

    def out_of_memory(server, body):
        server.routes["/health"] = (503, "")
        return error(500, "CUDA out of memory. Tried to allocate 2.00 GiB")

    stand_ins[0].faults = [out_of_memory]
    with pytest.raises(
        VLLMError, match="No vLLM server has come back in 1 s.*out of memory. Tried to allocate 2.00 GiB"
    ):
        servers.generate([request()])


def test_a_request_that_every_server_dies_of_is_given_up(stand_ins, connect):
    servers = connect(stand_ins[0])
    stand_ins[0].faults = [vanish] * 3
    with pytest.raises(VLLMError, match="was sent 3 times, and each time the vLLM server was gone or broke down"):
        servers.generate([request()])
    assert len(stand_ins[0].asked) == 3


@pytest.mark.parametrize("status", [400, 413, 500])
def test_an_error_has_the_servers_text_and_is_not_asked_for_again(stand_ins, connect, status):
    servers = connect(*stand_ins)
    for stand_in in stand_ins:
        stand_in.faults = [lambda server, body: error(status, "The prompt is longer than\nmax_model_len.")]
    with pytest.raises(VLLMError, match=f"answers {status} to a request: 'The prompt is longer than max_model_len.'"):
        servers.generate([request()])
    assert sum(len(stand_in.asked) for stand_in in stand_ins) == 1
    servers.swap("solver", save)


def test_a_proxy_whose_server_is_gone_is_asked_again(stand_ins, connect):
    servers = connect(stand_ins[0])
    stand_ins[0].faults = [lambda server, body: (502, "<html>bad gateway</html>")]
    assert ids(servers.generate([request()])[0]) == EXPECTED
    assert servers.faults["deaths"] == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for_and_not_taken_for_dead(stand_ins, connect, status, caplog):
    servers = connect(stand_ins[0])
    stand_ins[0].faults = [lambda server, body: error(status, "Too many requests")] * 5
    assert ids(servers.generate([request()])[0]) == EXPECTED
    assert len(stand_ins[0].asked) == 6 and not servers.faults and len(stand_ins[0].loads) == 2
    assert [record.message for record in caplog.records] == [
        f"The vLLM server at {servers.urls[0]} is busy: waiting for 0 of 20 s (status {status}, 'Too many requests')"
    ]


def test_the_wait_for_a_busy_server_has_a_limit(stand_ins, connect):
    servers = connect(stand_ins[0])
    servers.start_timeout = 0.3
    stand_ins[0].faults = [lambda server, body: error(429, "Too many requests")] * 100
    with pytest.raises(VLLMError, match="too busy to answer /inference/v1/generate in 0 s .status 429, 'Too many req"):
        servers.generate([request()])
    servers.start_timeout = 20
    servers.swap("solver", save)
    stand_ins[0].faults = []
    stand_ins[0].routes["/v1/unload_lora_adapter"] = (503, "busy")
    started = time.monotonic()
    servers.close()
    assert time.monotonic() - started < 5  # nobody waits for a server at the end


def test_a_server_that_knew_no_adapter_and_knows_it_again_is_asked_again(stand_ins, connect):
    servers = connect(stand_ins[0])
    unknown = error(404, "The model `evolmm-solver` does not exist.")
    stand_ins[0].faults = [lambda server, body: unknown] * 2
    assert ids(servers.generate([request()])[0]) == EXPECTED
    stand_ins[0].faults = [lambda server, body: unknown] * 3
    with pytest.raises(VLLMError, match="was sent 3 times.*status 404, 'The model `evolmm-solver` does not exist.'"):
        servers.generate([request()])


@pytest.fixture
def silent():
    """The address of a host that takes no connection and refuses none."""
    with socket.socket() as listening, ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):  # more than it keeps waiting
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_host_that_does_not_answer_holds_nobody(silent, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_server, "_CONNECT", 2)
    servers = VLLMServers([silent], IMAGE_TOKEN, tmp_path, start_timeout=60)
    servers.adapters["solver"] = ServedAdapter("evolmm-solver", str(tmp_path / "evolmm-solver"))
    future = servers.submit(request())
    deadline = time.monotonic() + 20
    while servers._servers[0].up and time.monotonic() < deadline:
        time.sleep(0.02)
    assert servers._servers[0].reason == "no connection in 2 s"
    started = time.monotonic()
    servers._remove(servers.adapters["solver"])  # the server is known to be down, and not asked
    assert time.monotonic() - started < 1
    servers.close()
    assert time.monotonic() - started < 10
    with pytest.raises(VLLMError, match="was closed"):
        future.result(0)


def test_a_server_that_comes_back_with_another_base_model_is_warned_of(stand_ins, connect, caplog):
    servers = connect(stand_ins[0])
    stand_ins[0].die()
    stand_ins[0].routes["/v1/models"] = (200, {"data": [{"id": "other", "root": "/models/other", "parent": None}]})
    stand_ins[0].start()
    assert ids(servers.generate([request()])[0]) == EXPECTED
    assert "serves /models/other or other, and the trained model is base" in caplog.text


@pytest.fixture
def slow():
    """A fault that lasts as long as the test."""
    end = threading.Event()
    yield lambda server, body: (end.wait(60), (200, server.completed(body)))[1]
    end.set()


def test_a_slow_request_is_sent_to_another_server(stand_ins, connect, slow, caplog):
    servers = connect(*stand_ins, request_timeout=2)
    stand_ins[0].faults = stand_ins[1].faults = [slow]
    assert ids(servers.generate([request()])[0]) == EXPECTED
    assert [len(stand_in.asked) for stand_in in stand_ins] == [1, 1]
    assert servers.faults == {"slow": 1} and "has not answered in 2 s; the request is sent again" in caplog.text


def test_a_request_that_is_slow_everywhere_is_an_error(stand_ins, connect, slow):
    servers = connect(stand_ins[0], request_timeout=0.2)
    stand_ins[0].faults = [slow] * 5
    with pytest.raises(VLLMError, match="for 3 completions of at most 4 tokens took more than 0 s, 2 times"):
        servers.generate([request()])


def changed(change):
    def fault(server, body):
        answer = server.completed(body)
        change(answer)
        return 200, answer

    return fault


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda answer: answer.update(prompt_token_ids=[1, 2, IMAGE_TOKEN, 3]),
            "as 4 tokens, 1 of them of the image, .* 7",
        ),
        (lambda answer: answer.update(prompt_token_ids=None), "reads a prompt as 0 tokens"),
        (lambda answer: answer["choices"].pop(), "2 completions for 3 samples"),
        (lambda answer: answer["choices"][0].update(index=1), "3 completions for 3 samples"),
        (lambda answer: answer["choices"][0]["token_ids"].append(5), "do not go together"),
        (lambda answer: answer["choices"][0].update(token_ids=[], logprobs={"content": []}), "do not go together"),
        (lambda answer: answer["choices"][0]["logprobs"]["content"][0].update(logprob=float("nan")), "that is none"),
        (lambda answer: answer["choices"][0]["logprobs"]["content"][0].update(logprob=0.5), "that is none"),
        (lambda answer: answer["choices"][0].update(logprobs=None), "in a form that is not known here"),
        (lambda answer: answer.pop("choices"), "in a form that is not known here"),
        (
            lambda answer: answer["choices"][0].update(
                token_ids=[5, 5], logprobs={"content": [{"token_id": 5, "logprob": -1.0}] * 2}
            ),
            "of at most 4 tokens after 2, without an end token. Its --max-model-len",
        ),
        (
            lambda answer: answer["choices"][0].update(
                token_ids=[5] * 5, logprobs={"content": [{"token_id": 5, "logprob": -1.0}] * 5}
            ),
            "of at most 4 tokens after 5",
        ),
        (
            lambda answer: answer["choices"][0].update(
                token_ids=[IMAGE_TOKEN, END_TOKEN],
                logprobs={"content": [{"token_id": token, "logprob": -1.0} for token in (IMAGE_TOKEN, END_TOKEN)]},
            ),
            f"has sampled the token {IMAGE_TOKEN}, which the request suppresses",
        ),
    ],
)
def test_an_answer_that_cannot_be_right_is_an_error(stand_ins, connect, change, message):
    servers = connect(stand_ins[0])
    stand_ins[0].faults = [changed(change)]
    with pytest.raises(VLLMError, match=message):
        servers.generate([request()])


def test_an_answer_without_end_is_not_read_to_its_end(stand_ins, connect):
    servers = connect(stand_ins[0])
    stand_ins[0].faults = [lambda server, body: (200, " " * 6_000_000)]
    with pytest.raises(VLLMError, match="answers /inference/v1/generate with more than"):
        servers.generate([request()])


def test_closing_gives_up_what_is_in_flight(stand_ins, connect, tmp_path):
    servers = connect(stand_ins[0], max_in_flight=1, request_timeout=60)
    go = threading.Event()
    stand_ins[0].faults = [lambda server, body: go.wait(20)]
    futures = [servers.submit(request()) for _ in range(3)]
    time.sleep(0.2)
    started = time.monotonic()
    servers.close()
    assert time.monotonic() - started < 5
    go.set()
    with pytest.raises(VLLMError, match="was closed"):
        futures[0].result(0)
    for future in futures[1:]:  # begun at the last moment, or not at all
        assert future.cancelled() or "was closed" in str(future.exception(0))
    assert not stand_ins[0].adapters and not list((tmp_path / "adapters").iterdir())
    with pytest.raises(RuntimeError):
        servers.submit(request())


# ----------------------------------------------------------------------------------------------------------------
# Uploads


def test_a_process_that_does_not_see_the_folder_asks_for_an_uploaded_adapter(stand_ins, connect):
    stand_ins[0].uploads = {}
    main, other = connect(stand_ins[0]), connect(stand_ins[0], start=False)
    other.adapters = {
        role: ServedAdapter(adapter.name, f"/nowhere/{adapter.name}") for role, adapter in main.adapters.items()
    }
    assert ids(other.generate([request()])[0]) == EXPECTED
    assert set(stand_ins[0].adapters.values()) == {f"/uploads/{adapter.name}" for adapter in main.adapters.values()}
    assert sum(path.startswith("PUT ") for path in stand_ins[0].paths) == 4  # two files of each
    stand_ins[0].die()
    stand_ins[0].start()
    with pytest.raises(VLLMError, match="cannot upload it .FileNotFoundError.* `vllm_adapter_dir` on a disk that all"):
        other.generate([request()])
    # One that sees it gives it to the server again, and then the other asks for it
    assert ids(main.generate([request()])[0]) == ids(other.generate([request()])[0]) == EXPECTED


def test_uploads_are_deleted_after_the_server_was_out_of_reach(stand_ins, connect):
    stand_ins[0].uploads = {}
    servers = connect(stand_ins[0])
    servers._set_down(servers._servers[0], "out of reach")
    servers.swap("solver", save)
    names = {adapter.name for adapter in servers.adapters.values()}
    assert set(stand_ins[0].uploads) == set(stand_ins[0].adapters) == names
    servers._set_down(servers._servers[0], "out of reach")
    servers._wait_for_any(servers._servers)
    servers.close()
    assert not stand_ins[0].uploads and not stand_ins[0].adapters


@pytest.fixture
def uploads(monkeypatch):
    """The middleware, in front of a server that lets who has its key see its models, and answers all else with 418."""
    import importlib

    monkeypatch.syspath_prepend("examples")
    module = importlib.import_module("vllm_adapter_upload")

    async def vllm(scope, receive, send):
        keys = [value.decode() for name, value in scope["headers"] if name == b"authorization"]
        permitted = 401 if ask.key and f"Bearer {ask.key}" not in keys else 200
        status = permitted if (scope["method"], scope["path"]) == ("GET", "/v1/models") else 418
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def ask(method, path, *body, key=None):
        return asyncio.run(ask.call(method, path, *body, key=key))

    async def call(method, path, *body, key=None, pause=None):
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        messages = iter([*messages, {"type": "http.request", "body": b"", "more_body": False}])
        sent = []

        async def receive():
            if pause is not None:
                await pause()
            return next(messages)

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        await ask.app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    ask.module, ask.call, ask.key, ask.app = module, call, None, module.AdapterUpload(vllm)
    return ask


def test_what_is_uploaded_is_in_the_servers_folder(uploads):
    root = Path(uploads("GET", "/evolmm/adapters")[1]["folder"])
    status, answer = uploads("PUT", "/evolmm/adapters/evolmm-solver-1a-v1/adapter_config.json", b"{", b"}")
    assert status == 200 and Path(answer["folder"]) == root / "evolmm-solver-1a-v1"
    assert Path(answer["folder"], "adapter_config.json").read_bytes() == b"{}"
    assert uploads("DELETE", "/evolmm/adapters/evolmm-solver-1a-v1")[0] == 200
    assert root.is_dir() and not list(root.iterdir())
    assert uploads("POST", "/v1/load_lora_adapter")[0] == 418


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/evolmm/adapters/../adapter_config.json"),
        ("PUT", "/evolmm/adapters/evolmm-a/../adapter_config.json"),
        ("PUT", "/evolmm/adapters/evolmm-a/pickle.bin"),
        ("PUT", "/evolmm/adapters/mine/adapter_config.json"),
        ("DELETE", "/evolmm/adapters/.."),
        ("DELETE", "/evolmm/adapters"),
    ],
)
def test_nothing_else_is_written_or_deleted(uploads, method, path):
    root = Path(uploads("GET", "/evolmm/adapters")[1]["folder"])
    assert uploads(method, path, b"x")[0] in (404, 418)
    assert root.is_dir() and not list(root.iterdir())


def test_uploads_have_a_limit_and_a_key(uploads, monkeypatch):
    monkeypatch.setattr(uploads.module, "_LARGEST", 3)
    path = "/evolmm/adapters/evolmm-a/adapter_config.json"
    assert uploads("PUT", path, b"12", b"34")[0] == 413
    assert uploads("PUT", path, b"12", b"3")[0] == 200
    uploads.key = "secret"  # as vLLM has it, wherever from
    assert [uploads("PUT", path, b"1", key=key)[0] for key in (None, "wrong", "secret")] == [401, 401, 200]
    assert uploads("GET", "/evolmm/adapters")[0] == uploads("DELETE", "/evolmm/adapters/evolmm-a")[0] == 401


def test_two_processes_upload_an_adapter_at_the_same_time(uploads):
    path = "/evolmm/adapters/evolmm-a/adapter_config.json"

    async def both():
        return await asyncio.gather(
            *(uploads.call("PUT", path, b"{", b"}", pause=lambda: asyncio.sleep(0)) for _ in range(2))
        )

    answers = asyncio.run(both())
    assert [status for status, _ in answers] == [200, 200]
    (file,) = Path(answers[0][1]["folder"]).iterdir()
    assert file.name == "adapter_config.json" and file.read_bytes() == b"{}"


# ----------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("tiny", [tiny_qwen2_5_vl, tiny_qwen3_vl])
def test_the_image_that_was_seen_gives_the_same_pixels_again(tmp_path, tiny):
    processor = load_processor(str(tiny(tmp_path)))
    rng = np.random.default_rng(0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    for size in ((50, 61), (32, 32), (28, 84), (300, 200)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        (prompt,) = encode_prompts(processor, [messages], [image])
        seen = seen_image(prompt.image_inputs, processor.image_processor)
        (again,) = encode_prompts(processor, [messages], [seen])
        assert again.input_ids.tolist() == prompt.input_ids.tolist()
        assert (again.image_inputs["pixel_values"] - prompt.image_inputs["pixel_values"]).abs().max() < 1e-6
        assert seen.size != image.size or np.array_equal(seen, image)


def test_images_of_other_families_cannot_be_sent(tmp_path):
    processor = load_processor(str(tiny_gemma3(tmp_path)))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    (prompt,) = encode_prompts(processor, [messages], [Image.new("RGB", (28, 28))])
    with pytest.raises(
        ValueError, match="cannot be sent to a vLLM server; expected one image of Qwen2.5-VL or Qwen3-VL"
    ):
        seen_image(prompt.image_inputs, processor.image_processor)


def test_an_image_is_sent_without_loss():
    import base64
    import io

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
    kind, _, data = image_url(image).partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), image)


def test_an_images_tokens_become_one():
    assert one_image_token([1, 7, 7, 7, 2, 7, 3], 7) == [1, 7, 2, 7, 3]
    assert one_image_token([7, 7], 7) == [7]


def test_the_log_names_no_more_than_a_warning(stand_ins, connect, caplog):
    with caplog.at_level(logging.WARNING):
        connect(stand_ins[0]).generate([request()])
    assert not caplog.records


# ----------------------------------------------------------------------------------------------------------------
# The script that starts a server


def test_the_script_starts_a_server_with_what_the_page_says_it_needs():
    command = ["bash", "examples/serve_vllm.sh", "MODEL", "--port", "8001"]
    printed = subprocess.run(
        command, env={**os.environ, "VLLM_SERVE": "printf %s\\n"}, capture_output=True, text=True, check=True
    )
    model, *options, flag, port = printed.stdout.splitlines()
    assert (model, flag, port) == ("MODEL", "--port", "8001")
    page = Path("docs/vllm.md").read_text()
    options = [option for option in options if option.startswith("--")]
    assert len(options) == 8 and all(option in page for option in options)
