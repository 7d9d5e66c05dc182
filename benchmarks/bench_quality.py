"""What the pack's encodings keep of real pictures: the benchmark by which one of bc7 and ycc is chosen.

    python -m benchmarks.bench_quality [--part pictures|learning] [--work FOLDER] [--out FILE.jsonl or FOLDER]

Pictures: those of imagenet-sample at short side 256, aspect kept, are encoded and decoded; PSNR over RGB, SSIM, bytes
and encoding time. Learning: the same short training on imagenette128 from the originals and from each encoding, several
seeds; training and held-out pictures are encoded and decoded once, and lie in --work as raw .beton (0.7 GB each).

    bc7      BC7's mode 6 alone, 1 byte a pixel
    ycc      BC4 blocks of Y, Cb, Cr 4:2:0, 0.75 bytes a pixel; chroma doubled by nearest (the pack's rule), or smoothed;
             the blocks are made here, or by etcpak
    jpeg Q   4:2:0, baseline

Both block encodings are decoded by texture2ddecoder. Of the loser no code exists elsewhere.
"""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # run as a script: the project's root goes first
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from benchmarks import measure
from fastrot import entry, machine
from fastrot.config import UsageError
from fastrot.data import pictures
from fastrot.data.pack import bc4, layout
from fastrot.data.sources import Source, image_folder

SHORT_SIDE = 256
PRESET, BATCH, STEPS, RATE, SCALE, SEEDS = "demo", 32, 1200, 0.05, (0.5, 1.0), 3
CHANCE = 0.25
LEAST = 0.55  # of the held-out rotations predicted right, from the originals: below, the comparison is void
CANDIDATES, ORIGINALS = ("bc7", "ycc"), "originals"
SMOOTHED, BY_ETCPAK = "ycc, chroma smoothed", "ycc by etcpak"  # looked at, not learnt from
QUALITY, TIME, LEARNT = "picture quality", "encoding", "held-out rotation accuracy"
IMAGENET, ASPECT = 1_281_167, 1.39  # training pictures, and their mean aspect
QUICK = {"pictures": 8, "train": 640, "val": 160, "steps": 20, "seeds": 2}
OF_PICTURES = (
    f"pictures at short side {SHORT_SIDE}, aspect kept, smaller ones as they are; PSNR over RGB, SSIM with a 7x7 window "
    "over the three channels; the pooled PSNR is that of all pixels together, one picture in twenty is below p5; "
    "times are of the processor, one picture after the other"
)
OF_LEARNING = (
    "the median with the lowest and the highest of the seeds; all encodings learn from the same pictures, crops and first "
    "weights, seed by seed, and held-out pictures go through the encoding that was learnt from; the originals are JPEGs "
    "of quality 78 at 128x128 already, and 64-pixel crops of them are shrunk, which hides fine differences; rate, batch, "
    "crops and steps were chosen on trials of another seed from the originals (LOG.md)"
)

Picture = UInt8[np.ndarray, "h w 3"]
Plane = UInt8[np.ndarray, "h w"]


# ---- the encodings ----


@dataclass(frozen=True, slots=True)
class Codec:
    """An encoding: a picture to bytes, and bytes with height and width back to a picture."""

    encode: Callable[[Picture], bytes]
    decode: Callable[[bytes, int, int], Picture]


def codecs() -> dict[str, Codec]:
    """All that are compared, by name. Raises UsageError where a package is missing that only this benchmark needs."""
    try:
        import etcpak  # noqa: F401
        import skimage  # noqa: F401
        import texture2ddecoder  # noqa: F401
    except ImportError as e:
        raise UsageError(
            f"this benchmark needs {e.name}: pip install etcpak texture2ddecoder scikit-image"
        ) from None
    return {
        "bc7": Codec(encode_bc7, decode_bc7),
        "ycc": Codec(encode_ycc, decode_ycc),
        SMOOTHED: Codec(encode_ycc, partial(decode_ycc, smooth=True)),
        BY_ETCPAK: Codec(partial(encode_ycc, coder=bc4_by_etcpak), decode_ycc),
        **{f"jpeg {q}": Codec(partial(encode_jpeg, quality=q), decode_jpeg) for q in (75, 95, 90)},
    }


