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
Makes the screenshots of docs/report.md: trains the demo model with both rewards and photographs the page about them.

    python examples/demo/report_screenshots.py --output docs/images

It takes about five minutes, and a Chromium.
"""

import argparse
import shutil
from pathlib import Path

from charts import EVOLVE_SEEDS, TEST_SEEDS, labelled_questions, make_images
from datasets import Dataset
from demo import HERE, Progress, demo_config, demo_lora, load_model
from PIL import Image
from playwright.sync_api import sync_playwright
from transformers import PrinterCallback

from evolmm_trl import EvoLMMTrainer, load_images, write_report


# Name, width, height, colour scheme, run or runs, and where on the page
SHOTS = (
    ("report_wide", 1280, 1500, "light", "one", "top"),
    ("report_gallery", 1280, 980, "light", "one", "gallery"),
    ("report_dark", 1280, 900, "dark", "one", "curves"),
    ("report_two", 1280, 1000, "light", "two", "gallery"),
    ("report_narrow", 390, 1500, "light", "one", "top"),
    ("report_narrow_gallery", 390, 1500, "light", "one", "gallery"),
)


def train(folder: Path, reward: str) -> None:
    """A run of the demo, with labelled questions to measure it by."""
    if (folder / "_report" / "report.html").exists():
        return
    model, processor = load_model(HERE / "models" / "room")
    trainer = EvoLMMTrainer(
        model=model,
        args=demo_config(folder, reward=reward, eval_strategy="steps", eval_steps=12, blind_questions=4),
        train_dataset=load_images(make_images(folder.parent / "images", EVOLVE_SEEDS[:1000]), streaming=False),
        eval_dataset=Dataset.from_list(labelled_questions(TEST_SEEDS[:60])),
        processing_class=processor,
        peft_config=demo_lora(),
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--output", type=Path, default=HERE.parent.parent / "docs" / "images")
    parser.add_argument("--runs", type=Path, default=Path("runs/report"))
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of the browser")
    arguments = parser.parse_args()
    folders = [arguments.runs / reward for reward in ("continuous", "discrete")]
    for folder in folders:
        train(folder, folder.name)
    pages = {"one": write_report(folders[0]), "two": write_report(folders, arguments.runs / "two.html")}
    arguments.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for name, width, height, scheme, page, place in SHOTS:
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(pages[page].resolve().as_uri())
            if place != "top":
                tab.evaluate("id => document.getElementById(id).scrollIntoView()", place)
            tab.wait_for_timeout(300)
            file = arguments.output / f"{name}.png"
            tab.screenshot(path=file)
            tab.close()
            # 256 colours are enough, and a third of the bytes
            Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
            print(f"{file}: {file.stat().st_size // 1000} kB")
        browser.close()


if __name__ == "__main__":
    main()
