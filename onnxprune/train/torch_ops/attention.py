"""Attention, as ONNX has it from version 23 on and as ONNX Runtime's own operators have it."""

from __future__ import annotations

import math
from typing import Any

from onnxprune.train.torch_ops.lazy import Tensor, torch
from onnxprune.train.torch_ops.registry import MICROSOFT, Op, op


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, length, heads · size) as (N, heads, length, size); 4 axes are so already."""
    if x.ndim == 4:
        return x
    return x.reshape([x.shape[0], x.shape[1], heads, -1]).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _causal(queries: int, keys: int, past: int, like: Tensor) -> Tensor:
    """-inf where a query would look ahead, shape (queries, keys)."""
    ahead = torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return ahead.triu(past + 1)


def _as_bias(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return zero.masked_fill(~mask, float("-inf"))


@op("Attention")
def attention(
    node: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Any:
    """Scaled dot products of heads, with a mask, a past, grouped keys and soft caps."""
    flat = q.ndim == 3
    q = _heads(q, node.integer("q_num_heads", 1))
    k = _heads(k, node.integer("kv_num_heads", 1))
    v = _heads(v, node.integer("kv_num_heads", 1))
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = (k, v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(node.real("scale", 1 / math.sqrt(q.shape[-1])))
    scores = torch.matmul(q * root, (k * root).transpose(-1, -2))
    bias = torch.zeros((), dtype=q.dtype, device=q.device)
    if node.integer("is_causal", 0):
        bias = bias + _causal(q.shape[2], k.shape[2], past, q)
    if mask is not None:
        bias = bias + _as_bias(_widened(mask, k.shape[2]), q)
    if lengths is not None:
        seen = torch.arange(k.shape[2], device=q.device) < lengths.to(q.device)[:, None]
        bias = bias + _as_bias(seen[:, None, None, :], q)
    cap = node.real("softcap", 0.0)
    shown = [scores, scores + bias]
    scores = cap * torch.tanh(scores / cap) if cap else scores
    shown.append(scores + bias if cap else shown[1])
    weights = torch.softmax(scores + bias, -1)
    # A query whose keys are all masked attends to nothing.
    weights = torch.where(torch.isnan(weights), torch.zeros_like(weights), weights)
    y = torch.matmul(weights, v)
    if node.outputs > 3 and node.integer("qk_matmul_output_mode", 0) in (1, 2):
        raise node.fail("an output of the scores with mask or cap")
    mode = node.integer("qk_matmul_output_mode", 0)
    return (_joined(y) if flat else y), *present, (weights if mode == 3 else shown[0])


def _widened(mask: Tensor, keys: int) -> Tensor:
    """A mask of fewer keys (version 24) leaves the others out."""
    missing = keys - mask.shape[-1]
    if missing <= 0:
        return mask
    gone: Any = False if mask.dtype == torch.bool else float("-inf")
    return torch.nn.functional.pad(mask, [0, missing], value=gone)


@op("Attention", domain=MICROSOFT)
def microsoft_attention(
    node: Op,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    added: Tensor | None = None,
) -> Any:
    """One product makes queries, keys and values."""
    heads = node.attributes["num_heads"]
    if past is not None or node.integer("do_rotary", 0):
        raise node.fail("a past or rotary positions")
    sizes = list(node.attributes.get("qkv_hidden_sizes", [weight.shape[1] // 3] * 3))
    made = torch.matmul(x, weight)
    made = made if bias is None else made + bias
    q, k, v = (_heads(part, heads) for part in torch.split(made, sizes, -1))
    return _joined(_microsoft(node, q, k, v, mask, added))


@op("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    node: Op,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    *past: Tensor | None,
) -> Any:
    """Of queries, keys and values with three axes."""
    heads = node.attributes["num_heads"]
    if k is None or v is None or any(part is not None for part in past):
        raise node.fail("packed queries or a past")
    if bias is not None:
        parts = torch.split(bias, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = q + parts[0], k + parts[1] if k.ndim == 3 else k, v + parts[2]
    q, k, v = _heads(q, heads), _heads(k, heads), _heads(v, heads)
    return _joined(_microsoft(node, q, k, v, mask, added)), k, v


def _microsoft(
    node: Op, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, added: Tensor | None
) -> Tensor:
    scale = node.real("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        if mask.ndim == 1 or mask.shape[0] != q.shape[0] or mask.ndim > 3:
            raise node.fail(f"a mask of shape {list(mask.shape)}")
        seen = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        low = node.real("mask_filter_value", -10000.0)
        scores = scores + (1 - seen.to(scores.dtype)) * low
    if node.integer("unidirectional", 0):
        scores = scores + _causal(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q)
    scores = scores if added is None else scores + added
    return torch.matmul(torch.softmax(scores, -1), v)


@op("RotaryEmbedding")
def rotary_embedding(
    node: Op, x: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None = None
) -> Tensor:
    """Rotates pairs of features by an angle for each position."""
    return _rotated(node, x, cos, sin, places, node.integer("num_heads", 0))


@op("RotaryEmbedding", domain=MICROSOFT)
def microsoft_rotary(node: Op, x: Tensor, places: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same, with a first position only where ``places`` has one number."""
    heads, width = node.integer("num_heads", 0), node.integer("rotary_embedding_dim", 0)
    length = x.shape[2] if x.ndim == 4 else x.shape[1]
    if places.numel() == 1 and places.ndim == 1:
        places = (places + torch.arange(length, device=places.device)).expand(x.shape[0], length)
    if x.ndim == 3 and not heads:
        heads = x.shape[-1] // (width or 2 * cos.shape[-1])
    return _rotated(node, x, cos, sin, places, heads)


def _rotated(
    node: Op, x: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None, heads: int
) -> Tensor:
    flat = x.ndim == 3
    y = _heads(x, heads)  # (N, heads, length, size)
    width = node.integer("rotary_embedding_dim", 0) or y.shape[-1]
    turned, rest = y[..., :width], y[..., width:]
    if places is not None:
        cos, sin = cos[places.long()], sin[places.long()]  # (N, length, size / 2)
    cos, sin = cos[:, None, :, : width // 2], sin[:, None, :, : width // 2]
    if node.integer("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        pair = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = torch.cat([pair, rest], -1)
    return _joined(y) if flat else y
