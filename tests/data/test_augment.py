"""Batched augmentations against torchvision's: equal for the same choice, alike over many draws."""

from __future__ import annotations

import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional as tv

from clframe.data import EpochLoader, TensorSamples
from clframe.data import augmentation as im
from clframe.data.augmentation import AUGMENTATIONS, ColorJitter, Flip, PadCrop, apply_augmentations
from clframe.errors import ConfigError, DataError, UnknownNameError
from clframe.seeding import generator_for

ADJUSTMENTS = [
    (im.adjust_brightness, tv.adjust_brightness),
    (im.adjust_contrast, tv.adjust_contrast),
    (im.adjust_saturation, tv.adjust_saturation),
    (im.adjust_hue, tv.adjust_hue),
]


def pictures(count, channels=3, height=7, width=5, dtype=torch.uint8):
    x = torch.randint(256, (count, channels, height, width), dtype=torch.uint8)
    return x if dtype == torch.uint8 else (x / 255).to(dtype)


def colorful():
    """Every color whose channels are 0, 1, 127, 128, 254 or 255, and all grays: ties of every kind."""
    steps = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    grays = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T
    return torch.cat([torch.cartesian_prod(steps, steps, steps), grays]).T.reshape(1, 3, 8, 59)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("channels, height, width", [(3, 7, 5), (1, 4, 4), (2, 1, 3)])
@pytest.mark.parametrize("padding, fill", [(1, 0), (2, 1), (4, 0)])
def test_cut_is_torchvisions_pad_and_crop_at_every_place(dtype, channels, height, width, padding, fill):
    places = torch.cartesian_prod(torch.arange(2 * padding + 1), torch.arange(2 * padding + 1))
    x = pictures(len(places), channels, height, width, dtype)
    before = x.clone()
    ours = im.crop(x, *places.T, padding=padding, fill=fill)
    assert ours.dtype == dtype and torch.equal(x, before)
    for image, cropped, (top, left) in zip(x, ours, places.tolist(), strict=True):
        padded = tv.pad(image, [padding] * 4, fill=fill)
        assert torch.equal(cropped, tv.crop(padded, top, left, height, width))


@pytest.mark.parametrize("count", [1, 4])
def test_mirror_is_torchvisions_hflip_where_told(count):
    x, which = pictures(count), torch.arange(count) % 2 == 0
    before, ours = x.clone(), im.mirror(x, which)
    assert torch.equal(x, before)
    for image, mirrored, flip in zip(x, ours, which, strict=True):
        assert torch.equal(mirrored, tv.hflip(image) if flip else image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ours, theirs", ADJUSTMENTS)
def test_adjusting_bytes_is_torchvisions(ours, theirs, channels):
    factor_B = torch.linspace(0, 2, 9, dtype=torch.float64)
    factor_B = factor_B / 2 - 0.5 if ours is im.adjust_hue else factor_B
    x = colorful()[:, :channels].repeat(9, 1, 1, 1)
    before, adjusted = x.clone(), ours(x, factor_B)
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(x, factor_B, strict=True)])
    assert adjusted.dtype == torch.uint8 and torch.equal(x, before)
    # A byte may fall on the other side of a rounding boundary: one apart, and rarely.
    apart = (adjusted.int() - expected.int()).abs()
    assert int(apart.max()) <= (1 if ours is im.adjust_hue else 0)
    assert float((apart > 0).float().mean()) < 0.002


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ours, theirs", ADJUSTMENTS)
def test_adjusting_floats_is_torchvisions(ours, theirs, channels):
    factor_B = torch.tensor([0.0, 0.3, 1.0, 1.7], dtype=torch.float64)
    factor_B = factor_B / 4 - 0.25 if ours is im.adjust_hue else factor_B
    x = pictures(4, channels, dtype=torch.float32)
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(x, factor_B, strict=True)])
    torch.testing.assert_close(ours(x, factor_B), expected, rtol=0, atol=5e-6)


