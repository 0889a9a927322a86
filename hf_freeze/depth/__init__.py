"""Which depth to freeze: a short probe before any long run (`advise`), or whole runs at many (`sweep_depths`)."""

from hf_freeze.depth.advice import Advice, DepthProbe
from hf_freeze.depth.advising import advise
from hf_freeze.depth.report import SweepReport, draw_sweep
from hf_freeze.depth.sweep import sweep_depths

__all__ = ["Advice", "DepthProbe", "SweepReport", "advise", "draw_sweep", "sweep_depths"]
