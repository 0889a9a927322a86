"""A delta damaged in any way gives the bits that were saved, or a sentence of ours: no other numbers, no traceback of
others, no hang. Each damage is read in a process of its own, which may hang or crash.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import random
import select
import shutil
import signal
import string
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_freeze import FreezePlan, freeze
from hf_freeze.delta import load_delta, save_delta
from hf_freeze.delta.file import MANIFEST_FILE, WEIGHTS_FILE
from hf_freeze.errors import FreezeError
from hf_freeze.plan import PLAN_FILE
from tests.delta.cases import as_format_1, edit, manifest_of, names_in, put_tensors, put_text

SECONDS = 20.0  # for one damage: a hundred times what it takes
TYPES: list[Any] = [None, True, 0, -1, 10**30, 1.5, float("nan"), "", "x", "\ud800", [], ["x"], [[]], {}, {"x": 1}]
NAMES = ["../x", "/etc/passwd", "..\\x", "", "model", "model.layers.0", "x" * 5000, "lm_head.weight\0", "ä\n"]


@dataclass
class Ground:
    """What is damaged: three deltas of one base, in one of both formats, and where they lie."""

    base: Path
    deltas: list[Path]  # of one plan, twice, and of another plan
    trained: LlamaForCausalLM  # what the first one holds
    bases: list[LlamaForCausalLM]  # to load into, in a fork

    @property
    def one_file(self) -> bool:
        """Whether a delta is one file, so that who exchanges it exchanges the delta."""
        return not (self.deltas[0] / MANIFEST_FILE).exists()


def config(**given: Any) -> LlamaConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**({"vocab_size": 12, "tie_word_embeddings": True, **sizes} | given))


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> list[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder / "base")
    models = []
    for number, (blocks, head) in enumerate([(1, "untie"), (1, "untie"), (2, "train")]):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        freeze(model, FreezePlan(decoder_blocks=blocks, tied_head=head))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape)
        save_delta(model, folder / f"2/{number}", extra={"metric": 0.5, "tags": ["a", {"b": None}]})
        as_format_1(shutil.copytree(folder / f"2/{number}", folder / f"1/{number}"))
        models.append(model)
    bases = [LlamaForCausalLM.from_pretrained(folder / "base") for _ in range(2)]
    return [Ground(folder / "base", [folder / f"{version}/{number}" for number in range(3)], models[0], bases)
            for version in (2, 1)]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- damages


def any_file(folder: Path, rng: random.Random) -> Path:
    """One of those that a delta lies in: each time out of two the one that holds the tensors."""
    return folder / rng.choice([WEIGHTS_FILE, rng.choice(sorted(names_in(folder)))])


def some_bytes(path: Path, rng: random.Random, low: float = 0.0, high: float = 1.0) -> None:
    """One to eight bits flipped, between two places of the file."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(int(low * len(content)), max(1, int(high * len(content))))
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_the_header(folder: Path, rng: random.Random, ground: Ground) -> None:
    path = folder / WEIGHTS_FILE
    length = int.from_bytes(path.read_bytes()[:8], "little")
    some_bytes(path, rng, 0.0, (8 + length) / path.stat().st_size)


def flip_the_length(folder: Path, rng: random.Random, ground: Ground) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[:8] = rng.choice([0, 1, 2**63, 2**64 - 1, len(content), rng.randrange(4096)]).to_bytes(8, "little")
    (folder / WEIGHTS_FILE).write_bytes(content)


def flip_the_numbers(folder: Path, rng: random.Random, ground: Ground) -> None:
    header = 8 + int.from_bytes((folder / WEIGHTS_FILE).read_bytes()[:8], "little")
    some_bytes(folder / WEIGHTS_FILE, rng, header / (folder / WEIGHTS_FILE).stat().st_size, 1.0)


def flip_any_file(folder: Path, rng: random.Random, ground: Ground) -> None:
    some_bytes(any_file(folder, rng), rng)


def cut_short(folder: Path, rng: random.Random, ground: Ground) -> None:
    path = any_file(folder, rng)
    os.truncate(path, rng.choice([0, rng.randrange(path.stat().st_size)]))


def append(folder: Path, rng: random.Random, ground: Ground) -> None:
    with any_file(folder, rng).open("ab") as file:
        file.write(rng.choice([b"\0", b" ", b"}", b"{}", rng.randbytes(rng.randrange(1, 5000))]))


def zeros(folder: Path, rng: random.Random, ground: Ground) -> None:
    path = any_file(folder, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 8, 512, 4096]))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def one_file_of_another_delta(folder: Path, rng: random.Random, ground: Ground) -> None:
    name = rng.choice(sorted(names_in(folder) - ({WEIGHTS_FILE} if ground.one_file else set())))
    shutil.copy(rng.choice(ground.deltas[1:]) / name, folder / name)


def half_of_each_of_two_saves(folder: Path, rng: random.Random, ground: Ground) -> None:
    mine, other = ((place / WEIGHTS_FILE).read_bytes() for place in (folder, ground.deltas[1]))
    differs_from = next(place for place in range(len(mine)) if mine[place] != other[place])
    middle = rng.randrange(differs_from + 1, len(mine))
    (folder / WEIGHTS_FILE).write_bytes(mine[:middle] + other[middle:])


