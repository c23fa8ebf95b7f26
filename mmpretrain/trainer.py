"""The training loop: setup, steps with checkpoints and evaluations, and the final report."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from mmpretrain import checkpoint, distributed, launch, mixture, rng, run_folder
from mmpretrain.assembly import build_model, build_sources, check_division, layers, schedule_views, total_steps
from mmpretrain.batch import first_rows
from mmpretrain.config.build import blaming
from mmpretrain.config.recipe import Config
from mmpretrain.cost_probe import CostProbe
from mmpretrain.data.loader import Loader
from mmpretrain.data.schema import BadSampleBudgetError
from mmpretrain.data.source import Source
from mmpretrain.errors import MMPretrainError, ModelError
from mmpretrain.evaluation import DataInProgress, Evaluations, build_evaluators
from mmpretrain.interrupts import Interrupts
from mmpretrain.model import PretrainModel, freeze_unused
from mmpretrain.objectives.base import source_encodes
from mmpretrain.optim import build_optimizer, parameter_groups, set_learning_rate
from mmpretrain.towers.teacher import Teacher
from mmpretrain.tracking.grids import view_grid
from mmpretrain.tracking.jsonl import latest_results, read_jsonl
from mmpretrain.tracking.tracker import Tracker
from mmpretrain.types import Batch, ImageSpec


class TrainingError(MMPretrainError, RuntimeError):
    """Training cannot continue; the message states the cause and the remedy."""


@dataclass
class Run:
    """The parts of a run: `setup` makes them of a recipe, `fit` trains them."""

    config: Config  # resolved: steps, precision and threads are known
    accelerator: Accelerator
    model: PretrainModel
    wrapped: torch.nn.Module  # the model under DDP
    teacher: Teacher | None
    sources: dict[str, Source]
    loader: Loader
    batches: Iterator[Batch]
    named: list[tuple[str, torch.nn.Parameter]]  # the trained parameters
    phases: dict[float, set[str]]  # first moment of each phase of the run -> the parameters that get a gradient in it
    optimizer: torch.optim.Optimizer
    tracker: Tracker
    evaluations: Evaluations
    interrupts: Interrupts
    step: int
    skipped_steps: int
    transparent: dict[str, int]  # images with transparent pixels per source, before this process began
    late: bool  # flags are read one step later: an accelerator must not wait for the host
    stop: str | None = None  # why to stop before the first step


@dataclass
class Outcome:
    """A step whose flags may still be on the device."""

    step: int
    flags: torch.Tensor  # bool [3]: non-finite, stop requested, samples replaced; true on every rank when true on one
    reason: str | None  # why this rank stops
    replaced: list[dict[str, Any]]
    logs: dict[str, torch.Tensor]
    keys: list[str]  # of the first rows of the batch


def train(config: Config, data: DataInProgress | None = None) -> int:
    """Train a recipe to its end, or until interrupted. Return the exit status.

    Args:
        config: the recipe.
        data: of evaluators, where it is still being written.
    """
    with ExitStack() as closing:
        run = setup(config, closing, data or DataInProgress())
        stop = fit(run)
        if stop:
            run.tracker.message(f"stopped after step {run.step} because {stop}; saved. The same command resumes from there.")
        else:
            finish(run.config, run.tracker, run.sources)
        return 0


def setup(config: Config, closing: ExitStack, data: DataInProgress) -> Run:
    """Prepare a run up to its first step, resumed or started; `closing` receives what must be closed."""
    config, accelerator, precision = launch.start(config)
    device, processes = accelerator.device, accelerator.num_processes
    check_division(config, processes)
    evaluators = build_evaluators(config, data)
    distributed.on_main(lambda: closing.enter_context(run_folder.lock(config)))
    resumed_from, skipped = distributed.broadcast_object(distributed.on_main(lambda: run_folder.newest(config)))

    # Model and sources. Where the length is given in epochs, the sources determine the number of steps, and the model is built again.
    model, teacher = build_model(config, resumed=resumed_from is not None)
    sources = build_sources(config, model)
    if config.epochs is not None:
        config = replace(config, steps=total_steps(config, sources), epochs=None)
        model, teacher = build_model(config, resumed=resumed_from is not None)
    assert config.steps is not None
    steps = config.steps
    messages = distributed.on_main(lambda: run_folder.check_resume(config, resumed_from, skipped)) or []
    state = (
        checkpoint.load_json(resumed_from, "state")
        if resumed_from
        else {"step": 0, "positions": dict.fromkeys(sources, 0), "skipped_steps": 0}
    )
    step = state["step"]
    schedule_views(sources, model, steps, step, state["positions"])
    tracker = Tracker(config.run_dir, config.log_every, steps, accelerator.is_main_process, step if resumed_from else None)
    closing.callback(tracker.close)
    for message in filter(None, [*messages, precision.reason]):
        tracker.message(message)
    distributed.on_main(lambda: run_folder.write_recipe(config, launch.environment(accelerator, config, precision)))
    tracker.message(describe(config, accelerator, model, sources))
    for warning in mixture.of_run(config, sources) if step == 0 and accelerator.is_main_process else ():
        tracker.message(f"warning: {warning}")

    model.to(device)
    loader = Loader(
        sources, rank=distributed.rank(), world_size=processes, start=state["positions"],
        threads=config.loader_threads, processes=config.loader_processes, prefetch=config.prefetch, device=device,
    )  # fmt: skip
    closing.callback(loader.close)
    batches = iter(loader)
    interrupts = Interrupts()
    closing.callback(interrupts.close)

    # Parameters without a gradient are frozen before DDP and the optimizer see them. The first batch is trained on afterwards.
    phases: dict[float, set[str]] = {}
    if step < steps:
        moments = sorted({0.0, *(f for span in model.spans.values() for f in span if f < 1)})
        with listing_bad_samples(tracker, loader, step + 1):
            first = next(batches)
            few = first_rows(first, 4) if len(moments) == 1 else few_rows(sources, device)
        batches = chain([first], batches)
        with accelerator.autocast(), blaming("objectives", ModelError):
            unused, phases = freeze_unused(model, few, moments)
        if unused:
            tracker.message(f"no objective trains these parameters, which are frozen: {', '.join(unused)}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = {f"towers.{name}" for name in model.towers.no_weight_decay()}
    optimizer = build_optimizer(parameter_groups(named, config.optim, layers(model.towers), undecayed), config.optim)
    evaluations = Evaluations(config, evaluators, accelerator, model, teacher, tracker, data)
    stop = None
    if resumed_from:
        for line in checkpoint.restore_run(resumed_from, model, teacher, optimizer, config.resume == "force"):
            tracker.message(f"resume=force: {line}")
        stop = evaluations.run(evaluations.missing(step), step, interrupts)
    return Run(
        config=config, accelerator=accelerator, model=model, wrapped=accelerator.prepare_model(model), teacher=teacher, sources=sources,
        loader=loader, batches=batches, named=named, phases=phases, optimizer=optimizer, tracker=tracker, evaluations=evaluations,
        interrupts=interrupts, step=step, skipped_steps=state["skipped_steps"],
        transparent=state.get("transparent", {}), late=device.type != "cpu", stop=stop,
    )  # fmt: skip


def fit(run: Run) -> str | None:
    """Train to the last step. Return why it stopped earlier, else None; `run.step` is the number of steps made."""
    config, model, tracker, accelerator, loader = run.config, run.model, run.tracker, run.accelerator, run.loader
    assert config.steps is not None
    steps, device = config.steps, accelerator.device
    parameters, buffers = [p for _, p in run.named], model.changing_buffers()
    samples_per_step = sum(source.batch_size for source in config.sources.values())
    costs = CostProbe(model, config.cost_every, config.accumulate, lambda: accelerator.autocast(), device)
    pending: deque[Outcome] = deque()
    stop, save_due = run.stop, False

    def settle(keep: int) -> None:
        """Read the flags of all but the newest `keep` steps, and act on them."""
        nonlocal stop
        while len(pending) > keep:
            outcome = pending.popleft()
            bad, stopping, any_replaced = outcome.flags.tolist()
            stop = stop or ((outcome.reason or "another process stopped") if stopping else None)
            if any_replaced:
                tracker.skipped(outcome.step, distributed.gather_lists(outcome.replaced))
            run.skipped_steps = run.skipped_steps + 1 if bad else 0
            if bad:
                report_skipped(tracker, outcome, run.skipped_steps, config.max_skipped_steps)

    def save(state: dict[str, Any]) -> None:
        check_weights(run.named, state["step"], state["skipped_steps"])
        state = state | {"transparent": transparent_images(run)}
        checkpoint.save_run(config.run_dir, config.checkpoint.keep, model, run.teacher, run.optimizer, state)

    model.train()
    while run.step < steps and not stop:
        started = time.perf_counter()
        with listing_bad_samples(tracker, loader, run.step + 1, pending):
            batch = next(run.batches)
        waited = loader.wait_s
        progress = run.step / steps
        lr = set_learning_rate(run.optimizer, config.optim, run.step, steps)
        model.begin_step(progress)
        trained = run.phases[max(moment for moment in run.phases if moment <= progress + 1e-12)]
        model.idle = [p for name, p in run.named if name not in trained]
        # Dropout in towers of other libraries draws from the global generator, so that is seeded by the step too.
        torch.manual_seed(int(rng.combine(config.seed, run.step, distributed.rank())))
        kept = [buffer.clone() for buffer in buffers]

        # Gradients of the global batch.
        if not model.active:  # between the spans of all objectives
            loss, logs = torch.zeros((), device=device), {}
        elif config.accumulate == 1:
            loss, logs = run.wrapped(batch)
            accelerator.backward(loss)
        else:
            apart = run.wrapped.no_sync() if isinstance(run.wrapped, DistributedDataParallel) else nullcontext()
            with apart, accelerator.autocast():
                loss, logs = model.backward_in_chunks(batch, config.accumulate, accelerator.backward)
            distributed.average_gradients(parameters)
        model.drop_frozen(progress)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad_norm or float("inf"))
        run.step += 1

        # Update, unless that would corrupt the weights.
        reason = run.interrupts.reason  # read once: a signal may come at any moment
        replaced = loader.drain_skipped()
        non_finite = ~(torch.isfinite(norm) & torch.isfinite(loss.detach()))
        here = torch.tensor([reason is not None, bool(replaced)]).to(device, non_blocking=True)
        flags = distributed.any_rank_later(torch.cat([non_finite.reshape(1), here]))
        pending.append(Outcome(run.step, flags, reason, replaced, logs, first_keys(batch)))
        if run.late:
            settle(keep=1)
            update(run, run.step / steps, flags[0], buffers, kept)
            bad = False
        else:
            settle(keep=0)
            bad = run.skipped_steps > 0
            update(run, run.step / steps, bad, buffers, kept)
        run.optimizer.zero_grad(set_to_none=True)

        # Log, save, evaluate.
        scalars = distributed.average({"loss": loss, "grad_norm": norm} | logs) if bad or tracker.due(run.step) else {}
        tracker.log(run.step, run.step * samples_per_step, scalars, waited, time.perf_counter() - started, lr, always=bad)
        if costs.due(run.step) and model.active:
            tracker.extra(run.step, run.step * samples_per_step, costs.measure(run.step, batch))
        if run.step == 1 or run.step == steps or (config.images_every and run.step % config.images_every == 0):
            show(tracker, model, accelerator, batch, run.step)
        # While updates are skipped the weights do not change: the checkpoint waits for the next update.
        save_due = save_due or run.step % config.checkpoint.every == 0
        evaluated = run.evaluations.due(run.step)
        if save_due or run.step == steps or stop is not None or evaluated:
            settle(keep=0)
        state = {
            "step": run.step, "samples_seen": run.step * samples_per_step, "positions": loader.position(),
            "skipped_steps": run.skipped_steps,
        }  # fmt: skip
        saved = (save_due and not run.skipped_steps) or run.step == steps or stop is not None
        if saved:
            save(state)
            save_due = False
        if not stop:
            stop = run.evaluations.run(evaluated, run.step, run.interrupts)
            if stop and not saved:
                save(state)
    return stop


@torch.no_grad()
def update(run: Run, progress: float, bad: bool | torch.Tensor, buffers: list[torch.Tensor], kept: list[torch.Tensor]) -> None:
    """Make one update of optimizer, objectives and teacher; for a `bad` step restore the buffers instead.

    Args:
        run: changed in place.
        progress: after the step, in [0, 1].
        bad: known (bool), or on the device (bool []): the update is then made or skipped without waiting for the host.
        buffers: those that the forward pass may have changed.
        kept: their values before.
    """
    on_device = isinstance(bad, torch.Tensor)
    if on_device or not bad:
        if on_device:
            run.optimizer.found_inf, run.optimizer.grad_scale = bad.float(), None  # type: ignore[attr-defined]  # a fused step skips itself
        run.optimizer.step()
        run.model.finish_step(progress)  # it only clips parameters, which has no effect on unchanged ones
        if run.teacher is not None:
            run.teacher.update(progress, skip=bad if on_device else None)
    if on_device or bad:
        for buffer, before in zip(buffers, kept):
            buffer.copy_(torch.where(bad, before, buffer) if on_device else before)


def transparent_images(run: Run) -> dict[str, int]:
    """How many images with transparent pixels the whole run has seen, per source and over all ranks."""
    here = distributed.gather_lists(list(run.loader.transparent().items()))
    return {name: run.transparent.get(name, 0) + sum(count for source, count in here if source == name) for name in run.sources}


def first_keys(batch: Batch, count: int = 8) -> list[str]:
    """Return the first keys of a batch, over all sources."""
    return [key for rows in batch.values() for key in rows.keys[:count]][:count]


def few_rows(sources: dict[str, Source], device: torch.device, count: int = 4) -> Batch:
    """Return the first rows of every source, with the views of all phases of the run, for the dry run."""
    batch = {}
    for name, source in sources.items():
        schedule, source.schedule = source.schedule, {}
        try:
            batch[name] = source.make(range(min(count, source.batch_size))).render().moved(lambda t: t.to(device)).to_rows()
        finally:
            source.schedule = schedule
    return batch


@contextmanager
def listing_bad_samples(tracker: Tracker, loader: Loader, step: int, pending: Iterable[Outcome] = ()) -> Iterator[None]:
    """Where too many samples are bad for the run to go on, write all of this rank's that were read to skipped.jsonl."""
    try:
        yield
    except BadSampleBudgetError as error:
        for outcome in pending:
            tracker.skipped(outcome.step, outcome.replaced, ending=True)
        tracker.skipped(step, [*loader.drain_skipped(), *error.records], ending=True)
        raise


