"""Costs in reports: every number is from the ledger or a measurement, else undefined."""

from __future__ import annotations

import json

import pytest

from clframe.accounting import Energy, Experts, Ledger
from clframe.cli import main
from clframe.report import write_report
from clframe.report.latency import Setting, Timed, Timings, read_timings
from clframe.sparsity.activity import ActivityRecord, ExpertActivity, LayerActivity

SETTING = Setting(device="cpu", processor="x", threads=1, torch="2", dtype="float32", warmup=5, repeats=30, samples=9)
TIMINGS = Timings(
    setting=SETTING,
    rows=tuple(
        Timed(way=way, batch=batch, p50=p50, p95=2 * p50, throughput=batch / p50, macs=macs)
        for way, p50, macs in (("whole network", 0.004, 553.0), ("exit/early", 0.001, 120.0), ("policy", 0.003, 402.5))
        for batch in (1, 32)
    ),
)


def ledger(*, stopped=(7, 13), joules=None, experts=True):
    made = Ledger()
    made.add("evaluation", macs=50, samples=5)
    for index in range(2):
        made.add("forward", macs=1000, experience=index, samples=10, steps=2)
        made.add("backward", macs=1900, experience=index)
        made.add("evaluation", macs=100, experience=index, samples=10)
        made.add_time("training", seconds=1.5, experience=index)
        made.add_time("evaluation", seconds=0.25, experience=index)
        made.add_energy(Energy(joules, "none" if joules is None else "nvml"), experience=index)
    made.add("replay", macs=300, experience=1, samples=3)
    made.add("router", macs=70, experience=1, component="moe")
    made.add_bytes("memory", bytes=640, component="er", experience=1)
    made.add_bytes("process_peak", bytes=4096, experience=1)
    found = made.predictions
    for name, kind, macs, component in (
        ("block", "stage", 100, ""), ("exit/early", "head", 20, "exits"), ("policy/early", "policy", 3, "early_exit"),
        ("block2", "stage", 400, ""), ("exit/final", "head", 30, ""),
    ):  # fmt: skip
        found.add_part(name, kind=kind, macs=macs, component=component, experience=1)
    found.add_stops(names=("early", "final"), cost_K=(123, 553), count_K=stopped, experience=1)
    found.add_products("convolution", macs=4000, effective_macs=1000, samples=4, experience=1)
    found.add_products("head", macs=200, effective_macs=200, samples=4, experience=1)
    if experts:
        row = Experts(layer="block2.mlp", experts=4, samples=2, tokens=10, routed=10, pairs=13, expert_macs=20,
                      router_macs=7, part="block2", experience=1)  # fmt: skip
        found.add_experts(row)
    return made


def numbers(rows, key, *columns):
    return {row[key]: tuple(float(row[column]) for column in columns) for row in rows}


@pytest.mark.usefixtures("without_figures")
def test_a_prediction_by_part_exit_and_role(make_run, read_table):
    page = write_report([make_run("run", (12, 18), ledger=ledger())])
    parts = numbers(read_table(page, "cost"), "part", "MACs", "share", "MACs up to it")
    assert parts["policy/early"] == (3, 3 / 553, 123) and parts["total"] == (553, 1, 553)
    assert [row["component"] for row in read_table(page, "cost")] == ["-", "exits", "early_exit", "-", "-", "-"]
    stops = {row["prediction"]: row for row in read_table(page, "exit_usage")}
    assert (float(stops["up to early"]["MACs"]), float(stops["up to early"]["share"])) == (123, 7 / 20)
    mean = (7 * 123 + 13 * 553) / 20
    assert float(stops["mean"]["MACs"]) == mean
    assert (float(stops["median"]["MACs"]), float(stops["95th percentile"]["MACs"])) == (553, 553)
    left = mean - 13 / 20 * (800 - (13 * 20 + 70)) / 2
    assert float(stops["mean, executed experts only"]["MACs"]) == pytest.approx(left)
    columns = ("dense MACs per sample", "effective MACs per sample", "effective")
    products = numbers(read_table(page, "products"), "role", *columns)
    assert products == {"convolution": (1000, 250, 0.25), "head": (50, 50, 1), "total": (1050, 300, 300 / 1050)}
    (experts,) = read_table(page, "experts")
    assert float(experts["experts per token"]) == 1.3 and float(experts["MACs per sample"]) == (13 * 20 + 10 * 7) / 2
    assert float(experts["share"]) == pytest.approx(330 / 800)
    assert f"{left:,.0f}" in page.read_text()  # among what a reader looks for first


