"""Documents to batches, on the host: tokenizers, sources, synthetic tasks, packing, and the resumable pipeline.

Everything here is numpy; the only struct of the device world is `core.types.Batch`, filled with numpy arrays. What a
model does with a batch, and how a batch is laid out over devices, belongs to other rooms.
"""
