"""Passwords and tokens in URLs: they reach the server and nothing else."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack import config as configuration
from stack.config import UserError
from stack.data.dataset import ImageData, LatentData
from stack.data.safety import check_source
from stack.log import say
from stack.train.recipe import TrainConfig

PASSWORD, TOKEN = "correct-horse-battery", "0123-staple-4567"


@pytest.fixture
def site(store, stage) -> Any:
    """A web server with the raw shards under /shards and the pre-encoded ones under /encoded."""
    for name, folder in (("shards", stage.shards), ("encoded", stage.encoded)):
        for path in folder.glob("[!.]*"):
            if path.is_file() and ".index." not in path.name:
                store.files[f"/{name}/{path.name}"] = path.read_bytes()
                store.changes[f"/{name}/{path.name}"] = 1
    return store


@pytest.fixture
def url(site) -> Callable[..., str]:
    def make(path: str, token: str = TOKEN) -> str:
        query = f"?token={token}" if token else ""
        return f"http://user:{PASSWORD}@127.0.0.1:{site.server_port}/{path}{query}"

    return make


def told(text: str) -> list[str]:
    return [secret for secret in (PASSWORD, TOKEN, "user:") if secret in text]


def kept(folder: Path) -> list[str]:
    """Files under `folder` that hold a secret in their name or content."""
    secrets = [secret.encode() for secret in (PASSWORD, TOKEN)]
    found = []
    for path in folder.rglob("*"):
        data = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        if any(secret in data for secret in secrets):
            found.append(str(path))
    return found


def asked_with_password(site) -> bool:
    wanted = "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    return bool(site.authorizations) and set(site.authorizations) == {wanted}


def options(tmp_path: Path, *more: str) -> tuple[str, ...]:
    own = (f"run.dir={tmp_path}/run", f"data.cache.dir={tmp_path}/cache", "data.batch_size=4")
    return (*own, "checkpoint.every=1", "log.wandb=offline", *more)


def test_training_on_a_url_with_secrets_keeps_none_and_goes_on_with_another_token(
    site, url, mmdit, stage, tmp_path, monkeypatch
):
    source = url("shards/{00000..00001}.tar")
    command = ["train", str(stage.folder / "autoencoder.yaml"), *options(tmp_path, "schedule.steps=3")]
    monkeypatch.setattr(sys, "argv", ["mmdit", *command, f"data.source={source}"])  # wandb keeps it
    first = mmdit(*command, f"data.source={source}")
    assert first.returncode == 0, first.stderr
    assert asked_with_password(site)
    assert "wandb is off" not in first.stderr
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert kept(tmp_path) == []
    shown = f"http://***@127.0.0.1:{site.server_port}/shards/{{00000..00001}}.tar?***"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["source"] == shown

    (tmp_path / "run" / "checkpoints" / "00000003" / "COMPLETE").unlink()  # as if it had been killed before the end
    renewed = url("shards/{00000..00001}.tar", "another-token")
    second = mmdit(*command, f"data.source={renewed}")
    assert second.returncode == 0, second.stderr
    assert "going on after step 2" in second.stderr
    third = mmdit("train", tmp_path / "run" / "config.yaml")
    assert third.returncode == 2
    assert f"'{shown}': passwords and queries of URLs are not saved; give the URL again as an override" in third.stderr
    other = mmdit(*command, f"data.source={url('shards/00000.tar')}")
    assert (other.returncode, "missing: 00001.tar" in other.stderr) == (2, True)
    assert kept(tmp_path) == []
    for done in (first, second, third, other):
        assert told(done.stdout + done.stderr) == []


def test_what_reads_a_run_asks_for_the_url_again(site, url, mmdit, stage, tmp_path):
    source = url("shards/00000.tar")
    command = ("train", stage.folder / "autoencoder.yaml", *options(tmp_path), "log.wandb=disabled", "schedule.steps=1")
    assert mmdit(*command, f"data.source={source}").returncode == 0
    for name, *more in (("evaluate",), ("export", "-o", tmp_path / "codec", "--samples", 4)):
        done = mmdit(name, tmp_path / "run", *more)
        assert (done.returncode, "give the URL again as an override" in done.stderr) == (2, True)
        done = (
            mmdit(name, tmp_path / "run", f"data.source={source}", "--", *more)
            if False
            else mmdit(name, tmp_path / "run", f"data.source={source}", *more)
        )
        assert done.returncode == 0, done.stderr
        assert told(done.stdout + done.stderr) == []
    assert kept(tmp_path) == []


def test_pre_encoding_from_a_url_with_secrets_keeps_none(site, url, mmdit, stage, tmp_path):
    site.files["/shards/00000.tar"] = site.files["/shards/00000.tar"][:-30_000]  # something to say about it
    own = (f"out={tmp_path}/out", f"cache.dir={tmp_path}/cache", "max_rejected=1")
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"source={url('shards/{00000..00001}.tar')}", *own)
    assert done.returncode == 0, done.stderr
    assert asked_with_password(site)
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"00000.tar", "00001.tar"}
    assert f"http://***@127.0.0.1:{site.server_port}/shards/00000.tar?***: shard truncated" in done.stderr
    assert kept(tmp_path) == []
    assert told(done.stdout + done.stderr) == []
    renewed = f"source={url('shards/{00000..00001}.tar', 'another-token')}"
    assert mmdit("preencode", stage.folder / "preencode.yaml", renewed, *own).returncode == 0  # the same shards


def test_training_on_pre_encoded_shards_behind_a_password_keeps_none(site, url, mmdit, stage, tmp_path):
    config = stage.train_config("behind-a-password", schedule={"steps": 2})
    mixture = tmp_path.with_suffix(".yaml")
    own = {"path": {url("encoded", ""): 1.0}}
    mixture.write_text(yaml.safe_dump({"base": str(config), "data": own}))
    for data in ((config, f"data.path={url('encoded/', '')}"), (mixture,)):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        arguments = ("train", *data, *options(tmp_path), f"run.dir={run}", "log.wandb=disabled")
        for _ in range(2):
            done = mmdit(*arguments)
            assert done.returncode == 0, done.stderr
            assert told(done.stdout + done.stderr) == []
        assert "going on after step 2" in done.stderr
    assert asked_with_password(site)
    assert kept(tmp_path) == []


MISTAKES = {
    "a shard that is not there": ("train", "data.source={shards/9.tar}"),
    "a folder that is not there": ("train", "data.source={nowhere/}"),
    "an unknown key": ("train", "data.sourc={shards/0.tar}"),
    "a wrong value": ("train", "data.batch_size={shards/0.tar}"),
    "no override": ("train", "{shards/0.tar}"),
    "broken YAML": ("train", "data.source=[{shards/0.tar}"),
    "a weight below zero": ("train", "data.source={{shards/0.tar}: -1}"),
    "a chain": ("train", "data.source=simplecache::{shards/0.tar}"),
    "too many": ("train", "data.source={shards/}{0..9999999}.tar"),
    "a URL where a folder is made": ("train", "run.dir={shards/}"),
    "a URL where shards are written": ("preencode", "source={shards/00000.tar};out={shards/}"),
    "an index that is not there": ("index", "{shards/9.tar}"),
    "a chain to index": ("index", "zip://x::{shards/0.tar}"),
    "a query on a folder": ("latents", "data.path={encoded}"),
    "no manifest": ("latents", "data.path={-shards}"),
    "a chain of latents": ("latents", "data.path=simplecache::{encoded}"),
    "captions that are not there": ("latents", "data.path={-encoded};data.captions={none: 1}"),
    "the source of a job": ("preencode", "source={shards/9.tar}"),
    "an encoded source": ("preencode", "source={encoded/00000.tar}"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_without_secrets(name, site, url, mmdit, stage, tmp_path):
    kind, text = MISTAKES[name]

    def replace(match: re.Match[str]) -> str:
        path = match[1]
        return url(path.removeprefix("-"), "" if path.startswith("-") else TOKEN)

    arguments = re.sub(r"\{(-?(?:shards|encoded|nowhere)[^{}]*)\}", replace, text).split(";")
    command: list[object] = {
        "train": ["train", stage.folder / "autoencoder.yaml", *options(tmp_path)],
        "latents": ["train", stage.train_config("mistake"), *options(tmp_path)],
        "preencode": [
            "preencode",
            stage.folder / "preencode.yaml",
            f"out={tmp_path}/out",
            f"cache.dir={tmp_path}/cache",
        ],
        "index": ["data", "index", "--cache", tmp_path / "cache"],
    }[kind]
    done = mmdit(*command, *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert told(done.stdout + done.stderr) == []
    assert kept(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410, 418, 500])
def test_an_error_of_the_server_is_told_without_secrets(status, site, url, mmdit, stage, tmp_path):
    site.fail(*[status] * 50)
    source = f"data.source={url('shards/00000.tar')}"
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options(tmp_path), source)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert told(done.stdout + done.stderr) == []
    assert "http://***@127.0.0.1" in done.stderr


def test_a_dry_run_shows_none(site, url, mmdit, stage, tmp_path):
    source = f"data.source={url('shards/00000.tar')}"
    done = mmdit("train", "--dry-run", stage.folder / "autoencoder.yaml", *options(tmp_path), source)
    assert done.returncode == 0, done.stderr
    assert "http://***@127.0.0.1" in done.stdout
    assert told(done.stdout + done.stderr) == []


def test_public_values_are_those_of_the_configuration_without_secrets():
    paths = {"https://u:p@h/a?x=1": 0.5, "https://u:p@h/a?x=2": 0.25, "/local/folder": 0.25}
    config = LatentData(path=paths, batch_size=3)
    values = configuration.public(config)
    assert values["path"] == {"https://***@h/a?***": 0.5, "https://***@h/a?****": 0.25, "/local/folder": 0.25}
    assert {**values, "path": paths} == config.model_dump(mode="json")
    assert LatentData.model_validate(values).batch_size == 3
    assert yaml.safe_load(configuration.dump(config)) == values
    one, other = (ImageData(source=f"https://u:{password}@h/x.tar?t={password}") for password in "ab")
    assert configuration.fingerprint(one) == configuration.fingerprint(other)
    assert configuration.fingerprint(one) != configuration.fingerprint(ImageData(source="https://h/x.tar"))


def test_every_field_of_a_training_configuration_is_public_without_secrets():
    """Wherever a URL may stand: a preview's prompt is as good as a path. A path on this machine it may not be."""
    secret = "https://user:correct-horse-battery@host/x?token=0123-staple-4567"
    values = {
        "run": {"dir": "here"},
        "data": {"kind": "latents", "path": {secret: 1.0}},
        "log": {"project": secret},
        "objective": {
            "kind": "text_to_image",
            "model": {"preset": "mmdit-test"},
            "autoencoder": secret,
            "text": {"t5": secret, "clip_l": secret, "clip_g": secret},
            "preview": {"prompts": [secret]},
        },
    }
    config = configuration.validate(TrainConfig, values, "values")
    assert told(config.model_dump_json())
    assert told(configuration.dump(config)) == []
    assert told(str(configuration.public(config))) == []
    for section in ({"run": {"dir": secret}}, {"data": {**values["data"], "cache": {"dir": secret}}}):
        with pytest.raises(UserError, match="a URL, expected a path on this machine") as caught:
            configuration.validate(TrainConfig, {**values, **section}, "values")
        assert told(str(caught.value)) == []


def test_what_was_left_out_of_a_saved_url_is_asked_for(capsys):
    for text in ("https://***@host/x.tar", "https://host/x.tar?***"):
        with pytest.raises(UserError, match="give the URL again as an override"):
            check_source(text)
    say(f"see https://user:{PASSWORD}@host/x?token={TOKEN}")
    assert capsys.readouterr().err == "see https://***@host/x?***\n"
