"""Every attribute that hf_freeze puts on a model or on a module of it. Its comment names the one room that writes it.

They lie in `__dict__`, never among parameters, buffers or submodules: a state dict does not see them, and deepcopy and
pickle take them along.
"""

from __future__ import annotations

__all__ = ["ASKED_MODE", "ON_TRIAL", "RECORD", "RELEASED", "REPLAY", "SUPERVISED", "SUPERVISED_HANDLES",
           "TOP_BLOCK_HANDLES", "TOP_BLOCK_POSITIONS", "UNTIED", "is_mark"]  # fmt: skip

RECORD = "_hf_freeze_record"  # freezing.apply: on the model that was frozen, what `freeze` did
ASKED_MODE = "_hf_freeze_asked_mode"  # freezing.holding: on a block held in eval, the mode that was asked for
UNTIED = "_hf_freeze_untied"  # freezing.apply: on a head's module, its parameters that have tensors of their own
REPLAY = "_hf_freeze_replay"  # prefix.replay: on the modules that a cache's hooks stand on, the replay
RELEASED = "_hf_freeze_released"  # prefix.release: on modules whose weights are away, an object with restore()
SUPERVISED = "_hf_freeze_supervised_logits"  # training.supervised: on the model that is called, the outcome
SUPERVISED_HANDLES = "_hf_freeze_supervised_handles"  # training.supervised: on that model and its head
TOP_BLOCK_POSITIONS = "_hf_freeze_positions"  # training.top_block: on the reduced modules, those of the current call
TOP_BLOCK_HANDLES = "_hf_freeze_top_block_handles"  # training.top_block: on the model that is called
ON_TRIAL = "_hf_freeze_on_trial"  # trial: on the model meanwhile, since such a forward is no training


def is_mark(name: str) -> bool:
    """Whether an attribute of that name is one of ours.

    >>> is_mark(RECORD), is_mark("weight")
    (True, False)
    """
    return name.startswith("_hf_freeze_")
