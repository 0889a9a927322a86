"""What was trained, and nothing else, as one safetensors file: saved, put on its base again, merged with it."""

from hf_freeze.delta.file import is_delta
from hf_freeze.delta.load import build_base, load_delta, merge_delta
from hf_freeze.delta.save import DeltaReport, save_delta

__all__ = ["DeltaReport", "build_base", "is_delta", "load_delta", "merge_delta", "save_delta"]
