"""The training loop, read top to bottom."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmpretrain import checkpoint, distributed, launch, rng, run_folder, snapshot
from mmpretrain.assembly import build_model, build_sources, check_division, layers, total_steps
from mmpretrain.batch import first_rows
from mmpretrain.config.recipe import Config
from mmpretrain.cost_probe import CostProbe
from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source
from mmpretrain.evaluation import Evaluations, build_evaluators
from mmpretrain.interrupts import Interrupts
from mmpretrain.model import PretrainModel, freeze_unused, running_statistics
from mmpretrain.objectives.base import source_encodes
from mmpretrain.optim import build_optimizer, parameter_groups, set_learning_rate
from mmpretrain.tracking.grids import view_grid
from mmpretrain.tracking.jsonl import latest_results, read_jsonl
from mmpretrain.tracking.tracker import Tracker
from mmpretrain.types import Batch


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def train(config: Config) -> int:
    """Run a recipe to its end, or until interrupted. Returns the exit status."""
    with ExitStack() as closing:
        return _train(config, closing)


def _train(config: Config, closing: ExitStack) -> int:
    accelerator, precision = launch.start(config)
    device, processes = accelerator.device, accelerator.num_processes
    check_division(config, processes)
    evaluators = build_evaluators(config)
    distributed.on_main(lambda: closing.enter_context(run_folder.lock(config)))
    found, passed_over = distributed.broadcast_object(distributed.on_main(lambda: run_folder.newest(config)))

    # What is trained, and on what.
    model, teacher = build_model(config, resumed=found is not None)
    sources = build_sources(config, model)
    config.steps, config.epochs = total_steps(config, sources), None
    steps = config.steps
    messages = distributed.on_main(lambda: run_folder.claim(config, found, passed_over)) or []
    state = checkpoint.load_json(found, "state") if found else {"step": 0, "positions": dict.fromkeys(sources, 0), "skipped_steps": 0}
    step, skipped_steps = state["step"], state["skipped_steps"]
    tracker = Tracker(config.run_dir, config.log_every, steps, accelerator.is_main_process, step if found else None)
    closing.callback(tracker.close)
    for message in filter(None, [*messages, precision.reason]):
        tracker.message(message)
    distributed.on_main(lambda: run_folder.write_recipe(config, launch.environment(accelerator, config, precision)))
    tracker.message(describe(config, accelerator, model, sources))

    model.to(device)
    loader = Loader(
        sources, rank=distributed.rank(), world_size=processes, start=state["positions"],
        threads=config.loader_threads, processes=config.loader_processes, prefetch=config.prefetch, device=device,
    )  # fmt: skip
    closing.callback(loader.close)
    batches = iter(loader)
    interrupts = Interrupts()
    closing.callback(interrupts.close)

    # Everything that gets no gradient is frozen before DDP and the optimizer look at it; the first batch is used again below.
    batch: Batch | None = next(batches) if step < steps else None
    if batch is not None:
        with accelerator.autocast():
            unused = freeze_unused(model, first_rows(batch, 4))
        if unused:
            tracker.message(f"no objective trains these, they stay as they are: {', '.join(unused)}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(parameter_groups(named, config.optim, layers(model.towers)), config.optim)
    evaluations = Evaluations(config, evaluators, accelerator, model, teacher, tracker)
    stop: str | None = None
    if found:
        for line in snapshot.restore(found, model, teacher, optimizer, config.resume == "force"):
            tracker.message(f"resume=force: {line}")
        stop = evaluations.run(evaluations.missing(step), step, interrupts)
    wrapped = accelerator.prepare_model(model)
    parameters, statistics = [p for _, p in named], running_statistics(model)
    samples_per_step = sum(source.batch_size for source in config.sources.values())
    costs = CostProbe(model, config.cost_every, config.accumulate, accelerator.autocast, device)
    save_due = False

    def save(state: dict[str, Any]) -> None:
        check_weights(named, state["step"], state["skipped_steps"])
        snapshot.save(config, model, teacher, optimizer, state)

    model.train()
    while step < steps and not stop:
        started = time.perf_counter()
        batch = batch if batch is not None else next(batches)
        waited = loader.wait_s
        lr = set_learning_rate(optimizer, config.optim, step, steps)
        for objective in model.objectives.values():
            objective.before_step(step / steps)
        # Dropout in towers of other libraries draws from the global generator: a function of the step, as everything else is.
        torch.manual_seed(int(rng.combine(config.seed, step, distributed.rank())))
        kept = [buffer.clone() for buffer in statistics]

        # Gradients of the global batch.
        if config.accumulate == 1:
            loss, logs = wrapped(batch)
            accelerator.backward(loss)
        else:
            with wrapped.no_sync() if processes > 1 else nullcontext(), accelerator.autocast():
                loss, logs = model.backward_in_chunks(batch, config.accumulate, accelerator.backward)
            distributed.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad_norm or float("inf"))
        step += 1

        # Update, unless that would spoil the weights.
        reason = interrupts.reason  # read once: a signal may come at any moment
        replaced = loader.drain_skipped()
        spoilt = not bool(torch.isfinite(norm) & torch.isfinite(loss.detach()))
        bad, stopping, any_replaced = distributed.any_rank([spoilt, reason is not None, bool(replaced)], device)
        stop = (reason or "another process") if stopping else None
        if bad:
            skipped_steps += 1
            for buffer, before in zip(statistics, kept):
                buffer.copy_(before)
            refuse(tracker, batch, logs, step, skipped_steps, config.max_skipped_steps)
        else:
            skipped_steps = 0
            optimizer.step()
            for objective in model.objectives.values():
                objective.after_step(step / steps)
            if teacher is not None:
                teacher.update(step / steps)
        optimizer.zero_grad(set_to_none=True)

        # Say it, save it, evaluate it.
        if any_replaced:
            tracker.skipped(step, distributed.gather_lists(replaced))
        scalars = distributed.average({"loss": loss, "grad_norm": norm} | logs) if bad or tracker.due(step) else {}
        tracker.log(step, step * samples_per_step, scalars, waited, time.perf_counter() - started, lr, always=bad)
        if costs.due(step):
            tracker.extra(step, step * samples_per_step, costs.measure(step, batch))
        if step == 1 or step == steps or (config.images_every and step % config.images_every == 0):
            show(tracker, model, accelerator, batch, step)
        state = {"step": step, "samples_seen": step * samples_per_step, "positions": loader.position(), "skipped_steps": skipped_steps}
        # While updates are skipped the weights stand still: the next good ones are saved instead.
        save_due = save_due or step % config.checkpoint.every == 0
        saved = (save_due and not skipped_steps) or step == steps or stop is not None
        if saved:
            save(state)
            save_due = False
        if not stop:
            stop = evaluations.run(evaluations.due(step), step, interrupts)
            if stop and not saved:
                save(state)
        batch = None
    if stop:
        tracker.message(f"stopped by {stop} after step {step}; saved. The same command goes on from there.")
        return 0
    finish(config, tracker, sources)
    return 0


def refuse(tracker: Tracker, batch: Batch, logs: dict[str, torch.Tensor], step: int, count: int, most: int) -> None:
    """A loss or gradient that is not finite: skip the update, but not for ever."""
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in logs.items() if name.endswith("/loss"))
    tracker.message(f"step {step}: loss or gradient is not finite ({values}); update skipped ({count} in a row)")
    if count > most:
        keys = [key for rows in batch.values() for key in rows.keys]
        raise TrainingError(
            f"{count} updates in a row had a loss or gradient that is not finite ({values}). The last batch began with "
            f"{', '.join(keys[:8])}. None of these updates was made, so the run's checkpoints hold finite weights. Look at these samples, "
            "or lower optim.lr or lengthen optim.warmup_steps and go on with resume=force."
        )


def check_weights(named: list[tuple[str, torch.nn.Parameter]], step: int, skipped_steps: int) -> None:
    """Before a save: finite weights, and at least one update that was made. A finite gradient can still be stepped on too far."""
    if spoilt := [name for name, p in named if not bool(torch.isfinite(p).all())]:
        raise TrainingError(
            f"after step {step} {len(spoilt)} of {len(named)} parameters are not finite ({', '.join(spoilt[:4])}); nothing was saved. "
            "Lower optim.lr and go on from the last checkpoint with resume=force, or begin in a new run_dir."
        )
    if skipped_steps == step:
        raise TrainingError(
            f"none of the {step} updates was made: each had a loss or gradient that is not finite (see metrics.jsonl). Nothing was saved. "
            "Check the data's normalisation (image.mean, image.std) and the objectives' options."
        )


@torch.no_grad()
def show(tracker: Tracker, model: PretrainModel, accelerator: Accelerator, batch: Batch, step: int) -> None:
    """Pictures of what goes in (the views) and what objectives make of it (reconstructions)."""
    few = first_rows(batch, 8)
    for name, rows in few.items():
        specs = sorted((s for s in rows.views if s.modality == "image"), key=repr)
        if specs:
            tracker.images(step, f"views/{name}", view_grid([rows.views[s].data for s in specs], specs[0].mean, specs[0].std))
    model.eval()
    with accelerator.autocast():
        encoded = model.encode(few, model.plan)
        for name, objective in model.objectives.items():
            for title, images in objective.pictures(**model.arguments(objective, encoded)).items():
                spec = next(e.view for e in source_encodes(objective.needs))
                tracker.images(step, f"{title}/{name}", view_grid(images, spec.mean, spec.std))
    model.train()


def describe(config: Config, accelerator: Accelerator, model: PretrainModel, sources: dict[str, Source]) -> str:
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
    return sum(len(shards.names) for shards in source.shard_sets)


def finish(config: Config, tracker: Tracker, sources: dict[str, Source]) -> None:
    """The results table and the report."""
    if not tracker.is_main:
        return
    from mmpretrain.report.page import write_report  # draws with matplotlib: a second that the first step need not wait for

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
