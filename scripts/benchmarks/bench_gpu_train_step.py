"""CLIP training steps on one GPU: ViT-B/16 at 224 px in bf16, batch as large as fits, samples/s and MFU. Skips without a GPU.

    python scripts/benchmarks/bench_gpu_train_step.py [--quick] [--rounds 3] [--model ViT-B-16] [--peak-tflops 989] [--out FILE]

The peer's step is open_clip_train's own `train_one_epoch`, with open_clip's model and the optimizer its trainer builds; ours is that of our
trainer: model, loss, fused AdamW, gradient norm, the check that it is finite. Both start from the same weights and must agree on the first
loss; both are compiled. Batches lie on the host, decoded: the loader has a benchmark of its own. Each side doubles its batch for as long as
it fits. MFU counts matrix products of the tokens that were computed (6 x parameters x tokens, and attention) against the dense bf16 peak.
"""

import time
from types import SimpleNamespace

from common import Row, Spread, alternate, arguments, ratio, record
from trainers import model_config

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, SXM; NVIDIA's data sheets


def flops_per_pair(config: dict, text_tokens: int) -> float:
    """Forward and backward of both towers: 6 for each weight of a block and each token, 12 x width x tokens^2 for attention's products."""

    def tower(width: int, layers: int, tokens: int) -> float:
        return layers * (6 * 12 * width**2 * tokens + 12 * width * tokens**2)

    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    stem = 6 * 3 * vision["patch_size"] ** 2 * vision["width"] * patches
    return stem + tower(vision["width"], vision["layers"], patches + 1) + tower(text["width"], text["layers"], text_tokens)


