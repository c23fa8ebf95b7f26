"""MAE: what the decoder sees, the loss on hidden patches alone, and its use on any mask."""

import pytest
import torch

from mmpretrain.functional import patchify
from tests import tiny


def encoded(model, batch):
    return model.arguments("mae", model.encode(batch, model.plan))["image"]


def test_the_loss_is_the_mean_over_hidden_patches_row_by_row():
    model = tiny.model({"mae": {}})
    mae, batch = model.objectives["mae"], tiny.batch(model)
    image = encoded(model, batch)
    assert image.mask.sum(1).tolist() == [12] * 8  # 75% of 16
    assert image.tokens.shape == (8, 4, 16)
    predicted, patches = mae.pixels(mae._decode(image)), patchify(image.view.data, 4)
    terms = []
    for row in range(8):
        for n in range(16):
            if image.mask[row, n]:
                target = (patches[row, n] - patches[row, n].mean()) / (patches[row, n].var() + 1e-6).sqrt()
                terms.append((predicted[row, n] - target).square().mean())
    assert mae(image=image)["loss"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-12)


def test_every_visible_token_stands_at_its_own_place():
    model = tiny.model({"mae": {}})
    mae, image = model.objectives["mae"], encoded(model, tiny.batch(model))
    seen = []
    mae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].x))
    mae._decode(image)
    visible = mae.embed(image.tokens)
    for row in range(8):
        where = (~image.mask[row]).nonzero()[:, 0]
        torch.testing.assert_close(seen[0][row, where], visible[row] + mae.positions[where])
        hidden = image.mask[row].nonzero()[:, 0]
        torch.testing.assert_close(seen[0][row, hidden], mae.mask_token + mae.positions[hidden])


def test_hidden_pixels_do_not_reach_the_prediction():
    model = tiny.model({"mae": {}})
    mae, batch = model.objectives["mae"], tiny.batch(model)
    image = encoded(model, batch)
    (spec,) = batch["pairs"].views
    view = batch["pairs"].views[spec]
    from mmpretrain.functional import unpatchify

    patches = patchify(view.data, 4)
    noise = torch.where(image.mask[..., None], patches + 7.0, patches)
    batch["pairs"].views[spec] = view._replace(data=unpatchify(noise, 4, (4, 4)))
    torch.testing.assert_close(mae._decode(encoded(model, batch)), mae._decode(image))


def test_a_ratio_that_hides_nothing_or_all_is_refused():
    for ratio in (0.01, 0.99):
        with pytest.raises(ValueError, match="mask_ratio"):
            tiny.model({"mae": {"mask_ratio": ratio}})
