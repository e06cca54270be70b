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


import inspect
import json
from dataclasses import fields

import pytest
import torch
from trl import GRPOConfig, TrlParser

from evolmm_trl import EvoLMMConfig, RolePrompts


DEFAULTS = {
    # EvoLMM's own values for what GRPOConfig has already
    "num_generations": 5,
    "max_completion_length": 128,
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "loss_type": "grpo",
    "scale_rewards": "none",
    "beta": 1e-3,
    # What EvoLMM adds
    "max_question_length": 128,
    "extra_votes": 0,
    "image_root": None,
    "early_votes": False,
    "max_pixels": 1280 * 28 * 28,
    "prompts": None,
    "reward": "continuous",
    "solver_gamma": 0.7,
    "length_weight": 0.1,
    "length_target": 6,
    "length_cap": 1.0,
    "proposer_entropy_mean": None,
    "proposer_entropy_std": None,
    "baseline": "ema",
    "baseline_momentum": 0.9,
    "blind_questions": 0,
    "diversity_weight": 0.0,
    "blind_weight": 0.0,
    "agreement_band": None,
    "proposer_update_every": 5,
    "train_proposer": True,
    "adapters": "separate",
    "freeze_vision_tower": True,
    "shared_prefix": True,
    "adaptive_kl": True,
    "kl_target": 0.02,
    "kl_rate": 0.10,
    "beta_min": None,
    "beta_max": 100.0,
    "proposer_beta": None,
    "proposer_kl_target": None,
    "collapse_guard": None,
    "rollout": "transformers",
    "vllm_server_urls": None,
    "vllm_adapter_dir": None,
    "vllm_request_timeout": 600.0,
    "vllm_importance_sampling_mode": "token_truncate",
    "async_rollouts": False,
    "collect_preferences": False,
    "preference_agreement": 0.8,
    "write_report": True,
    "report_images": 300,
}


def config(**kwargs):
    return EvoLMMConfig(output_dir="out", report_to="none", **kwargs)


def parse(*arguments):
    (parsed,) = TrlParser(EvoLMMConfig).parse_args_and_config(["--output_dir", "out", *arguments])
    return parsed


# Defaults


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_the_documented_ones(name):
    assert getattr(config(), name) == DEFAULTS[name]


def test_every_added_field_has_a_help_text_and_its_default_is_tested_here():
    inherited = {field.name for field in fields(GRPOConfig)}
    added = [field for field in fields(EvoLMMConfig) if field.name not in inherited]
    assert all(field.metadata["help"] for field in added)
    assert {field.name for field in added} <= set(DEFAULTS)
    redefined = set(EvoLMMConfig.__annotations__) - {"_VALID_DICT_FIELDS"}
    assert all(f"{name} (`" in inspect.getdoc(EvoLMMConfig) for name in redefined)


def test_an_output_dir_alone_is_a_consistent_configuration():
    args = EvoLMMConfig(output_dir="out")
    assert args.images_per_process == args.gradient_accumulation_steps == 4
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == args.num_generations
    assert args.steps_per_generation == args.gradient_accumulation_steps
    assert args.generation_batch_size == 20
    assert args.num_iterations == 1
    assert args.num_votes == 5
    assert args.role_prompts == RolePrompts()
    assert not args.use_vllm


def test_a_micro_batch_is_one_image_whatever_the_number_of_answers():
    args = config(num_generations=8, gradient_accumulation_steps=3)
    assert (args.per_device_train_batch_size, args.images_per_process) == (8, 3)


def test_answers_to_one_question_may_be_spread_over_micro_batches():
    args = config(per_device_train_batch_size=2, gradient_accumulation_steps=10)
    assert args.images_per_process == args.images_per_step == 4


def test_evaluation_batches_follow_the_number_of_evaluated_answers():
    assert config(num_generations_eval=3, eval_strategy="steps", eval_steps=10).per_device_eval_batch_size == 3


def test_extra_votes_are_counted_among_the_votes():
    assert config(extra_votes=3).num_votes == 8


