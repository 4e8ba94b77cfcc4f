"""Launchers of clusters train the cells that a local run trains, with the same numbers.

The Ray cluster is a real one that the test starts: two nodes on this machine, one of which is killed in the middle.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from clframe.errors import ConfigError, UnsupportedError
from clframe.results import Result
from clframe.sweep.driver import run_cells
from clframe.sweep.locks import holder
from clframe.sweep.plan import plan_cells
from clframe.sweep.ray_launcher import OPTIONS as RAY
from clframe.sweep.ray_launcher import RayLauncher, read_options
from clframe.sweep.slurm_launcher import SlurmLauncher

LONG = {"trainer.figures": ("none",), "trainer.loggers": ("[]",), "trainer.checkpoint.every": ("5",),
        "benchmark.experiences": ("5",), "trainer.epochs": ("8",)}  # fmt: skip


def say(text, *, error=False):
    print(text, file=sys.stderr if error else sys.stdout)


def matrices(cells):
    return {cell.key: Result.from_json(cell.results).accuracy_matrix for cell in cells}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Accuracy matrices of the cells, trained one after another in this process."""
    from clframe.sweep.work import run_cell

    folder = tmp_path_factory.mktemp("local")

    def train(space):
        cells = plan_cells(folder, space)
        for cell in cells:
            assert run_cell(folder, cell.key).state == "done"
        return matrices(cells)

    return train


def test_options_have_types():
    assert read_options({"cpus": "2", "address": "10.0.0.1:6379"}, RAY) == {**RAY, "cpus": 2.0, "address": "10.0.0.1:6379"}
    for given, message in [
        ({"cpu": "2"}, "--launcher-option: unknown option 'cpu'; did you mean 'cpus'?"),
        ({"cpus": "many"}, "--launcher-option cpus: found 'many'; give a number from 0"),
        ({"retries": "1.5"}, "--launcher-option retries: found '1.5'; give a whole number from 0"),
        ({"gpus": "-1"}, "--launcher-option gpus: found '-1'; give a number from 0"),
        ({"gpus": "nan"}, "--launcher-option gpus: found 'nan'; give a number from 0"),
    ]:
        with pytest.raises(ConfigError) as refused:
            read_options(given, RAY)
        assert str(refused.value) == message
    with pytest.raises(ConfigError, match="signal_delay_s: found 120, which is not below the limit of 2 min"):
        SlurmLauncher.of({"timeout_min": "2"}, jobs=None, say=say)
    with pytest.raises(ConfigError, match="cluster: found 'pbs'; give slurm or local"):
        SlurmLauncher.of({"cluster": "pbs"}, jobs=None, say=say)


@pytest.mark.parametrize("module, launcher, extra", [("ray", RayLauncher, "ray"), ("submitit", SlurmLauncher, "slurm")])
def test_what_is_not_installed_is_named(monkeypatch, module, launcher, extra):
    monkeypatch.setitem(sys.modules, module, None)
    options = {"jobs": None} if module == "submitit" else {}
    with pytest.raises(UnsupportedError, match=rf"^--launcher {extra}: {module} is not installed; pip install 'clframe\[{extra}\]'$"):
        launcher.of({}, say=say, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray
def test_a_ray_cluster_loses_a_node(small, local, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    space = small(grid={**LONG, "strategy": ("naive", "er")}, seeds=(0, 1))
    expected = local(space)
    cells = plan_cells(tmp_path, space)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        launcher = RayLauncher.of({"address": cluster.address}, say=say)
        killed = []

        def kill():
            """Once two cells have checkpoints inside an experience, kill the second node with its processes."""
            while sum(any(cell.folder.glob("checkpoints/inside_*")) for cell in cells) < 2:
                time.sleep(0.02)
            killed.append(sum(cell.finished() for cell in cells))
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        assert run_cells(cells, launcher) == {}
        killer.join(timeout=5)
        assert killed == [0] and len([node for node in ray.nodes() if node["Alive"]]) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert matrices(cells) == expected
    resumed = [cell for cell in cells if "resumed" in (cell.folder / "log.txt").read_text()]
    assert resumed  # from its last checkpoint, not from the start


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_slurm_jobs_save_and_are_submitted_again_at_the_time_limit(small, local, tmp_path, monkeypatch):
    """The jobs of submitit's local executor get the signal that SLURM sends before the limit, from this test."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    space = small(grid={**LONG, "strategy": ("naive", "er")})
    cells = plan_cells(tmp_path, space)
    signaled = []

    def limit():
        """Signal each job once, when it has a checkpoint inside an experience."""
        while len(signaled) < len(cells):
            for cell in cells:
                found = holder(tmp_path, cell.key)
                if cell not in signaled and found and any(cell.folder.glob("checkpoints/inside_*")):
                    os.kill(found.pid, signal.SIGUSR1)
                    signaled.append(cell)
            time.sleep(0.01)

    threading.Thread(target=limit, daemon=True).start()
    # submitit takes a signal of a job with a limit below ten minutes for that of its end.
    launcher = SlurmLauncher.of({"cluster": "local", "timeout_min": "9", "signal_delay_s": "1"}, jobs=2, say=say)
    assert run_cells(cells, launcher) == {} and len(signaled) == 2
    for path in Path(tmp_path, ".sweep", "submitit").glob("*.out"):
        text = path.read_text()
        assert "Job has timed out" in text and "(999 remaining timeouts)" in text
        assert text.count("Starting with JobEnvironment") == 2
    for cell in cells:
        assert re.search(r"saved at .*\n.*(resumed|started)", (cell.folder / "log.txt").read_text(), re.DOTALL)
    assert matrices(cells) == local(space)
