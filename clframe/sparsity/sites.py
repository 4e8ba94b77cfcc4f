"""Feed-forward networks (FFNs) and activations inside any module, found by role and shape, not by class.

An FFN is ``W_down act(W_up x)``, or gated ``W_down((W_up x) * act(W_gate x))``; x of width ``d_model``, the hidden
layer of ``d_ff`` neurons. Its parts may hang in one module or, as in BERT, in two beside each other. Nothing is
changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType

from torch import nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.sparsity.ffn import FFN as FFN
from clframe.sparsity.ffn import Function, Named, evaluating, is_activation, rectifies, roles
from clframe.sparsity.ffn import shape_of as shape_of
from clframe.sparsity.ffn import weight_of as weight_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """A place where hidden neurons fire.

    Attributes:
        name: Inside the model: of the FFN, or of the activation itself where it belongs to none.
        module: The activation, or a layer that ends in one; None in an FFN whose activation is a function.
        ffn: The FFN it belongs to, if any.
        fused: Whether ``module`` is a layer that ends in an activation.
    """

    name: str
    module: nn.Module | None
    ffn: FFN | None = None
    fused: bool = False


def find_ffns(module: nn.Module) -> tuple[FFN, ...]:
    """All FFNs of a module, in the order in which their parts are registered.

    Raises:
        UnsupportedError: There is none.

    >>> net = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Dropout(), nn.Linear(7, 3))
    >>> [(ffn.d_model, ffn.d_ff, ffn.up_name, ffn.activation_name, ffn.down_name) for ffn in find_ffns(net)]
    [(3, 7, '0', '1', '3')]
    """
    found = _ffns(module)
    if not found:
        raise UnsupportedError(
            f"sparsity: found no feed-forward network (linear layers from d to f and back, an activation between) in "
            f"{type(module).__name__}; give a transformer or another model that has one"
        )
    return found


def find_sites(module: nn.Module) -> tuple[Site, ...]:
    """Where hidden neurons fire: the FFNs; in a model without any, all activations that let large values through.

    Layers that end in a ReLU, as those of our ``mlp``, count as such.

    Raises:
        UnsupportedError: There is neither.
    """
    ffns = _ffns(module)
    if ffns:
        kept = (ffn.activation if isinstance(ffn.activation, nn.Module) else None for ffn in ffns)
        return tuple(Site(name=ffn.name, module=part, ffn=ffn) for ffn, part in zip(ffns, kept, strict=True))
    leaves = [(name, part, ends_in_relu(part)) for name, part in module.named_modules() if _is_leaf(part)]
    sites = tuple(Site(name=name, module=part, fused=fused) for name, part, fused in leaves if fused or rectifies(part))
    if not sites:
        raise UnsupportedError(
            f"sparsity: found neither a feed-forward network nor an activation module in {type(module).__name__}; "
            f"give a model that keeps its activations as modules"
        )
    return sites


def ends_in_relu(part: nn.Module) -> bool:
    """Whether ``part`` is a linear layer whose output is rectified by itself, as our DenseReLU."""
    if not isinstance(part, nn.Linear) or type(part).forward is nn.Linear.forward or part.weight.is_meta:
        return False
    x = part.weight[:1].detach()  # its own row: both signs, the right width, device and type
    try:
        with evaluating(part):
            y, plain = part(x), F.linear(x, part.weight, part.bias)
            return y.shape == plain.shape and bool((y == plain.relu()).all())
    except Exception:  # a subclass that wants something else
        return False


def _ffns(module: nn.Module) -> tuple[FFN, ...]:
    """Deepest owners first, so that a block never claims what is already an FFN of one of its parts."""
    taken: set[int] = set()
    found: list[FFN] = []
    for name, owner in reversed(list(module.named_modules())):
        parts = [(path, part) for path, part in _near(name, owner) if id(part) not in taken]
        linears = [(path, part) for path, part in parts if shape_of(part) is not None]
        if len(linears) < 2:
            continue
        acts: list[tuple[str, Function]] = [(p, part) for p, part in parts if _is_leaf(part) and is_activation(part)]
        acts += [(_join(name, key), function) for key, function in _functions(owner)]
        mine = list(_in_owner(name, owner, linears, acts))
        mine = [replace(ffn, name=f"{name}#{i}" if i > 1 else name) for i, ffn in enumerate(mine, start=1)]
        for ffn in mine:
            taken |= {id(part) for part in (ffn.up, ffn.gate, ffn.down, ffn.activation)}
        found += mine
    order = {id(part): place for place, part in enumerate(module.modules())}
    return tuple(sorted(found, key=lambda ffn: order[id(ffn.up)]))


def _in_owner(
    name: str, owner: nn.Module, linears: Sequence[Named], acts: Sequence[tuple[str, Function]]
) -> Iterator[FFN]:
    used: set[int] = set()
    shapes = [shape_of(part) or (0, 0) for _, part in linears]
    for ups, down in _groups(shapes):
        layers = (*ups, down)
        # Two layers of one child are that child's own business, and it was asked before.
        parents = {linears[at][0].rpartition(".")[0] for at in layers}
        if used.intersection(layers) or (len(parents) == 1 and parents != {name}):
            continue
        ffn = roles(name, owner, [linears[at] for at in ups], linears[down], acts)
        if ffn is not None:
            used.update(layers)
            yield ffn


def _groups(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Places of layers that may be an FFN by their shapes: one or two up (or one of twice the width), one down."""
    for d, f in dict.fromkeys(shapes):
        ups = [at for at, shape in enumerate(shapes) if shape == (d, f)]
        downs = [at for at, shape in enumerate(shapes) if shape == (f, d)]
        if d == f:  # every layer may be either: only the order tells
            if len(ups) in (2, 3):
                yield tuple(ups[:-1]), ups[-1]
        elif downs and len(ups) in (len(downs), 2 * len(downs)):
            each = len(ups) // len(downs)
            yield from ((tuple(ups[each * i : each * (i + 1)]), down) for i, down in enumerate(downs))
        elif f % 2 == 0 and not downs:
            downs = [at for at, shape in enumerate(shapes) if shape == (f // 2, d)]
            yield from (((up,), down) for up, down in zip(ups, downs, strict=False))


def _near(name: str, owner: nn.Module) -> Iterator[Named]:
    """Children and their children, by their names inside the model."""
    for key, child in owner.named_children():
        yield _join(name, key), child
        yield from ((_join(name, f"{key}.{inner}"), part) for inner, part in child.named_children())


def _functions(owner: nn.Module) -> Iterator[tuple[str, Function]]:
    """Activations that a module keeps as plain functions, such as torch's TransformerEncoderLayer."""
    for key, value in vars(owner).items():
        if "act" in key and isinstance(value, (FunctionType, BuiltinFunctionType)) and is_activation(value):
            yield key, value


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_leaf(part: nn.Module) -> bool:
    return next(part.children(), None) is None
