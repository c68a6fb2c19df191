"""Convert the small text-to-image transformer that comes with the package, and look at what happened to it."""

import tempfile

import torch

import edit_compile as ec

model = ec.load_model("demo/mm-dit").model  # a diffusers SD3Transformer2DModel
plan = ec.plan(model)
print(plan)

student = ec.linearize(model, plan=plan)  # still an instance of its class, sharing every weight outside these sites
assert isinstance(student, type(model))

inputs = {
    "hidden_states": torch.randn(1, 3, 32, 32),
    "encoder_hidden_states": torch.randn(1, 32, model.config.joint_attention_dim),
    "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
    "timestep": torch.tensor([500.0]),
    "return_dict": False,
}
with torch.no_grad():
    original = model(**inputs)[0]
    untrained = student(**inputs)[0]
    with ec.teacher(student):  # the original attention, in the same model
        assert torch.equal(student(**inputs)[0], original)
error = (untrained - original).square().sum() / (original - original.mean()).square().sum()
print(f"relative error before distillation: {error:.2f} (edit-compile distill demo-mm-dit brings it down)")

for cost in ec.cost(student).costs:
    print(f"{cost.height} x {cost.width} px: {cost.ratio:.2f} times fewer FLOPs")

with tempfile.TemporaryDirectory() as folder:
    ec.save(student, folder, base="demo/mm-dit")  # what was added or trained, nothing else
    loaded = ec.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], untrained)
print("saved and loaded bit for bit")
