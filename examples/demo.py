"""A page on which all tasks answer an image from one pass, with where each of them looks.

    pip install gradio matplotlib
    make quickstart && python examples/demo.py    # the quickstart's two tasks, without network
    python examples/demo.py both --backbone google/vit-base-patch16-224-in21k    # a folder of `memtune combine`
    python examples/demo.py me/eight-tasks        # the same from the Hub; the backbone is the recorded one

The page shows each task's best labels, the untouched backbone's own answer, the attention of each task's token, and how
long one pass takes beside a pass for each task. As a Space on the Hub: see examples/space/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification

import memtune

QUICKSTART = "quickstart-output"
BACKBONE = Path(__file__).parent / "assets" / "backbone"
"""That of the quickstart."""

BEST = 3
"""Labels that are shown of each task."""


class Page:
    """What the page shows of an image.

    Args:
        model: The model of many tasks.
    """

    def __init__(self, model: memtune.MultiTaskModel) -> None:
        self._model = model
        self.tasks = [name for name, labels in model.tasks.items() if labels]

    def show(self, image: Image.Image | None) -> list[Any]:
        """The scores of each task's best labels, those of the backbone, the pictures, and the times.

        Args:
            image: The image; None when it has been taken away.
        """
        if image is None:
            return [*[None] * (len(self.tasks) + 2), ""]
        answers = self._model.predict(image, tasks=self.tasks, top_k=BEST)
        scores = [{each["label"]: each["score"] for each in answers[name]} for name in self.tasks]
        processor = self._model.shared_processor()
        pixel_values = processor(image.convert("RGB"), return_tensors="pt").pixel_values
        pixel_values = pixel_values.to(self._model.device, self._model.dtype)
        return [*scores, self._base(pixel_values), self._looks(image), self._times(pixel_values)]

    @torch.no_grad()
    def _base(self, pixel_values: Tensor) -> dict[str, float] | None:
        """The backbone's own best labels, if it has a head."""
        output, names = self._model(pixel_values, tasks=[]).base, self._model.backbone.config.id2label
        if getattr(output, "logits", None) is None:
            return None
        best = output.logits[0].softmax(dim=-1).topk(min(BEST, len(names)))
        return {names[int(place)]: float(score) for score, place in zip(*best, strict=True)}

    def _looks(self, image: Image.Image) -> list[tuple[Image.Image, str]]:
        """The image under the attention of each task's token, where the head reads one."""
        found = []
        for name in self.tasks:
            try:
                found.append((memtune.explain(self._model, image, task=name).overlay(), name))
            except memtune.MemtuneError:  # of a head that reads no token
                continue
        return found

    @torch.no_grad()
    def _times(self, pixel_values: Tensor) -> str:
        def apart() -> None:
            self._model.backbone(pixel_values)
            for name in self.tasks:
                self._model(pixel_values, tasks=[name])

        one = milliseconds(lambda: self._model(pixel_values, tasks=self.tasks))
        return (
            f"All {len(self.tasks)} tasks and the backbone's own answer from **one pass: {one:.0f} ms**. "
            f"A pass for each: {milliseconds(apart):.0f} ms."
        )


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def create_page(model: memtune.MultiTaskModel, examples: list[str] | None = None) -> gradio.Blocks:
    """The page for a model.

    Args:
        model: The model.
        examples: Paths of images to choose from.
    """
    page = Page(model)
    with gradio.Blocks(title="memtune") as blocks:
        gradio.Markdown("# One frozen model, many tasks, one pass\nDrop an image: all tasks answer at once.")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", label="image", height=320)
                if examples:
                    gradio.Examples(examples, image)
                times = gradio.Markdown()
            with gradio.Column():
                labels = [gradio.Label(label=name, num_top_classes=BEST) for name in page.tasks]
                base = gradio.Label(label="the backbone itself, untouched", num_top_classes=BEST)
        looks = gradio.Gallery(label="where each task looks", columns=4, height=320)
        image.change(page.show, image, [*labels, base, looks, times])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    words = "a folder or an id on the Hub of `memtune combine`'s (%(default)s; or what $COLLECTION says)"
    add("collection", nargs="?", default=os.environ.get("COLLECTION", QUICKSTART), help=words)
    add("--backbone", help="the frozen model; by default the recorded one")
    add("--examples", nargs="*", help="images to choose from")
    add("--host", help="by default this machine alone, or what $GRADIO_SERVER_NAME says")
    add("--port", type=int)
    args = parser.parse_args()
    name = args.backbone or (BACKBONE if args.collection == QUICKSTART else None)
    backbone = None if name is None else AutoModelForImageClassification.from_pretrained(name)
    model = memtune.MultiTaskModel.from_pretrained(args.collection, backbone).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    create_page(model, args.examples).launch(server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
