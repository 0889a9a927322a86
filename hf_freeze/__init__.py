"""Fine-tune Hugging Face transformers with the lower part frozen: found by structure, proved to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_freeze.anatomy import Anatomy, read_anatomy
from hf_freeze.errors import (
    CacheDamaged,
    CannotCache,
    DeltaMismatch,
    FreezeError,
    FrozenWeightsChanged,
    ResumeError,
    StageError,
)
from hf_freeze.forecast import Forecast, forecast
from hf_freeze.freezing import FreezeReport, freeze, thaw, verify_frozen
from hf_freeze.plan import FreezePlan
from hf_freeze.version import __version__

if TYPE_CHECKING:
    from hf_freeze.delta import load_delta, merge_delta, save_delta
    from hf_freeze.depth import Advice, SweepReport, advise, draw_sweep, sweep_depths
    from hf_freeze.prefix import PrefixCache
    from hf_freeze.summarization.generation import generate_summaries
    from hf_freeze.summarization.rouge import compute_rouge
    from hf_freeze.summarization.streaming import summarize_file
    from hf_freeze.training.adapters import adapt_upper
    from hf_freeze.training.checkpoints import DeltaCheckpoints, guard_checkpoints, resume_from
    from hf_freeze.training.monitor import FreezeMonitor
    from hf_freeze.training.schedule import Stage, gradual, load_stages, save_stages
    from hf_freeze.training.stages import train_in_stages
    from hf_freeze.training.supervised import SupervisedLogits, all_logits, supervised_logits_only

__all__ = [
    "Advice",
    "Anatomy",
    "CacheDamaged",
    "CannotCache",
    "DeltaCheckpoints",
    "DeltaMismatch",
    "Forecast",
    "FreezeError",
    "FreezeMonitor",
    "FreezePlan",
    "FreezeReport",
    "FrozenWeightsChanged",
    "PrefixCache",
    "ResumeError",
    "Stage",
    "StageError",
    "SupervisedLogits",
    "SweepReport",
    "__version__",
    "adapt_upper",
    "advise",
    "all_logits",
    "compute_rouge",
    "draw_sweep",
    "forecast",
    "freeze",
    "generate_summaries",
    "gradual",
    "guard_checkpoints",
    "load_delta",
    "load_stages",
    "merge_delta",
    "read_anatomy",
    "resume_from",
    "save_delta",
    "save_stages",
    "summarize_file",
    "supervised_logits_only",
    "sweep_depths",
    "thaw",
    "train_in_stages",
    "verify_frozen",
]

_LATER = {  # heavier rooms, imported when they are asked for: what is imported above for type checkers
    "load_delta": "hf_freeze.delta",
    "merge_delta": "hf_freeze.delta",
    "save_delta": "hf_freeze.delta",
    "Advice": "hf_freeze.depth",
    "SweepReport": "hf_freeze.depth",
    "advise": "hf_freeze.depth",
    "draw_sweep": "hf_freeze.depth",
    "sweep_depths": "hf_freeze.depth",
    "PrefixCache": "hf_freeze.prefix",
    "generate_summaries": "hf_freeze.summarization.generation",
    "compute_rouge": "hf_freeze.summarization.rouge",
    "summarize_file": "hf_freeze.summarization.streaming",
    "adapt_upper": "hf_freeze.training.adapters",
    "DeltaCheckpoints": "hf_freeze.training.checkpoints",
    "guard_checkpoints": "hf_freeze.training.checkpoints",
    "resume_from": "hf_freeze.training.checkpoints",
    "FreezeMonitor": "hf_freeze.training.monitor",
    "Stage": "hf_freeze.training.schedule",
    "gradual": "hf_freeze.training.schedule",
    "load_stages": "hf_freeze.training.schedule",
    "save_stages": "hf_freeze.training.schedule",
    "train_in_stages": "hf_freeze.training.stages",
    "SupervisedLogits": "hf_freeze.training.supervised",
    "all_logits": "hf_freeze.training.supervised",
    "supervised_logits_only": "hf_freeze.training.supervised",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'hf_freeze' has no attribute {name!r}")
