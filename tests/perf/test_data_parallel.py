"""The summary and the checks of the measurements on several devices."""


import data_parallel
import numpy as np
import pytest
import torch
from data_parallel_checks import Run, _largest_difference, check_resumption, expected_rows, once, small_check
from data_parallel_settings import STRATEGIES, Settings, label


def test_rates_are_compared_with_those_of_one_device() -> None:
    row = {"backbone": "vit_b_16", "strategy": "naive"}
    rows = [
        {"check": "naive", "equal_to_one_device": True},
        {**row, "setting": "one", "rate": 100.0, "eval": 200.0},
        {**row, "setting": "same share", "rate": 190.0, "eval": 300.0},
        {**row, "setting": "same batch", "rate": 150.0},
        {**row, "setting": "one, eager", "skipped": "no time left"},
        {"backbone": "resnet32", "strategy": "lwf", "setting": "same share", "rate": 5.0},
    ]
    assert data_parallel.summarize(rows) == [
        {"backbone": "vit_b_16", "strategy": "naive", "one": 100.0, "eval, one / one": 1.0, "same share / one": 1.9,
         "eval, same share / one": 1.5, "same batch / one": 1.5},
    ]  # fmt: skip


def test_shares_that_cover_an_epoch_once() -> None:
    one = [(0, 0, 1.0), (0, 0, 2.0), (0, 1, 1.0)]
    assert once(one, [one[2], one[0], one[1]])
    assert not once(one, one[:2]) and not once([*one, one[0]], [*one, one[0]])


@pytest.mark.parametrize("expression", ["er(memory=20)", "derpp(memory=20)"])
def test_new_samples_are_counted_next_to_replayed_ones(expression) -> None:
    checked = small_check()
    run = Run(expression, checked, device=torch.device("cpu"), group=None)
    assert len(run.rows) == 3 * 26 * 2  # experiences, samples, epochs; replayed ones are left out
    assert once(expected_rows(checked.data, epochs=2), run.rows)


def test_differences_are_relative_and_include_what_is_not_finite() -> None:
    nan, inf = torch.tensor([torch.nan]), torch.tensor([torch.inf])
    one, other = torch.tensor([4.0, 0.1]), torch.tensor([5.0, 0.0])
    assert _largest_difference([one], [other], least=1.0) == pytest.approx(0.2)
    assert _largest_difference([nan, inf], [nan, inf], least=1.0) == 0
    assert _largest_difference([nan], [torch.zeros(1)], least=1.0) == float("inf")


def test_strategies_are_chosen_by_their_names() -> None:
    assert [label(expression) for expression in STRATEGIES["vit_b_16"]] == [
        "naive", "er", "lwf", "derpp", "er + exits", "er + moe",
    ]  # fmt: skip


def test_real_images_of_every_class_are_in_both_streams(tmp_path) -> None:
    y = np.arange(2_000) % 20
    x = np.arange(2_000, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros((1, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "cifar100.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    settings = Settings("vit_b_16", tiny=True, batch=8, data=tmp_path / "cifar100.npz")
    data = settings.benchmark
    assert [len(part) for part in data.train] == [64, 64] and data.input_shape == (3, 8, 8)
    assert [sorted(set(part.y.tolist())) for part in data.test] == [list(range(10)), list(range(10, 20))]
    few = settings.selection(experiences=2, classes=3, images=5)
    assert [len(part) for part in few.train] == [15, 15] and [len(part) for part in few.test] == [9, 9]


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_resumes_on_another_number_of_devices(devices) -> None:
    row = check_resumption(cuda=False, devices=devices)
    assert row["fine"] and row["accuracies_equal"] and row["largest_difference_of_weights"] < 1e-12
