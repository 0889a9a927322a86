"""Measures what a training step costs: full, frozen, with checkpointing, LoRA, from the prefix cache, and the limit.

    python recipes/benchmark_freezing.py
        the embedded SmolLM2-135M, 26 of 30 blocks frozen, 8 x 128 tokens, 16 of them labelled
    python recipes/benchmark_freezing.py --model bart-base
        that shape, random weights: 128 tokens -> 16, whole encoder and 4 of 6 decoder blocks frozen
    python recipes/benchmark_freezing.py --precision bf16 --release_prefix --depths 8,16,20,26
        bf16 autocast, no prefix weights in cached modes; other depths below the same suffix
    python recipes/benchmark_freezing.py --model llama-8b --precision bf16 --source_tokens 512 --from_disk --steps 30
        the upper quarter trained, states read from disk by workers

Each mode is a process of its own, in turn; repetitions are interleaved, so that a machine that slows down does so for
all. A step is one batch fetched and collated, forward of the model as accelerate prepares it for Trainer, backward,
AdamW (fused, as in Trainer) and zero_grad. All modes get the same weights, rows and seeds; those that train the same
part must have the same losses, and in the first step the gradients of every tensor, to within rounding or three times
the noise that the mode frozen has of itself where a batch is split. The states of two rows are exchanged once, to see
that it would be told.

Cached modes call cache.collator on the rows of each step, so the look-up by content is paid for, and no step reads rows
that another one has read. The store's pages are in memory, as the build left them; --from_disk drops them first and
reads through a DataLoader with two workers. The limit is the blocks above the cut, final norm and head at the labelled
positions, called directly with states that lie on the device: no cache can be faster.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, GPT2Config, LlamaConfig
from transformers import default_data_collator as collate

from hf_freeze import FreezeError, FreezePlan, PrefixCache, forecast, freeze, read_anatomy, supervised_logits_only
from hf_freeze.cli import exit_code
from hf_freeze.embedded import embedded_model
from hf_freeze.errors import nearest
from hf_freeze.exactness import ROUNDING, compare, exchange_rows, relative_gaps, sketch, step_tensors
from hf_freeze.given import read_numbers
from hf_freeze.machine import device_name, find_device, peak_bytes, reset_peak, status_bytes
from hf_freeze.tables import Table, count_text

SAME_PART = ("frozen+checkpointing", "cached", "cached+supervised", "limit")  # train what the mode "frozen" trains
MODES = ("full", "frozen", "lora", *SAME_PART)
WARM_UP = 2  # steps that are not timed: they set up kernels, optimizer state and released weights
SAME_LOSS = {"fp32": 1e-5, "bf16": 2e-2}  # relative, after steps that add up; what is exact, the gradients tell

# Shapes of models on the hub: width, feed-forward, blocks (of the decoder), heads, key-value heads, vocabulary.
SHAPES = {
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "bart-base": (768, 3072, 6, 12, 12, 50265),
    "gpt2": (768, 3072, 12, 12, 12, 50257),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
}
TOY = (32, 64, 6, 4, 2, 512)
DEFAULT_FREEZE = {"smollm2": "-4", "bart-base": "-2"}  # the others: three quarters


def main() -> None:
    args = parse_arguments()
    if args.worker:
        transformers.logging.set_verbosity_error()
        print(json.dumps(work(args)))
        return
    started = datetime.now().astimezone()
    frozen = make_plan(args).resolve(read_anatomy(make_model(args, "meta"))).blocks
    suffix = args.shape[2] - frozen["decoder"]
    given = {job: [f"--worker={job}"] for job in [*args.modes, *["build"][: args.build_rows]]}
    for depth in args.depths:
        given[f"depth {depth}"] = ["--worker=cached", f"--blocks={depth + suffix}", f"--freeze_decoder_blocks={depth}"]
    runs = {job: [] for job in given}
    with tempfile.TemporaryDirectory(dir=args.cache_dir, prefix="benchmark-") as folder:
        for job in (bar := tqdm(list(given) * args.repetitions, unit="run")):
            bar.set_description(job)
            runs[job].append(run_worker(job, [*given[job], f"--cache_dir={folder}"], args.threads))
    results = {job: summarise(runs[job]) for job in runs}
    modes = {mode: results[mode] for mode in args.modes}
    add_ratios(modes, args)
    verdict = compare_steps(modes, args.precision)
    for result in [*modes.values(), *(run for each in runs.values() for run in each)]:
        for name in result.keys() & {"first_step", "planted", "noise"}:
            del result[name]  # thousands of numbers, told in a sentence
    tables = [mode_table(modes, verdict, frozen, args), *other_tables(results, args)]
    print("\n" + "\n\n".join(map(str, tables)))
    # with the process's number: two may start within a second
    name = f"out/benchmark-{args.model}-{args.precision}-{started:%Y%m%d-%H%M%S}-{os.getpid()}.json"
    output = Path(args.output or name)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"date": started.isoformat(timespec="seconds"), "device": device_name(args.device), "losses": verdict}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    facts |= {"arguments": vars(args) | {"device": str(args.device)}, "threads": args.threads}
    facts |= {"modes": modes, "tables": [table.to_dict() for table in tables], "runs": runs}
    output.write_text(json.dumps(facts, indent=2))
    print(f"\nEvery run: {output}")
    if verdict.startswith("DIFFERENT"):
        raise FreezeError(f"The modes do not train the same. {verdict}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", choices=SHAPES, help="all but the embedded smollm2 have random weights")
    add("--modes", default=",".join(MODES), help="comma-separated, in the order of the runs")
    add("--freeze_encoder_blocks", default="all", help="as in FreezePlan; bart-base only")
    add("--freeze_decoder_blocks", help="by default all but 4 (smollm2) or 2 (bart-base), or three quarters")
    add("--batch_size", type=int, default=8)
    add("--source_tokens", type=int, default=128, help="of a row; but for bart-base the labelled ones are among them")
    add("--target_tokens", type=int, default=16, help="of a row's summary; bart-base only")
    add("--labelled_tokens", type=int, default=16, help="of a row, at another place in each; not for bart-base")
    add("--precision", default="fp32", choices=SAME_LOSS, help="bf16: autocast; llamas on a GPU also have bf16 weights")
    add("--attention", default="sdpa", help="implementation, as transformers names them: sdpa, eager, ...")
    add("--trained_weights", default="fp32", choices=SAME_LOSS, help="of such a llama, and with them AdamW's state")
    add("--device", help="by default the accelerator if there is one, else cpu")
    add("--threads", type=int, default=os.cpu_count(), help="by default all cores")
    add("--steps", type=int, default=5, help="timed in each run, after a warm-up")
    add("--repetitions", type=int, default=3, help="runs of each mode, interleaved")
    add("--from_disk", action="store_true", help="give it many --steps: its two workers read four batches ahead")
    add("--release_prefix", action="store_true", help="in the cached modes")
    add("--build_rows", type=int, default=128, help="rows on which the build is timed; 0 leaves it out")
    add("--depths", default="", help="such as 8,16,20,26: cached steps with as many frozen blocks, the same suffix")
    add("--blocks", type=int, help="another depth (of the decoder), random weights")
    add("--toy", action="store_true", help="width 32, 6 blocks, vocabulary 512, random weights: to see that it runs")
    add("--cache_dir", help="where caches lie while this runs; by default the system's temporary folder")
    add("--output", help="the JSON file; by default out/benchmark-....json")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.modes = args.modes.split(",")
    args.depths = read_numbers(args.depths, int)
    args.train_rows = args.batch_size * (WARM_UP + args.steps)
    args.is_bart = args.model == "bart-base"
    args.is_embedded = args.model == "smollm2" and not args.blocks and not args.toy
    args.shape = list(TOY if args.toy else SHAPES[args.model])
    args.shape[2] = args.blocks or args.shape[2]
    if unknown := [mode for mode in args.modes if mode not in MODES]:
        raise FreezeError(f"--modes {unknown[0]} was asked for; use {nearest(unknown[0], MODES, len(MODES))}.")
    for name in ("batch_size", "source_tokens", "target_tokens", "labelled_tokens", "threads", "steps", "repetitions"):
        if getattr(args, name) < 1:
            raise FreezeError(f"--{name} {getattr(args, name)} was asked for; use 1 or more.")
    if not args.is_bart and args.labelled_tokens >= args.source_tokens:
        asked = f"--labelled_tokens {args.labelled_tokens} was asked for with --source_tokens {args.source_tokens}"
        raise FreezeError(f"{asked}; nothing predicts the first of them. Use {args.source_tokens - 1} or fewer.")
    args.device = find_device(args.device)
    args.low_weights = args.precision == "bf16" and args.model.startswith("llama") and args.device.type != "cpu"
    args.freeze_decoder_blocks = args.freeze_decoder_blocks or DEFAULT_FREEZE.get(args.model, "0.75")
    return args


def run_worker(job: str, given: list[str], threads: int) -> dict:
    """One run in a process of its own; what it printed last."""
    command = [sys.executable, __file__, *sys.argv[1:], *given]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode == -9:
        return {"error": "killed, probably out of memory"}
    if done.returncode:
        raise FreezeError(f"The run of {job!r} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(runs: list[dict]) -> dict:
    """Medians over the runs of one job, or why it could not run."""
    result = dict(next((run for run in runs if "error" in run), runs[0]))
    for name in result.keys() & {"pass", "bare", "checks", "peak_bytes", "import_bytes"}:
        result[name] = statistics.median(run[name] for run in runs)
    if "seconds" in result:
        result["seconds"] = statistics.median(second for run in runs for second in run["seconds"])
    return result


def add_ratios(modes: dict[str, dict], args: argparse.Namespace) -> None:
    """What the table compares, None where a side is missing; beside it the forecast."""
    target = args.target_tokens if args.is_bart else args.labelled_tokens
    source = args.source_tokens - (0 if args.is_bart else target)
    sizes = {"batch_size": args.batch_size, "source_tokens": source, "target_tokens": target}
    costs = forecast(make_model(args, "meta"), make_plan(args), dtype="float32", **sizes).modes
    flops = {mode: costs[mode].step_flops for mode in ("full", "frozen", "lora", "cached")}
    flops |= dict.fromkeys(("cached+supervised", "limit"), costs["cached"].supervised_step_flops)
    full, frozen, limit = (modes.get(mode, {}) for mode in ("full", "frozen", "limit"))
    pairs = {"full_over_it": (full, None), "frozen_over_it": (frozen, None), "it_over_limit": (None, limit)}
    for mode, result in modes.items():
        result["forecast"] = flops["full"] / flops[mode] if mode in flops else None
        for name, pair in pairs.items():
            for key, prefix in (("seconds", ""), ("peak_bytes", "peak_")):
                one, other = (result.get(key) if side is None else side.get(key) for side in pair)
                result[prefix + name] = one / other if one and other else None


def compare_steps(modes: dict[str, dict], precision: str) -> str:
    """Whether the modes that train the same part have the same losses and first gradients, in a sentence."""
    ran = {mode: modes[mode] for mode in ("frozen", *SAME_PART) if "losses" in modes.get(mode, {})}
    if "frozen" not in ran or len(ran) < 2:
        return "Losses not compared: that takes the mode frozen and another that trains the same part."
    if len(counts := {result["trained_parameters"] for result in ran.values()}) > 1:
        return f"DIFFERENT numbers of trained parameters: {sorted(counts)}."
    plain = ran.pop("frozen")
    gaps = {m: max(abs(a / b - 1) for a, b in zip(r["losses"], plain["losses"], strict=True)) for m, r in ran.items()}
    told = ", ".join(f"{mode} {gap:.0e}" for mode, gap in gaps.items())
    losses = f"losses as frozen over {len(plain['losses'])} steps, greatest gap: {told}"
    if not all(gap <= SAME_LOSS[precision] for gap in gaps.values()):
        return f"DIFFERENT {losses}."

    def agreement(step: dict):
        return compare(relative_gaps(plain["first_step"], step), plain["noise"], ROUNDING[precision])

    steps = {mode: agreement(result["first_step"]) for mode, result in ran.items()}
    for mode, step in steps.items():
        if not step.same:
            return f"DIFFERENT gradients of {mode} in the first step: {step}. Same {losses}."
    planted = {mode: agreement(result["planted"]) for mode, result in ran.items() if result.get("planted")}
    if blind := [mode for mode, step in planted.items() if step.same]:
        return f"DIFFERENT states are not seen: those of two rows were exchanged, and {blind[0]} looks as exact."
    seen = "; states of two rows exchanged are seen" if planted else ""
    worst = ", ".join(f"{mode} {step.gaps[step.worst]:.0e}" for mode, step in steps.items())
    return f"Same {losses}. Same gradients of every tensor in the first step, greatest gap: {worst}{seen}."


def mode_table(modes: dict[str, dict], verdict: str, frozen: dict[str, int], args: argparse.Namespace) -> Table:
    """The modes side by side, and how they were measured."""
    names = ("full_over_it", "frozen_over_it", "it_over_limit", "forecast", "peak_full_over_it")
    rows = []
    for mode, result in modes.items():
        *ratios, memory = (f"{result[name]:.2f}" if result[name] else "-" for name in names)
        seconds, peak = result.get("seconds"), result.get("peak_bytes")
        step = (f"{seconds:.3g} s", count_text(result["tokens"] / seconds)) if seconds else ("-", "-")
        rows.append((mode, *step, *ratios, count_text(peak, "B") if peak else "-", memory))
    imports = count_text(max(result.get("import_bytes", 0) for result in modes.values()), "B")
    counted = f"resident memory, the imports {imports} of it" if args.device.type == "cpu" else "the device's memory"
    tokens = "target_tokens" if args.is_bart else "labelled_tokens"
    asked = ("batch_size", "source_tokens", tokens, "precision", "attention", "threads", "from_disk", "release_prefix")
    lines = (
        verdict,
        f"{device_name(args.device)}; {', '.join(f'{name} {getattr(args, name)}' for name in asked)}.",
        f"Frozen blocks: {', '.join(f'{stack} {count}' for stack, count in frozen.items())}; medians of "
        f"{args.repetitions} x {args.steps} steps; peak: {counted}, from the first timed step on; forecast: FLOPs.",
        *(f"{mode}: {told}." for mode, result in modes.items() if (told := result.get("error") or result["note"])),
    )
    columns = ("mode", "step", "tokens/s", "full / it", "frozen / it", "it / limit", "forecast", "peak", "full / its")
    title = f"A training step of {args.model}{'' if args.is_embedded else ', random weights'}"
    return Table(title, columns, tuple(rows), lines)


def other_tables(results: dict[str, dict], args: argparse.Namespace) -> list[Table]:
    """What the build's pass costs beside a bare forward of the prefix; cached steps of models of other depths."""
    tables, build = [], results.get("build", {})
    if "bare" in build:
        cells = [f"{build[name]:.3g} s" for name in ("pass", "bare", "checks")]
        lines = (f"{args.build_rows} rows. The checks on a few rows take as long before a pass of any length.",)
        columns = ("pass", "bare forward of the prefix", "checks", "pass / bare")
        tables.append(Table("Building the cache", columns, ((*cells, f"{build['pass'] / build['bare']:.2f}"),), lines))
    steps = {depth: results[f"depth {depth}"].get("seconds") for depth in args.depths}
    if steps and all(steps.values()):
        rows = tuple((str(depth), f"{s:.3g} s", f"{s / min(steps.values()):.3f}") for depth, s in steps.items())
        title = "Cached steps with the same blocks above the cut, random weights"
        tables.append(Table(title, ("frozen blocks", "step", "it / least"), rows))
    return tables