def tensors_of_two_saves(folder: Path, rng: random.Random, ground: Ground) -> None:
    mine, other = load_file(folder / WEIGHTS_FILE), load_file(ground.deltas[1] / WEIGHTS_FILE)
    for name in rng.sample(sorted(mine), rng.randint(1, len(mine))):
        mine[name] = other[name]
    put_tensors(folder, mine)


def other_tensors(folder: Path, rng: random.Random, ground: Ground) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changes: list[Callable[[], Any]] = [
        lambda: {}, lambda: {rng.choice(NAMES): tensor}, lambda: {name: tensor.double()},
        lambda: {name: tensor.flatten()}, lambda: {name: tensor[:1].clone()}, lambda: {name: tensor * float("nan")},
        lambda: {name: tensor, rng.choice(NAMES): tensor.clone()}, lambda: {name: tensor.to(torch.float8_e4m3fn)},
        lambda: {name: tensor.view(torch.int32)}, lambda: {name: torch.zeros(0)},
    ]  # fmt: skip
    put_tensors(folder, tensors | rng.choice(changes)())


def leftovers_of_another_save(folder: Path, rng: random.Random, ground: Ground) -> None:
    names = sorted(names_in(folder))
    staging = folder / rng.choice([".delta.tmp", ".delta-1-0123456789ab.tmp"])  # of format 1
    staging.mkdir()
    copies = [(name, staging / name if rng.random() < 0.5 else folder / f"{name}.0123456789ab.tmp") for name in names]
    for name, path in rng.sample(copies, rng.randint(0, len(copies))):
        shutil.copy(ground.deltas[1] / name, path)
        if rng.random() < 0.3:
            os.truncate(path, rng.randrange(1 + path.stat().st_size))


def no_file(folder: Path, rng: random.Random, ground: Ground) -> None:
    """Something else in the place of one or two files."""
    for name in rng.sample(sorted(names_in(folder)), rng.randint(1, 2)):
        path = folder / name
        path.unlink()
        kinds: list[Callable[[], Any]] = [
            lambda path=path: None, lambda path=path: os.mkfifo(path), lambda path=path: path.mkdir(),
            lambda path=path: path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "nothing", path.name, "."])),
            lambda path=path: path.symlink_to(ground.deltas[0] / path.name), lambda path=path: path.chmod(0),
        ]  # fmt: skip
        if not (ground.one_file and name == WEIGHTS_FILE):
            kinds.append(lambda path=path: path.symlink_to(ground.deltas[1] / path.name))
        with contextlib.suppress(FileNotFoundError):  # nothing to forbid the reading of
            rng.choice(kinds)()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    if not isinstance(value, dict | list):
        return [path]
    below = value.items() if isinstance(value, dict) else enumerate(value)
    return [path] * bool(path) + [place for key, inner in below for place in places(inner, (*path, key))]


def other_json(folder: Path, rng: random.Random, ground: Ground) -> None:
    values = manifest_of(folder)
    for _ in range(rng.choice([1, 1, 1, 3])):
        field = rng.choice(sorted(values))  # each field alike, however many places it has
        *way, last = rng.choice([place for place in places(values) if place[0] == field])
        owner = values
        for key in way:
            owner = owner[key]
        change = rng.choice(["type", "type", "digit", "gone", "renamed", "other place"])
        if change == "type" or (change == "digit" and not isinstance(owner[last], str)):
            owner[last] = rng.choice(TYPES)
        elif change == "digit":
            text = list(owner[last]) or ["x"]
            text[rng.randrange(len(text))] = rng.choice(string.hexdigits + " []./")
            owner[last] = "".join(text)
        elif change == "gone":
            del owner[last]
        elif change == "renamed" and isinstance(owner, dict):
            owner[rng.choice([*NAMES, *values])] = owner.pop(last)
        else:
            target = rng.choice([part for part in values.values() if isinstance(part, dict)] or [values])
            target[str(last)] = copy.deepcopy(owner[last])
        if not values:
            break
    put_text(folder, json.dumps(values))


def other_text(folder: Path, rng: random.Random, ground: Ground) -> None:
    path = rng.choice([None, None, folder / PLAN_FILE, folder / "config.json"])
    whole = json.dumps(manifest_of(folder)) if path is None else path.read_text()
    texts = ["", "null", "[]", "{}", '"x"', "1" * 5000, "[" * 10**5, '{"a":' * 10**5, whole[:-3], whole + whole,
             "\ufeff" + whole, whole.replace('"', "'"), whole.replace("1", "NaN"), whole.upper()]  # fmt: skip
    text = rng.choice(texts)
    put_text(folder, text) if path is None else path.write_text(text)


