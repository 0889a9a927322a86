"""A row is known by what the prefix sees of it, whatever stands around it in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_freeze import FreezePlan, PrefixCache, freeze
from hf_freeze.errors import CannotCache
from hf_freeze.prefix.build import TOKENS_CPU, _batches
from hf_freeze.prefix.rows import PREFIX_KEY, Rows, read_rows

TOKENS = st.lists(st.integers(0, 63), min_size=1, max_size=9)  # 0 is the padding's id too: a row may hold it
SIDES = ("left", "right")


def padded(rows: list[list[int]], side: str = "right", width: int | None = None, fill: int = 0) -> torch.Tensor:
    """[rows, width]"""
    width = width or max(map(len, rows))
    pad = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor(
        [more + row if side == "left" else row + more for row, more in zip(rows, pad, strict=True)]
    ).reshape(len(rows), width)


def batch_of(rows: list[list[int]], side: str = "right", width: int | None = None) -> dict[str, torch.Tensor]:
    """What a tokenizer's padding gives, with positions and token types."""
    return {
        "input_ids": padded(rows, side, width, fill=0),
        "attention_mask": padded([[1] * len(row) for row in rows], side, width),
        "position_ids": padded([list(range(len(row))) for row in rows], side, width, fill=1),
        "token_type_ids": padded([[token % 2 for token in row] for row in rows], side, width),
    }


def digest(batch: dict[str, Any], *, with_target: bool = False) -> bytes:
    """Of the first row."""
    return read_rows(batch, with_target=with_target).digests[0]


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("width", [3, 4, 17])
def test_padding_on_either_side_and_of_any_width_leaves_the_digest_alone(side, width):
    alone = digest(batch_of([[5, 6, 7]]))
    rows = read_rows(batch_of([[5, 6, 7]], side, width), with_target=False)
    assert rows.digests == (alone,)
    start = width - 3 if side == "left" else 0
    assert rows.spans == {"source": ((start, start + 3),)}
    assert rows.widths == {"source": width}


def test_what_stands_in_the_padding_does_not_count():
    zeros, noise = batch_of([[5, 6]], width=4), batch_of([[5, 6]], width=4)
    for key in ("input_ids", "position_ids", "token_type_ids"):
        noise[key][:, 2:] = 9
    assert digest(zeros) == digest(noise)


@given(st.lists(TOKENS, min_size=1, max_size=5), st.sampled_from(SIDES), st.integers(0, 5))
def test_a_row_among_others_is_the_row_alone(rows, side, more):
    together = read_rows(batch_of(rows, side, max(map(len, rows)) + more), with_target=False)
    assert together.digests == tuple(digest(batch_of([row])) for row in rows)
    for row, (start, stop) in zip(rows, together.spans["source"], strict=True):
        assert stop - start == len(row)


