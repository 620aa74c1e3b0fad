"""Mixtures of experts in float64 numpy, a token at a time, from the papers; imports nothing of what it judges.

Letters: n tokens, k choices of a token, E experts, D model width, F width of an expert. Narrower types
are widened first, so a tie that only their own arithmetic makes (a bias added in float32) is no tie here.
"""

import math
from fractions import Fraction

import numpy as np


def _wide(x):
    return np.asarray(x, np.float64)


def _sigmoid(t):
    """1 / (1 + exp(-t)) of one number, without overflow."""
    return 1.0 / (1.0 + math.exp(-t)) if t >= 0.0 else math.exp(t) / (1.0 + math.exp(t))


def _softmax(row):
    """exp(l) / sum exp(l); math.exp one at a time, so that equal logits have exactly equal probabilities."""
    top = max(row)
    exps = [math.exp(l - top) for l in row]
    total = math.fsum(exps)
    return [e / total for e in exps]


def route(logits_nE, top_k, kind, bias_E=None, renormalise=True):
    """The experts of each token, best first, and their scores: `(chosen_nk, score_nk)`.

    'sigmoid' is Llama 4: the largest raw logits, each scored with its sigmoid; `renormalise` has no part in it.
    'softmax' is Mixtral (2401.04088) and Qwen3-MoE (2505.09388): the largest probabilities among all E, over their own
    sum if `renormalise`. The bias (2408.15664) is added to what is ranked and never reaches a score. Of equals the
    lower index comes first.
    """
    logits_nE = _wide(logits_nE)
    n, E = logits_nE.shape
    assert 1 <= top_k <= E and kind in ("sigmoid", "softmax")
    bias = [0.0] * E if bias_E is None else _wide(bias_E).tolist()
    chosen_nk, score_nk = np.zeros((n, top_k), np.int64), np.zeros((n, top_k))
    for t in range(n):
        row = logits_nE[t].tolist()
        ranked = row if kind == "sigmoid" else _softmax(row)
        order = sorted(range(E), key=lambda e: (-(ranked[e] + bias[e]), e))[:top_k]
        scores = [_sigmoid(row[e]) if kind == "sigmoid" else ranked[e] for e in order]
        if kind == "softmax" and renormalise:
            total = math.fsum(scores)
            scores = [s / total for s in scores]
        chosen_nk[t], score_nk[t] = order, scores
    return chosen_nk, score_nk


def swiglu(x_nD, gate_DF, up_DF, down_FD):
    """(silu(x gate) * (x up)) down, silu(t) = t sigmoid(t); GLU Variants (2002.05202)."""
    x_nD, gate_DF, up_DF, down_FD = map(_wide, (x_nD, gate_DF, up_DF, down_FD))
    out = np.zeros((x_nD.shape[0], down_FD.shape[1]))
    for t, x in enumerate(x_nD):
        silu = np.array([g * _sigmoid(g) for g in (x @ gate_DF).tolist()])
        out[t] = (silu * (x @ up_DF)) @ down_FD
    return out


def mixture(x_nD, chosen_nk, score_nk, gate_EDF, up_EDF, down_EFD, weigh):
    """The sum over a token's choices of expert(score x) for 'input' (Llama 4), of score expert(x) for 'output'.

    An assignment without a place (see `kept`) is one whose score is 0: both forms then add nothing.
    """
    assert weigh in ("input", "output")
    x_nD, score_nk = _wide(x_nD), _wide(score_nk)
    out = np.zeros((x_nD.shape[0], np.shape(down_EFD)[2]))
    for t in range(x_nD.shape[0]):
        for e, score in zip(np.asarray(chosen_nk)[t], score_nk[t]):
            x = x_nD[t : t + 1]
            if weigh == "input":
                out[t] += swiglu(score * x, gate_EDF[e], up_EDF[e], down_EFD[e])[0]
            else:
                out[t] += score * swiglu(x, gate_EDF[e], up_EDF[e], down_EFD[e])[0]
    return out


def kept(chosen_nk, num_experts, capacity):
    """Which assignments of one group of n consecutive tokens find a place, `bool [n, k]`; GShard (2006.16668).

    All first choices take places in token order, then all second choices, and so on (without the paper's random
    dispatch of the second expert). Whoever finds an expert with `capacity` tokens is dropped, not sent elsewhere.
    """
    chosen_nk = np.asarray(chosen_nk)
    taken = [0] * num_experts
    out = np.zeros(chosen_nk.shape, bool)
    for choice in range(chosen_nk.shape[1]):
        for t in range(chosen_nk.shape[0]):
            e = int(chosen_nk[t, choice])
            if taken[e] < capacity:
                taken[e] += 1
                out[t, choice] = True
    return out


