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


class IndexMap(NamedTuple):
    """One step that moves or drops tokens of a batch.

    Attributes:
        places: (B, n) int64: new index of each token, -1 if it is dropped; with `selected_from`, the token at each new
            index.
        selected_from: number of tokens of which `places` selects or permutes some.
    """

    places: torch.Tensor
    selected_from: int | None = None

    def new_indices(self, row: int) -> torch.Tensor:
        """(tokens,) int64: new index of each token of one image, -1 if it is dropped."""
        own = self.places[row]
        if self.selected_from is None:
            return own
        return own.new_full((self.selected_from,), -1).scatter_(0, own, torch.arange(len(own), device=own.device))


class TokenHistory(NamedTuple):
    """The index maps that one image's tokens went through, evaluated on demand.

    Attributes:
        maps: those of its batch, in order.
        row: of the image in the batch.
        leading: number of class tokens in front before the maps, and after them if they are not features.
        earlier: maps, in another batch.
    """

    maps: Sequence[IndexMap]
    row: int
    leading: tuple[int, int] = (0, 0)
    earlier: TokenHistory | None = None

    def group(self) -> torch.Tensor:
        """(n,) int64: the remaining token that each token of the unreduced grid went into; -1 if it was dropped."""
        place = None if self.earlier is None else self.earlier.group()
        for index_map in self.maps:
            own = index_map.new_indices(self.row)
            place = own if place is None else torch.where(place < 0, place, own[place.clamp(min=0)])
        assert place is not None, "a history has maps"
        entering, leaving = self.leading
        return (place[entering:] - leaving).clamp(min=-1)


class KeptTokens(NamedTuple):
    """What is left of one image."""

    features: torch.Tensor  # (kept, C)
    source: torch.Tensor  # (kept,) int64, on the device: the unreduced image's token whose place each one takes
    history: TokenHistory | None = None  # None if nothing was removed, or for several grids joined


def encode_images(
    vision_model: nn.Module,
    pixel_values: torch.Tensor,
    plans: Sequence[Plan],
    select_strategy: str,
    cells: Sequence[Cells | None] = (),
) -> list[KeptTokens]:
    """Run the tower with the methods before and in it. Images share a batch as far as their plans agree.

    Args:
        vision_model: vLLM's CLIP or SigLIP vision model, built up to the feature layer.
        pixel_values: (B, 3, H, W).
        plans: B plans.
        select_strategy: `vision_feature_select_strategy` of the checkpoint.
        cells: per image, those that enter the tower (None: all); empty: all enter.
    """
    tower = Tower(vision_model, select_strategy)

    def encode(entering_grid: tuple[tuple[int, int] | None, Cells | None], members: list[int]) -> Sequence[KeptTokens]:
        pixels, group = take_members(pixel_values, members), [plans[i] for i in members]
        grid, entering = entering_grid
        if entering is not None:
            places = async_tensor_h2d(entering.places(), pixels.device)
            features = tower.finish(_run_layers(tower, tower.embed(pixels, places=places)))
            each = places.expand(len(features), -1)
            return _kept_tokens(features, each, [IndexMap(each, prod(tower.grid))])
        if grid is not None:
            method = group[0].reducer
            assert isinstance(method, BeforeTower)  # as _tower_grid saw
            smaller = method.resize(pixels, grid, tower.patch_size)
            features = tower.finish(_run_layers(tower, tower.embed(smaller, grid)))
            source = method.source(tower.grid, grid, features.device)
            return _kept_tokens(features, source.expand(len(features), -1))
        if any(_acts_in_tower(plan) for plan in group):
            return _run_reducing(tower, tower.embed(pixels), group)
        return all_kept(tower.run(pixels))

    each = [(_tower_grid(plan), own) for plan, own in zip(plans, cells or [None] * len(plans), strict=True)]
    return run_in_groups(each, lambda entering_grid: entering_grid, encode)


