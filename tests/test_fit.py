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

"""Training that fits: quantized bases, 8-bit and paged optimizers, bfloat16, all weights; and the memory that is announced."""

import importlib
import logging
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from accelerate import Accelerator
from bench_meter import _PeakMemory
from PIL import Image
from tiny_models import tiny_qwen2_5_vl
from tiny_trainer import TalkingTrainer, Watch, config, image_dataset, logged, lora, snapshot
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback

import evolmm_trl.memory
from evolmm_trl.memory import Prompt, Sharding, elements, estimate, optimizer_bytes, weight_bytes
from evolmm_trl.role_adapters import role_optimizer, vision_tower
from evolmm_trl.rollout.samples import encode_prompts
from evolmm_trl.shared_prefix import base_model


ROOT = Path(__file__).parent.parent
NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="paged optimizers hold their state in CUDA's managed memory, which needs a GPU",
)
RANK = 64  # at which LoRA matrices have the 4,096 elements that make an 8-bit state 8-bit


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("base") / "model", hidden=64))


@pytest.fixture(autouse=True)
def fresh_bitsandbytes():
    """It keeps settings by the number of a tensor for the life of the process."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


def nf4(**options) -> BitsAndBytesConfig:
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **defaults | options)


class RewardedTrainer(TalkingTrainer):
    """Every other question is rewarded, whatever half precision makes of it on this machine: the proposer has advantages."""

    def _rewards(self, questions, answers, votes):
        solver, proposer = super()._rewards(questions, answers, votes)
        return solver, [float(i % 2) for i in range(len(proposer))]


def make(base, folder, quantization_config=None, peft_config=None, callbacks=None, **options):
    return RewardedTrainer(
        model=base,
        args=config(folder, **{"max_steps": 2, "proposer_update_every": 1, **options}),
        train_dataset=image_dataset(),
        quantization_config=quantization_config,
        peft_config=lora() if peft_config is None else peft_config or None,
        callbacks=callbacks,
    )


def roles_of(names) -> set[str]:
    """Which adapters these tensors are of."""
    assert all(".lora_" in name for name in names), sorted(names)[:3]
    return {"proposer" if ".proposer." in name else "solver" for name in names}


def check_roles_move_in_turn(watch) -> None:
    """One adapter per step, the solver's first, and of the base not one bit."""
    assert [roles_of(watch.moved(step)) for step in range(len(watch.after))] == [{"solver"}, {"proposer"}]


# QLoRA


@pytest.fixture(scope="module")
def qlora(base, tmp_path_factory):
    """Two steps on a base in 4 bits, and what was in it before."""
    watch = Watch()
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}
    trainer = make(base, tmp_path_factory.mktemp("qlora"), nf4(), callbacks=[watch], **options)
    before = snapshot(trainer)
    trainer.train()
    return trainer, watch, before


def test_a_base_given_by_path_is_quantized_but_for_its_tower_and_lm_head(qlora):
    trainer, _, _ = qlora
    quantized = {name for name, p in trainer.model.named_parameters() if type(p).__name__ == "Params4bit"}
    linear = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    assert {name.split(".base_layer")[0].rsplit(".", 1)[1] for name in quantized} == set(linear)
    assert len(quantized) == 2 * len(linear)  # of two layers
    assert not any(".visual." in name for name in quantized)
    states = [p.quant_state for name, p in trainer.model.named_parameters() if name in quantized]
    assert {state.quant_type for state in states} == {"nf4"} and all(state.nested for state in states)


def test_adapters_on_a_quantized_base_move_in_turn_and_the_base_by_no_bit(qlora):
    trainer, watch, before = qlora
    check_roles_move_in_turn(watch)
    after = snapshot(trainer)
    assert any(".absmax" in name for name in before)  # the quantization's own tensors are among what is compared
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".lora_" not in name)
    assert {p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name} == {torch.float32}


