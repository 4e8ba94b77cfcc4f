"""The ledger: sums over entries, exact tables of exits, and the way to a file and back."""

from __future__ import annotations

import json

import pytest

from clframe.accounting import PHASES, Energy, Ledger
from clframe.errors import ConfigError, RunFolderError, UnknownNameError


def filled():
    ledger = Ledger()
    ledger.add("forward", macs=1000, experience=0, samples=10, steps=2)
    ledger.add("backward", macs=1900, experience=0)
    ledger.add("forward", macs=500, experience=1, samples=5, steps=1, effective_macs=200)
    ledger.add("teachers", macs=400, experience=1, component="lwf")
    ledger.add("replay", macs=300, experience=1, samples=3)
    ledger.add("evaluation", macs=10 * 3, experience=1, exit="a", samples=3)
    ledger.add("evaluation", macs=50 * 2, experience=1, exit="final", samples=2)
    return ledger


def test_questions_are_sums():
    ledger = filled()
    assert ledger.by_phase() == {
        "forward": 1500, "backward": 1900, "replay": 300, "teachers": 400, "evaluation": 30 + 100
    }  # fmt: skip
    assert list(ledger.by_phase()) == [phase for phase in PHASES if phase in ledger.by_phase()]
    assert ledger.by_phase(experience=0) == {"forward": 1000, "backward": 1900}
    assert ledger.by_component() == {"": 1500 + 1900 + 300 + 130, "lwf": 400}
    assert ledger.by_exit(experience=1) == {"": 1200, "a": 30, "final": 100}
    assert ledger.by_experience() == {0: 2900, 1: 1330}
    assert ledger.macs == 4230 == sum(ledger.by_phase().values()) and ledger.training_macs == 4100
    assert (ledger.samples(), ledger.samples("replay"), ledger.samples("evaluation")) == (15, 3, 5)
    assert (ledger.steps(), ledger.steps(experience=1)) == (3, 1)


def test_effective_counts_stand_beside_dense_ones():
    ledger = filled()
    assert ledger.by_phase(count="effective")["forward"] == 1000 + 200
    assert ledger.by_component(count="effective") == {"": 3830 - 300, "lwf": 400}
    ledger.add("forward", macs=7, effective_macs=0)
    assert ledger.by_experience(count="effective")[None] == 0


def test_wall_time_and_bytes():
    ledger = Ledger()
    ledger.add_time("training", seconds=1.5, experience=0)
    ledger.add_time("training", seconds=2.0, experience=1)
    ledger.add_time("evaluation", seconds=0.25, experience=1)
    assert ledger.seconds() == {"training": 3.5, "evaluation": 0.25}
    assert ledger.seconds(experience=0) == {"training": 1.5}
    for index, (memory, peak) in enumerate([(10, 900), (30, 500)]):
        ledger.add_bytes("memory", bytes=memory, component="er", experience=index)
        ledger.add_bytes("device_peak", bytes=peak, experience=index)
    ledger.add_bytes("memory", bytes=5, component="der")
    assert ledger.bytes() == {"memory": 35, "device_peak": 900}


def test_energy_is_summed_only_where_it_was_measured_throughout():
    ledger = Ledger()
    assert ledger.energy() == Energy(None, "none")
    ledger.add_energy(Energy(2.0, "nvml"))
    ledger.add_energy(Energy(3.5, "nvml"))
    assert ledger.energy() == Energy(5.5, "nvml")
    ledger.add_energy(Energy(None, "nvml"))
    assert ledger.energy() == Energy(None, "nvml")
    ledger.add_energy(Energy(1.0, "rapl"))
    assert ledger.energy() == Energy(None, "none")


def test_there_and_back():
    ledger = filled()
    ledger.add_time("training", seconds=0.125, experience=0)
    ledger.add_bytes("memory", bytes=10, component="er")
    ledger.add_energy(Energy(None, "none"), experience=0)
    ledger.add_figure("auxiliary_steps", value=3, component="ancl")
    ledger.add_uncounted({"aten._fft_r2c": 2})
    ledger.add_uncounted({"aten._fft_r2c": 1, "aten.a": 1})
    back = Ledger.from_json(ledger.to_json())
    assert back.as_tree() == ledger.as_tree() and back.entries == ledger.entries
    assert back.uncounted() == {"aten._fft_r2c": 3, "aten.a": 1}
    assert back.figures() == {("ancl", "auxiliary_steps"): 3}
    assert json.loads(ledger.to_json())["convention"].startswith("macs: one multiply-add counts 1")
    newer = ledger.as_tree()
    newer["entries"][0]["of_the_future"] = 1
    assert Ledger.of(newer).entries == ledger.entries


def test_what_cannot_be_is_refused():
    ledger = Ledger()
    with pytest.raises(UnknownNameError, match="phase.*forwards.*forward"):
        ledger.add("forwards", macs=1)
    for wrong in ({"macs": -1}, {"macs": 1, "steps": -1}, {"macs": 1, "effective_macs": 2}):
        with pytest.raises(ConfigError, match="ledger: found macs"):
            ledger.add("forward", **wrong)
    assert ledger.entries == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("[]", "has schema None, this version reads 1"),
        ('{"schema_version": 2}', "has schema 2"),
        ('{"schema_version": 1}', "is damaged"),
        (filled().to_json().replace('"macs": 1000', '"macs": "x"'), "is damaged"),
        (filled().to_json().replace('"forward"', '"foreword"'), "is damaged"),
        (filled().to_json().replace('"experience": 1', '"experience": "one"'), "is damaged .experience is 'one'"),
        (filled().to_json().replace('"times": []', '"times": [{"phase": "training", "seconds": "long"}]'), "seconds is 'lo"),
        (filled().to_json().replace('"times": []', '"times": [{"phase": "training"}]'), "is damaged"),
        (filled().to_json().replace('"times": []', '"times": [7]'), "is damaged"),
    ],
)
def test_a_damaged_file_is_one_line(text, says):
    with pytest.raises(RunFolderError, match=says) as caught:
        Ledger.from_json(text)
    assert "\n" not in str(caught.value)
