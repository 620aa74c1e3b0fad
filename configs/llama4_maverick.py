"""Llama 4 Maverick, the text model: 400,711,848,960 parameters, 17,184,691,200 of them for a token.

    irope show --config=configs/llama4_maverick.py --devices=256
    irope import Llama-4-Maverick-17B-128E runs/maverick
    irope train --config=configs/llama4_maverick.py --config.train.init_from=runs/maverick

On 256 chips parameters, optimizer and gradients take 52.5 GB each (`irope show`).
As Scout, but every second layer is dense, the others have 128 experts, frequencies are unscaled, q and k not normed.
"""

import llama4_scout as scout
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    dense = dict(kind="swiglu", hidden_dim=16_384)
    config = scout.get_config()
    config.name = "llama4_maverick"
    config.description = "Llama 4 Maverick: 128 experts in every second layer"
    config.model.pattern = scout.layers((dense, scout.mixture(128)) * 2, dict(kind="unscaled"), "none")
    config.data.batch_size = 256
    config.mesh = dict(data=1, fsdp=8, expert=32)
    return config
