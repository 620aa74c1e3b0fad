"""Write `hf_rope.json`: frequencies that Hugging Face transformers gives for the RoPE scalings it knows.

Made with transformers 5.23.0 and torch 2.13.0 on CPU, in an environment that has them (the tests need neither):

    python tests/golden/make_hf_rope.py

Each case has the arguments of a `LlamaConfig`, the `seq_len` given to the function, and what it returned: float32
inverse frequencies to nine digits, which is all of a float32, and the attention factor.
"""

import json
import pathlib

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def case(head_dim, theta, parameters, *, max_position_embeddings=4096, seq_len=None):
    """One configuration and the numbers it gives."""
    arguments = {
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": {"rope_theta": theta, **parameters},
    }
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, **json.loads(json.dumps(arguments)))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len)
    assert inv_freq.dtype == torch.float32
    given = [float(f"{f:.9g}") for f in inv_freq.tolist()]
    return {**arguments, "seq_len": seq_len, "inv_freq": given, "attention_factor": attention_factor}


def longrope_factors(pairs, largest):
    """Made-up factors that grow with the pair, as a search finds them; two decimals like those of Phi-3."""
    return [round(1 + (largest - 1) * (i / max(pairs - 1, 1)) ** 2, 2) for i in range(pairs)]


def cases():
    for head_dim, theta, factor in [(16, 1e4, 4.0), (64, 5e5, 8.0), (128, 1e6, 2.5), (128, 1e4, 1.0)]:
        yield case(head_dim, theta, {"rope_type": "linear", "factor": factor})
    yield case(128, 1e4, {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25})

    for seq_len in [None, 1, 2048, 2049, 3000, 8192, 65536]:
        yield case(64, 1e4, {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=2048, seq_len=seq_len)
    yield case(16, 1e5, {"rope_type": "dynamic", "factor": 1.0}, max_position_embeddings=512, seq_len=5000)
    yield case(128, 5e5, {"rope_type": "dynamic", "factor": 8.0}, max_position_embeddings=8192, seq_len=131072)
    yield case(128, 1e4, {"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.5}, seq_len=9999)

    for head_dim, theta in [(16, 1e4), (64, 1e5), (128, 1e4), (128, 1e6)]:
        yield case(head_dim, theta, YARN)
    yield case(128, 1e6, YARN | {"factor": 1.0})
    yield case(128, 1e6, YARN | {"factor": 40.0, "beta_fast": 128.0, "beta_slow": 2.0})
    yield case(64, 5e5, YARN | {"factor": 16.0, "beta_fast": 4.0, "beta_slow": 1.0})
    yield case(64, 1.5e5, YARN | {"factor": 32.0, "truncate": False})  # gpt-oss
    yield case(128, 1e4, YARN | {"truncate": False, "beta_fast": 16.0})
    yield case(128, 1e4, YARN | {"original_max_position_embeddings": 32})  # both edges are clamped or close
    yield case(64, 1e4, YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False})  # the edges are equal
    yield case(128, 1e4, YARN | {"attention_factor": 1.25})
    yield case(64, 1e4, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0})  # DeepSeek-V3
    yield case(64, 1e4, YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707})  # DeepSeek-V2
    yield case(64, 1e4, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5})
    yield case(128, 1e4, YARN | {"partial_rotary_factor": 0.5})

    for head_dim in (16, 64, 128):
        yield case(head_dim, 5e5, {"rope_type": "llama3", **LLAMA31})
    yield case(64, 5e5, {"rope_type": "llama3", **LLAMA31, "factor": 32.0})  # Llama 3.2
    yield case(128, 5e5, {"rope_type": "llama3", **LLAMA31, "factor": 16.0, "high_freq_factor": 1.0})  # Llama 4 Scout
    yield case(128, 1e4, {"rope_type": "llama3", **LLAMA31, "low_freq_factor": 2.0, "high_freq_factor": 16.0})
    yield case(128, 5e5, {"rope_type": "llama3", **LLAMA31, "partial_rotary_factor": 0.5})

    for head_dim, theta in [(16, 1e5), (64, 1e4), (128, 1e6)]:
        factors = {
            "short_factor": longrope_factors(head_dim // 2, 1.5),
            "long_factor": longrope_factors(head_dim // 2, 64.0),
            "original_max_position_embeddings": 4096,
        }
        for seq_len in (4096, 4097):
            yield case(
                head_dim, theta, {"rope_type": "longrope", **factors}, max_position_embeddings=131072, seq_len=seq_len
            )
    halves = {"short_factor": [1.0] * 8, "long_factor": longrope_factors(8, 8.0), "partial_rotary_factor": 0.5}
    halves |= {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 1024}
    yield case(32, 1e4, halves, seq_len=8192)
    yield case(32, 1e4, halves | {"attention_factor": 1.5}, seq_len=1000)

    for head_dim, theta, part in [(16, 1e4, 0.75), (64, 5e5, 0.25), (128, 1e6, 1.0), (128, 1e6, 0.3)]:
        yield case(head_dim, theta, {"rope_type": "proportional", "partial_rotary_factor": part})


if __name__ == "__main__":
    made = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    rows = ",\n".join(json.dumps(c) for c in cases())
    text = f'{{"made_with": {json.dumps(made)},\n"cases": [\n{rows}\n]}}\n'
    json.loads(text)
    pathlib.Path(__file__).with_name("hf_rope.json").write_text(text)