def test_crops_are_uniform_over_all_places():
    """Chi-square over 25 places; 51.2 is its 99.9 % quantile with 24 degrees of freedom."""
    draws, padding = 10_000, 2
    spot = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    spot[..., 2, 2] = 1  # a crop at (top, left) moves it to (4 - top, 4 - left)
    cropped = PadCrop(padding)(spot.expand(draws, 1, 5, 5), generator_for(0, "crop"))
    places = cropped.flatten(1).argmax(dim=1)
    assert int(cropped.flatten(1).sum(dim=1).unique()) == 1
    counts = torch.bincount(places, minlength=25).double()
    expected = draws / 25
    assert float(((counts - expected) ** 2 / expected).sum()) < 51.2


@pytest.mark.parametrize("probability", [0.2, 0.5, 1.0])
def test_flips_come_at_their_rate(probability):
    draws = 10_000
    x = torch.tensor([1, 2], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(draws, 1, 1, 2)
    rate = float((Flip(probability)(x, generator_for(0, "flip"))[:, 0, 0, 0] == 2).float().mean())
    assert abs(rate - probability) <= 4 * (probability * (1 - probability) / draws) ** 0.5


@pytest.mark.parametrize(
    "jitter",
    [
        dict(brightness=0.4),
        dict(brightness=1.5),
        dict(contrast=0.4),
        dict(saturation=0.7),
        dict(hue=0.1),
        dict(hue=0.5),
        dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    ],
    ids=str,
)
def test_jitter_has_torchvisions_distribution(jitter):
    """Two-sample Kolmogorov-Smirnov on each channel of one color and a gray, at the 99.9 % quantile."""
    draws = 600
    x = torch.tensor([[200, 90], [60, 90], [30, 90]], dtype=torch.uint8).reshape(3, 1, 2)
    generator = generator_for(0, "jitter")
    # Orders are drawn once for a batch: small batches see them all.
    ours = torch.cat([ColorJitter(**jitter)(x.expand(5, 3, 1, 2), generator) for _ in range(draws // 5)])
    theirs = torch.stack([transforms.ColorJitter(**jitter)(x) for _ in range(draws)])
    for c in range(3):
        levels = torch.arange(256)
        a, b = (
            (v[:, c, 0, 0, None] <= levels).double().mean(dim=0) for v in (ours, theirs)
        )  # the two distribution functions
        assert float((a - b).abs().max()) < 1.95 * (2 / draws) ** 0.5


def test_images_of_one_batch_are_augmented_each_in_its_own_way():
    x = pictures(1).expand(40, 3, 7, 5)
    for augmentation in (PadCrop(3), Flip(), ColorJitter(brightness=0.9), ColorJitter(hue=0.4)):
        changed = augmentation(x, generator_for(1))
        different = {bytes(image.numpy().tobytes()) for image in changed}
        assert len(different) >= (2 if augmentation == Flip() else 15)


@pytest.mark.parametrize("name", [n for n in AUGMENTATIONS.names() if n != "none"])
@pytest.mark.parametrize("count, channels", [(1, 1), (1, 3), (7, 3)])
def test_presets_keep_shape_and_dtype_and_depend_on_the_generator_alone(name, count, channels):
    x, presets = pictures(count, channels, 9, 11), AUGMENTATIONS.get(name)
    before = x.clone()
    first = apply_augmentations(x, presets, generator_for(3))
    torch.rand(7)  # the global generator has no say
    assert torch.equal(first, apply_augmentations(x, presets, generator_for(3)))
    assert first.shape == x.shape and first.dtype == x.dtype and torch.equal(x, before)
    others = [apply_augmentations(x, presets, generator_for(s)) for s in range(20)]
    assert any(not torch.equal(first, other) for other in others)


def test_presets():
    assert AUGMENTATIONS.names() == ("cifar", "crop", "flip", "jitter", "none")
    assert AUGMENTATIONS.get("cifar") == (PadCrop(4), Flip(0.5)) and AUGMENTATIONS.get("none") == ()
    with pytest.raises(UnknownNameError, match="did you mean 'cifar'"):
        AUGMENTATIONS.get("cifr", where="benchmark.augment")


def test_augmentations_act_in_order():
    x = pictures(3)
    both = apply_augmentations(x, (PadCrop(2), Flip(1.0)), generator_for(0))
    assert torch.equal(both, PadCrop(2)(x, generator_for(0)).flip(-1))


def test_the_identity_draws_nothing_and_returns_its_argument():
    idle = (PadCrop(0), Flip(0.0), ColorJitter())
    generator, x = generator_for(0), pictures(2)
    before = generator.get_state()
    assert apply_augmentations(x, idle, generator) is x and apply_augmentations(x, (), generator) is x
    assert torch.equal(generator.get_state(), before)
    vectors = torch.zeros(2, 5)
    assert apply_augmentations(vectors, idle, generator) is vectors


def test_what_is_no_image_is_refused():
    with pytest.raises(DataError, match=r"augmentation: found inputs of shape \(5,\); augment only images"):
        apply_augmentations(torch.zeros(2, 5), (Flip(),), generator_for(0))
    with pytest.raises(DataError, match="found images of 4 channels; use ColorJitter on gray or RGB images"):
        apply_augmentations(torch.zeros(2, 4, 3, 3), (ColorJitter(hue=0.1),), generator_for(0))


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: PadCrop(-1), "augmentation.padding: found -1"),
        (lambda: Flip(1.5), "augmentation.probability: found 1.5"),
        (lambda: Flip(float("nan")), "augmentation.probability: found nan"),
        (lambda: ColorJitter(brightness=-0.1), "augmentation.brightness: found -0.1"),
        (lambda: ColorJitter(contrast=float("nan")), "augmentation.contrast: found nan"),
        (lambda: ColorJitter(hue=0.6), "augmentation.hue: found 0.6"),
    ],
)
def test_impossible_options(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


def training_samples(augment=(PadCrop(2), Flip(0.5))):
    return TensorSamples(pictures(11), torch.arange(11), mean=(100.0,), std=(50.0,), augment=augment)


def test_training_batches_are_augmented_then_normalized():
    data = training_samples()
    loader = EpochLoader(data, 4, shuffle=True, seed=5, experience=2)
    loader.epoch = 3
    generator = generator_for(5, "augment", 2, 3)
    for x, y in loader:
        changed = apply_augmentations(data.x[y], data.augment, generator)
        torch.testing.assert_close(x, (changed.float() - 100) / 50, rtol=0, atol=1e-6)


def test_every_epoch_augments_anew_and_the_same_epoch_the_same():
    loader = EpochLoader(training_samples(), 4, shuffle=True, seed=5)
    runs = []
    for epoch in (0, 1, 0):
        loader.epoch = epoch
        x, y = (torch.cat(part) for part in zip(*loader, strict=True))
        runs.append(x[y.argsort()])
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])


def test_evaluation_is_never_augmented():
    data = training_samples()
    plain = TensorSamples(data.x, data.y, mean=data.mean, std=data.std)
    served = torch.cat([x for x, _ in EpochLoader(data, 4)])
    assert torch.equal(served, plain.prepare(plain.x)) and torch.equal(data.prepare(data.x), served)


def test_without_augmentations_a_generator_changes_nothing():
    data, generator = training_samples(augment=()), generator_for(0)
    before, index = generator.get_state(), torch.tensor([3, 1])
    for with_one, without in zip(data.batch(index, generator=generator), data.batch(index), strict=True):
        assert torch.equal(with_one, without)
    assert torch.equal(data.prepare(data.x, generator=generator), data.prepare(data.x))
    assert torch.equal(generator.get_state(), before)


def test_stored_images_stay_as_they_are_epoch_after_epoch():
    data = training_samples(augment=(*AUGMENTATIONS.get("cifar"), *AUGMENTATIONS.get("jitter")))
    stored = data.x.clone()
    for _ in range(2):
        for x, _ in EpochLoader(data, 3, shuffle=True):
            x.zero_()
    assert torch.equal(data.x, stored)
