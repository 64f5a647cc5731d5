"""Public quantizers as arms of a benchmark: W8A8 of the same linears, where the library is installed."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Collection

from torch import nn


def torchao_int8(model: nn.Module, names: Collection[str]) -> nn.Module:
    """torchao: INT8 tokens on the fly, INT8 weights with a scale a row."""
    import torchao.quantization as q

    wanted = set(names)
    q.quantize_(model, q.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name in wanted)
    return model


def sdnq_int8(model: nn.Module, names: Collection[str]) -> nn.Module:
    """sdnq: INT8 products."""
    from sdnq.quantizer import sdnq_post_load_quant  # type: ignore[import-not-found]

    wanted = set(names)
    skip = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in wanted]
    quantized: nn.Module = sdnq_post_load_quant(
        model, modules_to_not_convert=skip, weights_dtype="int8", use_quantized_matmul=True
    )
    return quantized


PEERS: dict[str, tuple[str, Callable[[nn.Module, Collection[str]], nn.Module]]] = {
    "torchao int8 dynamic": ("torchao", torchao_int8),
    "sdnq int8 matmul": ("sdnq", sdnq_int8),
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(PEERS[name][0]) is not None


def apply(name: str, model: nn.Module, linears: Collection[str]) -> nn.Module:
    """`model` with its `linears` quantized by the peer, in place."""
    logging.getLogger(PEERS[name][0]).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PEERS[name][1](model, linears)
