"""The trunk cache: the same training as without it, bit for bit, and no entry that is damaged or of something else."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from backbone_zoo import BY_NAME
from PIL import Image
from transformers import ViTImageProcessorPil

import memtune
from memtune import TrainingConfig
from memtune.backbones.backbone import Backbone
from memtune.errors import ConfigError, InputError, MemtuneError
from memtune.preparation.loaders import cache_settings, make_accelerator, make_items
from memtune.storage import decode
from memtune.streams import Trunk
from memtune.trunk_cache.filling import cached_dataset
from memtune.trunk_cache.reader import BatchReader
from memtune.trunk_cache.store import TrunkCache, describe_trunk, to_pass

QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def tuned(name="vit", config=None, seed=0, processor=PROCESSOR, **options):
    backbone = BY_NAME[name].build(seed)
    torch.manual_seed(0)
    options = {"masked": True, "num_labels": 2, "processor": processor} | options
    return memtune.wrap(backbone, config or memtune.MemoryConfig(2), **options)


def items(count=10, seed=0):
    torch.manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 2} for index in range(count)]


@pytest.fixture
def pictures(tmp_path):
    """A data set of small images in files."""
    random = np.random.default_rng(0)
    for index in range(10):
        folder = tmp_path / "pictures" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "pictures"), split="train")


def train(model, data, folder=None, evaluation=None, **settings):
    cache = {} if folder is None else {"trunk_cache": folder, "trunk_cache_dtype": "float32"}
    return memtune.fit(model, data, evaluation, TrainingConfig(**QUICK | cache | settings))


def entries(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


def assert_same_weights(one, other):
    one, other = one.task.tensors(), other.task.tensors()
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture
def passes(monkeypatch):
    """The sizes of the batches that a trunk has run on."""
    seen = []
    run = Trunk.run

    def counted(self, pixel_values, **options):
        seen.append(len(pixel_values))
        return run(self, pixel_values, **options)

    monkeypatch.setattr(Trunk, "run", counted)
    return seen


METHODS = {
    "memory": memtune.MemoryConfig(2),
    "lora": memtune.LoraConfig(r=2, lora_dropout=0.1),
    "coda_prompts": memtune.CodaPromptConfig(pool_size=4, prompt_length=2, blocks=None),
    "approximated_prompts": memtune.ApproximatedPromptConfig(),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [("vit", each) for each in METHODS]
    + [(name, "memory") for name in ("beit", "beit-shared", "dinov2", "dinov3", "clip-head", "siglip", "vit_mae")],
)
def test_training_and_evaluation_are_those_without_a_cache(name, method, tmp_path, passes):
    one, other = tuned(name, METHODS[method]), tuned(name, METHODS[method])
    data, evaluation = items(12), items(8, seed=1)
    expected = train(one, data, evaluation=evaluation)
    passes.clear()
    result = train(other, data, tmp_path, evaluation)
    assert_same_weights(one, other)
    for entry, same in zip(expected.history, result.history, strict=True):
        timed = {"seconds", "images_per_second", "peak_memory_gb"}
        assert {name: entry[name] for name in entry.keys() - timed} == {
            name: same[name] for name in same.keys() - timed
        }
    assert sum(passes) == 12 + 8 + 2  # each image once, and the first of each data set for the estimate of the size
    assert len(entries(tmp_path)) == 20


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_types_are_near(dtype, precision, tmp_path):
    one, other = tuned(), tuned()
    train(one, items(), mixed_precision=precision)
    train(other, items(), tmp_path, trunk_cache_dtype=dtype, mixed_precision=precision)
    if (dtype, precision) == ("bfloat16", "bf16"):  # what autocast computes is kept as it is
        assert_same_weights(one, other)
    with torch.no_grad():
        images = torch.stack([item["pixel_values"] for item in items()])
        torch.testing.assert_close(one(images).logits, other(images).logits, atol=0.02, rtol=0.02)


def test_smaller_types_take_less(tmp_path):
    sizes = []
    for dtype in ("float32", "bfloat16", "int8"):
        train(tuned(), items(1), tmp_path / dtype, trunk_cache_dtype=dtype, num_train_epochs=1)
        with_header = entries(tmp_path / dtype)[0].stat().st_size
        sizes.append(with_header)
    assert sizes[0] > 1.4 * sizes[1] > 1.4 * sizes[2]


def write(folder, name="beit", seed=0, dtype="float32"):
    """A trunk's pass over two images, and the paths of their entries."""
    images = torch.randn(BY_NAME[name].images().shape, generator=torch.Generator().manual_seed(seed))
    current, _ = Trunk(Backbone(BY_NAME[name].build())).run(images)
    cache = TrunkCache(folder, {"of": name}, dtype=dtype)
    names = [f"{seed}{row}" for row in range(len(images))]
    for row, image in enumerate(names):
        cache.write(image, cache.encode(current, row))
    return current, [cache.path(image) for image in names]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    """In how many threads torch may compute, and a batch is so read."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["vit", "beit", "siglip"])
def test_a_batch_is_what_the_trunk_left(name, threads, tmp_path):
    current, paths = write(tmp_path, name)
    torch.set_num_threads(threads)  # the zoo takes one
    kept = to_pass(BatchReader().read(paths))
    assert (kept.query is None) == (current.query is None)
    assert kept.query is None or torch.equal(kept.query, current.query)
    for block, own in zip(kept.trunk, current.trunk, strict=True):
        assert torch.equal(block.key, own.key)
        assert torch.equal(block.value, own.value)
        assert (block.bias is None) == (own.bias is None)
        assert block.bias is None or torch.equal(block.bias, own.bias.expand(len(paths), -1, -1, -1))


def test_memory_is_used_again_once_its_batch_is_gone(tmp_path):
    (first, paths), (second, others) = write(tmp_path), write(tmp_path, seed=1)
    reader = BatchReader()
    one = to_pass(reader.read(paths))
    kept = one.trunk[-1].value[1]
    other = to_pass(reader.read(others))
    place = other.trunk[0].key.data_ptr()
    assert torch.equal(one.trunk[0].key, first.trunk[0].key)  # not in the memory of the second
    assert torch.equal(other.trunk[0].key, second.trunk[0].key)
    del one, other
    third = to_pass(reader.read(paths))
    assert third.trunk[0].key.data_ptr() == place
    assert torch.equal(third.trunk[0].key, first.trunk[0].key)
    assert torch.equal(kept, first.trunk[-1].value[1])  # one small view keeps all of its batch


@pytest.mark.parametrize("damage", ["missing", "cut", "of another shape", "no entry"])
def test_what_changes_while_it_is_read_is_named(damage, threads, tmp_path):
    _, paths = write(tmp_path)
    _, others = write(tmp_path, "vit")
    torch.set_num_threads(threads)
    change = {
        "missing": lambda path: path.unlink(),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
        "of another shape": lambda path: path.write_bytes(others[1].read_bytes()),
        "no entry": lambda path: path.write_bytes(b"no safetensors at all"),
    }
    change[damage](paths[1])
    with pytest.raises(MemtuneError, match="has been changed during the run"):
        BatchReader().read(paths)


def test_whole_numbers_are_near_the_states(tmp_path):
    current, paths = write(tmp_path, "vit", dtype="int8")
    kept = to_pass(BatchReader().read(paths))
    for block, own in zip(kept.trunk, current.trunk, strict=True):
        for states, expected in ((block.key, own.key), (block.value, own.value)):
            worst = (states.float() - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)
            assert worst.max() < 0.01


def test_images_are_neither_decoded_nor_run_again(pictures, tmp_path, passes, monkeypatch):
    one, other, third = tuned(), tuned(), tuned(config=memtune.LoraConfig(r=2))
    train(one, pictures)
    train(other, pictures, tmp_path / "cache")
    assert_same_weights(one, other)
    passes.clear()

    decoded = []
    monkeypatch.setattr("memtune.data.images.decode", lambda *value: decoded.append(value) or decode(*value))
    result = train(third, pictures, tmp_path / "cache", evaluation=pictures)  # another task and method
    assert passes == []
    config = TrainingConfig(trunk_cache=tmp_path / "cache", trunk_cache_dtype="float32", disable_tqdm=True)
    scores = memtune.evaluate(third, pictures, config)
    assert scores["accuracy"] == result.history[-1]["eval_accuracy"]
    assert passes == []
    assert len(decoded) == 3  # one image of each data set, before the first step
    assert len(entries(tmp_path / "cache")) == 10


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:]),
    "another's": lambda path: path.write_bytes(b"no safetensors at all"),
    "gone": lambda path: path.unlink(),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_again(damage, tmp_path, passes):
    train(tuned(), items(), tmp_path)
    good = {path: path.read_bytes() for path in entries(tmp_path)}
    victim = entries(tmp_path)[3]
    DAMAGE[damage](victim)
    passes.clear()
    one, other = tuned(), tuned()
    train(other, items(), tmp_path)
    assert passes == [1, 1]
    assert {path: path.read_bytes() for path in entries(tmp_path)} == good
    train(one, items())
    assert_same_weights(one, other)


def test_an_entry_that_vanishes_in_a_run_is_named(tmp_path):
    train(tuned(), items(), tmp_path)
    model, config = tuned(), TrainingConfig(**QUICK, trunk_cache=tmp_path, trunk_cache_dtype="float32")
    data = make_items(model, items(), config)
    dataset, collator = cached_dataset(model, data, cache_settings(model, config), make_accelerator(config))
    for path in entries(tmp_path):
        path.unlink()
    with pytest.raises(MemtuneError, match="has been changed during the run"):
        collator([dataset[0]])


def changed(name):
    model = BY_NAME["beit"].build()
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if name in key).flatten()[5].add_(1e-3)
    return model


@pytest.mark.parametrize("name", ["q_proj.weight", "relative_position_bias_table", "lambda_1", "layernorm_before.bias"])
def test_any_changed_value_of_the_backbone_gives_other_entries(name):
    same, other = (describe_trunk(Backbone(each), {}, "no") for each in (BY_NAME["beit"].build(), changed(name)))
    assert TrunkCache("c", same).folder != TrunkCache("c", other).folder
    again = describe_trunk(Backbone(BY_NAME["beit"].build()), {}, "no")
    assert TrunkCache("c", same).folder == TrunkCache("c", again).folder


def test_other_transforms_precisions_and_kernels_give_other_entries(pictures, tmp_path):
    folders = set()
    for settings, options in (
        ({}, {}),
        ({"image_size": 48}, {}),
        ({"mixed_precision": "bf16"}, {}),
        ({"trunk_cache_dtype": "int8"}, {}),
        ({}, {"processor": ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3)}),
        ({}, {"seed": 1}),
    ):
        train(tuned(**options), pictures, tmp_path / "cache", **settings)
        now = {path.parent.parent.name for path in entries(tmp_path / "cache")}
        assert len(now - folders) == 1
        folders = now
    model = tuned()
    model.backbone.set_attn_implementation("eager")
    train(model, pictures, tmp_path / "cache")
    assert len({path.parent.parent.name for path in entries(tmp_path / "cache")} - folders) == 1
    assert all((tmp_path / "cache" / name / "context.json").is_file() for name in folders)


def test_labels_and_names_do_not_matter(tmp_path, passes):
    train(tuned("vit-head"), items(), tmp_path)
    passes.clear()
    model = tuned("vit-head", num_labels=5)
    model.backbone.config.id2label = {0: "a"}
    train(model, [item | {"labels": 4} for item in items()], tmp_path)
    assert passes == []


def test_the_size_is_said_first_and_limited(tmp_path, passes, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "memtune"):
        train(tuned(), items(), tmp_path / "one")
    said = next(record.getMessage() for record in caplog.records if "trunk cache" in record.getMessage())
    assert "10 of 10 images are to be computed" in said
    size = sum(path.stat().st_size for path in entries(tmp_path / "one"))
    limit = 1.01 * size / 1e9
    train(tuned(), items(), tmp_path / "two", trunk_cache_max_gb=limit)
    passes.clear()
    with pytest.raises(ConfigError, match="more than the limit"):
        train(tuned(), items(seed=1), tmp_path / "two", trunk_cache_max_gb=limit)
    assert passes == [1]
    assert len(entries(tmp_path / "two")) == 10
    train(tuned(), items(), tmp_path / "two", trunk_cache_max_gb=limit)  # nothing to write
    monkeypatch.setattr(TrunkCache, "free", lambda self: 1000)
    with pytest.raises(ConfigError, match="the disk has only"):
        train(tuned(), items(), tmp_path / "three")
    assert entries(tmp_path / "three") == []


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unmasked"):
        train(tuned(masked=False), items(), tmp_path)
    with pytest.raises(ConfigError, match="unmasked"):
        memtune.evaluate(tuned(masked=False), items(), TrainingConfig(trunk_cache=tmp_path))
    first = tuned()
    both = memtune.combine(first.backbone, {"first": first})
    later = memtune.wrap(both.backbone, memtune.MemoryConfig(2), num_labels=2, masked=True, extends=both)
    with pytest.raises(ConfigError, match="extends"):
        train(later, items(), tmp_path)

    class Augmented(list):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"pixel_values": item["pixel_values"] + torch.rand(())}

    with pytest.raises(ConfigError, match="random augmentation"):
        train(tuned(), Augmented(items()), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"trunk_cache": ""}, {"trunk_cache": 3}, {"trunk_cache_dtype": "int4"}, {"trunk_cache_max_gb": -1}]
)
def test_a_wrong_setting_is_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name}: got {value!r}, expected"):
        TrainingConfig(**wrong)


def test_unreadable_images_are_named_or_skipped(pictures, tmp_path):
    Path(pictures.cast_column("image", datasets.Image(decode=False))[2]["image"]["path"]).write_bytes(b"broken")
    with pytest.raises(InputError, match=r"image 2 .* cannot be read"):
        train(tuned(), pictures, tmp_path / "cache")
    one, other = tuned(), tuned()
    settings = {"on_error": "skip", "per_device_train_batch_size": 5}
    train(one, pictures, **settings)
    train(other, pictures, tmp_path / "cache", **settings)
    assert len(entries(tmp_path / "cache")) == 9
    for key, tensor in one.task.tensors().items():
        torch.testing.assert_close(tensor, other.task.tensors()[key], rtol=1e-4, atol=1e-6)


def test_a_label_outside_the_range_is_refused(tmp_path):
    data = items()
    data[3]["labels"] = 5
    with pytest.raises(InputError, match=r"got \[5\], expected class indices from 0 to 1"):
        train(tuned(), data, tmp_path)


def test_a_model_answers_from_a_pass():
    model = tuned().eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        current = model.trunk_pass(images)
        output = model(trunk=current, labels=torch.tensor([0, 1, 1]))
        expected = model(images, labels=torch.tensor([0, 1, 1]))
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    with model.disable_adapter(), pytest.raises(ConfigError, match="without its adapter"):
        model(trunk=current)
    unmasked = tuned(masked=False)
    with pytest.raises(ConfigError, match="unmasked"):
        unmasked(trunk=current)
    with pytest.raises(ConfigError, match="unmasked"):
        unmasked.trunk_pass(images)


SCRIPT = """
import os
import sys
sys.path[:] = {tests!r}
import torch
from test_trunk_cache import entries, items, train, tuned
torch.set_num_threads(1)
model = tuned()
train(model, items(12), {folder!r}, evaluation=items(5, seed=1), per_device_train_batch_size={batch})
torch.save(model.task.tensors(), sys.argv[1] + os.environ.get("RANK", ""))
"""


def start(script, *arguments, launcher=()):
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one run"])
def test_several_processes_share_a_folder(together, tmp_path):
    script = tmp_path / "script.py"
    cache = tmp_path / "cache"
    batch = 2 if together else 4
    script.write_text(SCRIPT.format(tests=[*sys.path, str(Path(__file__).parent)], folder=str(cache), batch=batch))
    if together:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        running = [start(script, str(tmp_path / "weights"), launcher=launcher)]
    else:
        running = [start(script, str(tmp_path / f"weights{number}")) for number in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert len(entries(cache)) == 17
    assert [path.name for path in cache.rglob(".*")] == []
    alone = tuned()
    train(alone, items(12), tmp_path / "other", evaluation=items(5, seed=1))
    for number in range(2):
        weights = torch.load(tmp_path / f"weights{number}")
        for key, tensor in alone.task.tensors().items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-5)
    whole = {path.relative_to(cache): path.read_bytes() for path in entries(cache)}
    assert whole.keys() == {path.relative_to(tmp_path / "other") for path in entries(tmp_path / "other")}


@pytest.mark.slow
def test_the_benchmark_measures(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "benchmarks" / "trunk_cache.py"
    settings = ["--image_size", "32", "--images", "8", "--batch_size", "4", "--pairs", "1", "--num_train_epochs", "2"]
    done = subprocess.run([sys.executable, str(script), *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if "epoch" in line]
    assert len(rows) == 2
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split("|")[1:])