def load_balance(logits_nE, chosen_nk, kind):
    """E sum_e f_e P_e, without its coefficient: Switch Transformer (2101.03961).

    f_e is the share of all n k assignments that chose e, dropped or not; P_e the mean over tokens of p_e. For 'softmax'
    p is the softmax, for 'sigmoid' the sigmoids over their sum (DeepSeek-V3, 2412.19437, equations 17 to 20, here over
    the tokens given). No bias is in p. 1 when all is even.
    """
    assert kind in ("sigmoid", "softmax")
    logits_nE, chosen_nk = _wide(logits_nE), np.asarray(chosen_nk)
    n, E = logits_nE.shape
    f, P = [0.0] * E, [0.0] * E
    for e in range(E):
        f[e] = np.sum(chosen_nk == e) / chosen_nk.size
    for row in logits_nE.tolist():
        if kind == "softmax":
            p = _softmax(row)
        else:
            s = [_sigmoid(l) for l in row]
            p = [a / math.fsum(s) for a in s]
        for e in range(E):
            P[e] += p[e] / n
    return E * math.fsum(f[e] * P[e] for e in range(E))


def router_z(logits_nE):
    """The mean over tokens of logsumexp(logits) ** 2, without its coefficient: ST-MoE (2202.08906)."""
    squares = []
    for row in _wide(logits_nE).tolist():
        top = max(row)
        squares.append((top + math.log(math.fsum(math.exp(l - top) for l in row))) ** 2)
    return math.fsum(squares) / len(squares)


def moved_bias(bias_E, load_E, rate):
    """b_e + rate sign(mean load - load_e): auxiliary-loss-free balancing (2408.15664).

    The sign is taken in exact arithmetic, so an expert at exactly the mean load keeps its bias.
    """
    load = [Fraction(float(l)) for l in load_E]
    mean = sum(load) / len(load)
    return np.array([float(b) + rate * ((mean > l) - (mean < l)) for b, l in zip(bias_E, load)])


if __name__ == "__main__":  # numbers worked out on paper
    two, three = math.log(2.0), math.log(3.0)
    row = [[0.0, two, three, two]]  # probabilities 1/8, 2/8, 3/8, 2/8
    for given, chosen, score in [
        (route(row, 3, "softmax"), [2, 1, 3], [3 / 7, 2 / 7, 2 / 7]),
        (route(row, 3, "softmax", renormalise=False), [2, 1, 3], [3 / 8, 2 / 8, 2 / 8]),
        (route(row, 2, "softmax", [0.3, 0.0, 0.0, 0.0]), [0, 2], [1 / 4, 3 / 4]),
        (route(row, 2, "sigmoid", [2.0, 0.0, 0.0, 0.0]), [0, 2], [1 / 2, 3 / 4]),
    ]:
        assert given[0].tolist() == [chosen] and np.allclose(given[1], [score], rtol=1e-14)
    one = ([[three]], [[0]], [[0.5]], [[[1.0]]], [[[2.0]]], [[[5.0]]])
    assert np.allclose(mixture(*one, "output"), 0.5 * 5.0 * (0.75 * three) * (2.0 * three), rtol=1e-14)
    root = math.sqrt(3.0)  # exp(three / 2)
    assert np.allclose(mixture(*one, "input"), 5.0 * (root / (1.0 + root) * three / 2.0) * three, rtol=1e-14)
    assert kept([[0, 1], [0, 2], [1, 0]], 3, 2).tolist() == [[True, True], [True, True], [True, False]]
    assert kept([[0, 1], [0, 2], [1, 0]], 3, 1).tolist() == [[True, False], [False, True], [True, False]]
    assert math.isclose(load_balance([[three, 0.0]] * 3, [[0]] * 3, "softmax"), 2 * 3 / 4)
    assert math.isclose(load_balance([[three, 0.0]] * 3, [[0]] * 3, "sigmoid"), 2 * 3 / 5)
    assert math.isclose(router_z([[0.0, 0.0], [three, 0.0]]), (two**2 + (2.0 * two) ** 2) / 2.0)
    assert moved_bias([0.0, 0.0, 1.0], [4, 0, 2], 0.5).tolist() == [-0.5, 0.5, 1.0]
