"""Make the adapters of the zoo, `adapters/`: small ones for WinKawaks/vit-tiny-patch16-224.

    python examples/zoo.py train --backbone ../shared/models/vit-tiny-patch16-224 --data ../shared/data --work zoo-work
    python examples/zoo.py readme

`train` runs examples/finetune.py for each adapter that `adapters/` lacks, and puts beside it how it was made
(`training.json`), and its logits for `adapters/input.png` (`expected.json`). `readme` writes `adapters/README.md`. The
data are folders of images, `<data>/<task>/{train,test}/<class>/*`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageClassification

import memtune

BACKBONE = "WinKawaks/vit-tiny-patch16-224"
ROOT = Path(__file__).parents[1] / "adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "README.md")
EVERY = "--attn_implementation eager --mixed_precision bf16 --seed 0 --disable_tqdm --save_strategy no"
LORA_2 = """--method_config '{"lora": {"r": 2}}'"""

ZOO = {
    "gtsrb-memory-lora-masked": ("gtsrb", f"--method memory lora {LORA_2} --masked --num_train_epochs 20"),
    "gtsrb-memory": ("gtsrb", "--method memory --num_train_epochs 12"),
    "dtd10-lora-masked": ("dtd10", f"--method lora {LORA_2} --masked --num_train_epochs 10"),
    "dtd10-lora": ("dtd10", "--method lora --learning_rate 1e-3 --num_train_epochs 5"),
    "trashnet-memory-masked": ("trashnet", "--method memory --masked --num_train_epochs 20"),
    "trashnet-approximated-prompts": (
        "trashnet",
        '--method approximated_prompts --method_config \'{"approximated_prompts": {"n": 40}}\' --learning_rate 1e-3 '
        "--num_train_epochs 5",
    ),
    "pacs-cartoon-coda-prompts-masked": (
        "pacs-cartoon",
        '--method coda_prompts --method_config \'{"coda_prompts": {"pool_size": 10}}\' --weight_decay 0 --masked '
        "--num_train_epochs 10",
    ),
    "pacs-sketch-memory-lora-masked": (
        "pacs-sketch",
        f"--method memory lora {LORA_2} --masked --num_train_epochs 20",
    ),
}
"""For each adapter the folder of its data, and its options of examples/finetune.py beside `EVERY`."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    add = commands.add_parser("train", help="train what is missing").add_argument
    add("--backbone", required=True, help=f"a folder with {BACKBONE}")
    add("--data", required=True, help="a folder with the data of all tasks")
    add("--work", type=Path, required=True, help="where runs and their trunk caches go")
    add("--only", nargs="+", default=list(ZOO), choices=ZOO, help="these adapters alone")
    commands.add_parser("readme", help="write adapters/README.md")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Train the adapters that are missing, and note how."""
    ROOT.mkdir(exist_ok=True)
    draw_input()
    for name in args.only:
        if (ROOT / name / "training.json").exists():
            continue
        task, options = ZOO[name]
        data = f"--train_dir {args.data}/{task}/train --validation_dir {args.data}/{task}/test"
        model = f"--model_name_or_path {args.backbone} --base_model_name {BACKBONE}"
        command = f"examples/finetune.py {model} {data} {options} {EVERY}"
        cache = f" --trunk_cache {args.work / 'cache'}" if "--masked" in options else ""
        output = args.work / name
        words = shlex.split(f"{command}{cache} --output_dir {output}")
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT.parent)
        results = json.loads((output / "all_results.json").read_text())
        keep(
            output, ROOT / name, f"python {command}{' --trunk_cache CACHE' * bool(cache)} --output_dir {name}", results
        )
        write_expected(ROOT / name, args.backbone)


def keep(output: Path, folder: Path, command: str, results: dict[str, Any]) -> None:
    """Copy an adapter into the zoo, with how it was made."""
    folder.mkdir(exist_ok=True)
    for file in FILES:
        shutil.copy(output / file, folder / file)
    kept = {name: results[name] for name in ("train_samples", "eval_samples", "train_runtime", "torch")}
    training = {"command": command, "seed": 0, "eval_accuracy": results["eval_accuracy"], **kept}
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")


def draw_input() -> None:
    """A picture of our own, to compare logits for."""
    image = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 120, 224, 224), fill=(90, 140, 70))
    draw.ellipse((60, 30, 164, 134), fill=(200, 30, 40), outline="white", width=10)
    draw.rectangle((104, 134, 120, 210), fill=(120, 120, 130))
    image.save(ROOT / "input.png", optimize=True)


@torch.no_grad()
def logits_of(model: memtune.TunedModel) -> list[float]:
    """What a model says of the picture."""
    with Image.open(ROOT / "input.png") as image:
        pixel_values = model.processor(image.convert("RGB"), return_tensors="pt").pixel_values
    return model(pixel_values).logits[0].tolist()


def write_expected(folder: Path, backbone: str) -> None:
    model = memtune.load(folder, AutoModelForImageClassification.from_pretrained(backbone))
    (folder / "expected.json").write_text(json.dumps({"logits": [round(each, 5) for each in logits_of(model)]}) + "\n")


def readme() -> str:
    """The table of all adapters in the zoo, from their files."""
    rows = []
    for folder in sorted(path.parent for path in ROOT.glob("*/training.json")):
        config, training = (
            json.loads((folder / name).read_text()) for name in ("adapter_config.json", "training.json")
        )
        methods = " + ".join(method["method"] for method in config["methods"])
        size = (folder / "adapter_model.safetensors").stat().st_size
        mode = "masked" if config["masked"] else "unmasked"
        task, _ = ZOO[folder.name]
        rows.append(
            f"| [{folder.name}]({folder.name}) | {task} | {methods} | {mode} | {len(config['labels'])} | "
            f"{size / 1000:.0f} kB | {100 * training['eval_accuracy']:.1f} % of {training['eval_samples']} |"
        )
    commands = [json.loads(path.read_text())["command"] for path in sorted(ROOT.glob("*/training.json"))]
    return _README.format(rows="\n".join(rows), commands="\n\n".join(f"    {command}" for command in commands))


_README = f"""# Adapters for {BACKBONE}

<!-- made by `python examples/zoo.py readme` -->

Small adapters to try, to combine, and to test with. They were trained on a few hundred images each (`training.json` in
each folder says how), and are for nothing that matters.

| adapter | data | methods | mode | classes | size | accuracy on test images |
| --- | --- | --- | --- | ---: | ---: | ---: |
{{rows}}

```python
import memtune
from transformers import AutoModelForImageClassification

backbone = AutoModelForImageClassification.from_pretrained("{BACKBONE}")
names = ["gtsrb-memory-lora-masked", "dtd10-lora-masked", "pacs-sketch-memory-lora-masked"]
model = memtune.combine(backbone, {{{{name: f"adapters/{{{{name}}}}" for name in names}}}})  # one pass for all three
```

Data: gtsrb, the German Traffic Sign Recognition Benchmark, 43 signs; dtd10, ten of the Describable Textures Dataset's;
trashnet, kinds of rubbish; pacs-cartoon and pacs-sketch, two of the domains of PACS. All at 224 pixels.

The commands, each with one seed, at commit 75be54f; the last epoch's values are kept:

{{commands}}
"""


def main() -> None:
    args = parse_arguments()
    if args.command == "train":
        train(args)
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
