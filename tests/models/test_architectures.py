"""What every image classifier of transformers gives, and which objectives it can serve beside a ViT.

docs/architectures.md is made here: `python -m tests.models.test_architectures`.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_kdtl.functional.attention import attention_rows
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Needs, Teacher, capture, plan
from hf_kdtl.models.forward.geometry import ModelGeometry, describe
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.building import pairs_layers
from hf_kdtl.trainer.distiller import Distiller
from tests.support.tiny import EVERY, build

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

NOT_BUILT = {
    "dinat": "needs the package natten",
    "shieldgemma2": "also reads a text, and answers yes or no",
    "timm_wrapper": "needs the package timm",
}
VARIANTS = {
    "DeiTForImageClassificationWithTeacher": "deit_teacher",
    "LevitForImageClassificationWithTeacher": "levit_teacher",
    "PerceiverForImageClassificationLearned": "perceiver_learned",
    "PerceiverForImageClassificationFourier": "perceiver_fourier",
    "PerceiverForImageClassificationConvProcessing": "perceiver_conv",
}
# Key in tiny -> blocks, hidden states, attention, width of what the classifier reads; or why it is refused.
GIVES = {
    "beit": (2, "tokens 4 x 4 + class", "full", 32),
    "bit": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "clip": (2, "tokens 4 x 4 + class", "full", 32),
    "convnext": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "convnextv2": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "cvt": (4, "tokens 8 x 8, 4 x 4 + class", "none", 32),
    "data2vec-vision": (2, "tokens 4 x 4 + class", "none", 32),
    "deit": (2, "tokens 4 x 4 + class + distillation", "full", 32),
    "deit_teacher": (2, "tokens 4 x 4 + class + distillation", "full", 32),
    "dinov2": (2, "tokens 4 x 4 + class", "full", 64),
    "dinov2_with_registers": (2, "tokens 4 x 4 + class + 4 register", "full", 64),
    "donut-swin": (4, "tokens 8 x 8, 4 x 4", "windowed", 32),
    "efficientnet": (4, "maps 8 x 8, 4 x 4", "none", 320),
    "focalnet": (4, "tokens 8 x 8, 4 x 4", "none", 32),
    "hgnet_v2": (4, "maps 16 x 16 to 2 x 2", "none", 16),
    "hiera": (4, "tokens on no grid, 4 x 4", "windowed", 32),
    "ijepa": (2, "tokens 4 x 4", "full", 32),
    "imagegpt": "also takes input_ids, token_type_ids, position_ids, inputs_embeds",
    "levit": (3, "tokens 2 x 2, 1 x 1", "none", 64),
    "levit_teacher": (3, "tokens 2 x 2, 1 x 1", "none", 64),
    "metaclip_2": (2, "tokens 4 x 4 + class", "full", 32),
    "mobilenet_v1": (26, "maps 32 x 32 to 2 x 2", "none", 256),
    "mobilenet_v2": (16, "maps 16 x 16 to 2 x 2", "none", 1280),
    "mobilevit": (5, "maps 32 x 32 to 2 x 2", "none", 32),
    "mobilevitv2": (5, "maps 32 x 32 to 2 x 2", "none", 128),
    "perceiver_conv": (2, "tokens on no grid", "full, weights only", 64),
    "perceiver_fourier": (2, "tokens on no grid", "full, weights only", 64),
    "perceiver_learned": (2, "tokens on no grid", "full, weights only", 64),
    "poolformer": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "pp_lcnet": "gave no logits, only last_hidden_state",
    "pvt": (4, "tokens 8 x 8, 4 x 4 + class", "reduced, full, weights only", 32),
    "pvt_v2": (4, "tokens 8 x 8, 4 x 4", "reduced, full, weights only", 32),
    "regnet": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "resnet": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "segformer": (4, "tokens 8 x 8, 4 x 4", "reduced", 32),
    "siglip": (2, "tokens 4 x 4", "full", 32),
    "siglip2": "also takes pixel_attention_mask, spatial_shapes",
    "swiftformer": (4, "maps 8 x 8, 4 x 4", "none", 32),
    "swin": (4, "tokens 8 x 8, 4 x 4", "windowed, full", 32),
    "swinv2": (4, "tokens 8 x 8, 4 x 4", "windowed", 32),
    "textnet": (15, "maps 32 x 32 to 2 x 2", "none", 32),
    "vit": (2, "tokens 4 x 4 + class", "full", 32),
    "vit_msn": (2, "tokens 4 x 4 + class", "full", 32),
}
# Their last maps would be a single cell at 32 x 32 pixels.
LARGER = ("levit", "levit_teacher", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "pp_lcnet", "textnet",
          "hgnet_v2")  # fmt: skip
# Every row: a model without a class token can still be compared.
OPTIONS = {"attention_map": {"rows": "all"}, "attention_transfer": {}, "hidden_states": {}, "relation": {},
           "attention_jacobian": {}}  # fmt: skip
ALTERNATIVES = re.compile(r"For this pair these work: (.*)\.$", re.DOTALL)
DRAWS = Draws(0, 0, (0, 1, 2))


@dataclass
class Row:
    """One architecture. `serves` and `refused` are by ("student" or "teacher", objective)."""

    kind: str
    model: str
    geometry: ModelGeometry | None = None
    not_run: str = ""
    serves: dict[tuple[str, str], str] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    default_serves: dict[str, set[str]] = field(default_factory=dict)


def entries() -> dict[str, tuple[str, str]]:
    """{key in tests.support.tiny: (model type, class)} of transformers' mapping."""
    found = {}
    for kind, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            found[VARIANTS.get(name, kind)] = (kind, name)
    return found