def report_skipped(tracker: Tracker, outcome: Outcome, count: int, max_skipped: int) -> None:
    """Report an update that was skipped for a non-finite loss or gradient.

    Raises:
        TrainingError: more than `max_skipped` were skipped in a row.
    """
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in outcome.logs.items() if name.endswith("/loss"))
    tracker.message(f"step {outcome.step}: loss or gradient is not finite ({values}); update skipped ({count} in a row)")
    if count > max_skipped:
        raise TrainingError(
            f"{count} updates in a row had a loss or gradient that is not finite ({values}). The last batch began with "
            f"{', '.join(outcome.keys)}. None of these updates was made, so the run's checkpoints hold finite weights. Look at these "
            "samples, or lower optim.lr or lengthen optim.warmup_steps and continue with resume=force."
        )


def check_weights(named: list[tuple[str, torch.nn.Parameter]], step: int, skipped_steps: int) -> None:
    """Check before a save that the weights are finite and were updated: a finite gradient can still corrupt them.

    Raises:
        TrainingError: a parameter is not finite, or no update was made.
    """
    if corrupt := [name for name, p in named if not bool(torch.isfinite(p).all())]:
        raise TrainingError(
            f"after step {step} {len(corrupt)} of {len(named)} parameters are not finite ({', '.join(corrupt[:4])}); nothing was saved. "
            "Lower optim.lr and continue from the last checkpoint with resume=force, or begin in a new run_dir."
        )
    if skipped_steps == step:
        raise TrainingError(
            f"none of the {step} updates was made: each had a loss or gradient that is not finite (see metrics.jsonl). Nothing was saved. "
            "Check the data's normalisation (image.mean, image.std) and the objectives' options."
        )


