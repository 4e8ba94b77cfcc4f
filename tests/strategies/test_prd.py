"""PRD: prototypes at every exit, its terms longhand, what moves what, and what it does without a memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from clframe.core import compose
from clframe.errors import ConfigError
from clframe.exits.head_kinds import prototype_head
from clframe.functional.representation import contrastive
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp
from clframe.training.checkpoint import decode, encode
from strategies import LUCIR, PRD, Exits, LwF


def features_of(taps, name):
    return taps[name].mean((2, 3)) if taps[name].dim() == 4 else taps[name]


def cosines(features_BF, rows_CF):
    return cosine_similarity(features_BF.unsqueeze(1), rows_CF.unsqueeze(0), dim=2)


def rows(network):
    return [getattr(head, "classifier", head).weight for head in network.heads]


@pytest.mark.parametrize("over", ["classes", "samples"])
@pytest.mark.parametrize("exits", [False, True])
def test_terms_are_the_formulas_at_every_exit(on_digits, exits, over):
    prd = PRD(attract=3.0, distill=2.0, distill_temperature=0.5, over=over, projection=5, hidden=7)
    parts = [prd, Exits(at=("block1", "block2"))] if exits else [prd]
    run = on_digits.learn(on_digits.learner(*parts), last=2, epochs=1, per_class=8)
    state = run.state["prd"]
    on_digits.changed(run, classes=(4, 5))
    step = on_digits.step(run, [4, 5, 5, 4, 4], classes=(4, 5), past=(0, 1, 2, 3))
    terms, task = prd.losses(step, state), prd.task_loss(step, state)
    old = state["teacher"](step.batch.x, taps=run.taps).taps
    names = ["block1", "block2", "hidden"] if exits else ["hidden"]
    assert run.network.exit_taps == tuple(names)
    for k, name in enumerate(names):
        new_f, old_f = features_of(step.output.taps, name), features_of(old, name)
        new_s, old_s = cosines(new_f, rows(run.network)[k]), cosines(old_f, rows(state["teacher"])[k])
        own = torch.stack([new_s[b, c] for b, c in enumerate(step.batch.y.tolist())])
        torch.testing.assert_close(terms["attract"][k], 3.0 * (1 - own).mean())
        distance = 0.0
        for group in ([0, 1], [2, 3]):
            p, q = (s[:, group] / 0.5 for s in (old_s, new_s))
            if over == "samples":
                p, q = p.T, q.T
            p, q = log_softmax(p, 1), log_softmax(q, 1)
            distance = distance + kl_div(q, p, reduction="batchmean", log_target=True)
        torch.testing.assert_close(terms["relation"][k], 2.0 * distance)
        projected = run.network.extras["prd"][k](new_f)
        torch.testing.assert_close(task[k], contrastive([projected], step.batch.y, temperature=0.1)[0])
        torch.testing.assert_close(step.output.logits[k], new_s / 0.1, rtol=1e-4, atol=1e-4)


def test_attraction_moves_prototypes_alone_and_relation_features_too(on_digits):
    run = on_digits.learn(on_digits.learner(PRD()), last=1, epochs=1, per_class=8)
    step = on_digits.step(on_digits.changed(run), [2, 3, 3])
    terms = PRD().losses(step, run.state["prd"])
    backbone, prototypes = run.network.backbone.stages[0][0].weight, run.network.final.weight
    attract, none = torch.autograd.grad(terms["attract"].sum(), [prototypes, backbone], retain_graph=True,
                                        allow_unused=True)  # fmt: skip
    assert none is None
    assert (attract[:2] == 0).all() and (attract[2:] != 0).any(1).all()
    relation, moved = torch.autograd.grad(terms["relation"].sum(), [prototypes, backbone])
    assert (relation[:2] != 0).any(1).all() and (relation[2:] == 0).all() and (moved != 0).any()
    assert not any(name.endswith("eta") for name, _ in run.network.named_parameters())


def test_heads_give_way_to_prototypes_on_the_same_taps():
    network = Network(mlp((4,), width=3, depth=3), exits=[("layer1", GrowingLinear(3)), ("layer2", GrowingLinear(3))])
    PRD().setup_network(network)
    network.grow([0, 1])
    assert network.exit_names == ("layer1", "layer2", "final")
    assert all(float(head.scale) == pytest.approx(10.0) for head in network.heads)
    assert [layers[0].in_features for layers in network.extras["prd"]] == [3, 3, 3]
    x = torch.randn(2, 5, 7)
    head = prototype_head((5, 7))  # tokens: the first one
    head.grow([0, 1])
    torch.testing.assert_close(head(x), head.classifier(x[:, 0]))


def test_no_projection_contrasts_the_features(on_digits):
    prd = PRD(projection=0, temperature=0.3)
    run = on_digits.learner(prd)
    run.network.grow([0, 1])
    step = on_digits.step(run, [0, 1, 0, 1], classes=(0, 1), past=())
    assert "prd" not in run.network.extras
    expected = contrastive([step.output.taps["hidden"]], step.batch.y, temperature=0.3)
    torch.testing.assert_close(prd.task_loss(step, run.state["prd"]), expected)
    assert set(prd.losses(step, run.state["prd"])) == {"attract"}


def test_linear_probes_leave_the_backbone_to_the_last_exit(on_digits):
    run = on_digits.learner(PRD(), Exits(at=("block1",), gradient="detached"))
    run.network.grow([0, 1])
    step = on_digits.step(run, [0, 1, 0, 1], classes=(0, 1), past=())
    probe, own = PRD().task_loss(step, run.state["prd"])
    weight = run.network.backbone.stages[0][0].weight
    assert torch.autograd.grad(probe, [weight], retain_graph=True)[0].eq(0).all()
    assert torch.autograd.grad(own, [weight])[0].abs().sum() > 0


@pytest.mark.slow
def test_without_a_memory_old_classes_are_kept_and_a_resumed_run_is_the_same(on_digits, tmp_path):
    parts = (PRD(hidden=32, projection=16), Exits(at=("block2",)))
    whole = on_digits.learn(on_digits.learner(*parts), epochs=8)
    teacher = on_digits.learn(on_digits.learner(LwF()), epochs=8)
    kept, distilled = on_digits.accuracy(whole, range(6)), on_digits.accuracy(teacher, range(6))
    assert kept[-1] > distilled[-1] + 0.2, (kept, distilled)
    half = on_digits.learn(on_digits.learner(*parts), last=2, epochs=8)
    torch.save({"network": half.network.state_dict(), "state": encode(half.state)}, tmp_path / "half")
    saved = torch.load(tmp_path / "half", weights_only=True)
    again = on_digits.learner(*parts)
    again.network.load_state_dict(saved["network"])
    again.state, again.past = decode(saved["state"], again.network), half.past
    on_digits.learn(again, first=2, epochs=8)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_one_class_and_one_sample_at_a_time_is_finite(on_digits):
    run = on_digits.learn(on_digits.learner(PRD(hidden=8)), epochs=2, per_class=1)
    assert all(bool(p.isfinite().all()) for p in run.network.parameters())


def test_options_that_cannot_be_are_one_line():
    for options in ({"temperature": 0.0}, {"distill": -1.0}, {"projection": -1}, {"hidden": 0}):
        with pytest.raises(ConfigError, match=rf"^components\.prd\.{next(iter(options))}: found"):
            PRD(**options)
    with pytest.raises(ValueError, match="'lucir' and 'prd' both own the slot 'classifier'"):
        compose(LUCIR(), PRD())
