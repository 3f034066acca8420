"""Checks of `reducers/stf.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from foldserve.reducers.stf import StfConfig, StfProjector, fusion_input, space_to_depth
from tests.golden.case import Case, assert_close, assert_equal

_LINEAR = re.compile(r"model\.mm_projector(_crosslayer)?\.([02])\.(weight|bias)")


def check_stf(case: Case) -> None:
    """Fusion, windows and features of the whole projector, or the windows alone where several experts share one."""
    inputs, golden, params = case.read(case.inputs), case.read(case.outputs), case.params
    if "x" in inputs:
        tokens = space_to_depth(inputs["x"], params["k"], params["E"])
        assert_equal("tokens", tokens, golden["tokens"])
        assert_equal("groups", tokens.view(golden["groups"].shape), golden["groups"])
        return
    case.require(drop_cls=True)
    config = StfConfig(tuple(params["concat_order"]), params["k"])
    projector = StfProjector(config, params["C"], params["hidden_size"])
    projector.load_state_dict(_weights(inputs))
    states = {int(name.rpartition(".")[2]): x for name, x in inputs.items() if name.startswith("hidden_states.")}
    fused = projector.fusion(fusion_input(states, config))
    assert_close("mbtf", fused, golden["mbtf"])
    assert_close("split", space_to_depth(fused, config.kernel), golden["split"])
    features = projector(fusion_input(states, config))
    assert_equal("token count", features.shape[1], config.tokens(params["n"]))
    assert_close("features", features, golden["features"])


def _weights(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to ours: items 0 and 2 of a sequence are its linear layers."""
    weights = {}
    for name, tensor in inputs.items():
        if found := _LINEAR.fullmatch(name):
            crosslayer, item, kind = found.groups()
            weights[f"{'fusion' if crosslayer else 'output'}.linear_{int(item) // 2 + 1}.{kind}"] = tensor
    return weights
