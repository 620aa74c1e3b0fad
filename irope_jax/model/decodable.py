"""Which models can be read with a KV cache, and to what length: keys once kept must be those of one forward pass."""

from __future__ import annotations

from dataclasses import replace

from irope_jax.core.config import ConfigError
from irope_jax.model.config import ModelConfig
from irope_jax.model.moe import Capacity, MoE
from irope_jax.position import encoding
from irope_jax.position.absolute import Learned
from irope_jax.position.encoding import EXTENSIONS, XPos
from irope_jax.position.temperature import LogFloor


def check_decodable(model: ModelConfig) -> None:
    """Raises `ConfigError`, naming the field, if keys once kept would not be those of one forward pass."""
    for i, layer in enumerate(model.pattern):
        at = f"model.pattern.{i}"
        inner = encoding.rotation(layer.position)
        if isinstance(layer.position, EXTENSIONS):
            fix = "attends in several parts with keys turned anew for each query; decode with position 'rope'"
            raise ConfigError(f"{at}.position.kind", layer.position.kind, fix)
        if inner is not None and inner.follows_length:
            fix = "its frequencies follow the length of the document, and keys are kept as they were turned: say for "
            fix += "which length to turn them (`for_documents_of`, --document-length)"
            raise ConfigError(f"{at}.position.scaling.kind", inner.scaling.kind, fix)
        if isinstance(layer.temperature, LogFloor) and layer.temperature.by == "length":
            fix = "depends on tokens that are not there yet; use by 'position'"
            raise ConfigError(f"{at}.temperature.by", "length", fix)
        if isinstance(layer.ffn, MoE) and isinstance(layer.ffn.dispatch, Capacity):
            fix = "drops tokens by what else passes with them; decode with dispatch 'dropless'"
            raise ConfigError(f"{at}.ffn.dispatch.kind", "capacity", fix)


def follows_length(model: ModelConfig) -> bool:
    """Whether frequencies of some layer depend on the length of the document."""
    inner = [encoding.rotation(layer.position) for layer in model.pattern]
    return any(one is not None and one.follows_length for one in inner)


def for_documents_of(model: ModelConfig, length: int) -> ModelConfig:
    """The model with frequencies that follow the length of the document fixed at those of `length` tokens.

    Decoding then gives what one forward pass of a document of that length gives, however much of it was read.
    """

    def at_length(position):
        inner = encoding.rotation(position)
        if inner is None or not inner.follows_length:
            return position
        return inner.at_length(length) if inner is position else replace(position, rope=inner.at_length(length))

    return replace(model, pattern=tuple(replace(layer, position=at_length(layer.position)) for layer in model.pattern))


def check_length(model: ModelConfig, length: int) -> None:
    """Raises `ConfigError` if rows of so many tokens are beyond what the model has positions for."""
    if isinstance(model.position_embedding, Learned) and length > model.position_embedding.size:
        fix = f"{length} tokens are to be read, for which nothing was learned; use fewer"
        raise ConfigError("model.position_embedding.size", model.position_embedding.size, fix)
    for i, layer in enumerate(model.pattern):
        if isinstance(layer.position, XPos) and layer.mask.reach is None and length > layer.position.longest:
            fix = f"stays in float32 up to {layer.position.longest:,} positions; use fewer than {length:,} tokens"
            raise ConfigError(f"model.pattern.{i}.position", layer.position.kind, fix)
