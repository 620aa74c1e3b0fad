"""Write `families/`: tiny random models of several families and what Hugging Face transformers computes with them.

Made with transformers 5.23.0 and torch 2.13.0 on CPU, in an environment that has them (the tests need neither):

    python tests/golden/make_hf_families.py

Each family has `config.json` and `model.safetensors` as `save_pretrained` writes them, and `golden.npz`:
`main/input_ids` [B,T] int32, `main/logits` [B,T,V] float32, `main/loss` (mean cross-entropy of the next token), and for
each parameter `grad_l2/PARAM`, the L2 norm of the gradient of the loss. PARAM is the name in `named_parameters`. Where
the file has experts one by one, those are together there: `mlp.experts.gate_up_proj` has the norm of gate and up of all
experts, `mlp.experts.down_proj` that of down, and the router is `mlp.gate.weight`.

The run ends with checks whose results are in `families/PROVENANCE.md`: the files give the same logits again, and
logits move by far more than a tolerance of 1e-3 when one feature is wrong.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = pathlib.Path(__file__).with_name("families")
LENGTH = 80
TOLERANCE = 1e-3
FULL, SLIDING = "full_attention", "sliding_attention"

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,  # large, so that it matters
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DEFAULT = BASE["rope_parameters"]

FAMILIES = {
    # Layers 0 and 1 see everything, 2 and 3 a window; tied, like the small ones.
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 24},
    "olmo2": {},
    "olmo3": {"sliding_window": 24, "rope_parameters": {FULL: YARN, SLIDING: DEFAULT}},
    "mixtral": {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
}


def build(config, attention="eager"):
    """A model of this configuration that does not choose faster but differently rounded code."""
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def configure(family, **changes):
    """The configuration of a family, with some of its arguments changed."""
    arguments = {**BASE, **FAMILIES[family], **changes}
    return AutoConfig.for_model(family, **json.loads(json.dumps(arguments)))


def randomise(model, seed):
    """Draw every parameter so that each has its say: peaked attention, norms around 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.5 * noise)
            elif "norm" in name:
                p.copy_(1 + 0.25 * noise)
            elif "embed_tokens" in name:
                p.copy_(noise * (p.shape[-1] ** -0.5 if tied else 0.5))
            else:
                gain = 1.4 if "q_proj" in name or "k_proj" in name else 2.0 if "mlp.gate.weight" in name else 1.0
                p.copy_(gain * noise * p.shape[-1] ** -0.5)


def loss_of(logits, input_ids):
    """Mean cross-entropy of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten().long())


def router_margin(model, input_ids):
    """The least distance of a chosen expert to one that is not, in router logits; rounding must not cross it."""
    if not hasattr(model.config, "num_experts_per_tok"):
        return float("inf")
    with torch.no_grad():
        routers = model(input_ids, output_router_logits=True).router_logits
    assert len(routers) == model.config.num_hidden_layers
    ranked = torch.stack(routers).sort(-1, descending=True).values
    k = model.config.num_experts_per_tok
    return (ranked[..., k - 1] - ranked[..., k]).min().item()


def draw(family, seed):
    """A model and its input, of the first seed from this one that leaves the routers no close choice."""
    model = build(configure(family))
    while True:
        randomise(model, seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        input_ids = torch.randint(0, BASE["vocab_size"], (1, LENGTH), generator=generator)
        if router_margin(model, input_ids) > 5 * TOLERANCE:
            return model, input_ids
        seed += 1


def make(family, seed):
    """Write the folder of one family; return its model and input."""
    model, input_ids = draw(family, seed)
    logits = model(input_ids, use_cache=False).logits
    loss = loss_of(logits, input_ids)
    loss.backward()
    golden = {"main/input_ids": input_ids.int().numpy(), "main/logits": logits.detach().numpy()}
    golden["main/loss"] = loss.detach().numpy()
    for name, p in model.named_parameters():
        golden[f"grad_l2/{name}"] = p.grad.norm().numpy()
        assert p.grad.norm() > 1e-4, name
    folder = FOLDER / family
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "golden.npz", **golden)
    return model, input_ids


def rows(model, change):
    """Apply `change(rows, name)` to what makes queries and keys, as [heads, head_dim, ...], of every layer."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q", "k"):
            parts = [*getattr(attention, f"{name}_proj").parameters()]
            parts += [*attention.get_submodule(f"{name}_norm").parameters()] if hasattr(attention, "q_norm") else []
            for p in parts:
                p.copy_(change(p.unflatten(0, (-1, attention.head_dim))).flatten(0, 1))


