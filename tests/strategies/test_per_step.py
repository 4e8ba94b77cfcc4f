"""Replay buffers that admit samples after every step, and batches whose parts pass through the network apart."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clframe.core import Batch, Experience, Step, StepContext, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.epoch_loader import EpochLoader
from clframe.data.streams import online_stream
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.types import Output
from clframe.replay.buffers import MemoryPolicy, add_to_reservoir
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import DER, ER, DERpp


def source(per_class=20, classes=4, side=2):
    """Bytes, each image its own number in the first two pixels, so that stored samples can be told apart."""
    y = torch.arange(classes).repeat(per_class)
    x = torch.zeros(len(y), 1, side, side, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(len(y)), 40 * y.to(torch.uint8)
    data = TensorSamples(x, y, mean=(60.0,), std=(50.0,))
    return Source("numbered", data, data, classes=classes)


def train(expression, benchmark, *, epochs=1, size=4, exits=0, on_step=None, **options):
    torch.manual_seed(0)
    network = Network(
        BACKBONES.get("mlp")(benchmark.input_shape, width=6), exits=[("layer1", GrowingLinear(6)) for _ in range(exits)]
    )
    module = ContinualModule(network, expression, optimizer=partial(torch.optim.SGD, lr=0.05), seed=3)
    strategy = LightningStrategy(
        model=module, benchmark=benchmark, train_mb_size=size, train_epochs=epochs, eval_mb_size=64, evaluator=None,
        **options,
    )  # fmt: skip
    strategy.on_step = on_step
    for experience in benchmark.avalanche.train_stream:
        strategy.train(experience)
    return module


def test_a_reservoir_holds_the_samples_of_the_smallest_keys_whatever_the_portions():
    memory, generator = MemoryPolicy(7, "total", "reservoir").empty(), generator_for(0)
    keys, offered = [], 0
    for portion in (3, 2, 5, 1, 8, 4, 4):
        number_N = torch.arange(offered, offered + portion)
        columns = {"x": number_N.reshape(-1, 1).float(), "y": number_N, "logits": number_N.reshape(-1, 1, 1) * 2.0}
        memory = add_to_reservoir(memory, columns, 7, generator=generator)
        offered += portion
    generator = generator_for(0)
    for portion in (3, 2, 5, 1, 8, 4, 4):
        keys.append(torch.rand(portion, generator=generator, dtype=torch.float64))
    expected = torch.cat(keys).argsort()[:7]
    assert sorted(memory["y"].tolist()) == sorted(expected.tolist())
    assert torch.equal(memory["x"].flatten(), memory["y"].float())
    assert torch.equal(memory["logits"].flatten(), memory["y"] * 2.0)
    assert torch.equal(memory["key"], torch.cat(keys)[memory["y"]])


def test_every_sample_offered_is_stored_with_the_same_probability():
    counts, generator = torch.zeros(12), generator_for(1)
    for _ in range(3000):
        memory = MemoryPolicy(3, "total", "reservoir").empty()
        for number_N in torch.arange(12).split(5):
            memory = add_to_reservoir(memory, {"x": number_N[:, None], "y": number_N}, 3, generator=generator)
        counts[memory["y"]] += 1
    assert counts.sum() == 9000
    # 750 of each expected; the standard deviation of a count is sqrt(3000 / 4 * 3 / 4) = 24
    assert float((counts - 750).abs().max()) < 5 * 24


def test_rows_stored_before_a_class_was_learned_get_no_logit_for_it():
    memory, generator = MemoryPolicy(3, "total", "reservoir").empty(), generator_for(2)
    for width in (2, 2, 3, 3):
        columns = {"x": torch.rand(4, 1), "y": torch.full((4,), width), "logits": torch.ones(4, 1, width)}
        memory = add_to_reservoir(memory, columns, 3, generator=generator)
    assert memory["logits"].shape == (3, 1, 3)
    old_N = memory["y"] == 2
    assert bool(torch.isinf(memory["logits"][old_N, 0, 2]).all()) and not bool(torch.isinf(memory["logits"][~old_N]).any())


@pytest.mark.parametrize("replay", ["extra", "half", "fixed"])
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_a_run_stores_inputs_as_the_data_has_them_with_their_labels(replay, engine):
    options = {"engine": "trainer"} if engine == "trainer" else {}
    data = source()
    module = train(
        f"er(memory=15, selection='reservoir', update='step', replay='{replay}', replayed=3)",
        class_incremental(data, experiences=2, order="sorted"), epochs=2, **options,
    )  # fmt: skip
    memory = module.learner.state["er"]
    number_M = memory["x"][:, 0, 0, 0].long()
    assert memory["x"].dtype == torch.uint8 and len(memory["y"]) == 15
    assert torch.equal(memory["y"], data.train.y[number_M]) and torch.equal(memory["x"], data.train.x[number_M])
    assert set(memory["y"].tolist()) & {2, 3} and set(memory["y"].tolist()) & {0, 1}


def test_halved_batches_from_the_first_step_on_and_replay_from_the_second():
    sizes = []
    train("er(memory=15, selection='reservoir', update='step', replay='half')",
          class_incremental(source(), experiences=2, order="sorted"),
          on_step=lambda strategy: sizes.append((len(strategy.mb_y), len(strategy.batch.stored()))))  # fmt: skip
    assert sizes == [(2, 2)] + [(4, 2)] * 39


@pytest.mark.parametrize("boundaries", [True, False])
def test_on_an_online_stream_the_buffer_admits_every_small_experience(boundaries):
    benchmark = online_stream(class_incremental(source(), experiences=2, order="sorted"), size=8, boundaries=boundaries)
    seen = []

    def note(strategy):
        seen.append(set(strategy.learner.state["er"]["y"].tolist()))

    train("er(memory=80, selection='reservoir', update='step')", benchmark, on_step=note)
    assert seen[0] and seen[0] <= {0, 1}  # after the first of 20 steps, not after the tenth
    assert len(seen) == 20 and seen[-1] == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["der", "derpp"])
def test_logits_are_those_of_the_step_that_trained_on_the_sample(kind):
    recorded = {}

    def note(strategy):
        stored = strategy.batch.stored()
        for row, number in enumerate(stored[:, 0, 0, 0].tolist()):
            recorded[number] = torch.stack([logits_BC[row].detach() for logits_BC in strategy.output.logits])

    module = train(f"{kind}(memory=40, update='step')", class_incremental(source(), experiences=1, order="sorted"),
                   exits=1, on_step=note)  # fmt: skip
    memory = module.learner.state[kind]
    assert memory["logits"].shape == (40, 2, 4)
    for number, logits_KC in zip(memory["x"][:, 0, 0, 0].tolist(), memory["logits"], strict=True):
        assert torch.equal(logits_KC, recorded[number])


def test_the_state_round_trips_through_a_checkpoint():
    module = train("der(memory=9, update='step')", class_incremental(source(), experiences=2, order="sorted"))
    before, after = module.learner.state["der"], decode(encode(module.learner.state), module.network)["der"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in ("x", "y", "key", "logits"))


def test_experience_is_the_default_and_acts_at_its_end_only():
    assert "after_step" not in ER().acts_at() and "after_experience" in ER().acts_at()
    step = ER(update="step", selection="reservoir")
    assert "after_step" in step.acts_at() and "after_experience" not in step.acts_at()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: ER(update="step"), r"components\.er\.update: found step with selection balanced"),
        (lambda: DER(update="step", selection="random"), r"components\.der\.update: found step with selection random"),
        (lambda: ER(update="step", selection="reservoir", replay="concatenate"), r"components\.er\.update: found step with replay"),
        (lambda: ER(batches="apart", replay="concatenate"), r"components\.er\.batches: found apart with replay"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


def test_a_loader_without_stored_inputs_is_refused():
    er, samples = ER(update="step", selection="reservoir"), source().train
    context = StepContext(Experience(0, 1, (0,), (), (), samples), 0, 1, generator_for(0))
    step = Step(Batch(torch.zeros(2, 4), torch.zeros(2).long()), Output((torch.zeros(2, 1),)), context, None)
    with pytest.raises(UnsupportedError, match=r"components\.er\.update: found step, but the loader"):
        er.after_step(None, step, er.init_state(None))


def normalized():
    """A small convolutional network whose batch statistics make the difference."""
    torch.manual_seed(0)
    network = Network(BACKBONES.get("resnet20")((1, 8, 8)))
    network.grow(range(3))
    return network


def test_parts_pass_through_the_network_apart():
    network, x = normalized(), torch.randn(6, 1, 8, 8)
    x[4:] += 3
    twin = normalized()
    taps = network.backbone.names[:2]
    joint, apart = network(x, taps=taps), normalized()(x, taps=taps, parts=(4, 2))
    pieces = [twin(part, taps=taps) for part in (x[:4], x[4:])]
    torch.testing.assert_close(apart.last, torch.cat([piece.last for piece in pieces]))
    for tap in taps:
        torch.testing.assert_close(apart.taps[tap], torch.cat([piece.taps[tap] for piece in pieces]))
    assert float((apart.last - joint.last).abs().max().detach()) > 0.1
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x, parts=(4, 2)).last, network(x).last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "component, parts",
    [
        (ER(memory=9, batches="apart"), (5, 5)),
        (DER(memory=9, batches="apart"), (5, 5)),
        (DERpp(memory=9, batches="apart"), (5, 5, 5)),
        (DERpp(memory=9, batches="apart", draws="one"), (5, 5)),
        (DERpp(memory=9), ()),
    ],
)
def test_each_draw_is_a_part(component, parts):
    network = Network(BACKBONES.get("mlp")((1, 2, 2), width=5))
    network.grow(range(4))
    samples = source().train
    context = StepContext(Experience(0, 2, (0, 1, 2, 3), (), (), samples), 0, 1, generator_for(0))
    state = component.after_experience(network, context, component.init_state(network))
    batch = component.make_batch(Batch(torch.rand(5, 1, 2, 2), torch.zeros(5).long()), context, state, network)
    assert batch.parts == parts and len(batch.y) == (sum(parts) or 15)


def test_a_run_apart_has_the_statistics_of_two_passes():
    """Batch normalization counts the passes that update its running statistics."""
    benchmark = class_incremental(source(side=8), experiences=2, order="sorted")
    passes = {}
    for batches in ("joint", "apart"):
        torch.manual_seed(0)
        network = Network(BACKBONES.get("resnet20")(benchmark.input_shape))
        module = ContinualModule(
            network, parse(f"er(memory=8, batches='{batches}')"), optimizer=partial(torch.optim.SGD, lr=0.01), seed=3
        )
        strategy = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=20, train_epochs=1,
                                     eval_mb_size=64, evaluator=None)  # fmt: skip
        for experience in benchmark.avalanche.train_stream:
            strategy.train(experience)
        buffers = dict(network.named_buffers())
        passes[batches] = next(value for name, value in buffers.items() if name.endswith("num_batches_tracked"))
    assert int(passes["joint"]) == 4 and int(passes["apart"]) == 6  # 2 + 2 steps; the last two in two parts


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "join_single": True}, {"drop_last": True}])
def test_a_loader_returns_the_stored_inputs_of_any_batch_of_its_epoch(options):
    data = source().train.subset(torch.arange(13))
    loader = EpochLoader(data, 4, seed=3, **options)
    for epoch in range(2):
        loader.epoch = epoch
        for number, (x, y) in enumerate(loader):
            assert torch.equal(data.prepare(loader.stored(number, len(y))), x)
