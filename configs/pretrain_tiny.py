"""A 13M-parameter iRoPE model on novels at 1,024 bytes: pretraining as it is done at size, shrunk.

    irope train --config=configs/pretrain_tiny.py                                   # one device
    irope train --config=configs/pretrain_tiny.py --config.mesh.fsdp=8 --config.mesh.data=1

Documents are packed best-fit and each starts at a multiple of the chunk, so chunk-local layers stay local under
packing. Meant for an accelerator; a checkpoint made on one mesh is read on another.
"""

from ml_collections import ConfigDict

CHUNK = 256


def get_config() -> ConfigDict:
    ffn = dict(kind="swiglu", hidden_dim=1024)
    local = dict(
        position=dict(kind="rope", theta=500_000.0), mask=dict(kind="chunked", size=CHUNK), ffn=ffn, qk_norm="rms"
    )
    far = dict(
        position=dict(kind="nope"),
        mask=dict(kind="global"),
        temperature=dict(kind="log_floor", floor_scale=1024),
        ffn=ffn,
    )
    config = ConfigDict()
    config.name = "pretrain_tiny"
    config.description = "8 layers of iRoPE, pretrained on five novels as bytes"
    config.model = dict(
        vocab_size=272,
        d_model=384,
        num_layers=8,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        pattern=(local, local, local, far),
        remat="full",
        precision=dict(params="float32", compute="bfloat16"),
    )
    config.data = dict(
        seq_len=1024,
        batch_size=16,
        mixture=(dict(source=dict(kind="corpus", split="train")),),
        packing=dict(kind="best_fit", document_multiple=CHUNK),
    )
    config.train = dict(
        steps=2000,
        optimizer=dict(learning_rate=1e-3, schedule=dict(kind="wsd", warmup=100, decay=400)),
        z_loss=1e-4,
        eval_every=500,
    )
    config.checkpoint = dict(every=250, keep=2, keep_every=1000)
    config.evals = (dict(kind="perplexity", lengths=(1024, 4096), tokens=65_536),)
    return config
