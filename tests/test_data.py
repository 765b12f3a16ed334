"""`tests/data`: its README names every file once, with a licence that lets it be passed on; tests need nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import DATA, REPO

LARGEST = 4_000_000
"""Bytes that a clone may cost for the sake of the tests' material."""
LICENCES = {"CC0-1.0", "MIT", "Apache-2.0"}


def test_every_file_is_named_once_with_its_source_and_licence() -> None:
    rows = [line.split(" | ") for line in (DATA / "README.md").read_text().splitlines() if line.startswith("| `")]
    named, notices = [], {DATA / "README.md"}
    for pattern, _, source, licence in rows:
        repository = re.search(r"[\w-]+/([\w-]+)", source)
        assert repository and licence.rstrip(" |") in LICENCES
        named += DATA.glob(pattern.strip("|` "))
        if licence.startswith("MIT"):
            notices.add(DATA / "licences" / f"{repository[1]}.txt")
    there = [path for path in DATA.rglob("*") if path.is_file()]
    assert sorted([*named, *notices]) == sorted(there)
    assert sum(path.stat().st_size for path in there) < LARGEST


def test_vectors_and_heads_are_what_the_page_says() -> None:
    ratings = np.load(DATA / "heads" / "ratings.npz")
    for model, dimension in (("vit_l_14", 768), ("vit_b_32", 512)):
        vectors = ratings[model]
        assert vectors.shape == (10, dimension)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
        head = torch.load(DATA / "heads" / f"sa_0_4_{model}_linear.pth", map_location="cpu", weights_only=True)
        scores = vectors @ head["weight"].numpy()[0] + head["bias"].item()
        assert (np.diff(scores) > 1).all() and 10 < scores[-1] < 12
    folded = np.load(DATA / "heads" / "aesthetic_v2_folded.npz")
    scores = ratings["vit_l_14"] @ folded["weight"] + folded["bias"]
    assert (np.diff(scores) > 0.1).all() and scores[[0, -1]] == pytest.approx([1.6555, 5.7468], abs=1e-4)
    golden = np.load(DATA / "clip_retrieval" / "embeddings.npz")
    tensors = {path.stem for path in (DATA / "clip_retrieval" / "tensors").iterdir()}
    assert set(golden["names"].tolist()) == tensors and golden["embeddings"].shape == (7, 512)
    assert np.linalg.norm(golden["embeddings"].astype(np.float32), axis=1) == pytest.approx(1, abs=1e-3)


def test_no_test_skips_for_want_of_files_or_packages() -> None:
    """The lock installs what tests import, and they read nothing beside the checkout. GPU machines may be bare."""
    optional = re.compile(r"importorskip\(|REPO\.parent|parents\[[3-9]\]")
    tests = [path for path in (REPO / "tests").rglob("*.py") if path.parent.name != "gpu" and path != Path(__file__)]
    assert not [path.name for path in tests if optional.search(path.read_text())]
