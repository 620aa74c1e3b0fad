"""What lm-evaluation-harness asks, answered by a small model; a stand-in for its base class, which is not needed."""

import importlib
import sys
import types
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state
from tests import tiny

TOKENIZER = ByteTokenizer()
MAX_LENGTH = 24


class TemplateLM:
    """As that library's: cuts a request into tokens of the context and tokens to score."""

    def loglikelihood(self, requests, disable_tqdm=False):
        rows = []
        for context, wanted in (request.args for request in requests):
            whole = self.tok_encode(context + wanted)
            begin = len(self.tok_encode(context))
            rows.append(((context, wanted), whole[:begin] or [self.prefix_token_id], whole[begin:]))
        return self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)


def windows(token_list, prefix_token, max_seq_len, context_len):
    for at in range(0, len(token_list), max_seq_len):
        piece = token_list[at : at + max_seq_len]
        yield [prefix_token if at == 0 else token_list[at - 1], *piece[:-1]], piece


@pytest.fixture(scope="module")
def asked():
    stand_in = {
        "lm_eval": types.ModuleType("lm_eval"),
        "lm_eval.api": types.ModuleType("lm_eval.api"),
        "lm_eval.api.model": SimpleNamespace(TemplateLM=TemplateLM),
        "lm_eval.utils": SimpleNamespace(
            get_rolling_token_windows=windows, make_disjoint_window=lambda pair: (pair[0][:1], pair[1])
        ),
    }
    before = {name: sys.modules.get(name) for name in stand_in}
    sys.modules.update(stand_in)
    harness = importlib.import_module("irope_jax.evals.harness")
    experiment = tiny.experiment(("model.init_std", "0.5"))
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    params = init_state(experiment.model, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params
    params = jax.device_get(params)
    yield harness.HarnessModel(experiment.model, params, TOKENIZER, max_length=MAX_LENGTH, cache="float32"), experiment
    sys.modules.pop("irope_jax.evals.harness")
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def by_hand(model, ids):
    """Log-probabilities `[T, V]` of what follows each token."""
    config, params = model[1].model, model[0]._params
    tokens = np.asarray([ids], np.int32)
    return np.asarray(jax.nn.log_softmax(logits(config, params, tokens, TokenInfo.single(1, len(ids)))))[0]


def request(*args):
    return SimpleNamespace(args=args)


def test_a_continuation_is_worth_the_sum_of_its_tokens(asked):
    pairs = [("abc", "de"), ("", "xyz"), ("a longer context than the model can read at once", "!?")]
    for (context, wanted), (value, greedy) in zip(pairs, asked[0].loglikelihood([request(*p) for p in pairs])):
        ids = TOKENIZER.encode(context).tolist() or [TOKENIZER.bos_id]
        ids += TOKENIZER.encode(wanted).tolist()
        ids = ids[-(MAX_LENGTH + 1) :]
        table, count = by_hand(asked, ids[:-1]), len(wanted)
        rows, want = table[-count:], ids[-count:]
        assert value == pytest.approx(sum(row[token] for row, token in zip(rows, want)), rel=1e-5)
        assert greedy == all(row.argmax() == token for row, token in zip(rows, want))


def test_what_greedy_decoding_says_is_greedy(asked):
    ids = TOKENIZER.encode("abc").tolist()
    best = int(by_hand(asked, ids)[-1].argmax())
    ((_, greedy),) = asked[0]._loglikelihood_tokens([(None, ids, [best])])
    assert greedy


def test_a_whole_text_is_the_sum_of_its_windows(asked):
    text = "".join(chr(97 + i % 26) for i in range(2 * MAX_LENGTH + 5))
    ids = TOKENIZER.encode(text).tolist()
    total = 0.0
    for at in range(0, len(ids), MAX_LENGTH):
        piece = ids[at : at + MAX_LENGTH]
        context = [TOKENIZER.bos_id if at == 0 else ids[at - 1]]
        table = by_hand(asked, context + piece[:-1])
        total += sum(table[i, token] for i, token in enumerate(piece))
    assert asked[0].loglikelihood_rolling([request(text)]) == [pytest.approx(total, rel=1e-5)]


def test_text_is_written_up_to_a_stop_string(asked):
    ids, whole = TOKENIZER.encode("abcd").tolist(), []
    for _ in range(6):
        whole.append(int(by_hand(asked, ids + whole)[-1].argmax()))
    said = TOKENIZER.decode(np.asarray(whole, np.int32))
    how = {"until": ["\x00never"], "max_gen_toks": 6, "do_sample": False}
    free, other = asked[0].generate_until([request("abcd", how), request("zz", how)])
    assert free == said and isinstance(other, str)
    stop = said[1:2] or said[:1]
    if stop:
        assert asked[0].generate_until([request("abcd", how | {"until": stop})]) == [said[: said.find(stop)]]


def test_more_new_tokens_than_the_model_reads_are_refused(asked):
    with pytest.raises(ConfigError, match=r"max_length=24.*no room"):
        asked[0].generate_until([request("a", {"max_gen_toks": 24})])
    with pytest.raises(ConfigError, match=r"max_length=24.*raise"):
        asked[0]._loglikelihood_tokens([(None, [1], [1] * 25)])
