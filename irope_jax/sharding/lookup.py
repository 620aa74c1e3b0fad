"""Rows of a table that is cut along both its axes, looked up by tokens that are cut along both of theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from irope_jax.sharding.rules import constrain


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, cut: str = "embed") -> jax.Array:
    """`table[tokens]` as `[B, T, D]` in `dtype`, laid out as the input of a layer; the table stays where it lies.

    A device has some columns of the table (fsdp, context) and some tokens of the batch, along the same mesh axes. So
    the devices of such a group first look up the tokens of them all in their own columns, then exchange columns for
    places along `context`, then for batch rows along `fsdp`: in one step the TPU compiler gathers everything instead.
    Left to itself in a training step, XLA:CPU finds no way from the one layout to the other ("involuntary full
    rematerialization") and makes the whole batch on every device.

    `cut` is the logical axis of the columns: `group_embed` for decoding, where all devices of `context` have them all.
    """
    length = None if cut == "embed" else "length"
    tokens_BT = constrain(tokens_BT, "group_batch", length)
    if tokens_BT.size == 1:  # of a single row XLA makes a slice, and gathers the table for it
        x_BTD = jnp.take(table_VD, jnp.tile(tokens_BT, (1, 2)), axis=0)[:, :1].astype(dtype)
    else:
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
    x_BTD = constrain(x_BTD, "group_batch", length, cut)
    x_BTD = constrain(x_BTD, "group_batch", "length", "group_embed")
    return constrain(x_BTD, "batch", "length", "features")
