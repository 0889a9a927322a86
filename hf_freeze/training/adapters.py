"""LoRA or DoRA on the blocks above the cut: a prefix that is frozen and can be cached, and small adapters that train.

`adapt_upper` reads from the model what `freeze` did, writes an ordinary PEFT config that names the matrices of the
blocks that train, and hands it to PEFT. No adapter stands below the cut, so the backward pass ends there and what is
saved is an adapter that any user of PEFT can load. It refuses a model that was never frozen or holds adapters already.
Training, saving and merging are PEFT's business and Trainer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from hf_freeze.anatomy import Anatomy, read_anatomy
from hf_freeze.errors import FreezeError, PlanError, nearest
from hf_freeze.freezing import FreezeRecord, freeze_record
from hf_freeze.given import check_model
from hf_freeze.marks import REPLAY
from hf_freeze.tensors import unwrap

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["adapt_upper"]

KINDS = ("lora", "dora")


def adapt_upper(
    model: nn.Module,
    *,
    kind: Literal["lora", "dora"] = "lora",
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
) -> PeftModel:
    """Puts LoRA or DoRA adapters on the blocks that a frozen model trains, and lets only them train. Mutates the model.

    LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) learns a matrix's change as a product
    of two thin ones, scaled by alpha / r. DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024) lets
    it change the matrix's direction only, and learns the length of each output's weights apart; a step takes longer.
    Both start as the model that was given: the new matrices are drawn from torch's global generator, half of them zero.

    Where indices of blocks say exactly what is meant, the config has them (`layers_to_transform`, `layers_pattern`),
    which stays readable on a deep model. Else it has full names: the index 3 would mean block 3 of both stacks of a
    BART whose encoder is frozen whole.

    PEFT freezes all that is not an adapter: the final norm and the head too, whatever the plan says of them, and the
    randomly made head of a classifier. `verify_frozen` goes on proving what `freeze` froze. Make the optimizer and
    the prefix cache afterwards, of the model that is returned.

    Args:
        model: A model that `freeze` has frozen, without adapters.
        kind: "lora", which every tool merges and serves, or "dora".
        r: Rank. 16, because adapters on the upper blocks alone are few, so that the low ranks of 4 or 8, with which
            Hu et al. get along on the attention of GPT-3, save little here.
        alpha: The product is scaled by alpha / r. 32: twice the rank, as is common, takes the learning rates that
            others report; with another r, keep the ratio.
        dropout: On the adapters' inputs. 0.0, PEFT's own default.
        target_modules: Last pieces of the names of the matrices that get an adapter, such as ("q_proj", "v_proj").
            None is every `nn.Linear` and `Conv1D` in those blocks: Biderman et al., "LoRA Learns Less and Forgets
            Less", 2024, find all of them better than the attention's alone. One that the plan freezes by a pattern
            gets none either way, nor do experts that share one tensor.

    Returns:
        The PeftModel around the model; `save_pretrained` writes an ordinary adapter.

    Raises:
        FreezeError: The model was never frozen, holds adapters already, or trains from a prefix cache.
        PlanError: An unknown kind, no matrix in a block that trains, or a target that is none of them.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze import FreezePlan, freeze
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16))
        >>> _ = freeze(model, FreezePlan(decoder_blocks=3))
        >>> adapted = adapt_upper(model, target_modules=("c_attn",))
        >>> [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]  # doctest: +ELLIPSIS
        ['base_model.model.transformer.h.3.attn.c_attn.lora_A.default.weight', '...lora_B.default.weight']
    """
    if kind not in KINDS:
        raise PlanError(f"adapt_upper was asked for kind={kind!r}; it is one of {', '.join(map(repr, KINDS))}.")
    check_model("adapt_upper", model)
    core, record = _frozen_and_bare(unwrap(model))
    anatomy = read_anatomy(core)
    matrices = _targets(anatomy, dict(_matrices(anatomy, record)), target_modules)
    from peft import get_peft_model

    config = _config(
        anatomy,
        matrices,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=kind == "dora",
        # Conv1D keeps its matrix as [inputs, outputs]; PEFT would find out by itself and warn.
        fan_in_fan_out=not any(isinstance(module, nn.Linear) for module in matrices.values()),
        task_type=_task_type(core),
        revision=getattr(getattr(core, "config", None), "_commit_hash", None),
    )
    adapted: PeftModel = get_peft_model(core, config)
    return adapted


def _frozen_and_bare(core: nn.Module) -> tuple[Any, FreezeRecord]:
    """The model that `freeze` froze and its record, where nothing stands in the way of adapters."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, PeftModel | BaseTunerLayer) for module in core.modules()):
        raise FreezeError(
            f"adapt_upper was asked for a {type(core).__name__} that holds adapters already. Call freeze and "
            "adapt_upper on the base model; to train the adapters that are there, freeze(model, plan) alone does."
        )
    frozen = freeze_record(core)
    if frozen is None:
        raise FreezeError(
            f"adapt_upper was asked for a {type(core).__name__} that was never frozen. Call freeze(model, plan) first: "
            "adapters go on the blocks that the plan trains."
        )
    if REPLAY in core.__dict__:
        raise FreezeError(
            f"adapt_upper was asked for a {type(core).__name__} that trains from a prefix cache; PEFT would call it "
            "past the cache's hooks. Call the cache's close(), then adapt_upper, then PrefixCache.build."
        )
    return frozen


