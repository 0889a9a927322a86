"""The prefix cache: the frozen part of a model computed once, stored, and replayed exactly."""

from hf_freeze.prefix.break_even import BreakEven
from hf_freeze.prefix.cache import BuildReport, PrefixCache, PrefixCollator, PreparedCache

__all__ = ["BreakEven", "BuildReport", "PrefixCache", "PrefixCollator", "PreparedCache"]
