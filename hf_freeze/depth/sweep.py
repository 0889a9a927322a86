"""Which depth to freeze: the same training at a grid of depths, learning rates, seeds and numbers of rows, compared.

One pass of the prefix cache serves every depth. Each finished run is a JSON line in the sweep's folder: a sweep may be
interrupted, go on in another sitting, and grow by depths, seeds or rows. Tables and pictures are made of those lines
alone. How a run trains is Trainer's business, and what its summaries are worth the caller's.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import set_seed

from hf_freeze.anatomy import read_anatomy
from hf_freeze.depth.report import (
    FACTS_FILE,
    FULL,
    LORA,
    PRETRAINED,
    RUNS_FILE,
    SweepReport,
    SweepResult,
    SweepRun,
    append_run,
    check_metric,
    read_runs,
    rewrite_runs,
    run_text,
    sign_of,
)
from hf_freeze.depth.row_losses import row_losses
from hf_freeze.depth.run_parts import (
    StepClock,
    choose_rows,
    loader_rows,
    select_rows,
    set_arguments,
    weights_digest,
    with_lora,
)
from hf_freeze.errors import CannotCache, FreezeError, ResumeError, TrainingDiverged
from hf_freeze.files import write_json
from hf_freeze.freezing import freeze, verify_frozen
from hf_freeze.given import check_callable, check_kind, check_path
from hf_freeze.machine import device_name, peak_bytes, reset_peak
from hf_freeze.plan import FreezePlan, given_plan, plan_at_depth
from hf_freeze.training.data_digest import data_digest

__all__ = ["sweep_depths"]

REFERENCES = (FULL, LORA)
ROWS = "_rows"  # the ending of a score's value of each row

MakeModel = Callable[[], Any]
MakeTrainer = Callable[[Any], Any]
Score = Callable[[Any], Mapping[str, float | Sequence[float]]]


def sweep_depths(
    make_model: MakeModel,
    make_trainer: MakeTrainer,
    depths: Sequence[int],
    *,
    output_dir: str | os.PathLike[str],
    learning_rates: Sequence[float] | Mapping[int | str, Sequence[float]] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    train_rows: Sequence[int] | None = None,
    references: Sequence[str] = REFERENCES,
    score: Score | None = None,
    tune_by: str = "eval_loss",
    quality: str | None = None,
    halving: int | None = None,
    plan: FreezePlan | None = None,
    use_cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> SweepReport:
    """Trains a model at every depth of a grid, and compares quality, time and memory.

    For each depth and number of rows the first seed tries every learning rate; the one with the best `tune_by` is the
    one of the other seeds. Every run starts from the pretrained weights, trains the same epochs, and is measured after
    the last one. Runs that lie finished in `output_dir` are not trained again, so that the same call goes on after an
    interruption, and a call with more depths, seeds or rows trains only those.

    Args:
        make_model: Loads the pretrained model anew at each call, always the same weights.
        make_trainer: Returns a new Trainer for the model that it is given, with all training rows and an eval_dataset.
            Learning rate, seed and rows are set by the sweep; epochs, batch and precision are those of its arguments.
        depths: Frozen blocks, from the bottom; an encoder lies below its decoder.
        output_dir: Where runs.jsonl and sweep.json lie.
        learning_rates: To try at each depth, since the best one moves with it; or a mapping from a depth, "full" or
            "lora" to those. None is that of the trainer's arguments alone.
        seeds: Each chooses other rows, in another order.
        train_rows: Numbers of training rows; None is all. A seed's smaller choice lies within its larger one.
        references: Of "full" (fine-tuning, nothing frozen) and "lora" (PEFT, r = 16, alpha = 32, every linear layer).
        score: Further metrics of a trained model, from its trainer, such as ROUGE of its summaries. Names that end in
            _low and _high beside a name are its interval; one that ends in _rows is its value of each test row, always
            in the same order, by which depths are compared.
        tune_by: The metric that chooses learning rates. "eval_loss", so that the test rows choose nothing.
        quality: The metric that the report compares; None is `tune_by`. Less is better where "loss" is in its name.
        halving: For long grids: all pairs of depth and learning rate are tried on a small share of the epochs, the
            best 1 / `halving` of them on `halving` times as much, and so on; only the last ones are trained in full,
            each depth among them at its best rate. "Non-stochastic Best Arm Identification and Hyperparameter
            Optimization" (2016); here each rung starts from the pretrained weights. References are left out of it.
        plan: What holds at every depth beside the blocks; None is `FreezePlan()`.
        use_cache: Compute the frozen prefixes once, in one pass for all depths.
        cache_dir: As in `PrefixCache.build`.
        facts: More that must be the same when a sweep goes on, such as a digest of the test rows; JSON values.
        say: Takes messages, on the first process.
        progress: A bar over the steps of all runs, with the time left.

    Returns:
        The report of all runs in the folder.

    Raises:
        FreezeError: An empty grid, a depth beyond the model, more rows than there are, no eval_dataset, a metric that
            is not computed, a model that is not the same at each call. Before the first step.
        ResumeError: The folder holds a sweep of another model, other data or arguments.

    Example:
        >>> import copy
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
        >>> start = GPT2LMHeadModel(config)
        >>> rows = [{"input_ids": torch.tensor([n, 5, 6, 7]), "labels": torch.tensor([n, 5, 6, 7])} for n in range(4)]
        >>> folder = tempfile.mkdtemp()
        >>> args = TrainingArguments(folder, use_cpu=True, report_to="none", num_train_epochs=1)
        >>> def make_trainer(model):
        ...     return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        >>> report = sweep_depths(lambda: copy.deepcopy(start), make_trainer, [1, 2], output_dir=folder, seeds=[1],
        ...     references=(), say=lambda text: None, progress=False, cache_dir=folder)
        >>> [row.depth for row in report.rows()]
        ['pretrained', 1, 2]
    """
    check_callable("sweep_depths", "make_model", make_model, "the model, loaded anew at each call")
    check_callable("sweep_depths", "make_trainer", make_trainer, "a Trainer for the model that it is given")
    check_kind("sweep_depths", "depths", depths, (list, tuple, range), "a list of depths", "depths=[0, 6, 9, 11]")
    check_path("sweep_depths", "output_dir", output_dir)
    plan = None if plan is None else given_plan("sweep_depths", plan)
    if not depths and not references:
        raise FreezeError("A sweep over no depth was asked for; give some, such as depths=[0, 6, 9, 11].")
    if unknown := [name for name in references if name not in REFERENCES]:
        raise FreezeError(f"The reference {unknown[0]!r} was asked for; there are {', '.join(map(repr, REFERENCES))}.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise FreezeError(f"seeds={list(seeds)!r} was asked for; give one or more, each once.")
    if halving is not None and halving < 2:
        raise FreezeError(f"halving={halving} was asked for; it divides the grid by 2 or more.")
    sweep = _Sweep(
        make_model, make_trainer, Path(output_dir), score, tune_by, quality or tune_by, plan, use_cache, cache_dir,
        dict(facts or {}), say, progress,
    )  # fmt: skip
    arms = sweep.begin(list(dict.fromkeys(depths)), references, learning_rates, train_rows, seeds)
    with sweep.bar(arms, seeds):
        sweep.run(SweepRun(PRETRAINED, 0, 0.0, seeds[0]))
        for rows in sweep.sizes:
            chosen = sweep.halve(arms, rows, seeds[0], halving) if halving else arms
            best = {depth: sweep.tune(depth, rows, rates, seeds[0]) for depth, rates in chosen.items()}
            for seed in seeds[1:]:  # every depth before the next seed: what a stop leaves can be compared
                for run in best.values():
                    if run is not None:  # else every rate diverged
                        sweep.run(replace(run, seed=seed))
    return SweepReport.load(sweep.folder)


@dataclass
class _Sweep:
    """The runs of one sweep: those in its folder, and those that it makes."""

    make_model: MakeModel
    make_trainer: MakeTrainer
    folder: Path
    score: Score | None
    tune_by: str
    quality: str
    plan: FreezePlan | None
    use_cache: bool
    cache_dir: str | os.PathLike[str] | None
    more_facts: dict[str, Any]
    say: Callable[[str], None]
    progress: bool
    sizes: list[int] = field(default_factory=list)
    done: dict[SweepRun, SweepResult] = field(default_factory=dict)

    def begin(
        self,
        depths: list[int],
        references: Sequence[str],
        rates: Sequence[float] | Mapping[int | str, Sequence[float]] | None,
        sizes: Sequence[int] | None,
        seeds: Sequence[int],
    ) -> dict[int | str, list[float]]:
        """Checks what it can before the first run, reads what is done, builds the cache; returns the learning rates to
        try at each depth.
        """
        model = self.make_model()
        anatomy = read_anatomy(model)
        self.blocks = sum(len(stack) for stack in anatomy.stacks)
        self.digest = weights_digest(model)
        plans = {depth: plan_at_depth(anatomy, depth, self.plan) for depth in depths}
        cuts = {depth: plans[depth].resolve(anatomy).cuts for depth in depths}
        trainer = self.make_trainer(model)
        args = trainer.args
        self.chief = args.process_index == 0
        self.progress = self.progress and self.chief
        total = len(trainer.train_dataset)
        self.sizes = sorted(set(sizes or [total]))
        if short := [rows for rows in self.sizes if not 1 <= rows <= total]:
            raise FreezeError(
                f"train_rows={short[0]} was asked for; the trainer has {total} training rows. Use 1 to {total}."
            )
        if trainer.eval_dataset is None:
            raise FreezeError("A sweep compares validation; the trainer has no eval_dataset. Give it one.")
        self.step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.epochs, self.max_steps = float(args.num_train_epochs), int(args.max_steps)
        self._take_up(trainer)
        named: list[int | str] = [*references, *depths]
        arms = {depth: _rates_of(depth, rates, args.learning_rate) for depth in named}
        self.cached: set[int | str] = set()
        if self.use_cache and any(cuts.values()):
            self._build_for_all(trainer, plans, cuts, seeds)
        return arms

    def _take_up(self, trainer: Any) -> None:
        """Takes up the runs in the folder, refuses a folder of another sweep, and notes there what this one is of."""
        args = trainer.args
        facts = {
            "model": self.digest,
            "training data": data_digest(trainer.train_dataset),
            "validation data": data_digest(trainer.eval_dataset),
            "rows a step": self.step_rows,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "precision": _precision_of(args),
            "schedule": f"{args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}, decay {args.weight_decay:g}",
            "plan": (self.plan or FreezePlan()).to_dict(),
            **json.loads(json.dumps(self.more_facts)),
        }
        self.facts = facts
        path = self.folder / FACTS_FILE
        if path.exists():
            then = SweepReport.load(self.folder).facts
            for name in then | facts:
                if then.get(name) != facts.get(name):
                    raise ResumeError(
                        f"{self.folder} holds a sweep of another {name}: {then.get(name)}, and {facts.get(name)} was "
                        "asked for. Give those of the sweep, or another output_dir."
                    )
        for result in read_runs(self.folder / RUNS_FILE):
            self.done[result.run] = result
        if self.chief:
            self.folder.mkdir(parents=True, exist_ok=True)
            rewrite_runs(self.folder / RUNS_FILE, self.done.values())  # without what a kill left half written
            self._note(0.0)
            if self.done:
                self.say(f"{len(self.done)} runs are done already in {self.folder}.")

    def _note(self, build_seconds: float) -> None:
        values = {"blocks": self.blocks, "quality": self.quality, "tuned_by": self.tune_by, "facts": self.facts}
        path = self.folder / FACTS_FILE
        before = json.loads(path.read_text(encoding="utf-8")).get("build_seconds", 0.0) if path.exists() else 0.0
        write_json(path, values | {"build_seconds": max(before, build_seconds)})

    def _build_for_all(
        self, trainer: Any, plans: dict[int, FreezePlan], cuts: dict[int, Any], seeds: Sequence[int]
    ) -> None:
        """One pass over every row that a run will see, for every depth that can be cached: the deepest takes it."""
        from hf_freeze.prefix import PrefixCache

        # Of depths with the same cuts, the lowest.
        depth_of = {of_depth: depth for depth, of_depth in sorted(cuts.items(), reverse=True) if of_depth}
        deepest = max(depth_of.values())
        also = [plans[depth] for depth in depth_of.values() if depth != deepest]
        model = trainer.model
        freeze(model, plans[deepest])
        places: set[int] = set()
        for rows in self.sizes:
            for seed in seeds:
                places.update(choose_rows(len(trainer.train_dataset), rows, seed))
        trainer.train_dataset = select_rows(trainer.train_dataset, sorted(places))
        try:
            cache = PrefixCache.build(model, *loader_rows(trainer), also=also, **self._cache_options(trainer))
        except CannotCache as reason:
            self.say(f"note: without a prefix cache: {reason}")
            return
        self.say(str(cache.report))
        cache.close()
        self.cached = {depth for depth, of_depth in cuts.items() if of_depth}
        if self.chief and cache.report.computed_rows:
            self._note(cache.report.seconds)

    def _cache_options(self, trainer: Any) -> dict[str, Any]:
        return {"cache_dir": self.cache_dir, "precision": _precision_of(trainer.args), "progress": self.progress}

    def steps(self, run: SweepRun) -> int:
        """Optimizer steps of a run."""
        whole = self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * math.ceil(run.rows / self.step_rows))
        return max(1, math.ceil(whole * run.share))

    def bar(self, arms: dict[int | str, list[float]], seeds: Sequence[int]) -> Any:
        """A bar over the steps of the runs that are left: at most so many, where halving leaves some out."""
        left = 0
        for rows in self.sizes:
            for depth, rates in arms.items():
                runs = [SweepRun(depth, rows, rate, seeds[0]) for rate in rates]
                untried = sum(run not in self.done for run in runs)
                seeds_done = {r.seed for r in self.done if (r.depth, r.rows, r.share) == (depth, rows, 1.0)}
                seeds_left = len(set(seeds[1:]) - seeds_done)
                left += (untried + seeds_left) * self.steps(runs[0])
        self._bar = tqdm(total=left, unit="step", desc="sweep", disable=not self.progress)
        return self._bar

    def halve(
        self, arms: dict[int | str, list[float]], rows: int, seed: int, factor: int
    ) -> dict[int | str, list[float]]:
        """The depths and rates that are left after rungs of successive halving; references stay as they are."""
        pairs: list[tuple[int | str, float]] = [
            (d, r) for d, rates in arms.items() if isinstance(d, int) for r in rates
        ]
        rungs = max(0, math.ceil(math.log(max(1, len(pairs)), factor) - 1e-9) - 1)
        for rung in range(rungs, 0, -1):
            tried = [self.run(SweepRun(depth, rows, rate, seed, factor**-rung)) for depth, rate in pairs]
            sound = sorted(
                (r for r in tried if r.metrics), key=lambda r: sign_of(self.tune_by) * r.metrics[self.tune_by]
            )
            keep = max(1, math.ceil(len(pairs) / factor))
            pairs = [(result.run.depth, result.run.learning_rate) for result in sound[-keep:]]
        left: dict[int | str, list[float]] = {d: rates for d, rates in arms.items() if not isinstance(d, int)}
        for depth, rate in sorted(pairs, key=lambda pair: (str(pair[0]), pair[1])):
            left.setdefault(depth, []).append(rate)
        return left

    def tune(self, depth: int | str, rows: int, rates: Sequence[float], seed: int) -> SweepRun | None:
        """The run with the best learning rate; None where all diverged. Only a best one so far is scored."""
        best: SweepResult | None = None
        for rate in rates:
            best = _best([*([best] if best else []), self.run(SweepRun(depth, rows, rate, seed), best)], self.tune_by)
        return best.run if best else None

    def run(self, run: SweepRun, rival: SweepResult | None = None) -> SweepResult:
        """The result of a run: that of the folder, or one that is made now and noted there.

        Args:
            rival: Score the model only if its validation is better than this one's.
        """
        if run not in self.done:
            result = self._train(run, rival)
            if not self.done:
                check_metric(self.tune_by, result.metrics, "tune_by")
                check_metric(self.quality, result.metrics, "quality")
            self.done[run] = result
            if self.chief:
                append_run(self.folder / RUNS_FILE, result)
        return self.done[run]

    def _train(self, run: SweepRun, rival: SweepResult | None) -> SweepResult:
        set_seed(run.seed)
        model = self.make_model()
        if weights_digest(model) != self.digest:
            raise FreezeError(
                "make_model gave other weights than at its first call; a sweep starts every run from the same. "
                "Load the model in it (from_pretrained), and share none between calls."
            )
        report = None
        if isinstance(run.depth, int):
            report = freeze(model, plan_at_depth(read_anatomy(model), run.depth, self.plan))
        elif run.depth == LORA:
            model = with_lora(model)
        trainer = self.make_trainer(model)
        by_steps = self.max_steps > 0 or run.share < 1.0
        set_arguments(trainer, run, str(self.folder / "trainer"), self.epochs, self.steps(run) if by_steps else -1)
        if run.depth != PRETRAINED:
            places = choose_rows(len(trainer.train_dataset), run.rows, run.seed)
            trainer.train_dataset = select_rows(trainer.train_dataset, places)
        device = trainer.args.device
        cache, started = None, time.perf_counter()
        clock = StepClock(self._bar)
        try:
            if run.depth in self.cached:
                cache = self._open_cache(trainer)
            cache_seconds = time.perf_counter() - started
            was_reset = reset_peak(device)
            trainer.add_callback(clock)
            started = time.perf_counter()
            diverged = False
            if run.depth != PRETRAINED:
                set_seed(run.seed)  # checking rows for the cache may draw numbers
                try:
                    trainer.train()
                except TrainingDiverged as error:
                    diverged = True
                    self.say(f"note: {run_text(run, self.blocks)} diverged: {error}")
            train_seconds = time.perf_counter() - started
            peak = peak_bytes(device) if was_reset else 0
            if report is not None:
                verify_frozen(model, report)
            started = time.perf_counter()
            metrics, row_scores = ({}, {}) if diverged else self._measure(trainer, run, rival)
            score_seconds = time.perf_counter() - started
        finally:
            if cache is not None:
                cache.close()
        trained = [p for p in model.parameters() if p.requires_grad] if run.depth != PRETRAINED else []
        result = SweepResult(
            run=run,
            metrics=metrics,
            trained_parameters=sum(p.numel() for p in trained),
            steps=len(clock.seconds),
            train_seconds=train_seconds if trained else 0.0,
            step_seconds=clock.median(),
            cache_seconds=cache_seconds if cache is not None else 0.0,
            score_seconds=score_seconds,
            peak_bytes=peak if trained else 0,
            delta_bytes=sum(p.numel() * p.element_size() for p in trained),
            cached=cache is not None,
            device=device_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""),
            row_scores=row_scores,
        )
        if self.chief:
            text = ", ".join(f"{name} {metrics[name]:.4g}" for name in {self.tune_by, self.quality} & metrics.keys())
            text = f"{run_text(run, self.blocks)}: {text}, {result.train_seconds:,.1f} s of training"
            if result.cached:
                text += f", {result.cache_seconds:,.1f} s to check and open the cache"
            self.say(text) if not self.progress else tqdm.write(text)
        del trainer, model, trained, cache
        gc.collect()
        return result

    def _open_cache(self, trainer: Any) -> Any:
        from hf_freeze.prefix import PrefixCache

        options = self._cache_options(trainer) | {"progress": False}
        cache = PrefixCache.build(trainer.model, *loader_rows(trainer), **options)
        trainer.data_collator = cache.collator
        return cache

    def _measure(
        self, trainer: Any, run: SweepRun, rival: SweepResult | None
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The metrics, and of those that have them the values of each row."""
        metrics = {name: float(value) for name, value in trainer.evaluate().items() if isinstance(value, int | float)}
        metrics = {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_per_second"))}
        sign = sign_of(self.tune_by)
        behind = rival is not None and sign * metrics.get(self.tune_by, math.nan) <= sign * rival.metrics[self.tune_by]
        by_row: dict[str, list[float]] = {}
        if behind or run.share < 1.0:
            return metrics, by_row
        if self.quality == "eval_loss" and (losses := row_losses(trainer)):
            by_row["eval_loss"] = losses
        for name, value in (self.score(trainer) if self.score is not None else {}).items():
            if name.endswith(ROWS):
                by_row[name.removesuffix(ROWS)] = [float(f"{one:.6g}") for one in cast("Sequence[float]", value)]
            else:
                metrics[name] = float(cast("float", value))
        return metrics, by_row


# ------------------------------------------------------------------------------------------------------------- choices


def _precision_of(args: Any) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _rates_of(
    depth: int | str, rates: Sequence[float] | Mapping[int | str, Sequence[float]] | None, usual: float
) -> list[float]:
    found = rates.get(depth) if isinstance(rates, Mapping) else rates
    chosen = [float(rate) for rate in (found if found is not None else [usual])]
    if not chosen or not all(0.0 < rate < math.inf for rate in chosen):
        raise FreezeError(
            f"learning_rates={chosen} was asked for at {depth!r}; give one or more numbers above 0, such as 1e-4."
        )
    return list(dict.fromkeys(chosen))


def _best(results: Iterable[SweepResult], metric: str) -> SweepResult | None:
    """The best of the runs that did not diverge; None where all did."""
    sound = [result for result in results if result.metrics and math.isfinite(result.metrics[metric])]
    return max(sound, key=lambda result: sign_of(metric) * result.metrics[metric], default=None)
