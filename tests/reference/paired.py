"""References of the objectives that pair layers, for ViTs with one class token and one grid.

Features and attention inputs are read off the modules by name, without the package's tap, geometry or plan.
"""

import torch

from tests.reference import attention as ra
from tests.reference import features as rf


def read(model, pixel_values):
    """Per block: output (B, N, D), and query, key, value (B, H, N, d), by hooks on the named modules."""
    layers, found, handles = model.vit.layers, [], []
    for layer in layers:
        record = {}
        found.append(record)
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.attention, name)
            handles.append(projection.register_forward_hook(lambda m, a, out, r=record, n=name: r.update({n: out})))
        handles.append(layer.register_forward_hook(lambda m, a, out, r=record: r.update(output=out)))
    model(pixel_values=pixel_values)
    for handle in handles:
        handle.remove()
    heads = model.config.num_attention_heads
    for record in found:
        for name in ("q_proj", "k_proj", "v_proj"):
            x = record[name]
            record[name] = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    return found


def _pairs(student, teacher, layers):
    depth_s, depth_t = len(student), len(teacher)
    if layers == "last":
        return [(depth_s - 1, depth_t - 1)]
    if layers == "uniform":
        return [(s, (s + 1) * depth_t // depth_s - 1) for s in range(depth_s)]
    return layers


def _grid(record):
    side = round((record["output"].shape[1] - 1) ** 0.5)
    return side, side


def _over_pairs(student, teacher, pixel_values, layers, value):
    mine = read(student, pixel_values)
    its = [{k: v.detach() for k, v in record.items()} for record in read(teacher, pixel_values)]
    values = [value(i, mine[s], its[t]) for i, (s, t) in enumerate(_pairs(mine, its, layers))]
    return sum(values) / len(values)


def attention_map(
    student, teacher, pixel_values, labels, layers="uniform", rows="cls", distance="kl", heads="mean",
    relation_heads=2,
):  # fmt: skip
    def value(_, s, t):
        maps = []
        for record in (s, t):
            q, k = record["q_proj"], record["k_proj"]
            if heads == "relation":
                q, k = ra.relation_heads(q, relation_heads), ra.relation_heads(k, relation_heads)
            p = ra.attention(q, k, q.shape[-1] ** -0.5)
            p = ra.mean_heads(p) if heads == "mean" else p
            p = ra.align_columns(p, (0,), 1, _grid(record), _grid(s))
            p = ra.align_rows(p, (0,), 1, _grid(record), _grid(s))
            maps.append(p[:, :, :1] if rows == "cls" else p)
        return ra.row_divergence(*maps, distance)

    return _over_pairs(student, teacher, pixel_values, layers, value)


def relation(student, teacher, pixel_values, labels, layers="last", heads=2):
    def value(_, s, t):
        return (
            sum(
                ra.relation(s[name], t[name], heads, (0,), (0,), 1, 1, _grid(s), _grid(t))
                for name in ("q_proj", "k_proj", "v_proj")
            )
            / 3
        )

    return _over_pairs(student, teacher, pixel_values, layers, value)


def attention_transfer(student, teacher, pixel_values, labels, layers="uniform", mode="code"):
    def value(_, s, t):
        return rf.attention_transfer(s["output"][:, 1:], t["output"][:, 1:], _grid(s), _grid(t), mode)

    return _over_pairs(student, teacher, pixel_values, layers, value)


def hidden_states(
    student, teacher, pixel_values, labels, layers="uniform", projector="linear", normalize="both", distance="mse",
    projectors=(),
):  # fmt: skip
    def value(i, s, t):
        projected = [torch.stack([_project(projectors[i], token) for token in image]) for image in s["output"]]
        aligned = [rf.align_tokens(image, (0,), 1, _grid(t), _grid(s)) for image in t["output"]]
        return rf.feature_distance(projected, aligned, normalize, distance)

    return _over_pairs(student, teacher, pixel_values, layers, value)


def _project(projector, token):
    if not hasattr(projector, "weight"):
        return token
    bias = projector.bias if projector.bias is not None else torch.zeros(len(projector.weight), dtype=token.dtype)
    return torch.stack([(row * token).sum() for row in projector.weight]) + bias


PAIRED = {
    "attention_map": attention_map,
    "attention_transfer": attention_transfer,
    "hidden_states": hidden_states,
    "relation": relation,
}
