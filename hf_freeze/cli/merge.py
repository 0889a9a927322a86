"""`hf-freeze merge`: `merge_delta`, the base's tokenizer beside it, and a strict look at what was written."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from hf_freeze.cli import Say, Told
from hf_freeze.errors import FreezeError, ModelError

__all__ = ["HELP", "add_arguments", "run"]

HELP = """\
Puts a delta on its base and writes both as one full model, for from_pretrained, with the tokenizer. What was written is
then loaded strictly, and has to have the base's config and tensor names, and the delta's values.

  hf-freeze merge out/delta -o out/merged
  hf-freeze merge out/delta -o out/merged --base_model /models/base
"""

# Of a config: where it came from and what wrote it. An untied head is the one difference that a plan may ask for.
PASSING = ("_name_or_path", "transformers_version", "dtype", "architectures", "tie_word_embeddings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("delta", help="what save_delta wrote")
    parser.add_argument("-o", "--output", required=True, help="the folder to write; a new one")
    parser.add_argument("--base_model", help="where the base lies now; the delta says where it lay")


def run(args: argparse.Namespace, say: Say) -> Told:
    """Merges and checks.

    Raises:
        FreezeError: The delta or its base is missing or damaged, the folder is taken, or the check failed.
    """
    from hf_freeze.delta import merge_delta
    from hf_freeze.loading import load_with_delta

    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"-o {output} was asked for, which holds something. Give a new folder.")
    model = load_with_delta(args.delta, args.base_model)
    base = str(model.config._name_or_path)
    merge_delta(args.delta, output, model)
    try:
        tensors = _check(output, model, base)
    except BaseException:  # what was not checked to the end must not lie there as if it were
        shutil.rmtree(output)
        raise
    beside = _copy_beside(args.delta, base, output, say)
    size = sum(path.stat().st_size for path in output.iterdir())
    text = f"{output}: {tensors} tensors, {size / 1e6:,.1f} MB; config and names are those of {base}"
    values = {"output": str(output), "base": base, "tensors": tensors, "bytes": size, "beside": beside}
    return Told("\n".join([text, f"  with {', '.join(beside)}" if beside else ""]).rstrip(), values)


def _check(output: Path, model: Any, base: str) -> int:
    """Loads what was written; how many tensors it has.

    Raises:
        ModelError: A name, shape, value or setting is not as it should be.
    """
    import torch

    from hf_freeze.loading import load_config, model_from_config

    written, told = type(model).from_pretrained(output, dtype=model.dtype, output_loading_info=True)
    wrong = [
        f"{len(names)} {what.replace('_', ' ')}, e.g. {sorted(map(str, names))[0]}"
        for what, names in told.items()
        if names
    ]
    config = load_config(base)
    then, now = config.to_dict(), written.config.to_dict()
    wrong += [
        f"config {name}: {now.get(name)!r} instead of {then.get(name)!r}"
        for name in sorted({*then, *now} - {*PASSING})
        if now.get(name) != then.get(name)
    ]
    state, wanted = written.state_dict(), model.state_dict()
    names = set(model_from_config(config).state_dict())
    wrong += [f"tensor {name}: in one of base and merged model only" for name in sorted(names ^ set(state))]
    wrong += [
        f"tensor {name}: not the value of base and delta"
        for name in sorted(names & set(state))
        if not torch.equal(state[name], wanted[name])
    ]
    if wrong:
        raise ModelError(
            f"The merged model is not what it should be: {'; '.join(wrong[:3])}{'; ...' if wrong[3:] else ''}. It was "
            f"removed. Report this, with the delta's freeze_plan.json and config.json."
        )
    return len(state)


def _copy_beside(delta: str, base: str, output: Path, say: Say) -> list[str]:
    """Puts the tokenizer and the prompt there; says what could not be had."""
    from hf_freeze.loading import load_tokenizer
    from hf_freeze.summarization.publish.results import PROMPT_FILE

    beside = []
    try:
        load_tokenizer(delta, base).save_pretrained(output)
        beside.append("tokenizer")
    except FreezeError as error:
        say(f"note: no tokenizer was written: {error}")
    prompt = Path(delta) / PROMPT_FILE
    if prompt.is_file():
        shutil.copyfile(prompt, output / PROMPT_FILE)
        beside.append(PROMPT_FILE)
    return beside
