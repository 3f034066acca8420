"""A batch of images through the vision tower, each reduced by its own plan.

Tensor code only; plans come from `foldserve.reducers.plan`, maths from the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

from foldserve.reducers.method import AfterLastLayer, AfterProjector, AfterTower, BeforeTower, InTower, Seen
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import Plan
from foldserve.server.engine.tower import Tower, attend, run_layer, run_mlp

Project: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""Features (n, C) of some grids, in their order -> those of the decoder's width, token by token."""

_K = TypeVar("_K", bound=Hashable)
_P = TypeVar("_P")


class Move(NamedTuple):
    """One step on the way of a batch's tokens.

    Attributes:
        places: (B, n) int64: where each token goes, -1 if it is dropped; or, with `chosen_of`, which comes to each
            place.
        chosen_of: tokens of which some are chosen, or all in another order.
    """

    places: torch.Tensor
    chosen_of: int | None = None

    def targets(self, row: int) -> torch.Tensor:
        """(tokens,) int64: where each token of one image goes, -1 if it is dropped."""
        own = self.places[row]
        if self.chosen_of is None:
            return own
        return own.new_full((self.chosen_of,), -1).scatter_(0, own, torch.arange(len(own), device=own.device))


class Trail(NamedTuple):
    """The way of one image's tokens. Nothing is computed before it is asked for.

    Attributes:
        moves: of the batch, in their order.
        row: of the image in it.
        leading: class tokens, which come first, and how many of them are first at the end and no features.
        before: the way up to there.
    """

    moves: Sequence[Move]
    row: int
    leading: tuple[int, int] = (0, 0)
    before: Trail | None = None

    def group(self) -> torch.Tensor:
        """(n,) int64: the token of what is left that each token of the unreduced grid went into; -1 if dropped."""
        place = None if self.before is None else self.before.group()
        for move in self.moves:
            own = move.targets(self.row)
            place = own if place is None else torch.where(place < 0, place, own[place.clamp(min=0)])
        assert place is not None, "a trail has moves"
        entering, leaving = self.leading
        return (place[entering:] - leaving).clamp(min=-1)


class Survivors(NamedTuple):
    """What is left of one image.

    Attributes:
        features: (kept, C).
        source: (kept,) int64, on the device: the token of the unreduced image that each one stands for.
        trail: how its tokens got there; None where none was removed, and of what is put together of several grids.
    """

    features: torch.Tensor
    source: torch.Tensor
    trail: Trail | None = None


def encode_images(
    tower: nn.Module,
    pixel_values: torch.Tensor,
    plans: Sequence[Plan],
    select_strategy: str,
    cells: Sequence[Cells | None] = (),
) -> list[Survivors]:
    """Runs the tower with the methods that work before and in it; images share a batch as far as their plans agree.

    Args:
        tower: vLLM's CLIP or SigLIP vision model, built up to the feature layer.
        pixel_values: (B, 3, H, W).
        plans: B plans.
        select_strategy: `vision_feature_select_strategy` of the checkpoint.
        cells: for each image those that enter the tower, or None; empty: all enter.

    Returns:
        What is left of each image before the methods after the tower, in their order.
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
    """Projects what the tower has projected already."""
    return features


def project_together(
    projector: Callable[[torch.Tensor], torch.Tensor], features: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """All tokens of some grids through a projector at once."""
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
    """The projector and the methods that work after the tower: before it, but for those that look at what it gives.

    Args:
        images: grids as the tower gives them.
        plans: one for each.
        project: that the tower's output is still to go through.
        width: see `AfterTower.reduce`.
        tower: of each grid, `Seen.tower` (n, C); None: what is projected. Needed if a method asks for it.
        queries: of each grid, see `Seen`; none where no image has one.
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
    """See `reduce_features`; images of one plan together."""

    def reduce(plan: Plan, members: list[int]) -> Sequence[Survivors]:
        method, group = plan.reducer, [images[i] for i in members]
        if not isinstance(method, AfterTower):
            return group
        batch = _batch([image.features for image in group])
        if isinstance(method, AfterProjector):
            of_tower = _batch([tower[i] for i in members]) if method.needs_tower else None
            own_queries = [queries[i] for i in members] if method.takes_query and queries else None
            reduced = method.reduce(batch, plan, width, Seen(of_tower, own_queries))
        else:
            reduced = method.reduce(batch, plan, width)
        left = _survivors(reduced.tokens, reduced.source, [Move(reduced.group)])
        return [_behind(*pair) for pair in zip(group, left, strict=True)]

    return in_groups(plans, lambda plan: plan, reduce)


