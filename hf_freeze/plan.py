"""What to freeze, as data: `FreezePlan` says what is asked, `resolve` turns it into names, with the reason for each.

A plan never touches a model: `freezing.freeze` applies a resolved plan. Everything a plan can ask wrongly is refused
here, before anything is changed.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

from hf_freeze.anatomy import Anatomy, Part, Stack
from hf_freeze.cuts import Cut, find_cuts
from hf_freeze.errors import PlanError, nearest
from hf_freeze.files import write_whole
from hf_freeze.given import check_kind

__all__ = ["PLAN_FILE", "FreezePlan", "ResolvedPlan", "given_plan", "plan_at_depth"]

BlockCount = int | float | str  # "all", or a number as text
PLAN_FILE = "freeze_plan.json"
DEFAULT_BLOCKS = 0.5


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan made concrete for one model: plain names, cuts and reasons.

    Attributes:
        frozen: Parameter names to freeze, in the model's order; a tied tensor under its first name.
        trained: All the others. They may still be frozen by the user or by PEFT; `freeze` leaves that so.
        blocks: How many of the lowest blocks each stack has frozen.
        untied: Head parameters to clone from the embeddings, under the head's names.
        cuts: What can be cached, () with `why_no_cut` where nothing can.
        lowest_trainable: Where the backward pass ends: ("decoder", 26), ("embeddings", 0), ("final", 0), ("head", 0).
        reasons: Each choice that was derived rather than asked, and why.
        warnings: What is correct but very likely a mistake.
    """

    frozen: tuple[str, ...]
    trained: tuple[str, ...]
    blocks: dict[str, int]
    untied: tuple[str, ...]
    cuts: tuple[Cut, ...]
    why_no_cut: str
    lowest_trainable: tuple[str, int]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def _naming_unknown_fields(plan: type[FreezePlan]) -> type[FreezePlan]:
    """Makes the dataclass refuse an unknown keyword in the words in which `from_dict` does; its signature stays."""
    plain_init: Any = plan.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *values: Any, **named: Any) -> None:
        _refuse_unknown_field(named, lambda name: f"FreezePlan asks for {name}={named[name]!r}")
        plain_init(self, *values, **named)

    plan.__init__ = init  # type: ignore[method-assign]
    return plan


