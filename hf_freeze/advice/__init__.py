"""Which depth to freeze, before any long run: a short probe at several depths, and a plan with its reasons.

Whole runs at many depths are `depth`'s business, a run under way is `monitor`'s.
"""

from hf_freeze.advice.call import advise
from hf_freeze.advice.result import Advice, DepthProbe

__all__ = ["Advice", "DepthProbe", "advise"]
