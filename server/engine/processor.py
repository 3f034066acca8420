"""The multimodal processor: a request's reductions become per-image plans, placeholders and cache identities."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import chain, groupby, islice
from typing import Any, cast
from zlib import crc32

import torch
from transformers import BatchFeature
from vllm.inputs import MultiModalHashes, MultiModalInput
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    ProcessorInputs,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.utils.cache import LRUCache

from foldserve.reducers import METHODS
from foldserve.reducers.item import ItemPlan, Layout, plan_item
from foldserve.reducers.ladder import PixelCap, SettledStep, ratio_of
from foldserve.reducers.method import QUERY_TOKENS, BeforeTower, Method
from foldserve.reducers.pixelprune import Cells
from foldserve.reducers.plan import InvalidReduction, Reduction
from foldserve.server.engine import positions
from foldserve.server.engine.cells import CellCountQuestion, CellMaskQuestion, PixelFindings, PixelQuestion
from foldserve.server.engine.families.registry import family_of
from foldserve.server.engine.family import PLAN_FIELDS, QUERY_FIELDS, Family, Modality
from foldserve.server.engine.identity import ItemIdentity
from foldserve.server.engine.pixels import Normalize, leaving_bytes

KWARG = "foldserve"
"""Key in `mm_processor_kwargs`: one reduction (JSON form) for all images and videos, a list with one per image, or
either of them by modality: `{"image": ..., "video": ...}`."""

DUMMY_FIELD = "vision_dummy"
"""Multimodal field and processor kwarg that mark the dummy images of vLLM's profile run."""

CAPS = "foldserve_caps"
"""Key in `mm_processor_kwargs` beside `KWARG`: a `PixelCap` for each image, which determines its ratio."""

PLANS = "foldserve_plans"
"""Key in the processor's result: the plans by modality, for the API's response."""

SETTLED = "foldserve_settled"
"""Key beside `PLANS`: the `SettledStep` of each image that came with a cap."""

_NOT_REDUCED: Mapping[Modality, str] = {
    "image": "only images can be reduced, by a tower that is known, not embeddings",
    "video": "this model's videos can't be reduced, or their frames are to be chosen while they are processed: choose "
    "them before (metadata with do_sample_frames false), and send no fps or num_frames beside a reduction",
}

_NOT_SENT = (
    "an image or video came as its uuid alone, but this server does not know its size (any more), which decides its "
    "number of tokens: send the image with its uuid"
)
_NOT_SEEN = (
    "an image came as its uuid alone, but this server does not know (any more) how many tokens its pixels leave: send "
    "the image with its uuid"
)
_MOST_SHAPES = 65_536  # a hundred bytes each
_MOST_ANSWERS = 4_096  # masks of 2 KiB at most
_FINDINGS = "foldserve_findings"
"""Key in `mm_processor_kwargs`, added by `apply` if pixels decide what stays of an image: a `PixelFindings`."""

_Kwargs = Mapping[str, object]
_Uuids = Mapping[str, Sequence[str | None]]


