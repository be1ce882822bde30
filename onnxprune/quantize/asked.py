"""What may be asked of quantization."""

from __future__ import annotations

from onnxprune.errors import UsageError
from onnxprune.quantize.calibration import METHODS
from onnxprune.recipe import QuantizeOptions

_TYPES = ("fp16", "bf16", "int8")


def options_of(
    to: str,
    data: object,
    *,
    called: str,
    method: str = "auto",
    ignore: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    convert_io: bool = False,
) -> QuantizeOptions:
    """Options as a recipe has them.

    Args:
        to: ``fp16``, ``bf16`` or ``int8``.
        data: Whether there is calibration data.
        called: What the caller calls ``to``.
        method: As in ``quantize``.
        ignore: As in ``quantize``, read.
        only: As in ``quantize``, read.
        convert_io: As in ``quantize``.

    Raises:
        UsageError: A value does not exist, or they do not fit together.
    """
    if to not in _TYPES:
        raise UsageError(f"{called} is '{to}'", hint="give fp16, bf16 or int8")
    if method not in ("auto", *METHODS):
        hint = f"give one of auto, {', '.join(METHODS)}"
        raise UsageError(f"method is '{method}'", hint=hint)
    options = QuantizeOptions(
        to=to,  # type: ignore[arg-type]  # checked above
        method=None if method == "auto" else method,  # type: ignore[arg-type]  # and this
        ignore=ignore,
        only=only,
        convert_io=convert_io,
    )
    check_options(options, data)
    return options


def check_options(options: QuantizeOptions, data: object) -> None:
    """Refuse options that do not fit together.

    Raises:
        UsageError: They do not.
    """
    if options.before is not None:
        check_options(options.before, data)
    if options.to == "int8":
        if data is None:
            raise UsageError("int8 needs calibration data", hint="--data FILE.npz")
        if options.convert_io:
            raise UsageError("--convert-io is for fp16 and bf16; int8 keeps inputs and outputs")
    elif options.method is not None:
        raise UsageError(f"--method is for int8, {options.to} measures no ranges to choose from")