@torch.no_grad()
def show(tracker: Tracker, model: PretrainModel, accelerator: Accelerator, batch: Batch, step: int) -> None:
    """Write pictures of the views and of what objectives make of them (reconstructions)."""
    few = first_rows(batch, 8)
    for name, rows in few.items():
        specs = sorted((s for s in rows.views if s.modality == "image"), key=repr)
        if specs:
            first = cast(ImageSpec, specs[0])
            tracker.images(step, f"views/{name}", view_grid([rows.views[s].data for s in specs], first.mean, first.std))
    model.eval()
    with accelerator.autocast(), model.preserved():
        encoded = model.encode(few, model.plan)
        for name in model.active:
            objective = model.objectives[name]
            for title, images in objective.pictures(**model.arguments(name, encoded)).items():
                spec = cast(ImageSpec, next(e.view for e in source_encodes(objective.needs)))
                tracker.images(step, f"{title}/{name}", view_grid(images, spec.mean, spec.std))
    model.train()


def describe(config: Config, accelerator: Accelerator, model: PretrainModel, sources: dict[str, Source]) -> str:
    """Return the lines that describe a run at its start."""
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in (("towers", model.towers), ("heads", model.objectives))
    }
    lines = [
        f"{config.run_dir}: {config.steps} steps of {', '.join(config.objectives)}; "
        f"towers {millions['towers']:.1f}M, heads {millions['heads']:.1f}M parameters",
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {config.threads} threads, "
        f"{config.loader_threads} for data, {config.precision}",
    ]
    for name, source in sources.items():
        rows = config.sources[name].batch_size
        epochs = (config.steps or 0) * rows / max(1, source.num_samples)
        lines.append(f"source {name}: {source.num_samples} samples in {num_shards(source)} shards, {rows} rows a step, {epochs:.2f} epochs")
    return "\n".join(lines)


def num_shards(source: Source) -> int:
    """Count the shards of a source."""
    return sum(len(shards.names) for shards in source.shard_sets)


def finish(config: Config, tracker: Tracker, sources: dict[str, Source]) -> None:
    """Print the table of results and write the report."""
    if not tracker.is_main:
        return
    from mmpretrain.report.page import write_report  # imports matplotlib: a second that the first step does not wait for

    folder = Path(config.run_dir)
    rows = latest_results(read_jsonl(folder / "results.jsonl"))
    if rows:
        tracker.table(
            [{"evaluation": r["name"], "n": r["n"], "metrics": r["metrics"] | r.get("baselines", {})} for r in rows],
            f"Results after step {config.steps}",
        )
    skipped = Counter(record["source"] for record in read_jsonl(folder / "skipped.jsonl"))
    data = {}
    for name, source in sources.items():
        rows_per_step = config.sources[name].batch_size
        data[name] = {
            "shards": num_shards(source),
            "samples": source.num_samples,
            "rows_per_step": rows_per_step,
            "epochs_seen": round((config.steps or 0) * rows_per_step / max(1, source.num_samples), 2),
            "skipped": skipped[name],
        }
    tracker.message(f"report: {write_report(folder, {'data': data})}")