def pixels(image_size: int) -> torch.Tensor:
    return torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(6))


@cache
def look(key: str, **settings) -> Row:
    """What is seen of the model alone."""
    size = 64 if key in LARGER else 32
    made = Row(*entries()[key])
    try:
        made.geometry = describe(build(key, image_size=size, **settings), pixels(size))
    except ValueError as error:
        made.not_run = str(error)
    return made


@cache
def row(key: str, **settings) -> Row:
    """With what works beside a ViT, by one step of every objective that pairs layers."""
    size, made = 64 if key in LARGER else 32, look(key, **settings)
    if made.geometry is None:
        return made
    for role in ("student", "teacher"):
        model, vit = build(key, image_size=size, **settings), build("vit", image_size=size, seed=1)
        student, teacher = (model, Teacher(vit)) if role == "student" else (vit, Teacher(model))
        teacher.match(student, None, True)
        pairing = plan(student, teacher, pixel_values=pixels(size))
        paired = {name for name, kind in OBJECTIVES.items() if pairs_layers(kind) and kind.source == "teacher"}
        assert paired == OPTIONS.keys(), "a new objective that pairs layers belongs in OPTIONS"
        made.default_serves[role] = {n for n in paired if _refusal(student, teacher, pairing, n, {}) is None}
        for name, options in OPTIONS.items():
            refusal = _refusal(student, teacher, pairing, name, options)
            if refusal is None:
                made.serves[role, name] = name
                continue
            made.refused[role, name] = refusal
            if _refusal(student, teacher, pairing, name, {**options, "layers": "last"}) is None:
                made.serves[role, name] = f"{name} (last)"
    return made


