"""Views: what is drawn, how it is cut, and photometry against torchvision's reference operations."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from mmpretrain import rng
from mmpretrain.data import augment
from mmpretrain.data.text import get_tokenizer, trim
from mmpretrain.data.views import CenterView, ImageView, TextView, crop_boxes
from mmpretrain.types import Sample
from tests.data.generated import picture

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def images(count: int, size: int = 24) -> Tensor:
    """uint8 [count,3,size,size], of middling contrast, so that nothing needs clamping."""
    rows = [torch.from_numpy(np.array(picture(i, (size, size)))).permute(2, 0, 1) for i in range(count)]
    return (torch.stack(rows).float() * 0.4 + 70).round().to(torch.uint8)


def samples(count: int, height: int = 60, width: int = 80) -> list[Sample]:
    return [Sample(str(i), torch.zeros(3, height, width, dtype=torch.uint8)) for i in range(count)]


def seeds(count: int) -> Tensor:
    return rng.combine(5, torch.arange(count))


def chain(pixels: Tensor, order: list[int], brightness: float = 1, contrast: float = 1, saturation: float = 1, turn: float = 0.0) -> Tensor:
    B = len(pixels)
    params = {
        "factors": torch.tensor([[brightness, contrast, saturation]]).expand(B, 3),
        "turns": torch.full((B,), turn),
        "order": torch.tensor([order]).expand(B, 4),
    }
    return augment.photometric(pixels, params, ZERO, ONE)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0, 3], [2, 0, 3, 1]])
def test_jitter_equals_torchvisions_operations_in_that_order(order: list[int]) -> None:
    pixels = images(6)
    found = chain(pixels, order, 1.2, 0.7, 1.3)
    wanted = pixels.float() / 255
    operations = [
        lambda x: T.functional.adjust_brightness(x, 1.2),
        lambda x: T.functional.adjust_contrast(x, 0.7),
        lambda x: T.functional.adjust_saturation(x, 1.3),
        lambda x: x,
    ]
    for which in order:
        wanted = operations[which](wanted)
    assert (found - wanted).abs().max() < 2e-3  # torchvision's luma weights are rounded to four digits


def test_each_row_has_its_own_factors_and_mean() -> None:
    pixels = images(4)
    factors = torch.tensor([[1.1, 0.8, 1.0], [0.9, 1.3, 0.5], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    params = {"factors": factors, "turns": torch.zeros(4), "order": torch.tensor([[0, 1, 2, 3]] * 4)}
    found = augment.photometric(pixels, params, ZERO, ONE)
    for i, (b, c, s) in enumerate(factors.tolist()):
        assert torch.equal(found[i], chain(pixels[i : i + 1], [0, 1, 2, 3], b, c, s)[0])
    assert (found[2] - pixels[2] / 255).abs().max() < 1e-5
    assert found[3].std() < 1e-5  # no contrast left: the image's own mean grey everywhere
    assert abs(found[3].mean() - T.functional.rgb_to_grayscale(pixels[3] / 255).mean()) < 1e-3


def hue_angle(rgb: Tensor) -> Tensor:
    """[B,3,H,W] -> the angle on the colour hexagon's circle, as complex numbers with the chroma as length."""
    red, green, blue = rgb.unbind(1)
    return torch.complex(red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue))


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0.05, 0.1])
def test_hue_turns_as_far_as_torchvisions_and_keeps_luma(turn: float) -> None:
    pixels = images(8)
    found = chain(pixels, [0, 1, 2, 3], turn=turn)
    before = hue_angle(pixels / 255).conj()
    ours = (hue_angle(found) * before).sum().angle() / (2 * math.pi)
    theirs = (hue_angle(T.functional.adjust_hue(pixels.float() / 255, turn)) * before).sum().angle() / (2 * math.pi)
    assert abs(theirs - turn) < 0.1 * abs(turn)
    assert abs(ours - turn) < 0.25 * abs(turn)  # the circle of YIQ is not quite that of HSV
    luma = torch.tensor(augment.LUMA)[:, None, None]
    assert ((found * luma).sum(1) - (pixels / 255 * luma).sum(1)).abs().max() < 1e-4


