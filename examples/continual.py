"""Class-incremental learning: classes come in tasks, one after the other, and earlier images do not come again.

    python examples/continual.py --model_name_or_path google/vit-base-patch16-224 --data_dir cifar100 \\
        --output_dir cifar100-coda --method coda_prompts --tasks 10

The folder of images is `{train,test}/<class>/*`. The adapter and the state of the run go to `--output_dir` after each
task: the same command again goes on where it was stopped. At the end, `all_results.json` and `accuracy.png` join them.

Baselines: `--method head` trains the head alone, `--method full` the whole backbone (which cannot be resumed), and
`--method closed_form` solves the head from sums over the images: it needs no training, and forgets nothing. With
`--random_features 10000` it is RanPAC (https://arxiv.org/abs/2307.02251).
`memtune continual` is the same; memtune/cli/sequences.py has what both do.
"""

from __future__ import annotations

import argparse
import sys

from memtune.cli.sequences import add_arguments, describe, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    result = run(parser.parse_args(), ["examples/continual.py", *sys.argv[1:]])
    if result is not None:
        print(describe(result))


if __name__ == "__main__":
    main()