def main() -> None:
    import torch

    parsed = arguments(__doc__, rounds=3, model="ViT-B-16", peak_tflops=0.0)
    if not torch.cuda.is_available():
        print("skipped: no GPU that torch can use")
        return
    import open_clip
    from open_clip_train.train import train_one_epoch

    from data_prep.demo.records import chunk
    from mmpretrain.assembly import build_model, layers
    from mmpretrain.config.recipe import assemble
    from mmpretrain.data.text import get_tokenizer, trim
    from mmpretrain.optim import build_optimizer, parameter_groups
    from mmpretrain.types import Rows, View

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    config = model_config(parsed.model)
    device, size = torch.device("cuda"), config["vision_cfg"]["image_size"]
    captions = [members["txt"].decode() for _, members in chunk((0, "pairs", 0, 256))]
    tokenizer = get_tokenizer()
    padded = tokenizer.encode(captions, config["text_cfg"]["context_length"])
    ids = trim(padded, tokenizer.eot)

    theirs = open_clip.model.CLIP(**config, output_dict=True).to(device)
    recipe = {"steps": 1, "model": parsed.model, "sources": {"pairs": {"shards": "none"}}, "objectives": {"clip": {"source": "pairs"}}}
    ours, _ = build_model(assemble(recipe))
    state = open_clip.model.convert_to_custom_text_state_dict(theirs.state_dict())
    ours.towers.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] in ("visual", "text") and not k.endswith("attn_mask")})
    ours.to(device)
    our_optim = assemble(recipe).optim
    named = list(ours.named_parameters())
    optimizer = build_optimizer(parameter_groups(named, our_optim, layers(ours.towers)), our_optim)
    gains = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    known = {id(p) for p in gains}
    rest = [p for p in theirs.parameters() if id(p) not in known]
    peer_optimizer = torch.optim.AdamW(
        [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}], 5e-4, (0.9, 0.98), 1e-6
    )
    peer_loss = open_clip.loss.ClipLoss()
    pixels = torch.randint(0, 255, (256, 3, size, size)).float() / 128 - 1

    def host(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        times = -(-batch // 256)
        return tuple(t.repeat(times, *[1] * (t.ndim - 1))[:batch].pin_memory() for t in (pixels, padded, ids))  # type: ignore[return-value]

    def with_autocast(batch: Rows) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return ours({"pairs": batch})[0]

    def our_steps(batch: int, steps: int) -> float:
        images, _, words = host(batch)
        for _ in range(steps):
            to = {s: View((images if s.modality == "image" else words).to(device, non_blocking=True)) for s in ours.views()["pairs"]}
            rows = Rows([""] * batch, torch.arange(batch, device=device), {}, to)
            loss = with_autocast(rows)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], float("inf"))
            if bool(torch.isfinite(norm) & torch.isfinite(loss.detach())):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return float(loss.detach())

    class Steps(list):
        """What train_one_epoch asks of a loader."""

        num_batches = num_samples = 0

    logged: list[float] = []

    class LossThatTells(torch.nn.Module):
        def forward(self, **inputs: object) -> dict[str, torch.Tensor]:
            inputs.pop("output_dict")
            loss = peer_loss(**inputs)
            logged[:] = [loss.detach()]
            return {"contrastive_loss": loss}

    def peer_steps(batch: int, steps: int) -> float:
        images, words, _ = host(batch)
        loader = Steps([(images, words)] * steps)
        loader.num_batches, loader.num_samples = steps, steps * batch
        names = {"device": "cuda", "precision": "amp_bf16", "accum_freq": 1, "skip_scheduler": True, "distill": False, "horovod": False}
        names |= {"grad_clip_norm": None, "batch_size": batch, "world_size": 1, "rank": 0, "local_rank": 0, "log_every_n_steps": 100}
        names |= {"log_local": False, "wandb": False}
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(theirs, data, LossThatTells(), 0, peer_optimizer, None, None, None, SimpleNamespace(**names))
        torch.cuda.synchronize()
        return float(logged[0])

    first = {"ours": our_steps(64, 1), "peer": peer_steps(64, 1)}
    if not abs(first["ours"] - first["peer"]) < 0.05:
        raise RuntimeError(f"the two do not compute the same first loss: {first}")
    if not parsed.quick:
        for tower in (ours.towers.visual, ours.towers.text):
            if tower is not None:
                tower.compile_trunk()
        theirs = torch.compile(theirs)

    def largest(steps) -> int:
        batch = 64
        while batch < (128 if parsed.quick else 1 << 15):
            try:
                steps(2 * batch, 2)
            except torch.cuda.OutOfMemoryError:
                break
            batch *= 2
        for group in (ours, theirs):
            group.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return batch

    sides = {"ours": our_steps, "peer": peer_steps}
    batches = {name: largest(steps) for name, steps in sides.items()}
    number = 3 if parsed.quick else 20

    def timed(name: str) -> float:
        sides[name](batches[name], 3)
        started = time.perf_counter()
        sides[name](batches[name], number)
        return batches[name] * number / (time.perf_counter() - started)

    found = alternate({name: lambda name=name: timed(name) for name in sides}, parsed.rounds)
    times = ratio(found["ours"], found["peer"])
    title = torch.cuda.get_device_name()
    peak = parsed.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in title), 0.0)
    flops = {"ours": flops_per_pair(config, ids.shape[1]), "peer": flops_per_pair(config, padded.shape[1])}
    mfu = {name: Spread.of(found[name]).median * flops[name] / (peak * 1e12) if peak else 0.0 for name in sides}
    figures = {
        "batch": batches,
        "mfu": mfu,
        "first_loss": first,
        "text_tokens": {"ours": ids.shape[1], "peer": padded.shape[1]},
        "gpu": title,
    }

    def rate(name: str) -> str:
        return f"{Spread.of(found[name])} samples/s, batch {batches[name]:,}, MFU {mfu[name]:.0%}"

    met = times.median >= 1.5 and mfu["ours"] >= 0.4
    row = f"gpu_train_step, {parsed.model} on {title}"
    record(parsed, Row(row, rate("ours"), rate("peer"), times, "at least 1.5x, MFU at least 40%", met, figures))


if __name__ == "__main__":
    main()