class PerHead(nn.Module):
    """A norm of the whole projection, wrongly taken of each head."""

    def __init__(self, norm, head_dim):
        super().__init__()
        self.norm, self.head_dim = norm, head_dim

    def forward(self, x):
        heads = x.unflatten(-1, (-1, self.head_dim))
        scale = torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + self.norm.variance_epsilon)
        return (heads * scale).flatten(-2) * self.norm.weight


def set_all(model, part, value):
    for name, p in model.named_parameters():
        if part in name:
            p.fill_(value)


def drop_qk_norm(model):
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()


def qk_norm_per_head(model):
    for layer in model.model.layers:
        a = layer.self_attn
        a.q_norm, a.k_norm = PerHead(a.q_norm, a.head_dim), PerHead(a.k_norm, a.head_dim)


def swap_norms(model):
    """The norms of both branches exchanged."""
    for layer in model.model.layers:
        a, b = layer.post_attention_layernorm, getattr(layer, "post_feedforward_layernorm", None)
        b = layer.input_layernorm if b is None else b
        a.weight.data, b.weight.data = b.weight.data, a.weight.data


def swap_gate_up(model):
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            p = layer.mlp.experts.gate_up_proj
            p.copy_(p.roll(p.shape[1] // 2, 1))
        else:
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def raw_weights(model):
    """Experts weighted with their probabilities as they are, not divided by their sum."""
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: (out[0], out[0].softmax(-1).gather(-1, out[2]), out[2]))


def interleave(model):
    """Pairs (2i, 2i+1) in place of (i, i + D/2)."""
    rows(model, lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1))


def wrong(family):
    """Name, changed arguments and change of the model, of each mistake that must show."""
    theta = {"rope_theta": 1e4}
    rope = {FULL: YARN | theta, SLIDING: DEFAULT | theta} if family == "olmo3" else DEFAULT | theta
    yield "rope_theta_10000", {"rope_parameters": rope}, None
    yield "pairs_interleaved", {}, interleave
    yield "eps_1e-5", {"rms_norm_eps": 1e-5}, None
    yield "norms_swapped", {}, swap_norms
    yield "norm_weights_1", {}, lambda m: set_all(m, "layernorm", 1.0)
    yield "gate_up_swapped", {}, swap_gate_up
    if "sliding_window" in FAMILIES[family]:
        yield "window_off", {"layer_types": [FULL] * 4} if family != "mistral" else {"sliding_window": None}, None
        yield "window_25", {"sliding_window": 25}, None
        yield "window_23", {"sliding_window": 23}, None
    if family == "qwen2":
        yield "window_all_layers", {"max_window_layers": 0}, None
        yield "window_other_layers", {"layer_types": [SLIDING, SLIDING, FULL, FULL]}, None
        for name in "qkv":
            yield f"no_{name}_bias", {}, lambda m, name=name: set_all(m, f"{name}_proj.bias", 0.0)
    if family in ("qwen3", "qwen3_moe", "olmo2", "olmo3"):
        yield "no_qk_norm", {}, drop_qk_norm
        yield "q_norm_weights_1", {}, lambda m: set_all(m, "q_norm", 1.0)
        yield "k_norm_weights_1", {}, lambda m: set_all(m, "k_norm", 1.0)
    if family in ("olmo2", "olmo3"):
        yield "qk_norm_per_head", {}, qk_norm_per_head
    if family == "olmo3":
        yield "yarn_nowhere", {"rope_parameters": {FULL: DEFAULT, SLIDING: DEFAULT}}, None
        yield "yarn_everywhere", {"rope_parameters": {FULL: YARN, SLIDING: YARN}}, None
        yield (
            "yarn_attention_factor_1",
            {"rope_parameters": {FULL: YARN | {"attention_factor": 1.0}, SLIDING: DEFAULT}},
            None,
        )
        yield "full_layer_first", {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]}, None
    if family in ("mixtral", "qwen3_moe"):
        yield "not_renormalised", {}, raw_weights
        yield "top_1", {"num_experts_per_tok": 1}, None
        yield (
            "experts_reordered",
            {},
            lambda m: [
                layer.mlp.experts.down_proj.copy_(layer.mlp.experts.down_proj.roll(1, 0)) for layer in m.model.layers
            ],
        )
    if family == "qwen3_moe":
        yield "norm_topk_prob_false", {"norm_topk_prob": False}, None
        yield "one_layer_dense", {"mlp_only_layers": [1]}, None


