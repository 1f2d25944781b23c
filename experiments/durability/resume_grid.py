"""Question: does a resumed run do, bit for bit, what the run that never stopped does?

Method: for 3 seeds and 2 precisions a run of 60 steps is kept at 6 stopping points (step 1; within
an epoch; at the end of one; at and after an evaluation). Each is resumed in a fresh model and goes
on to step 60, 40 steps or more. Weights, moments, maturity, schedule, generators,
sampler and progress are compared as one digest. Decision: 36 of 36.

    PYTHONPATH=. python experiments/durability/resume_grid.py --work /tmp/grid
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from common import arguments, digest, make_config

from dylora.training.loop import run_steps, train
from dylora.training.resume import resume
from dylora.training.run import prepare

STOPS, STEPS = (1, 4, 6, 9, 13, 20), 60


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid = {}
    for dtype in options.dtypes:
        for seed in options.seeds:
            name = f"{dtype}-{seed}"
            shutil.rmtree(options.work / name, ignore_errors=True)
            settings = {"dtype": dtype, "seed": seed, "max_steps": STEPS, "save_steps": 1}
            config = make_config(options.work, options.base, name, **settings)
            whole = train(config)
            expected = digest(whole)
            grid[name] = {
                str(stop): end_of(options.work, config, whole.folder, stop) == expected
                for stop in STOPS
            }
            print(name, grid[name], flush=True)
    same = sum(sum(row.values()) for row in grid.values())
    print(f"{same} of {len(grid) * len(STOPS)} bit-identical")
    if options.out is not None:
        options.out.write_text(json.dumps(grid, indent=2) + "\n")
    sys.exit(same != len(grid) * len(STOPS))


def end_of(work: Path, config, whole: Path, stop: int) -> str:
    """The digest at the end of the run that is resumed at `stop`."""
    folder = work / "resumed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    fresh = prepare(config, fresh=False)
    fresh = fresh._replace(
        folder=folder,
        config=make_config(
            work,
            config.model.base,
            "resumed",
            dtype=config.model.dtype,
            seed=config.train.seed,
            max_steps=STEPS,
        ),
    )
    resume(fresh, "latest")
    assert fresh.progress.step == stop
    run_steps(fresh)
    return digest(fresh)


if __name__ == "__main__":
    main()
