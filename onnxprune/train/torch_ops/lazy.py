"""PyTorch, imported when it is first used: it takes seconds, and most runs never need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from onnxprune.errors import MissingExtraError

if TYPE_CHECKING:
    import torch as _torch

    Tensor: TypeAlias = _torch.Tensor
else:
    Tensor = object


class _Torch:
    """Stands for the module ``torch``."""

    def __getattr__(self, name: str) -> Any:
        try:
            import torch as module
        except ImportError as error:
            raise MissingExtraError(
                "the trainer 'torch' needs PyTorch", hint="pip install 'onnxprune[torch]'"
            ) from error
        value = getattr(module, name)
        setattr(self, name, value)  # the next look-up does not come here
        return value


class _Functional:
    """Stands for the module ``torch.nn.functional``."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch.nn.functional, name)
        setattr(self, name, value)
        return value


torch: Any = _Torch()
functional: Any = _Functional()