@pytest.mark.usefixtures("without_figures")
def test_what_a_run_took_experience_by_experience(make_run, read_table):
    page = write_report([make_run("run", (12, 18), ledger=ledger())])
    rows = {row["experience"]: row for row in read_table(page, "run_cost_by_experience")}
    assert list(rows) == ["before any training", "0", "1"]
    assert float(rows["before any training"]["evaluation, MACs"]) == 50
    last = rows["1"]
    assert (float(last["router, MACs"]), float(last["replay, MACs"]), float(last["total, MACs"])) == (70, 300, 3370)
    assert (float(last["new samples"]), float(last["replayed samples"]), float(last["optimizer steps"])) == (10, 3, 2)
    took = {row["quantity"]: row for row in read_table(page, "run_totals")}
    assert float(took["whole run, with evaluations"]["value"]) == 50 + 3000 + 3370
    assert (float(took["wall time of training"]["value"]), took["wall time of training"]["unit"]) == (3.0, "s")
    assert float(took["memory of samples"]["value"]) == 640 and float(took["teachers"]["value"]) == 0
    assert (float(took["peak memory of the process"]["value"]), took["peak memory of the process"]["source"]) == (
        4096, "system",
    )  # fmt: skip
    for message in ("energy of training", "peak memory on the device", "newest checkpoint", "latency of a prediction"):
        assert (took[message]["value"], took[message]["source"]) == ("not measured", "-")


@pytest.mark.usefixtures("without_figures")
def test_figures_over_seeds_need_every_seed(make_run, tmp_path, read_table):
    make_run("runs/0", (12, 18), seed=0, ledger=ledger(joules=2.0))
    make_run("runs/1", (12, 18), seed=1, ledger=ledger(joules=3.0))
    took = {row["quantity"]: row for row in read_table(write_report([tmp_path / "runs"]), "run_totals")}
    energy = took["energy of training"]
    assert (float(energy["value"]), energy["source"], energy["unit"]) == (5.0, "nvml", "J")
    assert float(energy["value: deviation"]) == pytest.approx(2**0.5)
    make_run("runs/2", (12, 18), seed=2)  # has no entries
    took = {row["quantity"]: row["value"] for row in read_table(write_report([tmp_path / "runs"]), "run_totals")}
    assert {value for what, value in took.items()} == {"not measured"}


@pytest.mark.usefixtures("without_figures")
def test_latency_stands_beside_macs(make_run, read_table):
    run = make_run("run", (12, 18), timings=TIMINGS)
    page = write_report([run])
    assert read_timings(run) == TIMINGS
    first = read_table(page, "latency")[0]
    assert (first["prediction"], float(first["batch"]), float(first["p50, ms"]), float(first["p95, ms"])) == (
        "whole network", 1, 4.0, 8.0,
    )  # fmt: skip
    assert (float(first["samples per second"]), float(first["MACs per sample"])) == (250, 553)
    assert "not measured; clframe latency" not in page.read_text()
    without = make_run("other", (12, 18))
    assert f"Latency: not measured; clframe latency {without} measures it." in write_report([without]).read_text()


ACTIVITY = tuple(
    ActivityRecord(
        samples_E=(4,) * (index + 1),
        layers={"relu": LayerActivity(neurons=8, sparsity=0.5 + index / 4, sparsity_E=(0.5,) * (index + 1),
                                      overlap_E=(0.25, 1.0)[-index - 1 :], kept_E=(0.75, 1.0)[-index - 1 :])},
        experts={"mlp": ExpertActivity(experts=4, per_token=1.5, per_token_E=(1.5,) * (index + 1), unused=1,
                                       macs_share=0.4)},
    )
    for index in range(2)
)  # fmt: skip


