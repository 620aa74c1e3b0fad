"""What the backward pass finds again of the forward pass: recomputed, saved on the device, or moved to the host.

Belongs here: the names that tensors of a layer carry, the config value that sorts them, and the policy jax gets. Where
a name is given, the tensor is made (`named` at its place); what a choice costs is `kept.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jax.ad_checkpoint import checkpoint_name

from irope_jax.core.config import ConfigError, Text, nearest

NAMES = {
    "layer_input": "the residual stream as it enters a layer, B T D",
    "attention_input": "what attention reads, after its norm, B T D",
    "query": "queries before rotation, B T N H",
    "key": "keys before rotation, B T K H",
    "value": "values, B T K H",
    "attention_out": "what attention gave, before the projection back, B T N H; not with `reference` and cuDNN",
    "attention_lse": "its log-sum-exp, float32, B T N; without it attention is computed again",
    "after_attention": "the residual stream between attention and feed-forward, B T D; not in parallel blocks",
    "feed_forward_input": "what the feed-forward part reads, after its norm, B T D",
    "gate": "the product with `gate` of a SwiGLU, B T F; not of one that goes chunk by chunk",
    "up": "that with `up`",
    "router_logits": "float32, B T E",
    "expert_rows": "tokens in order of their experts, D wide, as often as they chose one",
    "expert_gate": "their products with `gate`, F wide",
    "expert_up": "those with `up`",
    "expert_out": "what experts gave, in their order, D wide",
}
"""Every name and what carries it. A choice about a tensor that a model does not have does nothing; `irope show` says
what is kept."""


@dataclass(frozen=True)
class Remat:
    """Keep these tensors of each layer for its backward pass; what is not named is computed again from them.

    A layer's input is always kept, as nothing could be computed again without it: on the device, or on the host if
    `offload` names it. Saving the products before an elementwise step (`query`, `gate`) makes all after it cheap.

    Attributes:
      save: names that stay on the device.
      offload: names that go to pinned memory of the host, layer by layer, and come back for the backward pass.
    """

    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    kind: ClassVar[str] = "names"

    def __post_init__(self):
        for field in ("save", "offload"):
            for name in getattr(self, field):
                if name not in NAMES:
                    raise ConfigError(field, name, f"no tensor of a layer has this name; {nearest(name, NAMES)}")
        if both := sorted(set(self.save) & set(self.offload)):
            raise ConfigError("offload", both[0], "is also in `save`; leave it in one of them")


ATTENTION = ("attention_out", "attention_lse")

PRESETS: dict[str, Remat | None] = {
    "none": None,
    "full": Remat(),
    "attention": Remat(save=ATTENTION),
    "dots": None,
    "offload": Remat(offload=("layer_input", *ATTENTION)),
    "offload_inputs": Remat(offload=("layer_input",)),
}
"""Words for common choices. `none` and `dots` are not lists of names."""


def check(remat: Remat | str) -> None:
    """Raises:
    ConfigError: a word that is no preset.
    """
    if isinstance(remat, str) and remat not in PRESETS:
        fix = f"{nearest(remat, PRESETS)} Or give names: dict(kind='names', save=(…), offload=(…))"
        raise ConfigError("remat", Text(remat), f"unknown choice; {fix}")


def policy(remat: Remat | str) -> Callable[..., Any] | None:
    """What `jax.checkpoint` is told; None if nothing is checkpointed."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return None
    if remat == "dots":
        return policies.dots_with_no_batch_dims_saveable
    names = PRESETS[remat] if isinstance(remat, str) else remat
    if not names.offload:
        return policies.save_only_these_names(*names.save)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(names.save),
        names_which_can_be_offloaded=list(names.offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


def named(x: jax.Array, name: str) -> jax.Array:
    """`x`, which a `Remat` can then speak of."""
    assert name in NAMES, name
    return checkpoint_name(x, name)