def test_given_prompts_replace_the_defaults():
    assert config(prompts={"system": "Be brief."}).role_prompts == RolePrompts(system="Be brief.")


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_weights_are_not_cast_to_bfloat16():
    assert config().bf16 is False
    assert config(bf16=True, use_cpu=True).bf16 is True


# What is refused, and how


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"use_vllm": True}, "use_vllm=True.*once per step, for one policy.*Set rollout=.vllm."),
        ({"ignore_data_skip": True}, "the images of other steps.*Set `ignore_data_skip=False`"),
        ({"num_iterations": 2}, "num_iterations=2.*exactly one optimizer step.*gradient_accumulation_steps"),
        ({"steps_per_generation": 2}, "steps_per_generation=2.*exactly one optimizer step"),
        ({"generation_batch_size": 40}, "steps_per_generation=8.*Leave .*`generation_batch_size` unset"),
        (
            {"per_device_train_batch_size": 3},
            r"per_device_train_batch_size \(3\).*gradient_accumulation_steps \(4\).*multiple of num_generations \(5\).*"
            "Set per_device_train_batch_size=5",
        ),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"scale_rewards": "group"}, "scale_rewards='group'.*pure length reward.*Set scale_rewards='none'"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch'.*Set scale_rewards='none'"),
        ({"scale_rewards": True}, "scale_rewards='group'.*Set scale_rewards='none'"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation=.*would have no effect: extra rewards are summed",
        ),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 would have no effect: .*longest row"),
        ({"sync_ref_model": True}, "the reference is the frozen base.*larger `kl_target`"),
        ({"loss_type": "bnpo"}, "how a step is cut.*Set loss_type='dapo'"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01.*how a step is cut.*raise `beta`"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True.*how a step is cut"),
        (
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True would have no effect",
        ),
        (
            {"epsilon": 0.1, "delta": 2.0},
            "epsilon=0.1, delta=2.0 would have no effect: .* at a ratio of 1. Leave it unset",
        ),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 would have no effect"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 would have no effect"),
        (
            {"vllm_adapter_dir": "adapters"},
            "vllm_adapter_dir='adapters' would have no effect: with rollout='transformers'",
        ),
        (
            {"train_proposer": False, "diversity_weight": 1.0},
            "diversity_weight=1.0 would have no effect: train_proposer=False",
        ),
        ({"train_proposer": False, "proposer_update_every": 2}, "proposer_update_every=2 would have no effect"),
        ({"reward": "discrete", "solver_gamma": 0.5}, "solver_gamma=0.5 would have no effect: reward='discrete'"),
        ({"reward": "discrete", "length_cap": None}, "length_cap=None would have no effect"),
        (
            {"baseline": "group", "baseline_momentum": 0.5},
            "baseline_momentum=0.5 would have no effect: baseline='group'",
        ),
        ({"blind_weight": 1.0, "blind_questions": 2}, "blind_questions=2 would have no effect: blind_weight=1.0"),
        ({"adaptive_kl": False, "kl_target": 0.1}, "kl_target=0.1 would have no effect: adaptive_kl=False"),
        ({"reward": "majority"}, r"reward='majority'; expected one of \('continuous', 'discrete'\)"),
        ({"baseline": "none"}, r"baseline='none'; expected one of \('ema', 'group'\)"),
        ({"adapters": "one"}, r"adapters='one'; expected one of \('separate', 'shared'\)"),
        ({"extra_votes": -1}, "extra_votes=-1; expected 0 or more"),
        ({"blind_questions": -1}, "blind_questions=-1; expected 0 or more"),
        ({"diversity_weight": -0.5}, "diversity_weight=-0.5; expected 0 or more"),
        ({"blind_weight": -0.5}, "blind_weight=-0.5; expected 0 or more"),
        ({"max_question_length": 0}, "max_question_length=0; expected 1 or more"),
        ({"solver_gamma": 0.0}, "solver_gamma=0.0; expected above 0 and at most 1"),
        ({"solver_gamma": 1.1}, "solver_gamma=1.1; expected above 0 and at most 1"),
        ({"length_target": 0}, "length_target=0; expected 1 or more"),
        ({"proposer_entropy_std": 0.0}, "proposer_entropy_std=0.0; expected above 0"),
        ({"baseline_momentum": 1.0}, "baseline_momentum=1.0; expected 0 or more and below 1"),
        ({"proposer_update_every": 0}, "proposer_update_every=0; expected 1 or more"),
        ({"agreement_band": (0.8, 0.2)}, r"agreement_band=\(0.8, 0.2\); expected two shares, 0 <= low <= high <= 1"),
        ({"agreement_band": (20, 80)}, "expected two shares"),
        ({"agreement_band": (float("nan"), 1.0)}, "expected two shares"),
        ({"agreement_band": [0.5]}, r"agreement_band=\[0.5\]; expected two shares"),
        (
            {"baseline": "group", "gradient_accumulation_steps": 1},
            "baseline='group'.*a rollout has 1 image.*gradient_accumulation_steps.*baseline='ema'.*train_proposer=False",
        ),
        ({"beta": 0.0, "proposer_beta": 0.1}, "beta=0.0 and proposer_beta=0.1.*small value instead of 0"),
        ({"proposer_beta": 0.0}, "beta=0.001 and proposer_beta=0.0.*small value instead of 0"),
        ({"prompts": {"propser": "Ask."}}, r"Unknown names in `prompts`: \['propser'\].*'proposer'"),
        ({"prompts": {"solver": "Answer."}}, r"must contain the field \{question\}"),
        ({"prompts": "prompts.json"}, "prompts='prompts.json'; expected a JSON object"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_combination_that_cannot_work_is_refused_with_what_to_do(wrong, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        config(**wrong)


@pytest.mark.parametrize(
    "allowed",
    [
        {"baseline": "group", "gradient_accumulation_steps": 1, "train_proposer": False},
        {"baseline": "group"},
        {"beta": 0.0},
        {"beta": 0.0, "proposer_beta": 0.0},
        {"generation_batch_size": 20},
        {"agreement_band": (0.0, 1.0)},
        {"scale_rewards": False},
        {"baseline_momentum": 0.0},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"length_cap": None, "max_pixels": None},
        {"reward": "discrete", "adapters": "shared", "train_proposer": False, "adaptive_kl": False},
    ],
    ids=str,
)
def test_a_combination_that_works_is_not_refused(allowed):
    args = config(**allowed)
    for name, value in allowed.items():
        assert getattr(args, name) == ("none" if name == "scale_rewards" else value)


@pytest.mark.parametrize("name", ["num_generation", "gamma", "nonsense"])
def test_an_unknown_field_is_a_type_error(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        config(**{name: 1})


# The command line


def test_a_command_line_without_options_is_the_default_configuration():
    parsed, default = parse("--report_to", "none"), config()
    for field in fields(EvoLMMConfig):
        assert getattr(parsed, field.name) == getattr(default, field.name), field.name


def test_options_are_parsed_with_their_types():
    arguments = "--num_generations 8 --extra-votes 4 --solver_gamma 0.5 --adapters shared --freeze_vision_tower false"
    arguments += " --beta_min 1e-8 --proposer_kl_target 0.05 --proposer_entropy_mean 1.1 --length_target 10"
    arguments += " --max_pixels 100352"
    parsed = parse(*arguments.split())
    expected = {"num_generations": 8, "extra_votes": 4, "solver_gamma": 0.5, "adapters": "shared"}
    expected |= {"freeze_vision_tower": False, "beta_min": 1e-8, "proposer_kl_target": 0.05}
    expected |= {"proposer_entropy_mean": 1.1, "length_target": 10, "max_pixels": 100352}
    assert {name: getattr(parsed, name) for name in expected} == expected
    assert parsed.per_device_train_batch_size == 8
    parsed = parse("--reward", "discrete", "--no_train_proposer")
    assert (parsed.reward, parsed.train_proposer) == ("discrete", False)


@pytest.mark.parametrize("name", ["length_cap", "max_pixels"])
def test_an_optional_limit_can_be_lifted_on_the_command_line(name):
    assert getattr(parse(f"--{name}", "none"), name) is None


def test_prompts_are_a_json_object_on_the_command_line():
    parsed = parse("--prompts", '{"system": "Be brief.", "solver": "Q: {question}"}')
    assert parsed.role_prompts == RolePrompts(system="Be brief.", solver="Q: {question}")


def test_a_guard_is_an_action_or_a_json_object_on_the_command_line():
    assert parse("--collapse_guard", "stop").collapse_guard == "stop"
    given = {"action": "rewind", "max_kl": 0.3, "min_entropy": None, "window": 7}
    assert parse("--collapse_guard", json.dumps(given)).collapse_guard == given
    with pytest.raises(ValueError, match="collapse_guard holds 'max_kll'.*expected of action, .*max_kl"):
        parse("--collapse_guard", '{"max_kll": 0.3}')


def test_an_agreement_band_is_two_numbers_on_the_command_line():
    parsed = parse("--agreement_band", "0.3", "0.9", "--seed", "7")
    assert list(parsed.agreement_band) == [0.3, 0.9]
    assert parsed.seed == 7


@pytest.mark.parametrize("band", [["0.3"], ["0.3", "0.6", "0.9"], ["0.9", "0.3"]])
def test_an_agreement_band_of_anything_else_is_refused(band):
    with pytest.raises(ValueError, match="expected two shares"):
        parse("--agreement_band", *band)


@pytest.mark.parametrize(
    "arguments", [["--reward", "majority"], ["--nonsense", "1"], ["--solver_gamma", "much"]], ids=" ".join
)
def test_what_the_command_line_does_not_know_ends_the_program(arguments, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        parse(*arguments)
    said = f"{error.value} {capsys.readouterr().err}"
    assert arguments[0] in said


def write_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_a_yaml_file_configures_a_run_and_the_command_line_goes_before_it(tmp_path):
    path = write_yaml(
        tmp_path,
        "num_generations: 8\nlearning_rate: 1e-5\nagreement_band: [0.3, 0.9]\nlength_cap: null\nextra_votes: 2\n"
        "train_proposer: false\nprompts:\n  system: Be brief.\ncollapse_guard: {action: rewind, max_kl: 0.3}\n",
    )
    parsed = parse("--config", path, "--extra_votes", "3")
    assert (parsed.num_generations, parsed.learning_rate, parsed.extra_votes) == (8, 1e-5, 3)
    assert parsed.collapse_guard == {"action": "rewind", "max_kl": 0.3}
    assert (parsed.agreement_band, parsed.length_cap, parsed.train_proposer) == ([0.3, 0.9], None, False)
    assert parsed.role_prompts == RolePrompts(system="Be brief.")


def test_an_unknown_key_in_a_yaml_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Unknown arguments from config file.*--solver_gama"):
        parse("--config", write_yaml(tmp_path, "num_generations: 8\nsolver_gama: 0.5\n"))


@pytest.mark.parametrize("line", ["reward: majority", "extra_votes: -1", "agreement_band: [0.9]"])
def test_a_wrong_value_in_a_yaml_file_is_refused_as_in_code(tmp_path, line):
    with pytest.raises(ValueError, match=f"{line.split(':')[0]}="):
        parse("--config", write_yaml(tmp_path, line))


def test_a_configuration_survives_a_round_trip_through_its_own_dict():
    args = config(prompts={"system": "Be brief."}, agreement_band=[0.3, 0.9], extra_votes=2)
    names = {field.name for field in fields(EvoLMMConfig)}
    own = {name: value for name, value in args.to_dict().items() if name in DEFAULTS and name in names}
    again = config(**own)
    assert all(getattr(again, name) == getattr(args, name) for name in own)