def test_a_whole_turn_of_hue_is_nothing() -> None:
    pixels = images(3)
    assert (chain(pixels, [0, 1, 2, 3], turn=1.0) - pixels / 255).abs().max() < 1e-4


def test_greyscale_and_clamp() -> None:
    pixels = images(2)
    grey = augment.photometric(pixels, {"grey": torch.tensor([True, False])}, ZERO, ONE)
    assert (grey[0] - T.functional.rgb_to_grayscale(pixels[0] / 255)).abs().max() < 1e-3
    assert (grey[1] - pixels[1] / 255).abs().max() < 1e-6
    bright = chain(torch.full((1, 3, 8, 8), 200, dtype=torch.uint8), [0, 1, 2, 3], brightness=1.8)
    assert (bright == 1).all()


def test_normalisation_is_folded_in_exactly() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    view = ImageView(size=24, jitter_prob=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.3, blur=0.5, solarize=0.5)
    pixels, drawn = images(16), view.draw(samples(16), seeds(16))
    plain = augment.photometric(pixels, drawn, ZERO, ONE)
    wanted = T.functional.normalize(plain, list(mean), list(std))
    assert (augment.photometric(pixels, drawn, mean, std) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("apply", [augment._one_by_one, augment._together])
def test_blur_equals_torchvisions(apply) -> None:
    x = images(5)
    plain = torch.eye(3, 4).expand(5, 3, 4).contiguous()
    sigma = torch.tensor([0.0, 0.3, 0.8, 1.4, 2.0])
    found = apply(x, plain, None, sigma)
    assert torch.equal(found[0], x[0].float())
    for i, s in list(enumerate(sigma.tolist()))[1:]:
        reach = 2 * math.ceil(3 * s) + 1
        assert (found[i] - T.functional.gaussian_blur(x[i].float(), [reach, reach], [s, s])).abs().max() < 255e-5
    small = apply(images(2, 4), plain[:2], None, torch.tensor([2.0, 2.0]))  # a reach beyond the image is cut, not an error
    assert small.isfinite().all()


def test_a_device_gives_what_the_cpu_gives() -> None:
    """The batched operations run here, on the CPU: the same pictures but for rounding, whatever is drawn."""
    view = ImageView(size=24, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.3, blur=0.5)
    pixels, drawn = images(32), view.draw(samples(32), seeds(32))
    matrix, offset = augment._colour(pixels, drawn)
    chain = torch.cat([matrix / 255, offset[:, :, None]], 2)
    bounds = (0.0,) * 3, (1.0,) * 3
    one, many = (apply(pixels, chain, bounds, drawn["sigma"]) for apply in (augment._one_by_one, augment._together))
    assert (one - many).abs().max() < 1e-5
    assert torch.equal(one, augment.photometric(pixels, drawn, ZERO, ONE))


def test_solarize_equals_torchvisions() -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = augment.photometric(pixels, {"solarize": torch.tensor([True, False, True])}, ZERO, ONE)
    assert (found[0] - T.functional.solarize(pixels[0] / 255, 0.5)).abs().max() < 1e-6
    assert (found[1] - pixels[1] / 255).abs().max() < 1e-6


def test_crop_boxes_follow_torchvisions_distribution() -> None:
    n, scale, ratio = 3000, (0.2, 1.0), (0.75, 4 / 3)
    boxes = crop_boxes(samples(n), seeds(n), "x", scale, ratio).float()
    torch.manual_seed(0)
    crop, image = T.RandomResizedCrop(8, scale, ratio), [torch.zeros(3, 60, 80)]
    draws = [crop.make_params(image) for _ in range(n)]
    reference = torch.tensor([[draw[k] for k in ("top", "left", "height", "width")] for draw in draws]).float()
    assert ((boxes.mean(0) - reference.mean(0)).abs() < 4 * reference.std(0) / math.sqrt(n / 2)).all()
    assert ((boxes.std(0) / reference.std(0) - 1).abs() < 0.1).all()
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 60
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 80
    assert boxes.min() >= 0


@pytest.mark.parametrize("shape", [(4, 80), (80, 4), (1, 1)])
def test_crops_of_extreme_images_fit(shape: tuple[int, int]) -> None:
    boxes = crop_boxes(samples(50, *shape), seeds(50), "x", (0.9, 1.0), (0.75, 1.3333))
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(shape)).all()
    assert ImageView(size=8).geometry(torch.zeros(3, *shape, dtype=torch.uint8), {"box": boxes[0]}).shape == (3, 8, 8)


