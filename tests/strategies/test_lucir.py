"""LUCIR: its terms longhand at every exit, what it fixes, and what it does for old classes."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch.nn.functional import cosine_similarity

from clframe.core import compose
from clframe.errors import ComposeError, ConfigError
from clframe.training.checkpoint import decode, encode
from strategies import ER, LUCIR, Exits, PODNet


@pytest.mark.parametrize("exits", [False, True])
def test_terms_are_the_formulas_at_every_exit(on_digits, exits):
    lucir = LUCIR(less_forget=3.0, separate=2.0, margin=0.4, negatives=1)
    run = on_digits.learn(
        on_digits.learner(lucir, *([Exits(at=("block1", "block2"))] if exits else [])), last=1, epochs=1, per_class=8
    )
    teacher = run.state["lucir"]["teacher"]
    on_digits.changed(run)
    step = on_digits.step(run, [2, 0, 3, 1, 0])
    state = lucir.before_experience(run.network, step.context, run.state["lucir"])
    terms = lucir.losses(step, state)
    old = teacher(step.batch.x, taps=run.taps).taps
    taps = ["block1", "block2", "hidden"] if exits else ["hidden"]
    assert set(terms) == set(LUCIR.terms)
    for k, tap in enumerate(taps):
        new_f, old_f = (t[tap].mean((2, 3)) if t[tap].dim() == 4 else t[tap] for t in (step.output.taps, old))
        distance = (1 - cosine_similarity(new_f, old_f, dim=1)).mean()
        torch.testing.assert_close(terms["less_forget"][k], 3.0 * sqrt(2 / 2) * distance)
        cos = step.output.logits[k] / run.network.heads[k].scale
        hinges = [max(0.0, 0.4 - cos[b, c].item() + cos[b, 2:].max().item()) for b, c in ((1, 0), (3, 1), (4, 0))]
        torch.testing.assert_close(terms["separate"][k].item(), 2.0 * sum(hinges) / 3, rtol=1e-4, atol=1e-5)
    assert len(terms["separate"]) == len(taps) and terms["less_forget"].min() > 0


def test_the_first_experience_is_a_cosine_classifier_alone(on_digits):
    run = on_digits.learner(LUCIR(eta=4.0))
    run.begin(on_digits.experience(0), classes=(0, 1), epochs=1)
    run.before_epoch(0)
    x = torch.randn(3, 1, 8, 8)
    assert LUCIR().losses(on_digits.step(run, [0, 1, 0], classes=(0, 1), past=()), run.state["lucir"]) == {}
    assert run.network(x).last.abs().max() <= 4.0
    assert run.network.final.scale.requires_grad


def test_features_are_held_more_the_more_old_classes_there_are_for_a_new_one(on_digits):
    run = on_digits.learner(LUCIR())
    run.network.grow(range(5))
    context = on_digits.step(run, [4], classes=(4,), past=(0, 1, 2, 3)).context
    state = LUCIR().before_experience(run.network, context, run.state["lucir"])
    assert state["factor"] == 2.0 and state["new"].tolist() == [4]
    again = on_digits.step(run, [4], classes=(0, 1), past=(0, 1)).context
    assert LUCIR().before_experience(run.network, again, state)["new"] is None  # nothing new to be held apart from


@pytest.mark.parametrize("heads", ["per_experience", "growing"])
def test_old_rows_stay_and_new_ones_learn_at_every_exit(on_digits, heads):
    run = on_digits.learn(
        on_digits.learner(LUCIR(), ER(memory=12), Exits(at=("block1",), heads=heads)), last=1, epochs=1, per_class=8
    )
    x = torch.randn(4, 32)

    def rows():
        if heads == "growing":
            return [head.weight for head in (run.network.heads[0].classifier, run.network.final)]
        return [run.network.heads[0].heads[0].classifier.weight, run.network.final.weight]

    before = [row[:2].detach().clone() for row in rows()]
    on_digits.learn(run, first=1, last=2, epochs=1, per_class=8)
    after = rows()
    assert all(torch.equal(a, b[:2]) for a, b in zip(before, after, strict=True))
    eta = run.network.final.scale.item()
    assert eta != 10.0 and run.network.final(x).abs().max() <= eta + 1e-5
    free = on_digits.learn(on_digits.learner(LUCIR(old="learn"), ER(memory=12), Exits(at=("block1",), heads=heads)), last=2, epochs=1,
                 per_class=8)  # fmt: skip
    assert not torch.equal(before[1], free.network.final.weight[:2])


def test_old_classes_are_kept_with_a_memory_and_a_resumed_run_is_the_same(on_digits, tmp_path):
    parts = (LUCIR(less_forget=5.0), ER(memory=30))
    whole = on_digits.learn(on_digits.learner(*parts))
    replay = on_digits.learn(on_digits.learner(ER(memory=30)))
    old, replayed = on_digits.accuracy(whole, (0, 1, 2, 3))[0], on_digits.accuracy(replay, (0, 1, 2, 3))[0]
    assert old > replayed + 0.1 and on_digits.accuracy(whole, (4, 5))[0] > 0.6, (old, replayed)
    half = on_digits.learn(on_digits.learner(*parts), last=2)
    torch.save({"network": half.network.state_dict(), "state": encode(half.state)}, tmp_path / "half")
    saved = torch.load(tmp_path / "half", weights_only=True)
    again = on_digits.learner(*parts)
    again.network.load_state_dict(saved["network"])
    again.state, again.past = decode(saved["state"], again.network), half.past
    on_digits.learn(again, first=2)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_without_a_memory_it_holds_features_and_runs(on_digits):
    run = on_digits.learn(on_digits.learner(LUCIR()), epochs=1, per_class=5)
    terms = run.flush_terms()
    # 1 - cosine of nearly equal features: 0 up to rounding, on either side of it.
    assert terms["loss/lucir/less_forget"] > -1e-6 and terms["loss/lucir/separate"] == 0


@pytest.mark.parametrize(
    ("options", "found"),
    [({"less_forget": -1.0}, "less_forget: found -1.0; give a number of at least 0"),
     ({"negatives": 0}, "negatives: found 0; give at least 1"), ({"eta": 0.0}, "eta: found 0.0; give a number above 0")],
)  # fmt: skip
def test_options_that_cannot_be_are_one_line(options, found):
    with pytest.raises(ConfigError, match=rf"^components\.lucir\.{found}$"):
        LUCIR(**options)


def test_two_kinds_of_classifier_are_refused():
    with pytest.raises(ComposeError, match="'lucir' and 'podnet' both own the slot 'classifier'"):
        compose(LUCIR(), PODNet())
