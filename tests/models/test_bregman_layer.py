"""What is represented of a model, the exported layer, its files, and what it refuses."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_kdtl.functional.bregman import fit
from hf_kdtl.functional.links import leaky_relu
from hf_kdtl.models import Teacher, capture
from hf_kdtl.models.bregman.layer import BregmanLayer, Provenance
from hf_kdtl.models.bregman.outputs import LINKS_OF, check_of, needs_of, outputs_of, width_of
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.forward.geometry import describe
from tests.reference import paired
from tests.support.representations import made_up
from tests.support.tiny import build

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def rows(model, of, layer=None, pixels=PIXELS):
    geometry = describe(model, pixels)
    width = width_of(of, layer, geometry)
    with torch.no_grad():
        got = outputs_of(capture(model, pixels.to(model.dtype), needs_of(of, layer), geometry), of, layer)
    assert width in (got.shape[-1], 0)
    return got


def test_what_is_read_of_a_vit():
    model = build("vit", attn_implementation="eager")
    out = model(pixel_values=PIXELS, output_attentions=True)
    states = [record["output"] for record in paired.read(model, PIXELS)]
    torch.testing.assert_close(rows(model, "probabilities"), out.logits.softmax(-1))
    torch.testing.assert_close(rows(model, "pooled"), model.vit.layernorm(states[-1])[:, 0])
    torch.testing.assert_close(rows(model, "hidden_states", 0), states[0])
    got = rows(model, "attention", 1)
    torch.testing.assert_close(got, out.attentions[1].mean(1)[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones(3))


@pytest.mark.parametrize(
    "name", ["deit", "beit", "dinov2_with_registers", "clip", "resnet", "swin", "convnext", "cvt"]
)
def test_what_is_read_of_other_families(name):
    model = build(name)
    assert rows(model, "probabilities").shape == (3, 3)
    pooled = rows(model, "pooled")
    torch.testing.assert_close(_classifier(model)(pooled), model(pixel_values=PIXELS).logits, rtol=1e-4, atol=1e-5)
    hidden = rows(model, "hidden_states", 0)
    assert hidden.ndim == 3 and hidden.isfinite().all()
    if name in ("deit", "beit", "dinov2_with_registers", "clip"):
        attention = rows(model, "attention", 1)
        assert attention.shape == (3, hidden.shape[1]) and (attention.sum(-1) - 1).abs().max() < 1e-5
    else:
        with pytest.raises(ValueError, match=r"no class token that attends to every token; use of='hidden_states'"):
            rows(model, "attention", 1)


def _classifier(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 3][-1]


def test_maps_are_read_row_by_row():
    model = build("resnet")
    maps = capture(model, PIXELS, needs_of("hidden_states", 0)).hidden_states[0]
    found = rows(model, "hidden_states", 0)
    torch.testing.assert_close(found[:, maps.shape[3] + 2], maps[:, :, 1, 2])


def test_attention_that_is_not_full():
    given = describe(build("vit"), PIXELS)
    reduced = replace(given, layers=(replace(given.layers[0], attention="reduced"), given.layers[1]))
    assert width_of("attention", 1, reduced) == 17
    with pytest.raises(ValueError, match=r"block 0 of ViTFor.* has no class token that attends to every token"):
        width_of("attention", 0, reduced)


def test_no_class_token():
    with pytest.raises(ValueError, match=r"block 0 of SiglipFor.* has no class token that attends"):
        rows(build("siglip"), "attention", 0)
    with pytest.raises(ValueError, match=r"ViTFor.* has the blocks 0 to 1, and hidden_states of block 2 is asked"):
        width_of("hidden_states", 2, describe(build("vit"), PIXELS))


def test_half_precision_rows_are_distributions():
    model = build("vit").bfloat16()
    for of, layer in (("probabilities", None), ("attention", 0)):
        found = rows(model, of, layer)
        assert found.dtype == torch.float32 and (found.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("of", "layer", "link", "match"),
    [
        ("logits", None, None, "of is 'logits'; expected 'probabilities', 'pooled', 'hidden_states', 'attention'"),
        ("attention", None, None, "layer is None; attention are of one block"),
        ("hidden_states", -1, None, "layer is -1; hidden_states are of one block: give its number, counted from 0"),
        ("pooled", 2, None, "layer is 2; pooled are outputs of the model, not of a layer: leave layer out"),
        ("pooled", None, "relu", "not strictly monotone"),
        ("pooled", None, "softmax", "link is 'softmax'; for pooled expected 'identity' or 'tanh' or 'leaky_relu'"),
        ("attention", 0, "identity", "link is 'identity'; for attention expected 'softmax'"),
    ],
)
def test_what_goes_together(of, layer, link, match):
    with pytest.raises(ValueError, match=match):
        check_of(of, layer, link)


def test_default_links():
    assert [check_of(of, None if of in ("probabilities", "pooled") else 0) for of in LINKS_OF] == [
        "softmax",
        "identity",
        "identity",
        "softmax",
    ]
    assert check_of("pooled", None, "tanh") == "tanh"


# fingerprint


def test_fingerprint_survives_saving_and_not_training():
    model = build("vit")
    before = fingerprint(model)
    model.save_pretrained("model")
    again = type(model).from_pretrained("model")
    assert fingerprint(again) == before == fingerprint(copy.deepcopy(model))
    for name, value in again.state_dict().items():
        kept = value.reshape(-1)[-1].clone()
        value.reshape(-1)[-1] += 1e-6 * (1 + kept.abs())
        assert fingerprint(again) != before, name
        value.reshape(-1)[-1] = kept
    assert fingerprint(again) == before
    assert fingerprint(copy.deepcopy(model).bfloat16()) != before
    swapped = copy.deepcopy(model).state_dict()
    a, b = (f"vit.layers.{i}.mlp.fc1.bias" for i in (0, 1))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    other = copy.deepcopy(model)
    other.load_state_dict(swapped)
    assert fingerprint(other) != before


def test_fingerprint_sees_names_shapes_and_dtypes():
    def of(name, value):
        module = torch.nn.Module()
        module.register_buffer(name, value)
        return fingerprint(module)

    zeros = torch.zeros(2, 3)
    assert len({of("a", zeros), of("b", zeros), of("a", zeros.T), of("a", zeros.int())}) == 4


def test_fingerprint_sees_running_statistics():
    model = build("resnet")
    before = fingerprint(model)
    model.train()(pixel_values=PIXELS)
    assert fingerprint(model) != before


# the layer


def layer_of(of="probabilities", model=None):
    return made_up(model or build("vit"), of)


@pytest.mark.parametrize("of", LINKS_OF)
def test_the_layer_is_the_fits_decode_and_is_frozen(of):
    layer, c = layer_of(of), torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(c), layer.representation.decode(c), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.link.f(layer.before(c)), layer(c))
    assert layer(c.float()).dtype == layer(c.bfloat16()).dtype == torch.float32
    assert list(layer.parameters()) == [] and set(layer.state_dict()) == {"directions", "mean"}
    assert layer.directions.dtype == layer.mean.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(c.float()), layer.representation.decode(c).float(), rtol=1e-4, atol=1e-5)


def test_encode_takes_tokens_and_has_no_gradient():
    layer = layer_of("hidden_states")
    y = torch.randn(2, 3, 32, requires_grad=True)
    c = layer.encode(y)
    assert c.shape == (2, 3, 2) and c.dtype == torch.float64 and not c.requires_grad
    torch.testing.assert_close(c[1], layer.representation.encode(y[1]))


@pytest.mark.parametrize("of", LINKS_OF)
def test_saved_and_loaded_it_is_the_same(of):
    layer = layer_of(of)
    layer.save("layer")
    again = BregmanLayer.load("layer")
    assert {p.name for p in Path("layer").iterdir()} == {"representation.json", "representation.safetensors"}
    assert again.provenance == layer.provenance and again.link is layer.link and again.k == 2
    for name in ("mean", "directions", "spectrum", "divergence", "baseline"):
        one, other = (getattr(x.representation, name) for x in (layer, again))
        assert torch.equal(one, other) and one.dtype == other.dtype if torch.is_tensor(one) else one == other
    assert {tensor.dtype for tensor in load_file("layer/representation.safetensors").values()} == {torch.float64}
    about = json.loads(Path("layer/representation.json").read_text())
    assert about["explained"] == layer.representation.explained and about["provenance"]["of"] == of
    layer.save("layer")  # over itself


def test_the_slope_of_leaky_relu_is_kept():
    y = leaky_relu(0.3).f(torch.randn(20, 3, dtype=torch.float64))
    facts = {"width": 3, "dataset": "x", "images": 20, "version": "0"}
    BregmanLayer(
        fit(y, 2, leaky_relu(0.3)), Provenance.of_source(Teacher(build("vit")), "pooled", None, **facts)
    ).save("layer")
    again = BregmanLayer.load("layer")
    torch.testing.assert_close(again.link.f(torch.tensor([-1.0])), torch.tensor([-0.3]))


def test_classes_in_another_order():
    model = build("vit")
    model.config.id2label = dict(enumerate(["ant", "bee", "cat"]))
    layer, order = layer_of(model=model), [2, 0, 1]
    other, c = layer.reordered(order), torch.randn(4, 2)
    torch.testing.assert_close(other(c), layer(c)[:, order])
    y = layer(torch.randn(4, 2)).double()
    torch.testing.assert_close(other.encode(y[:, order]), layer.encode(y), rtol=1e-5, atol=1e-5)
    assert other.provenance.classes == ["cat", "ant", "bee"] and layer.reordered(None) is layer


def test_a_name_that_tells_of_no_machine():
    model = build("vit")
    model.save_pretrained("some/model")
    for path, name in (("some/model", "model"), (str(Path("some/model").resolve()), "model")):
        loaded = type(model).from_pretrained(path)
        assert layer_of(model=loaded).provenance.teacher == f"ViTForImageClassification {name}"
    loaded.config.name_or_path = "google/vit"
    assert layer_of(model=loaded).provenance.teacher == "ViTForImageClassification google/vit"


# refusals


def test_broken_folders():
    layer_of().save("layer")
    other = layer_of("pooled")
    other.save("other")
    Path("other/representation.safetensors").rename("layer/representation.safetensors")
    with pytest.raises(
        ValueError, match=r"directions \(32, 2\) and a mean \(32,\), representation.json says \(3, 2\)"
    ):
        BregmanLayer.load("layer")
    with pytest.raises(FileNotFoundError, match=r"other has no representation.safetensors; expected what hf-kdtl fit"):
        BregmanLayer.load("other")
    about = json.loads(Path("layer/representation.json").read_text())
    Path("layer/representation.json").write_text(json.dumps(about | {"version": 2}))
    with pytest.raises(ValueError, match="layer has version 2 and this hf_kdtl reads 1"):
        BregmanLayer.load("layer")
    other.save("twice")
    with pytest.raises(FileNotFoundError):  # stopped while it was written over
        Path("twice/representation.json").unlink()
        BregmanLayer.load("twice")


def test_another_teacher_and_other_classes():
    model, other = build("vit"), build("vit", seed=9)
    layer = layer_of(model=model)
    layer.check_teacher(Teacher(model))
    layer.check_teacher(Teacher(copy.deepcopy(model)))
    a, b = fingerprint(model), fingerprint(other)
    with pytest.raises(
        ValueError, match=f"is of ViTForImageClassification with weights {a}, and the teacher is .*{b}"
    ):
        layer.check_teacher(Teacher(other))
    with pytest.raises(ValueError, match="columns are 3 unnamed classes and the teacher's 5 unnamed classes"):
        layer.check_teacher(Teacher(build("vit", num_labels=5)))
    model.config.id2label = dict(enumerate(["ant", "bee", "cat"]))
    with pytest.raises(ValueError, match=r"columns are 3 unnamed classes and the teacher's \['ant', 'bee', 'cat'\]"):
        layer.check_teacher(Teacher(model))
    named = layer_of(model=model)
    model.config.id2label = dict(enumerate(["ant", "cat", "bee"]))
    with pytest.raises(
        ValueError, match=r"columns are \['ant', 'bee', 'cat'\] and the teacher's \['ant', 'cat', 'bee"
    ):
        named.check_teacher(Teacher(model))
    layer_of("pooled", model).check_teacher(Teacher(model))  # no classes there


def test_another_width():
    layer = layer_of("hidden_states")
    layer.check_width(describe(build("vit"), PIXELS))
    wide = describe(build("vit", hidden_size=48), PIXELS)
    with pytest.raises(ValueError, match=r"of hidden_states of block 1 of ViT.*, width 32, .* gives rows of width 48"):
        layer.check_width(wide)
    with pytest.raises(ValueError, match=r"width 32, on 0 images, and here ViT.* rows of width 48"):
        layer_of("pooled").check_width(wide)
