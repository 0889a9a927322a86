"""The prefix cache: the frozen part of a model computed once, stored, and replayed exactly."""

from hf_freeze.prefix.break_even import BreakEven
from hf_freeze.prefix.cache import BuildReport, PrefixCache, PrefixCollator, PreparedCache
from hf_freeze.prefix.leases import MANIFEST, folder_bytes
from hf_freeze.prefix.store import read_manifest, stored_rows

__all__ = [
    "MANIFEST",
    "BreakEven",
    "BuildReport",
    "PrefixCache",
    "PrefixCollator",
    "PreparedCache",
    "folder_bytes",
    "read_manifest",
    "stored_rows",
]
