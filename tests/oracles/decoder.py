"""A pre-norm decoder in float64 numpy, one document at a time: what its layers look at. Imports nothing it judges."""

import numpy as np

from tests.oracles.attention import sees
from tests.oracles.position import llama4_temperature, rope_inv_freq, rope_rotate


def rms(x, weight=1.0, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def attention_of_layers(params, tokens, rules):
    """Probabilities of each layer for one document, float64 `[N, T, T]`, by the parameters of a scanned decoder.

    A rule is a dict: `mask` (for `attention.sees`), `theta` (None: no rotation), `norm` (weightless, after the
    rotation), `temperature` ((floor_scale, attn_scale) or None). The period is as long as the rules.
    """
    weights = {name: np.asarray(value, np.float64) for name, value in flat(params).items()}
    x_TD, found = weights["embedding"][tokens], []
    length = len(tokens)
    depth = len(next(value for name, value in weights.items() if name.startswith("periods")))
    for repeat in range(depth):
        for i, rule in enumerate(rules):
            w = {
                name.split(".", 2)[2]: v[repeat]
                for name, v in weights.items()
                if name.startswith(f"periods.layer_{i}.")
            }
            h_TD = rms(x_TD, w["attention_norm.scale"])
            q, k, v = (np.einsum("td,dnh->tnh", h_TD, w[f"attention.{name}"]) for name in ("query", "key", "value"))
            if rule["theta"] is not None:
                places, turns = np.arange(length)[None], rope_inv_freq(q.shape[-1], rule["theta"])
                q, k = (rope_rotate(y[None], places, turns, "half")[0] for y in (q, k))
            if rule["norm"]:
                q, k = rms(q), rms(k)
            heads, shared, p = q.shape[1], q.shape[1] // k.shape[1], np.zeros((q.shape[1], length, length))
            out = np.zeros(q.shape)
            for n in range(heads):
                for t in range(length):
                    keys = [s for s in range(length) if sees(q=(t, 1, t), k=(s, 1, s), **rule["mask"])]
                    hot = llama4_temperature(t, *rule["temperature"]) if rule["temperature"] else 1.0
                    score = np.exp(hot * (k[keys, n // shared] @ q[t, n]) / np.sqrt(q.shape[-1]))
                    p[n, t, keys] = score / score.sum()
                    out[t, n] = p[n, t] @ v[:, n // shared]
            found.append(p)
            x_TD = x_TD + np.einsum("tnh,nhd->td", out, w["attention.out"])
            h_TD = rms(x_TD, w["feed_forward_norm.scale"])
            x_TD = x_TD + (silu(h_TD @ w["feed_forward.gate"]) * (h_TD @ w["feed_forward.up"])) @ w["feed_forward.down"]
    return found


def flat(tree, prefix=""):
    if not hasattr(tree, "items"):
        return {prefix[:-1]: tree}
    return {name: x for key, value in tree.items() for name, x in flat(value, f"{prefix}{key}.").items()}
