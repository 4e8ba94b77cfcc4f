"""Feed-forward networks (FFNs) and activations inside any module, found by role and shape, not by class.

An FFN is ``W_down act(W_up x)``, or gated ``W_down((W_up x) * act(W_gate x))``; x of width ``d_model``, the hidden
layer of ``d_ff`` neurons. Its parts may belong to one module or, as in BERT, to two adjacent ones. Models are not
changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType

from torch import nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.sparsity.ffn import FFN as FFN
from clframe.sparsity.ffn import Function, Named, assign_roles, is_activation, is_rectifier, quiet_evaluation
from clframe.sparsity.ffn import shape_of as shape_of
from clframe.sparsity.ffn import weight_of as weight_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """The activation of one group of hidden neurons.

    Attributes:
        name: Name inside the model: of the FFN, or of the activation where it belongs to none.
        module: The activation, or a layer that ends in one; None in an FFN whose activation is a function, or a module
            that other parts of the model call as well.
        ffn: The FFN it belongs to, if any.
        fused: Whether ``module`` is a layer that ends in an activation.
    """

    name: str
    module: nn.Module | None
    ffn: FFN | None = None
    fused: bool = False

    @property
    def overwrites(self) -> bool:
        """Whether the activation works in place, or in a layer: pre-activations are lost."""
        activation = self.module if self.ffn is None else self.ffn.activation
        return self.fused or bool(getattr(activation, "inplace", False))


def find_ffns(module: nn.Module) -> tuple[FFN, ...]:
    """Find all FFNs of a module, in the order in which their parts are registered.

    Raises:
        UnsupportedError: The module has none.

    >>> net = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Dropout(), nn.Linear(7, 3))
    >>> [(ffn.d_model, ffn.d_ff, ffn.up_name, ffn.activation_name, ffn.down_name) for ffn in find_ffns(net)]
    [(3, 7, '0', '1', '3')]
    """
    found = _ffns(module)
    if not found:
        raise UnsupportedError(
            f"sparsity: found no feed-forward network (linear layers from d to f and back, an activation between) in "
            f"{type(module).__name__}; give a transformer or another model with one"
        )
    return found


def find_sites(module: nn.Module) -> tuple[Site, ...]:
    """Find the sites of hidden neurons: the FFNs or, in a model without any, all rectifying activations.

    Layers that end in a ReLU, as those of ``mlp``, are included.

    Raises:
        UnsupportedError: The module has neither.
    """
    ffns = _ffns(module)
    if ffns:
        own = _own_activations(module, ffns)
        return tuple(Site(name=ffn.name, module=part, ffn=ffn) for ffn, part in zip(ffns, own, strict=True))
    leaves = [(name, part, ends_in_relu(part)) for name, part in module.named_modules() if _is_leaf(part)]
    sites = tuple(
        Site(name=name, module=part, fused=fused) for name, part, fused in leaves if fused or is_rectifier(part)
    )
    if not sites:
        raise UnsupportedError(
            f"sparsity: found neither a feed-forward network nor an activation module in {type(module).__name__}; "
            f"give a model with activations as modules"
        )
    return sites


def ends_in_relu(part: nn.Module) -> bool:
    """Return whether ``part`` is a linear layer that applies a ReLU to its output, as DenseReLU."""
    if not isinstance(part, nn.Linear) or type(part).forward is nn.Linear.forward or part.weight.is_meta:
        return False
    x = part.weight[:1].detach()  # a weight row as input: both signs, matching width, device and dtype
    try:
        with quiet_evaluation(part):
            y, plain = part(x), F.linear(x, part.weight, part.bias)
            return y.shape == plain.shape and bool((y == plain.relu()).all())
    except Exception:  # a subclass with another signature
        return False


def _own_activations(module: nn.Module, ffns: Sequence[FFN]) -> Iterator[nn.Module | None]:
    """Yield the activation of each FFN; None for a function, and for a module that runs more often than the FFN."""
    users = Counter(id(ffn.activation) for ffn in ffns)
    names = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for ffn in ffns:
        key = id(ffn.activation)
        alone = isinstance(ffn.activation, nn.Module) and users[key] == 1 and names[key] <= names[id(ffn.up)]
        yield ffn.activation if alone else None  # type: ignore[misc]  # alone implies a module


def _ffns(module: nn.Module) -> tuple[FFN, ...]:
    """Search the deepest owners first, so that a block does not claim the FFN of one of its parts.

    Layers belong to one FFN, activations by their name: several FFNs may share a module.
    """
    taken: set[int] = set()
    named: set[str | None] = set()
    found: list[FFN] = []
    for name, owner in reversed(list(module.named_modules())):
        parts = [(path, part) for path, part in _near(name, owner) if id(part) not in taken and path not in named]
        layers: dict[int, Named] = {}
        for path, part in parts:
            if shape_of(part) is not None:
                layers.setdefault(id(part), (path, part))
        linears = list(layers.values())
        if len(linears) < 2:
            continue
        acts: list[tuple[str, Function]] = [(p, part) for p, part in parts if _is_leaf(part) and is_activation(part)]
        acts += [(_join(name, key), function) for key, function in _functions(owner)]
        mine = list(_in_owner(name, owner, linears, acts))
        mine = [replace(ffn, name=f"{name}#{i}" if i > 1 else name) for i, ffn in enumerate(mine, start=1)]
        for ffn in mine:
            taken |= {id(part) for part in (ffn.up, ffn.gate, ffn.down)}
            named.add(ffn.activation_name)
        found += mine
    order = {id(part): index for index, part in enumerate(module.modules())}
    return tuple(sorted(found, key=lambda ffn: order[id(ffn.up)]))


def _in_owner(
    name: str, owner: nn.Module, linears: Sequence[Named], acts: Sequence[tuple[str, Function]]
) -> Iterator[FFN]:
    used: set[int] = set()
    named: set[str | None] = set()
    shapes = [shape_of(part) or (0, 0) for _, part in linears]
    for ups, down in _groups(shapes):
        layers = (*ups, down)
        # Two layers of one child were already considered when the child was the owner.
        parents = {linears[at][0].rpartition(".")[0] for at in layers}
        if used.intersection(layers) or (len(parents) == 1 and parents != {name}):
            continue
        # Those of other FFNs last: a module that two call has two names, or only one.
        free = sorted(acts, key=lambda act: act[0] in named)
        ffn = assign_roles(name, owner, [linears[at] for at in ups], linears[down], free)
        if ffn is not None:
            used.update(layers)
            named.add(ffn.activation_name)
            yield ffn


def _groups(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield indices of layers whose shapes fit an FFN: one or two up (or one of twice the width), one down."""
    for d, f in dict.fromkeys(shapes):
        ups = [at for at, shape in enumerate(shapes) if shape == (d, f)]
        downs = [at for at, shape in enumerate(shapes) if shape == (f, d)]
        if d == f:  # every layer fits either role: the order decides
            if len(ups) in (2, 3):
                yield tuple(ups[:-1]), ups[-1]
        elif downs and len(ups) in (len(downs), 2 * len(downs)):
            each = len(ups) // len(downs)
            yield from ((tuple(ups[each * i : each * (i + 1)]), down) for i, down in enumerate(downs))
        elif f % 2 == 0 and not downs:
            downs = [at for at, shape in enumerate(shapes) if shape == (f // 2, d)]
            yield from (((up,), down) for up, down in zip(ups, downs, strict=False))


def _near(name: str, owner: nn.Module) -> Iterator[Named]:
    """Yield children and their children under all of their names inside the model."""
    for key, child in owner._modules.items():
        if child is not None:
            yield _join(name, key), child
            inner = child._modules.items()
            yield from ((_join(name, f"{key}.{own}"), part) for own, part in inner if part is not None)


def _functions(owner: nn.Module) -> Iterator[tuple[str, Function]]:
    """Yield activations that a module stores as functions, as torch's TransformerEncoderLayer does."""
    for key, value in vars(owner).items():
        if "act" in key and isinstance(value, (FunctionType, BuiltinFunctionType)) and is_activation(value):
            yield key, value


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_leaf(part: nn.Module) -> bool:
    return next(part.children(), None) is None