def encode_jpeg(picture: Picture, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(picture, quality=quality, colorsubsampling="420")


def decode_jpeg(data: bytes, height: int, width: int) -> Picture:
    return simplejpeg.decode_jpeg(data)


def encode_bc7(picture: Picture) -> bytes:
    """BlockSampler of mode 6, for the least squared error of RGB."""
    import etcpak

    knobs = etcpak.BC7CompressBlockParams()
    knobs.m_mode_mask, knobs.m_max_partitions = 1 << 6, 0
    knobs.m_perceptual = False  # its default weighs luma, and loses more of RGB (LOG.md)
    knobs.init_linear_weights()
    padded = _padded(picture, 4)
    height, width = padded.shape[:2]
    opaque = np.full((height, width, 4), 255, np.uint8)
    opaque[..., :3] = padded
    return etcpak.compress_bc7(opaque.tobytes(), width, height, knobs)


def decode_bc7(data: bytes, height: int, width: int) -> Picture:
    import texture2ddecoder

    tall, wide = _up(height, 4), _up(width, 4)
    blue_first = np.frombuffer(texture2ddecoder.decode_bc7(data, wide, tall), np.uint8)
    return np.ascontiguousarray(blue_first.reshape(tall, wide, 4)[:height, :width, 2::-1])


def encode_ycc(picture: Picture, coder: Callable[[Plane], np.ndarray] = bc4.encode) -> bytes:
    """The pack's tiles; `coder` may code their blocks in another way."""
    return layout.tiles_of(picture, coder).tobytes()


def decode_ycc(data: bytes, height: int, width: int, smooth: bool = False) -> Picture:
    """As the pack decodes them; where `smooth`, chroma is not doubled by nearest but by bilinear."""
    tiles = np.frombuffer(data, np.uint8).reshape(-1, layout.WIDTH["ycc"])
    if not smooth:
        return layout.decode(tiles, height, width)
    down, right = _up(height, 8) // 8, _up(width, 8) // 8
    blocks = bc4.decode(tiles.reshape(-1, 8)).reshape(down, right, 6, 4, 4)
    quads = blocks[:, :, :4].reshape(down, right, 2, 2, 4, 4)
    luma = quads.transpose(0, 2, 4, 1, 3, 5).reshape(8 * down, 8 * right)
    cb, cr = (
        cv2.resize(plane, (8 * right, 8 * down), interpolation=cv2.INTER_LINEAR)
        for plane in (blocks[:, :, k].swapaxes(1, 2).reshape(4 * down, 4 * right) for k in (4, 5))
    )
    whole = layout.rgb_of(*(plane.astype(np.int32) for plane in (luma, cb, cr)))
    return np.ascontiguousarray(whole[:height, :width])


def bc4_by_etcpak(plane: Plane) -> np.ndarray:
    import etcpak

    height, width = plane.shape
    in_red = np.zeros((height, width, 4), np.uint8)
    in_red[..., 0] = plane
    data = etcpak.compress_bc4(in_red.tobytes(), width, height)
    return np.frombuffer(data, np.uint8).reshape(height // 4, width // 4, 8)


def _padded(picture: Picture, multiple: int) -> Picture:
    """Sides up to multiples, the edge replicated."""
    height, width = picture.shape[:2]
    more = ((0, _up(height, multiple) - height), (0, _up(width, multiple) - width), (0, 0))
    return np.pad(picture, more, mode="edge")


def _up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def versions() -> dict[str, str]:
    """Of what a row does not name by itself."""
    return {name: version(name) for name in ("etcpak", "texture2ddecoder", "scikit-image")}


# ---- what is kept of pictures ----


@dataclass(frozen=True, slots=True)
class Kept:
    """What a coded picture keeps of the one that it was made from."""

    pixels: int
    size: int  # bytes
    seconds: float  # of the processor, to encode
    squares: float  # mean squared error over RGB
    ssim: float

    @property
    def psnr(self) -> float:
        return psnr(self.squares)


def psnr(squares: float) -> float:
    """Decibels of a mean squared error; a hundred where nothing is lost."""
    return float(10 * np.log10(255**2 / max(squares, 255**2 / 1e10)))


def judge(codec: Codec, picture: Picture) -> Kept:
    from skimage.metrics import structural_similarity

    begin = time.process_time()
    data = codec.encode(picture)
    seconds = time.process_time() - begin
    back = codec.decode(data, *picture.shape[:2])
    squares = float(np.square(back.astype(np.float64) - picture).mean())
    alike: Any = structural_similarity(picture, back, channel_axis=2, data_range=255)
    return Kept(picture[..., 0].size, len(data), seconds, squares, float(alike))


def sample(root: Path, limit: int | None) -> Iterator[Picture]:
    """Real pictures of a folder, decoded and shrunk."""
    if not root.is_dir():
        raise UsageError(f"{root} is no folder: name one of pictures with --sample DIR")
    source = image_folder(root)
    for i in range(len(source.records[:limit])):
        whole = _read(source, i)
        yield np.ascontiguousarray(pictures.shrink(whole, SHORT_SIDE))


def _read(source: Source, i: int) -> Picture:
    """A picture of a folder, decoded."""
    data = source.read(i)
    assert isinstance(data, bytes)
    return pictures.decode(data)


def picture_rows(codec: str, kept: list[Kept]) -> list[dict[str, Any]]:
    """The figures of one encoding over all pictures: what is kept in how many bytes, and the time it takes."""
    each, alike = (np.array([getattr(one, name) for one in kept]) for name in ("psnr", "ssim"))
    pixels, size = sum(one.pixels for one in kept), sum(one.size for one in kept)
    shape = {"pictures": len(kept), "short side": SHORT_SIDE}
    of = dict(theme="quality", variant=codec, mode="pictures", dtype="uint8", warmup=0)
    of |= {"shape": shape, "about": OF_PICTURES, **versions()}
    return [
        measure.row(
            QUALITY,
            **of,
            **measure.middle(each.tolist(), "dB"),
            mean_db=float(each.mean()),
            pooled_db=psnr(sum(one.squares * one.pixels for one in kept) / pixels),
            p5_db=float(np.percentile(each, 5)),
            ssim=float(alike.mean()),
            p5_ssim=float(np.percentile(alike, 5)),
            bytes_a_pixel=size / pixels,
            bytes_a_picture=size / len(kept),
        ),
        measure.row(
            TIME,
            **of,
            **measure.middle([1e3 * one.seconds for one in kept], "ms a picture and core"),
            mean_ms=1e3 * statistics.mean(one.seconds for one in kept),
        ),
    ]


def judge_pictures(root: Path, limit: int | None, tell: Callable[[dict[str, Any]], None]) -> None:
    """Every picture through every encoding; the rows."""
    found: dict[str, list[Kept]] = {name: [] for name in codecs()}
    for picture in sample(root, limit):
        for name, codec in codecs().items():
            found[name].append(judge(codec, picture))
    for name, kept in found.items():
        quality, seconds = picture_rows(name, kept)
        tell(quality)
        if name != SMOOTHED:  # the bytes are ycc's
            tell(seconds)


# ---- what is learnt from them ----


def prepared(root: Path, name: str, codec: Codec | None, work: Path, quick: bool) -> list[Path]:
    """Training and held-out pictures after the encoding, as raw .beton; `codec` None: as they are."""
    made = []
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UsageError(
                f"{root / split} is no folder: name one with train/ and val/, --root DIR"
            )
        limit = QUICK[split] if quick else None
        out = work / f"quality-{name.replace(' ', '')}-{split}{limit or ''}.beton"
        if not out.exists():
            between = work / f"{out.stem}-pictures"
            shutil.rmtree(between, ignore_errors=True)
            write_through(codec, root / split, between, limit)
            knobs = ["--source", "imagefolder", "--root", between, "--encoding", "raw"]
            script = measure.ROOT / "dataprep" / "to_ffcv.py"
            _run(script, *knobs, "--workers", 0, "--out", out)
            shutil.rmtree(between)
        made.append(out)
    return made


def write_through(codec: Codec | None, root: Path, out: Path, limit: int | None) -> None:
    """The pictures of a class folder after the encoding, exact as BMP, in the same order under the same names."""
    source = image_folder(root)
    for name in source.classes:
        (out / name).mkdir(parents=True)  # also one that the limit leaves empty
    count = len(source.records)
    for i in range(0, count, 1 if limit is None else max(1, count // limit)):
        picture = _read(source, i)
        if codec is not None:
            picture = codec.decode(codec.encode(picture), *picture.shape[:2])
        path = out / source.records[i].path
        Image.fromarray(picture).save(path.with_name(path.name + ".bmp"))


def learn(train: Path, judge: Path, run: Path, steps: int, seed: int) -> dict[str, Any]:
    """One training through the real entry; its summary. A run that is finished is not made again."""
    knobs = ["--batch", BATCH, "--schedule.steps", steps, "--lr", RATE, "--seed", seed]
    knobs += ["--method.crop.scale", *SCALE, "--validate-every", 10**6, "--device", "cpu"]
    knobs += ["--no-tensorboard", "--log-every", 100, "--out", run]
    if not (run / "summary.json").exists():
        script = measure.ROOT / "fastrot" / "train.py"
        _run(script, PRESET, "--data", train, "--val", judge, *knobs)
    return json.loads((run / "summary.json").read_text())


def learning_row(name: str, summaries: list[dict[str, Any]], void: bool) -> dict[str, Any]:
    """The accuracies of one encoding, a seed each; `void` where the originals' were too low to compare with."""
    right = [each["val_accuracy"] for each in summaries]
    aim = {"target": LEAST, "better": "higher"} if name == ORIGINALS else {}
    return measure.row(
        LEARNT,
        theme="quality",
        variant=name,
        mode="learning",
        shape={"batch": BATCH, "steps": summaries[0]["steps"], "crops": 64, "seeds": len(right)},
        dtype="bf16" if _bf16() else "float32",
        warmup=0,
        **measure.middle(right, "share"),
        mean=statistics.mean(right),
        lowest=min(right),
        highest=max(right),
        values=right,
        chance=CHANCE,
        void=void,
        seconds=statistics.mean(each["seconds"] for each in summaries),
        images_per_s=statistics.mean(each["images_per_s"] for each in summaries),
        about=OF_LEARNING,
        **versions(),
        **aim,
    )


def learn_from_all(
    root: Path,
    work: Path,
    steps: int,
    seeds: Iterable[int],
    quick: bool,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """The same training from the originals and from each encoding; a row each, as soon as it is there."""
    commit = measure.row("run")["commit"][:12]  # a run of other code is not taken for this one
    each: dict[str, Codec | None] = {ORIGINALS: None, **codecs()}
    del each[SMOOTHED], each[BY_ETCPAK]
    void = False
    for name, codec in each.items():
        train, judge = prepared(root, name, codec, work, quick)
        runs = (work / f"{train.stem}-{commit}-{steps}-{seed}" for seed in seeds)
        summaries = [
            learn(train, judge, run, steps, seed) for run, seed in zip(runs, seeds, strict=True)
        ]
        if name == ORIGINALS:
            void = statistics.mean(one["val_accuracy"] for one in summaries) < LEAST
        tell(learning_row(name, summaries, void))


def _bf16() -> bool:
    import torch

    return machine.multiplies_bf16(torch.device("cpu"))


# ---- the decision ----

RULE = (
    "Rule: the encoding with fewer bytes wins, unless its mean accuracy is lower than the other's by more than the "
    "spread of the seeds (highest less lowest, the wider of the two)."
)


def chosen(rows: list[dict[str, Any]]) -> str | None:
    """The encoding that RULE picks; None where rows are missing, or the comparison is void."""
    size, learnt = _by_variant(rows, QUALITY), _by_variant(rows, LEARNT)
    if any(name not in size or name not in learnt for name in CANDIDATES) or _void(learnt):
        return None
    small, large = sorted(CANDIDATES, key=lambda name: size[name]["bytes_a_pixel"])
    lower = learnt[large]["mean"] - learnt[small]["mean"]
    return large if lower > max(_spread(learnt[name]) for name in CANDIDATES) else small


def decision(rows: list[dict[str, Any]]) -> list[str]:
    """The rule, the figures that it looks at, what it picks, and what that means for ImageNet."""
    size, learnt = _by_variant(rows, QUALITY), _by_variant(rows, LEARNT)
    name = chosen(rows)
    if name is None:
        least = f"at least {LEAST:.0%} must come from the originals"
        why = f"void: {least}" if _void(learnt) else "rows of bc7 or ycc are missing"
        return [RULE, f"Nothing is chosen ({why})."]
    told = [
        f"{each}: {size[each]['bytes_a_pixel']:.3f} bytes a pixel, {size[each]['mean_db']:.1f} dB, "
        f"{learnt[each]['mean']:.1%} of held-out rotations predicted right ({learnt[each]['lowest']:.1%} to "
        f"{learnt[each]['highest']:.1%}, {learnt[each]['reps']} seeds)."
        for each in CANDIDATES
    ]
    apart = [
        ours - theirs
        for theirs, ours in zip(*(learnt[e]["values"] for e in CANDIDATES), strict=True)
    ]
    a_pixel = size[name]["bytes_a_pixel"]
    square, whole = (IMAGENET * SHORT_SIDE**2 * a_pixel * wide / 1e9 for wide in (1, ASPECT))
    means, widest = [row["mean"] for row in learnt.values()], max(map(_spread, learnt.values()))
    return [
        RULE,
        *told,
        f"The means of all {len(means)} that were learnt from lie within {100 * (max(means) - min(means)):.1f} points, "
        f"and the seeds of one alone within up to {100 * widest:.1f}: smaller differences decide nothing. "
        "All were trained from raw pixels: images/s tell of the machine's neighbours, not of the encodings.",
        f"Seed by seed, {CANDIDATES[1]} less {CANDIDATES[0]}: "
        f"{', '.join(f'{each:+.1%}' for each in apart)} of the rotations.",
        f"Chosen: {name}.",
        f"In {name} ImageNet's {IMAGENET:,} training pictures take {square:.0f} GB as squares of {SHORT_SIDE}, and "
        f"{whole:.0f} GB at short side {SHORT_SIDE} with their mean aspect of {ASPECT}.",
    ]


def _by_variant(rows: list[dict[str, Any]], what: str) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in rows if row["what"] == what}


def _void(learnt: dict[str, dict[str, Any]]) -> bool:
    return any(row["void"] for row in learnt.values())


def _spread(row: dict[str, Any]) -> float:
    return row["highest"] - row["lowest"]


# ---- the command ----


def _run(script: Path, *knobs: Any) -> None:
    command = [sys.executable, str(script), *map(str, knobs)]
    if subprocess.run(command).returncode:
        raise UsageError(f"this failed, see above: {' '.join(command)}")


def main(args: list[str] | None = None) -> int:
    """Judge pictures, train, print, and append to the machine's file of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("pictures", "learning"), help="default: both")
    parser.add_argument("--sample", type=Path, help="folder of pictures; default: imagenet-sample")
    parser.add_argument("--root", type=Path, help="holds class folders in train/ and in val/")
    parser.add_argument("--work", type=Path, default=Path("prepared"), help="for files and runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} pictures")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="a short look; kept only with --out")
    asked = parser.parse_args(args)
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        if asked.out or not asked.quick:
            measure.append(measure.results("cpu", asked.out), row)
        void = f" VOID: under {LEAST:.0%} from the originals" if row.get("void") else ""
        measure.say(row, void)

    if asked.part != "learning":
        root = asked.sample or measure.shared_data() / "imagenet-sample"
        judge_pictures(root, QUICK["pictures"] if asked.quick else None, tell)
    if asked.part != "pictures":
        root = asked.root or measure.shared_data() / "imagenette128"
        asked.work.mkdir(parents=True, exist_ok=True)
        steps, seeds = (
            (QUICK["steps"], QUICK["seeds"]) if asked.quick else (asked.steps, asked.seeds)
        )
        learn_from_all(root, asked.work, steps, range(1, seeds + 1), asked.quick, tell)
    if asked.part is None:
        print("\n".join(decision(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
