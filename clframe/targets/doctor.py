"""Checks of an installation: versions, devices, threads, folders, and a small run.

Each check returns one :class:`Finding`, and none raises: what fails is what the user came for. Versions are compared
with the requirements in clframe's own metadata. Nothing is downloaded, and no package is imported before its version
has been checked.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from clframe.environment import available_cores
from clframe.errors import reason_of

MALICIOUS: Mapping[str, tuple[str, ...]] = {"lightning": ("2.6.2", "2.6.3")}
"""Releases that steal credentials when they are imported (GHSA-w37p-236h-pfx3)."""
SHOWN = ("torch", "torchvision", "lightning", "avalanche-lib", "omegaconf")
"""Packages with a line each; the others share one."""
LEAST_GB = 2.0
"""Free space below which a run with checkpoints is likely to fill the disk."""
TRIAL = (
    "backbone=mlp", "backbone.width=64", "benchmark.experiences=2", "trainer.epochs=3", "trainer.batch_size=32",
    "trainer.accelerator=auto", "trainer.threads=null", "trainer.progress=false", "trainer.loggers=[]",
)  # fmt: skip
"""Overrides of the quickstart for the small run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was checked.
        ok: Whether nothing has to be done.
        found: What was found.
        advice: What to do; empty if nothing.
    """

    check: str
    ok: bool
    found: str
    advice: str = ""

    def __str__(self) -> str:
        """Return the line of the report."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{'ok ' if self.ok else 'fix'}  {self.check:<14} {self.found}{advice}"


def check_python() -> Finding:
    """Check the version of Python."""
    found = f"{platform.python_version()} at {sys.executable}"
    wanted = importlib.metadata.metadata("clframe")["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    ok = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    return Finding("Python", ok, found, "" if ok else f"install Python {wanted}")


def check_packages(requirements: Iterable[str] | None = None) -> list[Finding]:
    """Check that required packages are installed in the supported versions.

    Args:
        requirements: Requirements as of a package's metadata; None takes clframe's.
    """
    if requirements is None:
        requirements = importlib.metadata.requires("clframe") or ()
    needed = [found for found in map(Requirement, requirements) if "extra" not in str(found.marker or "")]
    findings = [_package(requirement) for requirement in needed if requirement.name in SHOWN]
    others = [_package(requirement) for requirement in needed if requirement.name not in SHOWN]
    bad = [finding for finding in others if not finding.ok]
    return [*findings, *(bad or [Finding("other packages", True, f"{len(others)} installed")])]


def _package(requirement: Requirement) -> Finding:
    name = requirement.name
    advice = f'pip install "{name}{requirement.specifier}"'
    version = _version(name)
    if version is None:
        return Finding(name, False, "not installed", advice)
    if version in MALICIOUS.get(name, ()):
        first = f"do not import it: pip uninstall {name}, change the secrets of this machine, then"
        return Finding(name, False, f"{version}, a release that steals credentials", f"{first} {advice}")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, False, f"{version}, but {requirement.specifier} is supported", advice)
    return Finding(name, True, version)


