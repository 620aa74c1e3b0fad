"""What is known of accelerators from their data sheets, by the name that jax gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One jax device.

    Attributes:
      bf16_flops: dense bfloat16 products and sums a second at most.
      source: where the number is from.
    """

    bf16_flops: float
    source: str


CHIPS = {
    "TPU v4": Chip(275e12, "cloud.google.com/tpu/docs/v4"),
    "TPU v5 lite": Chip(197e12, "cloud.google.com/tpu/docs/v5e"),
    "TPU v5": Chip(459e12, "cloud.google.com/tpu/docs/v5p"),
    "TPU v6 lite": Chip(918e12, "cloud.google.com/tpu/docs/v6e"),
    "TPU7x": Chip(2307e12 / 2, "cloud.google.com/tpu/docs/tpu7x; a chip is two jax devices"),
    "NVIDIA A100": Chip(312e12, "NVIDIA A100 data sheet"),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, "NVIDIA H100 data sheet, SXM"),
    "NVIDIA H200": Chip(989.4e12, "NVIDIA H200 data sheet, SXM"),
    "NVIDIA B200": Chip(2250e12, "NVIDIA HGX B200 data sheet, dense"),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so, or whose name begins so; None where nothing is known."""
    if device_kind in CHIPS:
        return CHIPS[device_kind]
    # TPUs are told apart by what follows the name; boards of a GPU are not.
    found = [name for name in CHIPS if name.startswith("NVIDIA") and device_kind.startswith(name)]
    return CHIPS[max(found, key=len)] if found else None