def _refusal(student, teacher, pairing, name, options) -> str | None:
    """Why the pair cannot have the objective; None where it can, after one step that obeys."""
    torch.manual_seed(0)
    try:
        distiller = Distiller(
            student, {name: OBJECTIVES[name](**options)}, {name: 1.0}, {"teacher": teacher}, {"teacher": pairing}
        )
    except ValueError as error:
        return str(error)
    inputs = {"pixel_values": pixels(pairing.student.image[0])}
    values = distiller.terms(inputs, DRAWS)[1][name]
    assert values.shape == (3,) and torch.isfinite(values).all(), (name, options, values)
    grads = torch.autograd.grad(values.sum(), list(student.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None), (name, options)
    assert any(g is not None and g.abs().max() > 0 for g in grads), (name, options, "moves nothing")
    return None


def gives(geometry: ModelGeometry) -> tuple[int, str, str, int]:
    """Blocks, hidden states, attention, width of what the classifier reads."""
    layers = geometry.layers
    grids = list(dict.fromkeys("on no grid" if x.grid is None else f"{x.grid[0]} x {x.grid[1]}" for x in layers))
    prefix = layers[-1].prefix
    roles = [f"{n} {role}" if (n := prefix.count(role)) > 1 else role for role in dict.fromkeys(prefix)]
    hidden = f"{layers[-1].layout} {', '.join(grids) if len(grids) < 3 else f'{grids[0]} to {grids[-1]}'}"
    kinds = list(dict.fromkeys(x.attention for x in layers)) + ["weights only"] * geometry.weights_only
    return len(layers), " + ".join([hidden, *roles]), ", ".join(kinds), geometry.pooled


# The others one by one in the slow suite: what they give is seen in the fast one.
FAST = [
    "vit",
    "deit",
    "deit_teacher",
    "dinov2",
    "swin",
    "convnext",
    "resnet",
    "pvt_v2",
    "levit",
    "clip",
    "perceiver_learned",
]
EACH = [
    pytest.param(key, marks=() if key in FAST else pytest.mark.slow)
    for key in GIVES
    if not isinstance(GIVES[key], str)
]


def test_every_entry_of_the_mapping_is_built_or_listed_with_a_reason():
    known = GIVES.keys() | NOT_BUILT.keys()
    gained, gone = entries().keys() - known, known - entries().keys()
    assert not gained, f"transformers' mapping has gained {sorted(gained)}: build it in tiny.py, or say why not"
    assert not gone, f"transformers' mapping has lost {sorted(gone)}"
    assert GIVES.keys() == EVERY.keys() and not GIVES.keys() & NOT_BUILT.keys()


@pytest.mark.parametrize("key", GIVES)
def test_what_it_gives(key):
    made, size = look(key), 64 if key in LARGER else 32
    model = build(key, image_size=size)
    assert type(model).__name__ == made.model and model.config.model_type == made.kind
    if made.geometry is None:
        assert made.not_run.startswith(made.model) and GIVES[key] in made.not_run
        return
    assert gives(made.geometry) == GIVES[key]
    with torch.no_grad():
        got = capture(model, pixels(size), Needs(pooled=True))
    assert got.pooled.shape == (3, made.geometry.pooled)


@pytest.mark.parametrize("key", EACH)
def test_each_objective_works_or_is_refused_with_what_works(key):
    made = row(key)
    for (role, name), refusal in made.refused.items():
        assert refusal.startswith(f"objective '{name}': ")
        found = ALTERNATIVES.search(refusal)
        assert found, refusal
        named = set() if found[1] == "none that pairs layers" else set(found[1].split(", "))
        assert named == made.default_serves[role], (role, refusal)
    for role in ("student", "teacher"):
        # On every other pair features can be compared, at the last blocks at least.
        on_grid = made.geometry.layers[-1].grid is not None
        assert ((role, "hidden_states") in made.serves) == on_grid
        # A student's map of one cell has no place to learn.
        one_cell = role == "student" and made.geometry.layers[-1].grid == (1, 1)
        assert ((role, "attention_transfer") in made.serves) == (on_grid and not one_cell)
        full = made.geometry.layers[-1].attention == "full" and on_grid
        assert ((role, "attention_map") in made.serves) == full
        assert ((role, "relation") in made.serves) == (full and not made.geometry.weights_only)


@pytest.mark.parametrize("key", EACH)
def test_every_model_answers_as_its_source_or_is_refused(key):
    """lwf: a second head beside the student's, a copy of the source's."""
    size = 64 if key in LARGER else 32
    for names in ((key, "vit"), ("vit", key)):
        student, teacher = (build(name, image_size=size) for name in names)
        refusal = _refusal(student, Teacher(teacher), plan(student, teacher, pixel_values=pixels(size)), "lwf", {})
        two_heads = names[1] in ("deit_teacher", "levit_teacher", "swiftformer")  # answers by the mean of both
        assert (refusal is not None) == two_heads, refusal


@pytest.mark.parametrize("key", EACH)
def test_every_model_can_be_differentiated(key):
    size = 64 if key in LARGER else 32
    for names in ((key, "vit"), ("vit", key)):
        student, teacher = (build(name, image_size=size) for name in names)
        pairing = SimpleNamespace(student=SimpleNamespace(image=(size, size)), teacher=None)
        assert _refusal(student, Teacher(teacher), pairing, "jacobian", {}) is None


@pytest.mark.parametrize("key", [key for key in GIVES if isinstance(GIVES[key], str)])
def test_a_model_that_cannot_be_used_is_refused_in_words(key):
    model, vit = build(key), build("vit")
    sentence = f"^{type(model).__name__} .*{GIVES[key]}.* [Cc]hoose "
    for student, teacher in ((model, vit), (vit, model)):
        with pytest.raises(ValueError, match=sentence):
            plan(student, Teacher(teacher), pixel_values=pixels(32))
    with pytest.raises(ValueError, match=sentence):
        capture(model, pixels(32), Needs(logits=True))


def test_another_kernel_opens_what_the_default_one_hides():
    hidden, seen = row("data2vec-vision"), row("data2vec-vision", attn_implementation="eager")
    assert "attn_implementation='eager'" in hidden.refused["student", "attention_map"]
    assert gives(seen.geometry)[2] == "full, weights only"
    assert seen.serves["student", "attention_map"] == seen.serves["teacher", "attention_map"] == "attention_map"


def test_a_window_that_covers_the_map_is_full_attention():
    model = build("swin")
    with torch.no_grad():
        got = capture(model, pixels(32), Needs(attention=frozenset({3})))
        model.set_attn_implementation("eager")
        eager = model(pixel_values=pixels(32), output_attentions=True).attentions[-1]
    assert got.geometry.layers[3].attention == "full" and got.geometry.layers[1].attention == "windowed"
    a = got.attention[3]
    torch.testing.assert_close(attention_rows(a.query, a.key, a.scale, a.bias, "all").exp(), eager, rtol=0, atol=1e-6)


def test_tokens_that_a_model_keeps_in_another_order_are_on_no_grid():
    """Hiera's blocks work on tokens sorted by mask unit; its own `reshaped_hidden_states` put them back."""
    model = build("hiera")
    with torch.no_grad():
        got = capture(model, pixels(32), Needs(hidden_states=frozenset({1, 3})))
        _, first, last = model(pixel_values=pixels(32), output_hidden_states=True).reshaped_hidden_states
    shuffled, ordered = got.hidden_states[1], got.hidden_states[3]
    assert torch.equal(ordered, last.flatten(1, 2)) and got.geometry.layers[3].grid == (4, 4)
    assert not torch.allclose(shuffled, first.flatten(1, 2)) and got.geometry.layers[1].grid is None
    torch.testing.assert_close(shuffled.norm(dim=-1).sort()[0], first.flatten(1, 2).norm(dim=-1).sort()[0])


@pytest.mark.parametrize("key", ["vit", "swin", "pvt", "siglip"])
@pytest.mark.parametrize("image", ["zeros", "bright", "bf16"])
def test_the_grid_is_found_whatever_the_image(key, image):
    model, x = build(key), pixels(32)
    expected = [layer.grid for layer in describe(model, x).layers]
    if image == "bf16":
        model = model.to(torch.bfloat16)
    seen = describe(model, {"zeros": x * 0, "bright": x + 100, "bf16": x}[image])
    assert [layer.grid for layer in seen.layers] == expected and None not in expected


def test_the_order_of_tokens_is_seen_and_not_assumed():
    """Any ViT whose patches are not row by row: the grid is unknown, and no patch is matched with another's."""
    model = build("vit")
    assert describe(model, pixels(32)).layers[0].grid == (4, 4)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(16).reshape(4, 4).T.flatten()])
    handle = model.vit.embeddings.register_forward_hook(lambda module, args, output: output[:, order])
    assert [layer.grid for layer in describe(model, pixels(32)).layers] == [None, None]
    handle.remove()


