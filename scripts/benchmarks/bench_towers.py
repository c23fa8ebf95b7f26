"""CLIP forward, loss and backward: our towers against open_clip's model, same weights, batch and precision, alternately in one process.

    python scripts/benchmarks/bench_train_step.py [--model ViT-S-32-alt] [--batch 64] [--rounds 5]

Both start from the same weights and must agree on the loss before anything is timed. The captions are cut to the longest of the batch
in ours, and padded to the context length in open_clip's, as each library's trainer does. Prints samples/s of both, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import open_clip
import torch

from mmpretrain.data.text import get_tokenizer, trim
from mmpretrain.functional import info_nce, unit
from mmpretrain.launch import computes_bf16, keep_freed_memory
from mmpretrain.machine import cores
from mmpretrain.towers.dual import build_towers

SMALL = {  # ViT-Ti/16 at 112 px and a text tower of 12 layers
    "embed_dim": 192,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "width": 192, "layers": 12, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 12},
}
SHAPES = ("circle", "star", "heart", "ring", "moon", "arrow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="an open_clip model name; default: ViT-Ti/16 at 112 px with 12 text layers")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = open_clip.get_model_config(arguments.model) if arguments.model else SMALL
    theirs = open_clip.model.CustomTextCLIP(**config).to(device)
    ours = build_towers(config).to(device)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("logit")})
    image_tower, text_tower = ours.visual, ours.text
    if image_tower is None or text_tower is None:
        parser.error(f"{arguments.model} has no image tower or no text tower: this benchmark needs both")
    size = ours.preprocess.size
    images = torch.randn(arguments.batch, 3, size, size, device=device)
    captions = [f"a picture of {i} blue {SHAPES[i % 6]}s left of a large red {SHAPES[i % 5]} on grass" for i in range(arguments.batch)]
    tokenizer = get_tokenizer(ours.tokenizer)
    padded = tokenizer.encode(captions, ours.context_length).to(device)
    trimmed = trim(padded, tokenizer.eot)
    scale = torch.tensor(1 / 0.07, device=device)
    peer_loss = open_clip.loss.ClipLoss()

    def our_step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=computes_bf16()):
            a, b = image_tower(images).features, text_tower(trimmed).features
            loss = info_nce(unit(a), unit(b), scale)
        loss.backward()
        return loss.detach()

    def peer_step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=computes_bf16()):
            a, b = theirs.encode_image(images, normalize=True), theirs.encode_text(padded, normalize=True)
            loss = peer_loss(a, b, scale)
        loss.backward()
        return loss.detach()

    both = {"ours": (our_step, ours), "open_clip": (peer_step, theirs)}
    first = {name: step().item() for name, (step, _) in both.items()}
    assert abs(first["ours"] - first["open_clip"]) < 0.05, f"the two do not compute the same loss: {first}"
    speeds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(arguments.rounds):
        for name, (step, model) in both.items():
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            speeds[name].append(arguments.batch / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["open_clip"])]
    for name, values in speeds.items():
        print(f"{name:>10}: {statistics.median(values):8.1f} samples/s (first loss {first[name]:.4f})")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"     ratio: {spread}, {device}, {trimmed.shape[1]} of {padded.shape[1]} tokens")


if __name__ == "__main__":
    main()
