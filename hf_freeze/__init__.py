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

if TYPE_CHECKING:
    from hf_freeze.adapters import adapt_upper
    from hf_freeze.advice import Advice, advise
    from hf_freeze.checkpoints import DeltaCheckpoints, guard_checkpoints, resume_from
    from hf_freeze.delta import load_delta, merge_delta, save_delta
    from hf_freeze.depth import sweep_depths
    from hf_freeze.monitor import FreezeMonitor
    from hf_freeze.prefix import PrefixCache
    from hf_freeze.stages import Stage, gradual, load_stages, save_stages, train_in_stages
    from hf_freeze.summarization.generation import generate_summaries
    from hf_freeze.summarization.rouge import compute_rouge
    from hf_freeze.summarization.streaming import summarize_file
    from hf_freeze.supervision import SupervisedLogits, all_logits, supervised_logits_only
    from hf_freeze.sweep_report import SweepReport, draw_sweep

__version__ = "0.1.0"

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

_LATER = {  # heavier rooms, imported when they are asked for
    "PrefixCache": "hf_freeze.prefix",
    "SupervisedLogits": "hf_freeze.supervision",
    "all_logits": "hf_freeze.supervision",
    "supervised_logits_only": "hf_freeze.supervision",
    "adapt_upper": "hf_freeze.adapters",
    "Advice": "hf_freeze.advice",
    "advise": "hf_freeze.advice",
    "DeltaCheckpoints": "hf_freeze.checkpoints",
    "guard_checkpoints": "hf_freeze.checkpoints",
    "resume_from": "hf_freeze.checkpoints",
    "load_delta": "hf_freeze.delta",
    "merge_delta": "hf_freeze.delta",
    "save_delta": "hf_freeze.delta",
    "sweep_depths": "hf_freeze.depth",
    "FreezeMonitor": "hf_freeze.monitor",
    "Stage": "hf_freeze.stages",
    "gradual": "hf_freeze.stages",
    "load_stages": "hf_freeze.stages",
    "save_stages": "hf_freeze.stages",
    "train_in_stages": "hf_freeze.stages",
    "generate_summaries": "hf_freeze.summarization.generation",
    "compute_rouge": "hf_freeze.summarization.rouge",
    "summarize_file": "hf_freeze.summarization.streaming",
    "SweepReport": "hf_freeze.sweep_report",
    "draw_sweep": "hf_freeze.sweep_report",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'hf_freeze' has no attribute {name!r}")