class FoldProcessor(BaseMultiModalProcessor[Any]):
    """Mixin before a family's multimodal processor of vLLM. Modifications:

    - removes `mm_processor_kwargs["foldserve"]` before the HF processor sees it;
    - adds each image's plan to its multimodal data, also the tokens of its query if the method needs them, and marks
      dummy images;
    - if an image's pixels decide how much of it stays, or its ratio, processes it first, once, and caches the answer;
    - passes images without options to the image processor alone, because the rest of the HF processor takes longer
      than the image itself. They stay uint8 if possible, see `pixels`;
    - makes plan and query part of the image's identity (`ItemIdentity`) and so of the processor, encoder and prefix
      caches. If nothing is removed, everything is as in vLLM. Refuses a client's uuid that looks like such an identity.
    """

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs={DUMMY_FIELD: True})

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """vLLM's result, with the plans under `PLANS`.

        Raises:
            InvalidReduction: a reduction is impossible, or kept positions exceed those of the model.
        """
        inputs, settled = self._with_caps(inputs)
        inputs = self._with_cells(inputs)
        planned = self._all_plans(inputs.mm_data_items, inputs.hf_processor_mm_kwargs, inputs.mm_uuid_items)
        processed = super().apply(inputs, timing_ctx)
        if planned:
            beyond = sum(map(self._planned_family.positions_beyond_tokens, chain.from_iterable(planned.values())))
            limit = positions.trained_positions(self.info.ctx.model_config)
            positions.refuse_positions(len(processed["prompt_token_ids"]), beyond, 1, limit)
        return cast(MultiModalInput, {**processed, PLANS: planned, SETTLED: settled})

    def unpredicted(self, images: Sequence[Any], levels: int) -> list[int]:
        """Unpredicted cells of each image; raises InvalidReduction if they cannot be counted."""
        items = MultiModalDataItems({"image": ImageProcessorItems(images)})
        plans = self.plans(items, {})
        family = self._planned_family
        pixels = family.pixels(self._processed(items, {"image": plans}, {}), "image")
        each = zip(pixels, [plan.layout for plan in plans], strict=True)
        return [CellCountQuestion("", layout, levels).answer(family.cells(own, layout)) for own, layout in each]

    def _with_caps(self, inputs: ProcessorInputs) -> tuple[ProcessorInputs, list[SettledStep]]:
        """The inputs with the ratios that their images' pixels determine, and what each image got.

        Raises:
            InvalidReduction: as `plans`, or an image's pixels are not uint8.
        """
        kwargs, items = dict(inputs.hf_processor_mm_kwargs), inputs.mm_data_items
        caps: Sequence[PixelCap] = kwargs.pop(CAPS, ())
        inputs = replace(inputs, hf_processor_mm_kwargs=kwargs)
        if not caps:
            return inputs, []
        asked = self._reductions(items, kwargs, "image")
        whole = self.plans(items, without_own_options(kwargs), "image", inputs.mm_uuid_items)
        if not whole:  # embeddings: refused, as with every reduction
            self.plans(items, kwargs, "image", inputs.mm_uuid_items)
        hashes = self._stock_hashes(inputs)
        questions = [
            CellCountQuestion(image_hash, plan.layout, cap.levels)
            for image_hash, plan, cap in zip(hashes["image"], whole, caps, strict=True)
        ]
        counts, findings = self._answer_questions(inputs, questions, hashes, whole)
        if any(isinstance(METHODS[reduction.method], BeforeTower) for reduction in asked):
            findings = replace(findings, processed=None)  # they may make the image smaller before it is processed
        settled = [cap.settle(count, plan.encoded) for cap, count, plan in zip(caps, counts, whole, strict=True)]
        ratios = [ratio_of(one.step) for one in settled]
        reductions = [replace(one, ratio=ratio).to_json() for one, ratio in zip(asked, ratios, strict=True)]
        of_all = {**_by_modality(kwargs.get(KWARG)), "image": reductions}
        return replace(inputs, hf_processor_mm_kwargs={**kwargs, KWARG: of_all, _FINDINGS: findings}), settled

    def _with_cells(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """The inputs with the cells that their images' pixels choose, under `_FINDINGS`; raises as `_with_caps`."""
        items, kwargs = inputs.mm_data_items, inputs.hf_processor_mm_kwargs
        asked = self._reductions(items, kwargs, "image")
        if all(reduction.pruning is None for reduction in asked):
            return inputs
        plans = self.plans(items, kwargs, "image", inputs.mm_uuid_items)  # as if all cells stayed
        hashes = self._stock_hashes(inputs)
        masks = [
            CellMaskQuestion.of(image_hash, plan.layout, reduction)
            for image_hash, plan, reduction in zip(hashes["image"], plans, asked, strict=True)
        ]
        cells, findings = self._answer_questions(inputs, masks, hashes, plans)
        return replace(inputs, hf_processor_mm_kwargs={**kwargs, _FINDINGS: replace(findings, cells=tuple(cells))})

    def _answer_questions(
        self,
        inputs: ProcessorInputs,
        questions: Sequence[PixelQuestion | None],
        hashes: MultiModalHashes,
        plans: Sequence[ItemPlan],
    ) -> tuple[list[Any], PixelFindings]:
        """The answer for each image, None if it has no question, and the images processed for that.

        Raises:
            InvalidReduction: pixels are needed that were not sent or are not uint8.
        """
        known = {one: self._answers[one] for one in questions if one in self._answers}
        unknown = [(i, one) for i, one in enumerate(questions) if one is not None and one not in known]
        images, processed = [inputs.mm_data_items["image"].get(i) for i, _ in unknown], None
        if any(image is None for image in images):
            raise InvalidReduction(_NOT_SEEN, param="")
        if images:
            data = MultiModalDataItems({"image": ImageProcessorItems(images)})
            stock = without_own_options(inputs.hf_processor_mm_kwargs)
            processed = self._processed(data, {"image": [plans[i] for i, _ in unknown]}, stock)
            pixels = self._planned_family.pixels(processed, "image")
            for (_, one), own in zip(unknown, pixels, strict=True):
                known[one] = self._answers[one] = one.answer(self._planned_family.cells(own, one.layout))
        answers = [None if one is None else known[one] for one in questions]
        return answers, PixelFindings((None,) * len(questions), hashes, processed, tuple(i for i, _ in unknown))

    @cached_property
    def _answers(self) -> LRUCache[PixelQuestion | None, Any]:
        return LRUCache(capacity=_MOST_ANSWERS)

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: _Kwargs) -> BatchFeature:
        planned = self._all_plans(mm_items, hf_kwargs)
        findings = hf_kwargs.get(_FINDINGS)
        processed = findings.processed_of(mm_items) if isinstance(findings, PixelFindings) else None
        if processed is None:
            processed = self._processed(mm_items, planned, without_own_options(hf_kwargs))
        for modality, plans in planned.items():
            items = zip(plans, self._planned_family.pixels(processed, modality), strict=True)
            seeded = [plan.with_seed(self._seed(pixels)) if plan.is_seeded else plan for plan, pixels in items]
            queries = self._queries(plans, hf_kwargs, modality)
            if any(queries):
                processed[QUERY_FIELDS[modality]] = [torch.tensor(ids, dtype=torch.int64) for ids in queries]
            # (ints,) each; longer with a mask of cells
            processed[PLAN_FIELDS[modality]] = [torch.tensor(plan.to_ints()) for plan in seeded]
        if DUMMY_FIELD in hf_kwargs and "image" in planned:
            processed[DUMMY_FIELD] = torch.ones(len(planned["image"]), 1, dtype=torch.bool)
        return processed

    def _processed(
        self, mm_items: MultiModalDataItems, planned: Mapping[Modality, Sequence[ItemPlan]], hf_kwargs: _Kwargs
    ) -> BatchFeature:
        """vLLM's processing of the items; families may use the plans."""
        return self._apply_stock(mm_items, hf_kwargs)

    def _apply_stock(self, mm_items: MultiModalDataItems, hf_kwargs: _Kwargs) -> BatchFeature:
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)

    def _call_hf_processor(self, hf_data: _Kwargs, hf_kwargs: _Kwargs) -> BatchFeature:
        asked = hf_kwargs.keys() - {"truncation"} or hf_data.keys() - {"text"} != {"images"}  # vLLM always sends these
        if asked or self._image_processor is None:
            return super()._call_hf_processor(hf_data, hf_kwargs)
        return self.info.ctx.call_hf_processor(self._image_processor, {"images": hf_data["images"]})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: _Kwargs
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        own = {
            name: MultiModalFieldConfig.batched(modality, keep_on_cpu=True) for modality, name in PLAN_FIELDS.items()
        }
        own |= {name: MultiModalFieldConfig.batched(modality) for modality, name in QUERY_FIELDS.items()}
        return fields | own | {DUMMY_FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        planned = self._all_plans(inputs.mm_data_items, inputs.hf_processor_mm_kwargs, inputs.mm_uuid_items)
        findings = inputs.hf_processor_mm_kwargs.get(_FINDINGS)
        hashes = dict(findings.hashes if isinstance(findings, PixelFindings) else self._stock_hashes(inputs))
        for h in chain.from_iterable(hashes.values()):
            ItemIdentity(h)  # a client's uuid must not look like a reduction that no plan made
        for modality, plans in planned.items():
            queries = self._queries(plans, inputs.hf_processor_mm_kwargs, modality)
            each = zip(hashes[modality], plans, queries, strict=True)
            hashes[modality] = [self._identity(h, plan, query) for h, plan, query in each]
        is_dummy = DUMMY_FIELD in inputs.hf_processor_mm_kwargs
        if is_dummy and "image" in planned:  # differs from a client's white image
            hashes["image"] = [f"{DUMMY_FIELD}-{h}" for h in hashes["image"]]
        return hashes

    def _stock_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        stock = replace(inputs, hf_processor_mm_kwargs=without_own_options(inputs.hf_processor_mm_kwargs))
        return super()._get_mm_hashes(stock)

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> _Kwargs:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        if KWARG not in inputs.hf_processor_mm_kwargs:
            return kwargs
        asked = _by_modality(inputs.hf_processor_mm_kwargs[KWARG])
        missing = {
            modality: [one for one, hit in zip(each, mm_is_cached[modality], strict=True) if not hit]
            for modality, each in asked.items()
            if isinstance(each, list) and modality in mm_is_cached
        }
        findings = inputs.hf_processor_mm_kwargs.get(_FINDINGS)
        if isinstance(findings, PixelFindings):
            findings = findings.subset(tuple(i for i, hit in enumerate(mm_is_cached["image"]) if not hit))
        return {**kwargs, KWARG: {**asked, **missing}, _FINDINGS: findings}

    def _identity(self, image_hash: str, plan: ItemPlan, query: tuple[int, ...]) -> str:
        if not plan.is_identity:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            asked = {"plan": repr(plan.to_ints())} | ({"query": repr(query)} if query else {})
            image_hash = MultiModalHasher.hash_kwargs(algorithm, image=image_hash, **asked)
        full_length = plan.encoded if plan.keeps_positions else None
        if plan.decoder == "none":
            return str(ItemIdentity(image_hash, full_length))
        return str(ItemIdentity(image_hash, full_length, plan.decoder, plan.kept_deep))

    def _queries(self, plans: Sequence[ItemPlan], kwargs: _Kwargs, modality: Modality) -> list[tuple[int, ...]]:
        """Token ids of each item's query; empty if its plan needs none or it has none."""
        methods = [plan.query_method for plan in plans]
        if not any(methods):
            return [()] * len(plans)
        reductions = parse_reductions(_by_modality(kwargs.get(KWARG)).get(modality), len(plans), modality)
        return [
            self._token_ids(method, reduction.query) if method and reduction.query else ()
            for method, reduction in zip(methods, reductions, strict=True)
        ]

    @cached_property
    def _token_ids(self) -> Callable[[Method, str], tuple[int, ...]]:
        return lru_cache(maxsize=1024)(self._tokenized)  # asked for several times per request

    def _tokenized(self, method: Method, query: str) -> tuple[int, ...]:
        """The first `QUERY_TOKENS` tokens that the embedding table has, without special tokens."""
        texts = method.query_texts(query)[:QUERY_TOKENS]
        each = self.info.get_tokenizer()(texts, add_special_tokens=False)["input_ids"] if texts else []
        rows = self.info.ctx.model_config.get_vocab_size()
        known = (token for token in chain.from_iterable(each) if token < rows)
        return tuple(islice(known, QUERY_TOKENS))

    def _all_plans(
        self, mm_items: MultiModalDataItems, kwargs: _Kwargs, uuids: _Uuids | None = None
    ) -> dict[Modality, list[ItemPlan]]:
        """`plans` by modality, without empty ones."""
        each = {modality: self.plans(mm_items, kwargs, modality, uuids) for modality in PLAN_FIELDS}
        return {modality: plans for modality, plans in each.items() if plans}

    def plans(
        self,
        mm_items: MultiModalDataItems,
        kwargs: _Kwargs,
        modality: Modality = "image",
        uuids: _Uuids | None = None,
    ) -> list[ItemPlan]:
        """One plan per image or video; empty for embeddings. Items with a uuid seen before need not be sent again."""
        count = mm_items.get_count(modality, strict=False)
        reductions = self._reductions(mm_items, kwargs, modality)
        names = (uuids or {}).get(modality) or [None] * count
        layouts = self._layouts(mm_items[modality], modality, without_own_options(kwargs), names) if count else []
        if not layouts:
            if any(reduction != Reduction() for reduction in reductions):
                is_sent = all(mm_items[modality].get(i) is not None for i in range(count))
                raise InvalidReduction(_NOT_REDUCED[modality] if is_sent else _NOT_SENT, param="")
            return []
        family = self._planned_family
        if modality == "video":
            reductions = [family.of_video(reduction) for reduction in reductions]
        else:
            reductions = [family.of_image(*each) for each in zip(reductions, layouts, strict=True)]
        findings = kwargs.get(_FINDINGS)
        cells = findings.cells if isinstance(findings, PixelFindings) and modality == "image" else [None] * count
        return [
            _plan(family.with_positions(one), layout, own, f"{modality} {i + 1} of {count}: " if count > 1 else "")
            for i, (one, layout, own) in enumerate(zip(reductions, layouts, cells, strict=True))
        ]

    def _reductions(self, mm_items: MultiModalDataItems, kwargs: _Kwargs, modality: Modality) -> list[Reduction]:
        """The requested reduction of each image or video."""
        count = mm_items.get_count(modality, strict=False)
        if not count and modality != "image":
            return []  # without videos, a reduction for all items is for images only
        return parse_reductions(_by_modality(kwargs.get(KWARG)).get(modality), count, modality)

    def _layouts(self, items: Any, modality: Modality, stock: _Kwargs, names: Sequence[str | None]) -> list[Layout]:
        """Layouts of the items; empty if they are unknown."""
        family = self._family
        if (
            family is None
            or modality not in family.modalities
            or isinstance(items, EmbeddingItems | DictEmbeddingItems)
        ):
            return []
        shapes = [self._shape(items, i, modality, stock, name) for i, name in enumerate(names)]
        return [] if None in shapes else [family.layout(shape) for shape in shapes if shape is not None]

    def _shape(
        self, items: Any, index: int, modality: Modality, stock: _Kwargs, uuid: str | None
    ) -> tuple[int, ...] | None:
        """`Layout.shape` of an item; cached by uuid, since the uuid may come alone next time."""
        family = self._planned_family
        if not family.sizes_matter:
            return ()
        key = (modality, uuid, repr(sorted(stock.items())))
        if items.get(index) is None:
            return self._shapes.get(key)
        shape_of = family.shape if modality == "image" else family.video_shape
        shape = shape_of(items, index, self.info, stock)
        if uuid is not None and shape is not None:
            self._shapes[key] = shape
        return shape

    @cached_property
    def _shapes(self) -> LRUCache[tuple[str, str | None, str], tuple[int, ...]]:
        return LRUCache(capacity=_MOST_SHAPES)

    def _seed(self, pixels: torch.Tensor) -> int:
        """A number computed from an image's pixels as the tower gets them; from its first tile if there are several."""
        pixels = pixels[0] if pixels.ndim == 4 else pixels
        if pixels.dtype == torch.uint8 and self._planned_family.sends_bytes:
            image_processor, dtype = self.info.get_hf_processor().image_processor, self.info.ctx.model_config.dtype
            pixels = Normalize(image_processor, dtype)(pixels)
        return crc32(pixels.float().contiguous().numpy().data)

    @cached_property
    def _image_processor(self) -> Any:
        """The HF image processor; None if the operator gave options, which other parts of the processor may need."""
        family = self._family
        if family is None or not family.sends_bytes or self.info.ctx.get_merged_mm_kwargs({}):
            return None
        image_processor = self.info.get_hf_processor().image_processor
        return leaving_bytes(image_processor) or image_processor

    @cached_property  # a config is slow to read, and plans are made several times per request
    def _family(self) -> Family | None:
        return family_of(self.info.ctx.model_config)

    @property
    def _planned_family(self) -> Family:
        assert self._family is not None  # a model that is not reduced has no plans
        return self._family


class ShortenedRuns(FoldProcessor):
    """Modification beside `FoldProcessor`'s: shortens each run of vLLM's placeholders to the tokens that stay.

    Text around an item's tokens, and between a video's frames, is unchanged.
    """

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        planned: Mapping[Any, list[ItemPlan]] = self._all_plans(mm_items, hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, without_own_options(hf_processor_mm_kwargs), out_mm_kwargs)
        return [_shortened(one, planned[one.modality]) if one.modality in planned else one for one in updates]


def _shortened(update: PromptUpdate, plans: Sequence[ItemPlan]) -> PromptUpdate:
    stock: Any = update.content

    def shorter(index: int) -> Any:
        content, plan = stock(index), plans[index]
        if plan.is_identity:
            return content
        has_text = isinstance(content, PromptUpdateDetails) and content.is_embed is not None
        full: list[int] = content.full if isinstance(content, PromptUpdateDetails) else content
        is_embed = content.is_embed(full).tolist() if has_text else [True] * len(full)
        found = sum(is_embed)
        if found == plan.kept:  # vLLM has processed an already resized image
            return content
        if found != plan.encoded:
            raise RuntimeError(f"an item of {plan.encoded} tokens by its size has {found} placeholders")
        kept: list[int] = []
        for embeds, run in groupby(zip(full, is_embed, strict=True), key=lambda pair: pair[1]):
            tokens = [token for token, _ in run]
            kept += tokens[: len(tokens) * plan.kept // plan.encoded] if embeds else tokens
        return PromptUpdateDetails.select_token_id(kept, full[is_embed.index(True)]) if has_text else kept

    return replace(update, replacement=shorter)


def _by_modality(asked: object) -> Mapping[Modality, object]:
    """`mm_processor_kwargs["foldserve"]` by modality: a list is for images, a single reduction for both."""
    if isinstance(asked, Mapping) and asked and asked.keys() <= PLAN_FIELDS.keys():
        return asked
    return {"image": asked} if isinstance(asked, list) else dict.fromkeys(PLAN_FIELDS, asked)


def parse_reductions(value: object, count: int, modality: Modality = "image") -> list[Reduction]:
    """One `Reduction` per image or video from the JSON for a modality.

    Raises:
        InvalidReduction: a malformed reduction, or a list whose length is not the number of items.
    """
    if not isinstance(value, list):
        return [_parse(_text(value if value is not None else {}))] * count
    if len(value) != count:
        raise InvalidReduction(f"{len(value)} reductions came for {count} {modality}s: send one for each", param="")
    return [_parse(_text(item)) for item in value]


def _plan(reduction: Reduction, layout: Layout, cells: Cells | None, where: str) -> ItemPlan:
    """`plan_item`, with errors that begin with `where`."""
    try:
        return plan_item(reduction, layout, cells)
    except InvalidReduction as refusal:
        raise InvalidReduction(f"{where}{refusal}", refusal.param) from None


@lru_cache(maxsize=1024)  # parsed several times per request, and a deployment asks for few different ones
def _parse(text: str) -> Reduction:
    return Reduction.parse(json.loads(text))


def _text(value: object) -> str:
    return json.dumps(value, default=repr)  # what is not JSON fails as a reduction


def without_own_options(kwargs: _Kwargs) -> _Kwargs:
    return {key: value for key, value in kwargs.items() if key not in (KWARG, _FINDINGS, DUMMY_FIELD)}
