"""Sharing on the Hub, against a real HTTP server on this machine that can also fail (see `hub_server`)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_fixtures import backbone
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from torch import Tensor
from transformers import ViTForImageClassification, ViTImageProcessorPil

import memtune
from memtune.errors import CheckpointError, ConfigError, HubError
from memtune.storage.adapter_folder import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME
from memtune.storage.hub import list_adapters

# huggingface_hub's own, where it uploads without Xet (2.4)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

PUSH = [
    "POST /api/repos/create",
    "GET /api/models/user/pets",
    "POST /api/validate-yaml",
    "POST /api/models/user/pets/preupload/main",
    "POST /user/pets.git/info/lfs/objects/batch",
    "PUT /storage/upload/",
    "POST /storage/verify/",
    "POST /api/models/user/pets/commit/main",
]
PULL = [
    "GET /api/models/user/pets/revision/main",
    "GET /api/models/user/pets/tree/",
    "HEAD .*/adapter_config.json",
    "HEAD .*/adapter_model.safetensors",
    "GET .*/adapter_config.json",
    "GET /storage/download/",
]


def tuned(seed: int = 1, *, masked: bool = False, **options: Any) -> memtune.TunedModel:
    model = memtune.wrap(backbone(), memtune.MemoryConfig(3), labels=["cat", "dog"], masked=masked, **options).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.task.parameters():
            parameter.normal_()
    return model


def answers(model: memtune.TunedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).logits


def pull(source: str = "user/pets", **options: Any) -> Tensor:
    return answers(memtune.load(source, backbone=backbone(), **options))


# push, pull, predict


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_what_is_pulled_answers_as_what_was_pushed(hub: Hub, masked: bool) -> None:
    model = tuned(masked=masked, processor=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    commit = model.push_to_hub("pets")
    repository = hub.repositories["user/pets"]
    assert commit.oid == repository.refs["main"]
    assert not repository.private
    loaded = memtune.TunedModel.from_pretrained("user/pets", backbone())
    assert torch.equal(answers(loaded), answers(model))
    assert loaded.processor.size["height"] == 32
    assert 'memtune.load("user/pets"' in hub.files("user/pets")["README.md"].decode()


def test_the_recorded_backbone_comes_from_the_hub_as_well(hub: Hub, tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "saved")
    huggingface_hub.HfApi().create_repo("user/backbone", private=True)
    huggingface_hub.HfApi().upload_folder(repo_id="user/backbone", folder_path=tmp_path / "saved")
    model = tuned()
    model.push_to_hub("user/pets", base_model_name="user/backbone")
    hub.fail("GET .*user/backbone/resolve.*config.json", status=503)
    loaded = memtune.load("user/pets", cache_dir=tmp_path / "elsewhere")
    assert torch.equal(answers(loaded), answers(model))
    assert loaded.backbone.name_or_path == "user/backbone"
    assert not (tmp_path / "cache").exists()
    close_session()
    hub.fail(times=-1, status=500)
    kept = memtune.load("user/pets", cache_dir=tmp_path / "elsewhere", local_files_only=True)
    assert torch.equal(answers(kept), answers(model))
    with pytest.raises(CheckpointError, match="'user/backbone' cannot be loaded; give backbone="):
        memtune.load("user/pets", cache_dir=_only_adapter(tmp_path), local_files_only=True)


def _only_adapter(tmp_path: Path) -> Path:
    """A cache without the backbone."""
    (tmp_path / "half").mkdir()
    (tmp_path / "elsewhere" / "models--user--pets").rename(tmp_path / "half" / "models--user--pets")
    return tmp_path / "half"


def test_a_push_is_one_commit_of_the_whole_folder(hub: Hub, tmp_path: Path) -> None:
    model = tuned(processor=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    model.push_to_hub("user/pets", commit_message="First", base_model_name="user/backbone")
    model.save_pretrained(tmp_path / "saved", base_model_name="user/backbone")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    pushed = hub.files("user/pets")
    assert set(pushed) == {*saved, ".gitattributes"}
    assert all(pushed[name] == saved[name] for name in saved if name != "README.md")
    commits = hub.repositories["user/pets"].commits
    assert [commit.title for commit in commits.values()] == ["initial commit", "First"]


def test_pushing_the_same_again_makes_no_commit(hub: Hub) -> None:
    first = tuned().push_to_hub("user/pets")
    assert tuned().push_to_hub("user/pets").oid == first.oid
    assert len(hub.repositories["user/pets"].commits) == 2


def test_a_push_removes_the_processor_that_the_adapter_no_longer_has(hub: Hub) -> None:
    tuned(processor=ViTImageProcessorPil(size={"height": 32, "width": 32})).push_to_hub("user/pets")
    assert PROCESSOR_NAME in hub.files("user/pets")
    tuned().push_to_hub("user/pets")
    assert PROCESSOR_NAME not in hub.files("user/pets")
    assert len(hub.repositories["user/pets"].commits) == 3


def test_no_path_of_this_machine_is_pushed(hub: Hub, tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "models" / "vit")
    for name in (str(tmp_path / "models" / "vit"), "models/vit"):
        own = ViTForImageClassification.from_pretrained(name)
        model = memtune.wrap(own, memtune.MemoryConfig(2), num_labels=2)
        model.push_to_hub("user/pets")
        files = hub.files("user/pets")
        assert json.loads(files[CONFIG_NAME])["backbone"]["name_or_path"] == ""
        assert not any(str(tmp_path).encode() in content or b"models/vit" in content for content in files.values())
        with pytest.raises(CheckpointError, match=r"give backbone=\.\.\. yourself"):
            memtune.load("user/pets")


def test_branches_and_commits(hub: Hub) -> None:
    old, new, other = tuned(1), tuned(2), tuned(3)
    first = old.push_to_hub("user/pets")
    new.push_to_hub("user/pets")
    other.push_to_hub("user/pets", revision="try/one")
    assert torch.equal(pull(), answers(new))
    assert torch.equal(pull(revision=first.oid), answers(old))
    assert torch.equal(pull(revision="try/one"), answers(other))
    assert torch.equal(pull(revision="try/one", local_files_only=True), answers(other))
    with pytest.raises(HubError, match="it has no revision 'nowhere'"):
        pull(revision="nowhere")


def test_private_repositories(hub: Hub) -> None:
    tuned().push_to_hub("user/pets", private=True)
    assert hub.repositories["user/pets"].private
    assert torch.equal(pull(), answers(tuned()))
    for token in ("stranger", False):
        with pytest.raises(HubError, match="no such repository, or this token may not see it"):
            pull(token=token, cache_dir=f"cache-{token}")


def test_anyone_can_open_a_pull_request(hub: Hub) -> None:
    tuned(1).push_to_hub("user/pets")
    info = tuned(2).push_to_hub("user/pets", token="stranger", create_pr=True)
    assert info.pr_num == 1
    assert torch.equal(pull(), answers(tuned(1)))
    assert torch.equal(pull(revision="refs/pr/1"), answers(tuned(2)))
    tuned(3).push_to_hub("user/pets", revision="refs/pr/1")  # the owner, onto the pull request
    assert torch.equal(pull(revision="refs/pr/1"), answers(tuned(3)))


def test_several_adapters_in_one_repository(hub: Hub, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        tuned(seed).save_pretrained(tmp_path / "all" / name)
    huggingface_hub.HfApi().create_repo("user/all")
    huggingface_hub.HfApi().upload_folder(repo_id="user/all", folder_path=tmp_path / "all")
    assert torch.equal(pull("user/all", subfolder="two"), answers(tuned(1)))
    assert torch.equal(pull(str(tmp_path / "all"), subfolder="one"), answers(tuned(0)))
    assert not any("one/" in request for request in hub.requests if "resolve" in request)
    with pytest.raises(HubError, match=r"has no three/adapter_config.json and no three/adapter_model.safetensors"):
        pull("user/all", subfolder="three")


def test_only_the_adapters_own_files_are_fetched(hub: Hub) -> None:
    tuned().push_to_hub("user/pets")
    hub.files("user/pets").update({"pytorch_model.bin": b"a pickle", "more.py": b"code"})
    pull()
    fetched = {request.split("/")[-1] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"README.md", CONFIG_NAME, WEIGHTS_NAME}


def test_a_folder_goes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    tuned(1).push_to_hub("user/pets")
    tuned(2).save_pretrained(tmp_path / "user" / "pets")
    assert torch.equal(pull("user/pets"), answers(tuned(2)))


def test_force_download_fetches_again(hub: Hub) -> None:
    tuned().push_to_hub("user/pets")
    pull()
    for force, fetched in ((False, 0), (True, 1)):
        hub.requests.clear()
        pull(force_download=force)
        assert sum("GET /storage/download" in request for request in hub.requests) == fetched


def test_adapters_for_a_backbone(hub: Hub, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        tuned().push_to_hub(name, base_model_name="user/backbone", private=name == "c")
    tuned().push_to_hub("other", base_model_name="user/other")
    tuned().push_to_hub("nameless")
    assert [info.id for info in list_adapters("user/backbone")] == ["user/a", "user/b", "user/c"]
    assert [info.id for info in list_adapters("user/backbone", limit=1)] == ["user/a"]
    assert [info.id for info in list_adapters("user/backbone", token="stranger")] == ["user/a", "user/b"]
    assert list_adapters("user/backbone", author="stranger") == []
    own = ViTForImageClassification(backbone().config)
    own.config._name_or_path = own.name_or_path = "user/other"
    assert [info.id for info in list_adapters(own)] == ["user/other"]
    with pytest.raises(ConfigError, match="expected the name of a model on the Hub"):
        list_adapters(str(tmp_path))
    hub.fail("GET /api/models", times=-1, status=503)
    with pytest.raises(HubError, match=r"could not be listed: the Hub failed \(503\)"):
        list_adapters("user/backbone")


# what goes wrong


@pytest.mark.parametrize("name", ["pets", "a/b/c", "user/-pets", "user/pets.git", "us er/pets", "user--x/pets"])
def test_neither_a_folder_nor_an_id(hub: Hub, name: str) -> None:
    with pytest.raises(HubError, match="no folder here, and no id of a repository"):
        memtune.load(name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["./pets", "/nowhere/pets", Path("user/pets")])
def test_a_missing_folder_is_not_looked_for_on_the_hub(hub: Hub, name: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        memtune.load(name)
    assert hub.requests == []


def test_an_id_that_cannot_be_pushed_to(hub: Hub) -> None:
    with pytest.raises(HubError, match="could not be made on the Hub: that is no id of a repository"):
        tuned().push_to_hub("user/pets/more")
    assert hub.requests == []


def test_a_repository_without_an_adapter(hub: Hub) -> None:
    huggingface_hub.HfApi().create_repo("user/pets")
    with pytest.raises(HubError, match=r"no adapter_config.json and no adapter_model.safetensors at revision 'main'"):
        pull()


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"status": 401, "headers": {"X-Error-Message": "Invalid credentials in Authorization header"}}, "hf auth login"),
    ({"status": 403}, "may not do this .403."),
    ({"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "ask for it at https://huggingface.co/user/pets"),
    ({"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "no such repository"),
    ({"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}, "it has no revision"),
    ({"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}}, "lacks a file .404."),
    ({"status": 429}, "too many requests .429."),
    ({"status": 500}, "the Hub failed .500., also when asked again"),
    ({"status": 503}, "the Hub failed .503., also when asked again"),
    ({"status": 418}, "the Hub answered with 418"),
    ({"cut_answer": 20}, "the Hub cannot be reached"),
    ({"cut_answer": 0, "reset": True}, "the Hub cannot be reached"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_pull_that_goes_on_failing(hub: Hub, fault: dict[str, Any], message: str) -> None:
    tuned().push_to_hub("user/pets")
    hub.fail("GET .*/revision/main", times=-1, **fault)
    with pytest.raises(HubError, match=message):
        pull()
    hub.faults.clear()
    assert torch.equal(pull(), answers(tuned()))


NEVER_COMMITTED = [
    *(fault for fault in FAULTS if "status" in fault[0]),
    ({"status": 409}, "another change .* push again"),
    ({"cut_request": 20}, "the Hub cannot be reached"),
    ({"cut_request": 0, "reset": True}, "the Hub cannot be reached"),
]


@pytest.mark.parametrize(("fault", "message"), NEVER_COMMITTED)
def test_a_push_that_goes_on_failing(hub: Hub, fault: dict[str, Any], message: str) -> None:
    tuned(1).push_to_hub("user/pets")
    hub.fail("POST .*/commit/", times=-1, **fault)
    with pytest.raises(HubError, match=message):
        tuned(2).push_to_hub("user/pets")
    hub.faults.clear()
    assert torch.equal(pull(), answers(tuned(1)))
    tuned(2).push_to_hub("user/pets")
    assert torch.equal(pull(), answers(tuned(2)))


@pytest.mark.parametrize("reset", [False, True])
def test_a_commit_whose_answer_is_lost_counts(hub: Hub, reset: bool) -> None:
    tuned(1).push_to_hub("user/pets")
    hub.fail("POST .*/commit/", times=-1, cut_answer=0, reset=reset)
    commit = tuned(2).push_to_hub("user/pets")
    repository = hub.repositories["user/pets"]
    assert commit.oid == repository.refs["main"]
    assert len(repository.commits) == 3


def test_refused_pushes(hub: Hub) -> None:
    tuned().push_to_hub("user/pets")
    with pytest.raises(HubError, match="403"):
        tuned(2).push_to_hub("user/pets", token="reader")
    with pytest.raises(HubError, match=r"does not accept the token \(401\)"):
        tuned(2).push_to_hub("user/pets", token="outdated")
    with pytest.raises(HubError, match="could not be made on the Hub: the token may not do this"):
        tuned(2).push_to_hub("stranger/pets")
    assert torch.equal(pull(), answers(tuned()))


def test_a_commit_by_someone_else_meanwhile(hub: Hub) -> None:
    """Between the look at what has changed and the commit, which would make one adapter of two."""
    tuned(1).push_to_hub("user/pets")
    repository = hub.repositories["user/pets"]
    hub.fail(
        "POST .*/preupload/main",
        do=lambda: repository.commit("main", hub.files("user/pets") | {"new": b""}, repository.refs["main"], "theirs"),
    )
    with pytest.raises(HubError, match=r"someone else has committed since \(412\)"):
        tuned(2).push_to_hub("user/pets")
    assert repository.commits[repository.refs["main"]].title == "theirs"


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429, "headers": {"Retry-After": "7"}},
        {"status": 429, "headers": {"RateLimit": '"api";r=0;t=7'}},
        {"status": 500},
        {"status": 503},
        {"cut_request": 0},
        {"cut_answer": 0, "reset": True},
        {"cut_answer": 30},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
@pytest.mark.parametrize("request_", PUSH + PULL)
@pytest.mark.slow
def test_what_fails_twice_is_repeated(hub: Hub, waits: list[float], fault: dict[str, Any], request_: str) -> None:
    """Each request of a push and of a pull."""
    for _ in range(2):
        hub.fail(f"^{request_}", **fault)
    model = tuned()
    model.push_to_hub("user/pets")
    assert torch.equal(pull(), answers(model))
    lost_commit = "/commit/" in request_ and "cut_answer" in fault  # which is found to have come through
    assert [fault.times for fault in hub.faults] == [0, int(lost_commit)]
    assert [commit.title for commit in hub.repositories["user/pets"].commits.values()][1:] == ["Upload memtune adapter"]
    if fault.get("headers") and not request_.startswith("HEAD"):
        assert waits.count(8.0) == 2


def test_a_hub_that_asks_for_too_long_a_wait(hub: Hub, waits: list[float]) -> None:
    tuned().push_to_hub("user/pets")
    hub.fail("GET .*/revision/main", times=-1, status=429, headers={"Retry-After": "4000"})
    with pytest.raises(HubError, match="429"):
        pull()
    assert waits == []


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub: Hub) -> None:
    tuned(1).push_to_hub("user/pets")
    hub.fail("POST .*/commit/.*create_pr", cut_answer=0)
    with pytest.raises(HubError, match="cannot be reached"):
        tuned(2).push_to_hub("user/pets", create_pr=True)
    hub.fail("POST .*/commit/.*create_pr", status=503)
    tuned(3).push_to_hub("user/pets", create_pr=True)
    assert set(hub.repositories["user/pets"].refs) == {"main", "refs/pr/1", "refs/pr/2"}


def test_a_slow_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    tuned().push_to_hub("user/pets")
    hub.fail("GET .*/revision/main", slow=0.3)  # no limit
    hub.fail("GET /storage/download", slow=0.4)  # beyond the limit
    assert torch.equal(pull(), answers(tuned()))
    assert sum("GET /storage/download" in request for request in hub.requests) == 2


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned().push_to_hub("user/pets")
    with pytest.raises(HubError, match="cache does not hold all of it, and local_files_only=True"):
        pull(local_files_only=True)
    expected = pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(pull(), expected)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set and the cache does not hold all of it"):
        pull(cache_dir="another")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        tuned().push_to_hub("user/pets")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        list_adapters("user/backbone")
    assert hub.requests == []


def test_a_hub_that_is_gone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned().push_to_hub("user/pets")
    expected = pull()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert torch.equal(pull(), expected)  # from the cache
    with pytest.raises(HubError, match=r"the Hub cannot be reached \(ConnectError"):
        pull(cache_dir="another")


def test_the_card_is_checked_before_anything_is_made(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="accuracy is nan"):
        tuned().push_to_hub("user/pets", results={"accuracy": float("nan")})
    assert hub.requests == []


# random cuts


def one_fault(chance: random.Random, requests: list[str]) -> dict[str, Any]:
    """A connection that is lost at any byte of any request or answer, once or for good."""
    side = chance.choice(["cut_request", "cut_answer"])
    return {
        "match": f"^{chance.choice(requests)}",
        "times": chance.choice([1, 1, 3, -1]),
        side: chance.choice([0, chance.randrange(400), chance.randrange(4000)]),
        "reset": chance.random() < 0.5,
    }


def attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except HubError:
        return None


@pytest.mark.slow
def test_a_hundred_random_cuts_leave_a_whole_adapter_or_none(hub: Hub, tmp_path: Path) -> None:
    chance = random.Random(0)
    models = [tuned(seed) for seed in range(3)]
    expected = [answers(model) for model in models]
    for seed, model in enumerate(models):
        model.push_to_hub(f"whole-{seed}")
    allowed = [_adapter_of(hub.files(f"user/whole-{seed}")) for seed in range(3)]
    came, failed = 0, 0
    for turn in range(100):
        number = turn % 3
        if turn % 2:
            hub.fail(**one_fault(chance, PUSH))
            failed += attempt(lambda: models[number].push_to_hub("user/pets")) is None  # noqa: B023
            hub.faults.clear()
            repository = hub.repositories.get("user/pets")
            for commit in list(repository.commits.values())[1:] if repository else []:
                assert _adapter_of(commit.files) in allowed
        else:
            models[number].push_to_hub("user/pets")
            hub.fail(**one_fault(chance, PULL))
            cache_dir = tmp_path / "caches" / str(turn)
            pulled = attempt(lambda: pull(cache_dir=cache_dir))  # noqa: B023
            hub.faults.clear()
            came, failed = came + (pulled is not None), failed + (pulled is None)
            assert pulled is None or torch.equal(pulled, expected[number])
            assert torch.equal(pull(cache_dir=cache_dir), expected[number])
            assert not list(cache_dir.rglob("*.incomplete"))
    assert came > 10
    assert failed > 10


def _adapter_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in (CONFIG_NAME, WEIGHTS_NAME) if name in files}


# as a user's own process sees it

PROGRAM = """
import memtune, torch
from transformers import ViTForImageClassification

backbone = ViTForImageClassification.from_pretrained("backbone")
model = memtune.load("first", backbone=backbone)
print(model.push_to_hub("pets", private=True).oid)
loaded = memtune.load("user/pets", backbone=backbone)
images = torch.rand(2, 3, 32, 32)
print(torch.equal(model(images).logits, loaded(images).logits))
"""


@pytest.mark.slow
def test_a_process_of_its_own_finds_the_hub_by_its_environment(hub: Hub, tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "backbone")
    tuned().save_pretrained(tmp_path / "first")
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "writer"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [hub.repositories["user/pets"].refs["main"], "True"]
