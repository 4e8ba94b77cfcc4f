"""``clframe runs``: what the files of run folders say."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from clframe.cli import runs
from clframe.run_folder import RunFolder
from clframe.run_states import RunState, find_folders, read_state

NOW = time.mktime((2026, 11, 29, 18, 0, 0, 0, 0, -1))


def add(folder, *, log=(), results=None, checkpoints=(), **config):
    """Write a run folder."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {"name": "mine", "strategy": "er", "benchmark": {"name": "digits"}, "seed": 0, **config}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "environment.json").write_text("{}")
    (folder / "log.txt").write_text("".join(f"2026-11-29 17:{minute:02d}:00  {text}\n" for minute, text in log))
    for name in checkpoints:
        (folder / "checkpoints" / name).touch()
    if results is not None:
        values = {"schema_version": 2, **config, "benchmark": config["benchmark"]["name"],
                  "backbone": config.get("backbone", {}).get("name", ""), "macs": 1000, "diverged": [],
                  "metrics": {"final_average_accuracy": results[0], "forgetting": results[1]}}  # fmt: skip
        (folder / "results.json").write_text(json.dumps(values))
    return folder


def lines(out):
    return [line.split() for line in out.splitlines()]


@pytest.fixture
def several(here):
    """Three finished runs and one that was stopped."""
    root = here / "runs" / "mine"
    add(root / "er-seed0-20261129-170000", log=[(1, "started"), (2, "finished")], results=(0.5, 0.25))
    add(
        root / "er+exits-seed1-20261129-170500",
        log=[(6, "finished")],
        results=(0.75, 0.5),
        strategy="er + exits",
        seed=1,
    )
    add(root / "20261128-170000-seed2", results=(0.625, None), seed=2, benchmark={"name": "cifar100"})
    add(root / "lwf-seed0-20261129-171500", strategy="lwf(alpha=2)", log=[(15, "started")])
    return root


def test_the_table(call, several):
    code, out, err = call("runs")
    assert (code, err) == (0, "")
    head, *rows = lines(out)
    assert head[:4] == ["run", "strategy", "benchmark", "seed"]
    assert [row[0] for row in rows] == [
        "mine/lwf-seed0-20261129-171500", "mine/er+exits-seed1-20261129-170500", "mine/er-seed0-20261129-170000",
        "mine/20261128-170000-seed2",
    ]  # fmt: skip
    assert rows[1][1:9] == ["er", "+", "exits", "digits", "1", "75.0", "50.0", "1,000"] and rows[1][-1] == "finished"
    assert rows[2][1:7] == ["er", "digits", "0", "50.0", "25.0", "1,000"]
    assert rows[3][4:7] == ["62.5", "-", "1,000"]
    assert rows[0][4:7] == ["-", "-", "-"] and rows[0][-5:] == ["stopped", "before", "its", "first", "checkpoint"]


def test_backbone_and_devices_are_columns_where_they_differ(call, here):
    root = here / "runs" / "m"
    mlp, cnn = {"backbone": {"name": "mlp"}}, {"backbone": {"name": "small_cnn"}}
    add(root / "a", log=[(1, "finished")], results=(0.5, 0.25), **cnn, trainer={"devices": 1})
    add(root / "b", log=[(0, "finished")], results=(0.75, None), **cnn, trainer={"devices": 1}, seed=11)
    assert "backbone" not in call("runs").out and "devices" not in call("runs").out
    add(root / "c", log=[(2, "started")], **mlp, trainer={"devices": [0, 2]})
    columns = [line[:67].rstrip() for line in call("runs", "--sort", "run").out.splitlines()]
    assert columns == [
        "run  strategy  benchmark  backbone   devices  seed  accuracy, %  fo",
        "m/a  er        digits     small_cnn        1     0         50.0",
        "m/b  er        digits     small_cnn        1    11         75.0",
        "m/c  er        digits     mlp           0, 2     0            -",
    ]
    assert [line[:3] for line in call("runs", "--sort", "backbone").out.splitlines()] == ["run", "m/c", "m/a", "m/b"]
    assert [line[:3] for line in call("runs", "small_cnn", "--sort", "accuracy").out.splitlines()] == ["run", "m/b", "m/a"]
    (root / "a" / "config.yaml").unlink()  # its results are listed without
    assert call("runs", "--sort", "run").out.splitlines()[1].startswith("m/a  er        digits     small_cnn        -     0  ")


