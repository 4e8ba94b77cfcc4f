"""The data race compares like with like: everybody serves every sample once, clframe what the loop by hand does."""

from __future__ import annotations

import data_race
import loaders
import pytest
import torch

# As in tests/data/test_lazy.py; Avalanche's evaluator advises on loggers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning"),
]


@pytest.mark.parametrize("name", loaders.CONTESTANTS)
def test_everybody_serves_every_sample_of_the_first_experience_once(name):
    pictures = data_race.numbered(22)  # shades 1 to 22, classes 0 to 3, of which 0 and 1 come first
    loader = loaders.CONTESTANTS[name](pictures, 4)
    for epoch in range(2):
        batches = [(x, y) for x, y, *_ in loader(epoch)]
        assert [len(y) for _, y in batches] == [4, 4, 4]
        shade, label = (torch.cat(part) for part in zip(*batches, strict=True))
        shade = loaders.bytes_of(shade)[:, 0, 16, 16].long()
        assert shade.sort().values.tolist() == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18, 21, 22]
        assert torch.equal(label, (shade - 1) % 4)


def test_check_accepts_what_races():
    assert data_race.check(data_race.numbered(10), batch=3).startswith(
        "9 loaders serve every sample once; the batches of 4"
    )


@pytest.mark.parametrize("fault, message", [("lost", "serves"), ("twice", "serves"), ("changed", "other batches than")])
def test_check_refuses_a_loader_that(fault, message, monkeypatch):
    name = "clframe, in memory"

    def faulty(pictures, batch):
        def epoch(number):
            first, *rest = loaders.in_memory(pictures, batch)(number)
            if fault == "changed":
                first[0][0, 0, 0, 0] += 1
            yield from {"lost": rest, "twice": [first, first, *rest], "changed": [first, *rest]}[fault]

        return epoch

    kept = {n: loaders.CONTESTANTS[n] for n in (loaders.REFERENCE, name)}
    monkeypatch.setattr(data_race, "CONTESTANTS", {**kept, name: faulty})
    with pytest.raises(SystemExit, match=f"{name}: {message}"):
        data_race.check(data_race.numbered(10), batch=3)


def test_a_race_times_whole_epochs_and_compares_within_repetitions():
    names = [loaders.REFERENCE, "clframe, in memory", loaders.PEERS["processor"]]
    processor, wall = data_race.race(data_race.numbered(12), names, batch=4, repeats=2, leg=1)
    assert list(processor) == names and wall == {}
    assert all(len(taken) == 2 and min(taken) > 0 for taken in processor.values())

    seconds = dict(zip(names, ([1.0, 2.0, 2.0], [2.0, 1.0, 3.0], [8.0, 8.0, 9.0]), strict=True))
    rows = data_race.summarize(seconds, {}, samples=6)
    assert [row["samples_per_second"] for row in rows] == [3.0, 3.0, 0.75]
    assert rows[1]["time_over_reference"] == {"median": 1.5, "min": 0.5, "max": 2.0}
    assert rows[1]["speed_over_avalanche"] == {"median": 4.0, "min": 3.0, "max": 8.0}
    assert len(data_race.table(rows).splitlines()) == 2 + len(rows)
