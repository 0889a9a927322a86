"""Fine-tune Hugging Face transformers with the lower part frozen: found by structure, proved to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_freeze.anatomy import Anatomy, read_anatomy
from hf_freeze.errors import CacheDamaged, CannotCache, FreezeError, FrozenWeightsChanged
from hf_freeze.forecast import Forecast, forecast
from hf_freeze.freezing import FreezeReport, freeze, thaw, verify_frozen
from hf_freeze.plan import FreezePlan

if TYPE_CHECKING:
    from hf_freeze.prefix import PrefixCache
    from hf_freeze.summarization.generation import generate_summaries
    from hf_freeze.summarization.rouge import compute_rouge
    from hf_freeze.supervision import SupervisedLogits, all_logits, supervised_logits_only

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "CacheDamaged",
    "CannotCache",
    "Forecast",
    "FreezeError",
    "FreezePlan",
    "FreezeReport",
    "FrozenWeightsChanged",
    "PrefixCache",
    "SupervisedLogits",
    "all_logits",
    "compute_rouge",
    "forecast",
    "freeze",
    "generate_summaries",
    "read_anatomy",
    "supervised_logits_only",
    "thaw",
    "verify_frozen",
]

_LATER = {  # heavier rooms, imported when they are asked for
    "PrefixCache": "hf_freeze.prefix",
    "SupervisedLogits": "hf_freeze.supervision",
    "all_logits": "hf_freeze.supervision",
    "supervised_logits_only": "hf_freeze.supervision",
    "generate_summaries": "hf_freeze.summarization.generation",
    "compute_rouge": "hf_freeze.summarization.rouge",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'hf_freeze' has no attribute {name!r}")
