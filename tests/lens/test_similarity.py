"""Similarity of layers is the published formula, has its invariances, and is the same however texts are fed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_freeze.errors import FreezeError
from hf_freeze.lens import layer_similarity, linear_cka, text_batches
from tests.lens.cases import KINDS, TEXTS, moved, top_stack
from tests.tiny import tiny_model, tiny_tokenizer


def random_states(tokens: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- CKA


def test_cka_of_two_crossed_signs_is_the_half_that_was_computed_by_hand() -> None:
    # Off the diagonal K is 1 for the pairs 13, 24 and L for 12, 34, both -1 elsewhere, so tr(KL) = -4, tr(KK) = 12,
    # every row of each sums to -1, and n (n - 3) HSIC_1 = tr(KL) + 16 / 6 - 2 / 2 * 4 = -16 / 3, of KK and LL 32 / 3.
    first = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    second = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert linear_cka(first, second) == pytest.approx(-0.5)


def hsic_1(first: np.ndarray, second: np.ndarray) -> float:
    """Equation 5 of Song et al. (2012), as it is printed."""
    k, m = (states @ states.T * (1 - np.eye(len(states))) for states in (first, second))
    n, one = len(k), np.ones(len(k))
    middle = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


@pytest.mark.parametrize(("tokens", "widths"), [(4, (3, 3)), (9, (2, 5)), (40, (64, 8))])
def test_cka_is_the_published_formula(tokens: int, widths: tuple[int, int]) -> None:
    first, second = (random_states(tokens, width, seed).double() for seed, width in enumerate(widths))
    second[:, 0] += first[:, 0]
    x, y = first.numpy(), second.numpy()
    expected = hsic_1(x, y) / math.sqrt(hsic_1(x, x) * hsic_1(y, y))
    assert linear_cka(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_cka_does_not_see_rotation_scale_shift_or_order_of_tokens() -> None:
    first, second = random_states(30, 8, 0), random_states(30, 6, 1)
    second[:, :3] += first[:, :3]
    rotation = torch.linalg.qr(random_states(8, 8, 2))[0]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    plain = linear_cka(first, second)
    assert 0.1 < plain < 0.9
    assert linear_cka(second, first) == pytest.approx(plain, rel=1e-5)
    assert linear_cka(first @ rotation, second) == pytest.approx(plain, rel=1e-5)
    assert linear_cka(-7.0 * first, 0.01 * second) == pytest.approx(plain, rel=1e-5)
    assert linear_cka(first + 5.0, second) == pytest.approx(plain, rel=1e-4)
    assert linear_cka(first[order], second[order]) == pytest.approx(plain, rel=1e-5)
    assert linear_cka(first @ rotation, first) == pytest.approx(1.0, rel=1e-5)


def test_cka_sees_other_linear_maps_and_lost_order() -> None:
    states = random_states(60, 8, 0)
    stretched = states * torch.tensor([30.0, 1, 1, 1, 1, 1, 1, 1])
    assert linear_cka(states, stretched) < 0.7
    assert abs(linear_cka(states, states.flip(0))) < 0.5


def test_unrelated_wide_states_are_not_taken_for_alike() -> None:
    first, second = random_states(50, 400, 0), random_states(50, 400, 1)
    x, y = first - first.mean(0), second - second.mean(0)
    biased = (x.T @ y).square().sum() / (torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y))
    assert biased > 0.7
    assert abs(linear_cka(first, second)) < 0.1


def test_with_many_tokens_cka_is_that_of_kornblith_et_al() -> None:
    first = random_states(3000, 5, 0)
    second = torch.cat([first[:, :2], random_states(3000, 3, 1)], dim=1)
    x, y = first - first.mean(0), second - second.mean(0)
    biased = (x.T @ y).square().sum() / (torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y))
    assert linear_cka(first, second) == pytest.approx(float(biased), abs=5e-3)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 2), "CKA over 3 tokens was asked for; it needs 4"),
        (torch.ones(5, 2), torch.ones(4, 2), r"shapes \[5, 2\] and \[4, 2\]"),
        (torch.ones(5), torch.ones(5), r"two\s+matrices \[tokens, features\]"),
        (torch.full((5, 2), torch.nan), torch.ones(5, 2), "states that are not finite"),
        (torch.ones(5, 2), random_states(5, 2, 0), "one of the two has the same state at every token"),
        (random_states(5, 2, 0), torch.full((5, 2), 0.1), "one of the two has the same state at every token"),
    ],
)
def test_states_that_have_no_cka_are_refused(first: torch.Tensor, second: torch.Tensor, message: str) -> None:
    with pytest.raises(FreezeError, match=message):
        linear_cka(first, second)


# ---------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_is_the_cka_of_the_states_that_transformers_returns(kind: str) -> None:
    model, tokenizer = tiny_model(kind).eval(), tiny_tokenizer(kind)
    similarity = layer_similarity(model, tokenizer, TEXTS, progress=False)
    rows: dict[str, list[list[torch.Tensor]]] = {}
    for text in TEXTS:  # alone, so that there is no padding
        (batch,) = text_batches(model, tokenizer, [text])
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)
        for stack in similarity.cka:
            key = f"{stack}_hidden_states" if len(similarity.cka) == 2 else "hidden_states"
            rows.setdefault(stack, []).append([states[0, 1:] for states in output[key]])
    for stack, matrix in similarity.cka.items():
        layers = [torch.cat(states) for states in zip(*rows[stack], strict=True)]
        assert similarity.tokens[stack] == len(layers[0])
        assert len(matrix) == len(layers) == 5
        for i in range(4):  # the last of transformers' is behind the final norm
            for j in range(4):
                assert matrix[i][j] == pytest.approx(linear_cka(layers[i], layers[j]), abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("group", [512, 10])
def test_how_many_texts_run_at_once_makes_no_difference(kind: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_freeze.lens.similarity.GROUP_TOKENS", group)
    model, tokenizer = tiny_model(kind), tiny_tokenizer(kind)
    one, many = (layer_similarity(model, tokenizer, TEXTS, batch_size=n, progress=False) for n in (1, 3))
    assert one.tokens == many.tokens
    for stack, matrix in one.cka.items():
        assert np.array(matrix) == pytest.approx(np.array(many.cka[stack]), abs=1e-4)
        length = sum(len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
        left = length % group
        assert one.tokens[stack] == length - (left if left < 4 else 0)  # too few for a group at the end


@pytest.mark.parametrize("kind", KINDS)
def test_layers_below_the_first_changed_block_are_the_same_and_those_above_are_not(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer(kind)
    other = moved(model, f"{top_stack(model)}.2")
    similarity = layer_similarity(model, tokenizer, TEXTS, other, progress=False)
    same = [row[layer] for layer, row in enumerate(similarity.cka["decoder"])]
    assert same[:3] == [1.0, 1.0, 1.0]
    assert max(same[3:]) < 0.999
    assert "same layer of the other" in str(similarity)
    if "encoder" in similarity.cka:
        assert [row[layer] for layer, row in enumerate(similarity.cka["encoder"])] == [1.0] * 5


def test_models_of_other_depth_and_width_can_be_compared() -> None:
    tokenizer = tiny_tokenizer("gpt2")
    similarity = layer_similarity(
        tiny_model("gpt2"), tokenizer, TEXTS, tiny_model("gpt2", n_layer=2, n_embd=16), progress=False
    )
    assert [len(row) for row in similarity.cka["decoder"]] == [3] * 5


def test_the_first_token_counts_only_where_it_is_asked_for() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    kept, left = (layer_similarity(model, tokenizer, TEXTS, keep_first=keep, progress=False) for keep in (True, False))
    assert kept.tokens["decoder"] == left.tokens["decoder"] + len(TEXTS)
    assert kept.cka != left.cka


def test_similarity_refuses_what_cannot_be_compared() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    with pytest.raises(FreezeError, match=r"the first has the stacks decoder, the other encoder, decoder"):
        layer_similarity(model, tokenizer, TEXTS, tiny_model("bart"), progress=False)
    with pytest.raises(FreezeError, match=r"CKA over 1 decoder tokens was asked for; it needs 4"):
        layer_similarity(model, tokenizer, [tokenizer.decode(tokenizer("mug lid")["input_ids"][:2])], progress=False)
    with pytest.raises(FreezeError, match="GPT2LMHeadModel knows 20 ids"):
        layer_similarity(model, tokenizer, TEXTS, tiny_model("gpt2", vocab_size=20), progress=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(FreezeError, match=r"states of decoder block 1 .* not\s+finite"):
        layer_similarity(model, tokenizer, TEXTS, progress=False)
