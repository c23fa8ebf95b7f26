"""Two ranks, of which only the main one may measure: both must take its choice. Run under torchrun with a run folder."""

import os
import sys

import torch

from mmpretrain import compute, launch
from mmpretrain.config import recipe as recipes


def rates(width: int) -> compute.Rates:
    if os.environ["RANK"] != "0":
        raise AssertionError("only the main rank measures")
    return compute.Rates(width, 100.0, 400.0)


def main() -> None:
    torch.cuda.is_available = lambda: False
    compute.product_rates = rates
    config, accelerator, choice = launch.start(recipes.Config(run_dir=sys.argv[1], threads=1))
    assert choice.precision == "bf16"
    assert choice.rates == compute.Rates(compute.DEFAULT_WIDTH, 100.0, 400.0)
    assert (config.precision, accelerator.mixed_precision) == ("bf16", "bf16")
    assert accelerator.num_processes == 2
    print(f"rank {accelerator.process_index} took {choice.precision}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
