"""How fast a config trains: tokens per CPU second, peak memory, and where a step's time goes.

    python scripts/bench_train.py                             # configs/bench_8m.py, 1,024 x 4 and 4,096 x 1
    python scripts/bench_train.py --peer=hf --peer-python=OTHER/bin/python
    python scripts/bench_train.py --config=configs/debug.py --lengths=64
    python scripts/bench_train.py --parts                     # by part of the step as well

Each model is a process of its own that has compiled and warmed up; they take turns, a few steps each, so that a noisy
machine is noisy for all. The first step of a turn is not counted: it finds caches and memory as the others left them.
Counted is CPU time of the process, all threads; the median over the turns is printed, and
wall time beside it. The step is the one `irope train` runs, on batches of the config's own data, which are drawn
before; what the loop does between steps is not in it. Memory is the peak of the process.

`--peer=hf` trains transformers' `LlamaForCausalLM` of the same shape in PyTorch: float32, scaled-dot-product
attention, fused AdamW, gradient clipping, the same tokens a step. It runs with `--peer-python`, which needs torch and
transformers and nothing of this project; by default with this interpreter. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOTH = ["configs/bench_8m.py:global", "configs/bench_8m.py:irope"]
BATCH_TOKENS = 4096

PEER = """
import json, resource, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape, threads = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(0)
batch, length = shape.pop("batch"), shape.pop("length")
config = LlamaConfig(**shape, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False)
model = LlamaForCausalLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
tokens = torch.randint(0, config.vocab_size, (4, batch, length))

def step(i):
    ids = tokens[i % 4]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss

for i in range(3):
    step(i).item()
parameters = sum(p.numel() for p in model.parameters())
print(json.dumps({"ready": f"torch {torch.__version__}", "parameters": parameters}), flush=True)
for line in sys.stdin:
    step(0).item()
    count, cpu, wall = int(line), time.process_time(), time.perf_counter()
    for i in range(count):
        loss = step(i)
    loss.item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": peak}), flush=True)
