"""`hf-freeze inspect`: anatomy, plan and forecast of a model, of its weights or of its config alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_freeze.cli import Say, Told
from hf_freeze.errors import FreezeError

__all__ = ["HELP", "add_arguments", "run"]

HELP = """\
Shows the parts of a model, what a plan freezes and trains, where the backward pass ends, and the forecast of
parameters, memory, FLOPs and disk. Without weights (a config alone, or --config_only) it is read on the meta device,
in a moment at any size.

  hf-freeze inspect facebook/bart-large-cnn --freeze_encoder_blocks all --freeze_decoder_blocks 0.5
  hf-freeze inspect out/delta                    (by the plan that lies with it)
  hf-freeze inspect meta-llama/Llama-3.1-70B --config_only --freeze_decoder_blocks -8 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="a model folder, a delta, a folder with a config.json, or a hub id")
    parser.add_argument("--config_only", action="store_true", help="do not load weights")
    plan = parser.add_argument_group("plan", "half of each stack and the embeddings, where nothing is given")
    plan.add_argument("--freeze_embeddings", choices=("true", "false"), help="all input embeddings (default: true)")
    plan.add_argument("--freeze_encoder_blocks", help="lowest n, -n for all but the top n, 0.5, or all")
    plan.add_argument("--freeze_decoder_blocks", help="the same for the decoder, or the only stack")
    plan.add_argument("--tied_head", choices=("freeze", "train", "untie"), help="a head tied to the embeddings")
    cost = parser.add_argument_group("forecast")
    cost.add_argument("--batch_size", type=int, default=8, help="rows a step (default: 8)")
    cost.add_argument("--source_tokens", type=int, default=512, help="tokens read a row (default: 512)")
    cost.add_argument("--target_tokens", type=int, default=64, help="tokens learnt a row (default: 64)")
    cost.add_argument("--epochs", type=int, default=3, help="passes over the rows (default: 3)")
    cost.add_argument("--rows", type=int, default=1000, help="training rows (default: 1000)")
    cost.add_argument("--dtype", default="bfloat16", help="of frozen weights and activations (default: bfloat16)")


def run(args: argparse.Namespace, say: Say) -> Told:
    """Reads the model and shows what freezing it means.

    Raises:
        FreezeError: It is no model, its blocks cannot be told, or the plan does not fit it.
    """
    from hf_freeze.anatomy import anatomy_table, read_anatomy
    from hf_freeze.forecast import forecast
    from hf_freeze.freezing import freeze
    from hf_freeze.loading import source_of

    source = source_of(args.model)
    plan, whose = _plan(args, source)
    model, loaded = _load(source, args.config_only)
    anatomy = anatomy_table(read_anatomy(model))
    numbers = {name: getattr(args, name) for name in ("batch_size", "source_tokens", "target_tokens", "epochs", "rows")}
    costs = forecast(model, plan, dtype=args.dtype, **numbers)
    report = freeze(model, plan)
    read = f"{args.model}: {loaded}; {whose}"
    values = {
        "model": args.model,
        "read": loaded,
        "plan_from": whose,
        "anatomy": anatomy.to_dict(),
        "freeze": report.to_dict(),
        "forecast": costs.to_dict(),
    }
    return Told(f"{read}\n\n{anatomy}\n\n{report}\n\n{costs}", values)


def _plan(args: argparse.Namespace, source: str) -> tuple[Any, str]:
    """The plan, and whose it is: that of the options, over the one that lies with the model."""
    from hf_freeze.plan import PLAN_FILE, FreezePlan

    asked: dict[str, Any] = {
        "embeddings": None if args.freeze_embeddings is None else args.freeze_embeddings == "true",
        "encoder_blocks": args.freeze_encoder_blocks,
        "decoder_blocks": args.freeze_decoder_blocks,
        "tied_head": args.tied_head,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if (Path(source) / PLAN_FILE).is_file():
        plan = replace(FreezePlan.from_pretrained(source), **asked)
        return plan, f"the plan of its {PLAN_FILE}" + (" with your options" if asked else "")
    return FreezePlan(**asked), "the plan of your options" if asked else "the default plan"


def _load(source: str, config_only: bool) -> tuple[Any, str]:
    """The model and how it was read: with its weights, or from its config on the meta device."""
    from hf_freeze.loading import load_config, load_model, model_from_config

    why = "as asked" if config_only else "since no weights lie with it"
    if not config_only and _has_weights(source):
        try:
            return load_model(source), "read with its weights"
        except FreezeError as error:
            if Path(source).is_dir():
                raise
            why = f"since its weights could not be had ({error})"  # a hub id, of which only the config is at hand
    return model_from_config(load_config(source)), f"read from its config on the meta device, {why}"


def _has_weights(source: str) -> bool:
    """Whether a folder holds a model's weights; of a hub id that is found out by loading."""
    path = Path(source)
    return not path.is_dir() or any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))
