"""The training loop, read top to bottom."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmpretrain import checkpoint, distributed, launch, run
from mmpretrain.assembly import build_model, build_sources, check_division, first_rows, total_steps
from mmpretrain.config import Config, EvaluationConfig
from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source
from mmpretrain.evaluators import EVALUATORS
from mmpretrain.evaluators.models import TowerModel
from mmpretrain.interrupts import Interrupts
from mmpretrain.model import PretrainModel, freeze_unused
from mmpretrain.optim import build_optimizer, parameter_groups, set_learning_rate
from mmpretrain.report import write_report
from mmpretrain.report.extras import save_result_extras
from mmpretrain.towers.teacher import Teacher
from mmpretrain.tracking import Tracker, latest_results, read_jsonl, view_grid
from mmpretrain.types import Batch


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def train(config: Config) -> int:
    """Run a recipe to its end, or until interrupted. Returns the exit status."""
    accelerator = launch.start(config)
    device, processes = accelerator.device, accelerator.num_processes
    check_division(config, processes)

    # What is trained, and on what.
    model, teacher = build_model(config)
    sources = build_sources(config, model)
    config.steps, config.epochs = total_steps(config, sources), None
    steps = config.steps
    locked = run.lock(config) if accelerator.is_main_process else None
    found, messages = run.claim(config)
    state = checkpoint.load_json(found, "state") if found else {"step": 0, "positions": {name: 0 for name in sources}, "skipped_steps": 0}
    step = state["step"]
    tracker = Tracker(config.run_dir, config.log_every, steps, accelerator.is_main_process, step if found else None)
    for message in messages:
        tracker.message(message)
    if accelerator.is_main_process:
        run.write_recipe(config, launch.environment(accelerator, config))
    tracker.message(describe(config, accelerator, model, sources))

    model.to(device)
    loader = Loader(
        sources, rank=distributed.rank(), world_size=processes, start=state["positions"],
        threads=config.loader_threads, prefetch=config.prefetch, device=device,
    )  # fmt: skip
    batches = iter(loader)
    interrupts = Interrupts()
    evaluations = Evaluations(config, accelerator, model, teacher, tracker)
    try:
        # Everything that gets no gradient is frozen before DDP and the optimizer look at it; the first batch is used again below.
        batch: Batch | None = next(batches) if step < steps else None
        if batch is not None:
            with accelerator.autocast():
                unused = freeze_unused(model, first_rows(batch, 4))
            if unused:
                tracker.message(f"no objective trains these, they stay as they are: {', '.join(unused)}")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        layers = {f"towers.{name}": depth for name, depth in model.towers.layer_ids().items()}
        optimizer = build_optimizer(parameter_groups(named, config.optim, layers), config.optim)
        if found:
            restore(found, model, teacher, optimizer)
            for name in evaluations.missing(step):
                evaluations.run(name, step)
        wrapped = accelerator.prepare_model(model)
        parameters = [p for _, p in named]
        samples_per_step = sum(source.batch_size for source in config.sources.values())
        skipped_steps = state["skipped_steps"]
        model.train()

        while step < steps:
            started = time.perf_counter()
            batch = batch if batch is not None else next(batches)
            waited = loader.wait_s
            progress = step / steps
            lr = set_learning_rate(optimizer, config.optim, step, steps)
            for objective in model.objectives.values():
                objective.before_step(progress)

            # Gradients of the global batch.
            if config.accumulate == 1:
                loss, logs = wrapped(batch)
                accelerator.backward(loss)
            else:
                with wrapped.no_sync() if processes > 1 else nullcontext(), accelerator.autocast():
                    loss, logs = model.backward_in_chunks(batch, config.accumulate, accelerator.backward)
                distributed.average_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad_norm or float("inf"))

            # Update, unless that would spoil the weights.
            bad = distributed.any_rank(not bool(torch.isfinite(norm) & torch.isfinite(loss.detach())), device)
            if bad:
                skipped_steps += 1
                refuse(tracker, batch, logs, step + 1, skipped_steps, config.max_skipped_steps)
            else:
                skipped_steps = 0
                optimizer.step()
                for objective in model.objectives.values():
                    objective.after_step((step + 1) / steps)
                if teacher is not None:
                    teacher.update((step + 1) / steps)
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # Say it, save it, evaluate it.
            tracker.skipped(step, distributed.gather_lists(loader.drain_skipped()))
            scalars = distributed.average({"loss": loss, "grad_norm": norm} | logs) if bad or tracker.due(step) else {}
            tracker.log(step, step * samples_per_step, scalars, waited, time.perf_counter() - started, lr, always=bad)
            if step == 1 or step == steps or (config.images_every and step % config.images_every == 0):
                show(tracker, model, accelerator, batch, step)
            reason = interrupts.reason if distributed.any_rank(interrupts.reason is not None, device) else None
            stop = distributed.any_rank(reason is not None, device)
            if step % config.checkpoint.every == 0 or step == steps or stop:
                state = {
                    "step": step,
                    "samples_seen": step * samples_per_step,
                    "positions": loader.position(),
                    "skipped_steps": skipped_steps,
                }
                save(config, accelerator, model, teacher, optimizer, state)
            if stop:
                tracker.message(f"stopped by {reason or 'another process'} after step {step}; saved. The same command goes on from there.")
                return 0
            for name in evaluations.due(step):
                evaluations.run(name, step)
            batch = None
        finish(config, tracker, sources)
        return 0
    finally:
        loader.close()
        tracker.close()
        interrupts.close()
        if locked is not None:
            locked.close()


class Evaluations:
    """The recipe's evaluators on the live towers."""

    def __init__(self, config: Config, accelerator: Accelerator, model: PretrainModel, teacher: Teacher | None, tracker: Tracker) -> None:
        self.config, self.accelerator, self.model, self.teacher, self.tracker = config, accelerator, model, teacher, tracker

    def due(self, step: int) -> list[str]:
        def now(e: EvaluationConfig) -> bool:
            return step == self.config.steps or (e.every > 0 and step % e.every == 0)

        return [name for name, e in self.config.evaluators.items() if now(e)]

    def missing(self, step: int) -> list[str]:
        """Due at the checkpoint that was loaded, but not in its results: the run died between saving and evaluating."""
        lines = read_jsonl(Path(self.config.run_dir) / "results.jsonl")
        done = distributed.broadcast_object([line["name"] for line in lines if line["step"] == step])
        return [name for name in self.due(step) if name not in done]

    def run(self, name: str, step: int) -> None:
        evaluation: EvaluationConfig = self.config.evaluators[name]
        towers = self.teacher.module if evaluation.weights == "teacher" and self.teacher is not None else self.model.towers
        with torch.random.fork_rng():  # an evaluator that draws does not move this run
            training = towers.training
            towers.eval()
            joint = any("features" in encode.outputs for encode in self.model.plan)
            model = TowerModel(towers, self.accelerator.device, self.config.precision, joint=joint)
            result = EVALUATORS[evaluation.kind](evaluation.options)(model, self.accelerator)
            towers.train(training)
        line = {
            "evaluator": evaluation.kind, "name": name, "dataset": result.dataset, "model": model.fingerprint,
            "n": result.n, "seed": self.config.seed, "metrics": result.metrics,
        }  # fmt: skip
        if evaluation.baselines:
            line["baselines"] = evaluation.baselines
        if self.accelerator.is_main_process:
            save_result_extras(Path(self.config.run_dir), name, step, result)
        self.tracker.result(step, line)


