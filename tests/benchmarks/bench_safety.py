"""Measure the cost of fault tolerance: checkpoints, journal and MLflow against bare training.

    python tests/benchmarks/bench_safety.py [--blocks 8] [--checkpoint-interval 50]
    python tests/benchmarks/bench_safety.py --server-away

Two small networks train on generated tokens in one process, in alternating blocks of `BLOCK` steps:
"bare" only trains; "safe" also writes checkpoints in the background and every step to the journal
and, through the sync thread, to MLflow on SQLite. The speed of a shared machine changes by half
within minutes, so only adjacent blocks are compared: one ratio per four blocks (bare, safe, safe,
bare). Steps are short, so the overhead weighs more than in a real run.

`--server-away` trains 60 steps with a real MLflow server that is killed after step 10 and started
again after step 40, and prints the longest step and the median.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from flows.runtime.environment import COMPUTE  # noqa: E402

os.environ |= COMPUTE  # the workflow's settings, before torch is imported

BARE, SAFE = "bare", "safe"
WARM_UP = 25
"""Not half of a block, so that checkpoints fall inside a block."""
BLOCK = 50
KILLED_AFTER, STARTED_AFTER = 10, 40
SMALL = {
    "model": {"n_layer": 2, "n_embd": 64},
    "training": {"batch_size": 4, "grad_acc": 1, "compile": False, "log_interval": 1_000},
    "evaluation": {"tokens": 1024},
}
"""Overrides of configs/tiny.toml."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each, an even number")
    parser.add_argument("--checkpoint-interval", type=int, default=50)
    parser.add_argument("--server-away", action="store_true")
    parser.add_argument("--threads", type=int, help="threads of torch (default: one per core)")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    if options.server_away:
        steps_with_a_server_away()
    else:
        compare_paces(options.blocks, options.checkpoint_interval)


def compare_paces(blocks, checkpoint_interval):
    steps = WARM_UP + blocks * BLOCK
    seconds = {BARE: [], SAFE: []}
    with contextlib.ExitStack() as stack:
        training = {
            mode: stack.enter_context(stepping(mode, steps, checkpoint_interval))
            for mode in (BARE, SAFE)
        }
        for mode in (BARE, SAFE):
            take(training[mode], WARM_UP)
        order = itertools.islice(itertools.cycle((BARE, SAFE, SAFE, BARE)), 2 * blocks)
        for mode in order:
            begin = time.perf_counter()
            take(training[mode], BLOCK)
            seconds[mode].append(time.perf_counter() - begin)
            print(f"{mode} {seconds[mode][-1]:.2f} s for {BLOCK} steps", flush=True)
    ratios = [
        sum(seconds[SAFE][i : i + 2]) / sum(seconds[BARE][i : i + 2]) for i in range(0, blocks, 2)
    ]
    print("ratios of four turns:", ", ".join(f"{ratio:.3f}" for ratio in ratios))
    print(f"median {statistics.median(ratios):.3f}, whole {total(seconds):.3f}")


def total(seconds):
    return sum(seconds[SAFE]) / sum(seconds[BARE])


def take(steps, count):
    for _ in itertools.islice(steps, count):
        pass


@contextlib.contextmanager
def stepping(mode, steps, checkpoint_interval):
    """Return an iterator that trains one step per call."""
    from training_data import make_token_dataset

    from gpt.config.loading import load_config, merge_overrides
    from gpt.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        interval = checkpoint_interval if mode == SAFE else steps
        config = load_config(
            ROOT / "configs" / "tiny.toml",
            merge_overrides(
                SMALL,
                {
                    "run": {"root": folder},
                    "training": {"max_steps": steps, "checkpoint_interval": interval},
                    "evaluation": {"interval": steps},
                },
            ),
        )
        dataset = make_token_dataset(Path(folder, "tokens"), train_tokens=200_000)
        run_folder = Path(folder, "train", "run")
        with recorder_of(mode, config, dataset, run_folder) as record_step:

            def train_safely():
                for record in train(config, dataset, run_folder):
                    record_step(record)
                    if record.loss:
                        yield

            steps_taken = train_safely()
            yield steps_taken
            steps_taken.close()


def steps_with_a_server_away():
    from servers import MlflowServer
    from training_data import make_token_dataset

    from gpt.config.loading import load_config, merge_overrides
    from gpt.training.loop import train
    from tasks.tracking.runs import open_recorder, open_run, track_run_status

    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(Path(folder, "server"))
        server.start()
        config = load_config(
            ROOT / "configs" / "tiny.toml",
            merge_overrides(
                SMALL,
                {
                    "run": {"root": folder},
                    "training": {"max_steps": 60, "checkpoint_interval": 60},
                    "evaluation": {"interval": 60},
                    "tracking": {"uri": server.uri},
                },
            ),
        )
        dataset = make_token_dataset(Path(folder, "tokens"), train_tokens=200_000)
        run_folder = Path(folder, "train", "run")
        run_folder.mkdir(parents=True)
        run = open_run(config, dataset, run_folder)
        seconds, last = {}, time.perf_counter()
        with track_run_status(run), open_recorder(run) as recorder:
            for record in train(config, dataset, run.folder):
                recorder.log_step(record)
                if record.loss:
                    seconds[record.step] = time.perf_counter() - last
                if record.step == KILLED_AFTER and record.loss:
                    server.kill()
                if record.step == STARTED_AFTER and record.loss:
                    server.start()
                last = time.perf_counter()  # excludes the start of the server
        server.kill()
        counted = {step: value for step, value in seconds.items() if step >= KILLED_AFTER}
        median = statistics.median(counted.values())
        step, longest = max(counted.items(), key=lambda item: item[1])
        print(
            f"median step {median:.3f} s, longest {longest:.3f} s ({longest / median:.2f} times), "
            f"step {step}"
        )


@contextlib.contextmanager
def recorder_of(mode, config, dataset, run_folder):
    if mode == BARE:
        yield lambda record: None
        return
    from tasks.tracking.runs import open_recorder, open_run

    run_folder.mkdir(parents=True)
    with open_recorder(open_run(config, dataset, run_folder)) as recorder:
        yield recorder.log_step


if __name__ == "__main__":
    main()
