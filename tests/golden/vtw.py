"""Checks of withdrawal: which rows the deep layers get and how long their KV cache is, and the search for K."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foldserve.server.engine.withdrawal.batch import BatchMaps
from foldserve.server.engine.withdrawal.core import TokenMap
from foldserve.server.quality.calibration_search import first_layer_within, kl_divergence
from foldserve.server.quality.engine.kl_walk import last_logits
from tests.golden.case import Case, Row, assert_close, assert_equal
from tests.golden.decoder import Decoder

LOGITS_ATOL = 2e-4
KL_ATOL = 1e-5


def check_vtw(case: Case) -> None:
    """The search for K where the case has a range of them, else a generation with one K."""
    if "K_range" in case.params:
        _check_search(case)
    else:
        case.require(pe_type="keep")
        _check_generation(case)


def _check_generation(case: Case) -> None:
    """Logits of every step, greedy tokens, keys and values, and the length of every layer's KV cache."""
    params, entry, golden = case.params, case.entry, case.read(case.outputs)
    decoder = Decoder(case.read_prefix(case.inputs["weights_prefix"]), params["model"])
    withdraws = params["K"] is not None
    first_deep = params["K"] if withdraws else len(decoder.layers)
    embeds = case.read({"x": case.inputs["inputs_embeds"]})["x"][0]
    tokens = _token_map(params, len(embeds)) if withdraws else TokenMap([], len(embeds))

    positions = torch.arange(len(embeds))
    logits = _forward(decoder, first_deep, positions, embeds, _kept_rows(tokens, 0, len(embeds)))
    assert_close("prefill_logits", logits, golden["prefill_logits"], LOGITS_ATOL)
    steps, greedy = [logits[-1]], [int(logits[-1].argmax())]
    for position in entry["decode_position_ids"]:
        row = _kept_rows(tokens, position, 1)
        steps.append(_forward(decoder, first_deep, torch.tensor([position]), decoder.embed(greedy[-1]), row)[-1])
        greedy.append(int(steps[-1].argmax()))

    assert_close("step_logits", torch.stack(steps), golden["step_logits"], LOGITS_ATOL)
    assert_equal("greedy_tokens", greedy, entry["greedy_tokens"])
    seen = len(embeds) + len(entry["decode_position_ids"])
    lengths = [seen if i < first_deep else tokens.kept(seen) for i in range(len(decoder.layers))]
    assert_equal("kv_len_per_layer", lengths, entry["kv_len_per_layer_after_last_step"])
    for name in golden:
        if name.startswith(("key_layer", "value_layer")):
            kind, _, index = name.partition("_layer")
            assert_close(name, getattr(decoder.layers[int(index)], kind), golden[name], LOGITS_ATOL)


def _check_search(case: Case) -> None:
    """Last logits, KL of each sample and its mean for every K, and the K that each eta gives."""
    params, golden = case.params, case.outputs
    decoder = Decoder(case.read_prefix(case.inputs["weights_prefix"]), params["model"])
    candidates = range(params["K_range"][0], params["K_range"][1] + 1)
    curves = []
    for sample, name in enumerate(case.entry["inputs"]["inputs_embeds"]):
        embeds = case.read({"x": name})["x"][0]
        kept = _kept_rows(_token_map(params, len(embeds)), 0, len(embeds))
        assert kept is not None
        full, withdrawn = last_logits(decoder.layers, decoder.head, embeds, kept, candidates)
        logits = case.read(
            {key: golden[key].replace("*", str(sample)) for key in ("full_last_logits", "vtw_last_logits")}
        )
        assert_close("full_last_logits", full[0], logits["full_last_logits"], LOGITS_ATOL)
        assert_close("vtw_last_logits", withdrawn[:, 0], logits["vtw_last_logits"], LOGITS_ATOL)
        curves.append(kl_divergence(withdrawn, full)[:, 0])

    kl = torch.stack(curves)  # (samples, candidates)
    read = case.read({"kl": golden["kl"], "kl_mean": golden["kl_mean"]})
    assert_close("kl", kl, read["kl"], KL_ATOL)
    assert_close("kl_mean", kl.mean(0), read["kl_mean"], KL_ATOL)
    mean = dict(zip(candidates, kl.mean(0).tolist(), strict=True))
    found = {eta: first_layer_within(mean, float(eta)) for eta in case.entry["K_for_eta"]}
    assert_equal("K_for_eta", found, case.entry["K_for_eta"])


def _forward(decoder: Decoder, first_deep: int, positions: Tensor, hidden: Tensor, kept: Tensor | None) -> Tensor:
    """Logits of the rows that reach the end, after extending every layer's cache."""
    residual = torch.zeros_like(hidden)
    for index, layer in enumerate(decoder.layers):
        if index == first_deep and kept is not None:
            positions, hidden, residual = positions[kept], hidden[kept], residual[kept]
        hidden, residual = layer.extend(positions, hidden, residual)
    return decoder.head(hidden, residual)


def _token_map(params: Row, prompt_tokens: int) -> TokenMap:
    first = params["system_tokens"]
    return TokenMap([(first, first + params["image_tokens"])], prompt_tokens)


def _kept_rows(tokens: TokenMap, computed: int, scheduled: int) -> Tensor | None:
    """Rows of one step that enter the deep layers, as the engine chooses them; None: all."""
    step = BatchMaps([tokens]).step(np.array([computed]), np.array([scheduled]))
    return None if step is None or step.rows is None else torch.from_numpy(step.rows)
