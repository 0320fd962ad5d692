"""The options of benchmarks that train on a folder of images and measure on another."""

from __future__ import annotations

import argparse


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True)
    add("--train_dir", required=True, help="a folder with one folder of images for each class")
    add("--validation_dir", required=True)
    add("--attn_implementation")
    add("--image_size", type=int)
    add("--seed", type=int, default=42)
    return parser
