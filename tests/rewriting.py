"""Small models, one for each operator that training has to write otherwise."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.model import Model

HEADS = tuple(f'<ir_version: 8, opset_import: ["" : {opset}]>\n' for opset in (13, 17, 21))

# Each reads `a`, which a convolution with trainable weights makes of the input, shape (n, 8, 6, 6),
# and ends in `y`; least opset; further weights.
CASES: dict[str, tuple[str, int]] = {
    "prelu": ("y = PRelu(a, slope)", 13),
    "hard sigmoid": ("y = HardSigmoid<alpha=0.3, beta=0.4>(a)", 13),
    "hard swish": ("y = HardSwish(a)", 14),
    "softplus": ("y = Softplus(a)", 13),
    "mish": ("y = Mish(a)", 18),
    "softsign": ("y = Softsign(a)", 13),
    "elu": ("y = Elu<alpha=0.7>(a)", 13),
    "selu": ("y = Selu(a)", 13),
    "celu": ("y = Celu<alpha=0.8>(a)", 13),
    "sum": ("r = Relu(a)  y = Sum(a, r, a)", 13),
    "mean": ("r = Relu(a)  y = Mean(a, r)", 13),
    "frozen batch norm": ("y = Relu(bn)  ", 13),
    "instance norm": ("y = InstanceNormalization(a, scale, shift)", 13),
    "group norm": ("y = GroupNormalization<num_groups=4>(a, gscale, gshift)", 18),
    "layer norm": ("y = LayerNormalization<axis=-1>(a, lscale, lshift)", 17),
    "lrn": ("y = LRN<size=3, alpha=0.5, beta=0.6, bias=1.5>(a)", 13),
    "conv same upper": ('y = Conv<auto_pad="SAME_UPPER", kernel_shape=[3,3]>(a, k)', 13),
    "conv same lower strided": (
        'y = Conv<auto_pad="SAME_LOWER", strides=[2,2], kernel_shape=[3,3]>(a, k)', 13,
    ),
    "conv same even kernel": ('y = Conv<auto_pad="SAME_UPPER", kernel_shape=[2,2]>(a, e)', 13),
    "deconv": ("y = ConvTranspose<strides=[2,2]>(a, e)", 13),
    "deconv padded": (
        "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>(a, k, shift)", 13,
    ),
    "deconv dilated": ("y = ConvTranspose<dilations=[2,2], pads=[1,0,1,0]>(a, k)", 13),
    "deconv groups": ("y = ConvTranspose<group=2, strides=[2,1]>(a, d)", 13),
    "deconv same": ('y = ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>(a, k)', 13),
    "global max pool": ("y = GlobalMaxPool(a)", 13),
    "depth to space": ("y = DepthToSpace<blocksize=2>(a)", 13),
    "depth to space crd": ('y = DepthToSpace<blocksize=2, mode="CRD">(a)', 13),
    "space to depth": ("y = SpaceToDepth<blocksize=2>(a)", 13),
    "resize linear": (
        'y = Resize<mode="linear", coordinate_transformation_mode="pytorch_half_pixel">'
        '(a, , double)', 13,
    ),
    "resize linear corners": (
        'y = Resize<mode="linear", coordinate_transformation_mode="align_corners">'
        "(a, , , sizes)", 13,
    ),
    "resize nearest": (
        'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric",'
        ' nearest_mode="floor">(a, , double)', 13,
    ),
    "resize cubic": ('y = Resize<mode="cubic">(a, , double)', 13),
    "pad reflect": ('y = Pad<mode="reflect">(a, pads)', 13),
    "pad edge": ('y = Pad<mode="edge">(a, pads)', 13),
    "cast like": ("t = Tanh(a)  y = CastLike(t, shift)", 15),
}  # fmt: skip


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """All constants that a case may read."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.5 * rng.standard_normal(shape)).astype(np.float32)

    return {
        "w": normal(8, 3, 3, 3),
        "slope": normal(8, 1, 1),
        "scale": 1 + normal(8),
        "shift": normal(8),
        "mean": normal(8),
        "var": 1 + rng.random(8).astype(np.float32),
        "lscale": 1 + normal(6),
        "lshift": normal(6),
        "k": normal(8, 8, 3, 3),
        "e": normal(8, 8, 2, 2),
        "d": normal(8, 3, 3, 2),
        "double": np.array([1, 1, 2, 1.5], np.float32),
        "sizes": np.array([2, 8, 9, 12], np.int64),
        "pads": np.array([0, 0, 1, 2, 0, 0, 2, 1], np.int64),
    }


def model_of(name: str, head: str) -> Model | None:
    """The case's model, None where its opset has not the operator."""
    body, least = CASES[name]
    opset = int(head.rsplit(":", 1)[1].strip(" ]>\n"))
    if opset < least:
        return None
    lines = "a = Conv<pads=[1,1,1,1]>(x, w)  "
    if "bn" in body:
        lines += "bn = BatchNormalization<epsilon=0.01>(a, scale, shift, mean, var)  "
    text = f"g (float[2,3,6,6] x) => (float y) {{ {lines} {body} }}"
    proto = onnx.parser.parse_model(head + text)
    held = weights()
    groups = np.arange(4, dtype=np.float32) + 1
    held["gscale"] = groups if opset < 21 else held["scale"]
    held["gshift"] = groups / 4 if opset < 21 else held["shift"]
    read = {one for node in proto.graph.node for one in node.input}
    for one, array in held.items():
        if one in read:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, one))
    del proto.graph.output[:]
    inferred = onnx.shape_inference.infer_shapes(proto)
    value = next((v for v in inferred.graph.value_info if v.name == "y"), None)
    if value is None:  # inference does not know it, and it keeps the shape
        value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 8, 6, 6])
    proto.graph.output.append(value)
    return Model(proto)


def inputs(name: str, seed: int = 3) -> dict[str, np.ndarray]:
    """Inputs of a case."""
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}