"""


def serve(config: str, length: int, batch: int, parts: bool) -> None:
    """What the process of a model does: a number of steps for every line it reads."""
    sys.path.insert(0, str(ROOT))
    import jax

    from irope_jax.core.allocator import keep_freed_memory
    from irope_jax.experiment import load_config, resolve
    from irope_jax.model.cost import parameter_counts, train_flops_per_token
    from irope_jax.plan.parts import seconds_by_part
    from irope_jax.sharding.mesh import make_mesh
    from irope_jax.stages import settings_of
    from irope_jax.train.feed import Feed, context_layout
    from irope_jax.train.optimizer import learning_rate, make_optimizer
    from irope_jax.train.state import init_state
    from irope_jax.train.step import make_train_step

    keep_freed_memory()  # as `irope train` does
    changes = [("data.seq_len", str(length)), ("data.batch_size", str(batch)), ("stages", "()"), ("evals", "()")]
    setting = settings_of(resolve(load_config(config), changes), jax.device_count())[0]
    model, train, mesh = setting.model, setting.train, make_mesh(setting.mesh)
    optimizer, rate = make_optimizer(train.optimizer, train.steps), learning_rate(train.optimizer, train.steps)
    feed = Feed(setting.data, context_layout(model, setting.mesh), mesh)
    batches = [next(feed) for _ in range(4)]
    feed.close()
    counts = parameter_counts(model)
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, 0)
        step = make_train_step(model, optimizer, rate, z_loss=train.z_loss, accumulate=train.accumulate)
        program = jax.jit(step, donate_argnums=0).lower(state, batches[0]).compile()
        state, scalars = program(state, batches[0])
        jax.block_until_ready(scalars)
        for batch in batches:  # until the allocator has found its places
            state, scalars = program(state, batch)
        jax.block_until_ready(scalars)
        told = {"ready": f"jax {jax.__version__}", "parameters": sum(counts.values())}
        told |= {"temporaries": program.memory_analysis().temp_size_in_bytes}
        told |= {"flops_per_token": train_flops_per_token(model, length, counts)}
        print(json.dumps(told), flush=True)

        def run(count: int) -> None:
            nonlocal state, scalars
            for i in range(count):
                state, scalars = program(state, batches[i % len(batches)])
            jax.block_until_ready(scalars)

        for line in sys.stdin:
            run(1)
            cpu, wall = time.process_time(), time.perf_counter()
            run(int(line))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": peak}
            print(json.dumps(spent), flush=True)
        if parts:
            with tempfile.TemporaryDirectory() as directory:
                with jax.profiler.trace(directory):
                    run(3)
                found = seconds_by_part(directory, program.as_text())
            print(json.dumps([[*part, seconds / 3] for part, seconds in found.items()]), flush=True)


class Arm:
    """One model at one length: its process, and what it measured."""

    def __init__(self, name: str, command: list[str], tokens: int):
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.name, self.tokens, self.cpu, self.wall, self.peak = name, tokens, [], [], 0
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.told = self._hear()

    def _hear(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with code {self.process.wait()}; its error is above")
        return json.loads(line)

    def turn(self, steps: int) -> None:
        print(steps, file=self.process.stdin, flush=True)
        spent = self._hear()
        self.cpu.append(steps * self.tokens / spent["cpu"])
        self.wall.append(steps * self.tokens / spent["wall"])
        self.peak = spent["peak"]

    def end(self, parts: bool) -> list:
        self.process.stdin.close()
        found = self._hear() if parts else []
        self.process.wait()
        return found


def peer_command(python: str, length: int, batch: int, threads: int) -> list[str]:
    """transformers' Llama of the shape of `configs/bench_8m.py:global`."""
    sys.path.insert(0, str(ROOT))
    from irope_jax.experiment import load_config, resolve

    model = resolve(load_config(BOTH[0])).model
    shape = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.pattern[0].ffn.hidden_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.output_head == "tied",
        batch=batch,
        length=length,
    )
    return [python, "-c", PEER, json.dumps(shape), str(threads)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", metavar="FILE[:ARG]", help="may repeat; default: bench_8m, both")
    parser.add_argument("--lengths", default="1024,4096", help="row lengths (default: 1024,4096)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help=f"a step (default: {BATCH_TOKENS})")
    parser.add_argument("--turns", type=int, default=7, help="turns each model takes (default: 7)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn (default: 3)")
    parser.add_argument("--peer", choices=["hf"], help="also transformers' Llama of the shape of bench_8m")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="with torch and transformers")
    parser.add_argument("--parts", action="store_true", help="also where the time of a step goes")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        config, length, batch = chosen.serve
        serve(config, int(length), int(batch), chosen.parts)
        return 0
    say = (lambda *_: None) if chosen.json else lambda text: print(text, flush=True)
    rows = []
    for length in map(int, chosen.lengths.split(",")):
        rows += measure(chosen, length, say)
    print(json.dumps(rows))
    return 0


def measure(chosen: argparse.Namespace, length: int, say) -> list[dict]:
    """All models at one length, in turns."""
    batch = max(1, chosen.batch_tokens // length)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    arms = []
    for config in chosen.config or BOTH:
        command = [sys.executable, __file__, *(["--parts"] if chosen.parts else [])]
        arms.append(Arm(Path(config).name, [*command, "--serve", config, str(length), str(batch)], batch * length))
    if chosen.peer:
        command = peer_command(chosen.peer_python, length, batch, threads)
        arms.append(Arm("transformers Llama", command, batch * length))
    for _ in range(chosen.turns):
        for arm in arms:
            arm.turn(chosen.steps)
    base = arms[-1] if chosen.peer else arms[0]
    say(f"\n{length:,} tokens x {batch}: tokens per CPU second, median of {chosen.turns} turns of {chosen.steps} steps")
    rows = []
    for arm in arms:
        median = statistics.median(arm.cpu)
        # Neighbours in a turn meet the same machine: their ratio is steadier than that of the medians.
        ratio = statistics.median(here / there for here, there in zip(arm.cpu, base.cpu))
        row = dict(model=arm.name, length=length, batch=batch, tokens_per_cpu_second=round(median, 1))
        row |= dict(tokens_per_second=round(statistics.median(arm.wall), 1), ratio=round(ratio, 3), base=base.name)
        row |= dict(peak_bytes=arm.peak, **arm.told)
        say(
            f"  {arm.name:<20} {median:>9,.0f}   {ratio:5.2f} of {base.name}   {row['tokens_per_second']:>9,.0f} a "
            f"second   peak {arm.peak / 1e9:.2f} GB   {arm.told['parameters']:,} parameters   {arm.told['ready']}"
        )
        rows.append(row)
    for arm, row in zip(arms, rows):
        parts = arm.end(chosen.parts and arm.name != "transformers Llama")
        if parts:
            total = sum(seconds for *_, seconds in parts)
            row["parts"] = {" ".join(filter(None, part)): round(seconds / total, 4) for *part, seconds in parts}
            shares = "  ".join(f"{name} {share:.0%}" for name, share in row["parts"].items() if share >= 0.005)
            say(f"  {arm.name}: {shares}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
