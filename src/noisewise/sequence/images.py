"""Long convolutions over images: a feature map read row by row as one signal, in the place of two-dimensional convolutions."""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput
from noisewise.sequence.layer import MRConv, check_options
from noisewise.training import evaluating
from noisewise.typing import check_count

__all__ = ["ImageMRConv", "swap_layers"]


class ImageMRConv(nn.Module):
    """[batch, channels, height, width] -> the same: an `MRConv` over the pixels of a feature map, row after row.

    `options` are those of `MRConv`; it reads both ways unless they say `bidirectional=False`. Raises `InvalidInput`.
    Source: Cunningham et al., NeurIPS 2024 (arXiv 2408.09453), section 5, where it replaces the 7x7 layers of ConvNeXt.
    """

    def __init__(self, channels: int, height: int, width: int, **options: Any) -> None:
        super().__init__()
        self.height, self.width = check_count("height", height), check_count("width", width)
        check_options(options, taken=("d_model", "length"))
        if "causal" not in options:
            options.setdefault("bidirectional", True)
        self.conv = MRConv(channels, height * width, **options)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        """The convolved feature map. Raises `InvalidInput` for one of another size: its rows would be cut elsewhere."""
        if tuple(x.shape[2:]) != (self.height, self.width):
            raise InvalidInput(
                f"the layer was built for feature maps of {self.height} x {self.width}, got shape {tuple(x.shape)}: build it for "
                "the size of your images"
            )
        return self.conv(x.flatten(2)).reshape(x.shape)

    def extra_repr(self) -> str:
        """The size of its feature maps."""
        return f"height={self.height}, width={self.width}"


def swap_layers(
    module: nn.Module, build: Callable[..., nn.Module], *, sizes: Tensor | Mapping[str, Any], kind: type = nn.Conv2d,
    kernel_size: int | None = 7, depthwise: bool = True, names: str = "*", seed: int = 0,
) -> list[str]:  # fmt: skip
    """Put `build(channels, height, width, seed=...)` in the place of convolutions of `module`; returns their names.

    Replaced, in place, is each `kind` of `kernel_size` (None: any), `depthwise` (or any that keeps its channels), whose name
    matches the pattern `names` ("*.dwconv"). `sizes`: an example input, which is run once to see the size of every feature map
    (a tensor, or a dict of arguments), or a dict from names of layers to (height, width). Every layer gets a `seed` of its own.

        swap_layers(convnext, functools.partial(ImageMRConv, kind="fourier"), sizes=torch.zeros(1, 3, 224, 224))

    A swapped network loads a state dict of its like: build it, swap its layers by the same call, then `load_state_dict`.
    Raises `InvalidInput` where nothing matches, and for layers that change the size of their feature map or meet several.
    """
    _check_call(build, sizes, kind)
    found = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if name and _matches(layer, kind, kernel_size, depthwise) and fnmatch.fnmatchcase(name, names)
    }
    if not found:
        wanted = f"{'depthwise ' if depthwise else ''}{kind.__name__} of kernel size {kernel_size} named {names!r}"
        raise InvalidInput(f"{type(module).__name__} has no {wanted}; it has {_inventory(module, kind)}")
    if isinstance(sizes, Tensor) or any(isinstance(value, Tensor) for value in sizes.values()):
        known = _measured(module, found, sizes)
    else:
        known = _checked(found, sizes)
    made: dict[int, nn.Module] = {}
    for index, (name, layer) in enumerate(found.items()):
        if id(layer) not in made:
            new = build(layer.out_channels, *known[name], seed=seed + 2 * index)
            # a layer of any kind may have no weight of its own
            weight = next(layer.parameters(), None)
            made[id(layer)] = (new if weight is None else new.to(weight)).train(layer.training)
    for name, layer in found.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, made[id(layer)])
    return list(found)


def _check_call(build: Any, sizes: Any, kind: Any) -> None:
    if not isinstance(kind, type):
        raise InvalidInput(
            f"kind must be a class of layers such as torch.nn.Conv2d, got {kind!r}: kinds of sub-kernels belong to build, as in "
            "functools.partial(ImageMRConv, kind='fourier')"
        )
    own = build
    while isinstance(own, functools.partial):
        own = own.func
    if own is MRConv:
        raise InvalidInput("build=MRConv is a layer of signals, and what it replaces reads images: use ImageMRConv")
    if not isinstance(sizes, Tensor | Mapping):
        raise InvalidInput(
            f"sizes must be an example input, such as torch.zeros(1, 3, 224, 224), or a dict from names of layers to (height, "
            f"width), got {sizes!r}"
        )


def _matches(layer: nn.Module, kind: type, kernel_size: int | None, depthwise: bool) -> bool:
    if not isinstance(layer, kind):
        return False
    size, channels = getattr(layer, "kernel_size", None), getattr(layer, "out_channels", None)
    size = set(size) if isinstance(size, tuple) else {size}
    if channels is None or channels != layer.in_channels:
        return False
    return (kernel_size is None or size == {kernel_size}) and (not depthwise or layer.groups == channels)


def _inventory(module: nn.Module, kind: type) -> str:
    """What there is of this kind, in words."""
    there = [f"{name}: {layer}" for name, layer in module.named_modules() if isinstance(layer, kind)]
    if not there:
        return f"no {kind.__name__} at all"
    more = f" and {len(there) - 5} more" if len(there) > 5 else ""
    return "; ".join(there[:5]) + more


def _measured(module: nn.Module, found: dict[str, nn.Module], example: Any) -> dict[str, tuple[int, int]]:
    """Height and width of each layer's feature map, from one run of `example` in eval mode."""
    seen: dict[int, set[tuple[torch.Size, torch.Size]]] = {id(layer): set() for layer in found.values()}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen[id(layer)].add((inputs[0].shape[2:], output.shape[2:]))

    hooks = [layer.register_forward_hook(note) for layer in {id(layer): layer for layer in found.values()}.values()]
    try:
        with evaluating(module), torch.no_grad():
            module(example) if isinstance(example, Tensor) else module(**example)
    finally:
        for hook in hooks:
            hook.remove()
    known = {}
    for name, layer in found.items():
        pairs = seen[id(layer)]
        if len(pairs) != 1 or len(set(*pairs)) != 1:
            what = (
                "is never reached" if not pairs else f"maps {', '.join(f'{tuple(a)} to {tuple(b)}' for a, b in pairs)}"
            )
            raise InvalidInput(f"layer {name!r} {what} for this input; leave it out by names=, or give sizes= by name")
        size = next(iter(pairs))[0]
        if len(size) != 2:
            raise InvalidInput(
                f"layer {name!r} reads inputs of {len(size)} axes beside its channels, and images have 2"
            )
        known[name] = (size[0], size[1])
    return known


def _checked(found: dict[str, nn.Module], sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    missing = sorted(found.keys() - sizes.keys())
    if missing:
        raise InvalidInput(f"sizes has no (height, width) for {', '.join(missing)}: give all, or an example input")
    for name in found:
        if not isinstance(sizes[name], tuple | list | torch.Size) or len(sizes[name]) != 2:
            raise InvalidInput(f"sizes[{name!r}] must be (height, width), got {sizes[name]!r}")
    return {name: (check_count("height", sizes[name][0]), check_count("width", sizes[name][1])) for name in found}