def _matrices(anatomy: Anatomy, record: FreezeRecord) -> Iterator[tuple[str, nn.Module]]:
    """The matrices of the blocks that train, but for those that the plan froze by a pattern."""
    from transformers.pytorch_utils import Conv1D

    for stack in anatomy.stacks:
        for block in stack.blocks:
            if not any(parameter.requires_grad for piece in block.modules for parameter in piece.parameters()):
                continue
            for path, piece in zip(block.names, block.modules, strict=True):
                for name, module in piece.named_modules(prefix=path):
                    if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in record.turned_off:
                        yield name, module


def _targets(anatomy: Anatomy, matrices: dict[str, nn.Module], asked: Sequence[str] | None) -> dict[str, nn.Module]:
    """Those of the matrices that were asked for."""
    if not matrices:
        raise PlanError(
            f"adapt_upper was asked for adapters above the cut of {anatomy.model_class}; no matrix of its blocks "
            "trains. Call thaw(model) and freeze fewer blocks, for example FreezePlan(decoder_blocks=-4)."
        )
    if asked is None:
        return matrices
    leaves = sorted({_leaf(name) for name in matrices})
    if isinstance(asked, str):
        raise PlanError(
            f"adapt_upper was asked for target_modules={asked!r}; it is a sequence of names. Use ({asked!r},)."
        )
    if unknown := [leaf for leaf in asked if leaf not in leaves]:
        raise PlanError(
            f"adapt_upper was asked for target_modules={tuple(asked)!r}; no matrix that trains in "
            f"{anatomy.model_class} is called {unknown[0]!r}. The nearest: {nearest(unknown[0], leaves)}."
        )
    return {name: module for name, module in matrices.items() if _leaf(name) in asked}


def _config(anatomy: Anatomy, matrices: dict[str, nn.Module], **given: Any) -> LoraConfig:
    """PEFT's config for exactly these matrices: by blocks' indices where that means the same, else by full names."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    by_index = LoraConfig(
        target_modules=sorted({_leaf(name) for name in matrices}),
        layers_to_transform=sorted({anatomy.parts[f"{name}.weight"].index for name in matrices}),
        layers_pattern=sorted({_leaf(stack.path) for stack in anatomy.stacks}),
        **given,
    )
    meant = {name for name, _ in anatomy.model.named_modules() if check_target_module_exists(by_index, name)}
    return by_index if meant == set(matrices) else LoraConfig(target_modules=sorted(matrices), **given)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _task_type(core: Any) -> str | None:
    """PEFT's name for how the model is called; None, a plain PeftModel, for one that generates nothing."""
    can_generate = getattr(core, "can_generate", None)
    if can_generate is None or not can_generate():
        return None
    return "SEQ_2_SEQ_LM" if core.config.is_encoder_decoder else "CAUSAL_LM"
