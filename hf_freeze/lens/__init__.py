"""What each layer of a model has learnt, in numbers: similarity, drift, gradients, logit lens, attention, activations.

Six functions, each with a frozen dataclass that goes to JSON and back; `lens.plots` draws them from that alone. Blocks
are those that `read_anatomy` finds. Padding is in no figure. A model is left as it was: weights, gradients, modes,
random state, attention implementation. One process; nothing here trains, or says what to freeze.

Where layers are counted, row 0 is what enters block 0 (the embeddings) and row i + 1 what block i hands on.
"""

from hf_freeze.lens.drift import WeightDrift, weight_drift
from hf_freeze.lens.gradients import BlockGradients, block_gradients
from hf_freeze.lens.logits import LogitLens, logit_lens
from hf_freeze.lens.maps import ActivationMap, AttentionMap, activation_map, attention_map
from hf_freeze.lens.similarity import LayerSimilarity, layer_similarity, linear_cka
from hf_freeze.lens.texts import text_batches

__all__ = [
    "ActivationMap",
    "AttentionMap",
    "BlockGradients",
    "LayerSimilarity",
    "LogitLens",
    "WeightDrift",
    "activation_map",
    "attention_map",
    "block_gradients",
    "layer_similarity",
    "linear_cka",
    "logit_lens",
    "text_batches",
    "weight_drift",
]