@pytest.mark.parametrize(
    "options, seeds",
    [(["--sort", "accuracy"], "1200"), (["--sort", "forgetting"], "0120"), (["--sort", "seed"], "0012"), (["er"], "102"),
     (["er", "EXITS"], "1"), (["cifar"], "2"), (["lwf"], "0"), (["mine", "digits"], "010"), (["--best"], "12"),
     (["--best", "2"], "102"), (["--best", "2", "digits"], "10"), (["--best", "exits"], "1"),
     (["exits+er"], "1"), (["20261129"], "010"), (["seed1"], "1"), (["mine/er-seed0-20261129-170000"], "0")],
)  # fmt: skip
def test_sorted_filtered_best(call, several, options, seeds):
    """Seeds by row; the stopped run and one of the finished ones have seed 0."""
    code, out, _ = call("runs", *options)
    column = out.splitlines()[0].index("seed") + 3
    found = "".join(line[column] for line in out.splitlines()[1:])
    assert code == 0 and sorted(found) == sorted(seeds)
    if "--sort" in options:
        assert found == seeds


def test_a_word_is_a_component_or_begins_a_word(call, here):
    root = here / "runs"
    for folder, strategy in (("trial", "derpp + ewc + moe"), ("er_ace-seed0-20261129-170000", "er_ace"), ("b", "er")):
        add(root / folder, strategy=strategy, name="experts", benchmark={"name": "permuted_mnist"})

    def found(*words):
        return [row[0] for row in lines(call("runs", *words, "--sort", "run").out)[1:]]

    assert found("er") == ["b"] and found("ewc", "moe") == ["trial"] and found("er_ace") == ["er_ace-seed0-20261129-170000"]
    assert found("TRI") == ["trial"] and len(found("mnist")) == len(found("exp")) == 3
    assert call("runs", "rial").out == "no runs in runs with rial\n"
    (root / "b" / "config.yaml").unlink()  # of a damaged run only the folder is known
    assert found("b") == ["b"]


def test_refusals(refused, call, several, here):
    refused(["runs", "--sort", "acuracy"], "--sort: unknown key 'acuracy'; did you mean 'accuracy'?")
    for number in ("0", "-1", "1.5"):
        refused(["runs", "--best", number], f"--best: found '{number}'; give a number from 1")
    refused(["runs", "--output", "nowhere"], "--output: nowhere cannot be listed (No such file or directory); give")
    (here / "empty").mkdir()
    assert call("runs", "--output", "empty").out == "no runs in empty\n"
    assert call("runs", "zzz").out == "no runs in runs with zzz\n"


@pytest.mark.parametrize(
    "log, checkpoints, state",
    [
        ([(1, "started"), (2, "experience 1/5 (digits 1, 2): accuracy 90.00 %, x"), (3, "stopped after experience 1/5")],
         ["experience_001.ckpt"], "stopped after experience 1"),
        ([(1, "started"), (2, "saved at experience 2, epoch 3, step 40"), (2, "stopped after experience 1/5")],
         ["experience_001.ckpt", "inside_002_step_000040.ckpt"], "stopped at experience 2, epoch 3, step 40"),
        ([(1, "started"), (2, "experience 2/5 (a): x")],
         ["experience_002.ckpt", "inside_003_step_000007.ckpt", "inside_003_step_000014.ckpt"],
         "stopped at experience 3, step 14"),
        ([(1, "started"), (2, "failed: CUDA out of memory"), (2, "stopped after experience 0/5")], [],
         "failed CUDA out of memory"),
        ([(1, "started"), (2, "diverged: loss/task/ce is nan in step 3")], [], "diverged loss/task/ce is nan in step 3"),
        ([(1, "started"), (2, "failed: disk full"), (3, "resumed after experience 1/5"), (4, "experience 2/5 (a): x")],
         ["experience_002.ckpt"], "stopped after experience 2"),
        ([], [], "stopped before its first checkpoint"),
    ],
)  # fmt: skip
def test_states_of_runs_without_results(tmp_path, log, checkpoints, state):
    found = read_state(add(tmp_path / "a", log=log, checkpoints=checkpoints), now=NOW)
    assert f"{found.state} {found.detail}" == state
    if log:
        assert found.age == 60 * (60 - log[-1][0])


