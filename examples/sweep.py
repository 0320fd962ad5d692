"""Search for settings on folders of images: VTAB-1k's protocol, on Optuna (docs/sweep.md).

    python examples/sweep.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --test_dir pets/test --output_dir pets-sweep --method memory --masked \\
        --trunk_cache cache --search learning_rate=log:1e-4:1e-1 weight_decay=log:1e-3:10 memory.tokens=1,2,4,8

`--search` names settings: NAME=LOW:HIGH, NAME=log:LOW:HIGH for a logarithmic scale, or NAME=A,B,C for choices. A folder
has one folder of images for each class. The same command again goes on where it was stopped.
`memtune sweep` is the same; memtune/cli/sweeping.py has what both do: `memtune.sweep` on two folders.
"""

from __future__ import annotations

import argparse

from memtune.cli.sweeping import add_arguments, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    result = run(parser.parse_args())
    if result is not None:
        print(result)


if __name__ == "__main__":
    main()
