"""The prefix cache: the frozen part of a model computed once, stored, and replayed exactly."""

from hf_freeze.prefix.cache import BuildReport, PrefixCache, PrefixCollator

__all__ = ["BuildReport", "PrefixCache", "PrefixCollator"]