def make_config(args: argparse.Namespace) -> transformers.PretrainedConfig:
    width, inner, blocks, heads, groups, words = args.shape
    if args.is_bart:
        decoder = {"decoder_layers": blocks, "decoder_ffn_dim": inner, "decoder_attention_heads": heads}
        encoder = {"encoder_layers": 6, "encoder_ffn_dim": inner, "encoder_attention_heads": heads}
        return BartConfig(vocab_size=words, d_model=width, **encoder, **decoder)
    if args.model == "gpt2":
        return GPT2Config(vocab_size=words, n_embd=width, n_inner=inner, n_layer=blocks, n_head=heads)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": words}
    turns = {"rope_type": "default", "rope_theta": 1e5 if args.model == "smollm2" else 5e5}
    rest = {"rope_parameters": turns, "max_position_embeddings": 8192, "tie_word_embeddings": args.model != "llama-8b"}
    return LlamaConfig(num_attention_heads=heads, num_key_value_heads=groups, **sizes, **rest)


def make_model(args: argparse.Namespace, device: str | torch.device):
    """The model with the same weights in every process; without any on the device meta."""
    torch.manual_seed(0)
    if args.is_embedded and device != "meta":
        given = {"dtype": torch.float32, "attn_implementation": args.attention}
        return AutoModelForCausalLM.from_pretrained(embedded_model(), **given).to(device)
    auto_class = AutoModelForSeq2SeqLM if args.is_bart else AutoModelForCausalLM
    given = {"dtype": torch.bfloat16 if args.low_weights else torch.float32, "attn_implementation": args.attention}
    with torch.device(device):
        return auto_class.from_config(make_config(args), **given)


