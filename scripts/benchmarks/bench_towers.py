"""CLIP forward, loss and backward: our towers against open_clip's model, same weights, batch and precision, in one process.

    python scripts/benchmarks/bench_towers.py [--model ViT-S-32-alt] [--batch 64] [--quick] [--rounds 5] [--out FILE]

Both must agree on the first loss before anything is timed. The captions are cut to the longest of the batch in ours, and padded to the
context length in open_clip's, as each library's trainer does. The default is ViT-Ti/16 at 112 px with 12 text layers.
"""

import time

import open_clip
import torch
from common import Row, alternate, arguments, formatted, ratio, record, threads
from trainers import SMALL, TINY, model_config

from data_prep.demo.records import chunk
from mmpretrain.compute import choose_precision, model_width
from mmpretrain.data.text import get_tokenizer, trim
from mmpretrain.functional import info_nce, unit
from mmpretrain.launch import keep_freed_memory
from mmpretrain.towers.specs import build_towers


def main() -> None:
    parsed = arguments(__doc__, rounds=5, model="", batch=64)
    keep_freed_memory()
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = model_config(parsed.model) if parsed.model else TINY if parsed.quick else SMALL
    theirs = open_clip.model.CustomTextCLIP(**config).to(device)
    ours = build_towers(config).to(device)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("logit")})
    image_tower, text_tower = ours.visual, ours.text
    if image_tower is None or text_tower is None:
        raise SystemExit(f"{parsed.model} has no image tower or no text tower: this benchmark needs both")
    size = ours.preprocess.size
    images = torch.randn(parsed.batch, 3, size, size, device=device)
    captions = [members["txt"].decode() for _, members in chunk((0, "pairs", 0, parsed.batch))]
    tokenizer = get_tokenizer(ours.tokenizer)
    padded = tokenizer.encode(captions, ours.context_length).to(device)
    trimmed = trim(padded, tokenizer.eot)
    scale = torch.tensor(1 / 0.07, device=device)
    peer_loss = open_clip.loss.ClipLoss()
    choice = choose_precision(model_width(config))
    print(choice.reason, flush=True)
    bf16 = choice.precision == "bf16"

    def our_step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            a, b = image_tower(images).features, text_tower(trimmed).features
            loss = info_nce(unit(a), unit(b), scale)
        loss.backward()
        return loss.detach()

    def peer_step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            a, b = theirs.encode_image(images, normalize=True), theirs.encode_text(padded, normalize=True)
            loss = peer_loss(a, b, scale)
        loss.backward()
        return loss.detach()

    both = {"ours": (our_step, ours), "open_clip": (peer_step, theirs)}
    first = {name: step().item() for name, (step, _) in both.items()}
    if not abs(first["ours"] - first["open_clip"]) < 0.05:
        raise RuntimeError(f"the two do not compute the same loss: {first}")

    def timed(name: str) -> float:
        step, model = both[name]
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return parsed.batch / (time.perf_counter() - started)

    found = alternate({name: lambda name=name: timed(name) for name in both}, parsed.rounds)
    rates = formatted(found["ours"], found["open_clip"], "samples/s")
    model = parsed.model or ("a tiny model" if parsed.quick else "ViT-Ti/16 112 px")
    title = f"towers, {model}, {device}, {trimmed.shape[1]} of {padded.shape[1]} tokens"
    record(parsed, Row(title, *rates, ratio(found["ours"], found["open_clip"]), "", None, {"first_loss": first}))


if __name__ == "__main__":
    main()
