"""Runs a batch of images through the vision tower and reduces each by its own plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

from foldserve.reducers.method import AfterLastLayer, AfterProjector, AfterTower, BeforeTower, InTower, SideInputs
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import Plan
from foldserve.server.engine.tower import Tower, attend, run_layer, run_mlp

Project: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""(n, C) features of some grids -> (n, hidden), token by token."""

_K = TypeVar("_K", bound=Hashable)
_P = TypeVar("_P")


class Move(NamedTuple):
    """One step that moves or drops tokens of a batch.

    Attributes:
        places: (B, n) int64: new index of each token, -1 if it is dropped; with `chosen_of`, the token at each new
            index.
        chosen_of: number of tokens of which `places` selects or permutes some.
    """

    places: torch.Tensor
    chosen_of: int | None = None

    def targets(self, row: int) -> torch.Tensor:
        """(tokens,) int64: new index of each token of one image, -1 if it is dropped."""
        own = self.places[row]
        if self.chosen_of is None:
            return own
        return own.new_full((self.chosen_of,), -1).scatter_(0, own, torch.arange(len(own), device=own.device))


class Trail(NamedTuple):
    """The moves of one image's tokens, evaluated on demand.

    Attributes:
        moves: those of its batch, in order.
        row: of the image in the batch.
        leading: number of class tokens in front before the moves, and after them if they are not features.
        before: earlier moves, in another batch.
    """

    moves: Sequence[Move]
    row: int
    leading: tuple[int, int] = (0, 0)
    before: Trail | None = None

    def group(self) -> torch.Tensor:
        """(n,) int64: the remaining token that each token of the unreduced grid went into; -1 if it was dropped."""
        place = None if self.before is None else self.before.group()
        for move in self.moves:
            own = move.targets(self.row)
            place = own if place is None else torch.where(place < 0, place, own[place.clamp(min=0)])
        assert place is not None, "a trail has moves"
        entering, leaving = self.leading
        return (place[entering:] - leaving).clamp(min=-1)


class Survivors(NamedTuple):
    """What is left of one image."""

    features: torch.Tensor  # (kept, C)
    source: torch.Tensor  # (kept,) int64, on the device: the unreduced image's token whose place each one takes
    trail: Trail | None = None  # None if nothing was removed, or for several grids joined


def encode_images(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    plans: Sequence[Plan],
    select_strategy: str,
    cells: Sequence[Cells | None] = (),
) -> list[Survivors]:
    """Run the tower with the methods before and in it. Images share a batch as far as their plans agree.

    Args:
        tower: vLLM's CLIP or SigLIP vision model, built up to the feature layer.
        pixel_values: (B, 3, H, W).
        plans: B plans.
        select_strategy: `vision_feature_select_strategy` of the checkpoint.
        cells: per image, those that enter the tower (None: all); empty: all enter.
    """
    walk = Tower(tower, select_strategy)

    def encode(seen: tuple[tuple[int, int] | None, Cells | None], members: list[int]) -> Sequence[Survivors]:
        pixels, group = rows(pixel_values, members), [plans[i] for i in members]
        grid, entering = seen
        if entering is not None:
            places = async_tensor_h2d(entering.places(), pixels.device)
            features = walk.finish(_run(walk, walk.embed(pixels, places=places)))
            each = places.expand(len(features), -1)
            return _survivors(features, each, [Move(each, prod(walk.grid))])
        if grid is not None:
            method = group[0].reducer
            assert isinstance(method, BeforeTower)  # as _tower_grid saw
            features = walk.finish(_run(walk, walk.embed(method.resize(pixels, grid, walk.patch_size), grid)))
            return _survivors(features, method.source(walk.grid, grid, features.device).expand(len(features), -1))
        if any(_acts_in_tower(plan) for plan in group):
            return _run_reducing(walk, walk.embed(pixels), group)
        return untouched(walk.run(pixels))

    each = [(_tower_grid(plan), own) for plan, own in zip(plans, cells or [None] * len(plans), strict=True)]
    return in_groups(each, lambda seen: seen, encode)


