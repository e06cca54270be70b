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

"""Questions about images: the vote, files of strangers, and answers that do not depend on what is asked beside them."""

import json
import os
from pathlib import Path

import pytest
import torch
from charts import TEST_SEEDS, chart, labelled_questions
from peft import get_peft_model
from tiny_trainer import lora
from transformers import AutoModelForImageTextToText

from evolmm_trl import RolePrompts, ask, canonical_answer, cli, load_solver
from evolmm_trl.asking import _seeds
from evolmm_trl.data import UnreadableImageError
from evolmm_trl.prompts import read_answer


DEMO = Path(__file__).parent.parent / "examples" / "demo"
MODEL = str(DEMO / "models" / "room")
PROMPTS = RolePrompts(**json.loads((DEMO / "prompts.json").read_text()))


@pytest.fixture(scope="module")
def demo_model():
    return load_solver(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    return labelled_questions(TEST_SEEDS[:12])


@pytest.fixture(scope="module")
def replies(demo_model, rows):
    return sampled(demo_model, rows)


def sampled(demo_model, rows, **changes):
    settings = {"samples": 5, "max_new_tokens": 32, "prompts": PROMPTS, **changes}
    return ask(*demo_model, [row["image"] for row in rows], [row["question"] for row in rows], **settings)


def test_the_majority_of_the_samples_is_the_answer(replies, rows):
    right = 0
    for reply, row in zip(replies, rows, strict=True):
        answers = [canonical_answer(read_answer(text).text) for text in reply.completions]
        best = max(map(answers.count, set(answers) - {None}))
        assert reply.vote.agreement == best / 5
        assert answers.count(canonical_answer(reply.answer)) == best
        right += canonical_answer(reply.answer) == canonical_answer(row["answer"])
    assert right >= 8  # the vote of this model is right on nine questions of ten
    assert len({text for reply in replies for text in reply.completions}) > 12


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(demo_model, rows, replies):
    assert sampled(demo_model, rows[3:6], batch_size=2) == replies[3:6]
    assert sampled(demo_model, rows[3:6], seed=1) != replies[3:6]


def test_every_image_question_and_sample_has_a_random_stream_of_its_own(rows):
    images = [row["image"] for row in rows[:2]]
    streams = [seed for image in images for text in ("a", "b") for seed in _seeds(0, 3, image, text)]
    assert len(set(streams)) == 12
    assert _seeds(0, 3, images[0].copy(), "a") == streams[:3]


def test_one_sample_is_greedy(demo_model, rows):
    model, processor = demo_model
    (reply,) = sampled(demo_model, rows[:1], samples=1)
    text = processor.apply_chat_template(
        PROMPTS.solver_messages(rows[0]["question"]), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[rows[0]["image"]], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].size(1) :]
    assert reply.completions == (processor.batch_decode(output, skip_special_tokens=True)[0],)


def test_marks_in_a_question_are_not_asked(demo_model, rows):
    question = rows[0]["question"]
    plain = sampled(demo_model, rows[:1])
    assert sampled(demo_model, [rows[0] | {"question": f"<|im_end|>{question}<|image_pad|></answer>"}]) == plain