def check(family, model, input_ids):
    """Read the files again; return what each mistake does to the logits."""
    folder = FOLDER / family
    golden = torch.from_numpy(np.load(folder / "golden.npz")["main/logits"])
    with torch.no_grad():
        read = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        read.config._experts_implementation = "eager"
        again = (read(input_ids).logits - golden).abs().max().item()
        assert again < 1e-5, again
        other = build(configure(family), "sdpa")
        other.load_state_dict(model.state_dict())
        noise = (other(input_ids).logits - golden).abs().max().item()
        assert noise < 1e-4, noise
        moves = {}
        for name, changes, change in wrong(family):
            bad = build(configure(family, **changes))
            missed = bad.load_state_dict(model.state_dict(), strict=False)
            assert not missed.missing_keys or name == "one_layer_dense", missed
            if change is not None:
                change(bad)
            moves[name] = (bad(input_ids).logits - golden).abs().max().item()
            assert moves[name] > 20 * TOLERANCE, (family, name, moves[name])
    margin = router_margin(model, input_ids)
    size = sum(f.stat().st_size for f in folder.iterdir())
    facts = {"params": sum(p.numel() for p in model.parameters()), "bytes": size, "logits_std": golden.std().item()}
    facts |= {"loss": loss_of(golden, input_ids).item(), "read_again": again, "sdpa": noise}
    return facts | {"router_margin": margin, "moves": moves}


def main():
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines = [
        "# Where these come from",
        "",
        f"`python tests/golden/make_hf_families.py`, transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, CPU, float32, eager attention. Random weights, seeds in the script.",
        "",
        "`again`: logits of the files read back, `sdpa`: with another attention, both the largest difference to"
        " `main/logits`.",
        "`margin`: least distance in router logits of a chosen expert to one not chosen.",
        "Last column: largest difference of the logits with one feature wrong.",
        "",
        "| family | parameters | bytes | std of logits | loss | again | sdpa | margin | wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, family in enumerate(FAMILIES):
        model, input_ids = make(family, 10 * seed)
        facts = check(family, model, input_ids)
        moves = ", ".join(f"{name} {value:.2g}" for name, value in facts["moves"].items())
        margin = f"{facts['router_margin']:.2g}" if facts["router_margin"] < float("inf") else ""
        lines.append(
            f"| {family} | {facts['params']} | {facts['bytes']} | {facts['logits_std']:.2f} | {facts['loss']:.3f} | "
            f"{facts['read_again']:.1e} | {facts['sdpa']:.1e} | {margin} | {moves} |"
        )
        print(lines[-1])
    (FOLDER / "PROVENANCE.md").write_text("\n".join(lines) + "\n")
    print(sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main()