@_naming_unknown_fields
@dataclass(frozen=True)
class FreezePlan:
    """What to freeze. Checked when it is made, made concrete by `resolve`, applied by `freeze`.

    Args:
        embeddings: Freeze all input embeddings: token, position, segment, their norms and projections, and towers
            (a vision encoder) that feed the text stack. True, because with trainable embeddings the backward pass
            must reach the bottom and most of the saving is lost.
        encoder_blocks: The lowest n (int), all but the top n (negative int), that fraction rounded down (float;
            1 is one block, 1.0 all of them) or "all", as text too: "3", "-4", "0.5". None means 0.5, the classic
            "freeze the early half".
        decoder_blocks: The same for the decoder. A model with one stack takes either name.
        tied_head: Where the head shares its weight with frozen embeddings: "freeze" both, "train" both (then nothing
            can be cached) or "untie", which clones the head's weight and trains the clone. "freeze", because it
            changes nothing but what is asked.
        freeze: Regular expressions over parameter names, applied last. A pattern must cover whole dot-separated
            pieces of the name: `layers.1` never means layer 10. One that matches nothing is an error.
        train: The same for what to train; wins over `freeze`.
        frozen_mode: "eval" keeps dropout off in frozen modules whatever `model.train()` says, which a cache needs;
            "train" leaves it on.

    Raises:
        PlanError: A value of the wrong kind, or a pattern that is no regular expression.

    Example:
        >>> FreezePlan(decoder_blocks="-4").decoder_blocks
        -4
        >>> FreezePlan(decoder_blocks=1.5)
        Traceback (most recent call last):
        hf_freeze.errors.PlanError: FreezePlan asks for decoder_blocks=1.5; a fraction lies between 0.0 and 1.0. \
Use an int for a number of blocks, or "all".
    """

    embeddings: bool = True
    encoder_blocks: BlockCount | None = None
    decoder_blocks: BlockCount | None = None
    tied_head: Literal["freeze", "train", "untie"] = "freeze"
    freeze: Sequence[str] = field(default=())
    train: Sequence[str] = field(default=())
    frozen_mode: Literal["eval", "train"] = "eval"

    def __post_init__(self) -> None:
        if not isinstance(self.embeddings, bool):
            raise PlanError(f"FreezePlan asks for embeddings={self.embeddings!r}; it is True or False.")
        for name in ("encoder_blocks", "decoder_blocks"):
            object.__setattr__(self, name, _read_count(name, getattr(self, name)))
        for name, choices in (("tied_head", ("freeze", "train", "untie")), ("frozen_mode", ("eval", "train"))):
            if (value := getattr(self, name)) not in choices:
                raise PlanError(f"FreezePlan asks for {name}={value!r}; it is one of {', '.join(map(repr, choices))}.")
        for name in ("freeze", "train"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not isinstance(patterns, Sequence):
                raise PlanError(
                    f"FreezePlan asks for {name}={patterns!r}; it is a sequence of regular expressions. "
                    f"Use {name}=({str(patterns)!r},)."
                )
            for pattern in patterns:
                if not isinstance(pattern, str):
                    raise PlanError(f"FreezePlan asks for {name}={patterns!r}; every pattern is a string.")
                try:
                    _whole_pieces(pattern)
                except re.error as error:
                    raise PlanError(
                        f"FreezePlan asks for {name}=({pattern!r},); that is no regular expression: {error}."
                    ) from error
            object.__setattr__(self, name, tuple(patterns))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A plan from `to_dict`'s values; missing fields keep their defaults.

        Raises:
            PlanError: An unknown field.
        """
        _refuse_unknown_field(values, lambda name: f"A freeze plan was read with the field {name!r}")
        return cls(**values)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes freeze_plan.json into the folder, whole or not at all."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / PLAN_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads freeze_plan.json from the folder.

        Raises:
            PlanError: The file is missing or is not a plan.
        """
        path = Path(folder) / PLAN_FILE
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise PlanError(f"{path} was to be read as a freeze plan; it is no file.")
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(
                f"A freeze plan was asked from {str(folder)!r}; there is no {PLAN_FILE} in it. "
                "Write one with FreezePlan.save_pretrained."
            ) from None
        except OSError as error:
            raise PlanError(f"{path} was to be read as a freeze plan; it cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} was read as a freeze plan; it is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise PlanError(f"{path} was read as a freeze plan; it holds a {type(values).__name__}, not an object.")
        return cls.from_dict(values)

    def resolve(self, anatomy: Anatomy) -> ResolvedPlan:
        """The plan made concrete for a model: names, cuts, and the reason for each derived choice. Changes nothing.

        Raises:
            PlanError: A count beyond the depth, a pattern that matches nothing, names of one tied tensor that end
                up on both sides, or a plan that would freeze or train nothing.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from hf_freeze.anatomy import read_anatomy
            >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=4,
            ...     num_attention_heads=2, num_key_value_heads=2, vocab_size=16))
            >>> FreezePlan(decoder_blocks=3).resolve(read_anatomy(model)).lowest_trainable
            ('decoder', 3)
        """
        reasons: list[str] = []
        blocks = self._block_counts(anatomy, reasons)
        # By parameter name, True for frozen: first as its part says, then ties settled, then patterns over both.
        decisions = {name: self._freezes_part(part, blocks, anatomy) for name, part in anatomy.parts.items()}
        untied = self._settle_ties(anatomy, decisions, reasons)
        self._apply_patterns(anatomy, decisions)
        for tie in anatomy.ties:
            names = [name for name in tie.names if name not in untied]
            if len({decisions[name] for name in names}) > 1:
                frozen = next(name for name in names if decisions[name])
                trained = next(name for name in names if not decisions[name])
                raise PlanError(
                    f"FreezePlan freezes {frozen!r} and trains {trained!r}; in {anatomy.model_class} they are one "
                    "tensor under two names. Freeze or train both; for a tied head, use tied_head='train' or 'untie'."
                )
        if refrozen := [name for name in untied if decisions[name]]:
            raise PlanError(
                f"FreezePlan unties {refrozen[0]!r} to train it and freezes it by a pattern. Use tied_head='freeze', "
                "or leave it out of freeze=."
            )
        # An untied tensor goes on under its first name outside of the head, whichever was registered first.
        firsts = [
            next(other for other in anatomy.tie_of[name].names if other not in untied) if name in untied else name
            for name in anatomy.parameters
        ]
        frozen_names = tuple(name for name in firsts if decisions[name])
        trained_names = tuple(name for name in firsts if not decisions[name]) + untied
        if not frozen_names:
            raise PlanError(
                f"FreezePlan freezes nothing of {anatomy.model_class}: {self}. Ask for at least one block "
                "(decoder_blocks=1) or the embeddings, or train the model without a plan."
            )
        tensors = dict(anatomy.model.named_parameters(remove_duplicate=False))
        trainable = {n for n, p in tensors.items() if n in untied or (not decisions[n] and p.requires_grad)}
        if not trainable:
            why = "every tensor is frozen. Freeze fewer blocks, or use tied_head='untie' to train the head."
            if trained_names:
                left = f"the {len(trained_names)} tensors it leaves are frozen already"
                why = f"{left}. Thaw some (requires_grad_(True)), or freeze fewer blocks."
            raise PlanError(f"FreezePlan trains nothing of {anatomy.model_class}: {why}")
        lowest = _lowest_trainable(anatomy, trainable)
        self._refuse_stuck_blocks(anatomy, blocks, lowest)
        cuts, why_no_cut = find_cuts(anatomy, trainable)
        if self.frozen_mode == "train":
            why_no_cut = (
                "frozen_mode='train' keeps dropout on in the frozen blocks, so their output changes every step."
            )
            cuts = ()
        return ResolvedPlan(
            frozen=frozen_names,
            trained=trained_names,
            blocks=blocks,
            untied=untied,
            cuts=cuts,
            why_no_cut=why_no_cut,
            lowest_trainable=lowest,
            reasons=tuple(reasons),
            warnings=_warnings(anatomy, lowest, blocks),
        )

    def _refuse_stuck_blocks(self, anatomy: Anatomy, blocks: dict[str, int], lowest: tuple[str, int]) -> None:
        """Refuses what reversible blocks cannot do: their own backward pass starts from a trainable input only, and
        asserts that every block is in train mode. Above a frozen input they would silently learn nothing.
        """
        for stack in anatomy.stacks:
            kind = next((type(m).__name__ for b in stack.blocks for m in b.modules if hasattr(m, "backward_pass")), "")
            held = self.frozen_mode == "eval" and blocks[stack.name]
            if kind and (lowest[0] != "embeddings" or held):
                raise PlanError(
                    f"FreezePlan freezes below the {stack.name} blocks of {anatomy.model_class}; a {kind} runs a "
                    "backward pass of its own, which starts only from a trainable input and in train mode, so that "
                    "nothing would train. Use embeddings=False with frozen_mode='train'."
                )

    def _block_counts(self, anatomy: Anatomy, reasons: list[str]) -> dict[str, int]:
        """The number of frozen blocks of each stack."""
        asked: dict[str, BlockCount | None] = {"encoder": self.encoder_blocks, "decoder": self.decoder_blocks}
        if len(anatomy.stacks) == 1:
            stack = anatomy.stacks[0]
            counts = {name: _count(name, value, stack, anatomy) for name, value in asked.items() if value is not None}
            if len(set(counts.values())) > 1:
                raise PlanError(
                    f"FreezePlan asks for encoder_blocks={self.encoder_blocks!r} and "
                    f"decoder_blocks={self.decoder_blocks!r}; {anatomy.model_class} has one stack of {len(stack)} "
                    f"blocks, which either name means. Give one of them."
                )
            value = next((value for value in asked.values() if value is not None), None)
            asked = {stack.name: value}
        blocks: dict[str, int] = {}
        for stack in anatomy.stacks:
            value = asked[stack.name]
            blocks[stack.name] = _count(stack.name, DEFAULT_BLOCKS if value is None else value, stack, anatomy)
            if value is None:
                reasons.append(
                    f"{stack.name}_blocks was not given: the lower half, {blocks[stack.name]} of {len(stack)} blocks."
                )
            elif not isinstance(value, int) or value < 0:
                reasons.append(f"{stack.name}_blocks={value!r} is {blocks[stack.name]} of {len(stack)} blocks.")
        return blocks

    def _freezes_part(self, part: Part, blocks: dict[str, int], anatomy: Anatomy) -> bool:
        if part.kind == "block":
            return part.index < blocks[part.stack]
        if part.kind in ("embeddings", "tower"):
            return self.embeddings
        # An encoder frozen whole is frozen with its final norm: its output is then a constant of the input.
        whole_encoder = len(anatomy.stacks) == 2 and blocks["encoder"] == len(anatomy.stack("encoder"))
        return part.kind == "final" and part.stack == "encoder" and whole_encoder

    def _settle_ties(self, anatomy: Anatomy, decisions: dict[str, bool], reasons: list[str]) -> tuple[str, ...]:
        """Makes `decisions` agree about tensors whose names lie in several parts; returns the head's names to untie."""
        untied: list[str] = []
        for tie in anatomy.ties:
            frozen = [name for name in tie.names if decisions[name]]
            if not frozen or len(frozen) == len(tie.names):
                continue
            heads = [name for name, part in zip(tie.names, tie.parts, strict=True) if part.kind == "head"]
            if heads and self.tied_head == "untie":
                untied += heads
                reasons.append(f"{heads[0]} is untied from {tie.names[0]}: cloned, and the clone is trained.")
                rest = [name for name in tie.names if name not in heads]
                decisions.update(dict.fromkeys(rest, True))
            elif heads and self.tied_head == "train":
                decisions.update(dict.fromkeys(tie.names, False))
                train = "both train (tied_head='train')"
                if not anatomy.parameters[tie.names[0]].requires_grad:
                    train += ", but were frozen before and stay so: thaw(model) first, or set requires_grad"
                reasons.append(f"{heads[0]} is the same tensor as {tie.names[0]}: {train}.")
            else:
                decisions.update(dict.fromkeys(tie.names, True))
                other = next(name for name in tie.names if name not in frozen)
                why = " (tied_head='freeze')" if heads else "; a tensor with a frozen place stays frozen"
                reasons.append(f"{other} is the same tensor as {frozen[0]}: both are frozen{why}.")
        return tuple(untied)

    def _apply_patterns(self, anatomy: Anatomy, decisions: dict[str, bool]) -> None:
        """Overrules `decisions` where a pattern says otherwise."""
        for decision, patterns in ((True, self.freeze), (False, self.train)):
            for pattern in patterns:
                matched = [name for name in decisions if _covers(pattern, name)]
                if not matched:
                    pieces = list(dict.fromkeys(anatomy.parts))
                    raise PlanError(
                        f"FreezePlan asks for {'freeze' if decision else 'train'}=({pattern!r},); it matches none of "
                        f"the {len(pieces)} parameter names of {anatomy.model_class}. A pattern covers whole "
                        f"dot-separated pieces. The nearest: {nearest(pattern, pieces + _pieces(pieces))}."
                    )
                decisions.update(dict.fromkeys(matched, decision))


def given_plan(what: str, plan: object) -> FreezePlan:
    """The plan that a function was given, `FreezePlan()` for None.

    Raises:
        PlanError: It is something else.
    """
    if plan is None:
        return FreezePlan()
    number = str(plan) if isinstance(plan, str | int) and str(plan).lstrip("-").isdigit() else "6"
    fix = f"FreezePlan(decoder_blocks={number})"
    check_kind(what, "plan", plan, FreezePlan, "a FreezePlan", fix, PlanError)
    return cast(FreezePlan, plan)


def plan_at_depth(anatomy: Anatomy, depth: int, plan: FreezePlan | None = None) -> FreezePlan:
    """The plan that freezes the lowest `depth` blocks of a model; an encoder lies below its decoder.

    Args:
        anatomy: Whose blocks are counted.
        depth: 0 freezes the embeddings alone; all blocks leave the final norm and the head.
        plan: What holds beside the blocks; None is `FreezePlan()`.

    Raises:
        PlanError: More blocks than the model has.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_freeze.anatomy import read_anatomy
        >>> anatomy = read_anatomy(GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=8, n_head=2, vocab_size=16)))
        >>> plan_at_depth(anatomy, 4).decoder_blocks
        4
    """
    total = sum(len(stack) for stack in anatomy.stacks)
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= total:
        raise PlanError(
            f"A depth of {depth!r} was asked for; {anatomy.model_class} has {total} blocks. Use 0 to {total}."
        )
    counts: dict[str, Any] = {"encoder_blocks": None, "decoder_blocks": None}  # one stack takes either name
    left = depth
    for stack in anatomy.stacks:
        counts[f"{stack.name}_blocks"] = min(left, len(stack))
        left -= counts[f"{stack.name}_blocks"]
    return replace(plan or FreezePlan(), **counts)


def _refuse_unknown_field(values: dict[str, Any], words: Callable[[str], str]) -> None:
    known = [f.name for f in fields(FreezePlan)]
    if unknown := [name for name in values if name not in known]:
        raise PlanError(f"{words(unknown[0])}; it has no such field. The nearest: {nearest(unknown[0], known)}.")


def _read_count(name: str, asked: Any) -> BlockCount | None:
    """A count of blocks as it is asked for, out of text too: "3" is three blocks, "0.5" half of them."""
    value: BlockCount | None = asked
    if isinstance(asked, str) and asked != "all":
        for kind in (int, float):  # what is neither stays text, and is refused below
            with suppress(ValueError):
                value = kind(asked)
                break
    if value is None or value == "all":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(
            f'FreezePlan asks for {name}={value!r}; it is an int, a fraction between 0.0 and 1.0, or "all".'
        )
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise PlanError(
            f"FreezePlan asks for {name}={value!r}; a fraction lies between 0.0 and 1.0. "
            'Use an int for a number of blocks, or "all".'
        )
    return value


def _count(name: str, value: BlockCount, stack: Stack, anatomy: Anatomy) -> int:
    total = len(stack)
    if value == "all":
        return total
    if isinstance(value, float):
        return int(total * value + 1e-9)  # 1/49 of 49 blocks is one, whatever the last bit says
    value = int(value)  # _read_count has refused everything but an int here
    if abs(value) > total:
        raise PlanError(
            f"FreezePlan asks for {value} {name} blocks; {anatomy.model_class} has {total}. "
            f"Use {name}_blocks {'<=' if value > 0 else '>='} {total if value > 0 else -total}, or 'all'."
        )
    return value if value >= 0 else total + value


def _whole_pieces(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|(?<=\.))(?:{pattern})(?=\.|$)")


def _covers(pattern: str, name: str) -> bool:
    """Whether the pattern covers whole dot-separated pieces of the name.

    >>> _covers(r"layers\\.1", "model.layers.1.mlp.weight"), _covers(r"layers\\.1", "model.layers.10.mlp.weight")
    (True, False)
    >>> _covers("norm", "model.layers.1.input_layernorm.weight"), _covers(".*norm", "layers.1.input_layernorm.weight")
    (False, True)
    """
    return _whole_pieces(pattern).search(name) is not None


def _pieces(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(piece for name in names for piece in name.split(".") if not piece.isdigit()))


def _lowest_trainable(anatomy: Anatomy, trainable: set[str]) -> tuple[str, int]:
    """The lowest place with a trainable tensor: there the backward pass ends."""
    places = {anatomy.parts[n] for n in trainable}
    order = {"block": 1, "final": 2, "other": 3, "head": 3}  # within a stack, and above all of them
    stacks = [stack.name for stack in anatomy.stacks]

    def height(part: Part) -> tuple[int, int, int]:
        if part.kind in ("tower", "embeddings"):
            return (0, 0, 0)
        where = stacks.index(part.stack) if part.stack in stacks else len(stacks)
        return (1 + where, order[part.kind], part.index)

    lowest = min(places, key=height)
    if lowest.kind == "block":
        return (lowest.stack, lowest.index)
    return ("embeddings" if lowest.kind == "tower" else lowest.kind, 0)


def _warnings(anatomy: Anatomy, lowest: tuple[str, int], blocks: dict[str, int]) -> tuple[str, ...]:
    lines = []
    if lowest[0] == "embeddings" and any(blocks.values()):
        lines.append(
            "Blocks are frozen but the embeddings train: the backward pass must reach the bottom, and most of the "
            "saving in time and memory is gone. Use embeddings=True."
        )
    if lowest[0] in blocks and lowest[1] < blocks[lowest[0]]:
        lines.append(
            f"Part of {lowest[0]} block {lowest[1]} trains though {blocks[lowest[0]]} blocks were to be frozen: the "
            "backward pass must reach it, and nothing above it can be cached."
        )
    stacks = {stack.name: stack for stack in anatomy.stacks}
    if len(stacks) == 2 and blocks["decoder"] and lowest[0] == "encoder":
        lines.append(
            "Encoder blocks train below a partly frozen decoder: its frozen blocks still carry the gradient to the "
            "encoder and cannot be cached. encoder_blocks='all' ends the backward pass in the decoder."
        )
    return tuple(lines)