@given(st.lists(TOKENS, min_size=2, max_size=6))
def test_two_rows_share_a_digest_only_where_they_are_the_same(rows):
    digests = read_rows(batch_of(rows), with_target=False).digests
    for one, mine in zip(rows, digests, strict=True):
        assert [one == other for other in rows] == [mine == theirs for theirs in digests]


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), st.sampled_from(SIDES))
def test_a_pair_among_others_is_the_pair_alone(pairs, side):
    def pair_batch(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        return batch_of([s for s, _ in pairs], side) | {"labels": padded([t for _, t in pairs], fill=-100)}

    together = read_rows(pair_batch(pairs), with_target=True)
    assert together.digests == tuple(digest(pair_batch([pair]), with_target=True) for pair in pairs)
    assert together.spans["target"] == tuple((0, len(target)) for _, target in pairs)


def test_zeros_inside_a_mask_belong_to_the_row():
    full, holed = batch_of([[5, 6, 7]], width=5), batch_of([[5, 6, 7]], width=5)
    holed["attention_mask"][0, 1] = 0
    wider = batch_of([[5, 6, 7]], "left", 8)
    wider["attention_mask"][0, 6] = 0
    assert digest(full) != digest(holed) == digest(wider)
    assert read_rows(holed, with_target=False).spans["source"] == ((0, 3),)


def test_a_row_without_a_real_token_keeps_its_whole_width():
    batch = batch_of([[5, 6, 7], [1]])
    batch["attention_mask"][1] = 0
    assert read_rows(batch, with_target=False).spans["source"] == ((0, 3), (0, 3))


def test_a_batch_without_a_mask_has_no_padding():
    ids = padded([[5, 6], [7]])
    rows = read_rows({"input_ids": ids}, with_target=False)
    assert rows.spans["source"] == ((0, 2), (0, 2))
    assert rows.digests[1] != digest({"input_ids": ids[1:, :1]})


# ---------------------------------------------------------------------------------------------------------- what counts


@pytest.mark.parametrize("key", ["input_ids", "attention_mask", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_input_counts_at_each_token(key, place):
    rows = [[5, 6, 7, 8, 9]]
    plain, changed = batch_of(rows), batch_of(rows)
    changed[key][0, place + 1] ^= 1
    assert digest(plain) != digest(changed)


@pytest.mark.parametrize("key", ["attention_mask", "position_ids", "token_type_ids"])
def test_an_input_that_is_missing_counts_and_one_that_is_none_does_not(key):
    batch = batch_of([[5, 6]])
    without = {name: value for name, value in batch.items() if name != key}
    assert digest(batch) != digest(without) == digest(without | {key: None})


def test_a_row_is_not_its_own_beginning():
    assert digest(batch_of([[5, 6, 0]])) != digest(batch_of([[5, 6]], width=3))


def test_the_same_numbers_under_another_name_are_another_row():
    ids, types = torch.tensor([[1, 0]]), torch.tensor([[0, 1]])
    assert digest({"input_ids": ids, "token_type_ids": types}) != digest({"input_ids": types, "token_type_ids": ids})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_the_integer_type_of_a_mask_does_not_count(dtype):
    batch = batch_of([[5, 6], [7]])
    other = batch | {"attention_mask": batch["attention_mask"].to(dtype)}
    assert read_rows(batch, with_target=False) == read_rows(other, with_target=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_given_instead_of_ids_count(dtype):
    states = torch.randn(2, 3, 4).to(dtype)
    mask = padded([[1, 1, 1], [1, 1]])
    rows = read_rows({"inputs_embeds": states, "attention_mask": mask}, with_target=False)
    short = {"inputs_embeds": states[1:, :2], "attention_mask": mask[1:, :2]}
    assert rows.digests[1] == digest(short)
    moved = states.clone()
    moved[1, 1, 0] += 1
    assert rows.digests[1] != digest(short | {"inputs_embeds": moved[1:, :2]})


def test_an_input_without_tokens_counts_for_its_own_row():
    batch = batch_of([[5, 6], [5, 6]]) | {"pixel_values": torch.randn(2, 3, 4, 4)}
    first, second = read_rows(batch, with_target=False).digests
    assert first != second
    assert second == digest({key: value[1:] for key, value in batch.items()})


def test_a_plain_value_counts_for_every_row():
    batch = batch_of([[5, 6]])
    assert digest(batch | {"task": "a"}) != digest(batch | {"task": "b"})


# --------------------------------------------------------------------------------------------------------------- images


def images(count: int = 3, side: int = 32) -> torch.Tensor:
    """[count, 3, side, side]"""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_an_image_is_known_by_its_pixels_alone():
    pixels = images()
    together = read_rows({"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}, with_target=False)
    assert together.digests == tuple(digest({"pixel_values": pixels[row : row + 1]}) for row in range(3))
    assert (together.spans, together.widths) == ({}, {})
    moved = pixels.clone()
    moved[1, 2, 31, 31] += 1e-3
    assert [a == b for a, b in zip(together.digests, read_rows({"pixel_values": moved}, with_target=False).digests,
                                   strict=True)] == [True, False, True]  # fmt: skip


def test_channels_last_in_memory_is_the_same_image():
    pixels = images()
    assert digest({"pixel_values": pixels}) == digest({"pixel_values": pixels.to(memory_format=torch.channels_last)})


def test_an_image_counts_as_many_tokens_as_its_patches_and_a_text_as_its_tokens():
    assert read_rows({"pixel_values": images(2, 224)}, with_target=False).dense_tokens == 196
    assert read_rows({"pixel_values": images(2, 8)}, with_target=False).dense_tokens == 1
    assert read_rows(batch_of([[5, 6], [7]]), with_target=False).dense_tokens == 0
    assert read_rows(batch_of([[5, 6]]) | {"pixel_values": images(1)}, with_target=False).dense_tokens == 0


@pytest.mark.parametrize(("budget", "sizes"), [(None, [10, 2]), (4 * 196, [4, 4, 4]), (1, [1] * 12)])
def test_a_pass_over_images_keeps_to_its_budget(budget, sizes):
    rows = Rows(None, tuple(bytes([row]) for row in range(12)), ({},) * 12, (196,) * 12)
    assert [len(batch) for batch in _batches(rows, list(range(12)), budget or TOKENS_CPU)] == sizes
    assert (rows.tokens(0), rows.width(0)) == (196, 196)


class Overwriting(nn.Module):
    """A block that writes into what it is given, as an in-place ReLU does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mix(states.relu_())
        return out


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(Overwriting() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        states = self.stem(pixel_values)
        for layer in self.layers:
            states = layer(states)
        logits = self.head(states.mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def image_rows(count: int = 8) -> list[dict[str, Any]]:
    return [{"pixel_values": pixels, "labels": row % 2} for row, pixels in enumerate(images(count, 8))]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_block_that_writes_into_its_states_leaves_a_batch_fit_for_another_time(memory, tmp_path):
    torch.manual_seed(0)
    model = Convolutions().to(memory_format=memory)
    freeze(model, FreezePlan(encoder_blocks=2))
    rows = image_rows()
    cache = PrefixCache.build(model, rows, cache_dir=tmp_path, progress=False)
    assert cache.cuts == (("encoder", 2),)
    batch = cache.collator(rows[:4])
    before = {name: states.clone() for name, states in batch[PREFIX_KEY].items()}
    first, again = model(**batch).loss.item(), model(**batch).loss.item()
    assert first == again
    assert all(torch.equal(states, before[name]) for name, states in batch[PREFIX_KEY].items())
    assert min(float(states.min()) for states in before.values()) < 0, "the block above has something to write"
    del batch[PREFIX_KEY]
    assert first == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert (cache.batches_used, cache.batches_unused) == (2, 1)


def test_images_that_are_augmented_at_random_are_declined(tmp_path):
    model = Convolutions()
    freeze(model, FreezePlan(encoder_blocks=2))

    def brighten(features: list[dict[str, Any]]) -> Any:
        pixels = torch.stack([row["pixel_values"] for row in features])
        return {"pixel_values": pixels + torch.rand(()), "labels": torch.tensor([row["labels"] for row in features])}

    with pytest.raises(CannotCache, match=r"two different answers for row 0 \(random masking, augmentation"):
        PrefixCache.build(model, image_rows(), brighten, cache_dir=tmp_path, progress=False)


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("key", ["labels", "shift_labels"])
def test_labels_of_a_decoder_only_model_do_not_count(key):
    batch = batch_of([[5, 6]])
    assert (
        digest(batch)
        == digest(batch | {key: torch.tensor([[5, 6]])})
        == digest(batch | {key: torch.tensor([[-100, 6]])})
    )


@pytest.mark.parametrize("beside", [{PREFIX_KEY: {"x": torch.ones(1)}}, {"num_items_in_batch": torch.tensor(3)}])
def test_what_says_how_to_compute_a_loss_does_not_count(beside):
    batch = batch_of([[5, 6]])
    assert digest(batch) == digest(batch | beside)


def test_labels_count_where_the_decoders_input_is_made_of_them():
    batch = batch_of([[5, 6]])
    one, other = batch | {"labels": torch.tensor([[7, 8]])}, batch | {"labels": torch.tensor([[7, 9]])}
    assert digest(one, with_target=True) != digest(other, with_target=True)
    assert digest(one) == digest(other), "nothing of the decoder is cached"


def test_labels_do_not_count_where_the_decoders_input_is_given():
    batch = batch_of([[5, 6]]) | {"decoder_input_ids": torch.tensor([[2, 7]])}
    one, other = batch | {"labels": torch.tensor([[7, 8]])}, batch | {"labels": torch.tensor([[7, 9]])}
    assert digest(one, with_target=True) == digest(other, with_target=True)


@pytest.mark.parametrize("key", ["decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"])
def test_the_decoders_inputs_count_only_where_a_part_of_it_is_cached(key):
    batch = batch_of([[5, 6]]) | {"labels": torch.tensor([[7, 8]])}
    one, other = batch | {key: torch.tensor([[1, 1]])}, batch | {key: torch.tensor([[1, 2]])}
    assert digest(one, with_target=True) != digest(other, with_target=True)
    assert digest(one) == digest(other)


def test_a_decoders_row_ends_at_its_last_label_or_where_its_mask_says():
    labels = torch.tensor([[7, -100, 8, -100], [9, -100, -100, -100]])
    batch = batch_of([[5, 6], [7]]) | {"labels": labels}
    assert read_rows(batch, with_target=True).spans["target"] == ((0, 3), (0, 1))
    masked = batch | {"decoder_input_ids": torch.ones_like(labels)}
    masked["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    assert read_rows(masked, with_target=True).spans["target"] == ((0, 4), (1, 3))
    assert "target" not in read_rows(masked, with_target=False).spans


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_batch_stays_as_it_is():
    batch = batch_of([[5, 6], [7]]) | {"labels": torch.tensor([[5, 6], [7, -100]])}
    before = {key: value.clone() for key, value in batch.items()}
    read_rows(batch, with_target=True)
    assert batch.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in batch.items())


@pytest.mark.parametrize("batch", [{}, {"labels": torch.ones(1, 2)}, {"task": "a"}, {"input_ids": None}])
def test_a_batch_without_a_tensor_of_rows_is_refused(batch):
    with pytest.raises(CannotCache, match="none of them holds a tensor with a row axis"):
        read_rows(batch, with_target=False)


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, object()])
def test_an_input_without_stable_bytes_is_refused(value):
    with pytest.raises(CannotCache, match=r"'images' is a .*only tensors and plain values"):
        read_rows(batch_of([[5, 6]]) | {"images": value}, with_target=False)