def _behind(image: Survivors, left: Survivors) -> Survivors:
    """What is left of an image of which some tokens were gone before."""
    if image.trail is None or left.trail is None:
        return left
    return left._replace(source=image.source[left.source], trail=left.trail._replace(before=image.trail))


def _batch(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, n, C); a large image by itself is not copied."""
    return torch.stack([*features]) if len(features) > 1 else features[0][None]


def rows(x: Any, members: Sequence[int]) -> Any:
    """x[members] of a tensor, without an index tensor: that would be a host-to-device copy per group; or of a list."""
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
    """What is left of equal grids of so many tokens each, such as a video's frames, as of one grid."""
    return Survivors(
        torch.cat([grid.features for grid in grids]),
        torch.cat([grid.source + i * encoded for i, grid in enumerate(grids)]),
    )


def untouched(features: torch.Tensor) -> list[Survivors]:
    """Images (B, n, C) of which nothing is removed yet."""
    return _survivors(features, _count(features))


def _count(x: torch.Tensor) -> torch.Tensor:
    """(B, n, C) -> (B, n): 0 ... n - 1 for each image."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def _run(tower: Tower, hidden: torch.Tensor) -> torch.Tensor:
    for layer in tower.layers:
        hidden = run_layer(layer, hidden)
    return hidden


def _run_reducing(tower: Tower, hidden: torch.Tensor, plans: Sequence[Plan]) -> list[Survivors]:
    """All layers: together up to the layer in which a plan acts first, then each such plan's images by themselves."""
    together = list(range(len(plans)))  # places in the batch of the images that are still in `hidden`
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
    """Images with one plan on their way through the layers.

    Attributes:
        members: their places in the batch.
        hidden: (B, n, C).
        sizes: (B, n) int64, patches in each token.
        source: (B, n) int64, the token that each one stands for, of those that entered.
        moves: of the steps so far; none before tokens have been removed.
    """

    plan: Plan
    members: list[int]
    hidden: torch.Tensor
    sizes: torch.Tensor
    source: torch.Tensor
    moves: list[Move]

    @classmethod
    def of(cls, plan: Plan, members: list[int], hidden: torch.Tensor) -> _Group:
        count = _count(hidden)
        return cls(plan, members, hidden, torch.ones_like(count), count, [])

    def through(self, layer: nn.Module, index: int) -> None:
        """Runs a layer with the plan's steps in it."""
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
        """Features, and sources that count the patches alone; that of a class token is -1."""
        source, leading = self.source - int(tower.class_token), int(tower.class_token)
        if tower.class_token and not self._ends_tower:
            source = source[:, 1:]
        features = tower.finish(self.hidden, all_tokens=self._ends_tower)
        return _survivors(features, source, self.moves, (leading, 0 if self._ends_tower else leading))

    @property
    def _ends_tower(self) -> bool:
        """The method acts on what the last layer gives, and leaves the tokens of the features."""
        return isinstance(self.plan.reducer, AfterLastLayer)


def _acts_in_tower(plan: Plan) -> bool:
    return isinstance(plan.reducer, InTower)


def _tower_grid(plan: Plan) -> tuple[int, int] | None:
    """(rows, columns) of patches that the tower is to see; None for its own."""
    return plan.grid if isinstance(plan.reducer, BeforeTower) else None


def in_groups(
    plans: Sequence[_P], key: Callable[[_P], _K], run: Callable[[_K, list[int]], Sequence[Survivors]]
) -> list[Survivors]:
    """Runs the images of each key together: `run(key, their places)`; results in the order of the images."""
    out: dict[int, Survivors] = {}
    for group, members in _by(range(len(plans)), lambda i: key(plans[i])).items():
        out |= zip(members, run(group, members), strict=True)
    return [out[i] for i in range(len(plans))]


def _by(items: Iterable[int], key: Callable[[int], _K]) -> dict[_K, list[int]]:
    groups: dict[_K, list[int]] = {}
    for i in items:
        groups.setdefault(key(i), []).append(i)
    return groups
