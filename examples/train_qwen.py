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
Train Qwen2.5-VL or Qwen3-VL on images alone: `evolmm train` for those who launch it themselves.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml examples/train_qwen.py \
        --config examples/configs/qwen2_5_vl_3b_24gb.yaml --image_dir images/train --output_dir charts-evolmm
"""

import sys

from evolmm_trl.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
