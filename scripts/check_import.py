"""Are the logits of an imported GGUF model those of transformers reading the same file?

    python scripts/fetch_assets.py smollm2
    python scripts/check_import.py --reference-python=OTHER/bin/python

The reference runs in an interpreter with torch, transformers, accelerate and gguf, which this project does not depend
on (default: this one). Compared are the logits of the first 512 tokens of *Moby-Dick*, in float32. The last line is
JSON; the gate is a largest difference of 1e-3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from irope_jax.core.types import TokenInfo
from irope_jax.data.documents import tokenized
from irope_jax.data.sources import Corpus, open_source
from irope_jax.experiment import resolve, run_config
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import load_params

ASSETS = Path(__file__).resolve().parent.parent / "assets"
GATE = 1e-3

REFERENCE = """
import sys, numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
gguf, work = Path(sys.argv[1]), Path(sys.argv[2])
tokens = np.load(work / "tokens.npy")
where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    np.save(work / "logits.npy", model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy())
ids = AutoTokenizer.from_pretrained(**where)((work / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
np.save(work / "ids.npy", np.array(ids))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ASSETS / "smollm2-135m", help="the imported run directory")
    parser.add_argument("--gguf", type=Path, default=ASSETS / "SmolLM2-135M-Instruct.Q4_1.gguf", help="its source")
    parser.add_argument("--reference-python", default=sys.executable, metavar="PATH", help="with torch, transformers")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    experiment = resolve(run_config(args.run))
    tokenizer = experiment.data.tokenizer
    tokens = tokenized(Corpus("test"), tokenizer)[0][None, 1 : args.tokens + 1]
    text = open_source(Corpus("test"))[0][:20_000]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        params, _ = load_params(args.run, experiment.model, jax.sharding.get_mesh())
        ours = jax.jit(lambda p, t: logits(experiment.model, p, t, TokenInfo.single(*t.shape)))(params, tokens)
    with tempfile.TemporaryDirectory() as work:
        np.save(Path(work) / "tokens.npy", tokens)
        (Path(work) / "text.txt").write_text(text, encoding="utf-8")
        command = [args.reference_python, "-c", REFERENCE, str(args.gguf.resolve()), work]
        subprocess.run(command, check=True)
        reference = np.load(Path(work) / "logits.npy")
        same_ids = np.array_equal(np.load(Path(work) / "ids.npy"), tokenizer.encode(text))
    worst = float(np.abs(np.asarray(ours) - reference).max())
    agree = float((np.asarray(ours).argmax(-1) == reference.argmax(-1)).mean())
    largest = np.abs(reference).max()
    print(f"largest difference {worst:.1e} of logits up to {largest:.1f}; most likely token agrees {agree:.1%}")
    print(f"token ids of {len(text):,} characters: {'the same' if same_ids else 'DIFFERENT'}")
    good = worst < GATE and same_ids
    print(json.dumps({"pass": good, "largest": worst, "gate": GATE, "argmax": agree, "same_ids": same_ids}))
    sys.exit(not good)


if __name__ == "__main__":
    main()
