"""What it costs to lose nothing: tokens/s with checkpoints, journal and MLflow against without.

    python tests/benchmarks/bench_safety.py [--steps 200] [--pairs 5] [--checkpoint-interval 50]
    python tests/benchmarks/bench_safety.py --server-away

Both train the network of configs/tiny.toml on made-up tokens, in processes of their own, one after
the other in turns: bare, which only trains, and safe, which writes checkpoints beside the training
and every step to the journal, and from there to MLflow's SQLite on the courier's thread. Seconds
are those between the end of the tenth step and of the last, checkpoints included.

`--server-away` trains 60 steps against a real MLflow server, killed after step 10 and started again
after step 40, and prints the longest step beside the median.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BARE, SAFE = "bare", "safe"
WARM_UP = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--checkpoint-interval", type=int, default=50)
    parser.add_argument("--server-away", action="store_true")
    parser.add_argument("--worker", choices=[BARE, SAFE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(seconds_of(options.worker, options.steps, options.checkpoint_interval)))
        return
    if options.server_away:
        steps_with_a_server_away()
        return
    ratios = []
    for pair in range(options.pairs):
        order = (BARE, SAFE) if pair % 2 == 0 else (SAFE, BARE)
        seconds = {mode: run(mode, options) for mode in order}
        ratios.append(seconds[SAFE] / seconds[BARE])
        print(
            f"pair {pair + 1}: bare {seconds[BARE]:.2f} s, safe {seconds[SAFE]:.2f} s, "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


def run(mode, options):
    command = [sys.executable, __file__, "--worker", mode, "--steps", str(options.steps)]
    command += ["--checkpoint-interval", str(options.checkpoint_interval)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(mode, steps, checkpoint_interval):
    from token_data import token_dataset

    from gpt.config import load_config
    from gpt.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        interval = checkpoint_interval if mode == SAFE else steps
        config = load_config(
            ROOT / "configs" / "tiny.toml",
            {
                "run": {"root": folder},
                "training": {"max_steps": steps, "checkpoint_interval": interval},
                "evaluation": {"interval": steps, "tokens": 1024},
            },
        )
        dataset = token_dataset(Path(folder, "tokens"), train_tokens=200_000)
        run_folder = Path(folder, "train", "run")
        begin = end = None
        with recorder_of(mode, config, dataset, run_folder) as record_step:
            for record in train(config, dataset, run_folder):
                record_step(record)
                if record.step == WARM_UP:
                    begin = time.perf_counter()
                if record.step == steps and end is None:
                    end = time.perf_counter()
        return end - begin


def steps_with_a_server_away():
    from test_servers_away import MlflowServer
    from token_data import token_dataset

    from gpt.config import load_config
    from gpt.training.loop import train
    from tasks.tracking import ended_by_outcome, open_run, recording

    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(Path(folder, "server"))
        server.start()
        config = load_config(
            ROOT / "configs" / "tiny.toml",
            {
                "run": {"root": folder},
                "training": {"max_steps": 60, "checkpoint_interval": 60},
                "evaluation": {"interval": 60, "tokens": 1024},
                "tracking": {"uri": server.uri},
            },
        )
        dataset = token_dataset(Path(folder, "tokens"), train_tokens=200_000)
        run_folder = Path(folder, "train", "run")
        run_folder.mkdir(parents=True)
        run = open_run(config, dataset, run_folder)
        seconds, last = {}, time.perf_counter()
        with ended_by_outcome(run), recording(run) as recorder:
            for record in train(config, dataset, run.folder):
                recorder.step(record)
                if record.loss:
                    seconds[record.step] = time.perf_counter() - last
                if record.step == 10 and record.loss:
                    server.kill()
                if record.step == 40 and record.loss:
                    server.start()
                last = time.perf_counter()  # what starting a server takes is not the step's
        server.kill()
        away = [value for step, value in seconds.items() if step > WARM_UP]
        median, longest = statistics.median(away), max(away)
        print(f"median step {median:.3f} s, longest {longest:.3f} s ({longest / median:.2f} times)")


@contextlib.contextmanager
def recorder_of(mode, config, dataset, run_folder):
    if mode == BARE:
        yield lambda record: None
        return
    from tasks.tracking import open_run, recording

    run_folder.mkdir(parents=True)
    with recording(open_run(config, dataset, run_folder)) as recorder:
        yield recorder.step


if __name__ == "__main__":
    main()