def test_a_run_in_progress(tmp_path):
    path = add(tmp_path / "a", log=[(1, "started"), (2, "experience 3/5 (a): accuracy 1")])
    with RunFolder(path).lock():
        found = read_state(path, now=NOW)
    assert (found.state, found.detail) == ("running", "after experience 3/5")


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("results.json", b"{", "results.json: not JSON"),
        ("results.json", b"[]", "results.json: not the results of a run"),
        ("results.json", b'{"schema_version": 2}', "results.json: no field "),
        ("results.json", b'{"schema_version": 2, "metrics": {"forgetting": "x", "final_average_accuracy": 1}, "name": "a",'
         b'"strategy": "er", "benchmark": "b", "seed": 0, "macs": 1}', "results.json: not the results of a run"),
        ("config.yaml", b"a: [", "config.yaml: not YAML"),
        ("config.yaml", b"- a", "config.yaml: not a mapping"),
        ("config.yaml", b"name: a", "config.yaml: no key 'strategy'"),
        ("config.yaml", b"{name: [], strategy: er, seed: 0}", "config.yaml: not the config of a run"),
        ("config.yaml", b"\xff\xfe", "config.yaml: not YAML"),
        ("config.yaml", None, "no config.yaml and no results.json"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_listed_with_its_reason(call, here, file, content, reason):
    add(here / "runs" / "good", results=(1.0, 0.0))
    path = add(here / "runs" / "bad") / file
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    code, out, err = call("runs")
    assert (code, err) == (0, "") and len(out.splitlines()) == 3
    (line,) = [line for line in out.splitlines() if line.startswith("bad ")]
    assert f"damaged: {reason}" in line


def test_results_of_version_1_and_mean_costs(tmp_path):
    path = add(tmp_path / "a")
    old = {"schema_version": 1, "name": "a", "strategy": "er", "benchmark": "b", "seed": 3, "macs": 9, "forgetting": 0.5,
           "final_average_accuracy": 0.25}  # fmt: skip
    (path / "results.json").write_text(json.dumps(old))
    found = read_state(path, now=NOW)
    assert (found.accuracy, found.forgetting, found.macs, found.state) == (0.25, 0.5, 9, "finished")
    (path / "ledger.json").write_text('{"totals": {"prediction": {"whole": 9, "mean": 4.5}}}')
    (path / "results.json").write_text(json.dumps({**old, "diverged": ["experience 1: loss is nan"]}))
    found = read_state(path, now=NOW)
    assert (found.macs, found.state, found.detail) == (4.5, "diverged", "experience 1: loss is nan")


def test_where_runs_are_found(tmp_path):
    for place in ("a", "b/c", "b/c2/d", ".hidden/x", "1/2/3/4/5/6"):
        add(tmp_path / place)
    add(tmp_path / "a" / "inside")  # of a run folder
    (tmp_path / "link").symlink_to(tmp_path / "b")
    found = [path.relative_to(tmp_path).as_posix() for path in find_folders(tmp_path)]
    assert found == ["a", "b/c", "b/c2/d"]


def test_names_are_printed_safely(tmp_path):
    run = RunState(path=tmp_path / "a\x1b[2J", name="a", strategy="er\n", state="finished")
    assert "\x1b" not in runs.table([run], output=tmp_path) and runs.table([run], output=tmp_path).count("\n") == 1


def test_nothing_heavy_is_imported(several):
    """200 folders take tenths of a second without torch."""
    code = (
        "import sys; from clframe.cli import main; assert main(['runs']) == 0\n"
        "heavy = {'torch', 'numpy', 'lightning', 'avalanche', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=several.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "er+exits" in done.stdout


def test_a_real_run(finished, call):
    """The folder is called by strategy and seed; name, state and numbers are those of its results.json."""
    folder, _, cwd = finished
    assert folder.name.startswith("er+lwf-seed3-20")
    result = json.loads((folder / "results.json").read_text())
    out = call("runs", "--output", str(cwd / "out")).out
    assert f"{100 * result['metrics']['final_average_accuracy']:.1f}" in out and out.rstrip().endswith("finished: development run")


def test_a_run_that_fails_says_why(call, here):
    import clframe

    def fail(progress):
        raise RuntimeError("no space\nleft")

    options = ["backbone=mlp", "backbone.width=4", "trainer.epochs=1", "benchmark.experiences=2", "trainer.figures=none"]
    with pytest.raises(RuntimeError, match="no space"):
        clframe.run("quickstart", options, output="runs", on_evaluated=fail)
    assert call("runs").out.splitlines()[1].endswith("  failed: no space left")