INTRO = """# Architectures

Made by `python -m tests.models.test_architectures` (the test-suite fails when this page differs), from a tiny random
model of each entry of transformers' image-classification mapping, on images of 32 x 32 pixels (64 x 64 where the last
map would be a single cell). Nothing here is a list that the package reads: it looks at the model it is given, so a
fine-tuned or larger model may have more stages, and a model that is not in the table is looked at in the same way.

- **blocks**: what `layers` counts. Layers where the config states their number, stages elsewhere (LeViT, MobileViT,
  HGNetV2).
- **hidden states**: tokens or maps, their grids along the depth, and the tokens before the patches (of the last
  block). "on no grid": tokens that do not stand row by row on the image, so patches cannot be matched.
- **attention**: full (every token to every token), windowed, reduced (fewer keys than tokens), none (or not given).
  "weights only": finished weights without queries and keys. Swin's last stage is a single window, so it is full.
- **as student, as teacher**: which of `attention_map` (with `rows: all`), `attention_transfer`, `hidden_states`,
  `relation` and `attention_jacobian` work with a ViT; "(last)" only with `layers: last`, or pairs named by hand.
  Everything else is refused before training, in a sentence that names what works. Objectives on the class outputs
  (`logit_kd`, `decoupled_kd`, `dist`, ...) and `jacobian` work with every model that runs on images alone; `hessian`
  with those that have no ReLU-like layers and no max-pooling.
"""