def no_projection(features: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """`Project` for features that are projected already."""
    return features


def project_together(
    projector: Callable[[torch.Tensor], torch.Tensor], features: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Project the tokens of all grids in one call."""
    return projector(torch.cat([*features])).split_with_sizes([len(own) for own in features])


def reduce_features(
    images: Sequence[KeptTokens],
    plans: Sequence[Plan],
    project: Project = no_projection,
    width: int | None = None,
    *,
    tower: Sequence[torch.Tensor] | None = None,
    queries: Sequence[torch.Tensor] = (),
) -> list[KeptTokens]:
    """Apply the projector and the methods after the tower; `AfterProjector` methods run after the projector.

    Args:
        images: the tower's output, one per grid.
        plans: one per grid.
        width: see `AfterTower.reduce`.
        tower: per grid `SideInputs.tower` (n, C), if that is not what is projected.
        queries: one per grid, see `SideInputs`; empty if no image has one.
    """

    def run(is_projected_first: bool, members: list[int]) -> Sequence[KeptTokens]:
        own, own_plans = [images[i] for i in members], [plans[i] for i in members]
        if not is_projected_first:
            return _projected(_reduced(own, own_plans, width), project)
        of_tower = [images[i].features if tower is None else tower[i] for i in members]
        own_queries = [queries[i] for i in members] if queries else ()
        return _reduced(_projected(own, project), own_plans, width, of_tower, own_queries)

    return run_in_groups(plans, lambda plan: isinstance(plan.reducer, AfterProjector), run)


def _projected(images: Sequence[KeptTokens], project: Project) -> list[KeptTokens]:
    features = project([image.features for image in images])
    return [image._replace(features=own) for image, own in zip(images, features, strict=True)]


def _reduced(
    images: Sequence[KeptTokens],
    plans: Sequence[Plan],
    width: int | None,
    tower: Sequence[torch.Tensor] = (),
    queries: Sequence[torch.Tensor] = (),
) -> list[KeptTokens]:
    def reduce(plan: Plan, members: list[int]) -> Sequence[KeptTokens]:
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
        left = _kept_tokens(reduced.tokens, reduced.source, [IndexMap(reduced.group)])
        return [_chained(*pair) for pair in zip(group, left, strict=True)]

    return run_in_groups(plans, lambda plan: plan, reduce)


def _chained(image: KeptTokens, left: KeptTokens) -> KeptTokens:
    """Join a second reduction to the first one of the same image."""
    if image.history is None or left.history is None:
        return left
    return left._replace(source=image.source[left.source], history=left.history._replace(earlier=image.history))


def _batch(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, n, C); a single image is not copied."""
    return torch.stack([*features]) if len(features) > 1 else features[0][None]


def take_members(x: Any, members: Sequence[int]) -> Any:
    """x[members] of a tensor or list, without an index tensor, which would be a host-to-device copy per group."""
    if len(members) == len(x):
        return x
    if isinstance(x, list):
        return [x[i] for i in members]
    return torch.stack([x[i] for i in members])


def _kept_tokens(
    features: torch.Tensor, source: torch.Tensor, maps: Sequence[IndexMap] = (), leading: tuple[int, int] = (0, 0)
) -> list[KeptTokens]:
    images = enumerate(zip(features, source, strict=True))
    return [KeptTokens(*image, TokenHistory(maps, row, leading) if maps else None) for row, image in images]


def join_grids(grids: Sequence[KeptTokens], encoded: int) -> KeptTokens:
    """Join equal grids of `encoded` tokens each, such as a video's frames, into one."""
    return KeptTokens(
        torch.cat([grid.features for grid in grids]),
        torch.cat([grid.source + i * encoded for i, grid in enumerate(grids)]),
    )


def all_kept(features: torch.Tensor) -> list[KeptTokens]:
    """(B, n, C) unreduced images."""
    return _kept_tokens(features, _indices(features))


def _indices(x: torch.Tensor) -> torch.Tensor:
    """(B, n, C) -> (B, n) indices."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def _run_layers(tower: Tower, hidden: torch.Tensor) -> torch.Tensor:
    for layer in tower.layers:
        hidden = run_layer(layer, hidden)
    return hidden


def _run_reducing(tower: Tower, hidden: torch.Tensor, plans: Sequence[Plan]) -> list[KeptTokens]:
    """Run all layers. Images leave the common batch, grouped by plan, at the first layer in which their plan acts."""
    together = list(range(len(plans)))  # images that are still in `hidden`
    groups: list[_TowerPass] = []
    for index, layer in enumerate(tower.layers):
        leaving = [i for i in together if _acts_in_tower(plans[i]) and plans[i].removed_in(index)]
        for plan, members in _group_by(leaving, lambda i: plans[i]).items():
            groups.append(_TowerPass.of(plan, members, take_members(hidden, [together.index(i) for i in members])))
        if leaving:
            staying = [i for i in together if i not in leaving]
            hidden = take_members(hidden, [together.index(i) for i in staying]) if staying else hidden[:0]
            together = staying
        for group in groups:
            group.run_layer(layer, index)
        if together:
            hidden = run_layer(layer, hidden)
    out: dict[int, KeptTokens] = {}
    for group in groups:
        out |= zip(group.members, group.finish(tower), strict=True)
    if together:
        out |= zip(together, all_kept(tower.finish(hidden)), strict=True)
    return [out[i] for i in range(len(plans))]


@dataclass(slots=True)
class _TowerPass:
    """Images with one plan on their way through the layers."""

    plan: Plan
    members: list[int]  # indices in the batch
    hidden: torch.Tensor  # (B, n, C)
    sizes: torch.Tensor  # (B, n) int64, patches in each token
    source: torch.Tensor  # (B, n) int64, the entering token whose place each one takes
    maps: list[IndexMap]  # empty until tokens are removed

    @classmethod
    def of(cls, plan: Plan, members: list[int], hidden: torch.Tensor) -> _TowerPass:
        count = _indices(hidden)
        return cls(plan, members, hidden, torch.ones_like(count), count, [])

    def run_layer(self, layer: nn.Module, index: int) -> None:
        """Run a layer with the plan's steps in it."""
        method = self.plan.reducer
        assert isinstance(method, InTower)
        steps = self.plan.removed_in(index)
        key_bias = self.sizes.log() if self.maps and method.proportional_attention else None
        if not steps and key_bias is None:
            self.hidden = run_layer(layer, self.hidden)
            return
        hidden, attention = attend(layer, self.hidden, key_bias)
        if self._ends_tower:
            hidden = run_mlp(layer, hidden)
        if steps:
            hidden, self.sizes, source, group = method.reduce(hidden, self.sizes, attention, steps, self.plan)
            self.source = self.source.gather(1, source)
            self.maps.append(IndexMap(group))
        self.hidden = hidden if self._ends_tower else run_mlp(layer, hidden)

    def finish(self, tower: Tower) -> list[KeptTokens]:
        """Features, and sources counted in patches; a class token's source is -1."""
        source, leading = self.source - int(tower.class_token), int(tower.class_token)
        if tower.class_token and not self._ends_tower:
            source = source[:, 1:]
        features = tower.finish(self.hidden, all_tokens=self._ends_tower)
        return _kept_tokens(features, source, self.maps, (leading, 0 if self._ends_tower else leading))

    @property
    def _ends_tower(self) -> bool:
        """Whether the method acts on the last layer's output; its tokens are then the features."""
        return isinstance(self.plan.reducer, AfterLastLayer)


def _acts_in_tower(plan: Plan) -> bool:
    return isinstance(plan.reducer, InTower)


def _tower_grid(plan: Plan) -> tuple[int, int] | None:
    """(rows, columns) of patches to which the plan resizes images; None: the tower's own."""
    return plan.grid if isinstance(plan.reducer, BeforeTower) else None


def run_in_groups(
    plans: Sequence[_P], key: Callable[[_P], _K], run: Callable[[_K, list[int]], Sequence[KeptTokens]]
) -> list[KeptTokens]:
    """Call `run(key, indices)` once per key; results in the order of the images."""
    out: dict[int, KeptTokens] = {}
    for group, members in _group_by(range(len(plans)), lambda i: key(plans[i])).items():
        out |= zip(members, run(group, members), strict=True)
    return [out[i] for i in range(len(plans))]


def _group_by(items: Iterable[int], key: Callable[[int], _K]) -> dict[_K, list[int]]:
    groups: dict[_K, list[int]] = {}
    for i in items:
        groups.setdefault(key(i), []).append(i)
    return groups
