"""Freezing: a plan applied, frozen modules held in eval, the proof that nothing moved, the report."""

from hf_freeze.freezing.apply import freeze, thaw, untie
from hf_freeze.freezing.proof import FrozenProof, verify_frozen
from hf_freeze.freezing.report import FreezeRecord, FreezeReport, freeze_record

__all__ = ["FreezeRecord", "FreezeReport", "FrozenProof", "freeze", "freeze_record", "thaw", "untie", "verify_frozen"]