def make_plan(args: argparse.Namespace) -> FreezePlan:
    encoder = args.freeze_encoder_blocks if args.is_bart else None
    return FreezePlan(encoder_blocks=encoder, decoder_blocks=args.freeze_decoder_blocks)


def make_rows(args: argparse.Namespace, count: int) -> list[dict[str, torch.Tensor]]:
    """Random rows of one length; the labelled tokens stand at another place in each."""
    source, labelled, words = args.source_tokens, args.labelled_tokens, make_config(args).vocab_size - 1
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, words, (count, source), generator=random)
    labels = torch.randint(4, words, (count, args.target_tokens), generator=random)
    if not args.is_bart:
        place = torch.arange(source) - torch.randint(1, source - labelled + 1, (count, 1), generator=random)
        labels = ids.masked_fill((place < 0) | (place >= labelled), -100)
    rows = zip(ids, torch.ones_like(ids), labels, strict=True)
    return [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in rows]


def work(args: argparse.Namespace) -> dict:
    """One run of one mode, or of the build."""
    imports = status_bytes("VmRSS")
    torch.set_num_threads(args.threads)
    set_up = set_up_limit if args.worker == "limit" else set_up_mode
    try:
        if args.worker == "build":
            return time_build(make_model(args, args.device), args)
        return time_steps(*set_up(make_model(args, args.device), args), args) | {"import_bytes": imports}
    except torch.OutOfMemoryError:
        return {"error": f"out of memory on {device_name(args.device)}"}