def another_base(folder: Path, rng: random.Random, ground: Ground) -> None:
    """The base in the place that the delta names is another one."""
    torch.manual_seed(rng.randrange(1000))
    given = rng.choice(
        [{}, {"vocab_size": 13}, {"num_hidden_layers": 3}, {"hidden_size": 16}, {"tie_word_embeddings": False}]
    )
    base = LlamaForCausalLM(config(**given))
    if rng.random() < 0.5:  # one weight of the right one
        base = LlamaForCausalLM.from_pretrained(ground.base)
        parameter = rng.choice([p for name, p in base.named_parameters() if "layers.0" in name or "embed" in name])
        with torch.no_grad():
            parameter.view(-1)[rng.randrange(parameter.numel())] += 1e-3
    other = str(folder.parent / "other")
    base.save_pretrained(other)
    edit(folder, lambda values: values.update(base=rng.choice([other, other, "..", "no/such", "", "/dev/null"])))


def another_class(folder: Path, rng: random.Random, ground: Ground) -> None:
    classes = ["LlamaModel", "LlamaForSequenceClassification", "MistralForCausalLM", "Qwen2ForCausalLM",
               "PreTrainedModel", "GPT2LMHeadModel", "AutoModelForCausalLM", "os", "__doc__", "pipeline"]  # fmt: skip
    edit(folder, lambda values: values.update(architecture=rng.choice(classes)))


DAMAGES = (
    flip_the_header, flip_the_length, flip_the_numbers, flip_any_file, cut_short, append, zeros,
    one_file_of_another_delta, half_of_each_of_two_saves, tensors_of_two_saves, other_tensors,
    leftovers_of_another_save, no_file, other_json, other_json, other_json, other_text, another_base, another_class,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- reading


def differs(model: nn.Module, wanted: nn.Module) -> str:
    """What of a model is not as in the other one; "" where they are alike to the bit."""
    if type(model) is not type(wanted):
        return f"a {type(model).__name__}"
    now, then = model.state_dict(), wanted.state_dict()
    if now.keys() != then.keys():
        return "other names"
    apart = [n for n in then if now[n].dtype != then[n].dtype or not torch.equal(now[n], then[n])]
    ids = torch.arange(10)[None]
    same = apart or torch.equal(model.eval()(ids).logits, wanted.eval()(ids).logits)
    return ", ".join(apart) or ("" if same is True else "other logits")


def verdict(folder: Path, ground: Ground, given: bool) -> str:
    """What comes of loading a damaged delta, into a base that is there or into the one that it names."""
    base, untouched = ground.bases if given else (None, None)
    warnings.simplefilter("ignore")  # a damaged config.json may tell of other settings
    try:
        model = load_delta(folder, base)
    except FreezeError as error:
        if base is not None and untouched is not None and (changed := differs(base, untouched)):
            return f"wrong: it refused and changed {changed}"
        if not str(error).rstrip().endswith((".", "=")) and ": " not in str(error):
            return f"no sentence: {error}"
    else:
        if wrong := differs(model, ground.trained):
            return f"wrong: {wrong}"
        return "same"
    try:  # what the sentence advises
        save_delta(ground.trained, folder)
    except FreezeError:
        return "refused"
    wrong = differs(load_delta(folder, ground.bases[1]), ground.trained)
    return f"wrong after another save: {wrong}" if wrong else "refused"


def in_a_process(work: Callable[[], str]) -> str:
    """What work tells, from a fork that is killed where it takes too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                told = work()
            except BaseException as error:  # what is no FreezeError must not come out of it
                told = f"traceback: {type(error).__name__}: {error}"
            os.write(writer, told.encode(errors="replace")[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], SECONDS)
    told = os.read(reader, 4000).decode() if ready else "hang"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return told or f"crash: {status}"


@pytest.mark.parametrize("count", [len(DAMAGES), pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_delta_gives_the_saved_bits_or_a_sentence(count: int, grounds: list[Ground], tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(count):
        rng, ground = random.Random(number), grounds[number % 2]  # an odd number of damages: each meets both formats
        damage = DAMAGES[number % len(DAMAGES)]
        place = tmp_path / str(number)
        shutil.copytree(ground.deltas[0], place / "delta")
        damage(place / "delta", rng, ground)
        given = damage not in (another_base, another_class) and rng.random() < 0.8
        told = in_a_process(functools.partial(verdict, place / "delta", ground, given))
        counts[told.partition(":")[0]] += 1
        if told not in ("same", "refused"):
            wrong.append(f"{number} {damage.__name__}: {told}")
        shutil.rmtree(place)
    print(json.dumps(counts), *wrong, sep="\n")
    assert wrong == []
    assert counts["refused"] > counts["same"] > 0


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: signal.pause(), "hang"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda: 1 / 0, "traceback: ZeroDivisionError"),
        (lambda: "same", "same"),
    ],
)
def test_the_harness_sees_hangs_crashes_and_tracebacks(
    work: Callable[[], Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.delta.test_delta_damages.SECONDS", 0.2)
    assert in_a_process(work).startswith(told)


def test_the_harness_sees_other_bits(grounds: list[Ground]) -> None:
    told = in_a_process(lambda: verdict(grounds[0].deltas[1], grounds[0], given=True))
    assert told.startswith("wrong: model.layers.1.self_attn.q_proj.weight, ")
