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

"""
Train Qwen2.5-VL or Qwen3-VL on images alone.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml examples/train_qwen.py \
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
        --image_dir images/train \
        --output_dir charts-evolmm \
        --dtype bfloat16 \
        --use_peft

or with a recipe from a file, of which every value can be replaced on the command line:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml examples/train_qwen.py \
        --config examples/configs/qwen2_5_vl_3b_24gb.yaml --image_dir images/train --output_dir charts-evolmm
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from evolmm_trl import EvoLMMConfig, EvoLMMTrainer, load_images


@dataclass
class ScriptArguments:
    """
    What this script trains on.

    Args:
        image_dir (`str`):
            Images: a folder (searched recursively), the id of a dataset on the Hub, or webdataset shards such as
            `"shards/{0000..0015}.tar"`.
        image_split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub.
        image_include (`list[str]`, *optional*):
            First-level subfolders of a folder to keep.
        image_streaming (`bool`, *optional*, defaults to `True`):
            Whether to stream the images. A stream's length is not known: `max_steps` says how long to train.
        eval_dataset (`str`, *optional*):
            Labelled questions with the columns `image`, `question` and `answer`: the id of a dataset on the Hub, or a
            folder that `datasets.load_dataset` reads, such as images with a `metadata.jsonl`. Never trained on.
        eval_split (`str`, *optional*, defaults to `"test"`):
            Its split. A slice works too, as in `"test[:500]"`.
    """

    image_dir: str = field(
        metadata={
            "help": "Images: a folder, the id of a dataset on the Hub, or webdataset shards ('a/{0000..0015}.tar')."
        }
    )
    image_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    image_include: list[str] | None = field(
        default=None, metadata={"help": "First-level subfolders of a folder to keep."}
    )
    image_streaming: bool = field(
        default=True, metadata={"help": "Whether to stream the images; `max_steps` then says how long to train."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Labelled questions, with the columns image, question and answer: a folder or the id of a dataset "
            "on the Hub. Never trained on."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "Split of `eval_dataset`, such as 'test[:500]'."})


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, EvoLMMConfig, ModelConfig))


def main(script_args: ScriptArguments, training_args: EvoLMMConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing; pass one, such as Qwen/Qwen2.5-VL-3B-Instruct.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if model_args.use_peft and model_args.lora_target_modules is None and not model_args.lora_target_parameters:
        model_args.lora_target_modules = "all-linear"  # of the language model: the vision tower is left out

    images = load_images(
        script_args.image_dir,
        split=script_args.image_split,
        streaming=script_args.image_streaming,
        include=script_args.image_include,
    )
    questions = None
    if script_args.eval_dataset is not None:
        questions = load_dataset(script_args.eval_dataset, split=script_args.eval_split)

    trainer = EvoLMMTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=images,
        eval_dataset=questions,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # "true" resumes from the newest checkpoint in `output_dir`, anything else is a checkpoint's folder
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume is not None and resume.lower() == "true" else resume)

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
