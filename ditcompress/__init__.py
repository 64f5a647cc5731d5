"""ditcompress: smaller, faster diffusion transformers, and what that cost.

After `import ditcompress`, plain diffusers `from_pretrained` loads compressed models. The functions of the command
line are here under their own names and are imported when first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["calibrate", "evaluate", "export", "inspect", "quantize"]

_AUTO = "diffusers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegisterAfterImport:
    """Registers us the moment diffusers' quantizer mappings are imported, so importing us alone stays cheap."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register_lazily(module)

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


if _AUTO in sys.modules:
    _register_lazily(sys.modules[_AUTO])
else:
    import importlib.util

    sys.meta_path.insert(0, _RegisterAfterImport())  # type: ignore[arg-type]