def set_up_mode(model, args: argparse.Namespace):
    """What a user of the mode would write: model, parameters by name, batches, the loss of a batch, and a note."""
    rows, collator, workers, note = make_rows(args, args.train_rows), collate, 0, ""
    if args.worker == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    elif args.worker != "full":
        freeze(model, make_plan(args))
    if args.worker == "frozen+checkpointing":
        model.activation_checkpointing_enable()
    if args.worker.startswith("cached"):
        cache = PrefixCache.build(model, rows, collate, cache_dir=args.cache_dir, precision=args.precision)
        collator = cache.collator
        if args.release_prefix:
            cache.release_prefix()
        if args.from_disk:
            workers = 2
            for path in Path(args.cache_dir).rglob("*.safetensors"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if args.worker == "cached+supervised" and not (outcome := supervised_logits_only(model)).active:
        note = f"as cached; {outcome}"
    model.train()
    given = {"num_workers": workers, "pin_memory": args.device.type == "cuda"}
    batches = DataLoader(rows, args.batch_size, collate_fn=collator, **given)
    named = list(model.named_parameters())
    mixed = "bf16" if args.precision == "bf16" else "no"
    model = Accelerator(mixed_precision=mixed, cpu=args.device.type == "cpu").prepare_model(model)
    return model, named, batches, lambda batch: model(**batch).loss, note


def set_up_limit(model, args: argparse.Namespace):
    """The same of the part above the cut alone, its states on the device; the rest of the model is given up."""
    blocks = make_plan(args).resolve(read_anatomy(model)).blocks
    if blocks.get("encoder", 0) != getattr(model.config, "encoder_layers", 0):
        raise FreezeError("The limit is written for a whole frozen encoder. Use --freeze_encoder_blocks all.")
    core, head, tied = model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings().weight
    upper = (core.h if args.model == "gpt2" else core.layers)[blocks["decoder"] :]
    norm = core.ln_f if args.model == "gpt2" else getattr(core, "norm", torch.nn.Identity())
    model.requires_grad_(False).eval()
    batches = []
    for batch in DataLoader(make_rows(args, args.train_rows), args.batch_size, collate_fn=collate):
        given = run_prefix(model, upper[0], batch, args)
        targets = batch["labels"] if args.is_bart else functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        places = (targets.flatten() != -100).nonzero().flatten()
        wanted = {"places": places, "targets": targets.flatten()[places]}
        batches.append({"given": given, **move(wanted, args.device)})

    def loss_of(batch):
        (states, *others), named = batch["given"]
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            for block in upper:
                states = block(states, *others, **named)
            logits = head(norm(states).flatten(0, 1)[batch["places"]])
            return functional.cross_entropy(logits.float(), batch["targets"])

    above = torch.nn.ModuleList([upper, norm, head]).train()
    inside = {id(parameter.requires_grad_()) for parameter in above.parameters() if parameter is not tied}
    return above, [(name, p) for name, p in model.named_parameters() if id(p) in inside], batches, loss_of, ""


class CutReached(Exception):
    """Carries what the first block above the cut is called with."""


def run_prefix(model, block, batch: dict, args: argparse.Namespace) -> tuple:
    """What a block is called with, by place and by name: the model is run up to it, without a graph."""

    def stop(_, by_place, by_name):
        raise CutReached(by_place, by_name)

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            model(**move(batch, args.device), use_cache=False)
    except CutReached as reached:
        return reached.args
    finally:
        handle.remove()


def time_steps(module, named, batches, loss_of, note: str, args: argparse.Namespace) -> dict:
    """Seconds and loss of each step, the greatest memory, and what the first step is compared by."""
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    if args.trained_weights == "fp32":
        for parameter in trained:
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=args.device.type in ("cpu", "cuda"))
    batches, seconds, losses, found = iter(batches), [], [], {}
    for step in range(WARM_UP + args.steps):
        if step == WARM_UP:
            was_reset = reset_peak(args.device)  # what set-up has freed is not training's
        started = time.perf_counter()
        batch = move(next(batches), args.device)
        if step == 0:
            found = take_first_step(module, named, batch, loss_of, args)
        torch.manual_seed(step)  # modes that train the same part then draw the same dropout
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - started)
    peak = peak_bytes(args.device) if was_reset else 0
    tokens = args.batch_size * (args.source_tokens + (args.target_tokens if args.is_bart else 0))
    found |= {"seconds": seconds[WARM_UP:], "losses": losses, "peak_bytes": peak, "tokens": tokens, "note": note}
    return found | {"trained_parameters": sum(parameter.numel() for parameter in trained)}


