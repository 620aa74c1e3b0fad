"""Rows of a table that is cut along both its axes, looked up by tokens that are cut along both of theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from irope_jax.sharding.rules import constrain


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`table[tokens]` as `[B, T, D]` in `dtype`, laid out as the input of a layer; the table stays where it lies.

    A device has some columns of the table (`fsdp`) and some rows of the batch, along the same mesh axis. So the devices
    of an fsdp group first look up the tokens of them all in their own columns, then exchange columns for batch rows.
    Left to itself in a training step, XLA:CPU finds no way from the one layout to the other ("involuntary full
    rematerialization") and makes the whole batch on every device.
    """
    tokens_BT = constrain(tokens_BT, "group_batch", "length")
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
    x_BTD = constrain(x_BTD, "group_batch", "length", "embed")
    return constrain(x_BTD, "batch", "length", "features")
