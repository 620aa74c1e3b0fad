"""The union of evaluations a config may name, and their construction. A new evaluation is a row here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.evals.answering import Answering
from irope_jax.evals.attention_reach import AttentionReach
from irope_jax.evals.cost import Cost
from irope_jax.evals.cropped_perplexity import CroppedPerplexity
from irope_jax.evals.evaluator import Evaluator
from irope_jax.evals.long_perplexity import LongPerplexity
from irope_jax.evals.multiple_choice import MultipleChoice
from irope_jax.evals.passkey import Passkey
from irope_jax.evals.perplexity import Perplexity
from irope_jax.evals.retrieval import Retrieval
from irope_jax.evals.sliding_perplexity import SlidingPerplexity
from irope_jax.evals.text_tasks import TextTasks
from irope_jax.model.config import ModelConfig

EvalSpec = (
    AttentionReach
    | Cost
    | CroppedPerplexity
    | LongPerplexity
    | MultipleChoice
    | Passkey
    | Perplexity
    | Retrieval
    | SlidingPerplexity
    | TextTasks
)


def build_evaluators(
    specs: Sequence[EvalSpec],
    model: ModelConfig,
    tokenizer: TokenizerSpec,
    *,
    answering: Answering | None = None,
    directory: Path | None = None,
) -> list[Evaluator]:
    """An evaluator per spec, in their order.

    Args:
      specs: what to measure.
      model, tokenizer: of what.
      answering: how text is generated where an evaluation needs it; None leaves it to the spec.
      directory: where evaluations that may be cut short keep what they have finished; None keeps nothing.
    """

    def build(spec: EvalSpec) -> Evaluator:
        own = None if directory is None else directory / spec.name
        match spec:
            case TextTasks():
                return spec.build(model, tokenizer, answering, own)
            case Retrieval():
                return spec.build(model, tokenizer, own)
            case _:
                return spec.build(model, tokenizer)

    return list(map(build, specs))