def test_gradients_through_a_quantized_base_survive_a_generation(qlora):
    trainer, _, _ = qlora
    layers = [m for m in trainer.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    norms = [*logged(trainer, "solver/grad_norm"), *logged(trainer, "proposer/grad_norm")]
    assert len(norms) == 2 and all(norm > 0 for norm in norms)


def test_what_a_quantization_config_itself_leaves_out_is_left_to_it(base, tmp_path):
    trainer = make(base, tmp_path, nf4(llm_int8_skip_modules=["lm_head", "model.language_model.embed_tokens"]))
    quantized = [name for name, p in trainer.model.named_parameters() if type(p).__name__ == "Params4bit"]
    assert any(".visual." in name for name in quantized)


def test_a_quantized_lm_head_is_refused(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_qwen2_5_vl(tmp_path / "tied", hidden=64))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="The LM head is quantized .* Add 'lm_head' to `llm_int8_skip_modules`"):
        make(str(tmp_path / "tied"), tmp_path / "run", nf4(llm_int8_skip_modules=["model.visual"]))


# 8-bit and paged optimizers


class States(TrainerCallback):
    """Copies of the optimizer's state of every tensor after every step, by the tensor's name."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.after.append(
            {
                (names[id(parameter)], key): value.clone() if isinstance(value, torch.Tensor) else value
                for parameter, values in optimizer.state.items()
                for key, value in values.items()
                if not key.startswith("qmap")
            }
        )
        self.optimizer = optimizer


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("optim", "bits", "paged"),
    [
        ("adamw_8bit", 8, False),
        ("adamw_bnb_8bit", 8, False),
        ("paged_adamw_8bit", 8, True),
        ("paged_adamw_32bit", 32, True),
    ],
)
def test_an_idle_adapter_and_its_state_stay_in_an_optimizer_of_bitsandbytes(base, tmp_path, optim, bits, paged):
    watch, states = Watch(), States()
    trainer = make(
        base, tmp_path, peft_config=lora(r=RANK), callbacks=[watch, states], optim=optim, max_steps=4, weight_decay=0.1
    )
    trainer.train()
    assert [roles_of(watch.moved(step)) for step in range(4)] == [{"solver"}, {"proposer"}] * 2
    for step in (1, 2, 3):
        idle = {1: ".default.", 2: ".proposer.", 3: ".default."}[step]
        before, after = states.after[step - 1], states.after[step]
        kept = [key for key in before if idle in key[0]]
        assert kept and all(same(before[key], after[key]) for key in kept)
        assert any(not same(before[key], after[key]) for key in before if idle not in key[0]) or step == 1

    assert states.optimizer.is_paged is paged and states.optimizer.args.optim_bits == bits
    assert {group["role"] for group in states.optimizer.param_groups} == {"solver", "proposer"}
    stored = {value.dtype for (name, key), value in states.after[-1].items() if key == "state1" and "q_proj" in name}
    assert stored == ({torch.uint8} if bits == 8 else {torch.float32})
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert optimizer_bytes(optim, trained, []) == held_by(states.optimizer)


@NEEDS_GPU
def test_the_state_of_a_paged_optimizer_is_paged(base, tmp_path):
    states = States()
    # Tensors of fewer than 100,000 elements are not paged
    adapter = lora(r=2048, target_modules=r"model\.language_model\..*q_proj")
    trainer = make(base, tmp_path, peft_config=adapter, callbacks=[states], optim="paged_adamw_8bit", use_cpu=False)
    trainer.train()
    assert all(values["state1"].is_paged for values in states.optimizer.state.values())


def test_the_embeddings_state_stays_in_32_bits_when_all_weights_are_trained(base, tmp_path):
    states = States()
    trainer = make(base, tmp_path, peft_config=False, callbacks=[states], optim="adamw_8bit")
    trainer.train()
    dtypes = {name: value.dtype for (name, key), value in states.after[-1].items() if key == "state1"}
    assert dtypes["model.language_model.embed_tokens.weight"] == torch.float32
    assert dtypes["model.language_model.layers.0.self_attn.q_proj.weight"] == torch.uint8
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    embeddings = [trainer.model.model.language_model.embed_tokens.weight]
    assert optimizer_bytes("adamw_8bit", trained, embeddings) == held_by(states.optimizer)


def test_a_resumed_run_takes_up_8_bit_states_bit_for_bit(base, tmp_path):
    options = {"optim": "adamw_8bit", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(base, tmp_path / "whole", peft_config=lora(r=RANK), **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "rollouts.jsonl", tmp_path / "resumed" / "rollouts.jsonl")
    resumed = make(base, tmp_path / "resumed", peft_config=lora(r=RANK), **options)
    resumed.train(resume_from_checkpoint=True)
    expected = snapshot(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in snapshot(resumed).items())


def held_by(optimizer) -> int:
    """Bytes of an optimizer's state; the tables that its tensors share are not among them."""
    return sum(
        value.nbytes
        for values in optimizer.state.values()
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_the_announced_bytes_of_a_torch_optimizer_are_those_it_holds(base, tmp_path, optim):
    states = States()
    trainer = make(base, tmp_path, callbacks=[states], optim=optim)
    trainer.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert optimizer_bytes(optim, trained, []) == held_by(states.optimizer)


def test_the_role_optimizer_is_known_by_the_module_of_its_parent(base):
    from bitsandbytes.optim import AdamW

    assert "bitsandbytes" in str(role_optimizer(AdamW, roles=None))


# bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_bfloat16_adapters_are_float32_and_move_in_turn(base, tmp_path, dtype):
    watch = Watch()
    trainer = make(base, tmp_path, callbacks=[watch], bf16=True, model_init_kwargs={"dtype": dtype})
    assert trainer.model.get_base_model().dtype == getattr(torch, dtype)
    assert {p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name} == {torch.float32}
    trainer.train()
    check_roles_move_in_turn(watch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_trained_in_bfloat16_lose_their_steps_and_are_warned_about(base, tmp_path, caplog, dtype):
    options = {"model_init_kwargs": {"dtype": dtype}, "learning_rate": 1e-6}
    with caplog.at_level(logging.WARNING):
        trainer = make(base, tmp_path, peft_config=False, bf16=True, **options)
    assert ("Weights are trained in bfloat16" in caplog.text) is (dtype == "bfloat16")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [trainer.model.get_parameter(name) != tensor for name, tensor in before.items()]
    share = sum(m.sum().item() for m in moved) / sum(m.numel() for m in moved)
    assert share < 0.1 if dtype == "bfloat16" else share > 0.7


# All weights, with a reference model


def test_all_weights_move_and_the_reference_model_and_the_tower_do_not(base, tmp_path):
    trainer = make(base, tmp_path, peft_config=False, beta=0.1, max_steps=4)
    before, reference = snapshot(trainer), {k: v.clone() for k, v in trainer.ref_model.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in snapshot(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".visual." not in name}
    assert all(torch.equal(tensor, reference[name]) for name, tensor in trainer.ref_model.state_dict().items())
    first, *later = logged(trainer, "solver/kl")
    assert abs(first) < 1e-6 and all(kl > 1e-4 for kl in later)  # the policy leaves the reference


# The memory that is announced


def bytes_held(parameter) -> int:
    """What a parameter holds, without the tables of 4-bit values."""
    state = getattr(parameter, "quant_state", None)
    scales = []
    if state is not None:
        scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return parameter.nbytes + sum(scale.nbytes for scale in scales)


def test_the_announced_bytes_of_weights_are_those_they_hold(base, tmp_path, qlora):
    for dtype in ("float32", "bfloat16"):
        model = make(base, tmp_path / dtype, model_init_kwargs={"dtype": dtype}).model
        assert sum(map(weight_bytes, model.parameters())) == sum(p.nbytes for p in model.parameters())
    twice = qlora[0].model
    once = make(base, tmp_path / "once", nf4(bnb_4bit_use_double_quant=False)).model
    for model in (twice, once):
        assert sum(map(weight_bytes, model.parameters())) == sum(map(bytes_held, model.parameters()))
        assert sum(map(elements, model.parameters())) == sum(map(elements, twice.parameters()))
    assert sum(map(weight_bytes, twice.parameters())) < sum(map(weight_bytes, once.parameters()))


class Measured(TalkingTrainer):
    """Takes the peak memory of the solver's generation and of its update, in the second step: the first checks itself."""

    def _generate_role(self, model, role, prompts, seeds):
        if role == "proposer":
            return super()._generate_role(model, role, prompts, seeds)
        peak = _PeakMemory("solve", "cpu")
        ids = super()._generate_role(model, role, prompts, seeds)
        self.generation = peak.stop()
        self.prompt = Prompt(
            max(len(p.input_ids) for p in prompts), int(prompts[0].image_inputs["image_grid_thw"].prod())
        )
        return ids

    def _prepare_inputs(self, inputs):
        self.peak = _PeakMemory("update", "cpu")
        return super()._prepare_inputs(inputs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.update = self.peak.stop()
        return loss


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": False, "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
        {"gradient_checkpointing": True, "shared_prefix": False},
        {"gradient_checkpointing": False, "peft_config": False},
    ],
    ids=["checkpointing", "plain", "bfloat16", "a row per answer", "all weights"],
)
def test_the_estimated_activations_are_near_those_measured(wide, tmp_path, monkeypatch, options):
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 512)  # the tiny vocabulary's size
    monkeypatch.setattr(evolmm_trl.memory, "_TILE_WORDS", 512)
    peft_config = options.get("peft_config", lora())
    options = {name: value for name, value in options.items() if name != "peft_config"}
    trainer = Measured(
        model=wide,
        args=config(tmp_path, max_steps=2, train_proposer=False, max_completion_length=12, **options),
        train_dataset=image_dataset(),
        peft_config=peft_config or None,
    )
    trainer.train()
    name, tower = vision_tower(base_model(trainer.model))
    shared = trainer._share_prefix
    announced = estimate(trainer.model, tower, trainer.args, trainer.prompt, Sharding(), shared, trainer.ref_model)
    print(options, announced.update / trainer.update, announced.generation / trainer.generation)
    assert 1 / 1.5 < announced.update / trainer.update < 1.5
    assert 1 / 1.5 < announced.generation / trainer.generation < 1.5


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return str(tiny_qwen2_5_vl(tmp_path_factory.mktemp("wide") / "model", hidden=128, layers=3))


def test_the_table_says_what_is_trained_what_is_frozen_and_what_it_takes(base, tmp_path, capsys):
    trainer = make(base, tmp_path, nf4(), optim="adamw_8bit", max_pixels=60 * 60)
    table = capsys.readouterr().out
    lines = {line[:17].strip(): line[17:].split("  ") for line in table.splitlines()}
    parameters = dict(trainer.model.named_parameters())

    def count(part):
        return f"{sum(elements(p) for name, p in parameters.items() if part(name)):,}"

    modules = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert table.startswith(f"Parameters: {count(lambda name: True)}\n")
    for role, adapter in (("solver", ".default."), ("proposer", ".proposer.")):
        assert [cell.strip() for cell in lines[role] if cell] == [
            count(lambda name, adapter=adapter: adapter in name),
            f"trained, float32: LoRA on {modules}",
        ]
    assert [cell.strip() for cell in lines["vision tower"] if cell] != []
    assert f"{count(lambda name: '.visual.' in name)}  frozen, float32" in table
    assert "frozen, 4-bit and float32" in table
    assert "the frozen base" in lines["reference"][-1] or "the frozen base" in table
    assert "Estimated memory per process, in GB, one process:" in table
    assert "adamw_8bit" in table and "layers recomputed" in table
    tokens = encode_prompts(
        trainer.processing_class, [trainer.prompts.solver_messages("")], [Image.new("RGB", (60, 60))]
    )[0].input_ids.numel()
    assert (
        f"2 x {tokens + 5} + 6 x 6 tokens" in table
    )  # two images, five tokens of question, three answers of six each
    assert f"1 x {tokens + 5} + 3 x 6 tokens" in table


def test_the_table_of_all_weights_names_the_copy_that_is_the_reference(base, tmp_path, capsys):
    make(base, tmp_path, peft_config=False, optim="adafactor")
    table = capsys.readouterr().out
    assert "a copy of the model, float32" in table
    assert "Both roles train the same weights." in table
    assert "not known for adafactor, and not counted" in table


def test_only_the_main_process_prints_the_table(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    make(base, tmp_path)
    assert "Parameters" not in capsys.readouterr().out


def test_shares_are_those_of_the_stages_of_zero(base, tmp_path):
    trainer = make(base, tmp_path, peft_config=False, bf16=True)
    name, tower = vision_tower(trainer.model)

    def of(sharding):
        return estimate(trainer.model, tower, trainer.args, Prompt(100, 16), sharding, True, trainer.ref_model)

    total = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    tensors = sum(p.requires_grad for p in trainer.model.parameters())
    # ZeRO, section 3.1: 2 bytes of weights and of gradients, 12 of optimizer state per weight; a step count per tensor
    states = 12 * trained + 4 * tensors
    expected = {1: (2 * total, 2 * trained, states / 4), 2: (2 * total, trained / 2, states / 4)}
    expected[3] = (total / 2, trained / 2, states / 4)
    for stage, sizes in expected.items():
        memory = of(Sharding.zero(stage, 4))
        assert (memory.weights, memory.gradients, memory.optimizer) == tuple(math.ceil(size) for size in sizes)
        assert memory.reference == memory.weights
    whole = of(Sharding.zero(3, 4)).generation - of(Sharding.zero(2, 4)).generation
    assert whole == 2 * total  # gathered to generate
    offloaded = of(Sharding.zero(3, 4, optimizer_on_cpu=True, weights_on_cpu=True))
    assert (offloaded.weights, offloaded.optimizer) == (0, 0)
    assert of(Sharding.ddp(4)).gradients == 2 * of(Sharding()).gradients == 8 * trained


# The page on scaling


@pytest.fixture(scope="module")
def scaling():
    pytest.importorskip("bitsandbytes")
    return importlib.import_module("scaling")


def test_the_tables_of_the_page_on_scaling_are_those_of_the_code(scaling):
    page = scaling.PAGE.read_text()
    assert page == scaling.written(page)


def test_the_models_of_the_page_on_scaling_have_their_published_sizes(scaling):
    published = {"3B": 3754622976, "7B": 8292166656, "32B": 33452718336, "72B": 73410777344}
    page = scaling.PAGE.read_text()
    assert published.keys() == scaling.MODELS.keys()
    assert all(f"| {name} | {size:,} |" in page for name, size in published.items())


def test_accelerate_makes_two_hosts_of_the_commands_of_the_page_on_scaling(scaling):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    commands = re.findall(r"^accelerate launch (.*?)^```$", scaling.PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for rank, command in enumerate(commands):
        words = shlex.split(command.replace("\\\n", " "))
        words[words.index("--config_file") + 1] = str(ROOT / words[words.index("--config_file") + 1])
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        prepare_multi_gpu_env(args)
        assert (int(args.nnodes), int(args.node_rank), int(args.nproc_per_node)) == (2, rank, 8)
        assert args.rdzv_endpoint == "10.0.0.1:29500"
