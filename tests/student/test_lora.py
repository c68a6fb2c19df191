"""LoRA of a converted pipeline's transformer: in its folder, read by diffusers, in the audit and compiled."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

import edit_compile as ec
from pipelines import quiet, sd3_pipeline

pytestmark = pytest.mark.usefixtures("compiled_once")

SCALE = 2.0


@pytest.fixture(scope="module")
def original():
    return sd3_pipeline()


@pytest.fixture(scope="module")
def student(original):
    """A converted pipeline whose LoRA is random, and its folder's content is not written yet."""
    torch.manual_seed(0)
    converted = ec.linearize(original)
    targets = ec.add_lora(converted.transformer, 2, 2 * SCALE)
    assert "proj_out" in targets
    assert not [path for path in targets if ".attn." in path]
    with torch.no_grad():
        for name, parameter in converted.transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2)
    return converted


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    student.save_pretrained(place)
    return place


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (1, 4, 8, 12), "encoder_hidden_states": (1, 5, 40), "pooled_projections": (1, 48)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"timestep": torch.tensor([500.0]), "return_dict": False}


def picture(pipe):
    options = {"height": 32, "width": 48, "num_inference_steps": 1, "output_type": "latent"}
    return pipe(prompt="red", generator=torch.Generator().manual_seed(0), **options).images


def test_a_pipelines_folder_holds_it_and_diffusers_reads_the_original(original, student, folder):
    assert torch.equal(picture(quiet(ec.load_pipeline(folder))), picture(student))
    assert torch.equal(picture(quiet(DiffusionPipeline.from_pretrained(folder))), picture(original))
    with ec.teacher(student):
        assert torch.equal(picture(student), picture(original))


@pytest.mark.parametrize("reader", ["pipeline", "model"])
def test_diffusers_loads_the_adapter_with_its_scale(student, folder, reader):
    pipe = quiet(DiffusionPipeline.from_pretrained(folder))
    logging.set_verbosity_error()  # it looks for adapters of the text encoders too
    if reader == "pipeline":
        pipe.load_lora_weights(folder / "transformer" / "lora")
    else:
        options = {"weight_name": "adapter_model.safetensors", "prefix": "base_model.model"}
        pipe.transformer.load_lora_adapter(folder / "transformer" / "lora", **options)
    path = "transformer_blocks.0.ff.net.2"
    theirs, ours = pipe.transformer.get_submodule(path), student.transformer.get_submodule(path)
    (name,) = theirs.active_adapters
    assert theirs.scaling[name] == SCALE
    assert torch.equal(theirs.get_delta_weight(name), ours.get_delta_weight("default"))


def test_the_audit_finds_the_sites_and_nothing_else(student):
    assert ec.audit(student).sites == 2


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_run_teacher_and_student(student):
    """Of a copy: compiled blocks have no way back."""
    model = copy.deepcopy(student.transformer)
    before = model(**inputs())[0]
    with ec.teacher(model):
        teacher = model(**inputs())[0]
    torch._dynamo.reset()
    ec.compile(model, backend="eager")
    assert torch.equal(model(**inputs())[0], before)
    with ec.teacher(model):
        assert torch.equal(model(**inputs())[0], teacher)
    torch._dynamo.reset()


def test_linears_whose_weight_is_tied_or_read_in_other_ways_are_left_alone():
    import toy

    class Tied(toy.Toy):
        def __init__(self):
            super().__init__(joint=True)
            self.blocks[1].ff[0].weight = self.blocks[0].ff[0].weight
            self.pooled = nn.MultiheadAttention(6, 2)

    student = ec.linearize(Tied().eval(), example_inputs=toy.inputs(text=5))
    found = ec.add_lora(student, 1)
    assert found == ["text", "blocks.0.ff.2", "blocks.1.ff.2", "out"]
    with pytest.raises(ec.EditCompileError, match="weights with LoRA cannot be unshared"):
        ec.unshare(student)


def test_training_goes_through_recomputed_blocks(student):
    """A block that runs again in a backward pass after the teacher ran finds LoRA on."""
    model = student.transformer
    call = functools.partial(model, **inputs())
    gradients = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        output = call()[0].square().mean()
        with ec.teacher(model), torch.no_grad():
            call()
        output.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if ".lora_" in name and p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
