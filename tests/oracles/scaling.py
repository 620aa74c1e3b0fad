"""RoPE scalings in float64 Python, one pair at a time, written from the papers; imports nothing of what it judges.

Every function returns inverse frequencies of the `head_dim / 2` pairs unless its name says otherwise. Where a formula
can be written in two ways, this file takes the one that thinks in wavelengths and rotations.
"""

import math

import numpy as np


def unscaled(head_dim, theta):
    """RoFormer (2104.09864) section 3.2.2."""
    return np.array([math.exp(-2.0 * i / head_dim * math.log(theta)) for i in range(head_dim // 2)])


def rotations(head_dim, theta, length):
    """How many turns each pair makes within `length` tokens: the length over the wavelength."""
    return np.array([length / (2.0 * math.pi / f) for f in unscaled(head_dim, theta)])


def linear(head_dim, theta, factor):
    """Position Interpolation (2306.15595), equation 4."""
    return np.array([f / factor for f in unscaled(head_dim, theta)])


def ntk(head_dim, theta, factor):
    """NTK-aware base change as a multiplier of each pair, factor ** (-2i / (d - 2)) (YaRN 2309.00071, appendix A.2)."""
    return np.array([f * factor ** (-2.0 * i / (head_dim - 2)) for i, f in enumerate(unscaled(head_dim, theta))])


def dynamic_ntk(head_dim, theta, factor, original_length, length):
    """The base change with the factor that `length` tokens need: f n / L - (f - 1), and 1 up to L."""
    return ntk(head_dim, theta, max(1.0, 1.0 + factor * (length - original_length) / original_length))


def dynamic_length(length, step, seq_len):
    """The length whose frequencies a document of `length` tokens gets: the next multiple of `step`, up to `seq_len`."""
    return min(seq_len, -(-length // step) * step)


def ntk_by_parts(head_dim, theta, factor, original_length, low_rotations, high_rotations):
    """YaRN (2309.00071) section 3.2: the share that is kept is linear in the number of rotations."""
    out = []
    for f, r in zip(unscaled(head_dim, theta), rotations(head_dim, theta, original_length)):
        if r < low_rotations:
            kept = 0.0
        elif r > high_rotations:
            kept = 1.0
        else:
            kept = (r - low_rotations) / (high_rotations - low_rotations)
        out.append((1.0 - kept) * f / factor + kept * f)
    return np.array(out)


def yarn_edges(head_dim, theta, original_length, beta_fast, beta_slow, truncate):
    """Pair indices, not always whole, between which YaRN's code ramps.

    Pair x turns `original_length * theta ** (-2x / d) / 2 pi` times; the edges solve that for the two betas.
    """

    def pair_that_turns(times):
        return head_dim / 2.0 * math.log(original_length / (2.0 * math.pi * times), theta)

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def yarn(head_dim, theta, factor, original_length, beta_fast=32.0, beta_slow=1.0, truncate=True):
    """YaRN as its code and every checkpoint has it: the ramp is linear in the index of the pair."""
    low, high = yarn_edges(head_dim, theta, original_length, beta_fast, beta_slow, truncate)
    if low == high:
        high += 0.001
    out = []
    for i, f in enumerate(unscaled(head_dim, theta)):
        divided = min(1.0, max(0.0, (i - low) / (high - low)))
        out.append(f * (1.0 - divided) + f / factor * divided)
    return np.array(out)


def yarn_mscale(factor, weight=1.0):
    """0.1 k ln s + 1 (equation 22, where k = 1), and 1 where nothing is stretched."""
    return 1.0 if factor <= 1.0 else 1.0 + 0.1 * weight * math.log(factor)


def yarn_attention_factor(factor, mscale=1.0, mscale_all_dim=0.0):
    """On q and on k each: the quotient of DeepSeek-V2's code."""
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)


def yarn_logit_factor(factor, mscale=1.0, mscale_all_dim=0.0):
    """On the logits in all: both attention factors and DeepSeek's softmax scale; the denominators cancel."""
    return yarn_mscale(factor, mscale) ** 2


def llama3(head_dim, theta, factor, original_length, low_freq_factor, high_freq_factor):
    """Llama 3.1: wavelengths below L / high are kept, above L / low are divided, linear in rotations between."""
    out = []
    for f in unscaled(head_dim, theta):
        wavelength = 2.0 * math.pi / f
        if wavelength < original_length / high_freq_factor:
            out.append(f)
        elif wavelength > original_length / low_freq_factor:
            out.append(f / factor)
        else:
            smooth = (original_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            out.append((1.0 - smooth) * f / factor + smooth * f)
    return np.array(out)


def longrope(head_dim, theta, factors):
    """LongRoPE (2402.13753) equation 4: a factor for each pair."""
    pairs = unscaled(head_dim, theta)
    assert len(factors) == len(pairs)
    return np.array([f / lam for f, lam in zip(pairs, factors)])


def longrope_attention_factor(factor, original_length):
    """sqrt(1 + ln s / ln L), on q and on k each."""
    return 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original_length))


def kept_between_divided(scaled, plain, factor):
    """How many pairs kept their frequency, lie between, and were divided by the whole factor."""
    kept = sum(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(scaled, plain))
    divided = sum(math.isclose(a, b / factor, rel_tol=1e-12) for a, b in zip(scaled, plain))
    return kept, len(plain) - kept - divided, divided