def as_they_are(features: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """`Project` for features that are projected already."""
    return features


def project_together(
    projector: Callable[[torch.Tensor], torch.Tensor], features: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Project the tokens of all grids in one call."""
    return projector(torch.cat([*features])).split_with_sizes([len(own) for own in features])


def reduce_features(
    images: Sequence[Survivors],
    plans: Sequence[Plan],
    project: Project = as_they_are,
    width: int | None = None,
    *,
    tower: Sequence[torch.Tensor] | None = None,
    queries: Sequence[torch.Tensor] = (),
) -> list[Survivors]:
    """Apply the projector and the methods after the tower; `AfterProjector` methods run after the projector.

    Args:
        images: the tower's output, one per grid.
        plans: one per grid.
        width: see `AfterTower.reduce`.
        tower: per grid `SideInputs.tower` (n, C), if that is not what is projected.
        queries: one per grid, see `SideInputs`; empty if no image has one.
    """

    def run(is_projected_first: bool, members: list[int]) -> Sequence[Survivors]:
        own, own_plans = [images[i] for i in members], [plans[i] for i in members]
        if not is_projected_first:
            return _projected(_reduced(own, own_plans, width), project)
        of_tower = [images[i].features if tower is None else tower[i] for i in members]
        own_queries = [queries[i] for i in members] if queries else ()
        return _reduced(_projected(own, project), own_plans, width, of_tower, own_queries)

    return in_groups(plans, lambda plan: isinstance(plan.reducer, AfterProjector), run)


def _projected(images: Sequence[Survivors], project: Project) -> list[Survivors]:
    features = project([image.features for image in images])
    return [image._replace(features=own) for image, own in zip(images, features, strict=True)]


def _reduced(
    images: Sequence[Survivors],
    plans: Sequence[Plan],
    width: int | None,
    tower: Sequence[torch.Tensor] = (),
    queries: Sequence[torch.Tensor] = (),
) -> list[Survivors]:
    def reduce(plan: Plan, members: list[int]) -> Sequence[Survivors]:
        method, group = plan.reducer, [images[i] for i in members]
        if not isinstance(method, AfterTower):
            return group
        batch = _batch([image.features for image in group])
        if isinstance(method, AfterProjector):
            of_tower = _batch([tower[i] for i in members]) if method.needs_tower else None
            own_queries = [queries[i] for i in members] if method.takes_query and queries else None
            reduced = method.reduce(batch, plan, width, SideInputs(of_tower, own_queries))
        else:
            reduced = method.reduce(batch, plan, width)
        left = _survivors(reduced.tokens, reduced.source, [Move(reduced.group)])
        return [_behind(*pair) for pair in zip(group, left, strict=True)]

    return in_groups(plans, lambda plan: plan, reduce)


def _behind(image: Survivors, left: Survivors) -> Survivors:
    """Join a second reduction to the first one of the same image."""
    if image.trail is None or left.trail is None:
        return left
    return left._replace(source=image.source[left.source], trail=left.trail._replace(before=image.trail))


def _batch(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, n, C); a single image is not copied."""
    return torch.stack([*features]) if len(features) > 1 else features[0][None]


def rows(x: Any, members: Sequence[int]) -> Any:
    """x[members] of a tensor or list, without an index tensor, which would be a host-to-device copy per group."""
    if len(members) == len(x):
        return x
    if isinstance(x, list):
        return [x[i] for i in members]
    return torch.stack([x[i] for i in members])


def _survivors(
    features: torch.Tensor, source: torch.Tensor, moves: Sequence[Move] = (), leading: tuple[int, int] = (0, 0)
) -> list[Survivors]:
    images = enumerate(zip(features, source, strict=True))
    return [Survivors(*image, Trail(moves, row, leading) if moves else None) for row, image in images]


def one_after_another(grids: Sequence[Survivors], encoded: int) -> Survivors:
    """Join equal grids of `encoded` tokens each, such as a video's frames, into one."""
    return Survivors(
        torch.cat([grid.features for grid in grids]),
        torch.cat([grid.source + i * encoded for i, grid in enumerate(grids)]),
    )


def untouched(features: torch.Tensor) -> list[Survivors]:
    """(B, n, C) unreduced images."""
    return _survivors(features, _count(features))


def _count(x: torch.Tensor) -> torch.Tensor:
    """(B, n, C) -> (B, n) indices."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def _run(tower: Tower, hidden: torch.Tensor) -> torch.Tensor:
    for layer in tower.layers:
        hidden = run_layer(layer, hidden)
    return hidden


def _run_reducing(tower: Tower, hidden: torch.Tensor, plans: Sequence[Plan]) -> list[Survivors]:
    """Run all layers. Images leave the common batch, grouped by plan, at the first layer in which their plan acts."""
    together = list(range(len(plans)))  # images that are still in `hidden`
    groups: list[_Group] = []
    for index, layer in enumerate(tower.layers):
        leaving = [i for i in together if _acts_in_tower(plans[i]) and plans[i].removed_in(index)]
        for plan, members in _by(leaving, lambda i: plans[i]).items():
            groups.append(_Group.of(plan, members, rows(hidden, [together.index(i) for i in members])))
        if leaving:
            staying = [i for i in together if i not in leaving]
            hidden = rows(hidden, [together.index(i) for i in staying]) if staying else hidden[:0]
            together = staying
        for group in groups:
            group.through(layer, index)
        if together:
            hidden = run_layer(layer, hidden)
    out: dict[int, Survivors] = {}
    for group in groups:
        out |= zip(group.members, group.finish(tower), strict=True)
    if together:
        out |= zip(together, untouched(tower.finish(hidden)), strict=True)
    return [out[i] for i in range(len(plans))]


@dataclass(slots=True)
class _Group:
    """Images with one plan on their way through the layers."""

    plan: Plan
    members: list[int]  # indices in the batch
    hidden: torch.Tensor  # (B, n, C)
    sizes: torch.Tensor  # (B, n) int64, patches in each token
    source: torch.Tensor  # (B, n) int64, the entering token whose place each one takes
    moves: list[Move]  # empty until tokens are removed

    @classmethod
    def of(cls, plan: Plan, members: list[int], hidden: torch.Tensor) -> _Group:
        count = _count(hidden)
        return cls(plan, members, hidden, torch.ones_like(count), count, [])

    def through(self, layer: nn.Module, index: int) -> None:
        """Run a layer with the plan's steps in it."""
        method = self.plan.reducer
        assert isinstance(method, InTower)
        steps = self.plan.removed_in(index)
        key_bias = self.sizes.log() if self.moves and method.proportional_attention else None
        if not steps and key_bias is None:
            self.hidden = run_layer(layer, self.hidden)
            return
        hidden, attention = attend(layer, self.hidden, key_bias)
        if self._ends_tower:
            hidden = run_mlp(layer, hidden)
        if steps:
            hidden, self.sizes, source, group = method.reduce(hidden, self.sizes, attention, steps, self.plan)
            self.source = self.source.gather(1, source)
            self.moves.append(Move(group))
        self.hidden = hidden if self._ends_tower else run_mlp(layer, hidden)

    def finish(self, tower: Tower) -> list[Survivors]:
        """Features, and sources counted in patches; a class token's source is -1."""
        source, leading = self.source - int(tower.class_token), int(tower.class_token)
        if tower.class_token and not self._ends_tower:
            source = source[:, 1:]
        features = tower.finish(self.hidden, all_tokens=self._ends_tower)
        return _survivors(features, source, self.moves, (leading, 0 if self._ends_tower else leading))

    @property
    def _ends_tower(self) -> bool:
        """Whether the method acts on the last layer's output; its tokens are then the features."""
        return isinstance(self.plan.reducer, AfterLastLayer)


def _acts_in_tower(plan: Plan) -> bool:
    return isinstance(plan.reducer, InTower)


def _tower_grid(plan: Plan) -> tuple[int, int] | None:
    """(rows, columns) of patches to which the plan resizes images; None: the tower's own."""
    return plan.grid if isinstance(plan.reducer, BeforeTower) else None


def in_groups(
    plans: Sequence[_P], key: Callable[[_P], _K], run: Callable[[_K, list[int]], Sequence[Survivors]]
) -> list[Survivors]:
    """Call `run(key, indices)` once per key; results in the order of the images."""
    out: dict[int, Survivors] = {}
    for group, members in _by(range(len(plans)), lambda i: key(plans[i])).items():
        out |= zip(members, run(group, members), strict=True)
    return [out[i] for i in range(len(plans))]


def _by(items: Iterable[int], key: Callable[[int], _K]) -> dict[_K, list[int]]:
    groups: dict[_K, list[int]] = {}
    for i in items:
        groups.setdefault(key(i), []).append(i)
    return groups
