"""The loss of each row of a trainer's evaluation, by which depths are compared row by row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hf_freeze.inputs import IGNORED_LABEL

__all__ = ["row_losses"]

SAME_LOSS = 5e-3  # relative: what 16 bits do to the loss of a row among others
# Labels that are the next tokens, all counted but the first, or (Trainer, for some classes) that one too; or classes.
WAYS = ((1, 1), (1, 0), (0, 0))


def row_losses(trainer: Any) -> list[float]:
    """The loss of each row of the eval_dataset, as Trainer's evaluation computes that of a batch; [] without a loss.

    The first batch's rows run one by one. Where its logits tell the same losses, the other rows run in batches.
    """
    trainer.model.eval()
    rows, size = trainer.get_eval_dataloader().dataset, max(1, trainer.args.eval_batch_size)
    losses: list[float] = []
    way: tuple[int, int] | None = None  # in which the logits of a batch tell its rows' losses
    for start in range(0, len(rows), size):
        batch = [rows[place] for place in range(start, min(start + size, len(rows)))]
        if way is not None:
            losses += _losses_by_logits(_predict(trainer, batch), *way)
            continue
        alone = [trainer.prediction_step(trainer.model, trainer.data_collator([row]), True)[0] for row in batch]
        if any(loss is None for loss in alone):
            return []
        losses += [loss.mean().item() for loss in alone]
        if start == 0 and len(rows) > size:
            predicted = _predict(trainer, batch)
            gaps = {way: _gap(losses, _losses_by_logits(predicted, *way)) for way in WAYS}
            way = min((way for way in gaps if gaps[way] < SAME_LOSS), key=gaps.__getitem__, default=None)
    return [float(f"{loss:.6g}") for loss in losses]


def _predict(trainer: Any, rows: list[Any]) -> Any:
    return trainer.prediction_step(trainer.model, trainer.data_collator(rows), False)


def _losses_by_logits(predicted: Any, shift: int, uncounted: int) -> list[float]:
    """Each row's mean over its labels; [] where these are not classes of the logits, one by one.

    Args:
        shift: Of the labels against the logits.
        uncounted: First labels of a row that the mean leaves out.
    """
    _, logits, labels = predicted
    logits = logits[0] if isinstance(logits, tuple) else logits  # beside them: an encoder's states
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return []
    if logits.shape[:-1] != labels.shape or labels.max() >= logits.shape[-1] or shift >= labels.dim():
        return []
    losses = []
    for row, classes in zip(logits, labels.reshape(len(labels), -1), strict=True):
        row = row.reshape(len(classes), -1).float()
        total = nn.functional.cross_entropy(row[: len(row) - shift], classes[shift:], reduction="sum")
        losses.append(float(total / classes[uncounted:].ne(IGNORED_LABEL).sum()))
    return losses


def _gap(losses: list[float], others: list[float]) -> float:
    """The largest difference of two rows' losses, relative; a row without a label has none in either."""
    if len(losses) != len(others):
        return math.inf
    one, other = torch.tensor(losses), torch.tensor(others)
    return float(((one - other) / one.abs().clamp(min=0.01)).nan_to_num().abs().max())