def test_what_cannot_be_asked_is_refused(demo_model, rows):
    image = rows[0]["image"]
    for question, message in (
        ("", "empty"),
        ("<|im_end|>", "empty"),
        ("\ud800", "surrogate"),
        ("x" * 10_001, "10,001"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(*demo_model, [image], [question])
    with pytest.raises(UnreadableImageError, match="not an image"):
        ask(*demo_model, [b"junk"], ["Why?"])
    with pytest.raises(UnreadableImageError, match=r"missing file \(gone.png\)"):
        ask(*demo_model, ["gone.png"], ["Why?"])
    with pytest.raises(ValueError, match="one question per image"):
        ask(*demo_model, [image, image], ["Why?"])
    with pytest.raises(ValueError, match="all 3 samples are the same"):
        ask(*demo_model, [image], ["Why?"], samples=3, temperature=0.0)
    assert ask(*demo_model, [], []) == []


# evolmm ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask")
    (folder / "charts").mkdir()
    for i in range(3):
        chart(TEST_SEEDS[i]).image().save(folder / "charts" / f"{i}.png")
    (folder / "charts" / "broken.png").write_bytes(b"junk")
    rows = [
        {"image": "charts/0.png", "question": "blue"},
        {"image": "charts/0.png", "question": "q" * 20_000},
        {"image": "charts/0.png", "question": "\ud800"},
        {"image": "x" * 5_000, "question": "blue"},
        {"image": "charts/\x1b[31m.png", "question": "blue"},
        {"image": "charts/broken.png", "question": "blue"},
        {"image": "charts/0.png"},
        {"image": "charts/1.png", "question": "<|im_end|>blue"},
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_bytes("\n".join([*lines, "{", "[]", ""]).encode() + b"\xff\n")
    return folder


def evolmm_ask(*arguments) -> int:
    options = ("--model", MODEL, "--prompts", DEMO / "prompts.json", "--max_new_tokens", 32, "--batch_size", 3)
    return cli.main([str(word) for word in ("ask", *options, *arguments)])


def test_one_image(folder, demo_model, capsys):
    (reply,) = ask(*demo_model, [folder / "charts" / "0.png"], ["blue"], samples=4, max_new_tokens=32, prompts=PROMPTS)
    assert evolmm_ask("--image", folder / "charts" / "0.png", "blue", "--samples", 4) == 0
    answer, confidence = capsys.readouterr().out.splitlines()
    assert answer == reply.answer
    assert confidence.startswith(f"agreement {reply.vote.agreement:.2f} of 4 answers ({reply.answer}: ")

    assert evolmm_ask("--image", folder / "charts" / "0.png", "blue", "--samples", 4, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] == reply.answer and record["completions"] == list(reply.completions)
    assert record["agreement"] == reply.vote.agreement and record["votes"] == reply.vote.counts


def test_an_image_that_cannot_be_read_is_an_error(folder, capsys):
    assert evolmm_ask("--image", folder / "charts" / "broken.png", "blue") == 1
    assert "broken.png: unreadable image: not an image" in capsys.readouterr().err


def test_a_folder(folder, capsys):
    assert evolmm_ask("--image", folder / "charts", "blue") == 0
    out, err = capsys.readouterr()
    assert [Path(line.split("\t")[0]).name for line in out.splitlines()] == ["0.png", "1.png", "2.png"]
    assert "broken.png: unreadable image" in err and "3 answered, 1 skipped" in err


def test_a_file_of_strangers(folder, capsys):
    output = folder / "answers.jsonl"
    assert evolmm_ask("--input", folder / "rows.jsonl", "--output", output, "--samples", 2) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["row"], record["question"]) for record in records] == [(0, "blue"), (7, "<|im_end|>blue")]
    assert all(len(record["completions"]) == 2 and "agreement" in record for record in records)
    out, err = capsys.readouterr()
    assert out == "" and "2 answered, 9 skipped" in err
    for number, reason in [(2, "20,000 characters"), (3, "broken"), (4, "missing"), (5, "missing"), (7, "lacks")]:
        assert any(f"rows.jsonl:{number}" in line and reason in line for line in err.splitlines()), number
    assert "broken.png: unreadable image" in err
    assert "\x1b" not in err and max(map(len, err.splitlines())) < 500


def test_a_row_may_name_images_of_the_root_alone(folder, tmp_path, capsys, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    image = elsewhere / "0.png"
    image.write_bytes((folder / "charts" / "0.png").read_bytes())
    (here / "rows.jsonl").write_text(json.dumps({"image": str(image), "question": "blue"}))
    monkeypatch.chdir(here)
    assert evolmm_ask("--input", "rows.jsonl") == 1
    assert "0.png'): path outside the image root; --image_root" in capsys.readouterr().err
    assert evolmm_ask("--input", "rows.jsonl", "--image_root", elsewhere) == 0


def test_nothing_answered_is_a_failure(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 30)
    assert evolmm_ask("--input", tmp_path / "rows.jsonl") == 1
    err = capsys.readouterr().err
    assert "rows.jsonl:20: lacks image" in err and "rows.jsonl:21:" not in err
    assert "0 answered, 30 skipped" in err and "could be answered" in err


def test_what_is_read_from_is_not_written_to(folder, tmp_path, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model is loaded though its answers cannot be written")

    monkeypatch.setattr("evolmm_trl.solver.load_solver", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "0.png", "question": "blue"}\n')
    os.link(rows, tmp_path / "linked.jsonl")
    image = tmp_path / "0.png"
    image.write_bytes((folder / "charts" / "0.png").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    for output in (rows, "rows.jsonl", f"../{tmp_path.name}/rows.jsonl", "linked.jsonl"):
        assert evolmm_ask("--input", rows, "--output", output) == 2
        assert "is read from and would be overwritten" in capsys.readouterr().err
    assert evolmm_ask("--image", image, "blue", "--output", image) == 2
    assert evolmm_ask("--input", rows, "--output", tmp_path) == 2
    assert "is no file" in capsys.readouterr().err
    assert evolmm_ask("--input", rows, "--output", tmp_path / "gone" / "answers.jsonl") == 2
    assert "There is no folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_answers_that_are_there_stay_until_there_are_new_ones(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "answers.jsonl"
    output.write_text("old")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert evolmm_ask("--input", tmp_path / "rows.jsonl", "--output", output) == 1
    assert output.read_text() == "old" and not (tmp_path / "answers.jsonl.part").exists()

    calls = []

    def fail_later(*args, **kwargs):
        if calls:
            raise ValueError("it fails")
        calls.append(ask(*args, **kwargs))
        return calls[0]

    monkeypatch.setattr("evolmm_trl.asking.ask", fail_later)
    arguments = ("--image", folder / "charts", "blue", "--batch_size", 1, "--output", output)
    assert evolmm_ask(*arguments) == 1
    assert output.read_text() == "old"
    assert len((tmp_path / "answers.jsonl.part").read_text().splitlines()) == 1
    assert "What was written until then is in" in capsys.readouterr().err
    monkeypatch.undo()
    assert evolmm_ask(*arguments) == 0
    assert len(output.read_text().splitlines()) == 3 and not (tmp_path / "answers.jsonl.part").exists()


def test_the_adapter_answers(folder, capsys, tmp_path):
    """An adapter that turns every answer into something else, in the authors' layout."""
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(MODEL), lora(exclude_modules=r"model\.visual\..*")
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "solver")
    image = folder / "charts" / "0.png"
    assert evolmm_ask("--image", image, "blue", "--json") == 0
    base = json.loads(capsys.readouterr().out)["completions"]
    assert evolmm_ask("--adapter", tmp_path, "--image", image, "blue", "--json") == 0
    adapted = json.loads(capsys.readouterr().out)["completions"]
    assert adapted != base

    # The prompts that were saved with it, and a word where none were
    alone = ("ask", "--model", MODEL, "--adapter", str(tmp_path), "--image", str(image), "blue", "--json")
    (tmp_path / "evolmm_prompts.json").write_text((DEMO / "prompts.json").read_text())
    assert cli.main([*alone, "--max_new_tokens", "32"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["completions"] == adapted and "is not known" not in err
    (tmp_path / "evolmm_prompts.json").unlink()
    assert cli.main([*alone, "--max_new_tokens", "32"]) == 0
    out, err = capsys.readouterr()
    assert (
        json.loads(out)["completions"] != adapted
        and "was trained is not known: it is asked with the default ones" in err
    )
    (tmp_path / "evolmm_prompts.json").write_text("{")
    assert cli.main([*alone]) == 1
    assert "is not JSON" in capsys.readouterr().err

    assert (
        cli.main(["ask", "--model", MODEL, "--adapter", str(tmp_path / "nothing"), "--image", str(image), "blue"]) == 1
    )
    err = capsys.readouterr().err
    assert "neither a folder nor a repository on the Hub" in err and "default" not in err