def test_probabilities_and_ranges_of_draws() -> None:
    n = 4000
    view = ImageView(
        size=8, flip=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2, blur=0.5, solarize=0.1
    )
    drawn = view.draw(samples(n), seeds(n))
    for name, wanted in [("flip", 0.5), ("grey", 0.2), ("solarize", 0.1)]:
        assert abs(drawn[name].float().mean() - wanted) < 0.03
    jittered = drawn["factors"][:, 0] != 1
    assert abs(jittered.float().mean() - 0.8) < 0.03
    assert drawn["factors"][:, :2].min() >= 0.6
    assert drawn["factors"][jittered, 0].max() > 1.38
    assert drawn["factors"][:, 2].max() <= 1.2
    assert 0.09 < drawn["turns"].abs().max() <= 0.1
    blurred = drawn["sigma"] > 0
    assert abs(blurred.float().mean() - 0.5) < 0.03
    assert drawn["sigma"][blurred].min() >= 0.1
    assert len({tuple(o) for o in drawn["order"].tolist()}) == 24
    correlation = torch.corrcoef(torch.stack([drawn["flip"].float(), drawn["grey"].float(), blurred.float(), jittered.float()]))
    assert (correlation - torch.eye(4)).abs().max() < 0.08


def test_hue_turns_either_way_alike() -> None:
    turns = ImageView(hue=0.1, jitter_prob=1.0).draw(samples(2000), seeds(2000))["turns"]
    assert -0.1 <= turns.min() < -0.098
    assert 0.098 < turns.max() <= 0.1
    assert (turns < 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert turns.mean().item() == pytest.approx(0.0, abs=0.006)  # four standard deviations


def test_draws_follow_the_row_and_the_spec_alone() -> None:
    view = ImageView(size=8, flip=0.5, jitter_prob=0.8, brightness=0.4, blur=0.5)
    drawn = view.draw(samples(20), seeds(20))
    for name, value in view.draw(samples(5), seeds(20)[10:15]).items():
        assert torch.equal(value, drawn[name][10:15])
    other = ImageView(index=1, size=8, flip=0.5, jitter_prob=0.8, brightness=0.4, blur=0.5)
    assert not torch.equal(other.draw(samples(20), seeds(20))["box"], drawn["box"])


def test_specs_from_lists_are_equal_to_specs_from_tuples() -> None:
    assert ImageView(scale=[0.5, 1.0], mean=[0, 0, 0]) == ImageView(scale=(0.5, 1.0), mean=(0, 0, 0))
    assert len({ImageView(scale=[0.5, 1.0]), ImageView(scale=(0.5, 1.0))}) == 1
    for wrong in ({"resize_mode": "longest"}, {"interpolation": "lanczos"}):
        with pytest.raises(ValueError, match="expected"):
            CenterView(**wrong)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (101, 50)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_center_view_is_near_the_reference_preprocessing(size: tuple[int, int], mode: str) -> None:
    image = picture(1, size)
    view = CenterView(size=16, resize_mode=mode)
    pixels = view.geometry(torch.from_numpy(np.array(image)).permute(2, 0, 1), {})
    found = view.render(pixels[None], {}).data[0]
    to = 16 if mode == "shortest" else (16, 16)
    cut = T.Compose([T.Resize(to, InterpolationMode.BICUBIC), T.CenterCrop(16), T.PILToTensor()])
    reference = T.Compose([cut, T.ToDtype(torch.float32, scale=True), T.Normalize(view.mean, view.std)])
    assert (found - reference(image)).abs().max() < 0.03


def test_flip_and_cut_take_the_box() -> None:
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    view = ImageView(size=4)
    cut = view.geometry(image, {"box": torch.tensor([2, 3, 4, 4]), "flip": torch.tensor(True)})
    assert torch.equal(cut, image[:, 2:6, 3:7].flip(-1))


def test_text_view_draws_captions_and_trims() -> None:
    view = TextView(context_length=32)
    tokenizer = get_tokenizer("clip")
    rows = [Sample(str(i), captions=["a", "a photo of a dog on a beach", "two"][: 1 + i % 3]) for i in range(300)]
    drawn = view.draw(rows, seeds(300))
    picked = drawn["caption"][2::3]
    assert torch.bincount(picked, minlength=3).min() > 15
    assert (drawn["caption"][0::3] == 0).all()
    ids = torch.stack([view.geometry(r.captions, {"caption": c}) for r, c in zip(rows, drawn["caption"])])
    shown = view.render(ids, drawn).data
    assert shown.shape == (300, 16)  # nine tokens and the two marks: to a multiple of 8
    assert torch.equal(shown, ids[:, :16])
    assert (ids[:, 16:] == 0).all()
    assert (ids == tokenizer.eot).any(1).all()
    assert ids[0, 0] == tokenizer.sot


def test_tokenizer_and_trim() -> None:
    tokenizer = get_tokenizer("clip")
    assert (tokenizer.sot, tokenizer.eot, tokenizer.vocab_size) == (49406, 49407, 49408)
    ids = tokenizer.encode(["word " * 200, ""], 20)
    assert ids.shape == (2, 20)
    assert ids.dtype == torch.int64
    assert ids[0, -1] == tokenizer.eot
    assert trim(ids, tokenizer.eot).shape == (2, 20)
    assert trim(ids[1:], tokenizer.eot).shape == (1, 8)
    assert trim(torch.zeros(2, 20, dtype=torch.int64), tokenizer.eot).shape == (2, 20)


def test_render_of_a_batch_equals_render_of_rows() -> None:
    view = ImageView(size=24, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5, solarize=0.3)
    pixels, drawn = images(30), view.draw(samples(30), seeds(30))
    whole = view.render(pixels, drawn).data
    for i in range(30):
        assert torch.equal(view.render(pixels[i : i + 1], {k: v[i : i + 1] for k, v in drawn.items()}).data[0], whole[i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_render_on_the_device_agrees() -> None:
    view = ImageView(size=24, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5, solarize=0.3)
    pixels, drawn = images(64), view.draw(samples(64), seeds(64))
    here = view.render(pixels, drawn).data
    there = view.render(pixels.cuda(), {k: v.cuda() for k, v in drawn.items()}).data.cpu()
    near = (here - there).abs() < 1e-3
    assert near.float().mean() > 0.9999  # a value at solarize's threshold may fall on either side


def test_a_flat_image_by_hand() -> None:
    flat = torch.tensor([64, 128, 192], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    params = {"factors": torch.tensor([[0.5, 1.0, 1.0]]), "turns": torch.zeros(1), "order": torch.arange(4)[None]}
    found = augment.photometric(flat, params, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    wanted = [(v / 255 * 0.5 - m) / 0.5 for v, m in zip((64, 128, 192), (0.1, 0.2, 0.3))]
    assert found[0, :, 0, 0].tolist() == pytest.approx(wanted, abs=1e-5)