def page() -> str:
    lines = ["| model type | class | blocks | hidden states | attention | as student | as teacher |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    lines += [line(key) for key in sorted(GIVES)]
    listed = [f"- `{kind}`: {why}." for kind, why in sorted(NOT_BUILT.items())]
    notes = [
        "data2vec-vision gives its attention when loaded with `attn_implementation='eager'`. DINOv3 has no",
        "image-classification head in this transformers.",
    ]
    return "\n".join([INTRO, *lines, "", *notes, "", "Not built here:", "", *listed, ""])


def line(key: str) -> str:
    made = row(key)
    name = made.model.replace("ForImageClassification", "...") if len(made.model) > 40 else made.model
    if made.geometry is None:
        cells = ["", "", "", f"refused: {GIVES[key]}", "refused"]
    else:
        blocks, hidden, attention, _ = gives(made.geometry)
        student, teacher = (_names(made, role) for role in ("student", "teacher"))
        cells = [str(blocks), hidden, attention, student, "the same" if student == teacher else teacher]
    return f"| {' | '.join([made.kind, name, *cells])} |"


def _names(made: Row, role: str) -> str:
    found = [made.serves[role, name] for name in OPTIONS if (role, name) in made.serves]
    plain = [name for name in found if "(" not in name]
    if found and not plain:
        return ", ".join(name.removesuffix(" (last)") for name in found) + " (all: last)"
    return ", ".join(found) or "none that pairs layers"


def test_the_page_has_the_line_that_is_found():
    missing = [made for key in FAST if (made := line(key)) not in PAGE.read_text()]
    assert not missing, "python -m tests.models.test_architectures"


@pytest.mark.slow
def test_the_page_is_what_is_found():
    assert PAGE.read_text() == page(), "python -m tests.models.test_architectures"


if __name__ == "__main__":
    PAGE.write_text(page())
