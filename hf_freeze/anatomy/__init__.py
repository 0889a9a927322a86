"""The anatomy of a transformer: embeddings, ordered blocks, final norms, head and ties, told by structure."""

from hf_freeze.anatomy.find import read_anatomy
from hf_freeze.anatomy.inputs import config_width, image_parameter, sample_inputs
from hf_freeze.anatomy.structure import core_model
from hf_freeze.anatomy.value import Anatomy, Block, BlocksGiven, Part, Stack, Tie, anatomy_table

__all__ = [
    "Anatomy",
    "Block",
    "BlocksGiven",
    "Part",
    "Stack",
    "Tie",
    "anatomy_table",
    "config_width",
    "core_model",
    "image_parameter",
    "read_anatomy",
    "sample_inputs",
]
