from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_freeze import FreezePlan, freeze, read_anatomy
from hf_freeze.anatomy import anatomy_table
from hf_freeze.tables import Table, count_text
from tests.zoo import architectures, build


def tiny() -> GPT2LMHeadModel:
    """So small that every count is shown in full."""
    return GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=4, n_head=2, vocab_size=16, n_positions=8))


FROZEN = """\
GPT2LMHeadModel: frozen and trained

  part                                  where                              parameters   state
 ─────────────────────────────────────────────────────────────────────────────────────────────────────
  embeddings                            transformer.wte, transformer.wpe           96   frozen
  decoder blocks 0-1                    transformer.h[0:2]                        488   frozen
  --- the backward pass ends here ---
  decoder blocks 2-3                    transformer.h[2:4]                        488   trained
  final norm                            transformer.ln_f                            8   trained
  head                                  lm_head                                     0   frozen (tied)

496 of 1.1 k parameters train (45.9 %); the backward pass ends at: decoder block 2.
Tie: transformer.wte.weight = lm_head.weight (one tensor, counted once).
decoder_blocks was not given: the lower half, 2 of 4 blocks.
lm_head.weight is the same tensor as transformer.wte.weight: both are frozen (tied_head='freeze').
Frozen modules are held in eval whatever model.train() says.
Can be cached: decoder embeddings and blocks 0-1."""

MIXED = """\
GPT2LMHeadModel: frozen and trained

  part                                  where                              parameters   state
 ───────────────────────────────────────────────────────────────────────────────────────────────
  embeddings                            transformer.wte, transformer.wpe           96   frozen
  decoder block 0                       transformer.h[0]                          244   frozen
  --- the backward pass ends here ---
  decoder block 1                       transformer.h[1]                          244   mixed
  decoder blocks 2-3                    transformer.h[2:4]                        488   trained
  final norm                            transformer.ln_f                            8   trained
  head                                  lm_head                                    64   trained

568 of 1.1 k parameters train (49.7 %); the backward pass ends at: decoder block 1.
lm_head.weight is untied from transformer.wte.weight: cloned, and the clone is trained.
Frozen modules are held in eval whatever model.train() says.
Can be cached: decoder embeddings and block 0.
Warning: Part of decoder block 1 trains though 2 blocks were to be frozen: the backward pass must reach it, and
nothing above it can be cached."""

ANATOMY = """\
GPT2LMHeadModel: anatomy

  part                 where                              parameters
 ────────────────────────────────────────────────────────────────────
  embeddings           transformer.wte, transformer.wpe           96
  decoder blocks 0-3   transformer.h[0:4]                        976
  final norm           transformer.ln_f                            8
  head                 lm_head                                     0

Tie: transformer.wte.weight = lm_head.weight (one tensor, counted once)."""


def test_the_report_of_a_small_gpt2() -> None:
    assert str(freeze(tiny())) == FROZEN


def test_a_block_that_is_frozen_in_part_is_shown_as_mixed() -> None:
    assert str(freeze(tiny(), FreezePlan(decoder_blocks=2, tied_head="untie", train=(r"h\.1\.ln_1",)))) == MIXED


def test_the_anatomy_of_a_small_gpt2() -> None:
    assert str(read_anatomy(tiny())) == ANATOMY


def test_the_report_is_the_same_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(freeze(tiny())) == FROZEN


def test_the_report_in_markdown() -> None:
    markdown = freeze(tiny()).to_markdown()
    assert markdown.startswith(
        "**GPT2LMHeadModel: frozen and trained**\n\n"
        "| part | where | parameters | state |\n|---|---|---|---|\n"
        "| embeddings | transformer.wte, transformer.wpe | 96 | frozen |\n"
    )
    assert markdown.endswith("\n\nCan be cached: decoder embeddings and blocks 0-1.")


def test_a_bar_in_a_cell_does_not_break_markdown() -> None:
    table = Table("T", ("a", "b"), (("x|y", "1"),))
    assert table.to_markdown().splitlines()[-1] == r"| x\|y | 1 |"


