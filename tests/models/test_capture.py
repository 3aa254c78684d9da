"""What is read off a model is what the model computed, whatever the architecture, kernel and mode."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_kdtl.functional.attention import attention_rows
from hf_kdtl.models import Needs, capture, plan
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.geometry import describe
from hf_kdtl.models.forward.modes import contiguous_gradients
from hf_kdtl.objectives.paired import as_tokens
from tests.support.tiny import TINY, build

TAPPED = [
    "vit", "deit", "deit_teacher", "dinov2", "dinov2_with_registers", "beit", "vit_msn", "ijepa", "siglip", "clip",
    "metaclip_2",
]  # fmt: skip
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def _every(model):
    return frozenset(range(len(find_blocks(model))))


@pytest.mark.parametrize("name", TAPPED)
def test_the_tap_gives_the_attention_that_eager_gives(name):
    model = build(name)
    with torch.no_grad():
        got = capture(model, PIXELS, Needs(attention=_every(model)))
        plain = model(pixel_values=PIXELS).logits
        model.set_attn_implementation("eager")
        eager = model(pixel_values=PIXELS, output_attentions=True).attentions
    assert (got.logits == plain).all() and model.config._attn_implementation == "eager"
    assert got.attention.keys() == _every(model) and len(eager) == len(got.attention)
    for i, attention in got.attention.items():
        tapped = attention_rows(attention.query, attention.key, attention.scale, attention.bias, "all").exp()
        torch.testing.assert_close(tapped, eager[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_the_outputs_of_the_blocks(name):
    model = build(name)
    with torch.no_grad():
        got = capture(model, PIXELS, Needs(hidden_states=_every(model), pooled=True))
    geometry = got.geometry
    assert got.hidden_states.keys() == _every(model)
    for i, hidden in got.hidden_states.items():
        layer = geometry.layers[i]
        if layer.grid is None:
            assert name == "hiera", "tokens in another order"  # test_architectures.py shows that they are
            continue
        patches = layer.grid[0] * layer.grid[1]
        if layer.layout == "maps":
            assert hidden.shape == (3, layer.width, *layer.grid)
        else:
            assert hidden.shape == (3, len(layer.prefix) + patches, layer.width)
    assert got.pooled.shape == (3, geometry.pooled)


def test_hidden_states_of_a_vit_are_transformers_own():
    model = build("vit", layers=3)
    with torch.no_grad():
        got = capture(model, PIXELS, Needs(hidden_states=frozenset({0, 2}), pooled=True))
        theirs = model(pixel_values=PIXELS, output_hidden_states=True).hidden_states
    assert sorted(got.hidden_states) == [0, 2] and not got.attention
    assert (got.hidden_states[0] == theirs[1]).all()
    normed = model.vit.layernorm(got.hidden_states[2])[:, 0]
    torch.testing.assert_close(got.pooled, normed)


@pytest.mark.parametrize("mode", ["plain", "checkpointing", "bf16", "compile"])
def test_gradients_flow_through_what_is_captured(mode):
    torch._dynamo.reset()

    def gradient(special):
        model = build("vit").train()
        if special == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        runner = torch.compile(model, backend="aot_eager") if special == "compile" else model
        everything = Needs(hidden_states=frozenset({0, 1}), attention=frozenset({0, 1}))
        geometry = describe(model, PIXELS)
        for _ in range(2):  # twice: nothing of a first step may be left over
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=special == "bf16"):
                got = capture(runner, PIXELS, everything, geometry)
            rows = [attention_rows(a.query, a.key, a.scale, a.bias, "all") for a in got.attention.values()]
            loss = sum(r.square().mean() for r in rows) + sum(h.square().mean() for h in got.hidden_states.values())
            loss.backward()
        # A compiled graph gives 0 where eager gives None.
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])

    got, expected = gradient(mode), gradient("plain")
    assert got.shape == expected.shape and got.abs().max() > 1e-3
    tolerance = 0.03 if mode == "bf16" else 1e-6
    assert (got - expected).norm() / expected.norm() < tolerance


def test_student_and_teacher_passes_of_the_same_modules_stay_apart():
    model = get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    needs = Needs(attention=frozenset({0, 1}))
    with torch.no_grad():
        student = capture(model, PIXELS, needs)
        with model.disable_adapter():
            teacher = capture(model, PIXELS, needs)
        base = capture(build("vit"), PIXELS, needs)
    assert not torch.allclose(student.attention[0].query, teacher.attention[0].query)
    torch.testing.assert_close(teacher.attention[1].query, base.attention[1].query)


def test_models_built_from_one_config_do_not_disturb_each_other():
    first = build("vit")
    second = type(first)(first.config)
    assert first.config is second.config
    with torch.no_grad():
        got = capture(first, PIXELS, Needs(attention=frozenset({0})))
        assert first.config._attn_implementation == "sdpa"
        other = capture(second, PIXELS, Needs(attention=frozenset({1})))
    assert set(got.attention) == {0} and set(other.attention) == {1}


def test_nothing_outlives_the_capture():
    model = build("vit")
    got = capture(model, PIXELS, Needs(hidden_states=frozenset({0}), attention=frozenset({0, 1})))
    watched = [weakref.ref(got.attention[0].query), weakref.ref(got.hidden_states[0])]
    del got
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert not any(block._forward_hooks for _, block in find_blocks(model))


def test_what_is_not_there_is_refused():
    model = build("swinv2")
    with pytest.raises(ValueError, match=r"has the blocks 0 to 1; asked for \[7\]"):
        capture(build("vit"), PIXELS, Needs(hidden_states=frozenset({7})))
    with pytest.raises(ValueError, match=r"gave no attention for the blocks \[0\].*attention_transfer"):
        capture(model, PIXELS, Needs(attention=frozenset({0})))
    lazy = build("vit")
    geometry = describe(lazy, PIXELS)
    second = lazy.vit.layers[1]
    second.register_forward_pre_hook(lambda *_: second._forward_hooks.clear())  # as if it were not run
    with pytest.raises(ValueError, match=r"did not run the blocks \[1\]"):
        capture(lazy, PIXELS, Needs(hidden_states=frozenset({1})), geometry)


def test_a_plan_is_a_table_a_person_understands():
    text = str(plan(build("vit", layers=2), build("dinov2_with_registers", layers=4, image_size=64, hidden_size=48)))
    header, columns, *rows = text.splitlines()
    assert "student ViTForImageClassification (2 blocks" in header and "teacher Dinov2" in header
    assert "student gives" in columns and len(rows) == 2
    assert "width 32 -> 48 (projector)" in rows[0] and "register dropped" in rows[0]


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("uniform", [(0, 1), (1, 3)]),
        ("last", [(1, 3)]),
        ([[0, 0], [-1, -1]], [(0, 0), (1, 3)]),
    ],
)
def test_layers_are_paired_by_the_plan(layers, pairs):
    made = plan(build("vit", layers=2), build("vit", layers=4), layers)
    assert [(p.student_layer, p.teacher_layer) for p in made.pairs] == pairs


def test_a_student_deeper_than_its_teacher_uses_no_teacher_block_twice():
    made = plan(build("vit", layers=4), build("vit", layers=2))
    assert [(p.student_layer, p.teacher_layer) for p in made.pairs] == [(1, 0), (3, 1)]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([[0, 9]], "block 9 of the teacher, which has the blocks 0 to 3"),
        ([[0, 1], [0, 2]], r"the student's blocks \[0\] more than once"),
        ("first", "expected 'uniform', 'last', or pairs"),
        ([], "expected 'uniform', 'last', or pairs"),
        ([[0, 1.5]], "expected 'uniform', 'last', or pairs"),
    ],
)
def test_pairs_that_cannot_be_are_refused(layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(build("vit", layers=2), build("vit", layers=4), layers)


def _token_order(gradient):
    """As the backward pass of flatten(2).transpose(1, 2) leaves it."""
    return gradient.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, gradient.shape[2:])


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d])
def test_torch_reads_the_gradient_of_a_norm_of_one_image_wrongly_on_the_cpu(kind):
    """The trap itself. The day this fails torch has fixed it: `contiguous_gradients` may go."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(8).double().eval()
    x, gradient = (torch.randn(1, 8, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    right = torch.autograd.grad(norm(x), x, gradient)[0]
    wrong = torch.autograd.grad(norm(x), x, _token_order(gradient))[0]
    with contiguous_gradients(norm, x):
        y = norm(x)
    fixed = torch.autograd.grad(y, x, _token_order(gradient))[0]
    assert not norm._forward_hooks and torch.equal(fixed, right)
    assert (wrong - right).norm() > 0.5 * right.norm()


@pytest.mark.parametrize("of", ["task", "tokens", "jacobian"])
@pytest.mark.parametrize("name", ["levit", "cvt", "resnet"])
def test_a_batch_of_one_image_has_the_gradient_of_that_image(name, of):
    """In eval mode, in float64: what a batch of the same image twice gives, halved, which torch computes rightly."""

    def gradient(pixels):
        model = build(name, image_size=64).double()
        blocks = _every(model) if of == "tokens" else frozenset()
        got = capture(model, pixels, Needs(hidden_states=blocks, input_gradient=of == "jacobian", order=2))
        values = got.logits.log_softmax(-1)[:, 0]
        if of == "tokens":
            weigh = torch.Generator().manual_seed(0)
            tokens = [as_tokens(hidden) for hidden in got.hidden_states.values()]
            drawn = [torch.randn(t.shape[1:], generator=weigh, dtype=t.dtype) for t in tokens]
            values = sum((t * w).square().flatten(1).sum(1) for t, w in zip(tokens, drawn, strict=True))
        elif of == "jacobian":
            values = got.input_gradient(values).square().flatten(1).sum(1)
        found = torch.autograd.grad(values.mean(), list(model.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    image = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(gradient(image), gradient(image.repeat(2, 1, 1, 1)), rtol=1e-9, atol=1e-12)
