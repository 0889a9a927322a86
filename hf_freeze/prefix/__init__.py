"""The prefix cache: the frozen part of a model computed once, stored, and replayed exactly."""

from hf_freeze.prefix.cache import BuildReport, PrefixCache, PrefixCollator, PreparedCache
from hf_freeze.prefix.folder import describe_caches
from hf_freeze.prefix.saving import BreakEven

__all__ = ["BreakEven", "BuildReport", "PrefixCache", "PrefixCollator", "PreparedCache", "describe_caches"]