def check_extras(requirements: Iterable[str] | None = None) -> Finding:
    """List the extras that are installed, and those that are not, which is not a fault."""
    if requirements is None:
        requirements = importlib.metadata.requires("clframe") or ()
    extras: dict[str, bool] = {}
    for requirement in map(Requirement, requirements):
        for extra in _extras_of(requirement):
            version = _version(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            extras[extra] = extras.get(extra, True) and fits
    missing = [extra for extra, there in sorted(extras.items()) if not there]
    there = [extra for extra in sorted(extras) if extra not in missing]
    found = f"installed: {', '.join(there) or 'none'}"
    if missing:
        found += f'; optional: {", ".join(missing)} (pip install "clframe[{missing[0]}]")'
    return Finding("extras", True, found)


def _extras_of(requirement: Requirement) -> list[str]:
    """Names of the extras that a requirement belongs to, without ``dev``."""
    known = importlib.metadata.metadata("clframe").get_all("Provides-Extra") or ()
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return []
    return [extra for extra in known if extra != "dev" and marker.evaluate({"extra": extra})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_gpu() -> Finding:
    """Compute on every GPU that torch sees; where there is a driver but no GPU, torch does not fit."""
    import torch

    driver = _nvidia_driver()
    if torch.backends.mps.is_available():
        return Finding("GPU", True, "Apple GPU (mps)")
    if not torch.cuda.is_available():
        if driver:
            advice = "install a torch built for a CUDA version of this driver, or set CUDA_VISIBLE_DEVICES"
            return Finding("GPU", False, f"NVIDIA driver {driver}, but torch {torch.__version__} sees no GPU", advice)
        return Finding("GPU", True, "none: runs use the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        try:
            x = torch.ones(64, 64, device=f"cuda:{index}")
            if float((x @ x).sum()) != 64.0**3:
                raise RuntimeError("a matrix product is wrong")
            names.append(torch.cuda.get_device_name(index))
        except RuntimeError as error:
            return Finding("GPU", False, f"cuda:{index} fails ({_first_line(error)})",
                           "update the driver, or use another torch; --device cpu runs without it")  # fmt: skip
    return Finding("GPU", True, f"{', '.join(names)}; CUDA {torch.version.cuda}, driver {driver or 'unknown'}")


def _nvidia_driver() -> str:
    """Version of the NVIDIA driver on Linux, or an empty text."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "of unknown version")


def check_threads(*, threads: int | None = None, cores: float | None = None) -> Finding:
    """Compare torch's threads with the cores; more threads than cores are several times slower than one.

    Args:
        threads: Threads of torch; None asks torch.
        cores: None takes :func:`available_cores`.
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    cores = available_cores() if cores is None else cores
    settings = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    found = f"torch uses {threads} on {cores:g} cores" + (f" ({', '.join(settings)})" if settings else "")
    if threads > math.ceil(cores):
        return Finding("threads", False, found, f"set OMP_NUM_THREADS={max(1, int(cores))} or trainer.threads")
    return Finding("threads", True, found)


def check_folder(check: str, path: Path) -> Finding:
    """Check that a folder can be written, or made, and has free space."""
    parent = next((p for p in (path, *path.parents) if p.exists()), Path())
    if not parent.is_dir():
        return Finding(check, False, f"{parent} is a file", "choose another folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        return Finding(check, False, f"{parent} cannot be written ({error.strerror})", "choose another folder")
    free = shutil.disk_usage(parent).free / 1e9
    state = "" if parent == path else ", will be made"
    found = f"{path.resolve()}{state}, {free:,.1f} GB free"
    return Finding(check, free >= LEAST_GB, found, "" if free >= LEAST_GB else "free some space")


def check_data(options: Mapping[str, Any], *, name: str) -> list[Finding]:
    """Check the paths in the options of a benchmark: a folder for downloads, and files or folders of the user's.

    Args:
        options: Options of the benchmark.
        name: Its name.
    """
    findings = []
    for key, value in options.items():
        if key == "data_dir":
            path = Path(os.path.expanduser(str(value)))
            if options.get("download", False):
                findings.append(check_folder("data folder", path))
            else:
                ok = path.is_dir() and os.access(path, os.R_OK)
                advice = "" if ok else f"give the folder of {name} as benchmark.data_dir=DIR"
                findings.append(Finding("data folder", ok, f"{path}{'' if ok else ': no such folder'}", advice))
        elif key in ("path", "test_path", "root") and value:
            path = Path(os.path.expanduser(str(value)))
            ok = path.exists() and os.access(path, os.R_OK)
            advice = "" if ok else f"give an existing one as benchmark.{key}=PATH"
            findings.append(Finding("data", ok, f"{path}{'' if ok else ': no such file or folder'}", advice))
    return findings


def check_trial(run: Callable[..., Any]) -> Finding:
    """Train and evaluate a small network on the bundled digits in a temporary folder.

    Args:
        run: :func:`clframe.run`.
    """
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = run("quickstart", TRIAL, output=folder)
    except Exception as error:  # whatever is wrong with the installation
        return Finding("small run", False, f"{type(error).__name__}: {_first_line(error)}",
                       "repeat it with clframe run quickstart --debug")  # fmt: skip
    seconds = time.perf_counter() - start
    accuracy = float(result.accuracy_matrix[0][0])
    found = f"{seconds:.1f} s, of which {result.train_seconds:.1f} s training of {result.steps} steps, accuracy "
    found += f"{100 * accuracy:.0f} % on the first five digits"
    ok = accuracy > 0.5  # guessing is right in a fifth of the cases
    return Finding("small run", ok, found, "" if ok else "training does not learn here: try --device cpu")


def _first_line(error: BaseException) -> str:
    return reason_of(error, most=200)


def is_safe(findings: Sequence[Finding]) -> bool:
    """Whether the packages that a run imports may be imported."""
    return all(finding.ok for finding in findings if finding.check in SHOWN)