def test_the_report_as_a_dict_survives_json() -> None:
    report = freeze(tiny(), FreezePlan(decoder_blocks=3))
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["plan"] == FreezePlan(decoder_blocks=3).to_dict()
    assert (values["trainable_parameters"], values["total_parameters"]) == (252, 1080)
    assert (values["lowest_trainable"], values["cuts"], values["why_no_cut"]) == (["decoder", 3], [["decoder", 3]], "")
    assert values["table"]["rows"][0] == {
        "part": "embeddings",
        "where": "transformer.wte, transformer.wpe",
        "parameters": "96",
        "state": "frozen",
    }
    assert len(values["frozen_names"]) + len(values["trainable_names"]) == len(list(tiny().named_parameters()))


@pytest.mark.parametrize("tied_head", ["freeze", "train", "untie"])
def test_rows_sum_to_the_total_with_ties_counted_once(tied_head: str) -> None:
    model = tiny()
    report = freeze(model, FreezePlan(tied_head=tied_head))  # type: ignore[arg-type]
    rows = report.to_dict()["table"]["rows"]
    shown = sum(int(row["parameters"] or 0) for row in rows)
    assert shown == sum(p.numel() for p in model.parameters()) == report.total_parameters
    trained = sum(int(row["parameters"]) for row in rows if row["state"] == "trained")
    in_a_mixed_row = 16 * 4 if tied_head == "train" else 0  # the token embeddings, beside the frozen positions
    assert trained + in_a_mixed_row == report.trainable_parameters


@pytest.mark.parametrize("model_type", ["bart", "t5", "git", "zamba", "encoder-decoder", "gemma3n_text", "xlm"])
def test_the_parts_of_every_kind_of_model_sum_to_its_parameters(model_type: str) -> None:
    from hf_freeze.anatomy.value import part_rows as _part_rows

    model = build(model_type)
    rows = _part_rows(read_anatomy(model), {})
    assert sum(size for _, _, size, _ in rows) == sum(p.numel() for p in model.parameters())
    assert model_type in dict(architectures())


def test_an_encoder_decoder_is_shown_stack_by_stack() -> None:
    labels = [row[0] for row in freeze(build("t5")).table.rows]
    assert labels == [
        "embeddings",
        "encoder embeddings",
        "encoder blocks 0-1",
        "--- the backward pass ends here ---",
        "encoder blocks 2-3",
        "encoder final norm",
        "decoder embeddings",
        "decoder blocks 0-1",
        "decoder blocks 2-3",
        "decoder final norm",
        "head",
    ]


def test_embeddings_that_train_put_the_line_at_the_bottom_and_a_warning_below() -> None:
    text = str(freeze(tiny(), FreezePlan(embeddings=False)))
    assert text.index("the backward pass ends here") < text.index("embeddings   ")
    assert "the backward pass ends at: embeddings." in text
    assert "Warning: Blocks are frozen but the embeddings train" in text
    assert "Nothing can be cached: the embeddings train (transformer.wte.weight)" in text


def test_adapters_are_shown_as_mixed_blocks() -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    states = {row[0]: row[3] for row in freeze(model).table.rows}
    assert states["decoder blocks 0-1"] == "frozen"
    assert states["decoder blocks 2-3"] == "mixed"
    assert states["head"] == "frozen"


def test_how_a_plain_module_was_read_is_said_below_the_table() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))

    assert "told by the order of registration" in anatomy_table(read_anatomy(Plain())).lines[-1]


def test_many_ties_are_shortened() -> None:
    lines = anatomy_table(read_anatomy(build("zamba"))).lines
    assert [line.split(":")[0] for line in lines] == ["Tie"] * 4 + ["... and 6 more ties."]


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (0, "", "0"), (999, "", "999"), (1000, "", "1.0 k"), (999_949, "", "999.9 k"), (999_999, "", "1.0 M"),
        (70_553_706_496, "", "70.6 B"), (4e9, "B", "4.0 GB"), (512, "B", "512 B"), (2e12, "FLOP", "2.0 TFLOP"),
    ],
)  # fmt: skip
def test_counts_have_a_prefix_and_never_four_digits(count: float, unit: str, text: str) -> None:
    assert count_text(count, unit) == text
