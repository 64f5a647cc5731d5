"""ditcompress: smaller, faster diffusion transformers, and what that cost.

After `import ditcompress`, plain diffusers `from_pretrained` loads compressed models. The functions of the command
line are here under their own names and are imported when first used; `load` gives (model, checkpoint) after checking
every name, shape and dtype, where diffusers only warns.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "bench",
    "calibrate",
    "compare",
    "distill",
    "evaluate",
    "export",
    "inspect",
    "load",
    "moe",
    "plug",
    "prune",
    "q_sched",
    "quantize",
    "sample",
    "set_decode",
    "set_fused",
    "set_fusion",
]

# what is not in api: its module and its name there
_ELSEWHERE = {
    "load": (".loading", "load_model"),
    "set_decode": (".runtime.kernels", "set_decode"),
    "set_fused": (".runtime.fused", "set_fused"),
    "set_fusion": (".runtime.fusion", "set_fusion"),
}
_AUTO, _SCHEDULERS = "diffusers.quantizers.auto", "diffusers.schedulers.scheduling_utils"


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        module, own = _ELSEWHERE[name]
        return getattr(importlib.import_module(module, __name__), own)
    if name in __all__:
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterAfterImport:
    """Registers us the moment a module of diffusers is imported, so importing us alone stays cheap."""

    def __init__(self, module: str, register: Any) -> None:
        self.module, self.register = module, register

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The other finders' spec, whose loader also registers us. It may be asked for more than once: tools that only
        look whether a module exists never execute it."""
        if name != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)  # type: ignore[comparison-overlap]
        found = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self.register(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)  # type: ignore[arg-type]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_lazily(auto: Any) -> None:
    """Mapping entries that import `loading` when diffusers first asks for them."""

    class Config:
        @staticmethod
        def from_dict(fields: dict[str, Any], **kwargs: Any) -> Any:
            loading = importlib.import_module(".loading", __name__)
            loading.register()
            return loading.DitcompressConfig.from_dict(fields, **kwargs)

    def quantizer(config: Any, **kwargs: Any) -> Any:
        loading = importlib.import_module(".loading", __name__)
        loading.register()
        return loading.DitcompressQuantizer(config, **kwargs)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ditcompress"] = Config
    auto.AUTO_QUANTIZER_MAPPING["ditcompress"] = quantizer


def _register_schedulers(schedulers: Any) -> None:
    """A `from_config` that imports ours when a scheduler is first made from a configuration."""

    def from_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        importlib.import_module(".runtime.coefficients", __name__).register()
        return cls.from_config(*args, **kwargs)

    schedulers.SchedulerMixin.from_config = classmethod(from_config)


for _module, _register in ((_SCHEDULERS, _register_schedulers), (_AUTO, _register_lazily)):
    if _module in sys.modules:
        _register(sys.modules[_module])
    else:
        sys.meta_path.insert(0, _RegisterAfterImport(_module, _register))  # type: ignore[arg-type]
