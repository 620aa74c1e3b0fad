"""What is known of accelerators from their data sheets, by the name that jax gives them."""

from __future__ import annotations

from dataclasses import dataclass

ASSUMED_HOST = 16e9
"""Of TPUs it is not published: PCIe 3 x16."""


@dataclass(frozen=True)
class Chip:
    """One jax device.

    Attributes:
      bf16_flops: dense bfloat16 products and sums a second at most.
      source: where the numbers are from.
      memory: bytes beside the chip.
      bandwidth: bytes a second between them.
      link: bytes a second that one link sends.
      links: links that a collective of one mesh axis uses at a time: both directions of a ring of a TPU's torus; all of
        a GPU's are one, since a switch joins them.
      host: bytes a second to the host's memory, each way.
    """

    bf16_flops: float
    source: str
    memory: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    links: int = 2
    host: float = ASSUMED_HOST


CHIPS = {
    "TPU v4": Chip(275e12, "cloud.google.com/tpu/docs/v4; 2400 Gb/s over 6 links", 32e9, 1228e9, 50e9),
    "TPU v5 lite": Chip(197e12, "cloud.google.com/tpu/docs/v5e; 1600 Gb/s over 4 links", 16e9, 819e9, 50e9),
    "TPU v5": Chip(459e12, "cloud.google.com/tpu/docs/v5p; 4800 Gb/s over 6 links", 95e9, 2765e9, 100e9),
    "TPU v6 lite": Chip(918e12, "cloud.google.com/tpu/docs/v6e; 3584 Gb/s over 4 links", 32e9, 1640e9, 112e9),
    "TPU7x": Chip(
        2307e12 / 2, "cloud.google.com/tpu/docs/tpu7x; a chip is two jax devices; 9600 Gb/s over 6 links",
        192e9 / 2, 7380e9 / 2, 200e9 / 2,
    ),
    "NVIDIA A100": Chip(
        312e12, "NVIDIA A100 data sheet, 80 GB SXM; NVLink 600, PCIe 64 GB/s both ways", 80e9, 2039e9, 300e9, 1, 32e9
    ),
    "NVIDIA H100 80GB HBM3": Chip(
        989.4e12, "NVIDIA H100 data sheet, SXM; NVLink 900, PCIe 128 GB/s both ways", 80e9, 3350e9, 450e9, 1, 64e9
    ),
    "NVIDIA H200": Chip(
        989.4e12, "NVIDIA H200 data sheet, SXM; NVLink 900, PCIe 128 GB/s both ways", 141e9, 4800e9, 450e9, 1, 64e9
    ),
    "NVIDIA B200": Chip(
        2250e12, "NVIDIA HGX B200 data sheet, dense; NVLink 1.8 TB/s, PCIe 128 GB/s both ways", 180e9, 7700e9, 900e9, 1,
        64e9,
    ),
}  # fmt: skip

TARGETS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "a100": "NVIDIA A100",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
"""How people call them, as in `v5p:4x4x4`."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so, or whose name begins so; None where nothing is known."""
    if device_kind in CHIPS:
        return CHIPS[device_kind]
    # TPUs are told apart by what follows the name; boards of a GPU are not.
    found = [name for name in CHIPS if name.startswith("NVIDIA") and device_kind.startswith(name)]
    return CHIPS[max(found, key=len)] if found else None
