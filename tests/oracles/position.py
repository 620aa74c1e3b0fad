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
