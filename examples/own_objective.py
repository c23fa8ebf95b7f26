"""An objective of one's own, outside the package: Barlow Twins, Zbontar et al. 2021, equation 1 and algorithm 1.

A recipe names it by module and class, and the command line allows the import:

    objectives: {twins: {kind: "own_objective:BarlowTwins", source: photos}}

    PYTHONPATH=examples accelerate launch train.py RECIPE.yaml --plugin own_objective
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mmpretrain.distributed import all_reduce_sum, world_size
from mmpretrain.heads import mlp
from mmpretrain.objectives import Context, Objective, ObjectiveConfig
from mmpretrain.objectives.base import Augment
from mmpretrain.types import Encode, Encoded


@dataclass
class BarlowTwinsConfig(ObjectiveConfig):
    """Options of Barlow Twins."""

    augment: Augment = field(default_factory=lambda: Augment("simclr"))  # both views
    redundancy: float = 5e-3  # lambda: weight of the correlations between different components
    projection: int = 256  # components of the embedding; the paper's is 8192


class BarlowTwins(Objective):
    """The correlation matrix of two views' embeddings, over the global batch, approaches the identity.

    The paper standardises each component over the batch; here the last norm of the projection head does so, over all ranks' rows.
    """

    Config = BarlowTwinsConfig

    def __init__(self, config: BarlowTwinsConfig, context: Context) -> None:
        super().__init__()
        outputs = frozenset({"pooled"})
        first, second = (Encode(config.source, context.image_view(config.augment, index), outputs=outputs) for index in range(2))
        self.needs = {"first": first, "second": second}  # the names of forward's arguments
        self.redundancy = config.redundancy
        self.head = mlp(context.image_width, config.projection, config.projection, layers=3, last_norm=True)

    def forward(self, first: Encoded, second: Encoded) -> dict[str, Tensor]:  # type: ignore[override]
        # Each view by itself, for the statistics of the norms are those of one view.
        a, b = self.head(first.pooled), self.head(second.pooled)  # [B, D], mean 0 and variance 1 over the global batch
        correlation = all_reduce_sum(a.T @ b) / (world_size() * len(a))  # [D, D]
        on_diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - on_diagonal.square().sum()
        loss = (1 - on_diagonal).square().sum() + self.redundancy * off_diagonal
        return {"loss": loss, "on_diagonal": on_diagonal.mean().detach()}
