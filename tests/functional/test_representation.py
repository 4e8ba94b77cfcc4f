"""Losses on representations against the formulas written longhand, their limits and their gradients."""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch.nn.functional import normalize

from clframe.functional.representation import (
    attraction,
    contrastive,
    cosine_distance,
    nca,
    pod,
    pool_squares,
    relation,
    separation,
)


def drawn(*shape, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def cosine(a, b):
    return dot(a, b) / sqrt(dot(a, a) * dot(b, b))


def test_cosine_distance_longhand_and_per_exit():
    students, teachers = [drawn(3, 4), drawn(3, 7, seed=1)], [drawn(3, 4, seed=2), drawn(3, 7, seed=3)]
    longhand = [sum(1 - cosine(s[b], t[b]) for b in range(3)) / 3 for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(cosine_distance(students, teachers), torch.tensor(longhand, dtype=torch.float64))
    same = cosine_distance([3 * teachers[0]], [teachers[0]])
    torch.testing.assert_close(same, torch.zeros(1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda s: cosine_distance([s], [teachers[0]]), drawn(3, 4, grad=True))


def longhand_pool(x, pooling):
    """Of one map_CHW, as a list."""
    (C, H, W), s = x.shape, (x * x).tolist()
    width = [sum(s[c][h]) for c in range(C) for h in range(H)]
    height = [sum(s[c][h][w] for h in range(H)) for c in range(C) for w in range(W)]
    return {
        "width": width,
        "height": height,
        "spatial": width + height,
        "gap": [sum(sum(row) for row in s[c]) for c in range(C)],
        "channels": [sum(s[c][h][w] for c in range(C)) for h in range(H) for w in range(W)],
        "pixels": [s[c][h][w] for c in range(C) for h in range(H) for w in range(W)],
    }[pooling]


@pytest.mark.parametrize("pooling", ["spatial", "width", "height", "gap", "channels", "pixels"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 3)], ids=str)
def test_pod_longhand(pooling, shape):
    a, b = drawn(*shape), drawn(*shape, seed=1)
    total = 0.0
    for x, y in zip(a, b, strict=True):
        p, q = longhand_pool(x, pooling), longhand_pool(y, pooling)
        p, q = ([v / sqrt(sum(u * u for u in values)) for v in values] for values in (p, q))
        total += sqrt(sum((u - v) ** 2 for u, v in zip(p, q, strict=True)))
    torch.testing.assert_close(pod(a, b, pooling=pooling).item(), total / shape[0])
    if shape[0] > 1:
        assert torch.autograd.gradcheck(lambda s: pod(s, b, pooling=pooling), drawn(*shape, grad=True))


def test_pod_of_a_network_and_itself_is_zero_with_gradient_zero():
    a = drawn(2, 3, 4, 5, grad=True)
    loss = pod(a, a.detach(), pooling="spatial")
    loss.backward()
    assert loss.item() == 0
    assert (a.grad == 0).all()


def test_tokens_are_pooled_over_the_tokens():
    tokens = drawn(2, 5, 3)
    summed = tokens.square().sum(1)
    for pooling in ("spatial", "width", "height", "gap"):
        torch.testing.assert_close(pool_squares(tokens, pooling), summed)
    torch.testing.assert_close(pool_squares(tokens, "channels"), tokens.square().sum(2))
    assert pool_squares(tokens, "pixels").shape == (2, 15)


def test_nca_longhand_per_exit_with_scale_margin_and_weights():
    logits, y = [drawn(4, 3), 2 * drawn(4, 3, seed=1)], torch.tensor([0, 2, 1, 0])
    scales, margin, weight = [1.0, 2.5], 0.6, [1.0, 1.0, 3.0, 0.5]
    longhand, plain = [], []
    for z, eta in zip(logits, scales, strict=True):
        hinges = []
        for b, c in enumerate(y.tolist()):
            others = log(sum(exp(z[b, i]) for i in range(3) if i != c))
            hinges.append(max(0.0, others - (z[b, c].item() - eta * margin)))
        longhand.append(sum(w * h for w, h in zip(weight, hinges, strict=True)) / sum(weight))
        plain.append(sum(hinges) / 4)
    weight_B = torch.tensor(weight, dtype=torch.float64)
    found = nca(logits, y, margin=margin, scales=scales, weight_B=weight_B)
    torch.testing.assert_close(found, torch.tensor(longhand, dtype=torch.float64))
    found = nca(logits, y, margin=margin, scales=scales)
    torch.testing.assert_close(found, torch.tensor(plain, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z: nca([z], y, margin=5.0, scales=[1.0]), drawn(4, 3, grad=True))


def test_nca_of_one_class_and_of_classes_not_met_is_finite():
    z = drawn(2, 1, grad=True)
    loss = nca([z], torch.tensor([0, 0]), margin=0.6, scales=[1.0])
    loss.sum().backward()
    assert loss.tolist() == [0.0] and (z.grad == 0).all()
    gap = drawn(2, 3).index_fill(1, torch.tensor([1]), -torch.inf).requires_grad_()
    y, two = torch.tensor([0, 2]), gap.detach()[:, [0, 2]]
    loss = nca([gap], y, margin=0.6, scales=[1.0])
    torch.testing.assert_close(loss, nca([two], torch.tensor([0, 1]), margin=0.6, scales=[1.0]))
    loss.sum().backward()
    assert gap.grad.isfinite().all()


@pytest.mark.parametrize("negatives", [1, 2, 5])
def test_separation_longhand(negatives):
    logits, y, new = [drawn(5, 6), drawn(5, 6, seed=1)], torch.tensor([0, 4, 2, 5, 1]), torch.tensor([3, 4, 5])
    scales, margin = [2.0, 0.5], 0.5
    longhand = []
    for z, eta in zip(logits, scales, strict=True):
        total = 0.0
        for b in (0, 2, 4):  # the samples of old classes
            s = (z[b] / eta).tolist()
            hardest = sorted((s[c] for c in new.tolist()), reverse=True)[:negatives]
            total += sum(max(margin - s[int(y[b])] + h, 0.0) for h in hardest)
        longhand.append(total / 3)
    found = separation(logits, y, new=new, margin=margin, negatives=negatives, scales=scales)
    torch.testing.assert_close(found, torch.tensor(longhand, dtype=torch.float64))


def test_separation_touches_old_samples_only_and_is_zero_without_them():
    z, y, new = drawn(4, 5, grad=True), torch.tensor([0, 3, 4, 1]), torch.tensor([3, 4])
    separation([z], y, new=new, margin=50.0, negatives=2, scales=[1.0]).sum().backward()
    assert (z.grad[[1, 2]] == 0).all() and (z.grad[:, 2] == 0).all()
    torch.testing.assert_close(z.grad[0, [0, 3, 4]], torch.tensor([-1.0, 0.5, 0.5], dtype=torch.float64))
    nothing = separation([z], torch.tensor([3, 3, 4, 4]), new=new, margin=0.5, negatives=2, scales=[1.0])
    assert nothing.tolist() == [0.0]


def test_contrastive_longhand():
    features, y, T = [drawn(5, 3), drawn(5, 4, seed=1)], torch.tensor([0, 1, 0, 0, 2]), 0.5
    longhand = []
    for f in features:
        losses = []
        for b in range(5):
            positives = [p for p in range(5) if p != b and y[p] == y[b]]
            if positives:
                denominator = sum(exp(cosine(f[b], f[a]) / T) for a in range(5) if a != b)
                losses.append(-sum(cosine(f[b], f[p]) / T - log(denominator) for p in positives) / len(positives))
        assert len(losses) == 3
        longhand.append(sum(losses) / 3)
    found = contrastive(features, y, temperature=T)
    torch.testing.assert_close(found, torch.tensor(longhand, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda f: contrastive([f], y, temperature=T), drawn(5, 3, grad=True))
    only_first = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    denominator = sum(exp(cosine(features[0][0], features[0][a]) / T) for a in range(1, 5))
    alone = -sum(cosine(features[0][0], features[0][p]) / T - log(denominator) for p in (2, 3)) / 2
    found = contrastive(features[:1], y, temperature=T, weight_B=only_first)
    torch.testing.assert_close(found.item(), alone)


@pytest.mark.parametrize("y", [[0], [0, 1, 2]], ids=str)
def test_contrastive_without_positives_is_zero_with_gradient_zero(y):
    f = drawn(len(y), 3, grad=True)
    loss = contrastive([f], torch.tensor(y), temperature=0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0] and (f.grad == 0).all()


def test_attraction_is_the_mean_distance_to_the_own_prototype():
    cosines, y = [drawn(3, 4), drawn(3, 4, seed=1)], torch.tensor([3, 0, 3])
    longhand = [sum(1 - c[b, int(y[b])].item() for b in range(3)) / 3 for c in cosines]
    torch.testing.assert_close(attraction(cosines, y), torch.tensor(longhand, dtype=torch.float64))


def test_relation_longhand_over_the_batch():
    student, teacher, T = [drawn(4, 5), drawn(4, 5, seed=1)], [drawn(4, 3, seed=2), drawn(4, 3, seed=3)], 2.0
    share = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
    longhand = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for c in range(3):
            p, q = ([exp(v / T) for v in scores[:, c].tolist()] for scores in (t, s))
            p, q = ([v / sum(values) for v in values] for values in (p, q))
            total += share[c].item() * sum(u * log(u / v) for u, v in zip(p, q, strict=True))
        longhand.append(total)
    found = relation(student, teacher, share_C=share, temperature=T)
    torch.testing.assert_close(found, torch.tensor(longhand, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda s: relation([s], teacher[:1], share_C=share, temperature=T), drawn(4, 5, grad=True)
    )


def test_relation_forgets_a_shift_of_all_samples_and_leaves_out_classes_not_met():
    teacher = drawn(4, 3)
    share = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    shifted = teacher + torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(
        relation([shifted], [teacher], share_C=share, temperature=1.0), torch.zeros(1, dtype=torch.float64)
    )
    gap = drawn(4, 3, seed=1).index_fill(1, torch.tensor([1]), -torch.inf).requires_grad_()
    masked = teacher.index_fill(1, torch.tensor([1]), -torch.inf)
    loss = relation([gap], [masked], share_C=share, temperature=1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and gap.grad.isfinite().all() and (gap.grad[:, 1] == 0).all()
    one = relation([drawn(1, 3)], [drawn(1, 3, seed=1)], share_C=share, temperature=1.0)
    torch.testing.assert_close(one, torch.zeros(1, dtype=torch.float64))  # one sample has no rank


def test_a_large_temperature_weakens_the_relation_by_its_square():
    student, teacher, share = [drawn(6, 2)], [drawn(6, 2, seed=1)], torch.ones(2, dtype=torch.float64)
    weak = relation(student, teacher, share_C=share, temperature=1e4)
    weaker = relation(student, teacher, share_C=share, temperature=2e4)
    torch.testing.assert_close(weak / weaker, torch.tensor([4.0], dtype=torch.float64), rtol=1e-3, atol=0)


def test_normalized_features_are_what_contrast_sees():
    f, y = drawn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    scaled = f * torch.arange(1, 7, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(
        contrastive([scaled], y, temperature=0.3), contrastive([normalize(f)], y, temperature=0.3)
    )
