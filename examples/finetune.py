"""Fine-tune an adapter on a folder of images or a data set of the Hub.

    python examples/finetune.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --train_dir pets/train --validation_dir pets/test --output_dir pets-memory --method memory --tokens 4

    accelerate launch --num_processes 8 examples/finetune.py ...         # 8 GPUs
    python examples/finetune.py --cpu --num_processes 2 ...              # 2 processes without a GPU
    python examples/finetune.py ... --resume_from_checkpoint             # go on after an interruption

(`accelerate launch --cpu --num_processes 2` starts one process where MPI is not set up, so this script starts them.)

A folder has one folder of images for each class. The adapter, its card, its learning curves, `all_results.json` and
checkpoints of the run go to `--output_dir`. `memtune finetune` is the same; memtune/cli/finetuning.py has what both do:
`load_dataset`, `memtune.wrap`, `memtune.fit` and `save_pretrained`.
"""

from __future__ import annotations

import argparse
import sys

from memtune.cli.finetuning import add_arguments, describe, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    summary = run(args, ["examples/finetune.py", *sys.argv[1:]])
    if summary is not None:
        print(describe(summary, args.output_dir))


if __name__ == "__main__":
    main()
