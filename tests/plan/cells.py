"""The cells that `test_analytic.py` compares and `scripts/refresh_plan_cells.py` compiles again."""

from __future__ import annotations

from pathlib import Path

from irope_jax.experiment import check_devices, load_config, resolve
from irope_jax.plan.job import Job
from irope_jax.sharding.mesh import MeshConfig

CHUNK = 512
WIDTHS = dict(d_model=1024, num_heads=8, num_kv_heads=4, head_dim=128, vocab_size=8192)


def _config(ffn: dict, *, mesh: dict, length: int, batch: int, remat: str, near: bool, compute: str) -> dict:
    local = dict(position=dict(kind="rope"), mask=dict(kind="chunked", size=CHUNK), ffn=ffn)
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=dict(kind="log_floor"), ffn=ffn)
    pattern = (local, far) if near else (far,)
    return dict(
        name="cell",
        model=dict(
            **WIDTHS, num_layers=4, pattern=pattern, output_head="untied", remat=remat,
            context=dict(layout="zigzag", far="ring"), precision=dict(params="float32", compute=compute),
        ),
        data=dict(
            seq_len=length, batch_size=batch, mixture=(dict(source=dict(kind="corpus", split="train")),),
            packing=dict(kind="best_fit", document_multiple=CHUNK),
        ),
        train=dict(steps=10, optimizer=dict(learning_rate=1e-4)),
        mesh=dict(data=1, **mesh),
    )  # fmt: skip


DENSE = dict(kind="swiglu", hidden_dim=4096)
MIXTURE = dict(
    kind="moe", num_experts=4, hidden_dim=2048, router=dict(kind="sigmoid"), shared=dict(kind="swiglu", hidden_dim=2048)
)

CELLS = {
    # name: (target, mode, ffn, mesh, length, rows, remat, local layers too)
    "fsdp": ("v5e:2x2", "train", DENSE, dict(fsdp=4), 4096, 4, "full", True),
    "context": ("v5e:2x2", "train", DENSE, dict(context=4), 8192, 1, "attention", True),
    "context, all global": ("v5p:2x2x1", "train", DENSE, dict(context=4), 8192, 1, "full", False),
    "fsdp x context": ("v5p:2x2x2", "train", DENSE, dict(fsdp=2, context=4), 8192, 2, "attention", True),
    "tensor": ("v5e:2x2", "train", DENSE, dict(tensor=4), 4096, 2, "full", True),
    "experts, context": ("v5p:2x2x1", "train", MIXTURE, dict(context=4), 8192, 1, "attention", True),
    "prefill": ("v5e:2x2", "prefill", DENSE, dict(context=4), 65_536, 1, "full", True),
    "decode": ("v5e:2x2", "decode", DENSE, dict(context=4), 65_536, 1, "full", True),
    "decode, tensor": ("v5e:2x2", "decode", DENSE, dict(tensor=4), 32_768, 2, "full", True),
    "decode, experts": ("v5p:2x2x1", "decode", MIXTURE, dict(context=4), 131_072, 1, "full", True),
    "cpu, context": ("cpu:8", "train", DENSE, dict(context=8), 8192, 1, "full", True),
    "cpu, fsdp x context": ("cpu:8", "train", DENSE, dict(fsdp=2, context=4), 4096, 2, "attention", True),
}


WHOLE = {
    # name: (target, config file, devices, overrides); minutes each
    "Scout, 1,048,576 tokens": ("v5p:4x4x4", "llama4_scout.py:1m", 64, {}),
    "Llama 3.1 8B, 131,072 tokens": ("v5p:4x4x8", "llama3_8b.py", 128, {}),
    "Llama 3.1 8B, 131,072 tokens, GPUs": (
        "h100:8", "llama3_8b.py", 8, {"data.batch_size": "1", "mesh.fsdp": "1", "mesh.context": "8"}
    ),
}  # fmt: skip


def job_of(name: str) -> tuple[str, Job]:
    """`(target, job)` of a cell. XLA:CPU sends bfloat16 as float32, so there it computes in float32."""
    if name in WHOLE:
        target, file, devices, overrides = WHOLE[name]
        experiment = resolve(load_config(str(Path(__file__).parents[2] / "configs" / file)), list(overrides.items()))
        shared = dict(model=experiment.model, data=experiment.data, train=experiment.train)
        return target, Job(**shared, mesh=check_devices(experiment, devices))
    target, mode, ffn, mesh, length, rows, remat, near = CELLS[name]
    compute = "float32" if target.startswith("cpu") else "bfloat16"
    batch = rows if mode == "train" else 1
    values = _config(ffn, mesh=mesh, length=length, batch=batch, remat=remat, near=near, compute=compute)
    experiment = resolve(values)
    shared = dict(model=experiment.model, data=experiment.data, train=experiment.train)
    if mode == "train":
        count = 1
        for size in mesh.values():
            count *= size
        return target, Job(**shared, mesh=check_devices(experiment, count))
    return target, Job(**shared, mesh=MeshConfig(data=1, **mesh), mode=mode, rows=rows)
