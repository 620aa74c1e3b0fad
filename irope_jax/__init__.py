"""Long-context language models in JAX: interleaved RoPE/NoPE attention (iRoPE) and its rivals, as data.

Rooms, lowest first (a module imports strictly lower rooms, `tests/test_layering.py` checks it): `core`; `position`,
`sharding`, `losses`; `attention`, `data`; `context`; `model`; `checkpoint`; `evals`; `train`; `plan`; `experiment`,
`run`, `cli`. `study` reads run directories and imports nothing but `core`.
"""

__version__ = "0.1.0"
