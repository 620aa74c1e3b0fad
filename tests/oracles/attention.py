"""Attention in float64 numpy, one query at a time, with its gradient written out by hand."""

import numpy as np


def sees(kind, q, k, *, size=None, by="document", shift=0):
    """Whether a query sees a key; `q` and `k` are (position, segment, row)."""
    if q[1] != k[1] or q[1] == 0 or k[2] > q[2]:
        return False
    if kind == "global":
        return True
    if kind == "sliding":
        return q[2] - size + 1 <= k[2]
    count = 0 if by == "document" else 2
    border = ((q[count] + shift) // size) * size - shift
    return border <= k[count] < border + size


def attention(q, k, v, q_places, k_places, rule, *, scale, slopes=None, dout=None):
    """Output `[B, T, N, H]`, log-sum-exp `[B, T, N]` and, if `dout` is given, (dq, dk, dv).

    `q_places [B, T, 3]` and `k_places [B, S, 3]` hold (position, segment, row); `rule` is a dict for `sees`.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            here = tuple(q_places[b, t])
            keys = [s for s in range(k.shape[1]) if sees(q=here, k=tuple(k_places[b, s]), **rule)]
            if not keys:
                continue
            for n in range(q.shape[2]):
                head = n // group
                score = scale * (k[b, keys, head] @ q[b, t, n])
                if slopes is not None:
                    score = score - slopes[n] * (here[2] - k_places[b, keys, 2])
                lse[b, t, n] = np.logaddexp.reduce(score)
                p = np.exp(score - lse[b, t, n])
                out[b, t, n] = p @ v[b, keys, head]
                if dout is None:
                    continue
                do = np.asarray(dout[b, t, n], np.float64)
                dp = v[b, keys, head] @ do
                ds = p * (dp - p @ dp) * scale
                dq[b, t, n] += ds @ k[b, keys, head]
                dk[b, keys, head] += np.outer(ds, q[b, t, n])
                dv[b, keys, head] += np.outer(p, do)
    return (out, lse) if dout is None else (out, lse, (dq, dk, dv))
