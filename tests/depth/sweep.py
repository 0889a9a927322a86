"""The claims of a freeze, checked on one model: used over every architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hf_freeze import FreezePlan, freeze, read_anatomy, verify_frozen
from hf_freeze.anatomy import Stack
from hf_freeze.errors import FrozenWeightsChanged
from tests.zoo import BLOCKS, VOCAB

DEPTHS = {"longcat_flash": BLOCKS // 2}  # its config counts two attentions a block as two layers


def training_batch(model: nn.Module, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Token ids and labels that every text model takes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 1, (2, tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    config = model.config
    if config.model_type == "git":  # these two take no text alone
        side = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(2, 3, side, side, generator=generator)
    if config.model_type == "voxtral_realtime":
        length = tokens * config.downsample_factor
        batch["encoder_inputs_embeds"] = torch.randn(2, length, config.audio_config.hidden_size, generator=generator)
    return batch


def _no_graph_reaches(stack: Stack, depth: int) -> None:
    """Lets the states that next enter a stack's first trained block fail where a gradient would flow below it.

    This knows nothing of embeddings: whatever feeds the blocks and was not frozen is found. A decoder's frozen blocks
    get a gradient from the encoder through cross-attention, so there the first block is looked at. A block that is run
    in a loop reads its own output later: the first call of a step counts.
    """
    block = stack.blocks[depth]

    def refuse(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        assert not states.requires_grad, "a gradient flows below"
        handle.remove()

    handle = block.modules[0].register_forward_pre_hook(refuse, with_kwargs=True)


def language_loss(model: nn.Module) -> torch.Tensor:
    """The model's own loss on a batch of text."""
    loss: torch.Tensor = model(**training_batch(model)).loss
    return loss


def check_freeze(model: nn.Module, loss_of: Callable[[nn.Module], torch.Tensor] = language_loss) -> None:
    """Embeddings and the lower half frozen, three AdamW steps with weight decay: raises where a claim fails."""
    anatomy = read_anatomy(model)
    halves = {stack.name: len(stack) // 2 for stack in anatomy.stacks}
    report = freeze(model, FreezePlan())
    model.train()
    lower = [n for n, part in anatomy.parts.items() if part.kind == "embeddings"]
    upper: dict[tuple[str, int], list[str]] = {}
    for name, part in anatomy.parts.items():
        if part.kind == "block" and part.index < halves[part.stack]:
            lower.append(name)
        elif part.kind == "block" and name in anatomy.parameters:
            upper.setdefault((part.stack, part.index), []).append(name)
    aliases = dict(model.named_parameters(remove_duplicate=False))
    assert lower, "no lower half"
    assert not any(aliases[name].requires_grad for name in lower), "a tensor of the lower half trains"
    assert all(len(stack) == DEPTHS.get(model.config.model_type, BLOCKS) for stack in anatomy.stacks), "blocks missing"
    assert set(upper) == {(s.name, i) for s in anatomy.stacks for i in range(halves[s.name], len(s))}
    for names in upper.values():
        assert any(aliases[name].requires_grad for name in names), f"block without a trained tensor: {names[0]}"
    top = [n for n in anatomy.names_of("final", "head", "other") if n not in anatomy.tie_of]
    assert all(aliases[name].requires_grad for name in top), "a tensor above the blocks is frozen"
    for stack in anatomy.stacks:
        low, high = stack.blocks[: halves[stack.name]], stack.blocks[halves[stack.name] :]
        shared = {m for block in high for piece in block.modules for m in piece.modules()}  # one activation for all
        own = {m for block in low for piece in block.modules for m in piece.modules()} - shared
        assert own
        assert not any(m.training for m in own), "frozen block in train mode"
        assert all(piece.training for block in high for piece in block.modules), "trained block in eval mode"

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lower_blocks = [piece for s in anatomy.stacks for block in s.blocks[: halves[s.name]] for piece in block.modules]
    states = [{name: t.detach().clone() for name, t in piece.state_dict().items()} for piece in lower_blocks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    above_encoder = anatomy.stacks[1:]
    for _ in range(3):
        for stack in anatomy.stacks:
            _no_graph_reaches(stack, 0 if stack in above_encoder else halves[stack.name])
        loss = loss_of(model)
        assert torch.isfinite(loss), "loss is not finite"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad), "a frozen tensor has a gradient"
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        if not parameter.requires_grad:
            assert same, f"frozen tensor moved: {name}"
    for names in upper.values():
        assert any(g is not None and g.any() for g in (aliases[n].grad for n in names)), f"no gradient: {names[0]}"
        moved = [n for n in names if aliases[n].requires_grad and not torch.equal(aliases[n], before[n])]
        assert moved, f"trained block did not move: {names[0]}"
    for piece, state in zip(lower_blocks, states, strict=True):
        for name, tensor in piece.state_dict().items():
            assert torch.equal(tensor, state[name]), f"tensor or buffer of a frozen block moved: {name}"
    verify_frozen(model, report)
    victim = aliases[lower[-1]]
    with torch.no_grad():
        victim.view(-1)[0] += 1.0
    try:
        verify_frozen(model, report)
    except FrozenWeightsChanged:
        return
    raise AssertionError("a planted change was not seen")
