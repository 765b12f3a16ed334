"""Weights: deterministic, identified by contents, read safely, fitted strictly."""

from __future__ import annotations

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from curator_embed.embedders import TimmImageEmbedder
from curator_embed.embedders.catalogue import Blueprint
from curator_embed.embedders.weights import load_weights, read_state_dict, state_dict_sha256
from curator_embed.errors import CuratorEmbedError, UsageError

SMALL = "test_vit"


def digest(model: torch.nn.Module) -> str:
    return state_dict_sha256(model.state_dict())


def test_random_weights_are_the_same_each_time_and_disturb_no_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = digest(Blueprint.of(SMALL).build())
    assert torch.equal(torch.rand(3), expected)
    assert digest(Blueprint.of(SMALL).build()) == first


def test_the_hash_is_of_contents_not_of_layout_or_order() -> None:
    weight = torch.rand(4, 3, 3, 3)
    state = {"a": weight, "b": torch.tensor(7), "c": torch.ones(2, dtype=torch.bfloat16)}
    laid_out = {"c": state["c"], "b": state["b"], "a": weight.to(memory_format=torch.channels_last)}
    assert state_dict_sha256(state) == state_dict_sha256(laid_out)
    changes = ({"b": torch.tensor(8)}, {"a": weight.reshape(3, 4, 3, 3)}, {"c": torch.ones(2, dtype=torch.float16)})
    assert len({state_dict_sha256(state | change) for change in ({}, *changes)}) == 4


@pytest.mark.parametrize("kind", ["safetensors", "pth", "checkpoint", "parallel"])
def test_files_of_every_kind_load_and_a_classifier_head_is_left_out(kind: str, tmp_path: Path) -> None:
    source = timm.create_model(SMALL)  # with its head
    with torch.no_grad():
        for number, parameter in enumerate(source.parameters()):
            parameter.fill_(number + 1)
    state = source.state_dict()
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, file)
    else:
        wrapped = {"pth": state, "checkpoint": {"state_dict": state, "epoch": 3}}
        torch.save(wrapped.get(kind, {f"module.{k}": v for k, v in state.items()}), file)
    model = Blueprint.of(SMALL).build(weights=file)
    assert not any(name.startswith("head.") for name in model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_position_embeddings_are_resampled_for_another_size(tmp_path: Path) -> None:
    native = Blueprint.of(SMALL)
    save_file(native.build().state_dict(), tmp_path / "w.safetensors")
    larger = Blueprint.of(SMALL, native.native_size * 2).build(weights=tmp_path / "w.safetensors")
    assert larger.pos_embed.shape[1] > native.build().pos_embed.shape[1]
    assert torch.equal(larger.blocks[0].attn.qkv.weight, native.build().blocks[0].attn.qkv.weight)


def test_weights_of_another_model_are_refused_with_the_differences(tmp_path: Path) -> None:
    state = Blueprint.of(SMALL).build().state_dict()
    del state["norm.weight"]
    state["stranger.weight"] = torch.zeros(1)
    state["blocks.0.attn.proj.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as caught:
        Blueprint.of(SMALL).build(weights=tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "w.safetensors" in message
    assert "1 missing (norm.weight)" in message
    assert "1 unexpected (stranger.weight)" in message
    assert "blocks.0.attn.proj.bias [7] instead of" in message


def test_a_head_is_dropped_only_from_headless_models(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "head.weight": torch.zeros(1)}, tmp_path / "w.pth")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"1 unexpected \(head.weight\)"):
        load_weights(model, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", droppable=("head",))
    assert not model.weight.any()


class Malice:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("kind", ["absent", "garbage", "code", "no tensors"])
def test_what_is_no_state_dict_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "w.pth"
    if kind == "garbage":
        file.write_bytes(b"garbage")
    elif kind == "code":
        torch.save({"a": Malice()}, file)
    elif kind == "no tensors":
        torch.save({"a": 1}, file)
    with pytest.raises(UsageError, match=r"w\.pth"):
        read_state_dict(file)
    assert not (tmp_path / "hacked").exists()


def hub_at(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_without_a_hub_the_error_comes_soon_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        hub_at(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path, monkeypatch)
        begun = time.monotonic()
        with pytest.raises(CuratorEmbedError, match=r"could not be reached for the weights of resnet18") as error:
            Blueprint.of("resnet18.a1_in1k").build(pretrained=True)
    assert time.monotonic() - begun < 15  # its library would have tried again for 46 s
    assert "timm/resnet18.a1_in1k elsewhere and pass weights=PATH" in str(error.value)
    assert "HF_HUB_OFFLINE=1" in str(error.value)


def test_a_hub_that_answers_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class NothingHere(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), NothingHere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        with pytest.raises(CuratorEmbedError, match=r"could not be downloaded .*resnet18\.a1_in1k elsewhere"):
            Blueprint.of("resnet18.a1_in1k").build(pretrained=True)
        server.shutdown()
    assert any(path.endswith("/timm/resnet18.a1_in1k/resolve/main/model.safetensors") for path in asked)


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{SMALL}.r160_in1k"
    folder = tmp_path / f"models--timm--{name}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    model = timm.create_model(name, pretrained=False)
    save_file(model.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        hub_at(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path, monkeypatch)
        built = Blueprint.of(name).build(pretrained=True)
    assert torch.equal(built.state_dict()["patch_embed.proj.weight"], model.state_dict()["patch_embed.proj.weight"])


def test_a_name_without_pretrained_weights_says_so() -> None:
    with pytest.raises(UsageError, match="no pretrained weights of vit_base_patch32_plus_256"):
        Blueprint.of("vit_base_patch32_plus_256").build(pretrained=True)


def test_a_tag_without_weights_names_those_that_have_some() -> None:
    with pytest.raises(UsageError, match=r"weights of vit_huge_patch14_224\.untrained; choose vit_huge") as told:
        TimmImageEmbedder("vit_huge_patch14_224.untrained", pretrained=True)
    named = str(told.value).partition("choose ")[2].partition(", or")[0].split(" or ")
    assert len(named) >= 2 and all(Blueprint.of(name).config.has_weights for name in named)