def refuse(tracker: Tracker, batch: Batch, logs: dict[str, torch.Tensor], step: int, count: int, most: int) -> None:
    """A loss or gradient that is not finite: skip the update, but not for ever."""
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in logs.items() if name.endswith("/loss"))
    tracker.message(f"step {step}: loss or gradient is not finite ({values}); update skipped ({count} in a row)")
    if count > most:
        keys = [key for rows in batch.values() for key in rows.keys]
        raise TrainingError(
            f"{count} updates in a row had a loss or gradient that is not finite ({values}). The last batch began with "
            f"{', '.join(keys[:8])}. Nothing was saved since; lower optim.lr, lengthen optim.warmup_steps, or look at these samples."
        )


def save(
    config: Config,
    accelerator: Accelerator,
    model: PretrainModel,
    teacher: Teacher | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """One checkpoint, independent of the number of processes; the main one writes it."""
    if accelerator.is_main_process:
        towers = model.towers
        weights = towers.state_dict()
        for objective in model.objectives.values():
            for name in ("logit_scale", "logit_bias"):
                if isinstance(getattr(objective, name, None), torch.nn.Parameter):
                    weights.setdefault(name, getattr(objective, name).detach().reshape(()))
        tensors = {"model": weights, "objectives": model.objectives.state_dict()}
        if teacher is not None:
            tensors["teacher"] = teacher.module.state_dict()
        p = towers.preprocess
        preprocess = {"mean": p.mean, "std": p.std, "interpolation": p.interpolation, "resize_mode": p.resize_mode}
        documents = {"state": state, "open_clip_config": {"model_cfg": towers.model_cfg, "preprocess_cfg": preprocess}}
        root = Path(config.run_dir) / "checkpoints"
        checkpoint.save(root, state["step"], tensors, checkpoint.optimizer_by_name(optimizer), documents, config.checkpoint.keep)
    distributed.barrier()


def restore(folder: Path, model: PretrainModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> None:
    """Put a verified checkpoint back."""
    weights = checkpoint.load_tensors(folder, "model")
    model.towers.load_state_dict({k: v for k, v in weights.items() if k not in ("logit_scale", "logit_bias")})
    model.objectives.load_state_dict(checkpoint.load_tensors(folder, "objectives"))
    if teacher is not None:
        teacher.module.load_state_dict(checkpoint.load_tensors(folder, "teacher"))
    checkpoint.restore_optimizer(optimizer, checkpoint.load_optimizer(folder))


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
                spec = next(e.view for e in objective.needs.values())
                tracker.images(step, f"{title}/{name}", view_grid(images, spec.mean, spec.std))
    model.train()


def describe(config: Config, accelerator: Accelerator, model: PretrainModel, sources: dict[str, Any]) -> str:
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in (("towers", model.towers), ("heads", model.objectives))
    }
    lines = [
        f"{config.run_dir}: {config.steps} steps of {', '.join(config.objectives)}; "
        f"towers {millions['towers']:.1f}M, heads {millions['heads']:.1f}M parameters",
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {config.threads} threads, {config.precision}",
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
