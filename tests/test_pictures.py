"""Pictures of other tools are seen as a viewer shows them; what cannot be is told in one line."""
import base64
import io
import json

import numpy as np
import pytest
from conftest import stops
from PIL import Image, ImageDraw, PngImagePlugin
from test_hostile import png

import coldstart
import distill
from gen_data import open_picture
from tools import ask

PLAIN = Image.new("RGB", (96, 64), "white")
ImageDraw.Draw(PLAIN).rectangle([8, 8, 40, 56], fill="red")
ImageDraw.Draw(PLAIN).ellipse([50, 10, 88, 50], fill="blue")
GREY = np.asarray(PLAIN.convert("L"))
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
           6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # what undoes an EXIF orientation


def clear():
    """PLAIN as diagram tools export it: where it is white, black and transparent."""
    pixels = np.asarray(PLAIN.convert("RGBA")).copy()
    pixels[(pixels[..., :3] == 255).all(-1)] = 0
    return Image.fromarray(pixels)


def palette():
    """PLAIN in three colours, the first of them transparent."""
    marks = np.select([(np.asarray(PLAIN) == colour).all(-1) for colour in (
        (255, 255, 255), (255, 0, 0), (0, 0, 255))], [0, 1, 2]).astype(np.uint8)
    image = Image.fromarray(marks).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    return image


def turned(orientation):
    """(PLAIN laid down as a camera does, the EXIF that says how it is shown)"""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return PLAIN.transpose(Image.Transpose[UPRIGHT[orientation]]), exif


def wordy(**more):
    """PLAIN as a drawing tool saves it, with 3 MB of its own text, beside a profile if asked."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for word in "abc":
        info.add_text(word, word * 10**6, zip=True)
    PLAIN.save(file, "PNG", pnginfo=info, **more)
    return file.getvalue()


@pytest.mark.parametrize("name, save", [
    ("plain.png", PLAIN.save), ("clear.png", clear().save), ("clear.webp", lambda path: clear(
    ).save(path, lossless=True)), ("clear.tiff", clear().save),
    ("palette.png", lambda path: palette().save(path, transparency=0)),
    ("palette.gif", lambda path: palette().save(path, transparency=0)),
    ("bytes.png", lambda path: palette().save(path, transparency=b"\0\xff\xff")),
    ("key.png", lambda path: PLAIN.save(path, transparency=(255, 255, 255))),
    *[(f"exif{i}.png", lambda path, i=i: turned(i)[0].save(path, exif=turned(i)[1]))
      for i in UPRIGHT],
    ("frames.gif", lambda path: PLAIN.save(path, save_all=True, append_images=[clear()])),
    ("text.png", lambda path: path.write_bytes(wordy()))])
def test_the_same_picture_whatever_the_form(tmp_path, name, save):
    save(tmp_path / name)
    seen = open_picture(tmp_path / name)
    assert seen.mode == "RGB" and seen.size == PLAIN.size and seen.tobytes() == PLAIN.tobytes()


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 255, 51)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (204, 204, 255)  # 51 is a fifth


@pytest.mark.parametrize("name, values", [
    ("a.png", GREY.astype(np.uint16) * 257), ("a.tiff", GREY.astype(np.float32) / 255),
    ("a.tiff", GREY.astype(np.int32) * 257)])
def test_more_bits_are_refused(tmp_path, capsys, name, values):
    """Pillow would clip them to white."""
    Image.fromarray(values).save(tmp_path / name)
    assert "wanted 8 bits" in stops(capsys, open_picture, tmp_path / name)


def test_what_cannot_be_seen(tmp_path, capsys):
    whole = io.BytesIO()
    PLAIN.save(whole, "PNG")
    broken = {"long.png": (png(3000, 10), "(3000, 10) px, wanted at most 1:200"),
              "tall.png": (png(10, 2001), "(10, 2001) px, wanted"),
              "bomb.png": (png(40_000, 40_000), "DecompressionBombError"),
              "cut.png": (whole.getvalue()[:-40], "OSError"),
              "text.png": (wordy().replace(b"IDAT", b"IDAT\0", 1), "cannot be read as a picture"),
              "drawing.svg": (b"<svg/>", "UnidentifiedImageError")}
    for name, (content, message) in broken.items():
        (tmp_path / name).write_bytes(content)
        line = stops(capsys, open_picture, tmp_path / name)
        assert name in line and message in line
    (tmp_path / "edge.png").write_bytes(png(2000, 10))
    assert open_picture(tmp_path / "edge.png").size == (2000, 10)


@pytest.mark.parametrize("error", [ValueError, KeyError, ZeroDivisionError, EOFError, TypeError,
                                   RuntimeError, IndexError, SyntaxError, AssertionError])
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, capsys, error):
    def load(image):
        raise error("deep inside")
    PLAIN.save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    line = stops(capsys, open_picture, tmp_path / "a.png")
    assert f"a.png: cannot be read as a picture: {error.__name__}: " in line


@pytest.mark.parametrize("stage", [coldstart, distill])
def test_own_pictures_are_decoded_before_the_first_step(tmp_path, capsys, stage):
    """Whatever rows a step draws: the last of forty pictures is broken."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with open(tmp_path / split / "metadata.jsonl", "w") as file:
            for i in range(40):
                row = {"file_name": f"{i}.png", "id": f"{split} {i}", "prompt": "?", "symbols": "1"}
                file.write(json.dumps(row) + "\n")
                PLAIN.save(tmp_path / split / f"{i}.png")
    (tmp_path / "train/39.png").write_bytes(b"no picture")
    words = ["--preset", "tiny", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    line = stops(capsys, lambda: stage.main(stage.parse_args([*words, "--init", "none"])))
    assert f"{tmp_path}/train/39.png: cannot be read as a picture" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, save", [
    ("a.png", PLAIN.save), ("jpeg.png", lambda path: PLAIN.save(path, "JPEG")),
    ("a.webp", lambda path: PLAIN.save(path, lossless=True)), ("a.bmp", PLAIN.save),
    ("a.png", clear().save), ("a.png", PLAIN.convert("L").save),
    ("a.png", lambda path: turned(6)[0].save(path, exif=turned(6)[1])),
    ("a.jpg", lambda path: turned(3)[0].save(path, exif=turned(3)[1])),
    ("a.png", lambda path: PLAIN.save(path, transparency=(255, 0, 0))),
    ("a.png", lambda path: PLAIN.save(path, save_all=True, append_images=[clear()]))])
def test_a_server_sees_what_the_stages_see(tmp_path, name, save):
    save(tmp_path / name)
    head, _, code = ask.data_url(tmp_path / name).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(code))) as image:
        assert head == f"data:image/{image.format.lower()};base64"
        assert image.convert("RGB").tobytes() == open_picture(tmp_path / name).tobytes()
