"""The recipe that shows layers, as a user runs it: pictures, their numbers, a page, and one line for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_freeze import FreezePlan, freeze, save_delta
from hf_freeze.errors import FreezeError
from hf_freeze.lens import LayerSimilarity, WeightDrift
from hf_freeze.lens.plots import draw
from tests.recipes.scripts import load_script
from tests.tiny import tiny_folder, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "inspect_layers.py")
SMALL = ["--max_texts=3", "--max_tokens=24", "--batch_size=2"]
PICTURES = {"similarity", "logit_lens", "gradients", "activations", "decoder_attention"}


@pytest.fixture
def inspect_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The recipe's main() in this process: importing torch once more for each run would be most of the time."""
    module = load_script(RECIPE)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [RECIPE, *arguments])
        module.main()

    return run


def written(output: Path) -> set[str]:
    """Names of the pictures; each has its numbers and stands on the page."""
    names = {path.stem for path in output.glob("*.png")}
    assert names == {path.stem for path in output.glob("*.json")} == {path.stem for path in output.glob("*.svg")}
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert all(f'<section id="{name}">' in page for name in names)
    assert not [path for path in output.iterdir() if "tmp" in path.name]
    return names


def test_a_fine_tuned_model_is_shown_beside_the_one_it_was_trained_from(
    inspect_layers: Callable[..., None], tmp_path: Path
) -> None:
    base, output = tiny_folder("llama", tmp_path), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[3].mlp.up_proj.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "tuned")
    given = ["--model_name_or_path", str(tmp_path / "tuned"), "--compare_to", str(base)]
    inspect_layers(*given, "--output_dir", str(output), *SMALL)
    assert written(output) == PICTURES | {"compared", "drift"}
    assert "declined" not in (output / "index.html").read_text().partition("</style>")[2]

    drift = WeightDrift.from_dict(json.loads((output / "drift.json").read_text()))
    assert [part for part, by in zip(drift.parts, drift.drift, strict=True) if by] == ["decoder.3"]
    assert draw(drift, tmp_path / "again")[0].read_bytes() == (output / "drift.png").read_bytes()
    similarity = LayerSimilarity.from_dict(json.loads((output / "compared.json").read_text()))
    assert draw(similarity, tmp_path / "again")[0].read_bytes() == (output / "compared.png").read_bytes()


def test_an_encoder_decoder_is_shown_on_texts_of_ones_own(inspect_layers: Callable[..., None], tmp_path: Path) -> None:
    model, output = tiny_folder("bart", tmp_path), tmp_path / "out"
    rows = ["text,short", *('"A good mug, but the handle is weak and hot.",Weak handle' for _ in range(3))]
    (tmp_path / "reviews.csv").write_text("\n".join(rows))
    given = ["--text_file", str(tmp_path / "reviews.csv"), "--text_column", "text", "--attention_block=-1"]
    inspect_layers("--model_name_or_path", str(model), "--output_dir", str(output), *given, *SMALL)
    assert written(output) == PICTURES | {"encoder_attention", "cross_attention"}
    assert json.loads((output / "cross_attention.json").read_text())["block"] == 3


@pytest.mark.slow
def test_adapters_and_deltas_are_put_on_their_base(inspect_layers: Callable[..., None], tmp_path: Path) -> None:
    base = tiny_folder("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "lora")
    inspect_layers("--model_name_or_path", str(tmp_path / "lora"), "--output_dir", str(tmp_path / "out"), *SMALL)
    assert written(tmp_path / "out") == PICTURES | {"drift"}

    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "bare")  # without a tokenizer, as what is compared with may be
    freeze(model, FreezePlan(decoder_blocks=3))
    model.model.layers[3].mlp.up_proj.weight.data.mul_(1.5)
    save_delta(model, tmp_path / "delta")
    given = ["--compare_to", str(tmp_path / "bare"), "--output_dir", str(tmp_path / "of_delta")]
    inspect_layers("--model_name_or_path", str(tmp_path / "delta"), *given, *SMALL)
    drift = json.loads((tmp_path / "of_delta" / "drift.json").read_text())
    assert [part for part, by in zip(drift["parts"], drift["drift"], strict=True) if by] == ["decoder.3"]


def test_what_a_model_has_not_is_declined_on_the_page(
    inspect_layers: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder("llama", tmp_path)
    (tmp_path / "short.csv").write_text("review\na\n")
    given = ["--text_file", str(tmp_path / "short.csv"), "--output_dir", str(tmp_path / "out")]
    inspect_layers("--model_name_or_path", str(folder), *given, *SMALL)
    assert written(tmp_path / "out") == PICTURES - {"similarity", "gradients"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Not to be had: CKA over 0 decoder tokens was asked for" in page
    assert "declined: CKA over 0 decoder tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_texts=0"], "--max_texts 0 was asked for; use 1 or more"),
        (["--text_file", "missing.csv"], "missing.csv"),
        (["--model_name_or_path", "/no/such/model"], "/no/such/model was given as model; there is no such folder"),
        (["--compare_to", "/no/such/model"], "/no/such/model was given as model; there is no such folder"),
        (["--attention_block=4"], "--attention_block 4 was asked for; the decoder has the blocks 0 to 3"),
        (["--max_tokens=3"], "--max_tokens 3 was asked for, as max_source_tokens. No room: the text around a review"),
        (["--max_tokens=0"], "max_tokens=0; it is a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_anything_is_measured(
    inspect_layers: Callable[..., None], arguments: list[str], message: str, tmp_path: Path
) -> None:
    given = ["--model_name_or_path", str(tiny_folder("llama", tmp_path)), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(FreezeError, match=message):
        inspect_layers(*given, *SMALL, *arguments)
    assert not list((tmp_path / "out").glob("*.*"))


def test_a_mistake_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, RECIPE, "--text_file", "missing.csv", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=600, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