def test_neurons_and_experts_experience_by_experience(make_run, read_table):
    run = make_run("run", (12, 18), ledger=ledger(), timings=TIMINGS, activity=ACTIVITY)
    page = write_report([run])
    (layer,) = read_table(page, "activity")
    assert (float(layer["neurons"]), float(layer["inactive"])) == (8, 0.75)
    assert (float(layer["overlap with when learned"]), float(layer["overlap with the newest"])) == (0.75, 0.25)
    (use,) = read_table(page, "expert_use")
    assert (float(use["experts"]), float(use["experts per token"]), float(use["never used"])) == (4, 1.5, 1)
    found = {path.stem for path in (page.parent / "figures").iterdir()}
    assert found >= {"products", "run_cost", "latency", "sparsity", "experts_per_token"}
    assert read_table(page, "run_totals")[-1]["value"] == "see its table"


@pytest.mark.usefixtures("without_figures")
def test_groups_are_compared_at_what_their_own_decision_costs(make_run, tmp_path, exits, read_table):
    """The base has one exit and reaches 0.75; the other reaches 0.8 under its exit policy and 0.7 at its last exit."""
    make_run("base", (12, 18), macs=1000)
    records = [exits(0.5, 0.9), exits(0.2, 0.7)]
    other = ledger(experts=False)
    make_run("other", (14, 18), strategy="er + exits", records=records, ledger=other)
    (equal,) = read_table(write_report([tmp_path / "base", tmp_path / "other"]), "equal_accuracy")
    own = (7 * 123 + 13 * 553) / 20  # at 0.8; everything is 400 MACs at 0.7
    assert float(equal["MACs needed"]) == pytest.approx((own + 400) / 2)
    # with experts of which some rest, the whole network costs those that run
    make_run("routed", (12, 18), strategy="naive", ledger=ledger(stopped=(0, 20)), records=[exits(0.5, 0.75)] * 2)
    (equal,) = read_table(write_report([tmp_path / "base", tmp_path / "routed"]), "equal_accuracy")
    assert float(equal["MACs needed"]) == 553 - (800 - 330) / 2


def _with(name, change):
    def damage(run):
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(content))

    return damage


def _put(*path, value):
    def put(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return put


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_with("ledger.json", _put("ledger", "schema_version", value=2)), "ledger: has schema 2, this version reads 1"),
        (_with("ledger.json", _put("ledger", value=[])), "ledger: has schema None"),
        (_with("ledger.json", _put("ledger", "times", 0, "seconds", value="long")), "seconds is 'long'"),
        (_with("ledger.json", _put("ledger", "entries", 0, "macs", value=None)), "macs is None"),
        (_with("ledger.json", _put("ledger", "predictions", "stops", 0, "samples", value=-1)), "samples -1"),
        (_with("ledger.json", _put("ledger", "predictions", value=7)), "ledger: is damaged"),
        (_with("latency.json", _put("schema_version", value=9)), "latency.json: has schema 9, this version reads 1"),
        (_with("latency.json", _put("rows", 0, "p50", value="fast")), "latency.json: is damaged"),
        (_with("latency.json", _put("setting", value=None)), "latency.json: is damaged"),
        (lambda run: (run / "latency.json").write_text("["), "latency.json: is damaged"),
    ],
)
def test_damaged_costs_are_one_line(damage, message, make_run, capsys):
    run = make_run("run", (12, 18), ledger=ledger(), timings=TIMINGS)
    damage(run)
    assert main(["report", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("clframe: error: ") and ";" in err and message in err
    assert not (run / "report").exists()


def test_several_problems_of_a_config_are_a_line_each(make_run, capsys):
    run = make_run("run", (12, 18))
    (run / "config.yaml").write_text("nonsense: 1\nother: 2\n")
    assert main(["report", str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all(line.startswith(f"clframe: error: {run / 'config.yaml'}: ") for line in lines)
    assert any("nonsense" in line for line in lines) and any("other" in line for line in lines)


@pytest.mark.usefixtures("without_figures")
def test_what_is_no_number_is_not_shown_as_one(make_run, read_table):
    """JSON has no NaN, but Python reads and writes it."""
    run = make_run("run", (12, 18), ledger=ledger(), timings=TIMINGS)
    for name, old, new in (
        ("ledger.json", '"seconds": 1.5', '"seconds": NaN'), ("latency.json", '"p50": 0.004', '"p50": NaN'),
    ):  # fmt: skip
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
    page = write_report([run])
    took = {row["quantity"]: row["value"] for row in read_table(page, "run_totals")}
    assert took["wall time of training"].startswith("undefined")
    assert read_table(page, "latency")[0]["p50, ms"].startswith("undefined")
