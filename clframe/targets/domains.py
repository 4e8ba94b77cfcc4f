"""Domains of a language model whose strategy trains adapters for each of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.nn.network import Network
from clframe.results import Result
from clframe.targets.loading import RunModel

CHOSEN = "adapters are chosen by the likelihood of the text before"
"""Note of a prediction for a domain that is not known."""


def domain_of(network: Network, experience: int | None) -> AbstractContextManager[None]:
    """Return a context in which the network computes with the adapters of an experience, or chooses them.

    Args:
        network: The network, with adapters for each domain or without.
        experience: Its index; None: it is not known.
    """
    return nullcontext() if network.choice is None else network.choice.of_domain(experience)


def experience_of(model: RunModel, name: str) -> int:
    """Return the index of the experience in which a run has learned a domain, of several the last.

    Raises:
        ConfigError: A run without adapters for each domain, or one that is not finished.
        UnknownNameError: A domain that it has not learned.
    """
    if model.network.choice is None:
        raise ConfigError(
            f"--domain: found {name} for a run without adapters for each domain (lora with merge=apart); leave it out"
        )
    file = model.folder / "results.json"
    if not file.is_file():
        raise ConfigError(f"--domain: found {name} for a run that is not finished; finish it, or leave it out")
    experiences = Result.from_json(file).experiences
    names = [[model.class_names[c] for c in classes] for classes in experiences]
    learned = [e for e, of in enumerate(names) if name in of]
    if not learned:
        raise UnknownNameError(unknown_name("domain", name, {each for of in names for each in of}, where="--domain"))
    return learned[-1]
