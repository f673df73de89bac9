"""The moments of chosen experts: by loops over tokens, whole and by layer, in parts, kept by content."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.calibration.second_pass import look_again
from harness.calibration.streamed import chunks
from harness.checkpoints.load import load_model
from harness.contracts.second_pass import Look, Moments
from harness.families.table import FAMILIES
from tests.brute_force import routed_documents
from tests.harness.calibration.streams import plain, streamed
from tests.methods.test_tilted import Tokens
from tests.tiny import FAMILY_NAMES, tiny_model


def looks(gate_squared: bool = False, basis: int | None = None) -> dict[int, Look]:
    rng = np.random.default_rng(4)
    found = {}
    for layer, experts in ((0, [1, 6]), (1, [0, 3, 7])):
        columns = None if basis is None else np.linalg.qr(rng.normal(size=(32, basis)))[0]
        shape = (len(experts), 32)
        found[layer] = Look(experts, rng.normal(size=shape), 0.1 * rng.normal(size=shape), columns, gate_squared)
    return found


def assert_equal(found, expected, asked: dict[int, Look], bound: float) -> None:
    for layer in asked:
        for name, want in vars(expected(layer)).items():
            got = getattr(found(layer), name)
            assert got.shape == want.shape, name
            np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max(), err_msg=f"{layer} {name}")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_moments_equal_brute_force(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    text, row = plain(), FAMILIES[family]
    seen = routed_documents(model, [one.input_ids.tolist() for one in text])
    for number, (squared, basis) in enumerate(((False, None), (True, None), (False, 5), (True, 5))):
        asked = looks(squared, basis)

        def brute(layer: int, asked=asked, squared=squared) -> Moments:
            look = asked[layer]
            each = [
                Tokens(model, layer, j, seen[layer], squared).moments(look, place)
                for place, j in enumerate(look.experts)
            ]
            return Moments(**{name: np.array([one[name] for one in each]) for name in each[0]})

        folders = [tmp_path / f"{number}-{kind}" for kind in ("whole", "by layer")]
        whole = look_again(lambda: load_model(tmp_path / "model"), row, text, asked, folders[0], {"model": "m"}, 2)
        layers = look_again(lambda: streamed(tmp_path / "model"), row, text, asked, folders[1], {"model": "m"}, 2)
        assert_equal(whole, brute, asked, 1e-5)
        assert_equal(layers, whole, asked, 0.0)


def test_a_corpus_in_parts_adds_up(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path / "model")
    row, text, asked = FAMILIES["olmoe"], plain(), looks()
    small = replace(streamed(tmp_path / "model"), memory=40 * 2 * 32 * 4)
    assert len(chunks(small, text, 2)) > 1
    parts = look_again(lambda: small, row, text, asked, tmp_path / "parts", {"model": "m"}, 2)
    one = look_again(lambda: streamed(tmp_path / "model"), row, text, asked, tmp_path / "one", {"model": "m"}, 2)
    assert_equal(parts, one, asked, 1e-6)


def test_moments_are_kept_by_what_is_looked_at_and_a_pass_goes_on(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path / "model")
    row, text, asked, opened = FAMILIES["olmoe"], plain(), looks(), []

    def seen(which: dict[int, Look], model: str = "m"):
        def open_model():
            opened.append(model)
            return streamed(tmp_path / "model")

        return look_again(open_model, row, text, which, tmp_path / "kept", {"model": model}, 2)

    first = seen(asked)
    before = {layer: first(layer) for layer in asked}
    assert_equal(seen(asked), before.__getitem__, asked, 0.0)
    assert opened == ["m"]
    (folder,) = [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    (folder / "0.npz").write_bytes(b"broken")
    stamp = (folder / "1.npz").stat().st_mtime_ns
    assert_equal(seen(asked), before.__getitem__, asked, 0.0)
    assert opened == ["m", "m"] and (folder / "1.npz").stat().st_mtime_ns == stamp
    seen(asked, "another")
    seen({0: asked[0]})
    seen(looks(gate_squared=True))
    seen(looks(basis=3))
    assert len(opened) == 6
