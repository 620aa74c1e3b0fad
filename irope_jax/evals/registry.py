"""The union of evaluations a config may name, and their construction. A new evaluation is a row here."""

from __future__ import annotations

from collections.abc import Sequence

from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.evaluator import Evaluator
from irope_jax.evals.passkey import Passkey
from irope_jax.evals.perplexity import Perplexity
from irope_jax.evals.retrieval import Retrieval
from irope_jax.model.config import ModelConfig

EvalSpec = Passkey | Perplexity | Retrieval


def build_evaluators(specs: Sequence[EvalSpec], model: ModelConfig, tokenizer: TokenizerSpec) -> list[Evaluator]:
    """An evaluator per spec, in their order."""
    return [spec.build(model, tokenizer) for spec in specs]
