"""Rotations and temperatures in float64 numpy, written from the papers; imports nothing of what it judges."""

import math
from fractions import Fraction

import numpy as np

# 2*pi to 60 digits: reduces phases at positions where float64 products would already be rounded.
TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875021164194989")


def rope_inv_freq(head_dim, theta):
    """theta ** (-2i/d), RoFormer section 3.2.2, one float64 at a time."""
    return np.array([theta ** (-(2.0 * i) / head_dim) for i in range(head_dim // 2)], np.float64)


def phase(position, inv_freq):
    """position * inv_freq reduced to (-pi, pi], in exact rational arithmetic until the last step."""
    turns = Fraction(int(position)) * Fraction(float(inv_freq)) / TWO_PI
    turns -= math.floor(turns)
    return float((turns - 1 if turns > Fraction(1, 2) else turns) * TWO_PI)


def rope_matrix(position, inv_freq, pairing):
    """The block-diagonal rotation of equation 15 as a dense matrix; 'half' puts pair i at (i, i + d/2)."""
    pairs = len(inv_freq)
    R = np.zeros((2 * pairs, 2 * pairs))
    for i, f in enumerate(inv_freq):
        a, b = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + pairs)
        t = phase(position, f)
        R[a, a], R[a, b], R[b, a], R[b, b] = math.cos(t), -math.sin(t), math.sin(t), math.cos(t)
    return R


def rope_rotate(x, positions, inv_freq, pairing):
    """x [B, T, N, H], positions [B, T]."""
    out = np.zeros(x.shape, np.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            R = rope_matrix(positions[b, t], inv_freq, pairing)
            for n in range(x.shape[2]):
                out[b, t, n] = R @ x[b, t, n].astype(np.float64)
    return out


def llama4_temperature(position, floor_scale, attn_scale):
    """1 + attn_scale * ln(floor((position + 1) / floor_scale) + 1)."""
    return 1.0 + attn_scale * math.log(math.floor(Fraction(int(position) + 1, floor_scale)) + 1.0)


def alibi_slopes(heads):
    """ALiBi (2108.12409): 2 ** (-8h / H), h = 1 … H, when H is a power of two.

    Other counts take the slopes of the power of two below, then the first, third, … of those of twice that power.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / below) for h in range(1, below + 1)]
    between = [2.0 ** (-8.0 * h / (2 * below)) for h in range(1, 2 * below + 1, 2)]
    return np.array(slopes + between[: heads - below])


def sinusoidal(positions, width, base=10000.0):
    """Vaswani et al. 2017, section 3.5, `[T, width]`, in the paper's layout.

    Entry 2i is sin(position / base ** (2i / width)), entry 2i + 1 is the cosine of the same angle. Much code
    concatenates all sines and then all cosines instead: the same up to a fixed permutation of the entries.
    """
    out = np.zeros((len(positions), width), np.float64)
    for t, position in enumerate(positions):
        for i in range(width // 2):
            angle = phase(position, base ** (-2.0 * i / width))
            out[t, 2 * i], out[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return out


def log_n(position, train_length):
    """max(1, ln n / ln L) for the n = position + 1 keys a causal query sees (Su 2021, Qwen)."""
    return max(1.0, math.log(int(position) + 1) / math.log(train_length))


def ssmax_init(train_length):
    """The s0 for which s0 * ln n is 1 on average over n = 1 … L (2501.19399); close to 1 / (ln L - 1)."""
    return train_length / math.fsum(math.log(n) for n in range(1, train_length + 1))


def ministral(position, length, beta):
    """1 + beta * ln(1 + floor(position / L)): Llama 4's staircase whose first step rises one token later."""
    return 1.0 + beta * math.log(1 + int(position) // length)


def xpos_scale(head_dim, gamma):
    """zeta of xPos (2212.10554), one per pair: (i / (d / 2) + gamma) / (1 + gamma), slow pairs near 1."""
    return np.array([(i / (head_dim / 2.0) + gamma) / (1.0 + gamma) for i in range(head_dim // 2)])


def gaussian_attenuation(sigma, inv_freq):
    """|E exp(i P f)| for a position P ~ N(mu, sigma ** 2): its characteristic function."""
    return np.array([math.exp(-0.5 * (sigma * f) ** 2) for f in inv_freq])


def span_attenuation(width, inv_freq):
    """The average of exp(i f p) over `width` consecutive positions, seen from their centre: real, may be negative."""
    out = []
    for f in inv_freq:
        mean = sum(np.exp(1j * f * (p - (width - 1) / 2.0)) for p in range(width)) / width
        assert abs(mean.imag) < 1e-12
        out.append(mean.real)
    return np.array(out)


def _distances(length, distance):
    """`[T, S]` of `distance(i, j)` for the keys a causal query sees; -1 for those it does not."""
    out = np.full((length, length), -1, np.int64)
    for i in range(length):
        for j in range(i + 1):
            out[i, j] = distance(i, j)
    return out


def self_extend_distance(length, window, group):
    """SelfExtend (2401.01325): exact below `window`; beyond it whole groups, shifted to join at the window."""

    def distance(i, j):
        return i - j if i - j < window else i // group - j // group + window - window // group

    return _distances(length, distance)


def rerope_distance(length, window):
    """ReRoPE: no distance is larger than `window`."""
    return _distances(length, lambda i, j: min(i - j, window))


def dual_chunk_distance(length, chunk, local):
    """Dual chunk attention (2402.17463): `chunk` is the paper's s, `local` its w, and s + w = c is what was trained.

    A key stands at its place in its chunk. A query stands at its place in its own chunk for keys of that chunk; one
    chunk further for those of the chunk before, but never past the last trained position c - 1; at c - 1 for all older
    ones. The paper's example, c = 10 and s = 6, puts the queries of a chunk at [6, 7, 8, 9, 9, 9] before the chunk
    ahead of it. The released code stops at `chunk_len + local_window`, one further: its local_window is `local - 1`.
    """
    last = chunk + local - 1

    def distance(i, j):
        apart = i // chunk - j // chunk
        if apart == 0:
            return i - j
        return (min(i % chunk + chunk, last) if apart == 1 else last) - j % chunk

    return _distances(length, distance)


def p_rope_inv_freq(head_dim, theta, fraction):
    """p-RoPE (2410.06205): the fastest floor(p d / 2) pairs turn as they always do, the slow ones stand still."""
    turning = math.floor(Fraction(str(fraction)) * head_dim / 2)
    return np.array([f if i < turning else 0.0 for i, f in enumerate(rope_inv_freq(head_dim, theta))])


def prefix_inv_freq(head_dim, theta, fraction):
    """GPT-NeoX's partial rotary: the first p d entries are a small head with a whole spectrum; only its pairs."""
    return rope_inv_freq(math.floor(Fraction(str(fraction)) * head_dim), theta)