def take_first_step(module, named, batch: dict, loss_of, args: argparse.Namespace) -> dict:
    """Sketches of the first step's gradients, also by a planted error; the noise of plain ones. Moves no weight."""
    if args.worker not in ("frozen", *SAME_PART):
        return {}

    def take(some: dict, share: float = 1.0) -> dict:
        torch.manual_seed(0)
        return step_tensors(loss_of(some) * share, named)

    found, half, rows = {"first_step": sketch(take(batch))}, args.batch_size // 2, args.batch_size
    if args.worker == "frozen":
        found["noise"] = []
        if half:
            module.eval()  # dropout would draw other numbers for two halves
            first = take({key: value[:half] for key, value in batch.items()}, half / rows)
            second = take({key: value[half:] for key, value in batch.items()}, 1 - half / rows)
            found["noise"].append(relative_gaps(take(batch), {name: first[name] + second[name] for name in first}))
            module.train()
    if args.worker.startswith("cached") and half:
        found["planted"] = sketch(take(batch | {"prefix_states": exchange_rows(batch["prefix_states"])}))
    return found


def time_build(model, args: argparse.Namespace) -> dict:
    """Seconds that a cache takes for --build_rows more rows, beside those of the prefix alone for as many."""
    report = freeze(model, make_plan(args))
    block = read_anatomy(model).decoder_blocks[dict(report.cuts)["decoder"]].modules[0]
    few = (2048 if args.device.type == "cpu" else 32768) // args.source_tokens or 1  # as the build takes at once
    rows = make_rows(args, 3 * few + args.build_rows)
    folder = tempfile.mkdtemp(dir=args.cache_dir)  # of its own: rows that are there already are not computed again
    cache = PrefixCache.build(model, rows[:few], collate, cache_dir=folder, precision=args.precision)
    # Checks on a few rows come before every pass, so that two passes of unlike length tell what the rows take.
    short, long = cache.add(rows[few : 2 * few]).seconds, cache.add(rows[2 * few :]).seconds
    cache.close()
    model.eval()
    seconds = []
    for batch in DataLoader(rows[2 * few :], few, collate_fn=collate):
        started = time.perf_counter()
        (states, *_), _ = run_prefix(model, block, batch, args)
        states.flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    passed, bare = long - short, sum(seconds[1:])  # the first one sets up kernels
    return {"pass": passed, "bare": bare, "checks": short - passed * few / args.build_rows}


def move(batch: dict, device: torch.device) -> dict:
    """The batch's tensors on the device; stored states are brought there by the model's hooks."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


if __name__ == "__main__":
    sys.exit(exit_code(main))
